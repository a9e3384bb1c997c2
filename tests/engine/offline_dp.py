"""One rank of data-parallel attention on the real engine, in its own process: `python offline_dp.py JOB.json RANK`.

A job names a checkpoint and phases; a phase has knobs and prompts for each rank. Ranks step together, as in a server,
and between phases they wait for one another. A job with `stock` runs vLLM without the plugin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

RANKS = 2
PATIENCE_S = 240.0


def main(job_path: Path, rank: int) -> None:
    job: dict[str, Any] = json.loads(job_path.read_text())
    os.environ.update(
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(RANKS)),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_RPC_BASE_PATH": str(job_path.parent),
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_RANK_LOCAL": str(rank),
            "VLLM_DP_SIZE": str(RANKS),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(job["port"]),
            "MOESTACK_PLUGIN": "0" if job.get("stock") else "1",
        }
    )
    from vllm import LLM

    started = time.monotonic()
    llm = LLM(
        job["checkpoint"],
        dtype="float32",
        enable_expert_parallel=True,
        enable_prefix_caching=False,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        enforce_eager=job["eager"],
    )
    result: dict[str, Any] = {"up_s": time.monotonic() - started}
    result["phases"] = [play(llm, job, number, rank) for number in range(len(job["phases"]))]
    if not job.get("stock"):
        result["layers"] = llm.collective_rpc("moestack_start")[0]
    Path(f"{job['out']}.rank{rank}").write_text(json.dumps(result))
    meet(job, "end", rank)


def play(llm: Any, job: dict[str, Any], number: int, rank: int) -> dict[str, Any]:
    """One phase on one rank: what it answered and counted."""
    from vllm import SamplingParams

    from moe_core.wire import ExpertKnobs

    phase = job["phases"][number]
    sampling = SamplingParams(temperature=0, max_tokens=phase["max_tokens"][rank], ignore_eos=True)
    if job.get("stock"):
        llm.generate(phase["prompts"][rank], sampling, use_tqdm=False)
        return {}
    knobs = ExpertKnobs.model_validate(phase["knobs"][rank])
    (ack,) = llm.collective_rpc("moestack_apply", args=(knobs.model_dump_json(by_alias=True), number + 1))
    (before,) = llm.collective_rpc("moestack_read", args=(True,))
    llm.collective_rpc("moestack_record", args=(100_000,))
    meet(job, f"phase{number}", rank)
    outputs = llm.generate(phase["prompts"][rank], sampling, use_tqdm=False)
    meet(job, f"phase{number}.done", rank)
    llm.collective_rpc("moestack_record", args=(0, f"{job['out']}.phase{number}.data{rank}"))
    (after,) = llm.collective_rpc("moestack_read", args=(True,))
    return {
        "ack": ack,
        "before": before,
        "after": after,
        "prompts": [list(output.prompt_token_ids) for output in outputs],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


def meet(job: dict[str, Any], where: str, rank: int) -> None:
    """Wait until every rank is here."""
    marks = [Path(f"{job['out']}.{where}.{one}") for one in range(RANKS)]
    marks[rank].touch()
    deadline = time.monotonic() + PATIENCE_S
    while not all(mark.exists() for mark in marks):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the other rank did not come to {where}")
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
