"""What the supported vLLM lacks or breaks, and a few lines mend: a family that does not load, collectives of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def find_dbrx_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DbrxModel.load_weights`: its experts moved into `routed_experts`, its names for their weights did not.

    Without it every DBRX checkpoint ends in KeyError 'blocks.0.ffn.experts.w13_weight' (vLLM 0.32.0, any device).
    """

    def load_weights(self: Any, weights: Iterable[tuple[str, Any]]) -> Any:
        if any(".experts.routed_experts." in name for name, _ in self.named_parameters()):
            weights = ((moved(name), weight) for name, weight in weights)
        return original(self, weights)

    return load_weights


def moved(name: str) -> str:
    """Where a DBRX weight lies now: blocks.0.ffn.experts.mlp.w1 → blocks.0.ffn.experts.routed_experts.mlp.w1."""
    return name.replace(".ffn.experts.mlp.", ".ffn.experts.routed_experts.mlp.")


def count_dbrx_experts(original: Callable[..., int]) -> Callable[..., int]:
    """Wrap `DbrxModelArchConfigConvertor.get_num_experts`, which looks beside `ffn_config` and finds none.

    Without it expert parallelism is refused: "Number of experts in the model must be greater than 0" (vLLM 0.32.0).
    """

    def get_num_experts(self: Any) -> int:
        return original(self) or int(self.hf_text_config.ffn_config.moe_num_experts)

    return get_num_experts


def load_own_dbrx_experts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DbrxExperts.weight_loader`, which gives each rank a slice of every expert, also where ranks share experts
    and each has its own experts whole. Without it expert parallelism ends in a shape error (vLLM 0.32.0, any device).
    """

    def weight_loader(
        self: Any, param: Any, loaded_weight: Any, weight_name: str, shard_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        if self.expert_map is None or not shard_id.endswith("weight"):
            return original(self, param, loaded_weight, weight_name, shard_id, *args, **kwargs)
        mine = own_experts(loaded_weight, self.expert_map, self.intermediate_size, self.d_model)
        width = self.intermediate_size
        if weight_name.endswith("w2"):
            param.data.copy_(mine.transpose(1, 2))
        else:
            first = 0 if weight_name.endswith("w1") else width
            param.data[:, first : first + width, :].copy_(mine)
        return True

    return weight_loader


def own_experts(weight: Any, expert_map: Any, intermediate_size: int, hidden_size: int) -> Any:
    """Of a weight of all experts, [E × I, H], those that lie on this rank, [local E, I, H] in their local order.

    `expert_map` [E] is each expert's place on this rank, -1 where it lies on another.
    """
    experts = weight.reshape(len(expert_map), intermediate_size, hidden_size)
    here = (expert_map >= 0).nonzero().squeeze(1)
    return experts[here[expert_map[here].argsort()].to(weight.device)]


def rotate_by_head(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `RotaryEmbedding.forward_cpu`, whose kernel takes heads [T, H, D] for rows of one head: it turns the first T
    of them, by the wrong positions, and of a strided view it turns the neighbours' memory.

    Multi-head latent attention gives it such heads, where the positions are not stretched (YaRN has a class of its
    own): text is wrong, and compiled another in every run (vLLM 0.32.0, CPU).
    """

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None, *args: Any, **kwargs: Any) -> Any:
        if query.dim() > 2:
            return self.forward_native(positions, query, key, *args, **kwargs)
        return original(self, positions, query, key, *args, **kwargs)

    return forward_cpu


def lend_gatherv(communicator: type, base: type) -> None:
    """Give the communicator of a CPU what data-parallel attention dispatches and combines by.

    Without it the first batch of a data-parallel engine ends in NotImplementedError of `all_gatherv` (vLLM 0.32.0).
    A vLLM whose communicator has its own keeps them.
    """
    for name, function in (("all_gatherv", all_gatherv), ("reduce_scatterv", reduce_scatterv)):
        if getattr(communicator, name) is getattr(base, name):
            setattr(communicator, name, function)


def all_gatherv(
    self: Any, input_: Tensor | list[Tensor], dim: int = 0, sizes: Sequence[int] | None = None
) -> Tensor | list[Tensor]:
    """Rows of every rank, in the order of ranks; `sizes`: how many each has, by default as many as this one."""
    if isinstance(input_, list):
        return [_gathered(self, one, dim, sizes) for one in input_]
    return _gathered(self, input_, dim, sizes)


def _gathered(self: Any, mine: Tensor, dim: int, sizes: Sequence[int] | None) -> Tensor:
    if dim != 0:
        raise ValueError(f"all_gatherv on a CPU gathers rows, not dimension {dim}")
    sizes = sizes or [mine.shape[0]] * self.world_size
    longest = max(sizes)
    padded = pad(mine, (*(0, 0) * (mine.dim() - 1), 0, longest - mine.shape[0])).contiguous()
    every = mine.new_empty((self.world_size * longest, *mine.shape[1:]))
    torch.distributed.all_gather_into_tensor(every, padded, group=self.device_group)
    return torch.cat([every[rank * longest :][:size] for rank, size in enumerate(sizes)])


def reduce_scatterv(self: Any, input_: Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's rows of the sum over ranks, added up in float32; `sizes`: rows of each, by default even shares."""
    if dim not in (0, -input_.dim()):
        raise ValueError(f"reduce_scatterv on a CPU scatters rows, not dimension {dim}")
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    summed = input_.to(torch.float32, copy=True)
    torch.distributed.all_reduce(summed, group=self.device_group)
    first = sum(sizes[: self.rank_in_group])
    return summed[first : first + sizes[self.rank_in_group]].to(input_.dtype)
