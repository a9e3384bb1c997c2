"""Sessions: what tells one, where it belongs, and that the operator's weights are kept whatever sessions want."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.enums import SessionKey
from moe_core.forecast import RevisionView, SpillContext, TargetView, Thresholds
from moe_core.sessions import SESSION_SLACK, belonging, session_key
from moe_core.spill import Action, Blocked, SpillState, decide, rotate
from moe_gateway.openai_api import Endpoint, parse
from moe_gateway.sessions import session_of
from tests.gateway.fake_upstream import FakeUpstream
from tests.gateway.harness import chat, config, running

ALL = tuple(SessionKey)
SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who was Ada?"}
LATER = [SYSTEM, ASKED, {"role": "assistant", "content": "A countess."}, {"role": "user", "content": "And then?"}]


def views(weights: list[int]) -> tuple[RevisionView, ...]:
    return tuple(RevisionView(f"r{i}", weight) for i, weight in enumerate(weights))


@given(
    weights=st.lists(st.integers(1, 100), min_size=2, max_size=4),
    requests=st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=1, max_size=400),
)
def test_no_session_puts_a_revision_further_above_its_share_than_the_slack(
    weights: list[int], requests: list[int | None]
) -> None:
    revisions, credits, counts = views(weights), dict[str, int](), Counter[str]()
    total = sum(weights)
    for number, session in enumerate(requests, 1):
        chosen, credits = rotate(revisions, credits, None if session is None else str(session))
        counts[chosen.name] += 1
        for revision in revisions:
            share = number * revision.weight / total
            assert counts[revision.name] <= share + SESSION_SLACK
            assert counts[revision.name] >= share - SESSION_SLACK * (len(weights) - 1)
    assert sum(credits.values()) == 0


def test_requests_without_a_session_make_up_for_those_with_one() -> None:
    revisions, credits, counts = views([90, 10]), dict[str, int](), Counter[str]()
    stubborn = next(f"s{n}" for n in range(1000) if belonging(f"s{n}", [("b", "r1", 10), ("a", "r0", 90)])[0] == "b")
    for number in range(4000):
        chosen, credits = rotate(revisions, credits, stubborn if number % 10 == 0 else None)
        counts[chosen.name] += 1
    assert counts["r1"] == pytest.approx(400, abs=SESSION_SLACK)
    assert counts["r0"] + counts["r1"] == 4000


def test_sessions_that_fit_the_weights_stay_where_they_are() -> None:
    """300 conversations of 10 turns, mixed: nearly every turn is where the first was, and the shares hold."""
    revisions, credits = views([70, 30]), dict[str, int]()
    homes: dict[str, Counter[str]] = {}
    for turn in range(10):
        for session in range(300):
            key = session_key(str((session * 7 + turn) % 300))
            chosen, credits = rotate(revisions, credits, key)
            homes.setdefault(key, Counter())[chosen.name] += 1
    kept = sum(max(counts.values()) for counts in homes.values()) / 3000
    shares = sum((counts for counts in homes.values()), Counter[str]())
    assert kept > 0.9
    assert shares["r0"] == pytest.approx(2100, abs=SESSION_SLACK)


def test_a_change_of_weights_moves_no_more_sessions_than_it_must() -> None:
    def home(session: int, canary: int) -> str:
        return belonging(str(session), [("old", "r0", 100 - canary), ("new", "r1", canary)])[0]

    before, after = ([home(n, canary) for n in range(5000)] for canary in (10, 30))
    assert before.count("new") == pytest.approx(500, rel=0.15)
    assert after.count("new") == pytest.approx(1500, rel=0.1)
    assert all(b == "old" or a == "new" for b, a in zip(before, after, strict=True)), "nobody moves back"


def test_a_revision_without_weight_keeps_no_session() -> None:
    session = next(f"s{n}" for n in range(99) if belonging(f"s{n}", [("r0", "r0", 1), ("r1", "r1", 1)])[0] == "r1")
    gone = (RevisionView("r0", 100), RevisionView("r1", 0))
    decision, _ = decide(SpillContext(0.0, 10, 5.0, Thresholds(1.0, 1.0), gone, session=session), SpillState())
    assert (decision.action, decision.target) == (Action.LOCAL, "r0")


def spilled(session: str | None, *targets: TargetView, left: str = "1") -> Any:
    down = (RevisionView("r", 100, available=False),)
    context = SpillContext(0.0, 10, 5.0, Thresholds(0.5, 1.0), down, targets, Decimal(left), session=session)
    return decide(context, SpillState())[0]


DEAR, CHEAP = Decimal("0.02"), Decimal("0.01")


def test_a_session_that_spills_stays_at_one_target_while_prices_are_equal() -> None:
    a, b = TargetView("a", cost_usd=CHEAP), TargetView("b", cost_usd=CHEAP)
    homes = {n: spilled(str(n), a, b).target for n in range(40)}
    assert set(homes.values()) == {"a", "b"}, "sessions spread"
    assert {n: spilled(str(n), b, a).target for n in homes} == homes, "whatever the order"
    assert {spilled(None, a, b).target} == {"a"}
    of_b = str(next(n for n, home in homes.items() if home == "b"))
    assert spilled(of_b, a, TargetView("b", available=False, cost_usd=CHEAP)).target == "a"
    assert spilled(of_b, a, TargetView("b", cost_usd=DEAR)).target == "a", "no session costs more"
    assert spilled(of_b, a, b, left="0.001").blocked is Blocked.BUDGET
    assert spilled(of_b, a).target == "a", "one that egress or rights forbid is not in the context"


@pytest.mark.parametrize(
    ("name", "by", "headers", "first", "second", "same"),
    [
        ("the header", ALL, b"one", {"messages": [ASKED]}, {"messages": LATER}, True),
        ("the cache key", ALL, b"", {"prompt_cache_key": "k", "user": "a"}, {"prompt_cache_key": "k"}, True),
        ("the user", ALL, b"", {"user": "ada"}, {"user": "ada", "messages": [ASKED]}, True),
        ("another user", ALL, b"", {"user": "ada"}, {"user": "bob"}, False),
        ("how it begins", ALL, b"", {"messages": [SYSTEM, ASKED]}, {"messages": LATER}, True),
        ("begins otherwise", ALL, b"", {"messages": [ASKED]}, {"messages": LATER}, False),
        ("a text that goes on", ALL, b"", {"prompt": "a" * 1024}, {"prompt": "a" * 1024 + "b"}, True),
        ("input", ALL, b"", {"input": [ASKED]}, {"input": [ASKED, {"type": "reasoning"}]}, True),
    ],
)
def test_what_tells_a_session(
    name: str, by: tuple[SessionKey, ...], headers: bytes, first: Any, second: Any, same: bool
) -> None:
    told = [
        session_of(by, {b"x-moestack-session": headers}, _request(document), "acme") for document in (first, second)
    ]
    assert None not in told
    assert (told[0] == told[1]) is same
    assert all(len(key or "") == 16 for key in told)
    assert session_of(by, {b"x-moestack-session": headers}, _request(first), "other") not in told, "tenants share none"


@pytest.mark.parametrize(
    ("name", "by", "document"),
    [
        ("nothing was asked for", (), {"user": "ada", "messages": [ASKED]}),
        ("it does not say", (SessionKey.HEADER, SessionKey.USER, SessionKey.PROMPT_CACHE_KEY), {"messages": [ASKED]}),
        ("nonsense", ALL, {"user": 7, "prompt_cache_key": ["k"], "messages": "", "prompt": [1, 2]}),
    ],
)
def test_what_tells_none(name: str, by: tuple[SessionKey, ...], document: Any) -> None:
    assert session_of(by, {}, _request(document), None) is None


def _request(document: Any) -> Any:
    return parse(Endpoint.CHAT, orjson.dumps({"model": "tiny", **document}))


async def test_turns_of_a_session_meet_at_one_revision_and_the_weights_hold() -> None:
    async with FakeUpstream() as first, FakeUpstream() as second:
        made = config([first, second], sessions=["Header"], weights={"r0": 50, "r1": 50})
        async with running(made) as client:
            for turn in range(5):
                for session in range(8):
                    body = chat(False, turn=turn, session=session)
                    assert (await client.post(body, x_moestack_session=f"s{session}")).status == 200
            homes: dict[int, set[int]] = {}
            for where, upstream in enumerate((first, second)):
                for request in upstream.requests:
                    homes.setdefault(request["session"], set()).add(where)
            assert all(len(home) == 1 for home in homes.values())
            before = len(first.requests)
            for _ in range(40):
                await client.post(chat(False))
    assert len(first.requests) == len(second.requests) == 40, f"after {before} of 40, those without one make up for it"
    assert "x-moestack-session" not in first.headers[0]


async def test_without_being_asked_for_a_session_means_nothing() -> None:
    async with (
        FakeUpstream() as first,
        FakeUpstream() as second,
        running(config([first, second], weights={"r0": 50, "r1": 50})) as client,
    ):
        for _ in range(6):
            await client.post(chat(False, user="ada"), x_moestack_session="s")
    assert len(first.requests) == len(second.requests) == 3
