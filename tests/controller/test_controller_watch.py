"""Watches that break, lie or fall behind, under the whole controller: it comes to the state of an undisturbed run, and
then writes nothing.

The reflector alone stands before the same faults in tests/kube; here a cache that is behind meets decisions.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from moe_kube import objects as k
from moe_kube.faulty import FaultyApi
from moe_kube.objects import Kind, Obj
from moe_operator.caches import RELIST_S
from moe_operator.controller import Controller
from tests.controller.processes import Behind, Stage, controlled
from tests.controller.world import KEY, USER

pytestmark = pytest.mark.faults
KINDS = (k.MOE_DEPLOYMENT, k.RAY_SERVICE, k.CONFIG_MAP, k.ENDPOINT_SLICE)
STORIES = ("create", "upgrade by Surge")
FAULTS = ("drop", "end", "gone", "duplicate", "silent")
EARLY_S = 20.0
"""How far a story is when something is done to it in the middle."""
CALM_S = 240.0
"""How long after the last fault everything is as it should be: no back-off of a reflector is longer."""
SILENT_S = 40.0
"""How long nothing is heard of a half-open watch: two of them stay within the progress deadline of these stories."""
_undisturbed: dict[str, tuple[Obj, Counter[tuple[str, str]], list[dict[str, int]]]] = {}


def wired(stage: Stage, *, behind: int = 0, of: Kind | None = None) -> FaultyApi:
    inner: Any = Behind(stage, behind, of) if behind else stage.cluster.client(USER)
    return FaultyApi(inner, journal=stage.journal, clock=stage.clock)


async def undisturbed(story: str) -> tuple[Obj, Counter[tuple[str, str]], list[dict[str, int]]]:
    """End state, objects made and deleted, and steps of the weights of a run without faults."""
    if story not in _undisturbed:
        stage = Stage(story)
        async with controlled(stage, wired(stage)):
            await stage.pass_time(2.0)
            stage.act()
            await stage.pass_time(stage.story.seconds)
        _undisturbed[story] = stage.state(), stage.made(), stage.steps()
    return _undisturbed[story]


def differences(found: Any, wanted: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two states differ: path → (found, wanted)."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        parts = [differences(found.get(key), wanted.get(key), f"{at}/{key}") for key in {**found, **wanted}]
        return {path: pair for part in parts for path, pair in part.items()}
    return {} if found == wanted else {at: (found, wanted)}


async def anew(stage: Stage) -> Obj:
    """The end state where a MoEDeployment of this one's spec is made on a cluster that knew none."""
    other = Stage("create")
    async with controlled(other, wired(other)):
        other.world.put((stage.world.resource() or {})["spec"])
        await other.pass_time(other.story.seconds)
    return other.state()


def touch(stage: Stage, kind: Kind) -> None:
    """Somebody else writes to each object of a kind, and takes it back: two events that change nothing."""

    def note(obj: Obj) -> None:
        obj["metadata"].setdefault("annotations", {})["example.com/touched"] = "yes"

    def forget(obj: Obj) -> None:
        obj["metadata"]["annotations"].pop("example.com/touched")

    for ref in stage.cluster.refs(kind):
        for change in (note, forget):
            stage.cluster.edit(ref, change, user="somebody")


async def rests(stage: Stage, controller: Controller) -> bool:
    """Whether ten more reconciles write nothing."""
    writes, looks = len(stage.journal.writes), controller.adds_total
    for _ in range(10):
        controller.wake(KEY)
        await stage.pass_time(2.0, 2.0)
    assert controller.adds_total - looks >= 10
    return len(stage.journal.writes) == writes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("story", STORIES)
async def test_a_watch_that_breaks_costs_nothing_but_time(story: str, fault: Any, kind: Kind) -> None:
    state, made, steps = await undisturbed(story)
    stage = Stage(story)
    api = wired(stage)
    rules = [api.add_watch(fault, kind=kind, after=after, silent_s=SILENT_S) for after in (1, 0)]
    async with controlled(stage, api) as controller:
        await stage.pass_time(2.0)
        stage.act()
        await stage.pass_time(EARLY_S)
        touch(stage, kind)
        await stage.pass_time(stage.story.seconds + CALM_S)
        assert sum(rule.met for rule in rules) >= 2
        assert differences(stage.state(), state) == {}
        assert stage.made() == made, "nothing is made twice"
        assert stage.steps() == steps, "no step is taken twice"
        assert await rests(stage, controller)


async def test_a_silence_beyond_the_progress_deadline_fails_no_revision_that_is_well() -> None:
    """Before a revision is called failed, the server is asked: a watch that says nothing is no witness."""
    story = "upgrade by Surge"
    state, made, steps = await undisturbed(story)
    stage = Stage(story)
    api = wired(stage)
    async with controlled(stage, api) as controller:
        await stage.pass_time(2.0)
        api.add_watch("silent", kind=k.RAY_SERVICE, silent_s=150.0)
        stage.act()
        await stage.pass_time(stage.story.seconds + 150.0 + CALM_S)
        assert differences(stage.state(), state) == {}
        assert (stage.made(), stage.steps()) == (made, steps)
        assert await rests(stage, controller)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("story", STORIES)
async def test_a_list_that_is_older_than_the_last_is_not_believed(story: str, kind: Kind) -> None:
    state, made, steps = await undisturbed(story)
    stage = Stage(story)
    api = wired(stage)
    async with controlled(stage, api) as controller:
        await stage.pass_time(2.0)
        stage.act()
        for _ in range(3):
            await stage.pass_time(7.0)
            api.stale_lists = 2  # what the first list said, before the story began
            api.add_watch("gone", kind=kind)
        await stage.pass_time(stage.story.seconds + CALM_S)
        assert api.stale_lists == 0
        assert differences(stage.state(), state) == {}
        assert (stage.made(), stage.steps()) == (made, steps)
        assert await rests(stage, controller)


@pytest.mark.parametrize("kind", [*KINDS, None], ids=lambda kind: kind.kind if kind else "every kind")
@pytest.mark.parametrize("behind", [1, 3, 10])
@pytest.mark.parametrize("story", STORIES)
async def test_reads_that_are_writes_behind(story: str, behind: int, kind: Kind | None) -> None:
    state, made, steps = await undisturbed(story)
    stage = Stage(story)
    stage.neighbour = True
    async with controlled(stage, wired(stage, behind=behind, of=kind)) as controller:
        await stage.pass_time(2.0)
        stage.act()
        await stage.pass_time(stage.story.seconds + CALM_S)
        assert differences(stage.state(), state) == {}
        assert (stage.made(), stage.steps()) == (made, steps)
        assert await rests(stage, controller)


def someone_deletes(stage: Stage, kind: Kind) -> None:
    """A person or another controller deletes an object of ours; a MoEDeployment they apply again at once."""
    ref = stage.cluster.refs(kind)[0]
    body = stage.cluster.get(ref)
    stage.cluster.delete(ref)
    stage.cluster.collect_garbage()
    if kind == k.MOE_DEPLOYMENT:
        stage.world.put(body["spec"])


@pytest.mark.parametrize("healed_by", ["a list that 410 asks for", "the next list that is due"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("story", STORIES)
async def test_a_delete_that_is_missed_is_found_by_the_next_list(story: str, kind: Kind, healed_by: str) -> None:
    state, _, _ = await undisturbed(story)
    stage = Stage(story)
    api = wired(stage)
    async with controlled(stage, api) as controller:
        await stage.pass_time(2.0)
        stage.act()
        await stage.pass_time(EARLY_S)
        rule = api.add_watch("miss_delete", kind=kind, times=None)
        someone_deletes(stage, kind)
        await stage.pass_time(stage.story.seconds)
        assert rule.met >= 1
        assert len(stage.journal.writes) < 150, "what cannot be seen is not tried for ever"
        if healed_by == "a list that 410 asks for":
            api.add_watch("gone", kind=kind)
            await stage.pass_time(90.0)  # the next bookmark, at the latest
        else:
            await stage.pass_time(1.2 * RELIST_S, 60.0)
        await stage.pass_time(stage.story.seconds + CALM_S)
        assert differences(stage.state(), await anew(stage) if kind == k.MOE_DEPLOYMENT else state) == {}
        assert await rests(stage, controller)


REMOVED = {
    "the kind of MoEDeployments": (k.MOE_DEPLOYMENT,),
    "RayServices": (k.RAY_SERVICE,),
    "all of KubeRay": (k.RAY_SERVICE, k.RAY_CLUSTER),
    "monitors": (k.POD_MONITOR, k.PROMETHEUS_RULE),
}
"""A kind that is built into the API server cannot be removed."""


@pytest.mark.parametrize("kinds", REMOVED.values(), ids=list(REMOVED))
@pytest.mark.parametrize("story", STORIES)
async def test_a_kind_that_is_removed_and_installed_again(story: str, kinds: tuple[Kind, ...]) -> None:
    state, _, _ = await undisturbed(story)
    stage = Stage(story)
    async with controlled(stage, wired(stage)) as controller:
        await stage.pass_time(2.0)
        stage.act()
        await stage.pass_time(EARLY_S)
        asked_for = (stage.world.resource() or {})["spec"]
        for kind in kinds:
            stage.cluster.remove(kind)
        await stage.pass_time(60.0)
        for kind in kinds:
            stage.cluster.install(kind)
        if k.MOE_DEPLOYMENT in kinds:
            stage.world.put(asked_for)
            state = await anew(stage)
        await stage.pass_time(stage.story.seconds + CALM_S)
        assert differences(stage.state(), state) == {}
        assert await rests(stage, controller)
