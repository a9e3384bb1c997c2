"""Counters of the board never go back but where a replica starts anew, whatever restarts and overtakes; few series."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moe_core.signing import Verifier
from moe_core.wire import ExpertKnobs, Overflow, ReplicaDigest
from moe_serving.board_metrics import registry
from moe_serving.board_state import BoardState
from moe_serving.digest import Identity, Totals, build

EXPERTS, LAYERS, RANKS = 4, 2, 2
SCHEDULER = {
    "running": 1, "waiting": 0, "kv_usage": 0.2, "active_seqs": 8, "batched_tokens": 64, "ceiling_active_seqs": 8,
    "ceiling_batched_tokens": 64,
}  # fmt: skip
Key = tuple[str, tuple[tuple[str, str], ...]]


def empty_layer(number: int, experts: int) -> dict[str, Any]:
    return {
        "layer": number, "hooked": True, "demand": [0] * experts, "assigned": [0] * experts, "tokens": 0, "dropped": 0,
        "rerouted": 0, "overflow_kept": 0, "lost_gate_mass": 0.0, "max_prefill_load": 0, "mine": None,
    }  # fmt: skip


@dataclass
class Replica:
    """A replica's process: what its ranks count, and the digests that it made and that have not arrived yet."""

    name: str
    started_s: float
    layers: list[dict[str, Any]] = field(default_factory=lambda: [empty_layer(n, EXPERTS) for n in range(LAYERS)])
    totals: Totals = field(default_factory=Totals)
    counted: dict[str, float] = field(
        default_factory=lambda: {"steps": 0, "prompt_tokens": 0, "generated_tokens": 0, "busy_s": 0.0, "moe_s": 0.0}
    )
    under_way: list[ReplicaDigest] = field(default_factory=list)

    def step(self, loads: list[int], dropped: int) -> None:
        for layer in self.layers:
            for expert, load in enumerate(loads):
                layer["demand"][expert] += load
                layer["assigned"][expert] += max(0, load - dropped)
            layer["tokens"] += sum(loads)
            layer["dropped"] += dropped
            layer["lost_gate_mass"] += dropped / 8
            layer["max_prefill_load"] = max(loads)
        for name in self.counted:
            self.counted[name] += 1

    def make_digest(self, at_s: float) -> None:
        ranks = [
            {"version": 0, "knobs": ExpertKnobs().model_dump_json(by_alias=True), "layers": self.layers, **self.counted}
            for _ in range(RANKS)
        ]
        digest, self.totals = build(Identity(self.name, "local", self.started_s), at_s, ranks, SCHEDULER, self.totals)
        self.under_way.append(digest)


class Counters(RuleBasedStateMachine):
    """Two replicas and a board, any of which restarts; digests arrive late, twice, or never."""

    @initialize()
    def begin(self) -> None:
        self.now_s = 1000.0
        self.replicas = {name: Replica(name, self.now_s) for name in ("a", "b")}
        self.seen: dict[Key, tuple[float, float]] = {}
        self.new_board()

    def new_board(self) -> None:
        self.state = BoardState("default/tiny", "local", Verifier([]))
        for replica in self.replicas.values():
            self.state.register(replica.name, RANKS, self.now_s, None)

    @rule(
        name=st.sampled_from("ab"),
        steps=st.lists(st.lists(st.integers(0, 9), min_size=EXPERTS, max_size=EXPERTS), min_size=1, max_size=3),
        dropped=st.integers(0, 3),
    )
    def runs(self, name: str, steps: list[list[int]], dropped: int) -> None:
        for loads in steps:
            self.replicas[name].step(loads, dropped)
            self.replicas[name].make_digest(self.now_s)

    @rule(name=st.sampled_from("ab"), order=st.lists(st.integers(0, 9), min_size=1, max_size=4), again=st.booleans())
    def digests_arrive(self, name: str, order: list[int], again: bool) -> None:
        """In any order, some of them twice; a scrape comes after each."""
        waiting = self.replicas[name].under_way
        for which in order:
            if waiting:
                at = which % len(waiting)
                self.state.report(waiting[at] if again else waiting.pop(at), self.now_s)
                self.no_counter_went_back()

    @rule(name=st.sampled_from("ab"), delta_s=st.floats(0.1, 8))
    def a_replica_restarts(self, name: str, delta_s: float) -> None:
        self.now_s += delta_s
        left = self.replicas[name].under_way  # of the dead process, still on the wire
        self.replicas[name] = Replica(name, self.now_s, under_way=left)
        self.state.register(name, RANKS, self.now_s, None)

    @rule(name=st.sampled_from("ab"))
    def a_replica_registers_again(self, name: str) -> None:
        self.state.register(name, RANKS, self.now_s, None)

    @rule()
    def the_board_restarts(self) -> None:
        for replica in self.replicas.values():
            replica.under_way.clear()  # calls on a dead actor fail
        self.new_board()

    @rule(delta_s=st.floats(0.1, 8))
    def time_passes(self, delta_s: float) -> None:
        self.now_s += delta_s

    @invariant()
    def no_counter_went_back(self) -> None:
        if not hasattr(self, "state"):
            return
        started, counters = scrape(self.state, self.now_s)
        for key, value in counters.items():
            start = started[dict(key[1])["replica"]]
            before_start, before = self.seen.get(key, (start, 0.0))
            assert start >= before_start, f"{key}: start time went back"
            assert start > before_start or value >= before, f"{key}: {before} became {value}"
            self.seen[key] = (start, value)


def scrape(state: BoardState, now_s: float) -> tuple[dict[str, float], dict[Key, float]]:
    """Start time by replica, and every counter series, as Prometheus reads them."""
    started: dict[str, float] = {}
    counters: dict[Key, float] = {}
    for family in text_string_to_metric_families(exposition(state, now_s)):
        for sample in family.samples:
            if sample.name == "moestack_replica_start_time_seconds":
                started[sample.labels["replica"]] = sample.value
            if family.type == "counter":
                key = (sample.name, tuple(sorted(sample.labels.items())))
                assert key not in counters, "a series twice"
                counters[key] = sample.value
    return started, counters


def exposition(state: BoardState, now_s: float) -> str:
    return generate_latest(registry("default/tiny", "local", lambda: state.digests(now_s))).decode()


TestCounters = Counters.TestCase
TestCounters.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_digest_that_was_overtaken_changes_nothing_but_shows_life() -> None:
    replica, state = Replica("a", 5.0), BoardState("d", "local", Verifier([]))
    state.register("a", RANKS, 0.0, None)
    replica.step([1, 0, 0, 0], 0)
    replica.make_digest(6.0)
    replica.step([1, 0, 0, 0], 0)
    replica.make_digest(7.0)
    first, second = replica.under_way
    state.report(second, 1.0)
    state.report(first, 9.0)
    assert state.digests(12.0) == [second]
    state.register("a", RANKS, 12.0, None)
    state.report(first, 12.0)
    assert state.digests(12.0) == [], "not even after the replica registered again"


def test_a_restart_shows_as_a_later_start_time_and_counters_from_zero() -> None:
    state = BoardState("d", "local", Verifier([]))
    state.register("a", RANKS, 0.0, None)
    for started_s, steps in ((5.0, 3), (50.0, 1)):
        replica = Replica("a", started_s)
        for _ in range(steps):
            replica.step([2, 0, 0, 0], 0)
            replica.make_digest(started_s)
        state.report(replica.under_way[-1], started_s)
        started, counters = scrape(state, started_s)
        assert started == {"a": started_s}
        key = ("moestack_engine_steps_total",
               (("deployment", "default/tiny"), ("replica", "a"), ("revision", "local")))  # fmt: skip
        assert counters[key] == steps


def test_the_exposition_stays_small_whatever_the_experts_and_ranks() -> None:
    """61 layers × 72 ranks, 256 experts: 4,392 series by (layer, rank) and 15,616 by (layer, expert) were too many."""
    layers = [empty_layer(n, 256) for n in range(61)]
    for layer in layers:
        layer["demand"] = layer["assigned"] = list(range(256))
        layer["tokens"] = 100
    knobs = ExpertKnobs.model_validate({"overflow": Overflow.REROUTE, "capacityFactorPrefill": "1.5"})
    ranks = [
        {"version": 1, "knobs": knobs.model_dump_json(by_alias=True, exclude_none=True), "layers": layers, "steps": 1,
         "prompt_tokens": 1, "generated_tokens": 1, "busy_s": 1.0, "moe_s": 1.0}
        for _ in range(72)
    ]  # fmt: skip
    digest, _ = build(Identity("a", "local", 1.0), 2.0, ranks, SCHEDULER, Totals())
    state = BoardState("default/tiny", "local", Verifier([]))
    state.register("a", 72, 0.0, None)
    state.report(digest, 0.0)
    families = list(text_string_to_metric_families(exposition(state, 0.0)))
    by_layer = sum("layer" in sample.labels for family in families for sample in family.samples)
    others = sum(len(family.samples) for family in families) - by_layer
    assert by_layer == 61 * 14, "14 by layer, none by rank, three by hot expert"
    assert others - 72 <= 40, "and one of each rank: seconds in its expert kernels"
    assert not any(math.isnan(sample.value) for family in families for sample in family.samples)
