"""Routed batches played on one rank, and on two that share a layer's experts: two processes that talk as ranks do.

Each process decides for all tokens, as under tensor parallelism, takes the slots of its own experts, and switches
knobs by the agreement of `moe_serving.agreement` over a gloo group of their own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_core.wire import ExpertKnobs
from moe_serving.agreement import Proposal, everyone, objection
from moe_serving.rank import Layer, Rank
from moe_serving.scores import Routing

RANKS = 2
COUNTERS = (
    "demand", "assigned", "tokens", "dropped", "rerouted", "overflow_kept", "max_prefill_load", "touched",
    "lost_gate_mass",
)  # fmt: skip
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Batch:
    """One routed batch of one layer: `phase` [T], `k` [T] (0: the model's own), `logits` [T, E] and what the model's
    router made of them, `weights` and `ids` [T, K]."""

    layer: int
    phase: Array
    k: Array
    logits: Array
    weights: Array
    ids: Array

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Batch:
        """A batch that `moestack_record` kept."""
        row = {field.name: record[field.name] for field in fields(cls)}
        return cls(**{name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in row.items()})


@dataclass(frozen=True)
class Shape:
    """What a layer's router is. `placement` tells each expert's rank."""

    experts: int
    top_k: int
    routing: dict[str, Any]
    placement: str = "linear"

    @classmethod
    def of(cls, experts: int, top_k: int, routing: Routing, placement: str = "linear") -> Shape:
        return cls.of_rule(experts, top_k, {f.name: getattr(routing, f.name) for f in fields(routing)}, placement)

    @classmethod
    def of_rule(cls, experts: int, top_k: int, rule: dict[str, Any], placement: str = "linear") -> Shape:
        """Of the fields of a Routing."""
        bias = rule["bias"]
        rule = {**rule, "bias": None if bias is None else bias.detach().float().numpy()}
        return cls(experts, top_k, rule, placement)

    def layer(self, index: int) -> Layer:
        bias = self.routing["bias"]
        routing = Routing(**{**self.routing, "bias": None if bias is None else torch.from_numpy(bias)})
        return Layer(index, f"moe.{index}", self.experts, self.top_k, routing)

    def owner(self, rank: int) -> torch.Tensor:
        """[E] bool: the experts that lie on `rank` of two, the first half of them or every second one."""
        index = torch.arange(self.experts)
        ranks = index * RANKS // max(1, self.experts) if self.placement == "linear" else index % RANKS
        return ranks == rank


@dataclass(frozen=True)
class Played:
    """What batches came to: for each of them weights and ids [T, K], and `mine` [T, K], the slots that this rank
    computes; then the counters of each layer, and the knobs' version in force."""

    out: list[tuple[Array, Array, Array]]
    counters: list[dict[str, Array]]
    version: int

    def differences(self, other: Played) -> list[str]:
        """What is not the same, bit for bit, in what both decided; empty where nothing is."""
        found = [
            f"batch {number}: {name}"
            for number, (ours, theirs) in enumerate(zip(self.out, other.out, strict=True))
            for name, a, b in zip(("weights", "ids"), ours, theirs, strict=False)
            if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes())
        ]
        found += [
            f"layer {number}: {name}"
            for number, (ours, theirs) in enumerate(zip(self.counters, other.counters, strict=True))
            for name in COUNTERS
            if ours[name].tobytes() != theirs[name].tobytes()
        ]
        return found + ([f"version {self.version} and {other.version}"] if self.version != other.version else [])


def play_alone(shapes: Sequence[Shape], batches: Sequence[Batch], knobs: ExpertKnobs, version: int = 1) -> Played:
    """On one rank that has every expert."""
    everything = [torch.ones(shape.experts, dtype=torch.bool) for shape in shapes]
    with _as_in_a_new_process():
        return _play(0, 1, shapes, everything, batches, knobs, version)


@contextlib.contextmanager
def _as_in_a_new_process() -> Iterator[None]:
    """Code compiled with -ffast-math, which a test before may have loaded, makes the threads that it finds take the
    smallest numbers for 0. The two ranks' processes have none of it, so this one must not either: each thread has the
    setting of its own, hence one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class TwoRanks:
    """The two processes, until `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, Path(self._folder.name) / "store", theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._version = 0

    def play(self, shapes: Sequence[Shape], batches: Sequence[Batch], knobs: ExpertKnobs) -> list[Played]:
        """On both ranks at once; what each came to."""
        self._version += 1
        for pipe in self._pipes:
            pipe.send((list(shapes), list(batches), knobs.model_dump_json(by_alias=True), self._version))
        return [pipe.recv() for pipe in self._pipes]

    def agree_with_one(self, shapes: Sequence[Shape], batches: Sequence[Batch], knobs: ExpertKnobs) -> Played:
        """AssertionError unless both decide, bit for bit, what one rank does, and share its slots between them; what
        the one rank came to."""
        ranks = self.play(shapes, batches, knobs)
        one = play_alone(shapes, batches, knobs, self._version)
        for rank in ranks:
            assert not one.differences(rank), one.differences(rank)[:5]
        for number, (_, ids, _) in enumerate(one.out):
            computed = sum(rank.out[number][2].astype(int) for rank in ranks)
            assert np.array_equal(computed, (ids >= 0).astype(int)), "a slot that no rank computes, or two do"
        return one

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(30)
        self._folder.cleanup()


def _serve(rank: int, store: Path, pipe: Any) -> None:
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    while (job := pipe.recv()) is not None:
        shapes, batches, knobs, version = job
        mine = [shape.owner(rank) for shape in shapes]
        pipe.send(_play(rank, RANKS, shapes, mine, batches, ExpertKnobs.model_validate_json(knobs), version))
    torch.distributed.destroy_process_group()


def _play(
    number: int,
    ranks: int,
    shapes: Sequence[Shape],
    owners: Sequence[torch.Tensor],
    batches: Sequence[Batch],
    knobs: ExpertKnobs,
    version: int,
) -> Played:
    from moe_serving.cpu_experts import _map_local

    rank = Rank(layers=[shape.layer(index) for index, shape in enumerate(shapes)])
    told = knobs.model_dump_json(by_alias=True)
    group = torch.distributed.group.WORLD if ranks > 1 else None
    refused = objection(everyone(Proposal(number, version, told, 0), group, ranks))
    assert refused is None, refused
    rank.apply(knobs, version)
    maps = []
    for owner in owners:
        local = torch.full((len(owner),), -1, dtype=torch.int32)
        local[owner] = torch.arange(int(owner.sum()), dtype=torch.int32)
        maps.append(local)
    out = []
    for batch in batches:
        rank.begin_step(batch.phase.astype(np.uint8), 0, batch.k.astype(np.int64) if batch.k.any() else None)
        weights, ids = rank.route(batch.layer, *(torch.from_numpy(x) for x in (batch.weights, batch.ids, batch.logits)))
        out.append((weights.numpy(), ids.numpy(), (_map_local(ids, maps[batch.layer]) >= 0).numpy()))
    counters = [{name: getattr(layer, name).numpy() for name in COUNTERS} for layer in rank.layers]
    return Played(out, counters, rank.knobs_version)
