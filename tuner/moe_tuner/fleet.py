"""All deployments of one tuner process: brought to the configuration file, each apart from the others."""

from __future__ import annotations

import asyncio
from pathlib import Path

from moe_core.clock import Clock
from moe_core.config import TunerConfig
from moe_core.log import Log
from moe_tuner.deployment import Deployment, Shared
from moe_tuner.report import DeploymentSummary
from moe_tuner.settings import ConfigRefused, Loaded, load

POLL_S = 1.0
GOLDEN = 0.618033988749895
"""Ticks begin at multiples of this share of a tick: evenly spread however many deployments come and go."""


class Fleet:
    """Deployments by name, and what keeps the refused ones from being tuned."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._members: dict[str, Deployment] = {}
        self._refused: dict[str, str] = {}
        self._begun = 0

    async def follow(self, loaded: Loaded) -> None:
        """Start, change and stop tuners until they are what was loaded. An entry that is refused now and ran before
        goes on by its old configuration: a typing error must not end tuning, nor forget a trial in force."""
        for name, why in loaded.refused.items():
            self.refuse(name, why)
        known = {config.deployment for config in loaded.configs} | loaded.refused.keys()
        gone = [name for name in self.names if name not in known]
        await asyncio.gather(*(self.drop(name) for name in gone))
        await asyncio.gather(*(self.put(config) for config in loaded.configs))

    async def put(self, config: TunerConfig) -> None:
        """Tune a deployment by this configuration from now on."""
        name = config.deployment
        self._refused.pop(name, None)
        if (member := self._members.get(name)) is not None:
            await member.reconfigure(config)
            return
        self._begun += 1
        phase_s = self._begun * GOLDEN % 1.0 * config.tick_s
        self._members[name] = member = Deployment(config, self._shared, phase_s)
        member.start()

    def refuse(self, name: str, why: str) -> None:
        """Tell why a deployment cannot be tuned as it is configured now."""
        if self._refused.get(name) != why:
            running = "; it goes on as it was" if name in self._members else ""
            self._shared.log.error(f"configuration refused{running}", deployment=name, why=why)
        self._refused[name] = why

    async def drop(self, name: str) -> None:
        """Let a deployment go, and return when its tuner has ended."""
        self._refused.pop(name, None)
        member = self._members.pop(name, None)
        if member is not None:
            await member.stop()

    async def stop(self) -> None:
        """Let all go."""
        self._refused.clear()
        await asyncio.gather(*(self.drop(name) for name in list(self._members)))

    def find(self, name: str | None) -> Deployment | None:
        """A deployment by name; without one, the only one there is."""
        if name is None:
            return next(iter(self._members.values())) if len(self._members) == 1 else None
        return self._members.get(name)

    def shown(self, name: str) -> str | None:
        """The pass for what is read of a deployment's gateways and boards."""
        member = self._members.get(name)
        return None if member is None else member.shown

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({*self._members, *self._refused}))

    @property
    def healthy(self) -> bool:
        """Whether this process ticks. One deployment that does not is told in its summary; a restart would harm all."""
        tuners = [member.tuner for member in self._members.values() if member.tuner is not None]
        return not tuners or any(tuner.healthy for tuner in tuners)

    def summaries(self) -> tuple[DeploymentSummary, ...]:
        return tuple(self._summary(name) for name in self.names)

    def _summary(self, name: str) -> DeploymentSummary:
        member, refused = self._members.get(name), self._refused.get(name)
        tuner = None if member is None else member.tuner
        if tuner is None:
            problem = refused or (None if member is None else member.problem)
            return DeploymentSummary(deployment=name, tuned=False, problem=problem)
        report = tuner.report()
        return DeploymentSummary(
            deployment=name,
            tuned=True,
            problem=refused or (None if tuner.healthy else "its ticks stand still"),
            mode=report.mode,
            paused=report.paused,
            version=report.version,
            displaced=report.displaced,
            exploring=report.exploring,
            exploring_reason=report.exploring_reason,
            fast_reason=report.fast_reason,
        )


class ConfigWatch:
    """Looks at the file each second, by content."""

    def __init__(self, fleet: Fleet, path: Path, in_force: str, clock: Clock, log: Log) -> None:
        self._fleet = fleet
        self._path = path
        self._seen = in_force
        self._clock = clock
        self._log = log

    async def run(self) -> None:
        """Look until cancelled."""
        problem: str | None = None
        while True:
            await self._clock.sleep(POLL_S)
            try:
                loaded = load(self._path)
            except ConfigRefused as refusal:
                if str(refusal) != problem:
                    self._log.error("the configuration is refused: the one before goes on", why=str(refusal))
                problem = str(refusal)
                continue
            problem = None
            if loaded.hash != self._seen:
                self._seen = loaded.hash
                await self._fleet.follow(loaded)
