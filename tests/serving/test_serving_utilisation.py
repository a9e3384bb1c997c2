"""S-MBU and S-MFU: a hand-worked example, what is unknown stays away, shapes and work as a rank reads them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_core.wire import ExpertKnobs
from moe_planner.catalog import packaged
from moe_serving.hardware import peaks_of
from moe_serving.rank import DECODE, PREFILL, Layer, Rank
from moe_serving.scores import Routing
from moe_serving.shapes import Meter, kv_groups, shapes
from moe_serving.utilisation import UNKNOWN, Peaks, Shapes, Work, combined, decode_bytes, flops, measure

# Two MoE layers in BF16: hidden 8, 4 experts of width 4 (3 · 8 · 4 = 96 parameters, 192 bytes), k = 2.
# Outside of them: attention 4 · 64 = 256 a layer, router 32 a layer, head 8 · 10 = 80.
SHAPES = Shapes(
    fixed_bytes=2 * (2 * 256 + 2 * 32 + 80),
    token_params=2 * 256 + 2 * 32,
    head_params=80,
    expert_bytes=(192.0, 192.0),
    expert_params=(96.0, 96.0),
    score_width=2 * 16,
)
NOTHING = Work((0, 0), (0, 0), 0, 0, 0, 0.0, 0, 0.0, 0.0)
# One prefill of 3 tokens, then two decode steps of one sequence, 2 experts touched in each layer and step; 64 bytes of
# cache a token: contexts of 4 and 5 tokens.
ONE_REQUEST = Work(
    touched=(4, 4), slots=(10, 10), tokens=5, yielded=3, pairs=6 + 4 + 5, busy_s=0.5, decode_steps=2,
    decode_busy_s=0.2, decode_kv_bytes=64.0 * 9,
)  # fmt: skip


def test_the_hand_worked_example() -> None:
    # S_active + S_KV of both steps: 2 · 1,312 fixed + 8 · 192 of experts + 576 of cache.
    assert decode_bytes(SHAPES, ONE_REQUEST) == 2 * 1312 + 1536 + 576 == 4736
    # 5 tokens · 576 + 3 yields · 80 + 20 slots · 96 + 15 pairs · 32 = 5,520 products, two operations each.
    assert flops(SHAPES, ONE_REQUEST) == 2 * (2880 + 240 + 1920 + 480) == 11_040
    found = measure(SHAPES, Peaks(bytes_s=47_360.0, flops_s=220_800.0), ONE_REQUEST, None)
    assert found.bytes_s == pytest.approx(4736 / 0.2)
    assert found.s_mbu == pytest.approx(0.5)
    assert found.flops_s == pytest.approx(11_040 / 0.5)
    assert found.s_mfu == pytest.approx(0.1)
    assert found.experts_touched == 2.0


def test_a_window_is_what_came_since() -> None:
    later = replace(ONE_REQUEST, touched=(7, 5), decode_steps=3, decode_busy_s=0.3, decode_kv_bytes=64.0 * 15)
    found = measure(SHAPES, UNKNOWN, later, ONE_REQUEST)
    assert found.bytes_s == pytest.approx((1312 + 4 * 192 + 64 * 6) / 0.1)
    assert found.experts_touched == 2.0
    assert found.decode_bytes_total == decode_bytes(SHAPES, later)


@pytest.mark.parametrize(
    ("name", "peaks", "work", "absent"),
    [
        ("nothing ran", Peaks(1e12, 1e12), NOTHING, {"s_mbu", "s_mfu", "bytes_s", "flops_s", "experts_touched"}),
        ("hardware unknown", UNKNOWN, ONE_REQUEST, {"s_mbu", "s_mfu"}),
        ("only its bandwidth known", Peaks(bytes_s=1e12), ONE_REQUEST, {"s_mfu"}),
        ("no decode-only step", Peaks(1e12, 1e12), replace(ONE_REQUEST, decode_steps=0, decode_busy_s=0.0),
         {"s_mbu", "bytes_s", "experts_touched"}),
    ],
)  # fmt: skip
def test_what_is_unknown_is_absent(name: str, peaks: Peaks, work: Work, absent: set[str]) -> None:
    found = measure(SHAPES, peaks, work, None).model_dump(exclude_none=True)
    named = {"s_mbu", "s_mfu", "bytes_s", "flops_s", "experts_touched"}
    assert named - found.keys() == absent


def test_what_two_ranks_of_the_real_engine_told() -> None:
    """Recorded from vLLM 0.32 on a CPU, two EP ranks, the tiny Qwen3-MoE checkpoint in float32: 4 layers, hidden 128,
    4 heads of 32 and 2 KV heads, 16 experts of width 64, k 4, head padded to 320 rows; prompts of 18 and 16 tokens,
    9 tokens each."""
    part = {"bytes": 98304.0, "params": 24576.0, "whole": True}
    rank = {
        "fixed_bytes": 513536, "token_params": 98304, "router_params": 8192, "head_params": 20480, "score_width": 512,
        "weight_bytes": 4, "experts": [part] * 4,
    }  # fmt: skip
    read = {
        "generated_tokens": 18,
        "layers": [{"touched": touched, "assigned": [200]} for touched in (52, 46, 52, 50)],
        "work": {"tokens": 50, "pairs": 651, "decode_steps": 8, "decode_kv_bytes": 332800.0},
    }
    found = combined([rank, rank])
    assert found is not None
    expert, router, head = 3 * 128 * 64, 128 * 16, 128 * 320
    attention = 128 * 128 + 2 * 128 * 64 + 128 * 128
    assert found.expert_params == (expert,) * 4
    assert found.token_params == 4 * (attention + router)
    assert found.head_params == head
    assert found.score_width == 4 * 4 * (32 + 32)
    work = Work.of(read, kv_bytes=2 * 332800.0, busy_s=0.07, decode_busy_s=0.04)
    # The first request's first decode rode with the second's prefill; the others attend to 325 tokens in all.
    assert work.decode_kv_bytes == 325 * (4 * 2 * 2 * 32 * 4)
    assert work.pairs == 18 * 19 // 2 + 16 * 17 // 2 + sum(18 + i + 16 + i for i in range(1, 9))
    assert decode_bytes(found, work) == 28_542_976
    assert measure(found, UNKNOWN, work, None).experts_touched == 6.25


counts = st.integers(0, 10**6)


@given(st.lists(st.tuples(counts, counts, counts, counts, st.floats(0.001, 10)), min_size=2, max_size=6))
def test_totals_never_go_back(steps: list[tuple[int, int, int, int, float]]) -> None:
    work, before = NOTHING, measure(SHAPES, UNKNOWN, NOTHING, None)
    for touched, slots, tokens, pairs, seconds in steps:
        work = Work(
            (work.touched[0] + touched, work.touched[1]), (work.slots[0], work.slots[1] + slots), work.tokens + tokens,
            work.yielded + 1, work.pairs + pairs, work.busy_s + seconds, work.decode_steps + 1,
            work.decode_busy_s + seconds, work.decode_kv_bytes + tokens,
        )  # fmt: skip
        now = measure(SHAPES, UNKNOWN, work, None)
        assert now.decode_bytes_total >= before.decode_bytes_total
        assert now.flops_total >= before.flops_total
        before = now


def rank_shapes(**changes: Any) -> dict[str, Any]:
    values = {
        "fixed_bytes": 1000, "token_params": 300, "router_params": 50, "head_params": 40, "score_width": 16,
        "weight_bytes": 2, "experts": [{"bytes": 64.0, "params": 32.0, "whole": True}],
    }  # fmt: skip
    return values | changes


def test_ranks_that_hold_whole_experts_agree_on_their_size() -> None:
    found = combined([rank_shapes(), rank_shapes()])
    assert found == Shapes(2000, 650, 80, (64.0,), (32.0,), 32)


def test_ranks_that_hold_slices_add_up() -> None:
    sliced = rank_shapes(experts=[{"bytes": 32.0, "params": 16.0, "whole": False}])
    found = combined([sliced, sliced])
    assert found is not None
    assert (found.expert_bytes, found.expert_params) == ((64.0,), (32.0,))


@pytest.mark.parametrize("ranks", [[], [rank_shapes(fixed_bytes=None)], [{"layers": []}]])
def test_shapes_that_a_rank_cannot_tell_are_not_guessed(ranks: list[dict[str, Any]]) -> None:
    assert combined(ranks) is None


@pytest.mark.parametrize(
    ("name", "accelerator", "weight_bytes", "wanted"),
    [
        ("bf16 on two", "nvidia-h200", 2, Peaks(9.6e12, 1978e12)),
        ("fp8 has its own peak", "nvidia-h200", 1, Peaks(9.6e12, 3958e12)),
        ("no peak for 4-byte weights", "nvidia-h200", 4, Peaks(9.6e12, None)),
        ("bandwidth alone is published", "nvidia-a100-80gb", 1, Peaks(4.078e12, None)),
        ("nothing found", "nvidia-rtx-3090", 2, UNKNOWN),
        ("a CPU", "cpu", 4, UNKNOWN),
    ],
)
def test_peaks_are_the_catalogs(name: str, accelerator: str, weight_bytes: int, wanted: Peaks) -> None:
    assert peaks_of(accelerator, 2, weight_bytes) == wanted


def test_every_peak_of_the_catalog_has_a_source() -> None:
    for known in packaged().accelerators.values():
        for name in ("bandwidth_gb_s", "tflops_16bit", "tflops_8bit"):
            assert name not in known.figures or known.figures[name].sourced


# What a rank reads from a loaded model and from the scheduler


class VocabParallelEmbedding(torch.nn.Module):
    """Named as vLLM's."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows, width, dtype=torch.bfloat16), requires_grad=False)


class Bag(torch.nn.Module):
    """A module of parameters of these shapes, and of other modules and attributes."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            value = part
            if isinstance(part, tuple):
                value = torch.nn.Parameter(torch.zeros(*part, dtype=torch.bfloat16), requires_grad=False)
            setattr(self, name, value)


def model(tied: bool = False) -> torch.nn.Module:
    """One layer: attention 64 parameters, router [4, 8], a shared expert of 16, 2 local experts of 96, norm, head."""
    experts = Bag(routed_experts=Bag(w13_weight=(2, 8, 8), w2_weight=(2, 8, 4)))
    attention = Bag(qkv=Bag(weight=(8, 8)), attn=Bag(kv_cache_dtype="auto", num_heads=2, head_size=4, head_size_v=4))
    block = Bag(mlp=Bag(gate=Bag(weight=(4, 8)), shared=Bag(weight=(2, 8)), experts=experts), attention=attention,
                norm=Bag(weight=(8,)))  # fmt: skip
    embedding = VocabParallelEmbedding(10, 8)
    inner = torch.nn.Module()
    inner.embed_tokens, inner.layers = embedding, torch.nn.ModuleList([block])
    whole = torch.nn.Module()
    whole.model = inner
    whole.lm_head = embedding if tied else Bag(weight=(10, 8))
    return whole


def moe_layer(owner: list[bool] | None) -> Layer:
    layer = Layer(0, "model.layers.0.mlp.experts", 4, 2, Routing("softmax", True))
    layer.owner = None if owner is None else torch.tensor(owner)
    return layer


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_read_from_the_modules(tied: bool) -> None:
    found = shapes(model(tied), [moe_layer([True, True, False, False])])
    assert found["experts"] == [{"bytes": 192.0, "params": 96.0, "whole": True, "weight_bytes": 2}]
    assert (found["token_params"], found["router_params"], found["head_params"]) == (64 + 16, 32, 80)
    assert found["fixed_bytes"] == 2 * (64 + 16 + 32 + 80 + 8), "norms are read too; rows of the embedding are not"
    assert found["score_width"] == 2 * (4 + 4)


def test_without_expert_parallelism_a_rank_has_a_slice_of_every_expert() -> None:
    found = shapes(model(), [moe_layer(None)])
    assert found["experts"][0]["whole"] is False
    assert found["experts"][0]["bytes"] == 96.0


def test_a_weight_that_a_kernel_packed_away_keeps_its_size() -> None:
    whole = model()
    linear = whole.model.layers[0].attention.qkv
    linear.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)
    linear.input_size_per_partition = linear.output_size_per_partition = 8
    gate = whole.model.layers[0].mlp.gate
    gate.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)
    gate.input_size, gate.output_size = 8, 4
    found = shapes(whole, [moe_layer(None)])
    assert (found["token_params"], found["router_params"]) == (64 + 16, 32)


def scheduled(new: dict[str, tuple[int, int]], old: dict[str, tuple[int, int]]) -> Any:
    """A SchedulerOutput: request → (computed before, scheduled now)."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=c) for name, (c, _) in new.items()],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(old), num_computed_tokens=[c for c, _ in old.values()]),
        num_scheduled_tokens={name: n for name, (_, n) in {**new, **old}.items()},
    )


def test_the_meter_counts_tokens_pairs_and_cache_reads() -> None:
    meter = Meter(kv=((10.0, None), (1.0, 4)))
    meter.note(scheduled({"a": (0, 3)}, {}), 0.3, prefill=True)
    assert meter.read() == {
        "tokens": 3, "pairs": 6, "decode_steps": 0, "decode_busy_s": 0.0, "decode_kv_bytes": 0.0
    }  # fmt: skip
    meter.note(scheduled({}, {"a": (3, 1), "b": (9, 1)}), 0.1, prefill=False)
    assert meter.read() == {
        "tokens": 5, "pairs": 6 + 4 + 10, "decode_steps": 1, "decode_busy_s": 0.1,
        "decode_kv_bytes": 10.0 * (4 + 10) + 1.0 * (4 + 4),
    }  # fmt: skip


def test_cache_groups_by_layer_count_and_window() -> None:
    attention = SimpleNamespace(num_kv_heads=2, page_size_bytes=1024, block_size=16, sliding_window=None)
    window = SimpleNamespace(num_kv_heads=2, page_size_bytes=1024, block_size=16, sliding_window=128)
    recurrent = SimpleNamespace(page_size_bytes=4096, block_size=16)
    groups = [
        SimpleNamespace(layer_names=["a", "b"], kv_cache_spec=attention),
        SimpleNamespace(layer_names=["c"], kv_cache_spec=window),
        SimpleNamespace(layer_names=["d"], kv_cache_spec=recurrent),
    ]
    assert kv_groups(SimpleNamespace(kv_cache_groups=groups)) == ((128.0, None), (64.0, 128))


@pytest.mark.parametrize(("overflow", "wanted"), [("Unlimited", 3), ("Drop", 3)])
def test_experts_touched_are_distinct_and_of_decode_steps_alone(overflow: str, wanted: int) -> None:
    rank = Rank(layers=[Layer(0, "moe.0", 4, 2, Routing("softmax", True))])
    rank.apply(ExpertKnobs.model_validate({"overflow": overflow, "capacityFactorPrefill": "2"}), 1)
    logits = torch.tensor([[4.0, 3.0, 0.0, 0.0], [4.0, 0.0, 3.0, 0.0]])
    scores, ids = logits.softmax(-1).topk(2)
    for phases in ([PREFILL, DECODE], [DECODE, DECODE], [PREFILL, PREFILL]):
        rank.begin_step(np.array(phases, np.uint8), 0)
        rank.route(0, scores, ids, logits)
        rank.end_step(0.0)
    assert int(rank.layers[0].touched) == wanted
