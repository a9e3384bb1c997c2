"""The whole daemon of one deployment on fakes over real sockets, second by second, with restarts on the same disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from moe_core.config import KnobBounds, SloConfig, TunerConfig
from moe_core.http import session
from moe_core.log import get_log
from moe_core.setting import Setting
from moe_core.signing import Signer
from moe_core.wire import TuningOrders
from moe_tuner.actuate import Actuator
from moe_tuner.daemon import Tuner
from moe_tuner.exporter import Exporter
from moe_tuner.hand import Hand
from moe_tuner.journal import Journal
from moe_tuner.live import Live
from moe_tuner.measure import Measurement, Unmeasured
from moe_tuner.report import DecisionRecord, TuningReport
from moe_tuner.slow import SlowLoop
from moe_tuner.study import Study
from moe_tuner.world import World
from tests.tuner.fakes import DEPLOYMENT, FakeBoard, FakeGateway, InstantClock, served
from tests.tuner.tuner_world import measured

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
        live = Live(self.config, log)
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
        hand = Hand(live, actuator=actuator, journal=journal, exporter=exporter, clock=self.clock, log=log)
        study = Study(self.config.storage_url, DEPLOYMENT, seed=1)
        slow = SlowLoop(live, source=self.source, study=study, clock=self.clock, log=log)
        world = World(self.client, actuator, self.config.board_url)  # type: ignore[arg-type]
        tuner = Tuner(live, world=world, hand=hand, slow=slow, exporter=exporter, clock=self.clock, log=log)
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

    def order(self, version: int, **orders: object) -> None:
        """A person's orders, as the HTTP side hands them on."""
        self.tuners[-1][0].live.obey(TuningOrders(deployment=DEPLOYMENT, version=version, **orders))  # type: ignore[arg-type]

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
            simulator_only_s=0.0,
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
