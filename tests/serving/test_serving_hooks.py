"""What of vLLM the plugin hooks: a vLLM that differs is refused by name, and each MoE layer is hooked or bypassed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moe_core.wire import ExpertKnobs
from moe_serving import hooks
from moe_serving.hooks import Attributes, Parameters, UnsupportedVllm

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")


class Doctored:
    """A class as some other vLLM might have it."""

    def __init__(self) -> None:
        self.stored = 1

    def same(self, hidden_states: Any, *, input_ids: Any = None) -> None: ...

    def more(self, hidden_states: Any, extra: Any, *args: Any, **kwargs: Any) -> None: ...

    @property
    def seen(self) -> int:
        return 1


class Heir(Doctored):
    def __init__(self) -> None:
        super().__init__()
        self.own = 2


@pytest.fixture(autouse=True)
def other_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("other_vllm")
    vars(module).update(Doctored=Doctored, Heir=Heir)
    monkeypatch.setitem(sys.modules, "other_vllm", module)


@pytest.mark.parametrize(
    ("need", "difference"),
    [
        (Parameters("other_vllm:Doctored.same", ("self", "hidden_states", "*", "input_ids")), None),
        (Parameters("other_vllm:Doctored.more", ("self", "hidden_states"), more=True), None),
        (Attributes("other_vllm:Doctored", ("stored", "seen", "same")), None),
        (Attributes("other_vllm:Heir", ("stored", "own")), None),
        (
            Parameters("other_vllm:Doctored.same", ("self", "hidden_states", "input_ids")),
            r"Doctored\.same takes \(self, hidden_states, \*, input_ids\), expected \(self, hidden_states, input_ids\)",
        ),
        (
            Parameters("other_vllm:Doctored.more", ("self", "hidden_states")),
            r"takes \(self, hidden_states, extra, \*args, \*\*kwargs\), expected \(self, hidden_states\)",
        ),
        (
            Parameters("other_vllm:Doctored.more", ("self", "logits"), more=True),
            r"takes \(self, hidden_states, .* expected \(self, logits, \.\.\.\)",
        ),
        (Parameters("other_vllm:Doctored.gone", ("self",)), r"other_vllm:Doctored\.gone is missing"),
        (Parameters("other_vllm_gone:Doctored.same", ("self",)), "other_vllm_gone:Doctored.same is missing"),
        (Attributes("other_vllm:Doctored", ("stored", "own")), "other_vllm:Doctored has no attribute own"),
    ],
)
def test_what_differs_is_named(need: hooks.Need, difference: str | None) -> None:
    if difference is None:
        hooks.check([need], "9.9")
        return
    with pytest.raises(UnsupportedVllm, match=difference) as refused:
        hooks.check([need], "9.9")
    assert "vLLM 9.9" in str(refused.value)
    assert hooks.SUPPORTED in str(refused.value)


def test_all_differences_are_listed_at_once() -> None:
    needs = [Parameters("other_vllm:Doctored.gone", ("self",)), Attributes("other_vllm:Doctored", ("lost",))]
    with pytest.raises(UnsupportedVllm, match=r"Doctored\.gone.*no attribute lost"):
        hooks.check(needs, "9.9")


def test_the_installed_vllm_is_one_that_we_know() -> None:
    import vllm

    hooks.check((*hooks.ENGINE, *hooks.ENGINE_CPU, *hooks.WORKER, *hooks.WORKER_CPU), vllm.__version__)


def test_a_hooked_function_still_shows_its_own_signature() -> None:
    from moe_serving.plugin import wrap_once

    class Local(Doctored):
        def same(self, hidden_states: Any, *, input_ids: Any = None) -> None: ...

    def loosen(original: Any) -> Any:
        def anything(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        return anything

    wrap_once(Local, "same", loosen)
    hooks.check_parameters(Local, "same", ("self", "hidden_states", "*", "input_ids"), "9.9")
    with pytest.raises(UnsupportedVllm, match=r"Local\.same takes"):
        hooks.check_parameters(Local, "same", ("self", "hidden_states"), "9.9")


def test_a_router_class_of_another_signature_is_refused_when_it_is_built() -> None:
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    import moe_serving.worker  # noqa: F401  (hooks the routers)

    class OtherRouter(BaseRouter):
        @property
        def routing_method_type(self) -> Any: ...

        def _compute_routing(self, hidden_states: Any, router_logits: Any) -> Any: ...

    with pytest.raises(UnsupportedVllm, match=r"OtherRouter\._compute_routing takes \(self, hidden_states, router"):
        OtherRouter(2, 8)


class Kernel:
    """A kernel of some quantised checkpoint."""


def moe(name: str, router: Any, *, monolithic: bool = False, kernel: Any = None) -> Any:
    module = torch.nn.Module()
    module.router, module.layer_name = router, name
    config = SimpleNamespace(num_experts=8, experts_per_token=2, is_sequence_parallel=False)
    quant_method = SimpleNamespace(is_monolithic=monolithic, moe_kernel=SimpleNamespace(fused_experts=kernel))
    module.routed_experts = SimpleNamespace(quant_method=quant_method, expert_map=None, moe_config=config)
    return module


def test_every_layer_says_whether_it_is_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    from moe_serving import worker
    from moe_serving.rank import KnobsRefused, Rank

    rank = Rank()
    monkeypatch.setattr(worker, "RANK", rank)
    ours, zen = (object.__new__(CPUUnquantizedExperts) for _ in range(2))
    ours._use_zentorch, zen._use_zentorch = False, True
    table = torch.zeros(10, 2, dtype=torch.int32)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(
        [
            moe("model.layers.3.mlp.experts", CPURouter(2, 8), kernel=ours),
            moe("model.layers.4.mlp.experts", CPURouter(2, 8), kernel=Kernel()),
            moe("model.layers.5.mlp.experts", CPURouter(2, 8), kernel=zen),
            moe("model.layers.6.mlp.experts", CPURouter(2, 8), monolithic=True, kernel=ours),
            moe("model.layers.7.mlp.experts", SimpleNamespace(), kernel=ours),
            moe(
                "model.layers.8.mlp.experts",
                CPURouter(2, 8, scoring_func="sqrtsoftplus", hash_indices_table=table),
                kernel=ours,
            ),
        ]
    )
    worker.number_layers(model)
    worker.number_layers(model)  # changes nothing
    rows = worker.WorkerExtension.moestack_start(
        SimpleNamespace(
            model_runner=object.__new__(worker.GPUModelRunner), model_config=SimpleNamespace(get_num_experts=lambda: 8)
        )
    )
    assert [(row["layer"], row["hooked"], row["why"]) for row in rows] == [
        (3, True, ""),
        (4, True, "kernel Kernel takes no dropped slots"),
        (5, True, "zentorch's kernel takes no dropped slots"),
        (6, False, "monolithic kernel of SimpleNamespace"),
        (7, False, "router class SimpleNamespace computes no routing of its own"),
        (8, True, "hash-routed: experts follow the token id, not a score"),
    ]
    reroute = ExpertKnobs.model_validate({"overflow": "Reroute", "capacityFactorPrefill": "1.25"})
    for layer in rank.layers[1:]:
        alone = Rank(layers=[layer])
        with pytest.raises(KnobsRefused, match=layer.name):
            alone.apply(reroute, 1)
        alone.apply(ExpertKnobs(), 2)
    Rank(layers=rank.layers[:1]).apply(reroute, 1)


class OtherRunner:
    """A model runner that is not vLLM's first one."""


def test_an_engine_whose_steps_are_not_seen_refuses_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    from moe_serving import worker
    from moe_serving.rank import Rank

    ours = object.__new__(CPUUnquantizedExperts)
    ours._use_zentorch = False
    hooked = torch.nn.Module()
    hooked.experts = moe("model.layers.0.mlp.experts", CPURouter(2, 8), kernel=ours)
    config = SimpleNamespace(get_num_experts=lambda: 8, get_num_experts_per_tok=lambda: 2)
    reroute = '{"overflow": "Reroute", "capacityFactorPrefill": "1.25"}'
    for runner, model, why in (
        (OtherRunner(), hooked, "OtherRunner is not hooked; VLLM_USE_V2_MODEL_RUNNER=0 selects one that is"),
        (object.__new__(worker.GPUModelRunner), torch.nn.Module(), "no layer of Module passes vLLM's routers"),
    ):
        monkeypatch.setattr(worker, "RANK", Rank())
        monkeypatch.setattr(worker, "get_tp_group", lambda: SimpleNamespace(cpu_group=None, world_size=1))
        engine = SimpleNamespace(model_runner=runner, model_config=config, get_model=lambda model=model: model, rank=0)
        answer = worker.WorkerExtension.moestack_apply(engine, reroute, 1)
        assert why in answer["error"]
        (row,) = worker.WorkerExtension.moestack_start(engine)
        assert (row["hooked"], row["experts"], row["top_k"]) == (False, 8, 2)
        assert why in row["why"]


def test_dbrx_experts_are_found_where_this_vllm_keeps_them() -> None:
    from moe_serving.mends import find_dbrx_experts

    class Model:
        def __init__(self, *names: str) -> None:
            self.names = names

        def named_parameters(self) -> list[tuple[str, int]]:
            return [(name, 0) for name in self.names]

        @find_dbrx_experts
        def load_weights(self, weights: Any) -> list[str]:
            return [name for name, _ in weights]

    published = [("blocks.0.ffn.experts.mlp.w1", 1), ("blocks.0.ffn.router.layer.weight", 2), ("wte.weight", 3)]
    assert Model("blocks.0.ffn.experts.routed_experts.w13_weight").load_weights(published) == [
        "blocks.0.ffn.experts.routed_experts.mlp.w1",
        "blocks.0.ffn.router.layer.weight",
        "wte.weight",
    ]
    assert Model("blocks.0.ffn.experts.w13_weight").load_weights(published) == [name for name, _ in published]
