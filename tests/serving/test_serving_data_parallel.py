"""Data-parallel attention: what a CPU lacks for it, whose tokens each rank counts, and what C means over its ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.capacity import GAMMA_SCALE, capacity
from moe_core.config import ServingConfig
from moe_core.wire import ExpertKnobs, Overflow
from moe_serving import builder, digest
from moe_serving.utilisation import Peaks, Shapes
from tests.engine.stack import environment

torch = pytest.importorskip("torch")
from moe_serving.mends import all_gatherv, lend_gatherv, reduce_scatterv  # noqa: E402
from moe_serving.rank import PREFILL, KnobsRefused, Rank  # noqa: E402
from moe_serving.route import Layer  # noqa: E402
from moe_serving.scores import Routing  # noqa: E402

E, K = 8, 3
PLAIN = Routing("softmax", True)


def test_lent_collectives_gather_and_reduce_uneven_rows(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("gloo_ranks.py"))]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=environment(), stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    answers = [json.loads(rank.communicate(timeout=300)[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    every = [[10.0, -10.0], [11.0, -11.0], [12.0, -12.0], [20.0, -20.0]]
    for answer in answers:
        assert answer["gathered"] == [every] * 4
        assert answer["even"] == [[10, -10], [11, -11], [12, -12], [11, -9], [12, -10], [13, -11]]
        assert answer["one of a rank"] == [0, 1]
    # Rank 0 adds rows 0…7 once, rank 1 twice: each gets its own rows of three times them.
    assert [answer["reduced"] for answer in answers] == [[[0, 3], [6, 9], [12, 15]], [[18, 21]]]
    assert [answer["reduced evenly"] for answer in answers] == [[[0, 3], [6, 9]], [[12, 15], [18, 21]]]
    assert answers[0]["untouched"] == [[0, 1], [2, 3], [4, 5], [6, 7]], "what is summed is the caller's"


@pytest.mark.parametrize(("call", "dim"), [(all_gatherv, 1), (reduce_scatterv, 1), (reduce_scatterv, -1)])
def test_lent_collectives_refuse_what_they_do_not_do(call: Any, dim: int) -> None:
    with pytest.raises(ValueError, match=f"dimension {dim}"):
        call(SimpleNamespace(world_size=2), torch.zeros(2, 2), dim)


def test_this_vllm_lacks_them_on_a_cpu_and_one_that_has_them_keeps_its_own() -> None:
    pytest.importorskip("vllm")
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    class Own(DeviceCommunicatorBase):  # type: ignore[misc, unused-ignore]
        def all_gatherv(self, *_: Any) -> str:
            return "mine"

    class Heir(CpuCommunicator):  # type: ignore[misc, unused-ignore]
        pass

    for name in ("all_gatherv", "reduce_scatterv"):
        setattr(Heir, name, getattr(DeviceCommunicatorBase, name))
    with pytest.raises(NotImplementedError):
        Heir.all_gatherv(SimpleNamespace(), torch.zeros(1))
    kept = Own.all_gatherv
    for communicator in (Own, Heir):
        lend_gatherv(communicator, DeviceCommunicatorBase)
    assert Own.all_gatherv is kept
    assert Own.reduce_scatterv is reduce_scatterv
    assert (Heir.all_gatherv, Heir.reduce_scatterv) == (all_gatherv, reduce_scatterv)


def part_of(part: int, parts: int, knobs: ExpertKnobs | None = None) -> Rank:
    rank = Rank()
    rank.layers.append(Layer(0, "moe.0", E, K, PLAIN, part=part, parts=parts))
    rank.apply(knobs or ExpertKnobs(), 1)
    return rank


def router(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.topk(torch.softmax(logits, 1), K, dim=1)
    return weights / weights.sum(1, keepdim=True), ids.to(torch.int32)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("parts", [2, 4])
def test_ranks_that_route_a_part_each_count_every_token_once(count: int, parts: int) -> None:
    """Sequence parallel: the step's tokens are padded to a multiple of the ranks and cut, and padding is nobody's."""
    each = -(-count // parts)
    logits = torch.randn(each * parts, E, generator=torch.Generator().manual_seed(count))
    k = np.arange(count, dtype=np.int64) % (K + 1)
    ranks = [part_of(part, parts) for part in range(parts)]
    for part, rank in enumerate(ranks):
        rank.begin_step(np.full(count, PREFILL, np.uint8), 0, k)
        mine = logits[part * each : (part + 1) * each]
        _, ids = rank.route(0, *router(mine), mine)
        for row, token in enumerate(range(part * each, min(count, (part + 1) * each))):
            assert int((ids[row] >= 0).sum()) == (k[token] or K), "each token has the k of its own tier"
    assert sum(int(rank.layers[0].tokens) for rank in ranks) == count
    demanded = sum(int(rank.layers[0].demand.sum()) for rank in ranks)
    assert demanded == sum(int(one) or K for one in k)


def test_a_layer_that_is_bypassed_counts_nothing() -> None:
    """Such as one that routes after the gather: its rows are of other ranks, whose phases are not known here."""
    rank = part_of(0, 1)
    rank.layers[0].bypassed = "it routes after the gather"
    rank.begin_step(np.full(4, PREFILL, np.uint8), 0)
    logits = torch.randn(9, E)
    weights, ids = router(logits)
    out = rank.route(0, weights, ids, logits)
    assert torch.equal(out[0], weights)
    assert torch.equal(out[1], ids)
    assert int(rank.layers[0].tokens) == 0


def module_of(
    *, after_gather: bool = False, sequence: bool = False, placement: str | None = None, ranks: int = 2
) -> Any:
    """vLLM's MoE module, as far as its parallel form goes; `placement` of whole experts, None: every rank has all."""
    manager = SimpleNamespace(ep_size=ranks, placement_strategy=placement)
    experts = SimpleNamespace(
        expert_map=None if placement is None else torch.tensor([0, 1, -1, -1, 2, 3, -1, -1]),
        expert_map_manager=manager,
        moe_config=SimpleNamespace(is_sequence_parallel=sequence),
    )
    return SimpleNamespace(routed_experts=experts, do_naive_dispatch_combine=after_gather)


def noted(module: Any) -> Layer:
    from moe_serving.parallel import note_form

    layer = Layer(0, "moe.0", E, K, PLAIN)
    note_form(layer, module)
    return layer


def test_a_layer_knows_who_holds_its_experts() -> None:
    pytest.importorskip("vllm")
    assert (noted(module_of()).places, noted(module_of()).owner) == (None, None)
    linear, turns = (noted(module_of(placement=kind)) for kind in ("linear", "round_robin"))
    assert linear.places == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert turns.places == ((0, 2, 4, 6), (1, 3, 5, 7))
    uneven = noted(module_of(placement="linear", ranks=3)).places
    assert uneven == ((0, 1, 2), (3, 4, 5), (6, 7))
    assert linear.owner is not None
    assert linear.owner.tolist() == [True, True, False, False] * 2, (
        "the rank's own map is the truth of what it computes"
    )


def test_a_layer_knows_whose_tokens_it_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from moe_serving import parallel

    monkeypatch.setattr(parallel, "get_tp_group", lambda: SimpleNamespace(rank_in_group=3, world_size=4))
    plain, cut, gathered = (noted(module_of(**form)) for form in ({}, {"sequence": True}, {"after_gather": True}))
    assert [(layer.part, layer.parts, layer.bypassed) for layer in (plain, cut)] == [(0, 1, ""), (3, 4, "")]
    assert gathered.bypassed == parallel.AFTER_GATHER
    rank = Rank(layers=[gathered])
    with pytest.raises(KnobsRefused, match=r"experts\.overflow: layer moe\.0 bypasses the router \(it routes after"):
        rank.apply(ExpertKnobs(overflow=Overflow.DROP, capacity_factor_prefill=Decimal(1)), 1)


def test_one_rank_may_be_capped_while_its_peer_is_not() -> None:
    """Each routes its own tokens, so they need not switch at one step: what a rank does depends on its tokens alone."""
    logits = torch.randn(32, E, generator=torch.Generator().manual_seed(5)) + torch.linspace(3, 0, E)
    capped = part_of(0, 1, ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal(1)))
    free = part_of(0, 1)
    for rank in (capped, free):
        rank.begin_step(np.full(32, PREFILL, np.uint8), 0)
    given = router(logits)
    held = torch.bincount(capped.route(0, *given, logits)[1].flatten().long(), minlength=E)
    assert int(held.max()) <= capacity(Decimal(1), 32 * K, E)
    assert torch.equal(free.route(0, *given, logits)[1], given[1])


@given(
    gamma=st.integers(GAMMA_SCALE // 4, 4 * GAMMA_SCALE).map(lambda micro: Decimal(micro) / GAMMA_SCALE),
    slots=st.lists(st.integers(0, 500), min_size=1, max_size=16),
    experts=st.integers(1, 64),
)
def test_c_by_rank_is_c_of_the_gang_but_for_rounding(gamma: Decimal, slots: list[int], experts: int) -> None:
    """An expert of a gang holds at most Σ C over ranks: at least C of all tokens, less than one a rank more."""
    by_rank, together = sum(capacity(gamma, one, experts) for one in slots), capacity(gamma, sum(slots), experts)
    assert together <= by_rank < together + len(slots)


def answer(demand: list[int], places: list[list[int]] | None, *, split: bool, mine: list[int]) -> dict[str, Any]:
    layer = {
        "layer": 0, "hooked": True, "demand": demand, "assigned": demand, "mine": mine, "places": places,
        "split": split, "tokens": sum(demand) // 2, "dropped": 1, "rerouted": 2, "overflow_kept": 0,
        "lost_gate_mass": 0.25, "max_prefill_load": max(demand), "touched": 3,
    }  # fmt: skip
    work = {"tokens": 4, "pairs": 10, "decode_steps": 2, "decode_busy_s": 0.5, "decode_kv_bytes": 100.0}
    return {
        "rank": 0, "knobs": '{"overflow":"Unlimited"}', "version": 1, "steps": 3, "prompt_tokens": 4, "busy_s": 1.0,
        "generated_tokens": 2, "moe_s": 0.5, "layers": [layer], "work": work,
    }  # fmt: skip


SCHEDULER = {
    "running": 0, "waiting": 0, "kv_usage": 0.0, "active_seqs": 8, "batched_tokens": 64,
    "ceiling_active_seqs": 8, "ceiling_batched_tokens": 64,
}  # fmt: skip
SHAPES = Shapes(1000, 10, 5, (100.0,), (50.0,), 4)
WHO = digest.Identity("r", "local", 0.0)


def test_a_data_parallel_rank_tells_the_load_that_it_puts_on_every_rank_of_its_gang() -> None:
    ranks = [answer([4, 0, 2, 2], [[0, 1], [2, 3]], split=False, mine=[0, 1])]
    made, _ = digest.build(WHO, 1.0, ranks, SCHEDULER, digest.Totals(), SHAPES, Peaks(1e6, 1e6))
    assert made.ranks == 1
    assert made.layers[0].rank_slots == (4, 4)
    assert digest.matrix(WHO, 1.0, ranks).layers[0].rank_demand == (4, 4)
    use = made.utilisation
    assert use is not None
    assert use.flops_total == 2 * (4 * 10 + 2 * 5 + 8 * 50 + 10 * 4)
    assert (use.decode_bytes_total, use.bytes_s, use.s_mbu) == (0, None, None), "tokens of other ranks read experts too"
    assert use.s_mfu is not None


def test_ranks_that_route_parts_add_up_and_ranks_that_route_the_same_do_not() -> None:
    places = [[0], [1], [2], [3]]
    split = [answer([4, 0, 2, 2], places, split=True, mine=[0]), answer([0, 6, 0, 2], places, split=True, mine=[1])]
    made, _ = digest.build(WHO, 1.0, split, SCHEDULER, digest.Totals(), SHAPES)
    layer = made.layers[0]
    assert (layer.slots_total, layer.tokens_total, layer.dropped_total, layer.rerouted_total) == (16, 8, 2, 4)
    assert (layer.rank_slots, layer.max_prefill_load, layer.lost_gate_mass_total) == ((4, 6, 2, 4), 6, 0.5)
    same = [answer([4, 0, 2, 2], [[0, 1], [2, 3]], split=False, mine=mine) for mine in ([0, 1], [2, 3])]
    made, _ = digest.build(WHO, 1.0, same, SCHEDULER, digest.Totals(), SHAPES)
    assert (made.layers[0].slots_total, made.layers[0].rank_slots) == (8, (4, 4))
    assert made.utilisation is not None
    assert made.utilisation.decode_bytes_total > 0


def config(**more: Any) -> ServingConfig:
    return ServingConfig(deployment="d/m", model="m", source="/m", **more)


@pytest.mark.parametrize(
    ("more", "data", "experts_parallel"),
    [
        ({}, None, False),
        ({"tensor_parallel": 2}, None, True),
        ({"data_parallel": 2}, 2, True),
        ({"data_parallel": 4, "tensor_parallel": 2}, 4, True),
    ],
)
def test_engine_arguments_of_each_parallel_form(more: dict[str, int], data: int | None, experts_parallel: bool) -> None:
    kwargs = builder.engine_kwargs(config(**more))
    assert kwargs.get("data_parallel_size") == data
    assert kwargs["enable_expert_parallel"] is experts_parallel
    assert kwargs["tensor_parallel_size"] == more.get("tensor_parallel", 1)
    assert not kwargs.keys() & {"data_parallel_rank", "data_parallel_address", "data_parallel_size_local"}, "the gang's"


def test_each_engine_of_a_gang_is_bound_to_its_own_cores() -> None:
    bound = builder.engine_env(config(data_parallel=2, tensor_parallel=2), range(8))[builder.CORES]
    assert bound == "0,1|2,3|4,5|6,7"
    assert [builder.rank_cores(bound, rank, 2) for rank in range(2)] == ["0,1|2,3", "4,5|6,7"]


def test_engines_on_a_gpu_run_the_model_runner_that_the_plugin_follows() -> None:
    assert builder.engine_env(config(accelerator="nvidia-h100"), range(2)) == {"VLLM_USE_V2_MODEL_RUNNER": "0"}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"data_parallel": 2, "expert_parallel": False}, r"spec\.parallelism\.expert.*set it to 2"),
        ({"data_parallel": 2, "pipeline_parallel": 2}, r"spec\.parallelism\.pipeline"),
        ({"engine_args": {"enable_dbo": True}}, r"spec\.engine\.extraArgs\.enable-dbo"),
    ],
)
def test_a_form_that_is_not_served_is_refused_by_field(more: dict[str, Any], field: str) -> None:
    with pytest.raises(builder.NotServable, match=field):
        builder.engine_kwargs(config(**more))
