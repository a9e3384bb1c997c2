"""Tiny random checkpoints, one for each model family, so that the real engine runs anywhere.

A tiny checkpoint keeps its family's architecture, routing and number of experts per token, and shrinks the rest to
a few MB. Weights are random (seeded), the tokenizer is byte-level, so the text is noise and the machinery is real.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 4
"""Part of a checkpoint's cache key: raise it when what is written changes."""

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ p.get('text', '') }}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class UnknownFamily(ValueError):
    """No tiny checkpoint is known for this model."""


@dataclass(frozen=True)
class TinyFacts:
    """What a tiny checkpoint is made of."""

    family: str
    experts: int
    top_k: int
    moe_layers: int
    max_model_len: int


@dataclass(frozen=True)
class _Family:
    """`patterns` are matched against a lower-case model id; `config` goes to the transformers config class."""

    config_class: str
    patterns: tuple[str, ...]
    experts: int
    top_k: int
    moe_layers: int
    config: Mapping[str, Any]


_BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 64,
    # vLLM's MLA kernel for CPUs is compiled for these two, those of the published models.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    # Published ones stretch their positions; without that vLLM takes another class for them, whose CPU kernel is wrong.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}

FAMILIES: Mapping[str, _Family] = {
    "qwen3_moe": _Family(
        "Qwen3MoeConfig",
        ("qwen3-235b", "qwen3-30b", "qwen3-coder", "qwen3-moe", "qwen3moe"),
        16,
        4,
        4,
        {
            **_BASE,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "head_dim": 32,
        },
    ),
    "qwen2_moe": _Family(
        "Qwen2MoeConfig",
        ("qwen2-57b", "qwen1.5-moe", "qwen2-moe"),
        16,
        4,
        4,
        {
            **_BASE,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "qwen3_next": _Family(
        "Qwen3NextConfig",
        ("qwen3-next", "qwen3_next"),
        16,
        4,
        4,
        {
            **_BASE,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "head_dim": 32,
            # vLLM's kernel of linear attention for CPUs knows the published size alone.
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "mixtral": _Family(
        "MixtralConfig",
        ("mixtral",),
        8,
        2,
        4,
        {**_BASE, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None, "head_dim": 32},
    ),
    "dbrx": _Family(
        "DbrxConfig",
        ("dbrx",),
        16,
        4,
        3,
        {
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 4096,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 16, "moe_top_k": 4, "hidden_size": 128},
            "tie_word_embeddings": False,
        },
    ),
    "deepseek_v2": _Family(
        "DeepseekV2Config",
        ("deepseek-v2",),
        16,
        4,
        3,
        {
            **_BASE,
            **_MLA,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.0,
        },
    ),
    "deepseek_v3": _Family(
        "DeepseekV3Config",
        ("deepseek-v3", "deepseek-r1", "kimi-k2"),
        16,
        4,
        3,
        {
            **_BASE,
            **_MLA,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            # What published checkpoints say in their own config.json: vLLM asks for both.
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "num_mtp_layers": 0,
        },
    ),
    "llama4": _Family(
        "Llama4TextConfig",
        ("llama-4", "llama4"),
        16,
        1,
        4,
        {
            **_BASE,
            "intermediate_size": 64,
            "intermediate_size_mlp": 256,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "head_dim": 32,
        },
    ),
    "gpt_oss": _Family(
        "GptOssConfig",
        ("gpt-oss", "gpt_oss"),
        16,
        4,
        4,
        {
            **_BASE,
            "intermediate_size": 64,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "head_dim": 32,
            "sliding_window": 128,
        },
    ),
    "olmoe": _Family("OlmoeConfig", ("olmoe",), 16, 4, 4, {**_BASE, "num_experts": 16, "num_experts_per_tok": 4}),
    "granitemoe": _Family(
        "GraniteMoeConfig",
        ("granite",),
        16,
        4,
        4,
        {**_BASE, "num_local_experts": 16, "num_experts_per_tok": 4},
    ),
}


def family_of(model_id: str) -> str:
    """The family of a published model id, e.g. Qwen/Qwen3-235B-A22B-FP8 → qwen3_moe. Raises UnknownFamily."""
    wanted = model_id.lower()
    if wanted in FAMILIES:
        return wanted
    for name, family in FAMILIES.items():
        if any(pattern in wanted for pattern in family.patterns):
            return name
    raise UnknownFamily(
        f"no tiny checkpoint is known for {model_id!r}; families with one: {', '.join(sorted(FAMILIES))}"
    )


def facts(family: str) -> TinyFacts:
    """Shape of a family's tiny checkpoint, without making it."""
    if family not in FAMILIES:
        raise UnknownFamily(f"no family {family!r}; families with a tiny checkpoint: {', '.join(sorted(FAMILIES))}")
    row = FAMILIES[family]
    longest = row.config.get("max_position_embeddings") or row.config["max_seq_len"]
    return TinyFacts(family, row.experts, row.top_k, row.moe_layers, int(longest))


@dataclass(frozen=True)
class Skew:
    """A router biased to a few experts: every token is pushed towards `hot` by about `strength` logits."""

    hot: tuple[int, ...]
    strength: float


def cached_checkpoint(family: str, seed: int = 0, skew: Skew | None = None, **overrides: Any) -> Path:
    """The family's checkpoint in the user's cache, made on first use. `overrides` change its configuration."""
    what = [FORMAT, family, seed, None if skew is None else [skew.hot, skew.strength], overrides]
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moestack" / "tiny"
    path = root / f"{family}-{key}"
    if not (path / "config.json").is_file():
        make_checkpoint(family, path, seed, skew, **overrides)
    return path


def make_checkpoint(family: str, path: Path, seed: int = 0, skew: Skew | None = None, **overrides: Any) -> TinyFacts:
    """Write a family's tiny checkpoint to `path` (replaced as a whole, so that a stop half-way leaves none)."""
    known = facts(family)
    import torch
    import transformers

    row = FAMILIES[family]
    tokenizer = _byte_tokenizer()
    config = getattr(transformers, row.config_class)(
        **{
            **row.config,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **overrides,
        }
    )
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # The default spread of 0.02 makes nearly flat logits: greedy text would hang on rounding.
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.4 if "embed" in name or "lm_head" in name else 0.12)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    # At zero it would correct nothing.
                    buffer.normal_(0.0, 0.1)
            if skew is not None:
                _bias_router(model, skew)
    finally:
        torch.random.set_rng_state(generator_state)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    shutil.rmtree(path, ignore_errors=True)
    try:
        staging.rename(path)
    except OSError:
        # Another process made the same checkpoint first: same seed, same content.
        shutil.rmtree(staging, ignore_errors=True)
    return known


def _bias_router(model: Any, skew: Skew) -> None:
    """Give all embeddings a common direction, and let the gates of hot experts answer to it.

    A constant in the residual stream survives normalisation, so the push is about the same for every token.
    """
    import torch

    embedding = model.get_input_embeddings().weight
    hidden = embedding.shape[1]
    direction = torch.ones(hidden) / hidden**0.5
    embedding += direction * 4.0 * hidden**0.5 * embedding.std()
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            # What layers add would drown the constant.
            parameter.mul_(0.1)
        if name.endswith(("gate.weight", "router.weight", "router.layer.weight")) and parameter.shape[-1] == hidden:
            parameter.sub_(parameter.mean(-1, keepdim=True))
            parameter[list(skew.hot)] += direction * skew.strength / hidden**0.5


def _byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes and three marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
