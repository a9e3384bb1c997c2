"""Each model family on the real vLLM from its tiny checkpoint: plugin against stock, two ranks against one, behind
MoEServer; counts, capacity held.

All families that are asked for run in one go, each as stock, with the plugin, on two expert-parallel ranks and behind
MoEServer on two ranks; every test reads what its runs left.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moe_core.capacity import capacity
from moe_core.wire import ExpertKnobs, Overflow
from tests.engine.families import DTYPE, KNOBS, PROMPTS, RUNS
from tests.engine.stack import environment

pytestmark = pytest.mark.engine

torch = pytest.importorskip("torch")

IN_CI = "deepseek_v3"
LONG = (
    "mixtral",
    "deepseek_v2",
    "gpt_oss",
    "dbrx",
    "qwen3_next",
    "llama4",
    "granitemoe",
    "qwen2_moe",
    "olmoe",
    "qwen3_moe",
)
RANKS = 2
ROUNDING = 1e-3
"""How far a log probability in float32 may lie from that of one rank. Two ranks add the halves of each row-parallel
product, and what their experts make of a token, in another order than one rank does: the last of 24 bits differ, and
grow from layer to layer. Nothing else may."""
COARSE_ROUTER, COARSE = 0.0625, 0.75
"""In bfloat16, with 8 bits: how far logits of the first layer's router may lie apart, where nothing has grown yet; and
nine of ten log probabilities. A few tokens in a hundred take another expert there, and what follows them differs."""
WITH_RAY = importlib.util.find_spec("ray") is not None
"""MoEServer is a class of Ray Serve's: an environment that only tries another vLLM has none."""
GAMMAS = ("1", "1.25", "2")
ALL_S = 540
"""Longest time of all families that are asked for."""
Found = dict[str, Any]
PREFILL, DECODE = 1, 2

every_family = pytest.mark.parametrize(
    "family", [IN_CI, *(pytest.param(family, marks=pytest.mark.full) for family in LONG)]
)


class Results:
    """What the runs of each family left in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, family: str, run: str) -> Found:
        """A run's result, with the routing that it recorded by phase and rank; AssertionError where it failed."""
        path = self.folder / f"out.{family}.{run}"
        assert path.is_file(), f"{family}, {run}: no result within {ALL_S} s; see {self.folder / 'log'}"
        found: Found = json.loads(path.read_text())
        assert "error" not in found, f"{family}, {run}: {found['error']}"
        for number, phase in enumerate(found["phases"]):
            records = [Path(f"{path}.phase{number}.rank{rank}.pt") for rank in range(RUNS[run].ranks)]
            phase["records"] = [torch.load(record) for record in records if record.is_file()]
        return found

    def routings(self, family: str) -> list[Any]:
        rules: list[Any] = torch.load(self.folder / f"out.{family}.hooked.routings.pt")
        return rules


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    from moe_serving.tiny import cached_checkpoint

    folder = tmp_path_factory.mktemp("families")
    asked = {
        item.callspec.params["family"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    sources = {family: cached_checkpoint(family) for family in (IN_CI, *LONG) if family in asked}
    stock = {"dbrx": str(as_stock_finds_it(sources["dbrx"], folder / "stock"))} if "dbrx" in asked else {}
    job = {
        "families": {family: str(source) for family, source in sources.items()},
        "runs": {family: [name for name, run in RUNS.items() if WITH_RAY or not run.served] for family in sources},
        "stock": stock,
        "out": str(folder / "out"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("families.py")), str(folder / "job.json")],
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        process.wait(ALL_S)
    except subprocess.TimeoutExpired:
        pass  # what ran until then has left its results; the others' tests say that they have none
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Results(folder)


def as_stock_finds_it(source: Path, path: Path) -> Path:
    """A DBRX checkpoint with its experts where stock vLLM looks for them; the plugin finds the published ones."""
    from safetensors.torch import load_file, save_file

    from moe_serving.mends import moved

    shutil.copytree(source, path)
    weights = load_file(source / "model.safetensors")
    save_file({moved(name): weight for name, weight in weights.items()}, path / "model.safetensors", {"format": "pt"})
    return path


@every_family
def test_a_family_counted_and_capped(family: str, results: Results) -> None:
    from moe_serving.tiny import facts

    stock, hooked, known = results.of(family, "stock"), results.of(family, "hooked"), facts(family)
    every_layer_is_hooked(hooked, known)
    free, *held, lifted = hooked["phases"]
    assert free["tokens"] == stock["phases"][0]["tokens"]
    assert free["logprobs"] == stock["phases"][0]["logprobs"], "Unlimited is not bit-identical to stock vLLM"
    assert (lifted["tokens"], lifted["logprobs"]) == (free["tokens"], free["logprobs"])
    assert all(phase["logprobs"] != free["logprobs"] for phase in held)
    for phase in hooked["phases"]:
        assert phase["acks"][0]["error"] is None
        counted_exactly(phase, known.top_k)
    for knobs, phase in zip(KNOBS, hooked["phases"], strict=True):
        held_to_capacity(phase, knobs, known.experts)


@every_family
def test_two_expert_parallel_ranks_are_one(family: str, results: Results) -> None:
    from moe_serving.tiny import facts

    one, two, known = results.of(family, "hooked"), results.of(family, "two"), facts(family)
    every_layer_is_hooked(two, known)
    free, *held, lifted = two["phases"]
    if family in DTYPE:
        first, other = (found["phases"][0]["records"][0][0] for found in (one, two))
        assert torch.allclose(first["logits"], other["logits"], atol=COARSE_ROUTER, rtol=0)
        assert quantile(distances(one["phases"][0], free), 0.9) < COARSE
    else:
        assert one["phases"][0]["tokens"] == free["tokens"]
        assert max(distances(one["phases"][0], free)) < ROUNDING
    assert (lifted["tokens"], lifted["logprobs"]) == (free["tokens"], free["logprobs"])
    assert all(phase["logprobs"] != free["logprobs"] for phase in held)
    for number, (knobs, phase) in enumerate(zip(KNOBS, two["phases"], strict=True), 1):
        assert [(ack["rank"], ack["version"], ack["error"]) for ack in phase["acks"]] == [
            (rank, number, None) for rank in range(RANKS)
        ]
        ranks_did_not_drift(phase)
        counted_exactly(phase, known.top_k)
        held_to_capacity(phase, knobs, known.experts)


@every_family
def test_recorded_batches_are_decided_alike_by_one_rank_and_by_two(family: str, results: Results, sharing: Any) -> None:
    """Batches of a run on one rank under every policy and several γ; and what the engine made of its batches, on one
    rank or on two, is what one rank makes of them here."""
    from moe_serving.tiny import facts
    from tests.serving.two_ranks import Batch, Shape, play_alone

    known = facts(family)
    shapes = [Shape.of_rule(known.experts, known.top_k, rule) for rule in results.routings(family)]
    for run in ("hooked", "two"):
        phases = results.of(family, run)["phases"]
        for knobs, phase in zip(KNOBS, phases, strict=True):
            records = phase["records"][0]
            one = play_alone(shapes, [Batch.of_record(record) for record in records], ExpertKnobs.model_validate(knobs))
            for record, (weights, ids, _) in zip(records, one.out, strict=True):
                assert torch.equal(record["out_ids"], torch.from_numpy(ids))
                assert torch.equal(record["out_weights"], torch.from_numpy(weights))
    batches = [Batch.of_record(record) for record in results.of(family, "hooked")["phases"][0]["records"][0]]
    for overflow in (Overflow.REROUTE, Overflow.DROP, Overflow.EXPERT_CHOICE):
        for gamma in map(Decimal, GAMMAS):
            capped = ExpertKnobs(overflow=overflow, capacity_factor_prefill=gamma, capacity_factor_decode=gamma)
            sharing.agree_with_one(shapes, batches, capped)


@pytest.mark.skipif(not WITH_RAY, reason="ray is not installed")
@every_family
def test_a_family_behind_moeserver(family: str, results: Results) -> None:
    """Its OpenAI application generates on two ranks; load reaches the board; signed knobs reach every rank."""
    from moe_serving.tiny import facts

    one, served, known = results.of(family, "hooked"), results.of(family, "served"), facts(family)
    assert [model["id"] for model in served["models"]["data"]] == ["family"]
    assert served["chat"].rstrip().endswith("data: [DONE]")
    for knobs, phase in zip(KNOBS, served["phases"], strict=False):
        answer, digest = phase["answer"], phase["digest"]
        phase["tokens"] = [choice["token_ids"] for choice in answer["choices"]]
        phase["prompt_tokens"] = one["phases"][0]["prompt_tokens"]
        assert answer["usage"]["prompt_tokens"] == sum(phase["prompt_tokens"])
        assert phase["acks"]["complete"]
        assert [ack["rank"] for ack in phase["acks"]["acks"]] == list(range(RANKS))
        assert (digest["ranks"], len(digest["layers"])) == (RANKS, known.moe_layers)
        assert all(layer["hooked"] for layer in digest["layers"])
        counted_exactly(phase, known.top_k)
        ranks_did_not_drift(phase)
        held_to_capacity(phase, knobs, known.experts)
        for layer, of_board in zip(phase["after"][0]["layers"], phase["matrix"]["layers"], strict=True):
            assert sum(of_board["rankDemand"]) == layer["tokens"] * known.top_k
            assert sum(of_board["rankAssigned"]) == layer["tokens"] * known.top_k - layer["dropped"]
    free, capped = served["phases"]
    if family not in DTYPE:
        assert free["tokens"] == one["phases"][0]["tokens"]
    assert sum(layer["reroutedTotal"] for layer in free["digest"]["layers"]) == 0
    assert sum(layer["reroutedTotal"] for layer in capped["digest"]["layers"]) > 0


@pytest.fixture(scope="module")
def sharing() -> Iterator[Any]:
    from tests.serving.two_ranks import TwoRanks

    two = TwoRanks()
    yield two
    two.close()


def every_layer_is_hooked(found: Found, known: Any) -> None:
    for rank in found["layers"]:
        assert [(layer["hooked"], layer["why"]) for layer in rank] == [(True, "")] * known.moe_layers
        assert all((layer["experts"], layer["top_k"]) == (known.experts, known.top_k) for layer in rank)


def distances(one: Found, two: Found) -> list[float]:
    """Of each position, in a prompt or in the text while it is the same, how far its log probabilities lie apart."""
    found = []
    for request, (ours, theirs) in enumerate(zip(one["logprobs"], two["logprobs"], strict=True)):
        texts = zip(one["tokens"][request], two["tokens"][request], strict=True)
        same = next((number for number, (a, b) in enumerate(texts) if a != b), len(one["tokens"][request]) - 1)
        positions = one["prompt_tokens"][request] - 1 + same + 1
        for a, b in zip(ours[:positions], theirs[:positions], strict=True):
            both = a.keys() & b.keys()
            found.append(max(abs(float.fromhex(a[token]) - float.fromhex(b[token])) for token in both))
    return found


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def ranks_did_not_drift(phase: Found) -> None:
    """All ranks hold the same knobs, counted the same steps and slots, and decided every batch alike."""
    first, *others = phase["after"]
    for other in others:
        for what in ("version", "knobs", "steps", "prompt_tokens", "generated_tokens"):
            assert first[what] == other[what], what
        for ours, theirs in zip(first["layers"], other["layers"], strict=True):
            assert {**ours, "mine": None} == {**theirs, "mine": None}
    for records in phase["records"][1:]:
        assert len(records) == len(phase["records"][0]) > 0
        for a, b in zip(phase["records"][0], records, strict=True):
            assert (a["step"], a["layer"]) == (b["step"], b["layer"])
            assert all(torch.equal(a[what], b[what]) for what in ("logits", "out_ids", "out_weights"))


def counted_exactly(phase: Found, top_k: int) -> None:
    """Each request runs its prompt once, and each of its tokens but the last once more; each slot lies on one rank."""
    routed = sum(phase["prompt_tokens"]) + sum(len(tokens) - 1 for tokens in phase["tokens"])
    assert len(phase["tokens"]) == len(PROMPTS)
    for number in range(len(phase["after"][0]["layers"])):
        befores = [rank["layers"][number] for rank in phase["before"]]
        afters = [rank["layers"][number] for rank in phase["after"]]
        before, after = befores[0], afters[0]
        assert after["tokens"] - before["tokens"] == routed
        lost = after["dropped"] - before["dropped"]
        places = [range(len(a["demand"])) if a["mine"] is None else a["mine"] for a in afters]
        assert sorted(expert for place in places for expert in place) == list(range(len(after["demand"])))
        for what, slots in (("demand", routed * top_k), ("assigned", routed * top_k - lost)):
            by_rank = [
                sum(a[what][expert] - b[what][expert] for expert in place)
                for a, b, place in zip(afters, befores, places, strict=True)
            ]
            assert sum(by_rank) == slots


def held_to_capacity(phase: Found, knobs: dict[str, str], experts: int) -> None:
    """No expert takes more slots of a step than C of all tokens that are routed together, on whichever rank it lies,
    but for those that a group limit forces."""
    gammas = {PREFILL: knobs.get("capacityFactorPrefill"), DECODE: knobs.get("capacityFactorDecode")}
    bound = forced = 0
    for record in phase["records"][0]:
        for which, gamma in gammas.items():
            rows = record["phase"] == which
            if gamma is None:
                assert torch.equal(record["ids"][rows], record["out_ids"][rows])
                continue
            demand, load = (
                torch.bincount(record[ids][rows][record[ids][rows] >= 0].long(), minlength=experts)
                for ids in ("ids", "out_ids")
            )
            limit = capacity(Decimal(gamma), record["ids"][rows].numel(), experts)
            bound += int(demand.max()) > limit
            forced += int((load - limit).clamp(min=0).sum())
    assert bound > 0 or set(gammas.values()) == {None}, "capacity never bound: the test shows nothing"
    kept = [
        after["overflow_kept"] - before["overflow_kept"]
        for before, after in zip(phase["before"][0]["layers"], phase["after"][0]["layers"], strict=True)
    ]
    assert forced <= sum(kept)
