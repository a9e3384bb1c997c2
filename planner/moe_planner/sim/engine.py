"""What one replica's engine can do, in the few figures that queueing depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from moe_planner.sim.invalid import Invalid

MOST_STEP_S = 3600.0


class EngineInvalid(Invalid):
    """A figure of an engine that cannot be."""


@dataclass(frozen=True)
class Engine:
    """One replica with continuous batching and chunked prefill, in the manner of vLLM's V1 scheduler.

    A step with p prompt tokens and n decoding sequences takes
    `launch_s` + (p > 0)·`prompt_s` + p·`prefill_token_s` + (n > 0)·`decode_s` + n·`active_s` seconds.
    """

    prefill_token_s: float
    decode_s: float
    active_s: float
    kv_tokens: int
    max_active: int
    max_batched_tokens: int = 2048
    block: int = 16  # tokens of one block of the KV cache
    launch_s: float = 0.0
    prompt_s: float = 0.0
    overhead_s: float = 0.0  # of a request outside the steps: tokenisation and transport, before it queues

    def __post_init__(self) -> None:
        for name in ("prefill_token_s", "decode_s", "active_s", "launch_s", "prompt_s", "overhead_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise EngineInvalid(name, f"{value} is no time", "it must be a number of seconds, 0 or more")
        for name in ("kv_tokens", "max_active", "max_batched_tokens", "block"):
            if getattr(self, name) < 1:
                raise EngineInvalid(name, f"{getattr(self, name)} is too small", "it must be 1 or more")
        if self.launch_s + min(self.prefill_token_s + self.prompt_s, self.decode_s + self.active_s) <= 0:
            raise EngineInvalid("launch_s", "a step would take no time", "give times of prefill and decode above 0")
        if self.step_s(self.max_batched_tokens, self.max_active) > MOST_STEP_S:
            raise EngineInvalid("decode_s", f"a full step would take more than {MOST_STEP_S:g} s", "give shorter times")
        if self.max_batched_tokens < self.max_active:
            raise EngineInvalid(
                "max_batched_tokens",
                f"{self.max_batched_tokens} is below max_active {self.max_active}: a full batch could not decode",
                "raise it or lower max_active",
            )
        if self.kv_tokens < self.block:
            raise EngineInvalid("kv_tokens", f"{self.kv_tokens} is less than one block of {self.block}", "raise it")

    @property
    def blocks(self) -> int:
        """Whole blocks of the KV cache."""
        return self.kv_tokens // self.block

    def step_s(self, prompt_tokens: float, active: int) -> float:
        """Seconds of one step with balanced experts."""
        prefill = self.prompt_s + prompt_tokens * self.prefill_token_s if prompt_tokens else 0.0
        decode = self.decode_s + active * self.active_s if active else 0.0
        return self.launch_s + prefill + decode


class SpeedLike(Protocol):
    """What `moe_planner.speed.Speed` says that the simulator uses."""

    @property
    def prefill_tokens_per_s(self) -> float: ...
    @property
    def step_s(self) -> float: ...


def from_speed(
    alone: SpeedLike,
    full: SpeedLike,
    *,
    kv_tokens: int,
    max_active: int,
    max_batched_tokens: int = 2048,
    at: float | None = None,
) -> Engine:
    """The engine whose decode step is the line through two predictions: at concurrency 1, and at `at` or `max_active`.

    `at` is less than `max_active` where the cache holds fewer sequences of the mean length.
    """
    slope = max(0.0, full.step_s - alone.step_s) / max(1.0, (max_active if at is None else at) - 1.0)
    return Engine(
        prefill_token_s=1.0 / full.prefill_tokens_per_s,
        decode_s=max(0.0, alone.step_s - slope),
        active_s=slope,
        kv_tokens=kv_tokens,
        max_active=max_active,
        max_batched_tokens=max(max_batched_tokens, max_active),
    )
