"""Runs one model family on vLLM after another, each twice: stock and with the plugin. `python families.py JOB.json`.

Each run is a forked process, so that vLLM is imported once, and its engine runs inside that process: all prompts wait
before the first step, so both runs form the same batches.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PROMPTS = [f"{i}. Say what {i * 37 % 101} times {i % 7} is, and why it is{' very' * (i % 5)} so." for i in range(12)]
MAX_TOKENS = 8
DTYPE = {"qwen3_next": "bfloat16"}
"""Others run in float32; its attention has no other kernel on a CPU."""
KNOBS = (
    {"overflow": "Unlimited"},
    {"overflow": "Reroute", "capacityFactorPrefill": "1.25"},
    {"overflow": "Unlimited"},
)


def main(job_path: Path) -> None:
    job: dict[str, Any] = json.loads(job_path.read_text())
    os.environ.update(
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    )
    import vllm.v1.engine.llm_engine  # imported once, before the forks
    import vllm.v1.worker.cpu_worker  # noqa: F401

    context = multiprocessing.get_context("fork")
    result: dict[str, Any] = {}
    for family, checkpoint in job["families"].items():
        for plugin in (False, True):
            path = Path(f"{job['out']}.{family}.{int(plugin)}")
            source = checkpoint if plugin else job["stock"].get(family, checkpoint)
            child = context.Process(target=run, args=(source, DTYPE.get(family, "float32"), plugin, path))
            child.start()
            child.join()
            found = json.loads(path.read_text()) if path.is_file() else {"error": f"exit code {child.exitcode}"}
            result.setdefault(family, {})["hooked" if plugin else "stock"] = found
            if "error" in found:
                break
    Path(job["out"]).write_text(json.dumps(result))


def run(checkpoint: str, dtype: str, plugin: bool, path: Path) -> None:
    """One engine; what it did, or the error that it ended with, goes to `path`."""
    os.environ["MOESTACK_PLUGIN"] = str(int(plugin))
    try:
        found = generate(checkpoint, dtype, plugin, path)
    except BaseException as error:  # whatever ends an engine is the result here
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    path.write_text(json.dumps(found))


def generate(checkpoint: str, dtype: str, plugin: bool, path: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    llm = LLM(
        checkpoint,
        dtype=dtype,
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        enforce_eager=True,
    )
    found: dict[str, Any] = {"up_s": time.monotonic() - started, "phases": []}
    if plugin:
        found["layers"] = llm.collective_rpc("moestack_start")[0]
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=3, prompt_logprobs=1)
    for number, knobs in enumerate(KNOBS if plugin else KNOBS[:1]):
        phase: dict[str, Any] = {}
        if plugin:
            phase["ack"] = llm.collective_rpc("moestack_apply", args=(json.dumps(knobs), number + 1))[0]
            phase["before"] = llm.collective_rpc("moestack_read", args=(True,))[0]
            llm.collective_rpc("moestack_record", args=(100_000,))
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
        phase["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
        phase["prompt_tokens"] = [len(output.prompt_token_ids) for output in outputs]
        phase["logprobs"] = [
            [
                sorted((token, value.logprob.hex()) for token, value in row.items())
                for rows in (output.prompt_logprobs, output.outputs[0].logprobs)
                for row in rows
                if row is not None
            ]
            for output in outputs
        ]
        if plugin:
            phase["after"] = llm.collective_rpc("moestack_read", args=(True,))[0]
            llm.collective_rpc("moestack_record", args=(0, f"{path}.phase{number}"))
        found["phases"].append(phase)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
