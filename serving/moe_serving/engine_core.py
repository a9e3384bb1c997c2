"""Utilities added to vLLM's EngineCore: live limits of the scheduler, and its state.

They are called by name over the engine's own utility channel, between two steps, so a step sees one setting only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_serving.tiers import settle_preempted

UTILITIES = ("moestack_set_limits", "moestack_scheduler_state")


@dataclass(frozen=True)
class Limits:
    """Scheduler limits: sequences that may run at once, tokens that one step may schedule."""

    active_seqs: int
    batched_tokens: int


class LimitRefused(ValueError):
    """A limit outside of what the engine was launched for, or one that would starve requests."""


def check_limits(
    wanted: Limits,
    ceiling: Limits,
    *,
    draft_tokens: int,
    chunked_prefill: bool,
    longest: int,
    running: int = 0,
    chunk: int = 0,
) -> Limits:
    """The limits, if they are safe. Raises LimitRefused that names the knob, the value and the bound.

    The running loop stops when a step's token budget is spent, so each active sequence needs its 1 + draft tokens in
    every step, and so do those that run already; without chunked prefill a prompt longer than the budget would wait
    for ever. A prefill in chunks takes what is left over and runs last, unless `chunk` (long-prefill-token-threshold,
    0: none) lets others in behind it: then each may take that much before them.
    """
    if not 1 <= wanted.active_seqs <= ceiling.active_seqs:
        raise LimitRefused(
            f"engine.maxActiveSeqs {wanted.active_seqs} is outside 1 to {ceiling.active_seqs}, the launch-time ceiling"
        )
    sequences = max(wanted.active_seqs, running)
    floor = sequences * (1 + draft_tokens)
    if 0 < chunk < ceiling.batched_tokens:
        # No engine gives more than it was launched for: there the launch itself made them wait for one another.
        floor = max(floor, min(sequences * chunk, ceiling.batched_tokens))
    if not chunked_prefill:
        floor = max(floor, longest)
    if not floor <= wanted.batched_tokens <= ceiling.batched_tokens:
        raise LimitRefused(
            f"engine.maxBatchedTokens {wanted.batched_tokens} is outside {floor} to {ceiling.batched_tokens}: "
            f"{sequences} active sequences need {floor} tokens in a step, the launch-time ceiling is "
            f"{ceiling.batched_tokens}"
        )
    return wanted


def moestack_set_limits(self: Any, active_seqs: int | None, batched_tokens: int | None) -> dict[str, int]:
    """Change the limits from the next step on; None restores the launch-time ceiling."""
    scheduler = self.scheduler
    ceiling = _ceiling(scheduler)
    wanted = Limits(
        ceiling.active_seqs if active_seqs is None else active_seqs,
        ceiling.batched_tokens if batched_tokens is None else batched_tokens,
    )
    config = scheduler.scheduler_config
    check_limits(
        wanted,
        ceiling,
        draft_tokens=int(getattr(scheduler, "num_spec_tokens", 0) or 0),
        chunked_prefill=bool(config.enable_chunked_prefill),
        longest=int(scheduler.max_model_len),
        running=len(scheduler.running),
        chunk=int(config.long_prefill_token_threshold or 0),
    )
    scheduler.max_num_active_reqs = wanted.active_seqs
    scheduler.max_num_scheduled_tokens = wanted.batched_tokens
    return {"active_seqs": wanted.active_seqs, "batched_tokens": wanted.batched_tokens}


def moestack_scheduler_state(self: Any) -> dict[str, float]:
    """Running and waiting requests, share of KV cache in use, limits in force and their ceilings."""
    scheduler = self.scheduler
    ceiling = _ceiling(scheduler)
    return {
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "preemptions": int(getattr(scheduler, "_moestack_preemptions", 0)),
        "kv_usage": float(scheduler.kv_cache_manager.usage),
        "active_seqs": scheduler.max_num_active_reqs,
        "batched_tokens": scheduler.max_num_scheduled_tokens,
        "ceiling_active_seqs": ceiling.active_seqs,
        "ceiling_batched_tokens": ceiling.batched_tokens,
    }


def count_preemptions(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the scheduler's method that pushes a request out of the KV cache."""

    def preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._moestack_preemptions = getattr(self, "_moestack_preemptions", 0) + 1
        answer = original(self, request, *args, **kwargs)
        settle_preempted(self, request)
        return answer

    return preempt_request


def _ceiling(scheduler: Any) -> Limits:
    config = scheduler.scheduler_config
    return Limits(scheduler.max_num_running_reqs, config.max_num_scheduled_tokens or config.max_num_batched_tokens)
