"""Mends of vLLM: what ranks load of a DBRX checkpoint is, together, the whole of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_serving.mends import count_dbrx_experts, load_own_dbrx_experts, rotate_by_head

torch = pytest.importorskip("torch")

EXPERTS, WIDTH, HIDDEN = 4, 3, 2
FLAT = torch.arange(float(EXPERTS * WIDTH * HIDDEN)).view(EXPERTS * WIDTH, HIDDEN)


class Experts(SimpleNamespace):
    """As vLLM's DbrxExperts: what its own loader was asked for is kept."""

    asked: list[tuple[str, str]]

    @load_own_dbrx_experts
    def weight_loader(self, param: Any, loaded_weight: Any, weight_name: str, shard_id: str) -> Any:
        self.asked.append((weight_name, shard_id))


def on_rank(mine: list[int] | None) -> Experts:
    places = None
    if mine is not None:
        places = torch.full((EXPERTS,), -1, dtype=torch.int32)
        places[mine] = torch.arange(len(mine), dtype=torch.int32)
    return Experts(expert_map=places, intermediate_size=WIDTH, d_model=HIDDEN, asked=[])


@pytest.mark.parametrize("mine", [[0, 1], [2, 3], [3, 1], [2]], ids=["first", "last", "in another order", "one"])
def test_a_rank_loads_its_own_experts_whole(mine: list[int]) -> None:
    experts = on_rank(mine)
    w13 = SimpleNamespace(data=torch.zeros(len(mine), 2 * WIDTH, HIDDEN))
    w2 = SimpleNamespace(data=torch.zeros(len(mine), HIDDEN, WIDTH))
    experts.weight_loader(w13, FLAT, "mlp.w1", "w13_weight")
    experts.weight_loader(w13, -FLAT, "mlp.v1", "w13_weight")
    experts.weight_loader(w2, FLAT, "mlp.w2", "w2_weight")
    whole = FLAT.view(EXPERTS, WIDTH, HIDDEN)
    for place, expert in enumerate(mine):
        assert torch.equal(w13.data[place], torch.cat((whole[expert], -whole[expert])))
        assert torch.equal(w2.data[place], whole[expert].t())
    assert experts.asked == []


@pytest.mark.parametrize(
    ("mine", "shard"), [(None, "w13_weight"), ([0, 1], "w13_weight_scale")], ids=["no expert parallelism", "a scale"]
)
def test_everything_else_is_vllms_own_to_load(mine: list[int] | None, shard: str) -> None:
    experts = on_rank(mine)
    experts.weight_loader(None, FLAT, "mlp.w1", shard)
    assert experts.asked == [("mlp.w1", shard)]


class Rotary:
    """Tells which of vLLM's two ways was taken."""

    @rotate_by_head
    def forward_cpu(self, positions: Any, query: Any, key: Any = None) -> str:
        return "kernel"

    def forward_native(self, positions: Any, query: Any, key: Any = None) -> str:
        return "torch"


def test_heads_are_rotated_without_the_kernel_that_takes_rows() -> None:
    rows, heads = torch.zeros(5, 12), torch.zeros(5, 3, 4)
    assert Rotary().forward_cpu(None, rows, rows) == "kernel"
    assert Rotary().forward_cpu(None, heads, heads) == "torch"


def test_the_installed_kernel_takes_heads_for_rows() -> None:
    """What the mend is for. Once this fails, vLLM's kernel is right and the mend can go."""
    ops = pytest.importorskip("vllm._custom_ops")
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    positions = torch.arange(1, 8)
    angles = torch.outer(torch.arange(8.0), 10_000.0 ** -(torch.arange(32) / 32))
    table = torch.cat((angles.cos(), angles.sin()), -1)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(7, heads, 64, generator=generator) for heads in (4, 1))

    def in_torch(positions: Any, query: Any, key: Any) -> Any:
        return RotaryEmbedding.forward_static(positions, query, key, 64, 64, table, False)

    want = in_torch(positions, query.clone(), key.clone())[0]
    by_kernel = query.clone()
    ops.rotary_embedding(positions, by_kernel, key.clone(), 64, table, False)
    assert not torch.allclose(by_kernel, want, atol=0.1)
    layer = SimpleNamespace(forward_native=in_torch)
    mended = rotate_by_head(RotaryEmbedding.forward_cpu)(layer, positions, query.clone(), key.clone())[0]
    assert torch.equal(mended, want)


@pytest.mark.parametrize(("found", "experts"), [(0, 16), (8, 8)], ids=["beside its config", "a vLLM that finds them"])
def test_dbrx_has_experts(found: int, experts: int) -> None:
    config = SimpleNamespace(hf_text_config=SimpleNamespace(ffn_config=SimpleNamespace(moe_num_experts=16)))
    assert count_dbrx_experts(lambda _: found)(config) == experts
