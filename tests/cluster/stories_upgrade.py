"""Stories of upgrades: each strategy to its end, and back on failure, while requests go through a real gateway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moe_gateway.money import Book, total
from moe_gateway.money_object import KEY
from moe_operator.names import gateway_budget_name
from tests.cluster.edge import CLOSED, Trickle
from tests.cluster.life import NAME, Life, story

LONGER = {"engine.maxModelLen": 16384}
"""A change that needs a new revision."""
SLOW_S = 2.5
"""Far beyond the SLO's 1 s."""
FALLBACK: dict[str, Any] = {
    "fallback.targets": [
        {
            "name": "spare",
            "provider": "openai-compatible",
            "model": "spare",
            "baseUrl": "https://spare.example.com/v1",
            "zeroRetention": True,
            "price": {"inputUsdPerMTokens": 1, "outputUsdPerMTokens": 2},
        }
    ],
    "fallback.budget": {"usdPerDay": "200"},
}
SOON = {"upgrade.progressDeadline": "10s"}


@contextmanager
def upgrading(life: Life, before: dict[str, Any], after: dict[str, Any], per_s: float = 10.0) -> Iterator[Trickle]:
    """Requests before, while and after the spec changes."""
    life.stage.pods.run(life.namespace)
    life.apply(before)
    life.until_ready()
    address = life.stage.pods.address(life.namespace, NAME)
    with life.stage.edge.trickle(address, per_s) as trickle:
        life.until("requests are answered", lambda: any(request.good for request in trickle.requests))
        life.apply(after)
        yield trickle
        # Status says what is meant before gateways are told: from the first good answer on, all are good.
        life.until("requests are answered", lambda: any(request.good for request in trickle.requests[-2:]))
        answered = len(trickle.requests)
        life.until("requests are answered", lambda: len(trickle.requests) > answered + 5)
        later = trickle.requests[answered:]
    assert [request.why for request in later if not request.good] == [], "afterwards all is well"


def only(life: Life, revision: str) -> bool:
    """Whether this revision is all that is left."""
    return life.serving() == revision and list(life.revisions()) == [revision] == life.names("rayservices")


def rolled_back(life: Life) -> bool:
    return life.condition("Degraded")[:2] == ("True", "RolledBack")


@story
def surge_moves_the_traffic_in_steps_and_no_request_fails(life: Life) -> None:
    old, new = life.revision_of(), life.revision_of(LONGER)
    weights: list[int] = []
    with upgrading(life, {}, LONGER) as trickle:

        def done() -> bool:
            weights.append(life.revisions().get(new, ("", 0))[1])
            return only(life, new)

        life.until("the new revision is all that is left", done)
    assert [request.why for request in trickle.failed()] == []
    assert list(dict.fromkeys(weights)) == [0, 50, 100]
    assert life.stage.edge.asked(life.namespace, old) > 0
    assert life.stage.edge.asked(life.namespace, new) > 0
    assert life.stage.edge.asked(life.namespace, CLOSED) == 0


@story
def surge_goes_back_from_what_is_never_ready(life: Life) -> None:
    old, new = life.revision_of(), life.revision_of(LONGER)
    life.stage.fake_ray.behave(life.namespace, new, application="DEPLOYING", message="loading weights")
    with upgrading(life, SOON, {**LONGER, **SOON}) as trickle:
        life.until("it is rolled back", lambda: rolled_back(life) and life.names("rayservices") == [old])
        assert life.revisions() == {old: ("Serving", 100), new: ("Failed", 0)}
        assert "did not become ready in time" in life.condition("Degraded")[2]
    assert [request.why for request in trickle.failed()] == []
    assert life.stage.edge.asked(life.namespace, new) == 0
    life.apply(SOON)
    life.until("the failure is forgotten with the spec that asked for it", lambda: only(life, old))
    assert life.condition("Degraded")[0] == "False"


@story
def surge_goes_back_from_what_breaks_the_slo(life: Life) -> None:
    old, new = life.revision_of(), life.revision_of(LONGER)
    life.stage.edge.behave(life.namespace, new, first_s=SLOW_S)
    slower = {"upgrade.stepDuration": "10s"}
    with upgrading(life, slower, {**LONGER, **slower}) as trickle:
        life.until("it is rolled back", lambda: rolled_back(life) and life.names("rayservices") == [old])
        assert life.revisions() == {old: ("Serving", 100), new: ("Failed", 0)}
        assert "kept the SLO for" in life.condition("Degraded")[2]
    assert [request.why for request in trickle.failed()] == []
    assert life.stage.edge.asked(life.namespace, new) > 0


def spent(life: Life) -> int:
    """Pico-dollars of all days in the deployment's books."""
    books = life.get("configmaps", gateway_budget_name(NAME))
    text = "" if books is None else books.get("data", {}).get(KEY, "")
    return sum(total(day.known()) for day in Book.read(text.encode()).days.values())


@story
def bridge_crosses_on_the_closed_api_and_no_request_fails(life: Life) -> None:
    bridge = {"upgrade.strategy": "Bridge", **FALLBACK}
    new = life.revision_of(LONGER)
    most = 0
    with upgrading(life, bridge, {**bridge, **LONGER}) as trickle:

        def done() -> bool:
            nonlocal most
            most = max(most, len(life.names("rayclusters")))
            return only(life, new)

        life.until("the new revision is all that is left", done)
        # Gateways learn of a revision from their file: until then the closed API carries on.
        life.until("requests reach it", lambda: life.stage.edge.asked(life.namespace, new) > 0)
    assert [request.why for request in trickle.failed()] == []
    assert most == 1, "never two clusters at once"
    assert life.stage.edge.asked(life.namespace, CLOSED) > 0
    # What that cost is in the books of the cluster, written by pods with their own account.
    life.until("the books tell of it", lambda: spent(life) > 0)


@story
def bridge_goes_back_from_what_is_never_ready(life: Life) -> None:
    bridge = {"upgrade.strategy": "Bridge", **FALLBACK, **SOON}
    old, new = life.revision_of(), life.revision_of(LONGER)
    life.stage.fake_ray.behave(life.namespace, new, application="DEPLOYING")
    with upgrading(life, bridge, {**bridge, **LONGER}) as trickle:
        life.until("the old one is back", lambda: rolled_back(life) and life.serving() == old)
        life.until("and alone", lambda: life.names("rayservices") == [old])
    assert [request.why for request in trickle.failed()] == []
    assert life.stage.edge.asked(life.namespace, CLOSED) > 0


@story
def recreate_is_an_outage_that_says_so(life: Life) -> None:
    recreate = {"upgrade.strategy": "Recreate"}
    new = life.revision_of(LONGER)
    with upgrading(life, recreate, {**recreate, **LONGER}) as trickle:
        life.until("the new revision is all that is left", lambda: only(life, new))
    failed = trickle.failed()
    assert failed, "nothing could answer for a while"
    assert {request.status for request in failed} == {503}
    assert all("not available; try again later" in request.why for request in failed), failed[0]


@story
def recreate_goes_back_from_what_is_never_ready(life: Life) -> None:
    recreate = {"upgrade.strategy": "Recreate", **SOON}
    old, new = life.revision_of(), life.revision_of(LONGER)
    life.stage.fake_ray.behave(life.namespace, new, application="DEPLOYING")
    with upgrading(life, recreate, {**recreate, **LONGER}, per_s=2) as trickle:
        life.until("the old one is back", lambda: rolled_back(life) and life.serving() == old)
        life.until("and alone", lambda: life.names("rayservices") == [old])
    assert {request.status for request in trickle.failed()} == {503}
