"""What a step's batch is to the plugin: each token's phase and k, and how many tokens the step will yield. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_serving.capacity import DECODE, PREFILL
from moe_serving.tiers import experts_of_requests

Ints = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Step:
    """A batch by token, in its order: `phase` [T] of PREFILL and DECODE; `k` [T], 0 for the model's own, or None where
    every token takes the model's own."""

    phase: np.ndarray[Any, np.dtype[np.uint8]]
    generated: int
    k: np.ndarray[Any, np.dtype[np.int64]] | None


def step_of(
    computed: Ints, prompt: Ints, scheduled: Ints, requests: Sequence[Any], per_token: Mapping[str, int]
) -> Step:
    """Of each request [N] in batch order: tokens computed before, tokens of its prompt, tokens of this step; and vLLM's
    own state of it (num_tokens, sampling_params)."""
    phases = np.where(computed >= prompt, DECODE, PREFILL).astype(np.uint8)
    # A request yields a token in every step but those that end inside what it has: its prompt, and after it was
    # pushed out of the KV cache its own earlier tokens too.
    have = np.fromiter((request.num_tokens for request in requests), np.int64, len(requests))
    k = experts_of_requests((request.sampling_params for request in requests), per_token)
    return Step(
        np.repeat(phases, scheduled),
        int((computed + scheduled >= have).sum()),
        None if k is None else np.repeat(k, scheduled),
    )
