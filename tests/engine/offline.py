"""Runs the real engine without a server, in a process of its own, and saves what it did: `python offline.py JOB.json`.

A job names a checkpoint, the number of ranks, prompts and phases; a phase sets knobs, generates, and keeps the text,
the counters and the recorded routing. One rank then plays offline_tiers as well.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import offline_tiers


def main(job_path: Path) -> None:
    job: dict[str, Any] = json.loads(job_path.read_text())
    ranks = job["ranks"]
    os.environ.update(
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(rank) for rank in range(ranks)) if ranks > 1 else "0-1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_RPC_BASE_PATH": str(job_path.parent),  # its sockets go where the test's files are
            # One rank runs in this process, so that a test can act between two steps.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if ranks > 1 else "0",
        }
    )
    from vllm import LLM, SamplingParams

    from moe_core.wire import ExpertKnobs

    started = time.monotonic()
    llm = LLM(
        job["checkpoint"],
        dtype="float32",
        tensor_parallel_size=ranks,
        enable_expert_parallel=ranks > 1,
        enable_prefix_caching=ranks == 1,  # the prompts of phases are shorter than a block
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        enforce_eager=False,
    )
    result: dict[str, Any] = {"up_s": time.monotonic() - started, "phases": []}
    result["layers"] = llm.collective_rpc("moestack_start")
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    for number, phase in enumerate(job["phases"]):
        knobs = ExpertKnobs.model_validate(phase["knobs"])
        acks = llm.collective_rpc("moestack_apply", args=(knobs.model_dump_json(by_alias=True), number + 1))
        before = llm.collective_rpc("moestack_read", args=(True,))
        llm.collective_rpc("moestack_record", args=(100_000,))
        outputs = llm.generate(job["prompts"], sampling, use_tqdm=False)
        llm.collective_rpc("moestack_record", args=(0, f"{job['out']}.phase{number}"))
        result["phases"].append(
            {
                "acks": acks,
                "before": before,
                "after": llm.collective_rpc("moestack_read", args=(True,)),
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
            }
        )
    if ranks == 1:
        result["tiers"] = offline_tiers.play(llm, len(job["phases"]) + 1, f"{job['out']}.tiers")
    Path(job["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
