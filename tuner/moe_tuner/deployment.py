"""One deployment in a process of many: built from its configuration, run, and started again when it falls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from moe_core.clock import Clock
from moe_core.config import TunerConfig
from moe_core.log import Log
from moe_core.retry import Backoff
from moe_core.signing import Signer, Verifier
from moe_core.wire import Signed, TuningOrders
from moe_tuner.actuate import Actuator
from moe_tuner.daemon import Tuner
from moe_tuner.exporter import Exporter, Families
from moe_tuner.hand import Hand
from moe_tuner.journal import Journal, Kept
from moe_tuner.live import AT_START, Live, OrdersRefused
from moe_tuner.report import DecisionRecord
from moe_tuner.settings import ConfigRefused, load_signer
from moe_tuner.signals import Prometheus
from moe_tuner.slow import SlowLoop
from moe_tuner.study import Study
from moe_tuner.workers import Workers
from moe_tuner.world import World

AGAIN = Backoff(initial_s=1.0, max_s=60.0)


@dataclass(frozen=True)
class Shared:
    """What all deployments of a process have in common."""

    client: aiohttp.ClientSession
    clock: Clock
    log: Log
    workers: Workers
    families: Families
    may_send: Callable[[], bool] = lambda: True
    """Whether this process may change knobs now; where several stand by, the leader alone may."""
    told: Callable[[str, DecisionRecord], None] = lambda deployment, record: None
    """Told of each decision of a deployment."""
    kept: Callable[[str], Kept | None] = lambda deployment: None
    """What is kept of a deployment outside of this disk."""


class Deployment:
    """Keeps one tuner running. What goes wrong in it is told here and nowhere else."""

    def __init__(self, config: TunerConfig, shared: Shared, phase_s: float = 0.0) -> None:
        self.name = config.deployment
        self.problem: str | None = "not started yet"
        self.tuner: Tuner | None = None
        self._config = config
        self._shared = shared
        self._phase_s = phase_s
        self._log = shared.log.bind(deployment=config.deployment)
        self._signer: Signer | None = None
        self._actuator: Actuator | None = None
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_running(), name=f"tuner {self.name}")

    async def stop(self) -> None:
        """Let the tuner take back what is unproven, and end."""
        self._stop.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def reconfigure(self, config: TunerConfig) -> None:
        """Bring a changed configuration in force: at once what can be, by a new start of this tuner the rest."""
        if config == self._config:
            return
        moved = [name for name in AT_START if getattr(config, name) != getattr(self._config, name)]
        self._config = config
        if moved or self.tuner is None:
            await self.stop()
            self._stop = asyncio.Event()
            self.start()
        else:
            self.tuner.live.reconfigure(config)
            if self._actuator is not None:
                self._actuator.reach(config.gateway_admin_urls)
        self._log.info("configuration in force", mode=config.mode, paused=config.paused, started_again=bool(moved))

    @property
    def shown(self) -> str | None:
        """The pass for what the console reads of this deployment; None before the first start."""
        return None if self._actuator is None else self._actuator.shown

    def obey(self, envelope: Signed) -> TuningOrders:
        """A person's signed orders. Raises OrdersRefused, SignatureRefused or CommandInvalid."""
        if self.tuner is None or self._signer is None:
            raise OrdersRefused(f"{self.name} has no tuner now: {self.problem}")
        orders = Verifier([self._signer.public_pem()]).open(envelope, TuningOrders)
        self.tuner.live.obey(orders)
        return orders

    def order(self, orders: TuningOrders) -> TuningOrders:
        """Orders of a person whose right another door has checked: signed here, as there is one way to give them.
        Raises OrdersRefused."""
        if self._signer is None:
            raise OrdersRefused(f"{self.name} has no tuner now: {self.problem}")
        return self.obey(self._signer.sign(orders))

    async def _keep_running(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                await self._run()
                return
            except asyncio.CancelledError:
                raise
            except Exception as error:
                failures += 1
                wait_s = AGAIN.bound_s(failures)
                self.problem = str(error) if isinstance(error, ConfigRefused) else f"{type(error).__name__}: {error}"
                self._log.warning("this deployment is not tuned; trying again", why=self.problem, wait_s=wait_s)
            finally:
                self.tuner = None
            sleeping = asyncio.ensure_future(self._shared.clock.sleep(wait_s))
            stopping = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait({sleeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for waiting in (sleeping, stopping):
                waiting.cancel()

    async def _run(self) -> None:
        config, shared, log = self._config, self._shared, self._log
        clock, client = shared.clock, shared.client
        self._signer = load_signer(config.signing_key_file)
        live = Live(config, log)
        prometheus = Prometheus(config.prometheus_url, config.deployment, shared.workers)
        exporter = Exporter(config.deployment, shared.families)
        try:
            actuator = Actuator(
                deployment=config.deployment,
                board_url=config.board_url,
                gateway_urls=config.gateway_admin_urls,
                signer=self._signer,
                client=client,
                clock=clock,
                log=log,
                may_send=shared.may_send,
            )
            self._actuator = actuator
            journal = Journal(config.decision_log, clock, log, shared.kept(self.name))
            study = Study(config.storage_url, config.deployment, password_file=config.storage_password_file)
            tuner = Tuner(
                live,
                world=World(client, actuator, config.board_url),
                hand=Hand(
                    live,
                    actuator=actuator,
                    journal=journal,
                    exporter=exporter,
                    clock=clock,
                    log=log,
                    told=lambda record: shared.told(self.name, record),
                ),
                slow=SlowLoop(live, source=prometheus, study=study, clock=clock, log=log, workers=shared.workers),
                exporter=exporter,
                clock=clock,
                log=log,
            )
            self.tuner, self.problem = tuner, None
            log.info("tuning", mode=config.mode)
            await tuner.run(self._stop, self._phase_s)
        finally:
            exporter.close()
            prometheus.close()
