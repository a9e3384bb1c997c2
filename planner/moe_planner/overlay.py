"""A user's own figures: files that add entries to the catalog, or override what it says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from moe_planner import catalog, prices
from moe_planner.catalog import FILES, Catalog, CatalogInvalid, ModelFacts
from moe_planner.prices import Price

TABLES = ("models", "accelerators", "prices")
ENTRY = ("names", "aliases", "like", "from")


def load(paths: Iterable[Path]) -> Catalog:
    """The packaged catalog with the files' models and accelerators; later files win. Raises CatalogInvalid."""
    return _overlaid([(path.name, _read(path)) for path in paths])


def load_prices(paths: Iterable[Path]) -> Mapping[str, Price]:
    """The packaged prices with those of the files; later files win. Raises CatalogInvalid."""
    found = dict(prices.packaged())
    for path in paths:
        entries = _tables(path.name, _read(path)).get("prices", {})
        found.update(prices.build({name: _own(path.name, entry) for name, entry in entries.items()}))
    return found


def with_model(known: Catalog, facts: ModelFacts) -> Catalog:
    """The catalog with one more model, found by its key: what a config.json says wins over an entry of that name."""
    name = facts.key.rstrip("/").rpartition("/")[2].lower()
    version = f"{known.version}+{catalog.digest(repr(facts))}"
    models, names = {**known.models, facts.key: facts}, {**known.names, name: facts.key, facts.key.lower(): facts.key}
    return replace(known, version=version, models=models, names=names)


def parse(texts: Mapping[str, str]) -> Catalog:
    """As `load`, from the texts of files by their names."""
    return _overlaid(list(texts.items()))


def _overlaid(files: list[tuple[str, str]]) -> Catalog:
    folder = resources.files("moe_planner") / "data"
    own = [(folder / name).read_text(encoding="utf-8") for name in FILES]
    models_file, accelerators_file, engine = (catalog.toml(name, text) for name, text in zip(FILES, own, strict=True))
    models, accelerators = models_file["models"], accelerators_file["accelerators"]
    for file, text in files:
        tables = _tables(file, text)
        for key, entry in tables.get("models", {}).items():
            models[key] = _model(file, key, entry, models.get(key))
        for name, entry in tables.get("accelerators", {}).items():
            accelerators[name] = _accelerator(file, entry, accelerators.get(name))
    version = f"{models_file['version']}+{catalog.digest(chr(0).join([*own, *(text for _, text in files)]))}"
    return catalog.build(models, accelerators, engine, version)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogInvalid(str(path), f"cannot be read: {error}") from None


def _tables(file: str, text: str) -> dict[str, dict[str, Any]]:
    document = catalog.toml(file, text)
    for name, table in document.items():
        if name not in TABLES:
            raise CatalogInvalid(f"{file}: {name}", f"is not known: one of {', '.join(TABLES)}")
        if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
            raise CatalogInvalid(f"{file}: {name}", "must hold a table for each entry")
    return document


def _own(file: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "file": file}


def _model(file: str, key: str, entry: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    for name in entry:
        if name not in ENTRY:
            raise CatalogInvalid(f"{file}: {key}.{name}", f"is not known: one of {', '.join(ENTRY)}")
    if base is None:
        return _own(file, {"names": [key], **entry})
    over = [*base.get("over", ()), (file, entry.get("from", []))]
    more = {name: [*base.get(name, ()), *_list(file, key, name, entry)] for name in ("names", "aliases")}
    return {**base, **more, "over": over}


def _list(file: str, key: str, name: str, entry: Mapping[str, Any]) -> list[Any]:
    value = entry.get(name, [])
    if not isinstance(value, list):
        raise CatalogInvalid(f"{file}: {key}.{name}", "must be a list of names")
    return value


def _accelerator(file: str, entry: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    if base is None:
        return _own(file, entry)
    # A later group wins; one of the same name would lose what it does not say.
    parts = {f"{part} of {file}": group for part, group in entry.items() if part != "aliases"}
    return {**base, **parts, "aliases": [*base.get("aliases", ()), *_list(file, "accelerators", "aliases", entry)]}
