"""Reads the deployment each tick: digests of the board and of every gateway, and the knobs in force, all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from pydantic import TypeAdapter, ValidationError

from moe_core.http import HttpError, call_json
from moe_core.setting import Setting
from moe_core.wire import EngineKnobs, GatewayDigest, Knobs, ReplicaDigest
from moe_tuner.actuate import Actuator
from moe_tuner.observe import Observation

READ_S = 1.0
GATEWAY_WINDOW_S = 10
_REPLICAS = TypeAdapter(tuple[ReplicaDigest, ...])


@dataclass(frozen=True)
class Reading:
    """What one tick saw. `board_up`: the board said which knobs it hands out (None: it has none)."""

    observation: Observation
    board_up: bool
    in_force: Knobs | None = None
    gateway_versions: dict[str, int] = field(default_factory=dict)


class World:
    """The HTTP side of observing."""

    def __init__(self, client: aiohttp.ClientSession, actuator: Actuator, board_url: str) -> None:
        self._client = client
        self._actuator = actuator
        self._board = board_url.rstrip("/")

    async def read(self) -> Reading:
        urls = self._actuator.gateways
        async with asyncio.TaskGroup() as group:
            replicas_read = group.create_task(self._replicas())
            knobs_read = group.create_task(self._knobs())
            gateway_reads = [group.create_task(self._gateway(url)) for url in urls]
        replicas, in_force = replicas_read.result(), knobs_read.result()
        gateways = [task.result() for task in gateway_reads]
        missing = [what for what in (replicas, in_force, *gateways) if isinstance(what, str)]
        digests = {u: d for u, d in zip(urls, gateways, strict=True) if isinstance(d, GatewayDigest)}
        observation = Observation(
            replicas=None if isinstance(replicas, str) else replicas,
            gateways=tuple(digests.values()) or None,
            missing=tuple(dict.fromkeys(missing)),
        )
        versions = {url: digest.knobs_version for url, digest in digests.items()}
        if isinstance(in_force, str):
            return Reading(observation, board_up=False, gateway_versions=versions)
        return Reading(observation, board_up=True, in_force=in_force, gateway_versions=versions)

    async def _replicas(self) -> tuple[ReplicaDigest, ...] | str:
        try:
            return _REPLICAS.validate_python(await self._get(f"{self._board}/v1/digests"))
        except HttpError:
            return f"board at {self._board}"
        except ValidationError:
            return f"board at {self._board} (its digests cannot be read)"

    async def _knobs(self) -> Knobs | str | None:
        try:
            return await self._actuator.current()
        except HttpError:
            return f"board at {self._board}"

    async def _gateway(self, url: str) -> GatewayDigest | str:
        try:
            return GatewayDigest.model_validate(await self._get(f"{url}/v1/digest?window={GATEWAY_WINDOW_S}"))
        except HttpError:
            return f"gateway at {url}"
        except ValidationError:
            return f"gateway at {url} (its digest cannot be read)"

    async def _get(self, url: str) -> Any:
        return await call_json(self._client, "GET", url, total_s=READ_S, token=self._actuator.shown)


def boot_setting(replicas: Iterable[ReplicaDigest]) -> Setting | None:
    """What replicas run with before any knobs were sent; None where there is none to ask. Ceilings stay unnamed."""
    first = next(iter(replicas), None)
    if first is None:
        return None
    engine = first.engine
    seqs, tokens = engine.max_active_seqs, engine.max_batched_tokens
    return Setting(
        experts=first.knobs,
        engine=EngineKnobs(
            max_active_seqs=seqs if seqs < engine.ceiling_active_seqs else None,
            max_batched_tokens=tokens if tokens < engine.ceiling_batched_tokens else None,
        ),
    )
