"""Throughput of the real engine under a skewed router, and what expert capacity wins back.

    python -m benchmarks.skew [--only biased|trained] [--rounds 3]

Two expert-parallel ranks, one core each, on checkpoints whose expert GEMMs are most of a step; prompts are prefilled
and one token is generated.

- biased: random weights, once with an even router, once with the experts of the first rank pushed, so that it takes
  about four slots of five.
- trained: the small model of `benchmarks.trained_moe` with the skew that it learned, once with its experts placed so
  that ranks are loaded alike, once with its favourites as neighbours on the first rank. The engine also scores the
  prompts, held-out text, in each setting: `perplexity`, and its change from no capacity in `ppl_delta`.

Each engine runs every setting once a round, in turn; figures are medians over rounds. `bound` is
1/(1 − g + g·L_after/L_before), g the share of a step that the busier rank spends in its experts and L the slots of the
busier rank, all as the ranks counted them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

from moe_core.wire import ExpertKnobs, Overflow

ROOT = Path(__file__).parents[1]
RANKS, EXPERTS, TOP_K, LAYERS = 2, 16, 4, 4
SHAPE = {
    "hidden_size": 1024,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 2048,
}
BATCHED = 2048
STRENGTH = 10.0
"""Logits by which the first rank's experts are pushed, found by trying: 7 gives 2.8:1 in slots, 14 gives 5.6:1."""
PROMPTS, TOKENS = 16, 512
TRAINED_PROMPTS = 32
SETTINGS: dict[str, ExpertKnobs] = {
    "unlimited": ExpertKnobs(overflow=Overflow.UNLIMITED),
    "reroute 1.5": ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal("1.5")),
    "reroute 1.25": ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal("1.25")),
    "reroute 1": ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal("1")),
    "drop 1.25": ExpertKnobs(overflow=Overflow.DROP, capacity_factor_prefill=Decimal("1.25")),
}


def run_engine(job: dict[str, Any]) -> dict[str, Any]:
    """One engine, all settings in turn for some rounds: seconds, slots by rank and time in experts of each."""
    os.environ.update(
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(RANKS))),
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_RPC_BASE_PATH": job["folder"],
        }
    )
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["checkpoint"],
        dtype="bfloat16",
        tensor_parallel_size=RANKS,
        enable_expert_parallel=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=BATCHED,
        enforce_eager=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    llm.generate(prompts, sampling, use_tqdm=False)  # warm
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in job["settings"]}
    version = 0
    for number in range(job["rounds"]):
        for name in job["settings"]:
            version += 1
            knobs = SETTINGS[name].model_dump_json(by_alias=True)
            for ack in llm.collective_rpc("moestack_apply", args=(knobs, version)):
                if ack["error"]:
                    raise RuntimeError(f"{name}: {ack['error']}")
            before = llm.collective_rpc("moestack_read", args=(True,))
            started = time.monotonic()
            llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.monotonic() - started
            after = llm.collective_rpc("moestack_read", args=(True,))
            seen[name].append({"seconds": seconds, **since(before, after)})
            if job["score"] and number == 0:
                seen[name][0]["perplexity"] = perplexity(llm, prompts)
            print(f"{job['name']}, round {number + 1}, {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
    return {"seen": seen, "prompt_tokens": sum(len(ids) for ids in job["prompts"])}


def perplexity(llm: Any, prompts: list[dict[str, Any]]) -> float:
    """exp of the mean negative log-likelihood that the engine gives each prompt's tokens, the first of each apart."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    nats = [
        -scores[token].logprob
        for output in llm.generate(prompts, asked, use_tqdm=False)
        for token, scores in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(statistics.fmean(nats))


def since(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks counted between two readings: slots that each held, those dropped and rerouted, busy seconds."""
    layers = range(len(after[0]["layers"]))
    mine = [[set(layer["mine"]) for layer in rank["layers"]] for rank in after]
    first_before, first_after = before[0]["layers"], after[0]["layers"]

    def slots(kind: str, rank: int) -> int:
        return sum(
            a - b
            for i in layers
            for e, (a, b) in enumerate(zip(first_after[i][kind], first_before[i][kind], strict=True))
            if e in mine[rank][i]
        )

    return {
        "demand": [slots("demand", rank) for rank in range(len(after))],
        "assigned": [slots("assigned", rank) for rank in range(len(after))],
        "dropped": sum(int(a["dropped"]) - int(b["dropped"]) for a, b in zip(first_after, first_before, strict=True)),
        "rerouted": sum(
            int(a["rerouted"]) - int(b["rerouted"]) for a, b in zip(first_after, first_before, strict=True)
        ),
        "moe_s": [a["moe_s"] - b["moe_s"] for a, b in zip(after, before, strict=True)],
    }


def summary(seen: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians over rounds; slots are the same in each."""
    seconds = statistics.median(row["seconds"] for row in seen)
    last = seen[-1]
    asked = sum(last["demand"])
    scored = {"perplexity": round(seen[0]["perplexity"], 3)} if "perplexity" in seen[0] else {}
    return {
        **scored,
        "tokens_per_s": round(tokens / seconds, 1),
        "seconds": [round(row["seconds"], 2) for row in seen],
        "demand_by_rank": last["demand"],
        "slots_by_rank": last["assigned"],
        "dropped_share": round(last["dropped"] / asked, 4),
        "rerouted_share": round(last["rerouted"] / asked, 4),
        "experts_share_of_step": round(statistics.median(max(row["moe_s"]) / row["seconds"] for row in seen), 3),
    }


def verdict(even: dict[str, Any], skewed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fall under skew, and for each setting its speed-up, the bound and the share of the fall that came back."""
    base = skewed["unlimited"]
    fall = 1 - base["tokens_per_s"] / even["tokens_per_s"]
    won = {}
    for name, row in skewed.items():
        if name == "unlimited":
            continue
        speedup = row["tokens_per_s"] / base["tokens_per_s"]
        share = base["experts_share_of_step"]
        bound = 1 / (1 - share + share * max(row["slots_by_rank"]) / max(base["slots_by_rank"]))
        won[name] = {
            "speedup": round(speedup, 3),
            "bound": round(bound, 3),
            "over_bound": round(speedup / bound, 3),
            "of_even": round(row["tokens_per_s"] / even["tokens_per_s"], 3),
        }
        if "perplexity" in row:
            won[name]["ppl_delta"] = round(row["perplexity"] / base["perplexity"] - 1, 5)
    return {"fall": round(fall, 3), "won_back": won}


def measure(
    name: str, checkpoint: Path, settings: list[str], prompts: list[list[int]], rounds: int, *, score: bool = False
) -> dict[str, Any]:
    """An engine in a process of its own, so that two runs share nothing."""
    with tempfile.TemporaryDirectory(prefix="moe-skew-") as folder:
        job = {
            "name": name,
            "checkpoint": str(checkpoint),
            "settings": settings,
            "rounds": rounds,
            "prompts": prompts,
            "score": score,
            "folder": folder,
        }
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[1:])}
        command = [sys.executable, "-m", "benchmarks.skew", "--engine", str(path)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr)
        result = json.loads((Path(folder) / "result.json").read_text())
    return {key: summary(rows, result["prompt_tokens"]) for key, rows in result["seen"].items()}


def biased(rounds: int) -> dict[str, Any]:
    """Random weights: an even router against one that is pushed towards the first rank."""
    from moe_serving.tiny import Skew, cached_checkpoint

    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(TOKENS)] for _ in range(PROMPTS)]
    hot = tuple(range(EXPERTS // RANKS))  # the first rank's, as vLLM places them
    even = measure("even", cached_checkpoint("qwen3_moe", skew=None, **SHAPE), ["unlimited"], prompts, rounds)
    pushed = cached_checkpoint("qwen3_moe", skew=Skew(hot, STRENGTH), **SHAPE)
    skewed = measure("biased", pushed, list(SETTINGS), prompts, rounds)
    return {**verdict(even["unlimited"], skewed), "even": even["unlimited"], "skewed": skewed, "shape": SHAPE}


def trained(rounds: int) -> dict[str, Any]:
    """The trained model: its favourites shared out over ranks against all of them on the first."""
    from benchmarks import skew_trained

    with tempfile.TemporaryDirectory(prefix="moe-skew-trained-") as folder:
        shared_out, together, text = skew_trained.checkpoints(Path(folder), RANKS)
        text = text[:TRAINED_PROMPTS]
        even = measure("balanced", shared_out, ["unlimited"], text, rounds, score=True)
        skewed = measure("trained", together, list(SETTINGS), text, rounds, score=True)
    return {**verdict(even["unlimited"], skewed), "even": even["unlimited"], "skewed": skewed}


def main() -> None:
    """Run the engines; the last line of stdout is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["biased", "trained"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine is not None:
        job = json.loads(options.engine.read_text())
        (options.engine.parent / "result.json").write_text(json.dumps(run_engine(job)))
        return
    parts = {"biased": biased, "trained": trained}
    result = {name: part(options.rounds) for name, part in parts.items() if options.only in (None, name)}
    print(json.dumps({**result, "ranks": RANKS, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
