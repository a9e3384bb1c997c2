"""What is known about models, accelerators and the engine: published figures, each with its source and its day."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib import resources
from typing import Any, TypeVar, get_args

from moe_planner.facts import (
    UNSOURCED,
    Accelerator,
    Attention,
    Bias,
    CatalogInvalid,
    Cut,
    EngineFacts,
    Figure,
    Form,
    KvGroup,
    ModelFacts,
    Other,
    Precision,
    QkNorm,
)

__all__ = [
    "FILES",
    "UNSOURCED",
    "Accelerator",
    "Attention",
    "Catalog",
    "CatalogInvalid",
    "EngineFacts",
    "Figure",
    "Form",
    "KvGroup",
    "ModelFacts",
    "Other",
    "Precision",
    "build",
    "digest",
    "figures_of",
    "packaged",
    "parse",
    "toml",
]

Entry = TypeVar("Entry", KvGroup, Other)

FILES = ("models.toml", "accelerators.toml", "engine.toml")
MIB = 2**20
GIB = 2**30
GB = 10**9


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
    models, accelerators, engine = (toml(name, texts[name]) for name in FILES)
    whole = "\0".join(texts[name] for name in FILES)
    return build(models["models"], accelerators["accelerators"], engine, f"{models['version']}+{digest(whole)}")


def toml(name: str, text: str) -> dict[str, Any]:
    """The tables of a file. Raises CatalogInvalid."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogInvalid(name, f"is no TOML: {error}") from None


def digest(text: str) -> str:
    """What a catalog's version ends with, so that it follows the figures."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def build(
    models: Mapping[str, Any], accelerators: Mapping[str, Any], engine: Mapping[str, Any], version: str
) -> Catalog:
    """A catalog from the entries of its files. Raises CatalogInvalid."""
    precisions = {name: _precision(name, entry) for name, entry in engine["precisions"].items()}
    names: dict[str, str] = {}
    for key, entry in models.items():
        for name in [*_words(entry, "names", key), *_words(entry, "aliases", key)]:
            if names.setdefault(name.lower(), key) != key:
                where = f"{_file(entry)}: {key}.names"
                raise CatalogInvalid(where, f"{name} is a name of {names[name.lower()]} already")
    return Catalog(
        version=version,
        models={key: _model(key, models, precisions) for key in models},
        accelerators={name: _accelerator(name, entry) for name, entry in accelerators.items()},
        precisions=precisions,
        engine=_engine(engine["memory"]),
        names=names,
    )


def _file(entry: Mapping[str, Any], usual: str = "models.toml") -> str:
    """The file of an entry, for an error: the packaged one, or a user's."""
    return str(entry.get("file", usual))


def _words(entry: Mapping[str, Any], name: str, key: str) -> Sequence[str]:
    value = entry.get(name, ())
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) and word for word in value):
        raise CatalogInvalid(f"{_file(entry)}: {key}.{name}", "must be a list of names")
    return value


def _source(where: str, entry: Mapping[str, Any]) -> tuple[str, str | None]:
    source, date = entry.get("source"), entry.get("date")
    if not source:
        raise CatalogInvalid(where, 'has no source: name where it was read, or write source = "unsourced"')
    if source != UNSOURCED and not date:
        raise CatalogInvalid(where, "has no date: write the day on which it was read")
    return source, date


def figures_of(where: str, entry: Any) -> dict[str, Figure]:
    """The figures of a group, which share its source and day. Raises CatalogInvalid."""
    if not isinstance(entry, Mapping):
        raise CatalogInvalid(where, "must be a table of figures with their source and date")
    source, date = _source(where, entry)
    return {name: Figure(value, source, date) for name, value in entry.items() if name not in ("source", "date")}


def _groups(where: str, groups: Any) -> dict[str, Figure]:
    if not isinstance(groups, list):
        raise CatalogInvalid(f"{where}.from", "must be a list of tables, each with its source")
    known: dict[str, Figure] = {}
    for group in groups:
        for name, figure in figures_of(where, group).items():
            if name in known:
                raise CatalogInvalid(f"{where}.{name}", "is given twice: keep the better source")
            known[name] = figure
    return known


def _model_figures(key: str, entries: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, Figure]:
    entry = entries[key]
    where = f"{_file(entry)}: {key}"
    known = _groups(where, entry.get("from", []))
    base = entry.get("like")
    if base is not None:
        if base not in entries or base == key or base in above:
            raise CatalogInvalid(f"{where}.like", f"{base} is no other model of this file")
        inherited = _model_figures(base, entries, (*above, key))
        if "native" in known:  # a checkpoint in another form has another size
            inherited.pop("checkpoint_gb", None)
        known = {**inherited, **known}
    for file, groups in entry.get("over", ()):
        known.update(_groups(f"{file}: {key}", groups))
    return known


CHOICES = {"attention": get_args(Attention), "qk_norm": get_args(QkNorm), "attention_bias": get_args(Bias)}


def _model(key: str, entries: Mapping[str, Any], precisions: Mapping[str, Precision]) -> ModelFacts:
    where = f"{_file(entries[key])}: {key}"
    figures = _model_figures(key, entries)
    declared = {item.name: item for item in fields(ModelFacts) if item.name not in ("key", "figures")}
    for name, item in declared.items():
        if item.default is MISSING and name not in figures:
            raise CatalogInvalid(f"{where}.{name}", "is missing: add it with its source")
    values: dict[str, Any] = {}
    for name, figure in figures.items():
        if name not in declared:
            raise CatalogInvalid(f"{where}.{name}", f"is not known: one of {', '.join(declared)}")
        if (problem := _wrong(name, str(declared[name].type), figure.value)) is not None:
            raise CatalogInvalid(f"{where}.{name}", problem)
        values[name] = figure.value
    if values["native"] not in precisions:
        raise CatalogInvalid(f"{where}.native", f"{values['native']} is none of {', '.join(precisions)}")
    if not 1 <= values["topk"] <= values["experts"]:
        raise CatalogInvalid(f"{where}.topk", f"{values['topk']} of {values['experts']} experts cannot be")
    if values["dense_layers"] >= values["layers"]:
        raise CatalogInvalid(
            f"{where}.dense_layers", f"{values['dense_layers']} of {values['layers']} leave no experts"
        )
    values["kv"] = tuple(_entries(f"{where}.kv", KvGroup, values.get("kv", ())))
    values["others"] = tuple(_entries(f"{where}.others", Other, values.get("others", ())))
    return ModelFacts(key=key, figures=figures, **values)


POSITIVE = ("layers", "heads", "every", "window", "hidden", "head_dim", "experts", "topk", "vocab", "max_context")
"""Figures that other figures are divided by, or without which there is no model."""


def _entries(where: str, kind: Callable[..., Entry], groups: Sequence[Mapping[str, Any]]) -> Iterator[Entry]:
    """Entries of a list of tables: whole numbers, `chunked`, and the words of `others`. Raises CatalogInvalid."""
    for group in groups:
        for name, value in group.items():
            if kind is Other and name in WORDS:
                if not isinstance(value, str) or (WORDS[name] and value not in WORDS[name]):
                    raise CatalogInvalid(where, f"{name} must be one of {', '.join(WORDS[name]) or 'texts'}")
            elif name == "chunked":
                if not isinstance(value, bool):
                    raise CatalogInvalid(where, "chunked must be true or false")
            elif not _whole(value) or (name in POSITIVE and not value):
                raise CatalogInvalid(where, f"{name} must be a whole number, not negative")
        try:
            yield kind(**group)
        except TypeError as error:
            raise CatalogInvalid(where, str(error)) from None


WORDS: Mapping[str, tuple[str, ...]] = {"name": (), "form": get_args(Form), "cut": get_args(Cut)}
"""Words in an entry of `others`, and what they may be."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _wrong(name: str, kind: str, value: Any) -> str | None:
    """Why a figure is not of its kind; None where it is."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in CHOICES:
        return None if value in CHOICES[name] else f"must be one of {', '.join(CHOICES[name])}"
    if kind.startswith("tuple"):
        good = isinstance(value, list) and all(isinstance(group, Mapping) for group in value)
        return None if good else "must be a list of tables"
    if kind in ("bool", "str"):
        return None if isinstance(value, bool if kind == "bool" else str) else f"must be a {kind}"
    if not number or (kind == "int" and not isinstance(value, int)):
        return "must be a whole number" if kind == "int" else "must be a number"
    if value < 0 or not value < LARGEST:
        return "must not be negative" if value < 0 else "is too large"
    return "must be above zero" if name in POSITIVE and not value else None


LARGEST = 10**12

SPEEDS = {
    "bandwidth_gb_s": "bandwidth_bytes_s",
    "nvlink_gb_s": "nvlink_bytes_s",
    "pcie_gb_s": "pcie_bytes_s",
    "nic_gb_s": "nic_bytes_s",
}
FLOPS = {"tflops_16bit": 2.0, "tflops_8bit": 1.0, "tflops_4bit": 0.5}
ACCELERATOR_FIGURES = (
    *("memory_mib", "memory_gb", "gpus_per_node", "domain_gpus", "rent_usd_per_hour"),
    *("tflops_32bit", "measured_tflops_16bit", "host_time_ratio", *SPEEDS, *FLOPS),
)


def _accelerator(name: str, entry: Mapping[str, Any]) -> Accelerator:
    where = f"{_file(entry, 'accelerators.toml')}: {name}"
    figures: dict[str, Figure] = {}
    for part, group in entry.items():
        if part not in ("aliases", "file"):
            figures.update(figures_of(f"{where}.{part}", group))
    for figure, known in figures.items():
        if figure not in ACCELERATOR_FIGURES:
            raise CatalogInvalid(f"{where}.{figure}", f"is not known: one of {', '.join(ACCELERATOR_FIGURES)}")
        if (problem := _wrong(figure, "int" if figure.endswith("gpus_per_node") else "float", known.value)) is not None:
            raise CatalogInvalid(f"{where}.{figure}", problem)
        if known.value <= 0:
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
        aliases=tuple(_words(entry, "aliases", name)),
        vector_flops=values["tflops_32bit"] * 1e12 if "tflops_32bit" in values else None,
        measured_flops_16bit=values["measured_tflops_16bit"] * 1e12 if "measured_tflops_16bit" in values else None,
        host_time_ratio=values.get("host_time_ratio", 1.0),
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
