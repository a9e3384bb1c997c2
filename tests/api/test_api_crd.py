"""The CRD: structural, bounded, said in words, with the defaults and rules of the types, and equal to the file."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_api import crd
from moe_api.fields import SpecModel
from moe_api.load import load_object, load_text
from moe_api.resource import MoEDeployment

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "manifests/crd/moestack.dev_moedeployments.yaml"
SCHEMA = crd.schema()
Schema = dict[str, Any]

MINIMAL: Schema = {
    "apiVersion": "moestack.dev/v1alpha1",
    "kind": "MoEDeployment",
    "metadata": {"name": "m"},
    "spec": {"model": {"id": "m"}, "hardware": {"accelerator": "cpu"}},
}


def _nodes(node: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every node of the schema with its path."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from _nodes(child, f"{path}.{name}")
    if "items" in node:
        yield from _nodes(node["items"], f"{path}[]")
    if "additionalProperties" in node:
        yield from _nodes(node["additionalProperties"], f"{path}{{}}")


NODES = dict(_nodes(SCHEMA))


def test_the_committed_file_is_what_the_types_say() -> None:
    assert crd.check(COMMITTED) == []


def test_dump_is_the_same_each_time_and_parses_to_the_crd() -> None:
    assert crd.dump() == crd.dump()
    assert yaml.safe_load(crd.dump()) == json.loads(json.dumps(crd.render()))


def test_it_fits_into_an_apply_annotation() -> None:
    assert len(json.dumps(crd.render())) < 262_144


def test_names_columns_and_subresource() -> None:
    spec = crd.render()["spec"]
    version = spec["versions"][0]
    assert (spec["names"]["shortNames"], spec["names"]["categories"]) == (["moed"], ["moestack"])
    assert version["subresources"] == {"status": {}}
    columns = version["additionalPrinterColumns"]
    assert [c["name"] for c in columns] == ["Model", "Replicas", "Ready", "SLO", "Imbalance", "Spill", "$/Mtok", "Age"]
    for column in columns[:-1]:
        path = column["jsonPath"].split("[")[0]
        assert path in NODES, column
    assert '"SLOMet"' in columns[3]["jsonPath"]


TOLD = re.compile(r"\. (Form: .*\. )?(Unit: .*\. )?Disruption: (hot|rolling|revision)( \(hot when lowered\))?\.$")


def test_every_leaf_of_the_spec_tells_meaning_and_disruption() -> None:
    silent = []
    for path, node in NODES.items():
        leaf = path.startswith(".spec") and "properties" not in node and not path.endswith(("[]", "{}"))
        covered = "properties" in node.get("items", {})
        told = TOLD.search(node.get("description", ""))
        if leaf and not covered and not told:
            silent.append(path)
    assert silent == []


def test_every_field_is_described() -> None:
    undescribed = [
        path
        for path, node in NODES.items()
        if path not in ("", ".metadata") and not path.endswith(("[]", "{}")) and not node.get("description")
    ]
    assert undescribed == []


def test_numbers_of_a_measure_have_a_unit() -> None:
    counted = {"maxSkew", "runAsUser", "runAsGroup", "fsGroup", "min", "max", "observedGeneration", "version"}
    counted |= {
        "replicas",
        "readyReplicas",
        "acknowledged",
        "fromVersion",
        "toVersion",
        "failedGeneration",
        "weightsVersion",
    }
    bare = [
        path
        for path, node in NODES.items()
        if (node.get("type") == "integer" or node.get("x-kubernetes-int-or-string"))
        and not path.endswith(("[]", "{}"))
        and "Unit: " not in node["description"]
        and path.rpartition(".")[2] not in counted
    ]
    assert bare == []


STRUCTURAL = {
    "no references": lambda node: "$ref" not in node,
    "no alternatives": lambda node: not {"anyOf", "allOf", "oneOf", "not"} & set(node),
    "no titles": lambda node: "title" not in node,
    "a type, or integer or string": lambda node: ("type" in node) != bool(node.get("x-kubernetes-int-or-string")),
    "fixed and free keys do not mix": lambda node: not ("properties" in node and "additionalProperties" in node),
    "keys are closed": lambda node: node.get("additionalProperties") not in (True, False),
    "a list says how it merges": lambda node: node.get("type") != "array" or "x-kubernetes-list-type" in node,
    "a list has items": lambda node: node.get("type") != "array" or "items" in node,
    "a list is bounded": lambda node: node.get("type") != "array" or "maxItems" in node,
    "text is bounded": lambda node: node.get("type") != "string" or "maxLength" in node or "enum" in node,
    "a map is bounded": lambda node: "additionalProperties" not in node or "maxProperties" in node,
    "an integer is bounded": lambda node: node.get("type") != "integer" or {"minimum", "maximum"} <= set(node),
    "a number is never a float": lambda node: node.get("type") != "number",
    "map keys of a list are fields that are always there": lambda node: all(
        key in node["items"]["properties"]
        and (key in node["items"].get("required", ()) or "default" in node["items"]["properties"][key])
        for key in node.get("x-kubernetes-list-map-keys", ())
    ),
    "a set holds scalars": lambda node: (
        node.get("x-kubernetes-list-type") != "set" or "properties" not in node["items"]
    ),
    "required fields are there": lambda node: set(node.get("required", ())) <= set(node.get("properties", {})),
}


@pytest.mark.parametrize("rule", STRUCTURAL, ids=list(STRUCTURAL))
def test_the_schema_is_structural_and_bounded(rule: str) -> None:
    exempt = {"", ".apiVersion", ".kind", ".metadata"}
    assert [path for path, node in NODES.items() if path not in exempt and not STRUCTURAL[rule](node)] == []


def _fill(value: Any, node: Schema) -> Any:
    """Structural defaulting, as the API server does it: absent properties get a copy of the default, then go deeper."""
    if isinstance(value, dict) and "properties" in node:
        for name, child in node["properties"].items():
            if name not in value and "default" in child:
                value[name] = copy.deepcopy(child["default"])
            if name in value:
                _fill(value[name], child)
    elif isinstance(value, list) and "items" in node:
        for item in value:
            _fill(item, node["items"])
    return value


def test_defaults_of_the_schema_are_those_of_the_types() -> None:
    filled = _fill(copy.deepcopy(MINIMAL), SCHEMA)
    assert filled["spec"] == load_object(MINIMAL).to_json()["spec"]
    assert load_object(filled) == load_object(MINIMAL)


def test_a_default_of_a_group_is_whole() -> None:
    """The API server runs the rules on a default before it fills in what lies below it."""
    for path, node in NODES.items():
        if "default" in node and "properties" in node:
            assert node["default"] == _fill(copy.deepcopy(node["default"]), node), path


DEFAULTS = {
    ".spec.engine.kind": "VLLM",
    ".spec.experts.overflow": "Unlimited",
    ".spec.fallback.dataPolicy.egress": "Allowed",
    ".spec.fallback.trigger.missProbability": "0.5",
    ".spec.fallback.trigger.shareCap": "1",
    ".spec.gateway.auth.mode": "None",
    ".spec.hardware.gpusPerReplica": 1,
    ".spec.quality.maxLostGateMass": "0.02",
    ".spec.replicas.min": 1,
    ".spec.slo.itlP95": "100ms",
    ".spec.slo.ttftP95": "2s",
    ".spec.suspend": False,
    ".spec.tuning.bounds.capacityFactor.max": "4",
    ".spec.tuning.bounds.capacityFactor.min": "1",
    ".spec.tuning.changeBudget.changesPerHour": 60,
    ".spec.tuning.mode": "Recommend",
    ".spec.tuning.paused": False,
    ".spec.upgrade.strategy": "Surge",
}


def test_defaults_do_not_move_unseen() -> None:
    assert {path: NODES[path].get("default") for path in DEFAULTS} == DEFAULTS


def test_the_status_has_no_defaults() -> None:
    """Two writers apply it, each its own part: neither may be given fields of the other."""
    assert [path for path, node in NODES.items() if path.startswith(".status") and "default" in node] == []


def _models(kind: type[SpecModel] = SpecModel) -> Iterator[type[SpecModel]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _models(sub)


def test_every_rule_of_the_types_stands_in_the_schema() -> None:
    rendered = {rule["rule"] for node in NODES.values() for rule in node.get("x-kubernetes-validations", ())}
    for model in _models():
        assert {rule.cel for rule in model.RULES} <= rendered, model


RULES = [(path, node, rule) for path, node in NODES.items() for rule in node.get("x-kubernetes-validations", ())]


def test_there_are_rules() -> None:
    assert len(RULES) > 80


def test_every_rule_has_a_message_and_points_at_a_field() -> None:
    for path, _, rule in RULES:
        assert rule["message"], path
        if "fieldPath" in rule:
            assert f"{path}{rule['fieldPath']}" in NODES, (path, rule)


def test_rules_are_closed_expressions() -> None:
    for path, _, rule in RULES:
        text = re.sub(r"r?'[^']*'", "''", rule["rule"])
        assert text.count("'") % 2 == 0, (path, text)
        for left, right in ("()", "[]"):
            assert text.count(left) == text.count(right), (path, text)
        assert "\\" not in text, f"{path}: a pattern in CEL is a raw string"


def test_rules_read_only_fields_that_are_there_or_asked_for() -> None:
    """`self.x` where x may be absent is an error in CEL: each such path is guarded by has()."""
    for path, _, rule in RULES:
        if path == "":
            continue
        text = re.sub(r"r?'[^']*'", "''", rule["rule"])
        for read in set(re.findall(r"\bself((?:\.[a-zA-Z0-9]+\b(?!\())+)", text)):
            parts = read[1:].split(".")
            for depth in range(1, len(parts) + 1):
                prefix = "." + ".".join(parts[:depth])
                parent = NODES[path + prefix.rpartition(".")[0]]
                child = parent["properties"][parts[depth - 1]]
                sure = "default" in child or parts[depth - 1] in parent.get("required", ())
                assert sure or f"has(self{prefix})" in text, (path, prefix, text)


def _spec_properties(document: Schema) -> Schema:
    found: Schema = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    return found


def test_write_then_check(tmp_path: Path) -> None:
    target = tmp_path / "crd" / "c.yaml"
    assert "no such file" in crd.check(target)[0]
    assert crd.main(["--write", str(target)]) == 0
    assert crd.main(["--check", str(target)]) == 0


def test_check_tells_harmless_from_breaking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "c.yaml"
    text = crd.dump()
    target.write_text(text.replace("Dollars for a million tokens", "Dollars"))
    assert [line.split(": ", 1)[1] for line in crd.check(target)] == [
        "differs from the types; write it with `make crd`",
        "the difference breaks no stored object",
    ]
    old = yaml.safe_load(text)
    _spec_properties(old)["loras"] = {"type": "string"}
    target.write_text(yaml.safe_dump(old))
    assert crd.main(["--check", str(target)]) == 1
    assert "the types break what is committed: spec.loras: field was removed" in capsys.readouterr().err


def test_breaking_the_released_crd_is_refused_even_when_the_file_is_up_to_date(tmp_path: Path) -> None:
    crd.write(tmp_path / "c.yaml")
    old = crd.render()
    _spec_properties(old)["gone"] = {"type": "string"}
    (tmp_path / "released").mkdir()
    (tmp_path / "released/c.yaml").write_text(yaml.safe_dump(old))
    (problem,) = crd.check(tmp_path / "c.yaml")
    assert problem.endswith("the types break the released CRD: spec.gone: field was removed")


def test_a_release_is_kept_to_compare_with() -> None:
    assert [path.name for path in (ROOT / "manifests/crd/released").glob("*.yaml")] != []


EXAMPLES = sorted((ROOT / "manifests/examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_and_survive_the_api_server_filling_them_in(path: Path) -> None:
    loaded = load_text(path.read_text(), str(path))
    raw = yaml.safe_load(path.read_text())
    filled = load_object(_fill(raw, SCHEMA))
    assert filled == loaded
    assert load_object(loaded.to_json()) == loaded


def test_the_full_example_sets_every_field_of_our_own_engine() -> None:
    raw = yaml.safe_load((ROOT / "manifests/examples/full.yaml").read_text())
    external = (".spec.engine.url", ".spec.engine.apiKeySecretRef", ".spec.engine.metrics")
    other_kind = (".spec.model.cache.claimName", ".spec.model.cache.path")

    def given(value: Any, path: str) -> Iterator[str]:
        yield path
        if isinstance(value, dict):
            for name, item in value.items():
                yield from given(item, f"{path}.{name}")
        elif isinstance(value, list):
            for item in value:
                yield from given(item, f"{path}[]")

    there = set(given(raw["spec"], ".spec"))
    missing = {
        path
        for path in NODES
        if path.startswith(".spec.") and not path.endswith("{}") and path not in there
        and not path.startswith((*external, *other_kind))
    }  # fmt: skip
    assert missing == set()


def test_the_resource_itself_stays_whole() -> None:
    assert set(SCHEMA["properties"]) == {info.alias or name for name, info in MoEDeployment.model_fields.items()}
