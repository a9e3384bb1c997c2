"""Typed look-ups in a config.json, so that what is missing or of the wrong kind is named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moe_planner.catalog import CatalogInvalid

LARGEST = 10**9
"""No dimension of a model is larger; what is would only overflow later."""


DEPTHS = frozenset({"num_hidden_layers", "n_layers", "num_layers"})
DEEPEST = 10_000
"""No model has more layers; readers look at each."""

SHAPES = re.compile(
    r"(_|^)(hidden|intermediate|inner|latent|ffn)_(size|dim)|_lora_rank|_expert|expert_|shared_|residual|"
    r"(_|^)(mamba|ssm|conv|kda|linear|mla|attn|attention|moe|swa|index)_|_heads|_layers|_gate|(_|^)gating|_norm$|_bias$|"
    r"_pattern$|per_layer|hyper|(_|^)hc_|ngram|bottleneck"
)
"""Keys that may tell of shapes."""

HARMLESS = re.compile(
    r"router|dropout|scal|alpha|beta|theta|capacity|aux|loss|jitter|norm_topk|topk_group|n_group|group_limited|dtype|"
    r"implementation|chunk|init|cache|kernels|stop_grad|rope|rotary|temperature|nextn|mtp|capacity|gate_logit|"
    r"score|multiplier|residual_in_fp32|prenorm_residual|temp|tuning|floor|^num_hidden_layers$|"
    r"max_window_layers|sliding_window|index_topk|combine|lower_bound|norm_min|num_expert_group|"
    r"renorm|overlap|^intermediate_size(_mlp)?$|apply_router|moe_backend|expert_parallel|quant|_hidden_act|_act$|_fn$|_func$|position"
)
"""Of those, the keys that change no size: how a router weighs, what training does, where a window lies."""


class Keys:
    """The keys of one object in a config.json of the model `name`; `prefix` leads to it. Remembers what was read."""

    def __init__(self, values: Mapping[str, Any], name: str, prefix: str = "") -> None:
        self._values, self.name, self._prefix = values, name, prefix
        self._read: set[str] = set()

    def all_read(self) -> None:
        """Raises CatalogInvalid where the object tells of shapes that nobody asked for: they would be left out."""
        for name, value in self._values.items():
            told = value not in (None, False, 0, "", [], {}) and not isinstance(value, dict)
            if told and name not in self._read and SHAPES.search(name) and not HARMLESS.search(name):
                raise self.wrong(
                    name, f"{str(value)[:40]} is not counted for this family: write the model's entry by hand"
                )

    def also(self, *names: str) -> None:
        """These keys say again what others said."""
        self._read.update(names)

    def adopt(self, name: str, outer: Keys) -> None:
        """Takes a key from the object around this one, where this one has none."""
        if self._values.get(name) is None and outer.has(name):
            self._values = {**self._values, name: outer._get(name)}

    def is_list(self, name: str) -> bool:
        return isinstance(self._values.get(name), list)

    def is_text(self, name: str) -> bool:
        return isinstance(self._get(name), str)

    def names(self) -> list[str]:
        """The keys of this object."""
        return list(self._values)

    def has(self, name: str) -> bool:
        return self._get(name) is not None

    def _get(self, name: str) -> Any:
        self._read.add(name)
        return self._values.get(name)

    def nested(self, *names: str) -> Keys:
        """The first of these objects that is there; with one name it must be, with several this one stands in."""
        for name in names:
            if (found := self._get(name)) is not None:
                if not isinstance(found, dict):
                    raise self.wrong(name, "is no object")
                return Keys(found, self.name, f"{self._prefix}{name}.")
        if len(names) == 1:
            raise self.wrong(names[0], "is missing")
        return self

    def optional(self, name: str) -> Keys | None:
        """The object of that name; None where there is none."""
        return None if self._get(name) is None else self.nested(name)

    def whole(self, *names: str, default: int | None = None, least: int = 1, null: int | None = None) -> int:
        """The first of these numbers that is there. Lists with one value for all layers count as that value.

        `null`: what an explicit null means, which for many keys is not what a missing key means.
        """
        for name in names:
            value = self._get(name)
            if value is None and null is not None and name in self._values:
                return null
            if isinstance(value, list) and value and all(item == value[0] for item in value):
                value = value[0]
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise self.wrong(name, f"must be a whole number, the same for all layers; it is {str(value)[:40]}")
            most = DEEPEST if name in DEPTHS else LARGEST
            if not least <= value <= most:
                raise self.wrong(name, f"must be {least} to {most}; it is {value}")
            return value
        if default is None:
            raise self.wrong(names[0], "is missing")
        return default

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name)
        if value is None:
            value = default
        if not isinstance(value, str):
            raise self.wrong(name, "is missing" if value is None else "must be a text")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    def words(self, name: str) -> list[str]:
        """A list of texts; empty where there is none."""
        return self._list(name, str)

    def numbers(self, name: str) -> list[int]:
        """A list of numbers; empty where there is none."""
        return self._list(name, int)

    def _list(self, name: str, kind: type) -> list[Any]:
        value = self._get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.wrong(name, f"must be a list of {'texts' if kind is str else 'numbers'}")
        return value

    def wrong(self, name: str, remedy: str) -> CatalogInvalid:
        """The error for a field of this object."""
        return CatalogInvalid(f"{self.name}: config.json: {self._prefix}{name}", remedy)
