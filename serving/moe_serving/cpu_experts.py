"""Expert parallelism on a CPU: a rank computes the (token, expert) pairs that are its own, and only those.

vLLM's portable CPU kernel takes every slot as local, so under expert parallelism it reads outside its weights. Here
the pairs of local experts are gathered into rows of one expert each, run through the same kernel, and summed back in
float32. So a rank's time follows its load, and a dropped slot (expert -1) saves its work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_serving.rank import _LIBRARY, RANK, now

_LIBRARY.define(
    "cpu_experts(Tensor(a!) output, Tensor hidden, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
    "Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, str activation, str isa, bool skip_weighted) -> ()"
)


def _cpu_experts(
    output: Tensor,
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    activation: str,
    isa: str,
    skip_weighted: bool,
) -> None:
    from vllm._custom_ops import cpu_fused_moe

    started = now()
    local = topk_ids if expert_map is None else _map_local(topk_ids, expert_map)
    mine = local >= 0
    if bool(mine.all()):
        cpu_fused_moe(
            output, hidden, w13, w2, w13_bias, w2_bias, topk_weights, local.to(torch.int32), activation, isa,
            skip_weighted,
        )  # fmt: skip
    else:
        token, slot = torch.nonzero(mine, as_tuple=True)
        summed = torch.zeros(output.shape, dtype=torch.float32)
        if token.numel():
            rows = torch.empty((token.numel(), output.shape[1]), dtype=output.dtype)
            cpu_fused_moe(
                rows,
                hidden[token],
                w13,
                w2,
                w13_bias,
                w2_bias,
                topk_weights[token, slot].unsqueeze(1).contiguous(),
                local[token, slot].unsqueeze(1).to(torch.int32).contiguous(),
                activation,
                isa,
                skip_weighted,
            )
            summed.index_add_(0, token, rows.float())
        output.copy_(summed)
    RANK.moe_s += now() - started


def _map_local(ids: Tensor, expert_map: Tensor) -> Tensor:
    return torch.where(ids >= 0, expert_map[ids.clamp(min=0).long()].to(ids.dtype), -1)


def _cpu_experts_meta(*_: Any) -> None:
    return None


_LIBRARY.impl("cpu_experts", _cpu_experts, "CPU")
_LIBRARY.impl("cpu_experts", _cpu_experts_meta, "Meta")


def hooked_apply(original: Any) -> Any:
    """Replacement of CPUUnquantizedExperts.apply; the vendor's own kernel (zentorch) is left alone."""

    def apply(
        self: Any,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        if self._use_zentorch:
            original(
                self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts,
                expert_map, a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta,
                apply_router_weight_on_input,
            )  # fmt: skip
            return
        torch.ops.moestack.cpu_experts(
            output,
            hidden_states,
            w1,
            w2,
            self.w1_bias,
            self.w2_bias,
            topk_weights,
            topk_ids,
            expert_map,
            activation.value,
            self.isa,
            apply_router_weight_on_input,
        )

    return apply
