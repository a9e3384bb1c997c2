"""A model's facts from the config.json of its checkpoint, for the families of mixture-of-experts models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moe_planner import config_grouped, config_hybrid, config_latent, weights
from moe_planner.catalog import CatalogInvalid, Figure, ModelFacts
from moe_planner.checkpoint_form import native_form
from moe_planner.config_keys import Keys

READERS: Mapping[str, Callable[[Keys], dict[str, Any]]] = {
    **config_grouped.READERS,
    **config_hybrid.READERS,
    **config_latent.READERS,
}
"""By `model_type`, of `text_config` where a file has one."""

DENSE = """bloom cohere cohere2 falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_neox granite llama mistral olmo olmo2
 phi phi3 qwen2 qwen3 smollm3 starcoder2"""
"""Families without experts that people try."""


def read(text: str, name: str) -> ModelFacts:
    """The facts of the model `name` from the text of its config.json. Raises CatalogInvalid, which names the field.

    Parameters are counted from the shapes. A vision or audio tower and layers that only speculate are left out.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise CatalogInvalid(f"{name}: config.json", f"is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise CatalogInvalid(f"{name}: config.json", "is no object: give the file of a checkpoint")
    keys = Keys(document, name)
    inner = keys.nested("text_config", "llm_config", "language_config")
    if inner is not keys:
        inner.adopt("tie_word_embeddings", keys)
    kind = inner.text("model_type", default="") or keys.text("model_type")
    values = _reader(kind, inner)(inner)
    if values["experts"] < 2:
        raise CatalogInvalid(f"{name}: model_type", f"{kind} has no experts here: dense models are not placed")
    if not 1 <= values["topk"] <= values["experts"]:
        raise CatalogInvalid(f"{name}: experts per token", f"{values['topk']} of {values['experts']} cannot be")
    if not 0 <= values["dense_layers"] < values["layers"]:
        raise CatalogInvalid(
            f"{name}: dense layers", f"{values['dense_layers']} of {values['layers']} leave no experts"
        )
    inner.all_read()
    _one_head(keys, inner)
    values["native"] = native_form(keys, inner)
    source = f"config.json of {name}"
    figures = {field: Figure(value, source, None) for field, value in values.items()}
    facts = ModelFacts(key=name, total_params_b=0.0, active_params_b=0.0, figures=figures, **values)
    total, active = weights.total_params(facts) / 1e9, weights.active_params(facts) / 1e9
    counted = {"total_params_b": Figure(total, source, None), "active_params_b": Figure(active, source, None)}
    return replace(facts, total_params_b=total, active_params_b=active, figures={**figures, **counted})


def _reader(kind: str, keys: Keys) -> Callable[[Keys], dict[str, Any]]:
    if kind in READERS:
        return READERS[kind]
    if kind in DENSE.split():
        raise CatalogInvalid(
            f"{keys.name}: model_type", f"{kind} is a dense model: only models with experts are placed"
        )
    raise CatalogInvalid(
        f"{keys.name}: model_type",
        f"{kind} is not known: one of {', '.join(sorted(READERS))}; or write the model's entry in a catalog file",
    )


def _one_head(keys: Keys, inner: Keys) -> None:
    """A file with a text model inside may say twice whether embeddings are the head too: not in two ways."""
    name = "tie_word_embeddings"
    if inner is not keys and keys.has(name) and keys.flag(name) != inner.flag(name):
        raise keys.wrong(name, "is not what the text model says, or should: write the same in both")
