"""The plugin in the real engine on a device, in a process of its own: `python offline_gpu.py JOB.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job_path: Path) -> None:
    job: dict[str, Any] = json.loads(job_path.read_text())
    os.environ.update(
        {
            "MOESTACK_PLUGIN": job["plugin"],
            "MOESTACK_GPU": job["gpu"],
            "VLLM_USE_V2_MODEL_RUNNER": job["second_runner"],
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
    )
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter

    llm = LLM(
        job["checkpoint"],
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        seed=0,
    )
    hooked = job["plugin"] == "1"
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3, prompt_logprobs=0)
    result: dict[str, Any] = {"captured": [compilation_counter.num_cudagraph_captured], "phases": []}
    result["layers"] = llm.collective_rpc("moestack_start")[0] if hooked else []
    for number, knobs in enumerate(job["phases"]):
        phase: dict[str, Any] = {}
        if hooked:
            phase["error"] = llm.collective_rpc("moestack_apply", args=(json.dumps(knobs), number + 1))[0]["error"]
            phase["before"] = llm.collective_rpc("moestack_read", args=(True,))[0]
        outputs = llm.generate(job["prompts"], sampling, use_tqdm=False)
        if hooked:
            phase["after"] = llm.collective_rpc("moestack_read", args=(True,))[0]
        phase["prompt_tokens"] = [len(output.prompt_token_ids) for output in outputs]
        phase["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
        phase["logprobs"] = [
            [{str(token): entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
            for output in outputs
        ]
        result["phases"].append(phase)
        result["captured"].append(compilation_counter.num_cudagraph_captured)
    Path(job["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
