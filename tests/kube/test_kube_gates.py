"""Throttle and fence, alone and composed; and that each kind of call is told as what it is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from moe_core.clock import FakeClock
from moe_kube import errors
from moe_kube.api import Page
from moe_kube.calls import Call, Gate
from moe_kube.fence import FencedApi
from moe_kube.objects import DEPLOYMENT, Ref
from moe_kube.throttle import Throttled, TokenBucket

REF = Ref(DEPLOYMENT, "ns", "x")
CALLS = {
    "get": lambda api, **more: api.get(REF, **more),
    "list": lambda api, **more: api.list(DEPLOYMENT, namespace="ns", **more),
    "apply": lambda api, **more: api.apply(REF, {}, manager="m", **more),
    "apply status": lambda api, **more: api.apply(REF, {}, manager="m", subresource="status", **more),
    "create": lambda api, **more: api.create(REF, {}, **more),
    "replace": lambda api, **more: api.replace(REF, {}, **more),
    "json_patch": lambda api, **more: api.json_patch(REF, [], **more),
    "delete": lambda api, **more: api.delete(REF, **more),
}
READS = {"get", "list"}


class Recorder:
    """An innermost `Api` that notes the time-out of each call."""

    def __init__(self) -> None:
        self.timeouts: list[float | None] = []

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, timeout_s: float | None = None, **more: Any) -> Any:
            self.timeouts.append(timeout_s)
            return Page((), "1") if name == "list" else {}

        return call


class Noting(Gate):
    def __init__(self, api: Any) -> None:
        super().__init__(api)
        self.calls: list[Call] = []

    async def before(self, call: Call, timeout_s: float | None) -> float | None:
        self.calls.append(call)
        return timeout_s


async def test_each_call_is_told_by_its_rbac_verb():
    noting = Noting(Recorder())
    for call in CALLS.values():
        await call(noting)
    assert [str(call) for call in noting.calls] == [
        "get Deployment ns/x",
        "list Deployment ns",
        "patch Deployment ns/x",
        "patch Deployment ns/x/status",
        "create Deployment ns/x",
        "update Deployment ns/x",
        "patch Deployment ns/x",
        "delete Deployment ns/x",
    ]


@pytest.mark.parametrize("name", CALLS)
async def test_a_fence_refuses_writes_alone(name):
    inner = Recorder()
    fenced = FencedApi(inner, lambda: 0.9, margin_s=1.0)  # type: ignore[arg-type]
    if name in READS:
        await CALLS[name](fenced)
    else:
        with pytest.raises(errors.Fenced):
            await CALLS[name](fenced)
    assert len(inner.timeouts) == (1 if name in READS else 0)


@pytest.mark.parametrize(
    ("held_s", "asked_s", "given_s"), [(8.0, None, 8.0), (8.0, 3.0, 3.0), (2.0, 3.0, 2.0), (1.0, None, 1.0)], ids=str
)
async def test_a_write_gets_no_longer_than_the_lease(held_s, asked_s, given_s):
    inner = Recorder()
    await FencedApi(inner, lambda: held_s, margin_s=1.0).create(REF, {}, timeout_s=asked_s)  # type: ignore[arg-type]
    assert inner.timeouts == [given_s]


async def test_without_a_margin_a_follower_still_cannot_write():
    with pytest.raises(errors.Fenced):
        await FencedApi(Recorder(), lambda: 0.0, margin_s=0.0).delete(REF)  # type: ignore[arg-type]


async def test_the_bucket_saves_up_its_burst_and_then_keeps_the_pace():
    clock = FakeClock()
    bucket = TokenBucket(qps=2.0, burst=3, clock=clock)
    assert [bucket.take() for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]
    await clock.advance(100)
    assert [bucket.try_take() for _ in range(4)] == [True, True, True, False]


async def test_throttle_outside_fence_looks_at_the_lease_after_the_wait():
    clock, inner = FakeClock(), Recorder()
    api = Throttled(FencedApi(inner, lambda: 2.0 - clock.monotonic()), qps=1.0, burst=1, clock=clock)  # type: ignore[arg-type]
    await api.create(REF, {})

    late = [asyncio.create_task(api.create(REF, {})) for _ in range(2)]
    await clock.advance(5)
    await late[0]
    with pytest.raises(errors.Fenced):
        await late[1]
    assert inner.timeouts == [2.0, 1.0]
    assert api.waited_s_total == pytest.approx(3.0)
