"""Data-parallel attention with expert parallelism inside the real vLLM on a CPU: two ranks, each with its own requests.

Text and routing are those of the model's reference implementation; load is counted exactly while the other rank is
idle; one rank is capped while the other is not. `docs/parallel.md` says what is meant.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moe_core.capacity import capacity
from tests.engine.offline_dp import RANKS
from tests.engine.stack import environment

pytestmark = [pytest.mark.engine, pytest.mark.full]

torch = pytest.importorskip("torch")

EXPERTS, TOP_K, LAYERS = 16, 4, 4
SHAPE = {"hidden_size": 128, "moe_intermediate_size": 256, "num_hidden_layers": LAYERS}
PLAIN = {"overflow": "Unlimited"}
CAPPED = {"overflow": "Reroute", "capacityFactorPrefill": "1"}
PROMPTS = [
    [f"{i}. Say what {i * 37 % 101} times {i % 7} is{' now' * (i % 5)}." for i in range(r, 12, 2)] for r in (0, 1)
]
PHASES = [
    {"knobs": [PLAIN, PLAIN], "prompts": PROMPTS, "max_tokens": [6, 6]},
    {"knobs": [CAPPED, PLAIN], "prompts": PROMPTS, "max_tokens": [6, 6]},
    # The second rank is soon without work: it runs batches that are nobody's while the first goes on.
    {"knobs": [PLAIN, PLAIN], "prompts": [PROMPTS[0], PROMPTS[1][:1]], "max_tokens": [24, 2]},
]
Run = dict[str, Any]


def checkpoint() -> Path:
    """A router that likes experts of the first rank."""
    from moe_serving.tiny import Skew, cached_checkpoint

    return cached_checkpoint("qwen3_moe", skew=Skew((0, 1, 2), 3.0), **SHAPE)


def run_ranks(folder: Path, **more: Any) -> tuple[list[subprocess.CompletedProcess[str]], Path]:
    """Both ranks to their end; their output, and where their results lie."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job, out = folder / "job.json", folder / "out"
    asked = {"checkpoint": str(checkpoint()), "phases": PHASES, "port": port, "out": str(out), "eager": True, **more}
    job.write_text(json.dumps(asked))
    command = [sys.executable, str(Path(__file__).with_name("offline_dp.py")), str(job)]
    started = [
        subprocess.Popen(
            [*command, str(rank)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    done = []
    try:
        for rank in started:
            text, errors = rank.communicate(timeout=420)
            done.append(subprocess.CompletedProcess(rank.args, rank.returncode, text, errors))
    finally:
        for rank in started:
            rank.kill()
    return done, out


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    done, out = run_ranks(tmp_path_factory.mktemp("dp"))
    assert [one.returncode for one in done] == [0] * RANKS, "\n".join(one.stderr[-4000:] for one in done)
    found = []
    for rank in range(RANKS):
        run: Run = json.loads(Path(f"{out}.rank{rank}").read_text())
        for number, phase in enumerate(run["phases"]):
            phase["records"] = torch.load(f"{out}.phase{number}.data{rank}.rank0.pt")
        found.append(run)
    return found


@pytest.fixture(scope="module")
def reference() -> Any:
    """The model's own implementation in transformers: next tokens, and router logits [L, T, E], of a text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)
    seen: list[Any] = []

    def note(gate: Any, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].reshape(-1, arguments[0].shape[-1]) @ gate.weight.T)

    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    assert len(gates) == LAYERS
    for gate in gates:
        gate.register_forward_pre_hook(note)

    def run(tokens: list[int]) -> tuple[list[int], Any]:
        seen.clear()
        with torch.no_grad():
            following = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        return following, torch.stack(seen)

    return run


def test_both_ranks_compute_what_the_reference_implementation_does(ranks: list[Run], reference: Any) -> None:
    """Text, and what each router saw: the second layer's input has passed experts of both ranks in the first."""
    for run in ranks:
        phase = run["phases"][0]
        wanted = []
        for prompt, tokens in zip(phase["prompts"], phase["tokens"], strict=True):
            following, logits = reference([*prompt, *tokens[:-1]])
            assert following[len(prompt) - 1 :] == tokens
            wanted.append(logits)
        for layer in range(LAYERS):
            rows = torch.cat([logits[layer] for logits in wanted])
            seen = torch.cat([record["logits"] for record in phase["records"] if record["layer"] == layer])
            assert rows.shape == seen.shape
            apart = torch.cdist(rows, seen, compute_mode="donot_use_mm_for_euclid_dist")
            assert float(apart.min(1).values.max()) < 1e-3 * float(rows.norm(dim=1).mean())
            assert float(apart.min(0).values.max()) < 1e-3 * float(rows.norm(dim=1).mean())


def test_every_layer_is_hooked_and_ranks_hold_halves(ranks: list[Run]) -> None:
    for rank, run in enumerate(ranks):
        assert [(layer["hooked"], layer["why"]) for layer in run["layers"]] == [(True, "")] * LAYERS
        layer = run["phases"][0]["after"]["layers"][0]
        halves = [list(range(8)), list(range(8, 16))]
        assert (layer["places"], layer["mine"], layer["split"]) == (halves, halves[rank], False)


@pytest.mark.parametrize("phase", range(len(PHASES)))
def test_each_rank_counts_its_own_tokens_and_nobody_elses(ranks: list[Run], phase: int) -> None:
    for run in ranks:
        data = run["phases"][phase]
        # Each request runs its prompt once, and each token but the last once more.
        routed = sum(map(len, data["prompts"])) + sum(len(tokens) - 1 for tokens in data["tokens"])
        for before, after in zip(data["before"]["layers"], data["after"]["layers"], strict=True):
            assert after["tokens"] - before["tokens"] == routed
            assert sum(after["demand"]) - sum(before["demand"]) == routed * TOP_K


def test_a_rank_without_work_steps_along_and_counts_nothing(ranks: list[Run]) -> None:
    busy, idle = (run["phases"][2] for run in ranks)
    steps = [phase["after"]["steps"] - phase["before"]["steps"] for phase in (busy, idle)]
    assert steps[0] >= 24
    assert steps[1] <= 4
    assert len(idle["tokens"][0]) == 2


def test_capacity_holds_over_the_tokens_of_a_rank_and_leaves_its_peer_alone(ranks: list[Run]) -> None:
    capped, free = (run["phases"][1] for run in ranks)
    assert (capped["ack"]["error"], free["ack"]["error"]) == (None, None)
    bound = 0
    for record in capped["records"]:
        prefill = record["out_ids"][record["phase"] == 1]
        if not len(prefill):
            continue
        load = torch.bincount(prefill[prefill >= 0].flatten().long(), minlength=EXPERTS)
        limit = capacity(Decimal(1), len(prefill) * TOP_K, EXPERTS)
        assert int(load.max()) <= limit
        before = torch.bincount(record["ids"][record["phase"] == 1].flatten().long(), minlength=EXPERTS)
        bound += int(before.max()) > limit
    assert bound, "capacity never bound"
    assert free["tokens"] == ranks[1]["phases"][0]["tokens"], "a peer's knobs change nobody else's text"
    assert all(torch.equal(record["ids"], record["out_ids"]) for record in free["records"])


def test_a_stock_vllm_lacks_the_collectives_on_a_cpu(tmp_path: Path) -> None:
    """Why `moe_serving.mends.lend_gatherv` is there; should this fail, this vLLM may not need it any more."""
    done, _ = run_ranks(tmp_path, stock=True)
    assert all(one.returncode != 0 for one in done)
    said = [one.stdout + one.stderr for one in done]  # vLLM logs to the first, Python's own end goes to the second
    assert any("NotImplementedError" in text and "all_gatherv" in text for text in said), said[0][-4000:]
