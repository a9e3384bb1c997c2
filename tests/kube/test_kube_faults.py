"""The layer of faults does what its rules say, and its journal tells it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from moe_core.clock import FakeClock
from moe_kube import errors, faults
from moe_kube.api import WatchEvent
from moe_kube.fake import FakeApi, FakeCluster
from moe_kube.faults import Crash, Journal, Rule, WatchRule, WatchStep
from moe_kube.faulty import FaultyApi
from moe_kube.objects import CONFIG_MAP, SERVICE, Ref

MAP = Ref(CONFIG_MAP, "test", "x")


def layer(*rules: Rule, **more: Any) -> tuple[FakeCluster, FaultyApi]:
    cluster = FakeCluster(clock=FakeClock())
    return cluster, FaultyApi(cluster.client("tester"), rules=rules, clock=cluster.clock, **more)


async def write(api: FaultyApi, value: str = "1", ref: Ref = MAP) -> None:
    await api.apply(ref, {"data": {"a": value}}, manager="m")


@pytest.mark.parametrize(
    ("name", "error", "committed"),
    [
        ("403", errors.Forbidden, False),
        ("404", errors.NotFound, False),
        ("409", errors.Conflict, False),
        ("422", errors.Invalid, False),
        ("429", errors.Busy, False),
        ("500", errors.ServerError, False),
        ("503", errors.ServerError, False),
        ("reset", errors.Unreachable, False),
        ("time-out before", errors.Unreachable, False),
        ("time-out after commit", errors.Unreachable, True),
    ],
)
async def test_each_api_error_comes_once_and_says_what_the_server_did(
    name: str, error: type[errors.ApiError], committed: bool
) -> None:
    cluster, api = layer(Rule(faults.API_ERRORS[name]))
    with pytest.raises(error) as caught:
        await write(api)
    assert (cluster.find(MAP) is not None) == committed
    assert api.journal.calls[0].committed == committed
    assert caught.value.retry_after_s == (7.0 if name == "429" else None)
    await write(api)
    assert cluster.get(MAP)["data"] == {"a": "1"}
    assert api.journal.creates() == {"ConfigMap": 1}, "an apply after one that committed creates nothing"


def test_every_api_error_has_a_case() -> None:
    (cases,) = (
        mark.args[1]
        for mark in test_each_api_error_comes_once_and_says_what_the_server_did.pytestmark  # type: ignore[attr-defined]
    )
    assert {name for name, *_ in cases} == set(faults.API_ERRORS)


@pytest.mark.parametrize(("action", "there"), [(faults.CRASH_BEFORE, False), (faults.CRASH_AFTER, True)])
async def test_a_crash_is_caught_by_no_handler_of_errors(action: faults.Action, there: bool) -> None:
    cluster, api = layer(Rule(action))

    async def careful() -> None:
        with contextlib.suppress(Exception):
            await write(api)

    with pytest.raises(Crash):
        await careful()
    assert (cluster.find(MAP) is not None) == there
    assert api.journal.calls[0].result == "Crash"


async def test_a_rule_meets_the_calls_it_names() -> None:
    rules = [
        Rule(faults.answer(500), verbs=frozenset({"apply"}), kinds=frozenset({SERVICE})),
        Rule(faults.answer(503), write=2),
        Rule(faults.answer(403), when=lambda call: call.verb == "get", skip=1, times=2),
    ]
    _, api = layer(*rules)
    await write(api, "1")
    await api.get(MAP)
    for _ in range(2):
        with pytest.raises(errors.Forbidden):
            await api.get(MAP)
    await api.get(MAP)
    await write(api, "2")
    with pytest.raises(errors.ServerError):
        await write(api, "3")
    assert [rule.met for rule in rules] == [0, 1, 2]
    assert [call.write for call in api.journal.calls] == [0, -1, -1, -1, -1, 1, 2]
    assert [call.result for call in api.journal.writes] == ["ok", "ok", "ServerError"]


async def test_a_hook_runs_before_or_after_the_write() -> None:
    seen: list[bool] = []
    cluster, api = layer()

    async def look(call: faults.Call) -> None:
        seen.append(cluster.find(MAP) is not None)

    api.add(faults.before(look))
    await write(api)
    await api.delete(MAP)
    api.add(faults.after(look))
    await write(api)
    assert seen == [False, True]
    assert api.journal.creates() == {"ConfigMap": 2}
    assert api.journal.deletes() == {"ConfigMap": 1}
    assert api.journal.committed() == {("apply", "ConfigMap"): 2, ("delete", "ConfigMap"): 1}


async def test_clients_share_a_journal() -> None:
    cluster = FakeCluster(clock=FakeClock())
    journal = Journal()
    one = FaultyApi(cluster.client("a"), journal=journal, client="one")
    two = FaultyApi(cluster.client("b"), journal=journal, client="two")
    await write(one)
    await write(two, "2")
    assert [(call.client, call.index) for call in journal.calls] == [("one", 0), ("two", 1)]
    assert journal.creates() == {"ConfigMap": 1}


async def test_a_list_may_be_older_than_the_last() -> None:
    cluster, api = layer()
    await api.list(CONFIG_MAP, namespace="test")
    await write(api)
    fresh = await api.list(CONFIG_MAP, namespace="test")
    cluster.delete(MAP)
    api.stale_lists = 1
    assert await api.list(CONFIG_MAP, namespace="test") == fresh
    assert not (await api.list(CONFIG_MAP, namespace="test")).items


async def watched(cluster: FakeCluster, events: AsyncGenerator[WatchEvent, None]) -> list[str]:
    """What a watch tells of a creation, a change, a deletion and a creation; its error last."""
    told: list[str] = []
    note = told.append

    async def follow() -> None:
        try:
            async for event in events:
                note(event.type)
        except errors.ApiError as error:
            note(type(error).__name__)

    following = asyncio.create_task(follow())
    assert isinstance(cluster.clock, FakeClock)
    await cluster.clock.advance(0.0)
    for change in ({"a": "1"}, {"a": "2"}, None, {"a": "3"}):
        if change is None:
            cluster.delete(MAP)
        else:
            cluster.apply(MAP, {"data": change}, manager="m")
        await cluster.clock.advance(1.0)
    while not following.done():
        await cluster.clock.advance(10.0)
    return [kind for kind in told if kind != "BOOKMARK"]


@pytest.mark.parametrize(
    ("step", "after", "expected"),
    [
        ("drop", 1, ["ADDED", "Unreachable"]),
        ("drop", 0, ["Unreachable"]),
        ("end", 2, ["ADDED", "MODIFIED"]),
        ("gone", 1, ["ADDED", "Gone"]),
        ("duplicate", 0, ["ADDED", "ADDED", "MODIFIED", "DELETED", "ADDED"]),
        ("miss", 1, ["ADDED", "DELETED", "ADDED"]),
        ("miss_delete", 0, ["ADDED", "MODIFIED", "ADDED"]),
        ("silent", 1, ["ADDED", "Unreachable"]),
    ],
)
async def test_each_fault_of_a_watch(step: WatchStep, after: int, expected: list[str]) -> None:
    cluster, api = layer(watch_rules=[WatchRule(step, kind=CONFIG_MAP, after=after)])
    started_s = cluster.clock.monotonic()
    events = api.watch(CONFIG_MAP, resource_version=str(cluster.version), timeout_s=30.0)
    assert await watched(cluster, events) == expected
    assert (cluster.clock.monotonic() - started_s >= 90.0) == (step == "silent")
    assert api.journal.calls[0].verb == "watch"


async def test_a_cache_lags_by_writes_until_it_catches_up() -> None:
    cluster = FakeCluster(clock=FakeClock())
    api: FakeApi = cluster.client(lag_writes=2)
    start = str(cluster.version)
    for number in range(3):
        await api.apply(Ref(CONFIG_MAP, "test", f"m{number}"), {}, manager="m")
    assert len((await api.list(CONFIG_MAP)).items) == 3
    assert len((await api.list(CONFIG_MAP, resource_version="0")).items) == 1
    assert (await api.get(Ref(CONFIG_MAP, "test", "m2")))["metadata"]["name"] == "m2"
    events = api.watch(CONFIG_MAP, resource_version=start, timeout_s=30.0)
    assert (await anext(events)).object["metadata"]["name"] == "m0"
    waiting = asyncio.create_task(anext(events))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert not waiting.done()
    cluster.apply(Ref(SERVICE, "test", "other"), {"spec": {"ports": [{"port": 1}]}}, manager="m")
    assert (await waiting).object["metadata"]["name"] == "m1"
    api.lag_writes = 0
    assert (await anext(events)).object["metadata"]["name"] == "m2"
    await events.aclose()
