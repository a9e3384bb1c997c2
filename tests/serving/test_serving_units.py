"""Small rules of serving: limits, digests, builder arguments, families."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.config import ServingConfig
from moe_serving.builder import NotServable, engine_env, engine_kwargs
from moe_serving.digest import Identity, Totals, build, coefficient_of_variation, max_over_mean
from moe_serving.engine_core import LimitRefused, Limits, check_limits
from moe_serving.tiny import FAMILIES, UnknownFamily, facts, family_of

CEILING = Limits(64, 2048)


@pytest.mark.parametrize(
    ("name", "wanted", "options", "refusal"),
    [
        ("inside", Limits(32, 1024), {}, None),
        ("at the ceiling", Limits(64, 2048), {}, None),
        ("one sequence", Limits(1, 1), {}, None),
        ("too many sequences", Limits(65, 2048), {}, "maxActiveSeqs 65"),
        ("none", Limits(0, 2048), {}, "maxActiveSeqs 0"),
        ("above the token ceiling", Limits(8, 4096), {}, "maxBatchedTokens 4096"),
        ("decodes would starve", Limits(32, 31), {}, "need 32 tokens"),
        ("running sequences would starve", Limits(2, 8), {"running": 9}, "need 9 tokens"),
        ("drafts count", Limits(32, 64), {"draft_tokens": 2}, "need 96 tokens"),
        ("prefills in chunks run side by side", Limits(8, 255), {"chunk": 32}, "need 256 tokens"),
        ("and have room", Limits(8, 256), {"chunk": 32}, None),
        ("chunks as large as a step run last", Limits(8, 8), {"chunk": 2048}, None),
        ("no more than the launch gave", Limits(64, 2048), {"chunk": 512}, None),
        ("a long prompt would wait for ever", Limits(8, 512), {"chunked_prefill": False, "longest": 1024}, "1024"),
    ],
)
def test_limits(name: str, wanted: Limits, options: dict[str, int], refusal: str | None) -> None:
    arguments = {"draft_tokens": 0, "chunked_prefill": True, "longest": 4096, **options}
    if refusal is None:
        assert check_limits(wanted, CEILING, **arguments) == wanted  # type: ignore[arg-type]
    else:
        with pytest.raises(LimitRefused, match=refusal):
            check_limits(wanted, CEILING, **arguments)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=64))
def test_imbalance_bounds(load: list[int]) -> None:
    ratio, spread = max_over_mean(load), coefficient_of_variation(load)
    if sum(load) == 0:
        assert ratio is None
        assert spread is None
    else:
        assert ratio is not None
        assert spread is not None
        assert 1.0 - 1e-9 <= ratio <= len(load) + 1e-9
        assert spread >= 0


def rank(demand: list[int], assigned: list[int], mine: list[int], moe_s: float) -> dict[str, object]:
    layer = {
        "layer": 2, "hooked": True, "demand": demand, "assigned": assigned, "mine": mine, "tokens": 4, "dropped": 0,
        "rerouted": 1, "overflow_kept": 0, "lost_gate_mass": 0.1, "max_prefill_load": 3,
    }  # fmt: skip
    return {
        "rank": 0, "knobs": '{"overflow":"Unlimited"}', "version": 4, "steps": 1, "prompt_tokens": 4,
        "generated_tokens": 1, "busy_s": moe_s * 2, "moe_s": moe_s, "layers": [layer],
    }  # fmt: skip


SCHEDULER = {
    "running": 0, "waiting": 0, "kv_usage": 0.0, "active_seqs": 8, "batched_tokens": 64,
    "ceiling_active_seqs": 8, "ceiling_batched_tokens": 64,
}  # fmt: skip


def test_digest_windows_are_differences_and_totals_are_not() -> None:
    who = Identity("r", "local", 0.0)

    def ranks(demand: list[int], assigned: list[int]) -> list[dict[str, object]]:
        return [rank(demand, assigned, [0, 1], 0.1), rank(demand, assigned, [2, 3], 0.3)]

    first, totals = build(who, 1.0, ranks([8, 0, 0, 0], [4, 4, 0, 0]), SCHEDULER, Totals())
    second, _ = build(who, 2.0, ranks([8, 0, 4, 4], [4, 4, 4, 4]), SCHEDULER, totals)
    layer = first.layers[0]
    assert (layer.rank_slots, layer.rank_max_over_mean, layer.expert_max_over_mean) == ((8, 0), 2.0, 4.0)
    layer = second.layers[0]
    assert (layer.slots_total, layer.window_slots, layer.rank_slots) == (16, 8, (0, 8))
    assert layer.hottest == ((0, 8), (2, 4), (3, 4))
    assert second.engine.rank_moe_s_total == (0.1, 0.3)
    assert second.seq == first.seq + 1


def test_ranks_are_bound_to_their_own_cores() -> None:
    config = ServingConfig(deployment="a/b", model="m", source="/m", tensor_parallel=2)
    assert engine_env(config, [0, 1])["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert engine_env(config, [1, 3, 4, 6])["VLLM_CPU_OMP_THREADS_BIND"] == "1,3|4,6"


def test_engine_arguments_never_trust_remote_code() -> None:
    config = ServingConfig(deployment="a/b", model="m", source="/m", tensor_parallel=2)
    assert engine_kwargs(config)["trust_remote_code"] is False
    assert engine_kwargs(config)["enable_expert_parallel"] is True
    with pytest.raises(NotServable, match=r"spec\.parallelism\.pipeline"):
        engine_kwargs(config.model_copy(update={"pipeline_parallel": 2}))


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("Qwen/Qwen3-235B-A22B-FP8", "qwen3_moe"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral"),
        ("deepseek-ai/DeepSeek-R1", "deepseek_v3"),
        ("deepseek-ai/DeepSeek-V2-Lite", "deepseek_v2"),
        ("qwen3_moe", "qwen3_moe"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next"),
        ("databricks/dbrx-instruct", "dbrx"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama4"),
        ("openai/gpt-oss-120b", "gpt_oss"),
        ("allenai/OLMoE-1B-7B-0924", "olmoe"),
    ],
)
def test_families_by_published_name(model: str, family: str) -> None:
    assert family_of(model) == family


def test_an_unknown_model_names_the_known_families() -> None:
    with pytest.raises(UnknownFamily, match="mixtral"):
        family_of("acme/unheard-of")
    with pytest.raises(UnknownFamily):
        facts("unheard-of")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_facts_match_the_configuration(family: str) -> None:
    row = FAMILIES[family]
    known = facts(family)
    config = {**row.config, **row.config.get("ffn_config", {})}
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    assert {config.get(name) for name in names} - {None} == {known.experts}
    assert {config.get(name) for name in ("num_experts_per_tok", "moe_top_k")} - {None} == {known.top_k}
    layers = config.get("num_hidden_layers", config.get("n_layers"))
    assert known.moe_layers == layers - config.get("first_k_dense_replace", 0)
    assert known.max_model_len == 4096
