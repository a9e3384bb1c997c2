"""docs/reference has all that the types have, and says so when a page is stale."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from moe_cli import reference, reference_commands
from moe_cli.main import app
from moe_cli.outcome import Exit
from moe_core import metrics
from moe_core.config import GatewayConfig, OperatorConfig, ServingConfig, TunerConfig
from moe_core.setting import KNOBS

ROOT = Path(__file__).resolve().parents[2]
CRD = ROOT / "manifests/crd/moestack.dev_moedeployments.yaml"
PAGES = reference.pages()


def rows(page: str) -> dict[str, list[str]]:
    """First cell without its marks → the other cells of the first row that has it."""
    found: dict[str, list[str]] = {}
    for line in PAGES[page].splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(cells[0].strip("`"), cells[1:])
    return found


def leaves(path: str, node: dict[str, Any]) -> list[str]:
    """Paths of every field of the committed CRD that is no group."""
    if "properties" in node:
        return [leaf for name, child in node["properties"].items() for leaf in leaves(f"{path}.{name}", child)]
    inner = node.get("items", {})
    return [path, *(leaves(f"{path}[]", inner) if "properties" in inner else [])]


def schema() -> dict[str, Any]:
    found = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("part", ["spec", "status"])
def test_every_field_of_the_crd_has_a_row(part: str) -> None:
    expected = leaves(part, schema()[part])
    assert len(expected) > 60
    assert [leaf for leaf in expected if leaf not in rows("moedeployment.md")] == []


def test_a_field_of_the_spec_says_what_its_change_costs_and_what_it_is() -> None:
    told = {path: cells for path, cells in rows("moedeployment.md").items() if path.startswith("spec.")}
    silent = [
        path for path, cells in told.items() if cells[4] == "–" or not re.search("hot|rolling|revision", cells[3])
    ]
    groups = [path for path in told if any(other.startswith(f"{path}[]") for other in told)]
    assert set(silent) <= set(groups), "only a list of groups has no class of its own: its leaves have"
    assert told["spec.slo.ttftP95"][:4] == ["string", "`2s`", "from 1ms to 1h; at most 32 characters", "hot"]
    assert told["spec.experts.redundant"][3] == "rolling"
    assert told["spec.engine.maxActiveSeqs"][3] == "revision (hot when lowered)"
    assert told["spec.model.id"][1] == "*required*"
    assert told["spec.model.tokenSecretRef.name"][1] == "*required* with its group"


def test_every_metric_has_its_type_labels_and_help() -> None:
    told = rows("metrics.md")
    assert set(told) == {row.name for row in metrics.ALL}
    for row in metrics.ALL:
        kind, labels, help_text = told[row.name]
        assert kind == row.kind
        assert re.findall(r"`([^`]*)`", labels) == list(row.labels)
        assert row.help.lower().rstrip(".") in help_text.lower().replace("\\|", "|").replace("&lt;", "<")


def test_every_knob_starts_from_a_field() -> None:
    told = rows("knobs.md")
    assert set(KNOBS) <= set(told)
    fields = rows("moedeployment.md")
    assert all(
        path in fields for knob in KNOBS for path in re.findall(r"`([^`]*)`", told[knob][0]) if knob != "replicas"
    )


@pytest.mark.parametrize("model", [OperatorConfig, GatewayConfig, TunerConfig, ServingConfig])
def test_every_setting_of_a_process_has_a_row(model: Any) -> None:
    told = [path.split(".")[0].split("[")[0] for path in rows("configuration.md")]
    assert {info.alias or name for name, info in model.model_fields.items()} <= set(told)


def test_every_command_and_option_of_moectl_is_told_and_hidden_ones_are_not() -> None:
    page = PAGES["commands.md"]

    def walk(name: str, command: Any) -> None:
        for child, made in getattr(command, "commands", {}).items():
            walk(f"{name} {child}", made)
        if not getattr(command, "commands", None):
            assert (f"## {name}\n" in page) is not command.hidden, name
            if not command.hidden:
                section = page.split(f"## {name}\n")[1].split("\n## ")[0]
                assert all(f"`{option}`" in section for p in command.params for option in p.opts if option[0] == "-")

    walk("moectl", get_command(app))


def test_exit_codes_are_those_there_are() -> None:
    assert {int(code) for code, _ in reference_commands.EXITS} >= {int(code) for code in Exit}


def test_check_names_pages_that_are_stale_missing_or_from_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reference.main(["--write", str(tmp_path)]) == 0
    assert reference.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "knobs.md").write_text("by hand")
    (tmp_path / "metrics.md").unlink()
    (tmp_path / "more.md").write_text("")
    assert reference.main(["--check", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert all(name in told for name in ("knobs.md", "metrics.md", "more.md"))
    assert "commands.md" not in told


def test_the_committed_pages_are_what_the_types_give() -> None:
    assert reference.main(["--check", str(ROOT / "docs/reference")]) == 0
