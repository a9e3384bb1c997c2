"""Held requests: when the policy keeps one for later, and that the gateway waits without holding up anybody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

import moe_gateway.state
from moe_core import spill
from moe_core.forecast import Failure, RevisionView, SpillContext, TargetView, Thresholds, forecast_local
from moe_core.latency import UNKNOWN, LatencyEstimate, observe_ttft
from moe_core.spill import Action, Decision, Reason, SpillState, decide
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import Answer, Client, chat, config, running, until

QUICK_API = LatencyEstimate(base_prior_s=0.3, slope_prior_s=0.0)
SLOW_API = LatencyEstimate(base_prior_s=2.0, slope_prior_s=0.0)
LONG_S = 60.0


def taught() -> LatencyEstimate:
    known = UNKNOWN
    for work in (100, 1000, 4000, 8000, 30_000) * 12:
        known = observe_ttft(known, 99.0, work_tokens=work, prompt_tokens=500, slot_wait_s=0, ttft_s=work / 10_000)
    return known


def uncertain(**more: Any) -> SpillContext:
    """A request of which nobody can say whether the own replica would be in time."""
    known = taught()
    for tokens in range(20_000, 80_000, 50):
        view = RevisionView("r", 100, waiting_requests=9, waiting_tokens=tokens, running=5, estimate=known)
        context = SpillContext(
            now_s=100.0,
            prompt_tokens=500,
            ttft_slo_s=4.0,
            thresholds=Thresholds(0.3, 1.0),
            revisions=(view,),
            targets=(TargetView("api", estimate=QUICK_API),),
            may_hold=True,
        )
        if 0.4 < forecast_local(context, view).p_miss < 0.5:
            return replace(context, **more)
    raise AssertionError("no queue is uncertain")


def test_what_is_uncertain_waits_as_long_as_a_target_is_surely_in_time() -> None:
    before = SpillState()
    decision, after = decide(uncertain(), before)
    assert (decision.action, decision.reason, decision.target) == (Action.HOLD, Reason.UNCERTAIN, None)
    assert 100.0 < decision.until_s < 104.0 - 0.3
    assert after == before, "it counts when it is decided, not each time it is asked about"
    later, _ = decide(uncertain(now_s=decision.until_s, elapsed_s=decision.until_s - 100.0), before)
    assert later.action is Action.SPILL


@pytest.mark.parametrize(
    ("why", "more"),
    [
        ("who asks cannot wait", {"may_hold": False}),
        ("the target needs the time", {"targets": (TargetView("api", estimate=SLOW_API),)}),
        ("the deadline is near", {"elapsed_s": 3.5}),
        ("an attempt has failed", {"local_failure": Failure.FAILED}),
        ("nobody else would take it", {"targets": ()}),
    ],
)
def test_nothing_is_held_where(why: str, more: dict[str, Any]) -> None:
    assert decide(uncertain(**more), SpillState())[0].action is not Action.HOLD, why


@contextmanager
def deciding(monkeypatch: pytest.MonkeyPatch, holds: int, for_s: float) -> Iterator[list[bool]]:
    """The first `holds` questions are answered with a hold; whether each question allowed one."""
    asked: list[bool] = []

    def first_hold(context: SpillContext, state: SpillState) -> tuple[Decision, SpillState]:
        asked.append(context.may_hold)
        if len(asked) <= holds and context.may_hold:
            return Decision(Action.HOLD, Reason.UNCERTAIN, until_s=context.now_s + for_s), state
        return spill.decide(context, state)

    with monkeypatch.context() as patched:
        patched.setattr(moe_gateway.state, "decide", first_hold)
        yield asked


async def held(client: Client, count: int) -> None:
    await until(lambda: len(client.server.gateway.held) == count)


def posted(client: Client) -> asyncio.Task[Answer]:
    return asyncio.create_task(client.post(chat()))


async def test_a_held_request_is_answered_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        with deciding(monkeypatch, holds=1, for_s=0.05) as asked:
            assert (await client.post(chat())).status == 200
        assert asked == [True, True]
        assert len(client.server.gateway.held) == 0


async def test_an_end_releases_the_one_that_waits_longest_and_nobody_else_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        with deciding(monkeypatch, holds=2, for_s=LONG_S):
            first = posted(client)
            await held(client, 1)
            second = posted(client)
            await held(client, 2)
            assert not first.done()
            assert (await client.post(chat())).status == 200, "others go their way"
            assert (await asyncio.wait_for(first, 5)).status == 200
            assert (await asyncio.wait_for(second, 5)).status == 200, "released by the end of the first"


async def test_a_client_that_leaves_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        with deciding(monkeypatch, holds=1, for_s=LONG_S):
            task = posted(client)
            await held(client, 1)
            task.cancel()
            await held(client, 0)
        await until(lambda: not client.server.gateway.calls)
        assert local.requests == []


async def test_a_drain_ends_the_wait_with_a_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeUpstream(Behaviour()) as local, running(config(local)) as client:
        with deciding(monkeypatch, holds=9, for_s=LONG_S) as asked:
            task = posted(client)
            await held(client, 1)
            await client.server.stop(5.0)
            assert (await asyncio.wait_for(task, 5)).status == 200
        assert asked == [True, False]
