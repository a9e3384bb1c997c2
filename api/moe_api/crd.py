"""The CustomResourceDefinition, generated from the types: nothing in it is written by hand.

`python -m moe_api.crd --write FILE` writes it, `--check FILE` says whether a file is what the types say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from moe_api.annotations import GROUP, KIND, PLURAL, VERSION
from moe_api.compat import breaking_changes
from moe_api.fields import ALLOWED, DISRUPTION, LOWERED, UNIT
from moe_api.resource import MoEDeployment

SINGULAR = "moedeployment"
SHORT_NAME = "moed"
CATEGORIES = ["moestack"]

Schema = dict[str, Any]

_COLUMNS = (
    ("Model", "string", ".spec.model.id", "Name of the model"),
    ("Replicas", "integer", ".status.replicas", "Replicas asked for"),
    ("Ready", "integer", ".status.readyReplicas", "Replicas that answer"),
    ("SLO", "string", '.status.conditions[?(@.type=="SLOMet")].status', "Whether the SLO is met"),
    ("Imbalance", "string", ".status.live.imbalance", "Largest over mean rank load"),
    ("Spill", "string", ".status.live.spillShare", "Share of requests that went to a closed API"),
    ("$/Mtok", "string", ".status.live.usdPerMTokens", "Dollars for a million tokens"),
    ("Age", "date", ".metadata.creationTimestamp", ""),
)
_COPIED = (
    *("type", "enum", "minimum", "maximum", "minLength", "maxLength", "pattern", "maxItems", "maxProperties"),
    *("x-kubernetes-int-or-string", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
    "x-kubernetes-validations",
)


def schema() -> Schema:
    """The structural schema of the resource: no references, no titles, defaults only in the spec."""
    whole = MoEDeployment.model_json_schema(by_alias=True)
    definitions: dict[str, Schema] = whole.pop("$defs")
    properties: dict[str, Schema] = whole["properties"]
    return {
        "type": "object",
        "description": _sentence(MoEDeployment.__doc__ or ""),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "Group and version of this document."},
            "kind": {"type": "string", "description": "Kind of this document."},
            "metadata": {"type": "object"},
            "spec": _structural(properties["spec"], definitions, defaults=True, inherited=None),
            "status": _structural(properties["status"], definitions, defaults=False, inherited=None),
        },
        "x-kubernetes-validations": whole["x-kubernetes-validations"],
    }


def _structural(node: Schema, definitions: dict[str, Schema], *, defaults: bool, inherited: str | None) -> Schema:
    """One node as the API server takes it. `inherited` is the disruption class that a group sets for all below."""
    node = resolve(node, definitions)
    disruption: str | None = inherited or node.get(DISRUPTION)
    out: Schema = {key: node[key] for key in _COPIED if key in node}
    if "const" in node:
        out["enum"] = [node["const"]]
    if description := _describe(node, disruption):
        out["description"] = description
    if defaults and node.get("default") is not None:
        # A group's default is written out in full: the API server checks it against the rules before it fills it in.
        out["default"] = _without_nulls(node["default"])
    if "properties" in node:
        out["properties"] = {
            name: _structural(child, definitions, defaults=defaults, inherited=disruption)
            for name, child in node["properties"].items()
        }
        if required := node.get("required"):
            out["required"] = sorted(required)
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            out[key] = _structural(node[key], definitions, defaults=defaults, inherited=disruption)
    return out


def resolve(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """The node with its reference and its `or null` folded in; what stands beside them wins."""
    own = {key: value for key, value in node.items() if key not in ("$ref", "anyOf")}
    if "$ref" in node:
        return {**resolve(definitions[node["$ref"].removeprefix("#/$defs/")], definitions), **own}
    if "anyOf" in node:
        (other,) = (option for option in node["anyOf"] if option != {"type": "null"})
        return {**resolve(other, definitions), **own}
    return node


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _describe(node: Schema, disruption: str | None) -> str:
    """Meaning, form, unit and disruption class; the class is told for leaves, and for lists and maps as a whole."""
    parts = [_sentence(node.get("description", ""))]
    if allowed := node.get(ALLOWED):
        parts.append(f"Form: {allowed}.")
    if unit := node.get(UNIT):
        parts.append(f"Unit: {unit}.")
    if disruption and "properties" not in node:
        lowered = node.get(LOWERED)
        parts.append(f"Disruption: {disruption}{f' ({lowered} when lowered)' if lowered else ''}.")
    return " ".join(part for part in parts if part)


def _sentence(text: str) -> str:
    return " ".join(text.split())


def render() -> Schema:
    """The CustomResourceDefinition (apiextensions.k8s.io/v1)."""
    columns = [
        {"name": name, "type": kind, "jsonPath": path, **({"description": text} if text else {})}
        for name, kind, path, text in _COLUMNS
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT_NAME],
                "categories": CATEGORIES,
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema()},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """YAML without anchors, so that each node stands for itself."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump() -> str:
    """The CRD as YAML, the same bytes each time."""
    body = yaml.dump(render(), Dumper=_Dumper, sort_keys=True, allow_unicode=True, width=120, default_flow_style=False)
    return f"# Generated from api/moe_api by `make crd`; do not edit.\n---\n{body}"


def write(path: Path) -> None:
    """Write the CRD, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(), encoding="utf-8")


def check(path: Path, released: Path | None = None) -> list[str]:
    """What is wrong with the committed CRD, one line each; nothing where it is what the types say.

    `released` holds the last released CRD (by default the folder beside the file): breaking it is refused always.
    """
    problems: list[str] = []
    if not path.exists():
        return [f"{path}: there is no such file; write it with `make crd`"]
    text, now = path.read_text(encoding="utf-8"), render()
    if text != dump():
        problems.append(f"{path}: differs from the types; write it with `make crd`")
        broken = _against(path, now)
        problems += [f"{path}: the types break what is committed: {change}" for change in broken]
        if not broken:
            problems.append(f"{path}: the difference breaks no stored object")
    for old in sorted((released or path.parent / "released").glob("*.yaml")):
        problems += [f"{old}: the types break the released CRD: {change}" for change in _against(old, now)]
    return problems


def _against(old: Path, new: Schema) -> list[str]:
    try:
        parsed = yaml.safe_load(old.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return ["it is no YAML any more"]
    return breaking_changes(parsed, new) if isinstance(parsed, dict) else ["it is no CRD any more"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m moe_api.crd", description=__doc__)
    action = made.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE", help="write the CRD from the types")
    action.add_argument("--check", type=Path, metavar="FILE", help="say how FILE differs from the types")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 where all is well, 1 with the problems on stderr."""
    parsed = parser().parse_args(arguments)
    if parsed.write is not None:
        write(parsed.write)
        return 0
    problems = check(parsed.check)
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
