"""vLLM's second model runner, and its Triton kernel for experts, on a CPU: `python offline_second.py JOB.json`.

Both need Triton, which has no backend for CPUs here: its interpreter runs the kernels instead, slowly. So this is a
process of its own, prepared before vLLM is imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def interpret_triton() -> None:
    """Let vLLM find a Triton that works: its interpreter, under the name of a backend for CPUs."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def kernel_error(drop: bool, expert_parallel: bool, tokens: int = 24) -> dict[str, float]:
    """Largest difference between vLLM's TritonExperts and plain torch, over tokens with dropped slots and without.

    What alignment and sum do on a device is written here in torch, by their description; workspaces start as NaN, so
    a row that nothing was written to shows wherever it is read.
    """
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    from moe_serving import gpu
    from moe_serving.plugin import wrap_once

    def align(
        ids: Any, experts: int, block: int, order: Any, owner: Any, padded: Any, emap: Any = None, *_: Any
    ) -> None:
        """Slots by expert, padded to blocks; negative ids, and by a map those of other ranks, left out."""
        flat = ids.flatten().long()
        own = flat if emap is None else torch.where(flat >= 0, emap.long()[flat.clamp(min=0)], -1)
        order.fill_(flat.numel())
        owner.fill_(-1)
        at = 0
        for expert in range(experts):
            slots = torch.nonzero(own == expert).flatten()
            order[at : at + len(slots)] = slots.to(order.dtype)
            blocks = -(-len(slots) // block)
            owner[at // block : at // block + blocks] = expert
            at += blocks * block
        padded.fill_(at)

    def sums(rows: Any, out: Any, ids: Any = None, emap: Any = None) -> None:
        """Over a token's slots: all of them, or those whose expert is here."""
        present = torch.ones(rows.shape[:2], dtype=torch.bool)
        if ids is not None:
            present = ids >= 0 if emap is None else (ids >= 0) & (emap[ids.clamp(min=0).long()] >= 0)
        out.copy_(torch.where(present.unsqueeze(2), rows, 0.0).sum(1))

    _custom_ops.moe_align_block_size, _custom_ops.moe_sum = align, sums
    wrap_once(triton_moe.TritonExperts, "moe_sum", gpu.sum_present)
    experts, k, hidden, width = 8, 2, 32, 16
    make = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, hidden, generator=make)
    w1, w2 = (
        torch.randn(experts, 2 * width, hidden, generator=make),
        torch.randn(experts, hidden, width, generator=make),
    )
    weights, ids = torch.topk(torch.softmax(torch.randn(tokens, experts, generator=make), 1), k)
    ids = ids.to(torch.int32)
    if drop:
        ids[::3, 1], weights[::3, 1] = -1, 0.0
    emap = None
    mine = ids >= 0
    if expert_parallel:
        emap = torch.where(torch.arange(experts) < experts // 2, torch.arange(experts), -1).to(torch.int32)
        mine &= emap[ids.clamp(min=0).long()] >= 0
    want = torch.zeros(tokens, hidden)
    for token, slot in torch.nonzero(mine).tolist():
        expert = int(ids[token, slot])
        gate, up = (x[token] @ w1[expert].T).chunk(2)
        want[token] += weights[token, slot] * ((torch.nn.functional.silu(gate) * up) @ w2[expert].T)

    kernel = object.__new__(triton_moe.TritonExperts)
    kernel.quant_config, kernel.quantization_emulation = FUSED_MOE_UNQUANTIZED_CONFIG, False
    kernel.activation_config = SimpleNamespace(clamp_limit=None)
    kernel.activation = lambda _, out, rows: out.copy_(torch.nn.functional.silu(rows[:, :width]) * rows[:, width:])
    kernel._lora_context = None
    local = experts // 2 if expert_parallel else experts
    output = torch.full((tokens, hidden), torch.nan)
    scratch = [torch.full((tokens * k * max(hidden, 2 * width),), torch.nan) for _ in range(2)]
    kernel.apply(
        output, x, w1[:local].contiguous(), w2[:local].contiguous(), weights, ids, MoEActivation.SILU, experts, emap,
        None, None, *scratch, None, False,
    )  # fmt: skip
    error = (output - want).abs().amax(1)
    some = (ids < 0).any(1)
    split = {"dropped": error[some], "whole": error[~some]}
    return {name: float(part.amax()) if part.numel() else 0.0 for name, part in split.items()}


def deep_gemm_error(expert_parallel: bool) -> float:
    """The same of what lies around DeepGEMM's product: count, scatter and gather, a row's product being expert + 1.

    Rows and places that nothing is written to start as NaN and far outside.
    """
    import torch
    from vllm.model_executor.layers.fused_moe.deep_gemm_utils import ep_gather, ep_scatter
    from vllm.model_executor.layers.fused_moe.utils import count_expert_num_tokens

    tokens, experts, k, hidden, block = 24, 8, 2, 128, 16
    make = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, hidden, generator=make)
    weights, ids = torch.topk(torch.softmax(torch.randn(tokens, experts, generator=make), 1), k)
    ids = ids.to(torch.int32)
    ids[::3, 1] = -1  # weights stay: who reads one of a dropped slot shows
    owned = torch.arange(experts) < (experts // 2 if expert_parallel else experts)
    emap = torch.where(owned, torch.arange(experts), -1).to(torch.int32) if expert_parallel else None
    here = (ids >= 0) & owned[ids.clamp(min=0).long()]
    local = int(owned.sum())
    counts = count_expert_num_tokens(ids, local, emap)
    assert counts.tolist() == torch.bincount(ids[here].long(), minlength=experts)[:local].tolist()
    rows = local * tokens * k
    scattered, layout = torch.full((rows, hidden), torch.nan), torch.full((rows,), -1, dtype=torch.int32)
    place = torch.full((tokens, k), 1 << 30, dtype=torch.int32)
    ep_scatter(
        x, torch.ones(tokens, 1), ids, counts, emap, torch.empty(local, dtype=torch.int32), scattered,
        torch.zeros(rows, 1), layout, place, align_m=block,
    )  # fmt: skip
    product = scattered * (layout.unsqueeze(1) + 1)
    output = torch.full((tokens, hidden), torch.nan)
    ep_gather(product, ids, weights, place, emap, output)
    want = x * (here * weights * (ids + 1)).sum(1, keepdim=True)
    return float((output - want).abs().amax())


def lineage(llm: Any) -> list[str]:
    """Classes of the model runner in use, nearest first."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return [f"{base.__module__}.{base.__qualname__}" for base in type(runner).__mro__]


def logprobs(answer: Any) -> list[dict[str, float]]:
    """The best tokens of each place, prompt and answer, and what they scored: every bit of it."""
    places = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    return [{str(token): found.logprob for token, found in place.items()} for place in places]


def main(job_path: Path) -> None:
    job: dict[str, Any] = json.loads(job_path.read_text())
    os.environ.update(
        {
            "VLLM_USE_V2_MODEL_RUNNER": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0-1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_RPC_BASE_PATH": str(job_path.parent),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "MOESTACK_PLUGIN": "0" if job.get("stock") else "1",
        }
    )
    interpret_triton()
    from vllm import LLM, SamplingParams

    from moe_core.wire import ExpertKnobs

    llm = LLM(
        job["checkpoint"],
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    scored = [
        SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=5, prompt_logprobs=5)
    ]
    answers = llm.generate(job["prompts"], scored * len(job["prompts"]), use_tqdm=False)
    result: dict[str, Any] = {"scores": [logprobs(answer) for answer in answers], "runner": lineage(llm)}
    if job.get("stock"):
        Path(job["out"]).write_text(json.dumps(result))
        return
    result.update(layers=llm.collective_rpc("moestack_start")[0], phases=[])
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=job["max_tokens"],
            ignore_eos=True,
            extra_args=None if tier is None else {"moestack_tier": tier},
        )
        for tier in job["tiers"]
    ]
    for number, knobs in enumerate(job["phases"]):
        payload = ExpertKnobs.model_validate(knobs).model_dump_json(by_alias=True)
        ack = llm.collective_rpc("moestack_apply", args=(payload, number + 1))[0]
        before = llm.collective_rpc("moestack_read", args=(True,))[0]
        llm.collective_rpc("moestack_record", args=(100_000,))
        outputs = llm.generate(job["prompts"], params, use_tqdm=False)
        llm.collective_rpc("moestack_record", args=(0, f"{job['out']}.phase{number}"))
        result["phases"].append(
            {
                "error": ack["error"],
                "before": before,
                "after": llm.collective_rpc("moestack_read", args=(True,))[0],
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
            }
        )
    result["kernel"] = {
        f"{'dropped' if drop else 'whole'}, {'a rank of two' if ranks else 'alone'}": kernel_error(drop, ranks)
        for drop in (False, True)
        for ranks in (False, True)
    }
    for ranks in (False, True):
        result["kernel"][f"DeepGEMM, {'a rank of two' if ranks else 'alone'}"] = {"dropped": deep_gemm_error(ranks)}
    result["kernel"]["one token, dropped"] = kernel_error(True, False, tokens=1)  # no alignment at all
    Path(job["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
