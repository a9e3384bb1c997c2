"""Runs engines whose router breaks while they serve: `python faulty.py JOB.json`.

A job names runs; each is a forked process, so that vLLM is imported once. All prompts wait before the first step, so
runs of one checkpoint form the same batches.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPTS = [[20], [30, 31, 32], [*range(40, 60)], [*range(60, 100)]]
"""Token ids: one token, few, and enough that capacity binds."""
MAX_TOKENS = 5


BROKEN_LAYER = 1


def _every_third(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def broken(logits: torch.Tensor) -> torch.Tensor:
        changed = logits.clone()
        changed[::3] = value
        return changed

    return broken


def _one_expert(value: float, others: float | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    def broken(logits: torch.Tensor) -> torch.Tensor:
        changed = logits.clone() if others is None else torch.full_like(logits, others)
        changed[:, min(1, logits.shape[1] - 1)] = value
        return changed

    return broken


def _both_signs(logits: torch.Tensor) -> torch.Tensor:
    changed = logits.clone()
    changed[::2, ::2], changed[1::2, 1::2] = torch.inf, -torch.inf
    return changed


# The last phases find what NaN left in the KV cache: stock vLLM on a CPU reads it again.
FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sound": lambda logits: logits,
    "all alike": torch.zeros_like,
    "NaN for some tokens": _every_third(torch.nan),
    "NaN for one expert": _one_expert(torch.nan),
    "Inf for one expert": _one_expert(torch.inf),
    "-Inf for all but one expert": _one_expert(1.0, -torch.inf),
    "Inf of both signs": _both_signs,
    "NaN everywhere": lambda logits: torch.full_like(logits, torch.nan),
}


def main(job_path: Path) -> None:
    job: dict[str, Any] = json.loads(job_path.read_text())
    os.environ.update(
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",
            "VLLM_RPC_BASE_PATH": str(job_path.parent),
        }
    )
    import vllm.v1.engine.llm_engine  # imported once, before the forks
    import vllm.v1.worker.cpu_worker  # noqa: F401

    context = multiprocessing.get_context("fork")
    result: dict[str, Any] = {}
    for run in job["runs"]:
        path = Path(f"{job['out']}.{run['name']}")
        child = context.Process(target=in_process, args=(run, path))
        child.start()
        child.join()
        found = json.loads(path.read_text()) if path.is_file() else {"error": f"exit code {child.exitcode}"}
        result[run["name"]] = found
    Path(job["out"]).write_text(json.dumps(result))


def in_process(run: dict[str, Any], path: Path) -> None:
    """One engine; what it did, or the error that it ended with, goes to `path`."""
    ranks = run["ranks"]
    os.environ["MOESTACK_PLUGIN"] = str(int(run["plugin"]))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(ranks))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(ranks > 1))
    try:
        found = serve(run, path)
    except BaseException as error:  # whatever ends an engine is the result here
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    path.write_text(json.dumps(found))


def serve(run: dict[str, Any], path: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    started = time.monotonic()
    llm = LLM(
        run["checkpoint"],
        dtype="float32",
        tensor_parallel_size=run["ranks"],
        enable_expert_parallel=run["ranks"] > 1,
        enable_prefix_caching=False,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        enforce_eager=True,
        worker_extension_cls="faulty_worker.FaultyWorker",
    )
    found: dict[str, Any] = {"up_s": time.monotonic() - started, "phases": []}
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=3)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
    version = 0
    for fault in run["faults"]:
        for knobs in run["knobs"]:
            version += 1
            phase: dict[str, Any] = {"fault": fault, "knobs": knobs}
            assert set(llm.collective_rpc("break_router", args=(fault,))) == {1}
            if run["plugin"]:
                phase["acks"] = llm.collective_rpc("moestack_apply", args=(json.dumps(knobs), version))
                phase["before"] = llm.collective_rpc("moestack_read", args=(True,))
                llm.collective_rpc("moestack_record", args=(100_000,))
                # What a rank without work computes beside the others, in data parallel.
                llm.collective_rpc("execute_dummy_batch")
                phase["idle"] = llm.collective_rpc("moestack_read", args=(True,))
            assert llm.generate([], sampling, use_tqdm=False) == []
            outputs = [
                *llm.generate(prompts, sampling, use_tqdm=False),
                *llm.generate(prompts[:1], sampling, use_tqdm=False),  # every step of it is one token
            ]
            phase["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
            phase["logprobs"] = [
                [sorted((token, value.logprob.hex()) for token, value in row.items()) for row in text.logprobs]
                for text in (output.outputs[0] for output in outputs)
            ]
            if run["plugin"]:
                phase["after"] = llm.collective_rpc("moestack_read", args=(True,))
                phase["records"] = f"{path}.phase{version}"
                llm.collective_rpc("moestack_record", args=(0, phase["records"]))
            found["phases"].append(phase)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
