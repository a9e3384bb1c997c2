"""Weights by part: what a rank holds, what a token meets, and parts that small models would hide."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_planner import weights
from moe_planner.catalog import packaged
from moe_planner.weights import Layout

MODELS, FORMS = packaged().models, packaged().precisions
KEYS = sorted(MODELS)


@pytest.mark.parametrize("key", KEYS)
def test_a_token_meets_what_the_card_says(key: str) -> None:
    """Cards round, and some leave embeddings out: gpt-oss says 3.6B and 5.1B without them, GLM and V2-Lite alike."""
    facts = MODELS[key]
    active = weights.active_params(facts) / 1e9
    embeddings = facts.vocab * facts.hidden * (1 if facts.tied_embeddings else 2) / 1e9
    assert active - embeddings <= facts.active_params_b * 1.05
    assert facts.active_params_b <= active * 1.06


# (model, part, parameters), counted by hand from the published shapes.
BY_HAND: dict[str, tuple[str, str, int]] = {
    "Qwen3: a norm of 128 for queries and one for keys": ("qwen3-235b-a22b", "norms", 94 * (2 * 4096 + 256) + 4096),
    "MiniMax M2: a norm over all heads": ("minimax-m2", "norms", 62 * (2 * 3072 + (48 + 8) * 128) + 3072),
    "V3: a correction for each expert": ("deepseek-v3", "router", 58 * (7168 * 256 + 256)),
    "V3.2: an indexer of 64 heads of 128": (
        "deepseek-v3.2", "indexer", 61 * (1536 * 64 * 128 + 7168 * 64 + 7168 * 128)),
    "gpt-oss: biases of experts": ("gpt-oss-120b", "expert biases", 36 * 128 * (2 * 2880 + 2880)),
    "Qwen2-MoE: a gate on the shared expert": ("qwen2-57b-a14b", "router", 28 * 3584 * (64 + 1)),
    "ERNIE: embeddings that are the head too": ("ernie-4.5-21b-a3b", "embeddings", 103_424 * 2560),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_parts_counted_by_hand(name: str) -> None:
    key, part, params = BY_HAND[name]
    assert {each.name: each.params for each in weights.parts(MODELS[key])}[part] == params


# Whole models whose attention stands under others, against what was counted elsewhere.
WHOLE = {
    "Grok-2: tensors of its checkpoint (xai-org/grok-2, discussion 24)": ("grok-2", 269_515_497_472),
    "Gemma 4: as transformers 5.19 builds Gemma4ForCausalLM": ("gemma-4-26b-a4b", 25_233_141_760),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_to_the_parameter(name: str) -> None:
    key, params = WHOLE[name]
    assert weights.total_params(MODELS[key]) == params


def test_tied_embeddings_have_no_head() -> None:
    names = [part.name for part in weights.parts(MODELS["ernie-4.5-21b-a3b"])]
    assert "head" not in names
    assert "head" in [part.name for part in weights.parts(replace(MODELS["ernie-4.5-21b-a3b"], tied_embeddings=False))]


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(KEYS),
    form=st.sampled_from(sorted(FORMS)),
    tensor=st.sampled_from([1, 2, 4, 8]),
    data=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 3, 4]),
    spread=st.booleans(),
)
def test_a_larger_group_never_holds_more(
    key: str, form: str, tensor: int, data: int, pipeline: int, spread: bool
) -> None:
    """More tensor ranks, data ranks or stages never put more on the fullest GPU."""

    def held(t: int, d: int, p: int) -> float:
        return weights.gpu_bytes(MODELS[key], FORMS[form], Layout(t, d, t * d if spread else 1, p))

    base = held(tensor, data, pipeline)
    assert 0 < base <= weights.total_bytes(MODELS[key], FORMS[form])
    for more in (held(2 * tensor, data, pipeline), held(tensor, 2 * data, pipeline), held(tensor, data, 2 * pipeline)):
        assert more <= base * (1 + 1e-12)


@settings(max_examples=30, deadline=None)
@given(key=st.sampled_from(KEYS))
def test_fewer_bits_are_fewer_bytes(key: str) -> None:
    sizes = [weights.total_bytes(MODELS[key], FORMS[form]) for form in ("fp32", "bf16", "fp8", "awq")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 2 * sizes[1] == 4 * weights.total_params(MODELS[key])
