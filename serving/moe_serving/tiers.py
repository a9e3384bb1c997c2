"""Tiers inside the engine: each request's k for the worker, and the salt that keeps its cached blocks apart.

A request is salted in the engine core, where every path into the engine meets and where knobs change between two steps:
no step can run under one setting and have its blocks cached under another. Kept free of torch and vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from moe_core.tiers import OWN_K, TIER_ARGUMENT, cache_salt, experts_of
from moe_core.wire import ExpertKnobs

_STOCK = ExpertKnobs()


def tier_of(sampling_params: Any) -> str | None:
    """The tier that a request carries; None is `default`, and every request of a pooling model."""
    arguments = getattr(sampling_params, "extra_args", None)
    tier = arguments.get(TIER_ARGUMENT) if arguments else None
    return tier if isinstance(tier, str) else None


def experts_of_requests(
    sampling_params: Iterable[Any], per_token: Mapping[str, int]
) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """k of each request of a batch, `OWN_K` for the model's own; None where every request takes the model's own."""
    if not per_token:
        return None
    k = np.fromiter((experts_of(per_token, tier_of(params)) for params in sampling_params), np.int64)
    return k if (k != OWN_K).any() else None


# Hooks of the engine core. `scheduler._moestack_knobs` are the knobs that its workers have in force.


def salt_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the core's method that makes a Request, and hashes its prompt, of what a client process sent."""

    def preprocess_add_request(self: Any, request: Any) -> Any:
        client = request.cache_salt
        request.cache_salt = cache_salt(client, tier_of(request.sampling_params), _knobs(self.scheduler))
        made = original(self, request)
        made[0]._moestack_client_salt = client
        return made

    return preprocess_add_request


def settle_new(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the core's method that queues a Request: it was salted in another thread, and knobs may have changed."""

    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        settle(request, _knobs(self.scheduler))
        return original(self, request, *args, **kwargs)

    return add_request


def follow_knobs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the core's method that calls every rank between two steps: knobs applied there are in force for the next."""

    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        answers = original(self, method, *args, **kwargs)
        if method == "moestack_apply":
            # Ranks of one engine refuse and accept alike; the first speaks for all.
            put_in_force(self.scheduler, ExpertKnobs.model_validate_json(answers[0]["knobs"]))
        return answers

    return collective_rpc


def put_in_force(scheduler: Any, knobs: ExpertKnobs) -> None:
    """The scheduler's requests go on under other knobs, and each gets its salt."""
    scheduler._moestack_knobs = knobs
    for request in scheduler.requests.values():
        settle(request, knobs)


def settle(request: Any, knobs: ExpertKnobs) -> None:
    """Give an unfinished request the salt of the knobs in force. One that has blocks already keeps its salt and caches
    nothing more: what follows is computed under other knobs than its salt says."""
    client = getattr(request, "_moestack_client_salt", request.cache_salt)
    salt = cache_salt(client, tier_of(request.sampling_params), knobs)
    if salt == request.cache_salt:
        return
    if request.num_computed_tokens:
        request._moestack_straddles = True
        return
    request._moestack_client_salt = client
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()


def settle_preempted(scheduler: Any, request: Any) -> None:
    """A request that lost its blocks computes all of them anew, under the knobs of today."""
    request._moestack_straddles = False
    settle(request, _knobs(scheduler))


def cache_unless_straddling(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the coordinator's method through which every KV-cache group caches a request's full blocks."""

    def cache_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(request, "_moestack_straddles", False):
            original(self, request, *args, **kwargs)

    return cache_blocks


def _knobs(scheduler: Any) -> ExpertKnobs:
    knobs: ExpertKnobs = getattr(scheduler, "_moestack_knobs", _STOCK)
    return knobs
