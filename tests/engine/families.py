"""Runs model families on vLLM one after another, each in several ways. `python families.py JOB.json`.

Each run is a forked process, so that vLLM is imported once for all of them; ranks and the engine core of a run are
forked too. But for the served one its engine runs inside that process: all prompts wait before the first step, so all
runs form the same batches.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PROMPTS = [f"{i}. Say what {i * 37 % 101} times {i % 7} is, and why it is{' very' * (i % 5)} so." for i in range(12)]
MAX_TOKENS = 8
DTYPE = {"qwen3_next": "bfloat16"}
"""Others run in float32; its attention has no other kernel on a CPU."""
KNOBS = (
    {"overflow": "Unlimited"},
    {"overflow": "Reroute", "capacityFactorPrefill": "1.25"},
    {"overflow": "Drop", "capacityFactorPrefill": "1.25", "capacityFactorDecode": "2"},
    {"overflow": "ExpertChoice", "capacityFactorPrefill": "1.5"},
    {"overflow": "Unlimited"},
)
IMPORTS = ("vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker")
IMPORTS_TO_SERVE = ("vllm.entrypoints.openai.api_server", "ray.llm._internal.serve.engines.vllm.vllm_engine")
"""Done once, before the forks."""
LIMITS = {"max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 256}


@dataclass(frozen=True)
class Run:
    """One way to run a family."""

    plugin: bool
    ranks: int = 1
    served: bool = False


RUNS = {
    "stock": Run(plugin=False),
    "hooked": Run(plugin=True),
    "two": Run(plugin=True, ranks=2),
    "served": Run(plugin=True, ranks=2, served=True),
}


def main(job_path: Path) -> None:
    job: dict[str, Any] = json.loads(job_path.read_text())
    os.environ.update(
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_RPC_BASE_PATH": str(job_path.parent),
            "OMP_NUM_THREADS": "1",  # a process that has run threads of OpenMP must not fork
            "RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK": "0",
            "RAY_ENABLE_AUTO_CONNECT": "0",
        }
    )
    served = any("served" in runs for runs in job["runs"].values())
    for module in IMPORTS + (IMPORTS_TO_SERVE if served else ()):
        importlib.import_module(module)

    context = multiprocessing.get_context("fork")
    for family, checkpoint in job["families"].items():
        for name in job["runs"][family]:
            source = job["stock"].get(family, checkpoint) if name == "stock" else checkpoint
            path = Path(f"{job['out']}.{family}.{name}")
            child = context.Process(target=run, args=(source, family, RUNS[name], path))
            child.start()
            child.join(300)
            if child.is_alive():
                child.kill()
                child.join()
            if not path.is_file():
                path.write_text(json.dumps({"error": f"ended without a result, exit code {child.exitcode}"}))


def run(checkpoint: str, family: str, how: Run, path: Path) -> None:
    """One engine; what it did, or the error that it ended with, goes to `path`."""
    os.environ["MOESTACK_PLUGIN"] = str(int(how.plugin))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(how.served))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(how.ranks))
    fork_ranks()
    started = time.monotonic()
    try:
        if how.served:
            from served import serve  # beside this file

            found = asyncio.run(serve(checkpoint, family, DTYPE.get(family, "float32"), path))
        else:
            found = generate(checkpoint, DTYPE.get(family, "float32"), how, path)
    except BaseException as error:  # whatever ends an engine is the result here
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    found["seconds"] = time.monotonic() - started
    path.write_text(json.dumps(found))


def fork_ranks() -> None:
    """Let vLLM fork its processes, which it spawns on a CPU for the sake of OpenMP's environment: of one thread each
    here. Each rank keeps to a core of its own."""
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor
    from vllm.v1.worker.cpu_worker import CPUWorker

    for module in (utils, multiproc_executor):
        module.get_mp_context = lambda: multiprocessing.get_context("fork")
    init = CPUWorker.init_device

    def init_device(self: Any) -> None:
        if self.parallel_config.world_size > 1:
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[self.rank % len(cores)]})
        init(self)

    CPUWorker.init_device = init_device


def generate(checkpoint: str, dtype: str, how: Run, path: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    llm = LLM(
        checkpoint,
        dtype=dtype,
        tensor_parallel_size=how.ranks,
        enable_expert_parallel=how.ranks > 1,
        enable_prefix_caching=False,
        enforce_eager=True,
        **LIMITS,
    )
    found: dict[str, Any] = {"up_s": time.monotonic() - started, "phases": []}
    if how.plugin:
        found["layers"] = llm.collective_rpc("moestack_start")
        if how.ranks == 1:
            save_routings(path)
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=3, prompt_logprobs=1)
    for number, knobs in enumerate(KNOBS if how.plugin else KNOBS[:1]):
        phase: dict[str, Any] = {}
        if how.plugin:
            phase["acks"] = llm.collective_rpc("moestack_apply", args=(json.dumps(knobs), number + 1))
            phase["before"] = llm.collective_rpc("moestack_read", args=(True,))
            llm.collective_rpc("moestack_record", args=(100_000,))
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
        phase["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
        phase["prompt_tokens"] = [len(output.prompt_token_ids) for output in outputs]
        # Of each request the positions of its prompt but the first, then those of its text: {token: log probability}.
        phase["logprobs"] = [
            [
                {str(token): value.logprob.hex() for token, value in row.items()}
                for rows in (output.prompt_logprobs, output.outputs[0].logprobs)
                for row in rows
                if row is not None
            ]
            for output in outputs
        ]
        if how.plugin:
            phase["after"] = llm.collective_rpc("moestack_read", args=(True,))
            llm.collective_rpc("moestack_record", args=(0, f"{path}.phase{number}"))
        found["phases"].append(phase)
    llm.llm_engine.engine_core.shutdown()
    return found


def save_routings(path: Path) -> None:
    """How each MoE layer of this process's engine routes, field by field."""
    import torch

    from moe_serving.rank import RANK

    rules = [
        {field.name: getattr(layer.routing, field.name) for field in fields(layer.routing)} for layer in RANK.layers
    ]
    torch.save(rules, f"{path}.routings.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
