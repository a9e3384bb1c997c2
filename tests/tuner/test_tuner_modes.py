"""Modes, pauses, pins and budgets obeyed at once; what the disk keeps; what never happens twice."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from moe_core.setting import ACTIVE_SEQS, CAPACITY, Setting
from moe_tuner.measure import Measurement
from moe_tuner.report import DecisionRecord
from tests.tuner.fakes import DEPLOYMENT
from tests.tuner.tuner_bench import Bench, bench, no_exploring
from tests.tuner.tuner_world import measured, setting

DAY_S = 86_400


async def trying(b: Bench) -> Setting:
    """Wait until a candidate is in force; returns the home."""
    await b.until(lambda: b.report.trial is not None and b.report.displaced)
    home = b.report.home
    assert home is not None
    return home


def in_force(b: Bench) -> Setting:
    assert b.board.knobs is not None
    return Setting.of(b.board.knobs)


def lose_state(b: Bench, text: str | None) -> None:
    """Cut the saved state, or delete it."""
    path = Path(b.config.decision_log + ".state.json")
    path.unlink()
    if text is not None:
        path.write_text(text)


LIVE = [
    pytest.param({"paused": True}, "paused: exploring nothing", id="pause"),
    pytest.param({"mode": "Off"}, "mode is Off", id="Off"),
    pytest.param({"mode": "Recommend"}, "a spike freezes exploration", id="Recommend"),
]


@pytest.mark.parametrize(("changes", "words"), LIVE)
async def test_a_mode_or_pause_that_comes_in_a_trial_takes_the_candidate_out_and_moves_nothing_more(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    async with bench(tmp_path) as b:
        home = await trying(b)
        tuner = b.tuners[-1][0]
        tuner.live.reconfigure(b.config.model_copy(update=changes))
        await b.seconds(1)
        assert in_force(b) == home
        posts = b.board.posts
        b.burst()
        await b.seconds(30)
        assert b.board.posts == posts
        assert words in b.report.exploring_reason


async def test_a_pin_that_comes_in_a_trial_holds_what_was_there_before_it(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        home = await trying(b)
        b.order(1, pins={CAPACITY: None})
        await b.seconds(3)
        assert in_force(b) == home
        assert b.report.home == home
        assert any(f"a person pinned {CAPACITY}" in record.reason for record in b.log)
        await b.seconds(60)
        assert in_force(b).prefill_cap == home.prefill_cap


async def test_a_pause_waits_with_values_and_resuming_puts_them_in_force(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        await b.seconds(5)
        b.order(1, paused=True, pins={ACTIVE_SEQS: Decimal(24)})
        await b.seconds(5)
        assert b.board.posts == 0
        b.order(2, pins={ACTIVE_SEQS: Decimal(24)})
        await b.seconds(2)
        assert in_force(b).engine.max_active_seqs == 24
        assert not b.report.displaced
        assert b.report.orders is not None
        assert b.log[-1].action == "Pin"


async def test_a_changed_budget_holds_at_once(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        await b.seconds(30)
        b.tuners[-1][0].live.reconfigure(b.config.model_copy(update={"changes_per_hour": 0}))
        b.burst()
        await b.seconds(30)
        assert b.board.posts == 0
        assert "the budget of 0 changes an hour" in b.report.fast_reason


async def test_trials_a_day_are_counted_over_restarts(tmp_path: Path) -> None:
    async with bench(tmp_path, lambda _: measured(), trials_per_day=2) as b:
        await b.until(lambda: b.report.trials_today == 2, 400)
        await b.until(lambda: "2 of 2 trials a day are done" in b.report.exploring_reason, 200)
        tries = len({record.trial for record in b.log if record.action == "Try"})
        b.restart()
        await b.seconds(200)
        assert b.report.trials_today == 2
        assert len({record.trial for record in b.log if record.action == "Try"}) == tries == 2
        b.clock.now += DAY_S
        await b.until(lambda: b.report.trial is not None and b.report.displaced, 600)


async def test_the_first_day_in_auto_tries_nothing_live_and_is_counted_from_its_start(tmp_path: Path) -> None:
    async with bench(tmp_path, simulator_only_s=float(DAY_S)) as b:
        await b.seconds(100)
        assert b.board.posts == 0
        assert any("first day in Auto" in record.reason for record in b.log)
        b.restart()
        b.clock.now += DAY_S / 2
        await b.seconds(60)
        assert b.board.posts == 0
        b.clock.now += DAY_S / 2
        await b.until(lambda: bool(b.board.applied), 200)


PASSES = {
    **{"decode_step_s": 0.02, "decode_batch": 10.0, "prefill_s_per_token": 0.0001, "imbalance": 1.8},
    **{"requests_per_s": 1.0, "prompt_tokens": 3000.0, "output_tokens": 2.0},
}


@pytest.mark.parametrize(
    "changes", [{"mode": "Recommend"}, {"simulator_only_s": float(DAY_S)}], ids=["Recommend", "first day"]
)
async def test_recommend_and_the_first_day_try_in_the_simulator_and_say_what_it_foresees(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    async with bench(tmp_path, lambda _: measured(**PASSES), **changes) as b:
        await b.until(lambda: sum(record.action == "Simulate" for record in b.log) >= 4, 400)
        foreseen = [record for record in b.log if record.action == "Simulate"]
        assert b.board.posts == 0
        assert all(record.predicted is not None and not record.sent for record in foreseen)
        assert min(record.predicted.ratio for record in foreseen if record.predicted) < 0.95
        assert (b.report.recommendation is not None) == ("mode" in changes)
        assert b.report.best_trial is None
        assert b.report.trials_today == 0


async def test_an_engine_that_falls_silent_under_a_candidate_is_a_crash_never_tried_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        home = await trying(b)
        crashed = in_force(b)
        b.board.frozen = True
        await b.until(lambda: any("died under it" in record.reason for record in b.log), 20)
        assert in_force(b) == home
        assert 'trials_total{deployment="default/qwen3",state="rolled_back"} 1.0' in b.metrics
        # The study is lost as well: the journal alone remembers.
        (tmp_path / "tuner.db").unlink()
        b.board.frozen = False
        b.board.started_at_s += 100
        b.restart()
        await b.until(lambda: bool([r for r in b.log if r.action == "Try"][1:]), 400)
        assert crashed not in [Setting.of(knobs) for knobs in b.board.applied[1:]]


async def test_a_gateway_that_restarts_gets_the_knobs_in_force_and_no_older_ones(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        await b.seconds(30)
        b.burst()
        await b.until(lambda: b.report.version >= 1, 20)
        b.calm()
        await b.until(lambda: not b.report.displaced, 120)
        version = b.report.version
        assert version >= 2
        for paused in (False, True):
            b.order(1 + int(paused), paused=paused)
            b.gateway.versions.clear()
            await b.seconds(5)
            assert b.gateway.versions == [version]
        assert b.board.version == version


async def test_a_disk_that_is_full_stops_exploration_alone(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.write_text("a file where the folder should be")
    async with bench(tmp_path, decision_log=str(folder / "decisions.jsonl")) as b:
        await b.seconds(60)
        assert b.board.posts == 0
        assert "exploring nothing, as a restart would not know of it" in b.report.exploring_reason
        assert b.report.journal_problem is not None
        b.burst()
        await b.until(lambda: bool(b.board.applied), 10)
        folder.unlink()
        await b.seconds(3)
        assert b.report.journal_problem is None


async def test_a_state_that_cannot_be_read_is_rebuilt_from_the_log(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        await b.seconds(30)
        home = b.report.home
        b.burst()
        await b.seconds(5)
        assert b.report.displaced
        lose_state(b, "{ cut")
        b.restart()
        b.calm()
        await b.seconds(2)
        assert (b.report.home, b.report.displaced) == (home, True)
        await b.until(lambda: not b.report.displaced, 120)


async def test_a_state_lost_in_a_trial_still_takes_the_candidate_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        home = await trying(b)
        lose_state(b, None)
        b.restart()
        no_exploring(b)
        await b.seconds(2)
        assert in_force(b) == home


async def test_a_study_that_is_corrupt_stops_exploration_and_keeps_the_knobs(tmp_path: Path) -> None:
    (tmp_path / "tuner.db").write_bytes(b"this is no database, whatever its name says" * 100)
    async with bench(tmp_path) as b:
        b.board.put(setting("1.5", seqs=32).knobs(DEPLOYMENT, 3))
        await b.seconds(60)
        assert b.board.posts == 0
        assert b.report.home == setting("1.5", seqs=32)
        assert "does not answer (DatabaseError)" in b.report.exploring_reason


async def test_a_study_that_goes_away_in_a_trial_ends_it_and_keeps_the_incumbent(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        home = await trying(b)
        b.tuners[-1][2]._storage_problem = "the study's storage sqlite:///x does not answer (OperationalError)"
        b.tuners[-1][2]._next_storage_s = b.clock.now + 1000
        await b.seconds(1)
        assert in_force(b) == home
        assert any("does not answer" in record.reason and record.action == "RollBack" for record in b.log)


async def test_decisions_carry_what_they_were_made_from_in_the_log_alone(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.until(lambda: any(record.action == "Promote" for record in b.log), 400)
        promoted = b.log[-1]
        assert promoted.inputs is not None
        assert promoted.inputs["policy"] == "explore"
        assert promoted.trial is not None
        assert all(record.inputs is None for record in b.report.decisions)
        assert len(json.dumps(b.report.to_json())) < 100_000


def test_a_record_of_the_release_before_is_still_read() -> None:
    old = '{"time":1,"loop":"fast","action":"Move","reason":"","mode":"Auto","sent":true,"signals":{},"before":{}}'
    assert DecisionRecord.model_validate_json(old).measured is None


def test_a_window_of_the_release_before_is_still_a_measurement() -> None:
    assert Measurement.model_validate(measured().to_json()).request_p95_s is None
