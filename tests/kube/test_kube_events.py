"""Events: what is written for what is recorded, and that trouble with them stays their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from moe_core.clock import FakeClock
from moe_kube.errors import Fenced, Forbidden, ServerError, Unreachable
from moe_kube.events import Recorder
from moe_kube.objects import MOE_DEPLOYMENT, NAMESPACE, Ref
from tests.kube.scripted import CasStore

REF = Ref(MOE_DEPLOYMENT, "team", "qwen3")


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = CasStore()
        self.recorder = Recorder(self.store, self.clock, controller="moestack.dev/operator", instance="pod-1")  # type: ignore[arg-type]

    def record(self, note: str = "two replicas are ready", *, ref: Ref = REF, **more: Any) -> None:
        self.recorder.record(ref, "uid-1", **{"reason": "ServingReady", "note": note, **more})

    def written(self) -> list[tuple[str, str, int]]:
        return [(verb, obj["note"], obj.get("series", {}).get("count", 1)) for verb, _, obj in self.store.writes]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    it = World()
    task = asyncio.create_task(it.recorder.run())
    yield it
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_event_is_complete(world):
    world.record(type="Warning", action="Upgrade")
    await world.clock.advance(0)
    verb, ref, event = world.store.writes[0]
    assert verb == "create"
    assert (ref.namespace, ref.name[:6]) == ("team", "qwen3.")
    event["metadata"].pop("resourceVersion")
    assert event == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": ref.name, "namespace": "team"},
        "eventTime": "2023-11-14T22:13:20.000000Z",
        "reportingController": "moestack.dev/operator",
        "reportingInstance": "pod-1",
        "action": "Upgrade",
        "reason": "ServingReady",
        "regarding": {
            "apiVersion": "moestack.dev/v1alpha1",
            "kind": "MoEDeployment",
            "namespace": "team",
            "name": "qwen3",
            "uid": "uid-1",
        },
        "note": "two replicas are ready",
        "type": "Warning",
    }


async def test_an_event_of_a_cluster_scoped_object_is_in_default(world):
    world.record(ref=Ref(NAMESPACE, "", "team"))
    await world.clock.advance(0)
    assert world.store.writes[0][1].namespace == "default"
    assert "namespace" not in world.store.writes[0][2]["regarding"]


async def test_repeats_are_one_series_written_once_a_minute(world):
    for _ in range(50):
        world.record()
        await world.clock.advance(3)
    assert world.written()[0] == ("create", "two replicas are ready", 1)
    assert [verb for verb, _, _ in world.written()] == ["create", "json_patch", "json_patch"]
    await world.clock.advance(60)
    assert world.written()[-1] == ("json_patch", "two replicas are ready", 50)
    await world.clock.advance(3600)
    assert len(world.store.writes) == 4


async def test_a_repeat_after_a_pause_is_a_new_event(world):
    world.record()
    await world.clock.advance(400)
    world.record()
    await world.clock.advance(0)
    assert [verb for verb, _, _ in world.written()] == ["create", "create"]


async def test_a_series_whose_event_expired_begins_again(world):
    world.record()
    await world.clock.advance(0)
    world.store.objects.clear()
    world.record()
    await world.clock.advance(61)
    assert world.written()[1:] == [("create", "two replicas are ready", 2)]


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        ("é" * 600, "é" * 510 + "…"),
        ("the key sk-abcdefgh12345678 is refused", "the key [redacted] is refused"),
        ("x" * 1024, "x" * 1024),
    ],
    ids=["too long, in bytes", "a secret", "just right"],
)
async def test_notes(world, note, expected):
    world.record(note)
    await world.clock.advance(0)
    assert world.store.writes[0][2]["note"] == expected
    assert len(expected.encode()) <= 1024


async def test_an_object_that_talks_too_much_is_cut_short(world):
    for n in range(100):
        world.record(f"note {n}")
    world.record("another object", ref=Ref(MOE_DEPLOYMENT, "team", "other"))
    await world.clock.advance(30)
    assert len(world.store.writes) == 26
    assert world.recorder.dropped_total == 75
    await world.clock.advance(60)
    world.record("later")
    await world.clock.advance(1)
    assert world.written()[-1][1] == "later"


async def test_all_events_together_keep_a_pace(world):
    for n in range(200):
        world.record(ref=Ref(MOE_DEPLOYMENT, "team", f"d{n}"))
    await world.clock.advance(10)
    assert len(world.store.writes) <= 101
    await world.clock.advance(25)
    assert len(world.store.writes) == 200


@pytest.mark.parametrize("error", [Forbidden("no"), Fenced("not the leader")], ids=lambda e: type(e).__name__)
async def test_what_will_never_succeed_is_dropped(world, error):
    async def refuse(verb: str) -> None:
        raise error

    world.store.before = refuse
    world.record()
    await world.clock.advance(100)
    assert world.recorder.dropped_total == 1
    world.store.before = None
    world.record("next")
    await world.clock.advance(1)
    assert world.written() == [("create", "next", 1)]


async def test_a_lost_answer_makes_no_second_event(world):
    lost = [Unreachable("the answer was lost")]

    async def lose(verb: str) -> None:
        if lost:
            raise lost.pop()

    world.store.after = lose
    world.record()
    await world.clock.advance(30)
    assert len(world.store.objects) == 1
    assert world.recorder.dropped_total == 0


async def test_a_server_that_fails_is_asked_three_times(world):
    asked = []

    async def fail(verb: str) -> None:
        asked.append(world.clock.monotonic())
        raise ServerError("500", status=500)

    world.store.before = fail
    world.record()
    await world.clock.advance(1000)
    assert asked == [0.0, 5.0, 15.0]
    assert world.recorder.dropped_total == 1


async def test_memory_is_bounded_even_when_nothing_can_be_written():
    recorder = Recorder(CasStore(), FakeClock(), controller="moestack.dev/operator", instance="pod-1", limit=10)  # type: ignore[arg-type]
    for n in range(100):
        recorder.record(Ref(MOE_DEPLOYMENT, "team", f"d{n}"), "u", reason="R", note="n")
    assert len(recorder._series) == 10
    assert len(recorder._objects) <= 10
    assert recorder.dropped_total == 90
