"""The plugin inside the real vLLM, compiled, float32: one rank against two, counts against logits, capacity held."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moe_core.capacity import Tokens, assign, capacity
from moe_core.wire import Overflow
from tests.engine.offline_tiers import ASKED, MIXED, RESUMED_TOKENS, STRADDLED, TIERS
from tests.engine.stack import environment

pytestmark = pytest.mark.engine

torch = pytest.importorskip("torch")

EXPERTS, TOP_K, RANKS = 16, 4, 2
HOT = (0, 1, 2)
SHAPE = {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 3}
PROMPTS = [f"{i}. Say what {i * 37 % 101} times {i % 7} is, and why it is{' very' * (i % 9)} so." for i in range(100)]
PHASES = [
    {"knobs": {"overflow": "Unlimited"}},
    {"knobs": {"overflow": "Reroute", "capacityFactorPrefill": "1"}},
    {"knobs": {"overflow": "Drop", "capacityFactorPrefill": "1.25", "capacityFactorDecode": "2"}},
    {"knobs": {"overflow": "Unlimited"}},
]
Run = dict[str, Any]


def run_engine(folder: Path, ranks: int) -> Run:
    from moe_serving.tiny import Skew, cached_checkpoint

    checkpoint = cached_checkpoint("qwen3_moe", skew=Skew(HOT, 3.0), **SHAPE)
    job = folder / f"job{ranks}.json"
    out = folder / f"out{ranks}.json"
    job.write_text(
        json.dumps(
            {
                "checkpoint": str(checkpoint),
                "ranks": ranks,
                "prompts": PROMPTS,
                "phases": PHASES,
                "max_tokens": 12,
                "out": str(out),
            }
        )
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline.py")), str(job)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: Run = json.loads(out.read_text())
    result["records"] = [
        [torch.load(f"{out}.phase{number}.rank{rank}.pt") for rank in range(ranks)] for number in range(len(PHASES))
    ]
    if ranks == 1:
        result["mixed"] = torch.load(f"{out}.tiers.rank0.pt")
    return result


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_engine(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_engine(tmp_path_factory.mktemp("two"), RANKS)


def test_two_expert_parallel_ranks_give_the_text_of_one(one: Run, two: Run) -> None:
    assert len(one["phases"][0]["tokens"]) == 100
    assert one["phases"][0]["tokens"] == two["phases"][0]["tokens"]


def test_capacity_lifted_gives_the_first_text_again(two: Run) -> None:
    assert two["phases"][3]["tokens"] == two["phases"][0]["tokens"]
    assert two["phases"][1]["tokens"] != two["phases"][0]["tokens"]


def test_every_layer_is_hooked(two: Run) -> None:
    assert [[layer["layer"] for layer in rank] for rank in two["layers"]] == [[0, 1, 2]] * RANKS
    assert all(layer["hooked"] and layer["why"] == "" for rank in two["layers"] for layer in rank)


def counted(phase: Run, rank: int, layer: int, what: str) -> list[int]:
    after, before = (phase[when][rank]["layers"][layer][what] for when in ("after", "before"))
    return [a - b for a, b in zip(after, before, strict=True)]


@pytest.mark.parametrize("phase", range(len(PHASES)))
def test_counts_equal_an_independent_count_of_the_routers_logits(two: Run, phase: int) -> None:
    data = two["phases"][phase]
    # Each request runs its prompt once, and each token but the last once more.
    routed = sum(data["prompt_tokens"]) + sum(len(tokens) - 1 for tokens in data["tokens"])
    for rank in range(RANKS):
        for layer in range(SHAPE["num_hidden_layers"]):
            records = [r for r in two["records"][phase][rank] if r["layer"] == layer]
            want = [0] * EXPERTS
            for record in records:
                for row in record["logits"].tolist():
                    for expert in sorted(range(EXPERTS), key=lambda e: -row[e])[:TOP_K]:
                        want[expert] += 1
            got = counted(data, rank, layer, "demand")
            assert got == want
            assert sum(got) == routed * TOP_K
            assert (
                data["after"][rank]["layers"][layer]["tokens"] - data["before"][rank]["layers"][layer]["tokens"]
                == routed
            )


@pytest.mark.parametrize("phase", [1, 2])
def test_capacity_follows_the_reference_in_every_step(two: Run, phase: int) -> None:
    knobs = PHASES[phase]["knobs"]
    overflow = Overflow(knobs["overflow"])
    gammas = {1: knobs.get("capacityFactorPrefill"), 2: knobs.get("capacityFactorDecode")}
    binding = 0
    for record in two["records"][phase][0]:
        for which, gamma in gammas.items():
            rows = torch.nonzero(record["phase"] == which).squeeze(1)
            if not len(rows) or gamma is None:
                continue
            logits = record["logits"][rows]
            gates = torch.log_softmax(logits, -1)  # between tokens the gate decides (ADR 0025)
            tokens = Tokens(gates.tolist(), gates.exp().tolist(), [TOP_K] * len(rows))
            want = assign(tokens, overflow, Decimal(gamma))
            got = record["out_ids"][rows].tolist()
            assert [{e for e in row if e >= 0} for row in got] == [set(row) for row in want.experts]
            limit = capacity(Decimal(gamma), TOP_K * len(rows), EXPERTS)
            assert max(want.load(EXPERTS)) <= limit
            assert all(any(e >= 0 for e in row) for row in got), "a token was left without an expert"
            binding += want.rerouted + want.dropped > 0
            weights = record["out_weights"][rows]
            assert torch.allclose(weights.sum(1), torch.ones(len(rows)), atol=1e-5)
            assert bool((weights[torch.tensor(got) < 0] == 0).all())
    assert binding > 10, "capacity never bound: the test shows nothing"


def test_decode_is_uncapped_by_default(two: Run) -> None:
    for record in two["records"][1][0]:
        rows = record["phase"] == 2
        assert torch.equal(record["ids"][rows], record["out_ids"][rows])


def test_ranks_decide_alike(two: Run) -> None:
    for phase in two["records"]:
        first, second = phase
        assert len(first) == len(second) > 0
        for a, b in zip(first, second, strict=True):
            assert a["layer"] == b["layer"]
            assert torch.equal(a["out_ids"], b["out_ids"])


def rank_load(phase: Run, layer: int) -> list[int]:
    load = counted(phase, 0, layer, "assigned")
    return [sum(load[e] for e in phase["after"][rank]["layers"][layer]["mine"]) for rank in range(RANKS)]


def test_the_busier_rank_takes_longer_and_rerouting_evens_it_out(two: Run) -> None:
    ratios = []
    for phase in (0, 1):
        data = two["phases"][phase]
        load = [sum(rank_load(data, layer)[rank] for layer in range(3)) for rank in range(RANKS)]
        seconds = [data["after"][rank]["moe_s"] - data["before"][rank]["moe_s"] for rank in range(RANKS)]
        ratios.append((load[0] / load[1], seconds[0] / seconds[1]))
    (skewed_load, skewed_time), (even_load, even_time) = ratios
    assert skewed_load > 1.5
    assert skewed_time > 1.1, "the rank with more slots was not the slower one"
    assert even_load < skewed_load
    assert even_time < skewed_time


def test_dropped_slots_are_counted(two: Run) -> None:
    data = two["phases"][2]
    for layer in range(3):
        missing = sum(counted(data, 0, layer, "demand")) - sum(counted(data, 0, layer, "assigned"))
        after, before = (data[when][0]["layers"][layer] for when in ("after", "before"))
        assert after["dropped"] - before["dropped"] == missing


@pytest.mark.parametrize(("name", "cached"), [(name, cached) for name, _, _, _, cached in ASKED])
def test_the_prefix_cache_keeps_tiers_and_settings_apart_and_finds_them_again(one: Run, name: str, cached: int) -> None:
    assert one["tiers"]["asked"][name]["cached"] == cached


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("again", "first"),
        ("that tier again", "another tier"),
        # Capped, a prompt whose beginning is cached runs as another batch than a whole one, and as that one always.
        ("the γ of before", "capped again"),
        ("unlimited once more", "first"),
        ("and its tier gold", "another tier"),
        ("a client's salt", "first"),
    ],
)
def test_text_with_the_cache_is_that_without(one: Run, name: str, first: str) -> None:
    asked = one["tiers"]["asked"]
    assert asked[name]["tokens"] == asked[first]["tokens"]
    assert asked[name]["logprob"] == pytest.approx(asked[first]["logprob"], abs=1e-4)


def test_tiers_and_capacity_change_what_is_computed(one: Run) -> None:
    asked = one["tiers"]["asked"]
    found = [asked[name]["logprob"] for name in ("first", "another tier", "a third tier", "capped")]
    assert all(abs(a - b) > 1e-3 for i, a in enumerate(found) for b in found[:i]), "the cases above show nothing"


@pytest.mark.parametrize(("name", "cached"), [(name, cached) for name, _, cached in STRADDLED])
def test_a_prefill_that_straddles_a_switch_caches_nothing_after_it(one: Run, name: str, cached: int) -> None:
    assert one["tiers"]["straddled"][name]["cached"] == cached


def test_a_request_that_was_pushed_out_goes_on_with_its_tier(one: Run) -> None:
    whole, resumed = one["tiers"]["resumed"]
    assert whole["routed"] == RESUMED_TOKENS + len(whole["tokens"]) - 1
    assert resumed["routed"] >= whole["routed"] + RESUMED_TOKENS, "nothing was computed twice: it was not pushed out"
    assert [run["slots"] for run in (whole, resumed)] == [TIERS["gold"] * run["routed"] for run in (whole, resumed)]
    assert resumed["tokens"] == whole["tokens"]
    assert resumed["logprob"] == pytest.approx(whole["logprob"], abs=1e-4)


def test_tiers_mix_in_one_batch(one: Run) -> None:
    want = {TIERS.get(tier or "", 0): 0 for tier in MIXED}
    for tier, tokens in zip(MIXED, (5 + number for number in range(len(MIXED))), strict=True):
        want[TIERS.get(tier or "", 0)] += tokens + 5
    seen = dict.fromkeys(want, 0)
    together = 0
    for record in one["mixed"]:
        k, ids, held = record["k"], record["ids"], record["out_ids"]
        together += len(set(k.tolist())) == 3
        own = k == 0
        assert torch.equal(held[own], ids[own])
        assert torch.equal(record["out_weights"][own], record["weights"][own])
        for row in torch.nonzero(~own).squeeze(1).tolist():
            # The first k of the router's choice are its strongest.
            strongest = record["logits"][row].topk(int(k[row])).indices.tolist()
            assert sorted(e for e in held[row].tolist() if e >= 0) == sorted(strongest)
        for count in seen:
            seen[count] += int((k == count).sum())
    assert {count: tokens // SHAPE["num_hidden_layers"] for count, tokens in seen.items()} == want
    assert together > 0, "no batch held all of them"
