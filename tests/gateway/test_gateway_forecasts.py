"""Calibration: what was foretold of requests against what came true of them, and what nobody can know."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_cli.live import figure_rows
from moe_cli.status import figures
from moe_core.calibration import BINS, DECAY_S, FRESH, Calibration, bin_of, observe, score
from moe_core.config import SloConfig
from moe_core.forecast import Forecast
from moe_core.forecasts import ForecastReport, scored, together
from moe_gateway.call import Call, Outcome
from moe_gateway.forecasts import came_true
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import chat, config, running
from tests.gateway.test_gateway_shadow import late

told = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


def of(pairs: list[tuple[float, bool]], at_s: float = 0.0) -> Calibration:
    known = FRESH
    for probability, truth in pairs:
        known = observe(known, at_s, probability, truth)
    return known


@given(told)
def test_the_score_is_that_of_its_definition(pairs: list[tuple[float, bool]]) -> None:
    found = score(of(pairs), 0.0)
    assert found is not None
    base = sum(truth for _, truth in pairs) / len(pairs)
    assert found.requests == pytest.approx(len(pairs))
    assert found.brier == pytest.approx(sum((p - truth) ** 2 for p, truth in pairs) / len(pairs))
    assert found.base_rate == pytest.approx(base)
    assert (found.skill is None) == (base in (0.0, 1.0))
    assert 0.0 <= found.reliability <= 1.0
    if found.skill is not None:
        assert found.skill == pytest.approx(1 - found.brier / (base * (1 - base)))


@pytest.mark.parametrize(
    ("name", "pairs", "brier", "skill", "reliability"),
    [
        ("knows", [(0.0, False), (1.0, True)] * 10, 0.0, 1.0, 0.0),
        (
            "knows the base rate alone",
            [(0.25, False), (0.25, False), (0.25, False), (0.25, True)] * 5,
            0.1875,
            0.0,
            0.0,
        ),
        ("always wrong", [(0.0, True), (1.0, False)] * 10, 1.0, -3.0, 1.0),
        ("a bin too sure", [(0.9, True), (0.9, False)] * 10, 0.41, -0.64, 0.16),
        ("nothing ever missed", [(0.1, False)] * 10, 0.01, None, 0.01),
    ],
)
def test_named_scores(
    name: str, pairs: list[tuple[float, bool]], brier: float, skill: float | None, reliability: float
) -> None:
    found = score(of(pairs), 0.0)
    assert found is not None
    assert found.brier == pytest.approx(brier)
    assert found.skill == (None if skill is None else pytest.approx(skill))
    assert found.reliability == pytest.approx(reliability)


def test_what_was_long_ago_counts_less() -> None:
    known = of([(0.95, False)] * 100)
    known = observe(known, 5 * DECAY_S, 0.95, True)
    found = score(known, 5 * DECAY_S)
    assert found is not None
    assert found.requests == pytest.approx(1 + 100 * math.exp(-5))
    assert found.base_rate > 0.5
    assert score(FRESH, 0.0) is None


@given(told, told)
def test_what_workers_say_adds_up_to_what_one_would_have_said(
    ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]
) -> None:
    parts = []
    for pairs in (ours, theirs):
        row = scored("r", of(pairs), 0.0)
        assert row is not None
        parts.append(
            ForecastReport(gateway="w", revisions=(row,), would_have_spilled=2, would_have_cost_usd=Decimal(1))
        )
    whole = together(parts, "pod")
    one = scored("r", of([*ours, *theirs]), 0.0)
    assert one is not None
    assert (whole.would_have_spilled, whole.would_have_cost_usd) == (4, 2)
    assert whole.revisions[0].brier == pytest.approx(one.brier)
    assert whole.revisions[0].reliability == pytest.approx(one.reliability)
    assert [b.requests for b in whole.revisions[0].bins] == pytest.approx([b.requests for b in one.bins])


def call(**more: Any) -> Call:
    made = Call(1, "r", 0.0, None, stream=True, slo=SloConfig(ttft_p95_s=1.0, itl_p95_s=0.1))  # type: ignore[arg-type]
    made.forecast, made.attempts, made.outcome = Forecast(0.5, 0.2, 10.0, 0.0), 1, Outcome.OK
    for name, value in more.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("name", "given_call", "duration_s", "want"),
    [
        ("in time", call(ttft_s=0.9, itl_s=0.09), 3.0, False),
        ("one token", call(ttft_s=0.9), 1.0, False),
        ("a late first token", call(ttft_s=1.1, itl_s=0.01), 3.0, True),
        ("slow tokens", call(ttft_s=0.1, itl_s=0.11), 3.0, True),
        ("late, then cut", call(ttft_s=1.1, outcome=Outcome.CUT), 3.0, True),
        ("cut", call(ttft_s=0.1, outcome=Outcome.CUT), 3.0, None),
        ("left in time", call(outcome=Outcome.CANCELLED), 0.5, None),
        ("left when it was too late", call(outcome=Outcome.CANCELLED), 1.5, True),
        ("failed", call(outcome=Outcome.ERROR), 1.5, None),
        ("went on elsewhere", call(ttft_s=0.1, attempts=2), 1.0, None),
        ("spilled", call(ttft_s=0.1, local=False, spilled=True), 1.0, None),
        ("in one piece", call(stream=False), 1.0, None),
        ("nothing was foretold", call(ttft_s=0.1, forecast=None), 1.0, None),
    ],
)
def test_what_can_be_known_to_have_come_true(name: str, given_call: Call, duration_s: float, want: bool | None) -> None:
    assert came_true(given_call, duration_s) is want


async def test_over_real_sockets_what_was_kept_is_scored_and_what_was_spilled_is_told_apart() -> None:
    slo = {"ttftP95S": 0.25, "itlP95S": 5.0}
    async with FakeUpstream() as local, FakeUpstream() as api:
        local.behaviours = [Behaviour(), Behaviour(first_s=0.4)]
        async with running(config(local, api, slo=slo)) as client:
            for _ in range(2):
                await client.post(chat())
            assert (await client.post(chat(False))).status == 200
            late(client)
            assert (await client.post(chat(), x_moestack_explain="1")).headers["x-moestack-target"] == "t0"
            report = ForecastReport.model_validate((await client.admin("GET", "/v1/forecasts")).json)
            by = {
                result: await client.metric("moestack_gateway_forecasts_total", result=result)
                for result in ("met", "missed", "spilled", "unknown")
            }
            brier = await client.metric("moestack_gateway_forecast_brier_score", target="r0")
            squared = await client.metric("moestack_gateway_forecast_squared_error_total", target="r0")
            assert (
                await client.metric("moestack_gateway_forecasts_total", result="spilled", target="t0", bin="0.9") == 1
            )
    (row,) = report.revisions
    assert by == {"met": 1, "missed": 1, "spilled": 1, "unknown": 1}
    assert (row.name, row.base_rate) == ("r0", pytest.approx(0.5, abs=0.01))
    assert row.requests == pytest.approx(2, rel=0.01)
    assert brier == pytest.approx(row.brier, rel=0.01)
    assert squared == pytest.approx(2 * row.brier, rel=0.01)


async def test_in_shadow_mode_nothing_is_censored() -> None:
    async with (
        FakeUpstream() as local,
        FakeUpstream() as api,
        running(config(local, api, spill={"mode": "Shadow", "usdPerDay": "1"})) as client,
    ):
        late(client)
        await client.post(chat())
        report = (await client.admin("GET", "/v1/forecasts")).json
        assert await client.metric("moestack_gateway_forecasts_total", result="met") == 1
    assert (report["shadow"], report["wouldHaveSpilled"]) == (True, 1)
    shown = dict(figure_rows(figures(None, None, None, report)))
    assert shown["shadow"] == "1 requests would have spilled, for $0.00; nothing leaves"
    assert shown["forecast"].startswith("Brier 0.")
    assert "forecast" not in dict(figure_rows(figures(None, None, None)))


def test_every_probability_has_a_bin() -> None:
    assert [bin_of(p) for p in (0.0, 0.099, 0.1, 0.95, 1.0)] == [0, 0, 1, 9, 9]
    assert len(FRESH) == BINS
