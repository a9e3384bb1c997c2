"""The whole daemon against a board and a gateway on real sockets: what it sends, says, keeps and takes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pytest

from moe_core.config import KnobBounds, SloConfig, TunerConfig
from moe_core.http import session
from moe_core.log import get_log
from moe_core.setting import Setting, Signals
from moe_core.signing import Signer
from moe_tuner.actuate import Actuator
from moe_tuner.daemon import Tuner
from moe_tuner.exporter import Exporter
from moe_tuner.hand import Hand
from moe_tuner.journal import Journal
from moe_tuner.measure import Measurement, Unmeasured
from moe_tuner.report import DecisionRecord, TuningReport
from moe_tuner.slow import SlowLoop
from moe_tuner.study import Study
from moe_tuner.world import World
from tests.tuner.fakes import DEPLOYMENT, FakeBoard, FakeGateway, InstantClock, served
from tests.tuner.tuner_world import measured, setting

GONE = Unmeasured(reason="Prometheus at http://p:9090 does not answer", source_down=True)


@dataclass
class FakeSource:
    """Prometheus, by what is in force."""

    plant: Callable[[Setting], Measurement | Unmeasured]
    board: FakeBoard
    problem: Unmeasured | None = None

    async def health(self) -> Unmeasured | None:
        return self.problem

    async def measure(self, window_s: float) -> Measurement | Unmeasured:
        if self.problem is not None:
            return self.problem
        return self.plant(Setting() if self.board.knobs is None else Setting.of(self.board.knobs))


def better_when_capped(in_force: Setting) -> Measurement:
    cost = 0.3 if in_force.prefill_cap is None else 0.2
    return measured(busy_s_per_ktoken=cost)


def worse_when_touched(in_force: Setting) -> Measurement:
    return measured(busy_s_per_ktoken=0.3 if in_force.prefill_cap is None else 0.6)


@dataclass
class Bench:
    """One tuner process with its surroundings. `restart` makes a new process on the same disk."""

    config: TunerConfig
    board: FakeBoard
    gateway: FakeGateway
    source: FakeSource
    clock: InstantClock
    client: object
    tuners: list[tuple[Tuner, Hand, SlowLoop]] = field(default_factory=list)

    def restart(self, **changes: object) -> None:
        self.config = self.config.model_copy(update=changes)
        log = get_log("test")
        actuator = Actuator(
            deployment=DEPLOYMENT,
            board_url=self.config.board_url,
            gateway_urls=self.config.gateway_admin_urls,
            signer=self.board.signer,
            client=self.client,  # type: ignore[arg-type]
            clock=self.clock,
            log=log,
        )
        journal, exporter = Journal(self.config.decision_log, self.clock, log), Exporter(DEPLOYMENT)
        hand = Hand(self.config, actuator=actuator, journal=journal, exporter=exporter, clock=self.clock, log=log)
        study = Study(self.config.storage_url, DEPLOYMENT, seed=1)
        slow = SlowLoop(self.config, source=self.source, study=study, clock=self.clock, log=log)
        world = World(self.client, actuator, self.config.board_url, self.config.gateway_admin_urls)  # type: ignore[arg-type]
        tuner = Tuner(self.config, world=world, hand=hand, slow=slow, exporter=exporter, clock=self.clock, log=log)
        self.tuners.append((tuner, hand, slow))

    async def seconds(self, count: int) -> None:
        tuner, _, slow = self.tuners[-1]
        for _ in range(count):
            self.clock.now += 1.0
            if int(self.clock.now) % 3 == 0:
                await slow.look()
            await tuner.tick()
            await self.quiet()

    async def until(self, done: Callable[[], bool], limit: int = 200) -> None:
        for _ in range(limit):
            if done():
                return
            await self.seconds(1)
        raise AssertionError(f"not within {limit} s: {self.report.exploring_reason} / {self.report.fast_reason}")

    async def quiet(self) -> None:
        """Let acknowledgements and the study's thread finish."""
        _, hand, slow = self.tuners[-1]
        while True:
            tasks = [task for task in (hand._settling, *slow._tasks) if task is not None and not task.done()]
            if not tasks:
                return
            await asyncio.wait(tasks)

    async def stop(self) -> None:
        tuner, _, _ = self.tuners[-1]
        stop = asyncio.Event()
        stop.set()
        await tuner.run(stop)

    def burst(self) -> None:
        self.board.waiting, self.board.running, self.board.skew = 20, 16, 1.8
        self.gateway.arrivals, self.gateway.ttft_p95_s = 200, 2.0

    def calm(self) -> None:
        self.board.waiting, self.board.running, self.board.skew = 0, 2, 1.0
        self.gateway.arrivals, self.gateway.ttft_p95_s = 50, 0.2

    @property
    def report(self) -> TuningReport:
        return self.tuners[-1][0].report()

    @property
    def log(self) -> list[DecisionRecord]:
        path = Path(self.config.decision_log)
        lines = path.read_text().splitlines() if path.exists() else []
        return [DecisionRecord.model_validate_json(line) for line in lines]

    @property
    def metrics(self) -> str:
        return self.tuners[-1][0].exporter.exposition().decode()


@asynccontextmanager
async def bench(
    tmp_path: Path, plant: Callable[[Setting], Measurement | Unmeasured] = better_when_capped, **changes: object
) -> AsyncIterator[Bench]:
    board, gateway = FakeBoard(Signer.generate()), FakeGateway()
    async with served(board.routes()) as board_url, served(gateway.routes()) as gateway_url, session() as client:
        config = TunerConfig(
            deployment=DEPLOYMENT,
            board_url=board_url,
            gateway_admin_urls=(gateway_url,),
            prometheus_url="http://p:9090",
            signing_key_file="unused",
            storage_url=f"sqlite:///{tmp_path / 'tuner.db'}",
            decision_log=str(tmp_path / "decisions.jsonl"),
            slo=SloConfig(ttft_p95_s=0.8, itl_p95_s=0.05),
            bounds=KnobBounds(
                capacity_factor_min=Decimal(1),
                capacity_factor_max=Decimal(2),
                active_seqs_min=4,
                active_seqs_max=64,
            ),
        )
        made = Bench(config, board, gateway, FakeSource(plant, board), InstantClock(), client)
        made.restart(**changes)
        try:
            yield made
        finally:
            for _, _, slow in made.tuners:
                await slow.stop()


def no_exploring(b: Bench) -> None:
    b.source.problem = GONE


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
        assert first.after.prefill_cap == Decimal("1.8")
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
        await b.until(lambda: any(record.action == "Promote" for record in b.log))
        actions = [record.action for record in b.log]
        assert actions[:4] == ["Try", "Return", "Try", "Promote"]
        assert b.report.home == b.report.knobs
        assert b.report.home is not None
        assert b.report.home.prefill_cap is not None
        assert b.report.study_size >= 1
        assert b.report.best_trial is not None
        assert b.report.best_trial.cost == pytest.approx(2 / 3)


async def test_a_worse_candidate_is_rolled_back_and_recorded(tmp_path: Path) -> None:
    async with bench(tmp_path, worse_when_touched) as b:
        await b.until(lambda: bool(b.log) and b.log[-1].action == "RollBack")
        assert "100.0% dearer" in b.log[-1].reason
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
        assert b.report.exploring_reason == "mode is Recommend: exploring nothing"


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
