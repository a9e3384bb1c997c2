"""Loading a MoEDeployment: what is wrong is said once, by path, value and remedy, and nothing is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_api.load import ResourceInvalid, load_file, load_object, load_text
from moe_api.resource import MoEDeployment

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


def _file(*extra: str, drop: str = "") -> str:
    """The smallest good file, without the lines that begin with `drop`, and with lines added to its spec."""
    lines = [
        "apiVersion: moestack.dev/v1alpha1",
        "kind: MoEDeployment",
        "metadata: {name: m}",
        "spec:",
        "  model: {id: org/m}",
        "  hardware: {accelerator: cpu, gpusPerReplica: 2}",
    ]
    kept = [line for line in lines if not drop or not line.strip().startswith(drop)]
    return "\n".join([*kept, *(f"  {line}" for line in extra)])


def _problems(text: str) -> dict[str, tuple[str | None, str]]:
    with pytest.raises(ResourceInvalid) as caught:
        load_text(text, "f.yaml")
    return {problem.path: (problem.value, problem.remedy) for problem in caught.value.problems}


def test_the_example_of_the_design_is_enough() -> None:
    loaded = load_text(DESIGN_EXAMPLE)
    assert (loaded.key, loaded.spec.slo.ttft_p95.seconds, loaded.spec.tuning.mode) == ("default/qwen3", 0.8, "Auto")


def test_json_round_trip() -> None:
    loaded = load_text(DESIGN_EXAMPLE)
    assert load_object(loaded.to_json()) == loaded
    assert MoEDeployment.model_validate_json(loaded.model_dump_json(by_alias=True)) == loaded


TARGET = "{name: gpt, provider: openai, model: gpt-5.5, secretRef: {name: openai, key: k}}"

BAD = {
    "no model": (_file(drop="model"), "spec.model", None, "is missing: add it (the checkpoint)"),
    "unknown field": (_file("replica: {min: 1}"), "spec.replica", None, "did you mean replicas?"),
    "unknown field in another case": (_file("slo: {ttft_p95: 1s}"), "spec.slo.ttft_p95", "1s", "did you mean ttftP95?"),
    "unknown field without a neighbour": (_file("slo: {zzz: 1}"), "spec.slo.zzz", "1", "use one of ttftP95, itlP95"),
    "an SLO without a unit": (_file("slo: {ttftP95: 800}"), "spec.slo.ttftP95", "800", "write 800ms or 1.5s"),
    "an SLO of zero": (_file("slo: {itlP95: 0s}"), "spec.slo.itlP95", "0s", "must be from 1ms to 1h"),
    "an SLO in days": (_file("slo: {itlP95: 1d}"), "spec.slo.itlP95", "1d", "not a duration"),
    "replicas crossed": (_file("replicas: {min: 3, max: 2}"), "spec.replicas.max", "2", "at least replicas.min"),
    "nobody to answer": (_file("replicas: {min: 0}"), "spec.replicas.min", "0", "add a fallback target"),
    "bounds crossed": (
        _file("tuning: {bounds: {capacityFactor: {min: 3, max: 2}}}"),
        "spec.tuning.bounds.capacityFactor.max",
        "2",
        "must be at least min",
    ),
    "bounds above the ceiling": (
        _file("engine: {maxActiveSeqs: 64}", "tuning: {bounds: {maxActiveSeqs: {max: 65}}}"),
        "spec.tuning.bounds.maxActiveSeqs.max",
        "65",
        "must be at most engine.maxActiveSeqs",
    ),
    "a pin outside its bounds": (
        _file('tuning: {pins: {capacityFactorPrefill: "4.5"}}'),
        "spec.tuning.pins.capacityFactorPrefill",
        "4.5",
        "must lie within tuning.bounds.capacityFactor",
    ),
    "a pinned policy that is not allowed": (
        _file("tuning: {pins: {overflow: Drop}}"),
        "spec.tuning.pins.overflow",
        "Drop",
        "must be one of tuning.bounds.overflow",
    ),
    "γ·k below one": (
        _file('experts: {overflow: Reroute, perToken: 2, capacityFactor: {prefill: "0.4"}}'),
        "spec.experts.capacityFactor.prefill",
        "0.4",
        "times experts.perToken must be at least 1",
    ),
    "γ·k below one at the lowest k of quality": (
        _file('experts: {overflow: Drop, capacityFactor: {decode: "0.24"}}', "quality: {minExpertsPerToken: 4}"),
        "spec.experts.capacityFactor.decode",
        "0.24",
        "times quality.minExpertsPerToken must be at least 1",
    ),
    "γ·k below one in a tier": (
        _file(
            'experts: {overflow: Reroute, capacityFactor: {prefill: "0.5"}}', "tiers: [{name: a, expertsPerToken: 1}]"
        ),
        "spec.experts.capacityFactor.prefill",
        "0.5",
        "times tiers[].expertsPerToken must be at least 1",
    ),
    "γ·k below one within the tuner's reach": (
        _file('tuning: {bounds: {capacityFactor: {min: "0.1"}}}', "experts: {perToken: 8}"),
        "spec.tuning.bounds.capacityFactor.min",
        "0.1",
        "times experts.perToken must be at least 1",
    ),
    "γ as a float": (
        _file("experts: {overflow: Drop, capacityFactor: {prefill: 1.25}}"),
        "spec.experts.capacityFactor.prefill",
        "1.25",
        'write it in quotes, "1.25"',
    ),
    "γ of zero": (
        _file('experts: {overflow: Drop, capacityFactor: {prefill: "0"}}'),
        "spec.experts.capacityFactor.prefill",
        "0",
        "must be above 0",
    ),
    "γ with nothing to hold it": (
        _file('experts: {capacityFactor: {prefill: "1.5"}}'),
        "spec.experts.overflow",
        None,
        "set Reroute, Drop or ExpertChoice",
    ),
    "k below the quality of its tier": (
        _file(
            "tiers: [{name: gold, expertsPerToken: 4}]",
            "quality: {minExpertsPerToken: 2, tiers: [{name: gold, minExpertsPerToken: 6}]}",
        ),
        "spec.tiers",
        None,
        "at least minExpertsPerToken",
    ),
    "k below quality": (
        _file("experts: {perToken: 2}", "quality: {minExpertsPerToken: 4}"),
        "spec.experts.perToken",
        "2",
        "must be at least quality.minExpertsPerToken",
    ),
    "quality of a tier that is not there": (
        _file("quality: {tiers: [{name: gold}]}"),
        "spec.quality.tiers",
        None,
        "must each be a tier of spec.tiers",
    ),
    "a share above one": (_file('quality: {maxLostGateMass: "1.5"}'), "spec.quality.maxLostGateMass", "1.5", "to 1"),
    "a tenant in two tiers": (
        _file("tiers: [{name: a, tenants: [x]}, {name: b, tenants: [x]}]"),
        "spec.tiers",
        None,
        "one tenant in two tiers",
    ),
    "a tier twice": (_file("tiers: [{name: a}, {name: a}]"), "spec.tiers", None, "name a is there twice"),
    "no hardware": (_file(drop="hardware"), "spec.hardware", None, "name the accelerator"),
    "a wrong product": (
        _file("parallelism: {tensor: 2, data: 2, pipeline: 1}"),
        "spec.parallelism",
        None,
        "tensor × data × pipeline must be hardware.gpusPerReplica",
    ),
    "a size that divides nothing": (_file("parallelism: {tensor: 3}"), "spec.parallelism", None, "chosen to fit"),
    "a wrong expert size": (
        _file("parallelism: {tensor: 2, data: 1, expert: 4}"),
        "spec.parallelism.expert",
        "4",
        "must be tensor × data, or 1",
    ),
    "external without url": (_file("engine: {kind: External}", drop="hardware"), "spec.engine.url", None, "is needed"),
    "external with hardware": (
        _file("engine: {kind: External, url: http://e:1/v1}"),
        "spec.hardware",
        None,
        "has no effect on an external engine",
    ),
    "a url on our own engine": (_file("engine: {url: http://e:1/v1}"), "spec.engine.url", "http://e:1/v1", "External"),
    "credentials in a url": (
        _file("engine: {kind: External, url: 'http://user:pw@e/v1'}", drop="hardware"),
        "spec.engine.url",
        None,
        "without credentials",
    ),
    "foreign code": (
        _file('engine: {extraArgs: {trust-remote-code: "true"}}'),
        "spec.engine.extraArgs.trust-remote-code",
        "true",
        "can run code from outside the image",
    ),
    "an argument with a field of its own": (
        _file('engine: {extraArgs: {max-num-seqs: "3"}}'),
        "spec.engine.extraArgs.max-num-seqs",
        "3",
        "set spec.engine.maxActiveSeqs",
    ),
    "an argument in the wrong form": (
        _file('engine: {extraArgs: {enforce-eager: "yes"}}'),
        "spec.engine.extraArgs.enforce-eager",
        "yes",
        '"true" or "false"',
    ),
    "a starved step": (
        _file("engine: {maxActiveSeqs: 64, maxBatchedTokens: 32}"),
        "spec.engine.maxBatchedTokens",
        "32",
        "must be at least maxActiveSeqs",
    ),
    "targets without a budget": (
        _file(f"fallback: {{targets: [{TARGET}]}}"),
        "spec.fallback.budget.usdPerDay",
        None,
        "set a bound on what they may cost",
    ),
    "money as a float": (
        _file("fallback: {budget: {usdPerDay: 12.5}}"),
        "spec.fallback.budget.usdPerDay",
        "12.5",
        'write it in quotes, "12.5"',
    ),
    "no target may be used": (
        _file(
            f"fallback: {{targets: [{TARGET}], budget: {{usdPerDay: 1}}, dataPolicy: {{egress: ZeroRetentionOnly}}}}"
        ),
        "spec.fallback.dataPolicy.egress",
        "ZeroRetentionOnly",
        "leaves no target",
    ),
    "a target without a key": (
        _file("fallback: {targets: [{name: a, provider: anthropic, model: m}], budget: {usdPerDay: 1}}"),
        "spec.fallback.targets[0].secretRef",
        None,
        "name and key of the Secret",
    ),
    "a bridge to nowhere": (_file("upgrade: {strategy: Bridge}"), "spec.upgrade.strategy", "Bridge", "fallback target"),
    "steps that fall": (_file("upgrade: {steps: [50, 25, 100]}"), "spec.upgrade.steps", None, "must rise"),
    "Off without quotes": (_file("tuning: {mode: Off}"), "spec.tuning.mode", "false", 'write "Off"'),
    "a word in another case": (_file("tuning: {mode: auto}"), "spec.tuning.mode", "auto", "did you mean Auto?"),
    "a count as text": (_file('replicas: {min: "2"}'), "spec.replicas.min", "2", "write it without quotes"),
    "a count with a fraction": (_file("replicas: {min: 1.5}"), "spec.replicas.min", "1.5", "whole number"),
    "text as a number": (_file("model: {id: 5}", drop="model"), "spec.model.id", "5", 'in quotes, "5"'),
    "a flag as text": (_file('suspend: "yes"'), "spec.suspend", "yes", "must be true or false"),
    "a list for a group": (_file("slo: [1]"), "spec.slo", None, "must be a mapping with ttftP95, itlP95"),
    "a group for a list": (_file("tiers: {name: a}"), "spec.tiers", None, "must be a list"),
    "a secret in the open": (
        _file("podTemplate: {env: [{name: HF_TOKEN, value: abc}]}"),
        "spec.podTemplate.env[0].name",
        "HF_TOKEN",
        "use secretRef",
    ),
    "a variable that runs code": (
        _file("podTemplate: {env: [{name: LD_PRELOAD, value: /x}]}"),
        "spec.podTemplate.env[0].name",
        "LD_PRELOAD",
        "runs code",
    ),
    "a gateway open to the world": (
        _file("gateway: {exposure: {kind: LoadBalancer}}"),
        "spec.gateway.auth.mode",
        None,
        "must be APIKeys or OIDC",
    ),
    "a store for one host": (
        _file("gateway: {budgetStore: {kind: SQLite}}"),
        "spec.gateway.budgetStore.kind",
        "SQLite",
        "serves one host",
    ),
    "a name too long": (_file().replace("name: m}", f"name: {'m' * 37}}}"), "metadata.name", "m" * 37, "at most 36"),
    "a name with capitals": (_file().replace("name: m}", "name: M}"), "metadata.name", "M", "lower-case letters"),
    "another kind": (_file().replace("MoEDeployment", "Deployment"), "kind", "Deployment", "must be MoEDeployment"),
    "another version": (_file().replace("v1alpha1", "v1"), "apiVersion", "moestack.dev/v1", "v1alpha1"),
    "no kind": (_file(drop="kind"), "kind", None, "write kind: MoEDeployment"),
    "a quantity in words": (
        _file("podTemplate: {sharedMemory: lots}"),
        "spec.podTemplate.sharedMemory",
        "lots",
        "80Gi",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_a_bad_file_names_path_value_and_remedy(case: str) -> None:
    text, path, value, remedy = BAD[case]
    problems = _problems(text)
    assert path in problems, problems
    assert value is None or problems[path][0] == value
    assert remedy in problems[path][1]
    assert len(problems) == 1, f"one mistake, one message: {problems}"


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
