"""Laws of field ownership on the in-memory server, over random writes; the real server is compared in tests/cluster."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_kube.fake import FakeCluster
from moe_kube.fake_fields import Fields, intersect, subtract, union
from moe_kube.managed import owned
from moe_kube.objects import CONFIG_MAP, DEPLOYMENT, Kind, Ref
from tests.kube.random_writes import BODIES, MANAGERS, run, steps

KINDS = st.sampled_from(list(BODIES))


def node(inner: dict[str, Fields | None], member: bool) -> Fields | None:
    """A well-formed set: an empty node is a member, an empty set is None."""
    held: Fields = {name: sub for name, sub in inner.items() if sub is not None}
    if not held:
        return {} if member else None
    return {".": {}, **held} if member else held


NAMES = st.sampled_from(["f:a", "f:b", 'k:{"name":"x"}'])
SETS: st.SearchStrategy[Fields | None] = st.recursive(
    st.sampled_from([None, {}]),
    lambda inner: st.builds(node, st.dictionaries(NAMES, inner, max_size=3), st.booleans()),
    max_leaves=8,
)


@given(SETS, SETS)
def test_sets_of_fields_behave_as_sets(one: Fields | None, other: Fields | None) -> None:
    assert union(one, other) == union(other, one)
    assert intersect(one, other) == intersect(other, one)
    assert union(one, one) == one
    assert intersect(one, one) == one
    assert subtract(one, one) is None
    assert intersect(subtract(one, other), other) is None
    assert union(subtract(one, other), intersect(one, other)) == one


def without_empties(value: Any) -> Any:
    """What is left when nothing empty is applied.

    A real server drops an empty keyed list with its last item and adds it again, and drops a ConfigMap's empty `data`
    while its appliers go on owning it: the same apply without force is a conflict then.
    """
    if isinstance(value, dict):
        return {name: without_empties(item) for name, item in value.items() if item not in ([], {})}
    return [without_empties(item) for item in value] if isinstance(value, list) else value


@given(KINDS, st.integers(0, 10_000))
@example(CONFIG_MAP, 1575)
@settings(max_examples=60, deadline=None)
async def test_an_apply_that_was_taken_is_no_write_the_second_time(kind: Kind, seed: int) -> None:
    cluster = FakeCluster()
    api = cluster.client("moestack")
    ref = Ref(kind, "test", "x")
    for planned in steps(kind, seed, 25):
        step = replace(planned, body=without_empties(planned.body))
        outcome, _ = await run(api, ref, step)
        if outcome == "ok" and step.what in ("apply", "status"):
            version = cluster.version
            cluster.store.applied.clear()  # Not by remembering, but by comparing.
            assert (await run(api, ref, step))[0] == "ok"
            assert cluster.version == version, step


@given(st.sampled_from([CONFIG_MAP, DEPLOYMENT]), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
async def test_what_all_let_go_is_gone(kind: Kind, seed: int) -> None:
    """Managers that only apply leave nothing of theirs behind: what one stays alone with is what it asked for."""
    cluster = FakeCluster()
    ref = Ref(kind, "test", "x")
    rng = random.Random(seed)
    bodies = {manager: BODIES[kind](rng) for manager in MANAGERS for _ in range(2)}
    for manager, body in bodies.items():
        cluster.apply(ref, body, manager=manager)
    last = MANAGERS[-1]
    for manager in MANAGERS[:-1]:
        cluster.apply(ref, {}, manager=manager)
    alone = FakeCluster().apply(ref, bodies[last], manager=last)
    live = cluster.get(ref)
    assert owned(live, last) == owned(alone, last)
    for part in ("data", "spec"):
        assert live.get(part) == alone.get(part)
    assert live["metadata"].get("labels") == alone["metadata"].get("labels")
