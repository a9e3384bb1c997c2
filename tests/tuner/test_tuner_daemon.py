"""The whole daemon against a board and a gateway on real sockets: what it sends, says, keeps and takes back."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from moe_core.log import get_log
from moe_core.setting import Setting, Signals
from moe_tuner.journal import Journal
from moe_tuner.report import DecisionRecord
from tests.tuner.fakes import DEPLOYMENT, InstantClock
from tests.tuner.tuner_bench import GONE, bench, no_exploring, worse_when_touched
from tests.tuner.tuner_world import setting


async def test_a_burst_changes_a_knob_and_log_metrics_and_status_say_what_and_why(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        await b.seconds(30)
        home = b.report.home
        b.burst()
        await b.seconds(10)
        report = b.report
        assert report.version >= 1
        assert report.displaced
        assert report.spike
        assert report.acks is not None
        assert report.acks.complete
        first = b.log[0]
        assert (first.loop, first.action, first.version, first.sent) == ("fast", "Move", 1, True)
        assert "rank demand max/mean is 1.80" in first.reason
        assert first.ack_seconds is not None
        assert first.before == home
        assert first.after is not None
        assert first.after.prefill_cap == Decimal(2)  # the mildest: what a cap costs is not known yet
        assert first.signals.waiting == 20
        assert 'moestack_tuner_decisions_total{action="Move",deployment="default/qwen3",loop="fast"}' in b.metrics
        assert f'moestack_tuner_knobs_version{{deployment="default/qwen3"}} {report.version}.0' in b.metrics
        assert "moestack_tuner_ack_seconds_count" in b.metrics
        b.calm()
        await b.until(lambda: not b.report.displaced, 60)
        assert b.log[-1].action == "Undo"
        assert b.board.knobs is not None
        assert Setting.of(b.board.knobs) == home
        assert b.gateway.versions == [knobs.version for knobs in b.board.applied]


async def test_without_prometheus_it_explores_nothing_and_says_so(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.source.problem = GONE
        await b.seconds(120)
        assert not b.report.exploring
        assert b.report.exploring_reason == "Prometheus at http://p:9090 does not answer: exploring nothing"
        assert 'moestack_tuner_exploring{deployment="default/qwen3"} 0.0' in b.metrics
        assert b.board.applied == []
        b.source.problem = None
        await b.until(lambda: bool(b.board.applied))
        assert b.report.exploring
        assert 'moestack_tuner_exploring{deployment="default/qwen3"} 1.0' in b.metrics


async def test_prometheus_that_dies_in_a_trial_takes_the_candidate_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.until(lambda: len(b.board.applied) == 1)
        b.source.problem = GONE
        await b.seconds(5)
        assert [record.action for record in b.log][-1] == "RollBack"
        assert "does not answer" in b.log[-1].reason
        assert not b.report.displaced
        assert b.report.best_trial is None
        assert 'moestack_tuner_trials_total{deployment="default/qwen3",state="censored"} 1.0' in b.metrics


async def test_a_better_candidate_is_promoted_and_stays(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.until(lambda: any(record.action == "Promote" for record in b.log), 400)
        actions = [record.action for record in b.log]
        assert set(actions[:-1]) == {"Try", "Return"}
        measured = b.log[-1].measured
        assert measured is not None
        assert measured.evidence >= 20
        assert (measured.pairs, measured.low) == (5, pytest.approx(2 / 3))
        assert b.report.home == b.report.knobs
        assert b.report.home is not None
        assert b.report.home.prefill_cap is not None
        assert b.report.study_size >= 1
        assert b.report.best_trial is not None
        assert b.report.best_trial.cost == pytest.approx(2 / 3)


async def test_a_worse_candidate_is_rolled_back_and_recorded(tmp_path: Path) -> None:
    async with bench(tmp_path, worse_when_touched) as b:
        await b.until(lambda: any("100.0% dearer" in record.reason for record in b.log))
        assert not b.report.displaced
        assert 'moestack_tuner_trials_total{deployment="default/qwen3",state="rolled_back"} 1.0' in b.metrics


async def test_a_spike_in_a_trial_takes_the_candidate_back_and_freezes_exploration(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.until(lambda: len(b.board.applied) == 1)
        b.burst()
        await b.until(lambda: any(record.action == "RollBack" for record in b.log), 15)
        await b.until(lambda: any(record.action == "Move" for record in b.log), 10)
        assert not b.report.exploring
        assert "freezes exploration" in b.report.exploring_reason


async def test_recommend_records_what_it_would_do_once_and_sends_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path, mode="Recommend") as b:
        await b.seconds(25)
        b.burst()
        await b.seconds(20)
        assert b.board.posts == 0
        assert b.report.recommendation is not None
        assert b.report.recommendation.reason.startswith("would change knobs: ")
        moves = [record for record in b.log if record.action == "Move"]
        assert len(moves) == 1
        assert not moves[0].sent
        assert "a spike freezes exploration" in b.report.exploring_reason


@pytest.mark.parametrize(
    ("changes", "words"), [({"mode": "Off"}, "mode is Off"), ({"paused": True}, "paused")], ids=["off", "paused"]
)
async def test_off_and_paused_send_nothing_and_say_so(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    async with bench(tmp_path, **changes) as b:
        await b.seconds(10)
        b.burst()
        await b.seconds(20)
        assert b.board.posts == 0
        assert words in b.report.fast_reason
        assert words in b.report.exploring_reason


async def test_a_restart_takes_over_version_and_knobs_and_sends_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        b.board.put(setting("1.5", seqs=32).knobs(DEPLOYMENT, 41))
        await b.seconds(5)
        assert (b.report.version, b.report.home) == (41, setting("1.5", seqs=32))
        b.restart()
        await b.seconds(30)
        assert b.board.posts == 0
        assert (b.report.version, b.report.displaced) == (41, False)


async def test_killed_in_a_trial_it_takes_the_candidate_back_on_return(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.until(lambda: len(b.board.applied) == 1)
        home = b.report.home
        b.restart()
        no_exploring(b)
        await b.seconds(2)
        assert b.board.version == 2
        assert b.board.knobs is not None
        assert Setting.of(b.board.knobs) == home
        assert "a restart found a trial in force" in b.log[-1].reason
        assert not b.report.displaced


async def test_killed_in_a_spike_it_still_knows_the_way_home(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        await b.seconds(30)
        home = b.report.home
        b.burst()
        await b.seconds(5)
        assert b.report.displaced
        version = b.board.version
        b.restart()
        b.calm()
        await b.seconds(2)
        assert (b.report.home, b.report.displaced, b.board.version) == (home, True, version)
        await b.until(lambda: not b.report.displaced, 120)
        assert b.board.knobs is not None
        assert Setting.of(b.board.knobs) == home


async def test_another_writers_knobs_become_the_home(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        await b.seconds(5)
        b.board.put(setting("1.2", seqs=20).knobs(DEPLOYMENT, 9))
        await b.seconds(2)
        assert (b.report.version, b.report.home) == (9, setting("1.2", seqs=20))
        assert b.log[-1].action == "Adopt"
        assert b.board.posts == 0


async def test_another_writer_in_a_trial_ends_it_and_wins(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.until(lambda: len(b.board.applied) == 1)
        b.board.put(setting("1.2", seqs=20).knobs(DEPLOYMENT, 9))
        await b.seconds(2)
        assert b.report.home == setting("1.2", seqs=20)
        assert b.board.version == 9
        assert b.report.trial is None


async def test_a_trial_whose_answer_was_lost_is_taken_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.until(lambda: "measuring" in b.report.exploring_reason)
        home = b.report.home
        b.board.lose_after, b.board.lose_afterwards = 1, 99
        await b.until(lambda: bool(b.board.applied))
        b.board.lose_before = 0
        no_exploring(b)
        await b.until(lambda: len(b.board.applied) == 2, 20)
        assert b.report.home == home
        assert Setting.of(b.board.applied[-1]) == home
        assert [knobs.version for knobs in b.board.applied] == [1, 2]
        await b.seconds(20)
        assert len(b.board.applied) == 2


async def test_a_move_whose_answer_was_lost_is_not_made_twice(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        await b.seconds(30)
        home = b.report.home
        b.burst()
        b.board.lose_after, b.board.lose_afterwards = 1, 99
        await b.until(lambda: bool(b.board.applied))
        b.board.lose_before = 0
        await b.seconds(1)
        assert b.report.home == home
        assert (b.report.version, b.report.displaced) == (1, True)
        versions = [knobs.version for knobs in b.board.applied]
        assert versions == sorted(set(versions))


async def test_a_board_that_is_gone_changes_nothing_and_a_restarted_one_gets_the_knobs_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        await b.seconds(30)
        b.burst()
        await b.seconds(5)
        version, in_force = b.board.version, b.report.knobs
        b.board.down = True
        await b.seconds(10)
        assert b.report.knobs == in_force
        assert any("board at" in missing for missing in b.report.signals.missing)
        b.board.down, b.board.envelope, b.board.version = False, None, 0
        await b.seconds(1)
        assert b.board.version >= version
        assert b.board.knobs is not None
        assert Setting.of(b.board.knobs).prefill_cap is not None


async def test_a_rank_that_refuses_gets_its_old_setting_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        no_exploring(b)
        await b.seconds(30)
        home = b.report.home
        b.burst()
        b.board.refuse = "γ·k < 1"
        await b.until(lambda: len(b.board.applied) == 2, 20)
        assert Setting.of(b.board.applied[-1]) == home
        await b.seconds(20)
        assert len(b.board.applied) == 2
        assert "a rank refused" in b.report.fast_reason
        assert any("γ·k < 1" in error for record in b.log for error in record.ack_errors)


async def test_a_storage_that_is_gone_stops_exploration_alone(tmp_path: Path) -> None:
    async with bench(tmp_path, storage_url="sqlite:////nowhere/at/all/tuner.db") as b:
        await b.seconds(60)
        assert not b.report.exploring
        assert "storage sqlite:////nowhere/at/all/tuner.db does not answer" in b.report.exploring_reason
        b.burst()
        await b.until(lambda: bool(b.board.applied), 10)


async def test_told_to_stop_in_a_trial_it_leaves_the_incumbent_in_force(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.until(lambda: len(b.board.applied) == 1)
        home = b.report.home
        await b.stop()
        assert b.board.knobs is not None
        assert Setting.of(b.board.knobs) == home
        assert b.log[-1].version == 2


def test_a_log_cut_by_a_crash_is_read_up_to_the_cut_and_goes_on(tmp_path: Path) -> None:
    def record(reason: str) -> DecisionRecord:
        return DecisionRecord(
            time=1.0,
            loop="fast",
            action="Move",
            reason=reason,
            mode="Auto",
            sent=True,
            signals=Signals(),
            before=setting(),
        )

    path = tmp_path / "decisions.jsonl"
    log = get_log("test")
    Journal(str(path), InstantClock(), log).append(record("before"))
    path.write_text(path.read_text() + '{"time": 17, "loo')
    path.with_name("decisions.jsonl.state.json").write_text("{ not json")
    returned = Journal(str(path), InstantClock(), log)
    assert [kept.reason for kept in returned.recent(10)] == ["before"]
    assert returned.load() is None
    returned.append(record("after"))
    again = Journal(str(path), InstantClock(), log)
    assert [kept.reason for kept in again.recent(10)] == ["after", "before"]
    assert again.recent(1)[0].reason == "after"
