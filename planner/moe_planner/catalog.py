"""What is known about models, accelerators and the engine: published figures, each with its source and its day."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib import resources
from typing import Any, Literal

UNSOURCED = "unsourced"
FILES = ("models.toml", "accelerators.toml", "engine.toml")
MIB = 2**20
GB = 10**9

Attention = Literal["gqa", "mla", "csa", "deltanet"]
"""Grouped-query (or multi-head); multi-head latent; DeepSeek V4's compressed; gated delta net beside full attention."""

Form = Literal["experts", "linear", "rest"]
"""Routed experts; the other linear layers; embeddings, head, router and norms."""


class CatalogInvalid(Exception):
    """A catalog file is wrong. Names the file, the entry, the figure and the remedy."""

    def __init__(self, where: str, remedy: str) -> None:
        self.where = where
        super().__init__(f"{where}: {remedy}")


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure as it was published."""

    value: Any
    source: str
    date: str | None  # day of reading; None where nobody published it

    @property
    def sourced(self) -> bool:
        return self.source != UNSOURCED


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers with one form of cache: an entry of `width` elements by head, for `every` tokens of the last `window`."""

    layers: int
    width: int = 0
    heads: int = 1
    every: int = 1
    window: int | None = None
    fp8_bytes: int | None = None  # of an entry, where an FP8 cache needs more than its elements
    state: int = 0  # elements that a sequence keeps whatever its length


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelFacts:
    """A model's published configuration. Parameters in thousand millions, contexts in tokens. Equal only to itself."""

    key: str
    attention: Attention
    total_params_b: float
    active_params_b: float
    layers: int
    dense_layers: int
    hidden: int
    heads: int
    head_dim: int
    experts: int
    topk: int
    moe_intermediate: int
    vocab: int
    max_context: int
    native: str
    kv_heads: int = 1
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    rope_dim: int = 0
    v_head_dim: int = 0
    o_groups: int = 0
    o_lora_rank: int = 0
    index_heads: int = 0
    index_dim: int = 0
    linear_layers: int = 0
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_head_dim: int = 0
    linear_conv: int = 0
    shared_experts: int = 0
    shared_intermediate: int = 0
    dense_intermediate: int = 0
    tied_embeddings: bool = False
    checkpoint_gb: float | None = None
    kv_dtype: str = "bfloat16"
    kv: tuple[KvGroup, ...] = ()
    figures: Mapping[str, Figure] = field(repr=False)

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def kv_groups(self) -> tuple[KvGroup, ...]:
        """Forms of cache: the entry's own, or one for all layers."""
        if self.kv:
            return self.kv
        if self.attention == "mla":
            return (KvGroup(self.layers, width=self.kv_lora_rank + self.rope_dim),)
        return (KvGroup(self.layers, width=2 * self.head_dim, heads=self.kv_heads),)


@dataclass(frozen=True)
class Accelerator:
    """A GPU or its like. `memory_bytes` is all that the driver reports. Peaks are None where no source was found.

    `flops` is dense arithmetic a second by bytes of an operand: 2 (BF16, FP16), 1 (FP8, INT8) or 0.5 (FP4).
    """

    name: str
    memory_bytes: int
    gpus_per_node: int
    figures: Mapping[str, Figure] = field(repr=False, compare=False)
    bandwidth_bytes_s: float | None = None
    flops: Mapping[float, float] = field(default_factory=dict, repr=False, compare=False)
    nvlink_bytes_s: float | None = None  # or xGMI, or a TPU's links: one GPU, one direction; so the next two
    pcie_bytes_s: float | None = None
    nic_bytes_s: float | None = None
    rent_usd_per_hour: float | None = None  # one GPU, on demand
    domain_gpus: int = 8  # GPUs that NVLink or its like joins
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Precision:
    """A form of weights: bits of a weight by part, scales included. Equal only to itself."""

    name: str
    experts: float
    linear: float
    rest: float
    block: int  # columns under one scale; a rank's slice is a multiple of it
    suffixes: tuple[str, ...]
    field: str | None  # value of spec.model.quantization
    figure: Figure

    def bits(self, form: Form) -> float:
        """Bits of a weight in a part of that form."""
        return {"experts": self.experts, "linear": self.linear, "rest": self.rest}[form]


@dataclass(frozen=True)
class EngineFacts:
    """What the engine takes beside weights and cache, and its defaults."""

    utilization: float
    batched_tokens: tuple[int, ...]
    active_seqs: int
    large_gpu_bytes: int
    runtime_bytes: int
    collective_bytes: int
    usual_sequence_tokens: int
    shortest_context: int
    shared_memory_bytes_per_gpu: int
    shared_memory_bytes: int
    figures: Mapping[str, Figure] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Catalog:
    """Everything that a fit check looks up."""

    version: str
    models: Mapping[str, ModelFacts]
    accelerators: Mapping[str, Accelerator]
    precisions: Mapping[str, Precision]
    engine: EngineFacts
    names: Mapping[str, str] = field(repr=False)  # last part of a repository's name, or an alias, lower case → key

    def model(self, repository: str) -> tuple[ModelFacts, Precision] | None:
        """The model of a repository, and the form of weights that its name says. None: not in the catalog."""
        whole = repository.rstrip("/").lower()
        name = whole if whole in self.names else whole.rpartition("/")[2]
        if name in self.names:
            found = self.models[self.names[name]]
            return found, self.precisions[found.native]
        endings = ((suffix, p) for p in self.precisions.values() for suffix in p.suffixes)
        for suffix, precision in sorted(endings, key=lambda item: -len(item[0])):
            base = name.removesuffix(suffix)
            if base != name and base in self.names:
                return self.models[self.names[base]], precision
        return None

    def accelerator_named(self, text: str) -> Accelerator | None:
        """The accelerator that others call `text`, with or without words after it: "H100-80GB + IB". None: unknown."""
        wanted = text.strip().lower()
        if wanted in self.accelerators:
            return self.accelerators[wanted]
        best: tuple[int, Accelerator] | None = None
        for accelerator in self.accelerators.values():
            for alias in accelerator.aliases:
                name = alias.lower()
                whole = wanted == name or wanted.startswith((f"{name} ", f"{name}(", f"{name},", f"{name}+"))
                if whole and (best is None or len(name) > best[0]):
                    best = len(name), accelerator
        return None if best is None else best[1]

    def precision_of(self, quantization: str) -> Precision | None:
        """The form of weights that spec.model.quantization names; None where it leaves it to the checkpoint."""
        return next((p for p in self.precisions.values() if p.field == quantization), None)


@cache
def packaged() -> Catalog:
    """The catalog that comes with this version."""
    folder = resources.files("moe_planner") / "data"
    return parse({name: (folder / name).read_text(encoding="utf-8") for name in FILES})


def parse(texts: Mapping[str, str]) -> Catalog:
    """A catalog from the texts of its files. Raises CatalogInvalid."""
    documents = {}
    for name in FILES:
        try:
            documents[name] = tomllib.loads(texts[name])
        except tomllib.TOMLDecodeError as error:
            raise CatalogInvalid(name, f"is no TOML: {error}") from None
    models_file, accelerators_file, engine_file = (documents[name] for name in FILES)
    precisions = {name: _precision(name, entry) for name, entry in engine_file["precisions"].items()}
    entries = models_file["models"]
    models = {key: _model(key, entries, precisions) for key in entries}
    names: dict[str, str] = {}
    for key, entry in entries.items():
        for name in [*entry["names"], *entry.get("aliases", ())]:
            if names.setdefault(name.lower(), key) != key:
                raise CatalogInvalid(f"models.toml: {key}.names", f"{name} is a name of {names[name.lower()]} already")
    digest = hashlib.sha256("\0".join(texts[name] for name in FILES).encode()).hexdigest()[:8]
    return Catalog(
        version=f"{models_file['version']}+{digest}",
        models=models,
        accelerators={name: _accelerator(name, entry) for name, entry in accelerators_file["accelerators"].items()},
        precisions=precisions,
        engine=_engine(engine_file["memory"]),
        names=names,
    )


def _source(where: str, entry: Mapping[str, Any]) -> tuple[str, str | None]:
    source, date = entry.get("source"), entry.get("date")
    if not source:
        raise CatalogInvalid(where, 'has no source: name where it was read, or write source = "unsourced"')
    if source != UNSOURCED and not date:
        raise CatalogInvalid(where, "has no date: write the day on which it was read")
    return source, date


def figures_of(where: str, entry: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a group, which share its source and day. Raises CatalogInvalid."""
    source, date = _source(where, entry)
    return {name: Figure(value, source, date) for name, value in entry.items() if name not in ("source", "date")}


def _model_figures(key: str, entries: Mapping[str, Any]) -> dict[str, Figure]:
    entry, where = entries[key], f"models.toml: {key}"
    known: dict[str, Figure] = {}
    for group in entry.get("from", []):
        for name, figure in figures_of(where, group).items():
            if name in known:
                raise CatalogInvalid(f"{where}.{name}", "is given twice: keep the better source")
            known[name] = figure
    base = entry.get("like")
    if base is None:
        return known
    if base not in entries or base == key:
        raise CatalogInvalid(f"{where}.like", f"{base} is no other model of this file")
    inherited = _model_figures(base, entries)
    if "native" in known:  # a checkpoint in another form has another size
        inherited.pop("checkpoint_gb", None)
    return {**inherited, **known}


def _model(key: str, entries: Mapping[str, Any], precisions: Mapping[str, Precision]) -> ModelFacts:
    where = f"models.toml: {key}"
    figures = _model_figures(key, entries)
    declared = {item.name: item for item in fields(ModelFacts) if item.name not in ("key", "figures")}
    for name, item in declared.items():
        if item.default is MISSING and name not in figures:
            raise CatalogInvalid(f"{where}.{name}", "is missing: add it with its source")
    values: dict[str, Any] = {}
    for name, figure in figures.items():
        if name not in declared:
            raise CatalogInvalid(f"{where}.{name}", f"is not known: one of {', '.join(declared)}")
        if isinstance(figure.value, int | float) and figure.value < 0:
            raise CatalogInvalid(f"{where}.{name}", "must not be negative")
        values[name] = figure.value
    if values["native"] not in precisions:
        raise CatalogInvalid(f"{where}.native", f"{values['native']} is none of {', '.join(precisions)}")
    try:
        values["kv"] = tuple(KvGroup(**group) for group in values.get("kv", ()))
    except TypeError as error:
        raise CatalogInvalid(f"{where}.kv", str(error)) from None
    return ModelFacts(key=key, figures=figures, **values)


SPEEDS = {
    "bandwidth_gb_s": "bandwidth_bytes_s",
    "nvlink_gb_s": "nvlink_bytes_s",
    "pcie_gb_s": "pcie_bytes_s",
    "nic_gb_s": "nic_bytes_s",
}
FLOPS = {"tflops_16bit": 2.0, "tflops_8bit": 1.0, "tflops_4bit": 0.5}
ACCELERATOR_FIGURES = ("memory_mib", "memory_gb", "gpus_per_node", "domain_gpus", "rent_usd_per_hour", *SPEEDS, *FLOPS)


def _accelerator(name: str, entry: Mapping[str, Any]) -> Accelerator:
    where = f"accelerators.toml: {name}"
    figures: dict[str, Figure] = {}
    for part, group in entry.items():
        if part != "aliases":
            figures.update(figures_of(f"{where}.{part}", group))
    for figure, known in figures.items():
        if figure not in ACCELERATOR_FIGURES:
            raise CatalogInvalid(f"{where}.{figure}", f"is not known: one of {', '.join(ACCELERATOR_FIGURES)}")
        if not isinstance(known.value, int | float) or known.value <= 0:
            raise CatalogInvalid(f"{where}.{figure}", "must be above zero")
    values = {figure: known.value for figure, known in figures.items()}
    if "memory_mib" in values:
        memory = values["memory_mib"] * MIB
    elif "memory_gb" in values:
        memory = values["memory_gb"] * GB
    else:
        raise CatalogInvalid(where, "has neither memory_mib nor memory_gb: add one")
    per_node = int(values.get("gpus_per_node", 8))
    return Accelerator(
        name,
        int(memory),
        per_node,
        figures,
        flops={size: values[key] * 1e12 for key, size in FLOPS.items() if key in values},
        rent_usd_per_hour=values.get("rent_usd_per_hour"),
        domain_gpus=int(values.get("domain_gpus", per_node)),
        aliases=tuple(entry.get("aliases", ())),
        **{field_name: values[key] * GB for key, field_name in SPEEDS.items() if key in values},
    )


def _precision(name: str, entry: Mapping[str, Any]) -> Precision:
    where = f"engine.toml: precisions.{name}"
    source, date = _source(where, entry)
    missing = [part for part in ("experts", "linear", "rest") if part not in entry]
    if missing:
        raise CatalogInvalid(f"{where}.{missing[0]}", "is missing: bits of a weight")
    return Precision(
        name=name,
        experts=entry["experts"],
        linear=entry["linear"],
        rest=entry["rest"],
        block=entry.get("block", 1),
        suffixes=tuple(entry.get("suffixes", ())),
        field=entry.get("field"),
        figure=Figure((entry["experts"], entry["linear"], entry["rest"]), source, date),
    )


def _engine(memory: Mapping[str, Any]) -> EngineFacts:
    figures = {name: figures_of(f"engine.toml: memory.{name}", entry)["value"] for name, entry in memory.items()}
    wanted = [item.name for item in fields(EngineFacts) if item.name != "figures"]
    for name in wanted:
        if name not in figures:
            raise CatalogInvalid(f"engine.toml: memory.{name}", "is missing: add it with its source")
    values = {name: figures[name].value for name in wanted}
    values["batched_tokens"] = tuple(values["batched_tokens"])
    return EngineFacts(figures=figures, **values)
