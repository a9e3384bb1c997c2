"""Loading a MoEDeployment: what is wrong is said once, by path, value and remedy, and nothing is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_api.load import ResourceInvalid, load_file, load_object, load_text
from moe_api.resource import MoEDeployment
from tests.api.documents import file_with as _file
from tests.api.documents import problems_of as _problems

DESIGN_EXAMPLE = """
apiVersion: moestack.dev/v1alpha1
kind: MoEDeployment
metadata: {name: qwen3}
spec:
  model: {id: Qwen/Qwen3-235B-A22B-FP8}
  hardware: {accelerator: nvidia-h100, gpusPerReplica: 4}
  slo: {ttftP95: 800ms, itlP95: 50ms}
  fallback:
    targets: [{name: gpt, provider: openai, model: gpt-5.5, secretRef: {name: openai, key: apiKey}}]
    budget: {usdPerDay: "200"}
  tuning: {mode: Auto}
"""


def test_the_example_of_the_design_is_enough() -> None:
    loaded = load_text(DESIGN_EXAMPLE)
    assert (loaded.key, loaded.spec.slo.ttft_p95.seconds, loaded.spec.tuning.mode) == ("default/qwen3", 0.8, "Auto")


def test_json_round_trip() -> None:
    loaded = load_text(DESIGN_EXAMPLE)
    assert load_object(loaded.to_json()) == loaded
    assert MoEDeployment.model_validate_json(loaded.model_dump_json(by_alias=True)) == loaded


BROKEN = {
    "empty": ("", 0, "is empty"),
    "only a comment": ("# nothing\n", 0, "is empty"),
    "two documents": (f"{_file()}\n---\n{_file()}", 8, "holds 2 documents"),
    "a list": ("- a\n", 1, "is not a mapping"),
    "a bare word": ("hello", 1, "is not a mapping"),
    "bad indentation": ("a:\n  b: 1\n c: 2\n", 3, "is not YAML"),
    "an open quote": ('a: "b\n', 2, "is not YAML"),
    "a tab": ("a:\n\tb: 1\n", 2, "is not YAML"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", 3, "'a' is there twice (first in line 1)"),
    "a key that is a number": ("a: 1\n2: b\n", 2, "a key must be text"),
    "a foreign tag": ("a: !!python/object/apply:os.system [ls]\n", 1, "is not allowed"),
    "a control character": ("a: \x07\n", 1, "not allowed"),
    "a loop": ("a: &a [*a]\n", 1, "nested too deeply"),
    "a bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{n}: &{n} [{','.join(['*' + p] * 10)}]\n" for p, n in zip("abcde", "bcdef", strict=True)),
        0,
        "too large",
    ),
    "too much": ("a: " + "x" * (1024 * 1024), 0, "larger than"),
    "deep nesting": ("[" * 5000, 0, "deeply"),
    "a number without end": ("a: " + "9" * 5000, 0, "is not YAML"),
}


@pytest.mark.parametrize("case", BROKEN, ids=list(BROKEN))
def test_broken_text_gets_one_clear_message(case: str) -> None:
    text, line, message = BROKEN[case]
    with pytest.raises(ResourceInvalid) as caught:
        load_text(text, "f.yaml")
    (problem,) = caught.value.problems
    assert message in problem.remedy
    assert not line or problem.line == line
    assert str(caught.value).startswith(f"f.yaml:{problem.line}: " if problem.line else "f.yaml: ")
    assert len(str(caught.value)) < 300


def test_null_counts_as_left_out_as_it_does_in_a_cluster() -> None:
    empty = load_text(_file("slo:", "tuning: {mode: null}", "tiers:"))
    assert empty == load_text(_file())
    assert _problems(_file("model:", drop="model"))["spec.model"] == (None, "is missing: add it (the checkpoint)")
    assert "did you mean slo?" in _problems(_file("slos:"))["spec.slos"][1]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: \xff\n")
    for path, message in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "is a folder"), (latin, "not UTF-8")):
        with pytest.raises(ResourceInvalid, match=message):
            load_file(path)
    assert load_file(_write(tmp_path, "\ufeff" + _file())).metadata.name == "m"


def _write(folder: Path, text: str) -> Path:
    path = folder / "m.yaml"
    path.write_text(text)
    return path


def test_all_problems_are_told_at_once_with_their_lines() -> None:
    text = _file(
        "slo: {ttftP95: 800}",
        "replicas: {min: 3, max: 2}",
        "tiers:",
        "  - {name: gold, tenants: [x]}",
        "  - {name: Silver, tenants: [x]}",
        'experts: {perToken: 2, overflow: Reroute, capacityFactor: {prefill: "0.4"}}',
        "surge: true",
    )
    with pytest.raises(ResourceInvalid) as caught:
        load_text(text, "f.yaml")
    assert [(problem.line, problem.path) for problem in caught.value.problems] == [
        (12, "spec.experts.capacityFactor.prefill"),
        (8, "spec.replicas.max"),
        (7, "spec.slo.ttftP95"),
        (13, "spec.surge"),
        (11, "spec.tiers[1].name"),
    ]
    assert str(caught.value).splitlines()[2] == (
        "f.yaml:7: spec.slo.ttftP95 = 800: a duration needs a unit: write 800ms or 1.5s"
    )


def test_a_rule_is_not_believed_when_what_it_reads_was_wrong() -> None:
    assert list(_problems(_file("engine: {kind: Externa, url: http://e:1/v1}", drop="hardware"))) == [
        "spec.engine.kind"
    ]
    assert list(_problems(_file("fallback: {targets: 5}", "replicas: {min: 0}"))) == ["spec.fallback.targets"]


def test_no_secret_is_echoed() -> None:
    key = "sk-abcdefghijklmnop"
    text = _file(
        f"fallback: {{targets: [{{name: a, provider: openai, model: m, apiKey: {key}, secretRef: {key}}}]}}",
        f"model: {{id: org/m, token: {key}, '{key}': 1}}",
        f"podTemplate: {{env: [{{name: A_TOKEN, value: {key}}}, {{name: '{key}', value: x}}],"
        f" labels: {{'{key}*': '{key}'}}}}",
        drop="model",
    )
    with pytest.raises(ResourceInvalid) as caught:
        load_text(text, "f.yaml")
    assert len(caught.value.problems) >= 6
    assert key not in str(caught.value)
    assert key not in repr(caught.value.problems)
