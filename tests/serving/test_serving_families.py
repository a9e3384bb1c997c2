"""Routing of every model family: what `scores` and `weights` say equals what vLLM's own routers do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_serving.scores import Routing, UnknownRouting, routing_of, scores, weights

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")

MODELS = Path(vllm.__file__).parent / "model_executor" / "models"
TOKENS = 64

GROUPED = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
V3 = {**GROUPED, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "renormalize": True}

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "mixtral": (8, 2, {"renormalize": True}),
    "dbrx": (16, 4, {"renormalize": True}),
    "granitemoe": (32, 8, {"renormalize": True}),
    "deepseek_v2": (160, 6, {**GROUPED, "renormalize": False, "routed_scaling_factor": 16.0}),
    "deepseek_v2_lite": (
        64,
        6,
        {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1, "renormalize": False},
    ),
    "deepseek_v2 renormalised": (160, 6, {**GROUPED, "renormalize": True, "routed_scaling_factor": 1.0}),
    "deepseek_v3": (256, 8, {**V3, "bias": True}),
    "deepseek_v3 without bias": (256, 8, V3),
    "deepseek_v3 not renormalised": (256, 8, {**V3, "renormalize": False, "bias": True}),
    "kimi_k2, one group": (384, 8, {**V3, "num_expert_group": 1, "topk_group": 1, "bias": True}),
    "qwen2_moe": (60, 4, {"renormalize": False}),
    "qwen3_moe": (128, 8, {"renormalize": True}),
    "qwen3_next": (512, 10, {"renormalize": True}),
    "llama4 scout": (16, 1, {"renormalize": False, "custom": "llama4"}),
    "llama4, two experts": (16, 2, {"renormalize": False, "custom": "llama4"}),
    "gpt_oss": (128, 4, {"renormalize": True}),
    "olmoe": (64, 8, {"renormalize": False}),
    "cohere2_moe": (64, 8, {"renormalize": True, "custom": "cohere2_moe"}),
    "deepseek_v4": (256, 6, {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "bias": True}),
    "plain, with a bias and a scale that its branch ignores": (64, 8, {"routed_scaling_factor": 2.0, "bias": True}),
    "k = E": (8, 8, {"renormalize": True}),
}


def arguments(experts: int, k: int, options: dict[str, Any]) -> dict[str, Any]:
    from vllm.model_executor.models import cohere2_moe, llama4

    functions = {
        "llama4": llama4.Llama4MoE.custom_routing_function,
        "cohere2_moe": cohere2_moe.token_choice_with_bias,
    }
    options = dict(options)
    if options.pop("bias", False):
        options["e_score_correction_bias"] = torch.randn(experts, generator=torch.Generator().manual_seed(1)) * 0.2
    if custom := options.pop("custom", None):
        options["custom_routing_function"] = functions[custom]
    return {"top_k": k, "global_num_experts": experts, **options}


def batches(experts: int) -> Iterator[Any]:
    for seed, spread in enumerate((0.05, 1.0, 1.0, 4.0, 12.0)):
        yield torch.randn(TOKENS, experts, generator=torch.Generator().manual_seed(seed)) * spread


def agree(router: Any, experts: int, k: int) -> None:
    """Plain top-k of our scores against the router's own choice, and its weights against ours."""
    routing = routing_of(router)
    for logits in batches(experts):
        with torch.compiler.set_stance("force_eager"):
            theirs, ids = router._compute_routing(torch.zeros(TOKENS, 8), logits.clone(), None)
        ids = ids.long()
        ours = scores(routing, logits)
        selection = ours.selection
        if ours.allowed is not None:
            selection = selection.masked_fill(~ours.allowed, -torch.inf)
            assert int(ours.allowed.sum(1).max()) == experts // routing.groups * routing.groups_per_token
        best = selection.topk(k, dim=-1)
        # Scores decide; where two experts share a score, either is right.
        assert torch.equal(best.values, selection.gather(1, ids).sort(1, descending=True).values)
        untied = (selection.sort(1).values.diff(dim=1) > 0).all(1)
        assert torch.equal(best.indices.sort(1).values[untied], ids.sort(1).values[untied])
        torch.testing.assert_close(weights(routing, ours.gate, ids), theirs.float(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_routing_as_the_cpu_router_does_it(case: str) -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    experts, k, options = CASES[case]
    agree(CPURouter(**arguments(experts, k, options)), experts, k)


@pytest.mark.parametrize("case", [case for case, row in CASES.items() if "use_grouped_topk" in row[2]])
def test_routing_as_the_grouped_router_does_it(case: str) -> None:
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

    experts, k, options = CASES[case]
    options = {name: value for name, value in arguments(experts, k, options).items() if name != "use_grouped_topk"}
    agree(GroupedTopKRouter(**options), experts, k)


@pytest.mark.parametrize(
    ("experts", "k", "options"),
    [
        (256, 4, {"scoring_func": "sigmoid", "renormalize": True, "routed_scaling_factor": 2.5}),
        (256, 4, {"scoring_func": "sigmoid", "renormalize": False}),
        (64, 8, {"scoring_func": "softmax", "renormalize": True, "routed_scaling_factor": 2.0}),
        (64, 8, {"scoring_func": "softmax", "renormalize": False}),
    ],
)
def test_routing_as_the_biased_router_does_it(
    experts: int, k: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.fused_moe.router import fused_topk_bias_router as module

    # Its kernels need a GPU; beside them it has the same rule in plain torch, which this flag leads to.
    monkeypatch.setattr(module.rocm_aiter_ops, "is_fused_moe_enabled", lambda: True)
    agree(module.FusedTopKBiasRouter(**arguments(experts, k, {**options, "bias": True})), experts, k)


@pytest.mark.parametrize("bias", [False, True])
def test_groups_that_do_not_divide_the_experts_are_no_groups(bias: bool) -> None:
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

    options = {"num_expert_group": 3, "topk_group": 2, "scoring_func": "sigmoid", "routed_scaling_factor": 2.0}
    routing = routing_of(GroupedTopKRouter(**arguments(16, 4, {**options, "bias": bias})))
    assert routing.groups == 1
    assert (routing.scoring, routing.scaling) == (("sigmoid", 2.0) if bias else ("softmax", 1.0))


@pytest.mark.parametrize("case", ["llama4 scout", "cohere2_moe"])
def test_routing_as_the_custom_router_does_it(case: str) -> None:
    from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter

    experts, k, options = CASES[case]
    agree(CustomRoutingRouter(**arguments(experts, k, options)), experts, k)


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_gpu_router_of_plain_families_is_read_as_the_cpu_one(renormalize: bool) -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

    plain = arguments(64, 8, {"renormalize": renormalize})
    assert routing_of(FusedTopKRouter(**plain)) == routing_of(CPURouter(**plain)) == Routing("softmax", renormalize)


def test_a_hash_routed_layer_is_counted_only() -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter

    table = torch.zeros(100, 6, dtype=torch.int32)
    for kind in (CPURouter, FusedTopKBiasRouter):
        with pytest.raises(UnknownRouting, match="hash-routed"):
            routing_of(kind(6, 256, scoring_func="sqrtsoftplus", hash_indices_table=table))


def test_other_routers_are_refused_by_name() -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
    from vllm.model_executor.models.phimoe import phimoe_routing_function

    bias = torch.zeros(16)
    for router, reason in (
        (SimpleNamespace(), "router class SimpleNamespace; known are CPURouter"),
        (CPURouter(2, 16, custom_routing_function=phimoe_routing_function), "phimoe.phimoe_routing_function"),
        (CPURouter(2, 16, scoring_func="sigmoid"), "scoring 'sigmoid' and no groups"),
        (FusedTopKBiasRouter(2, 16, bias, num_fused_shared_experts=1), "shared experts"),
        (GroupedTopKRouter(2, 16, 4, 2, num_fused_shared_experts=1), "shared experts"),
        (FusedTopKBiasRouter(2, 16, bias, bias_vl=bias), "image tokens"),
        (FusedTopKBiasRouter(2, 16, bias, scoring_func="tanh"), "scoring 'tanh'"),
    ):
        with pytest.raises(UnknownRouting, match=reason):
            routing_of(router)


ROUTING_ARGUMENTS = {
    "renormalize", "use_grouped_topk", "num_expert_group", "topk_group", "scoring_func", "routed_scaling_factor",
    "e_score_correction_bias", "custom_routing_function", "apply_router_weight_on_input", "router", "zero_expert_type",
    "hash_indices_table", "apply_routed_scale_to_output", "bias_vl",
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "want"),
    [
        ("mixtral", {"renormalize": "True"}),
        ("dbrx", {"renormalize": "True"}),
        ("granitemoe", {"renormalize": "True"}),
        (
            "deepseek_v2",
            {
                "renormalize": "config.norm_topk_prob",
                "use_grouped_topk": "True",
                "num_expert_group": "getattr(config, 'n_group', 1)",
                "topk_group": "getattr(config, 'topk_group', 1)",
                "scoring_func": "getattr(config, 'scoring_func', 'softmax')",
                "routed_scaling_factor": "self.routed_scaling_factor",
                "apply_routed_scale_to_output": "apply_routed_scale_to_output",
                "e_score_correction_bias": "self.gate.e_score_correction_bias",
            },
        ),
        ("qwen2_moe", {"renormalize": "config.norm_topk_prob"}),
        ("qwen3_moe", {"renormalize": "config.norm_topk_prob"}),
        ("qwen3_next", {"renormalize": "getattr(config, 'norm_topk_prob', True)"}),
        (
            "llama4",
            {
                "renormalize": "False",
                "custom_routing_function": "Llama4MoE.custom_routing_function",
                "apply_router_weight_on_input": "True",
            },
        ),
        ("gpt_oss", {"renormalize": "True", "apply_router_weight_on_input": "False"}),
        ("olmoe", {"renormalize": "False"}),
    ],
)
def test_models_ask_for_the_routing_that_the_cases_try(model: str, want: dict[str, str]) -> None:
    tree = ast.parse((MODELS / f"{model}.py").read_text())
    calls = [
        {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg in ROUTING_ARGUMENTS}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "FusedMoEFactory"
    ]
    assert calls == [want]
