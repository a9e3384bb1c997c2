"""`moectl diff`: what a change costs, which GPUs it needs, whether it fits, and how a script learns of it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_api.fields import Disruption
from moe_api.load import load_object
from moe_api.v1alpha1 import MoEDeployment
from moe_cli.diff import DiffReport, lines, report
from moe_cli.main import main
from tests.kube.api_server import Handler, answer, stand_in, status

HOT, ROLLING, REVISION = Disruption.HOT, Disruption.ROLLING, Disruption.REVISION
GPT = {"name": "gpt", "provider": "openai", "model": "gpt-5.5", "secretRef": {"name": "openai", "key": "apiKey"}}
SPILL = {"targets": [GPT], "budget": {"usdPerDay": "20"}}
KEPT = {**SPILL, "dataPolicy": {"egress": "Never"}}
EXTERNAL = {"engine": {"kind": "External", "url": "http://sglang:30000/v1"}, "hardware": None}
LONGER = {"engine": {"maxModelLen": 32_768}}
SEED = {"engine": {"extraArgs": {"seed": "7"}}}
ZERO = {"replicas": {"min": 0, "max": 1}}


def document(running: int | None = None, metadata: dict[str, Any] | None = None, **groups: Any) -> dict[str, Any]:
    """Qwen3-235B on 4×H100; `running`: replicas of its status; None removes a group."""
    spec = {
        "model": {"id": "Qwen/Qwen3-235B-A22B-FP8"},
        "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
    } | groups
    found: dict[str, Any] = {
        "apiVersion": "moestack.dev/v1alpha1",
        "kind": "MoEDeployment",
        "metadata": {"name": "qwen3", "namespace": "chat", **(metadata or {})},
        "spec": {name: group for name, group in spec.items() if group is not None},
    }
    if running is not None:
        found["status"] = {"replicas": running}
    return found


def resource(running: int | None = None, **groups: Any) -> MoEDeployment:
    return load_object(document(running, **groups))


def upgraded(strategy: str, **groups: Any) -> dict[str, Any]:
    return {"upgrade": {"strategy": strategy}, "fallback": SPILL, **groups}


# name: (old with the replicas that run, new, worst class, GPUs that must be free, outage, words)
Row = tuple[dict[str, Any], dict[str, Any], Disruption | None, int, bool, tuple[str, ...]]
CASES: dict[str, Row] = {
    "nothing": ({}, {}, None, 0, False, ("nothing happens",)),
    "the same in other words": ({}, {"quality": {"maxLostGateMass": "0.020"}}, None, 0, False, ()),
    "an SLO": ({}, {"slo": {"ttftP95": "1s"}}, HOT, 0, False, ("no request notices",)),
    "more replicas": (
        {"running": 2}, {"replicas": {"min": 5}}, HOT, 12, False, ("12 nvidia-h100 GPUs (3 × 4) more must be free",),
    ),
    "fewer replicas": (
        {"running": 4, "replicas": {"min": 4}}, {"replicas": {"min": 1, "max": 4}}, HOT, 0, False,
        ("no request notices",),
    ),
    "an engine argument, one replica": (
        {"running": 1}, SEED, ROLLING, 0, True, ("an outage: the only replica stops", "503: no closed API"),
    ),
    "the same with a closed API": (
        {"running": 1, "fallback": SPILL}, {**SEED, "fallback": SPILL}, ROLLING, 0, True,
        ("an outage", "answers from the closed API"),
    ),
    "the same with one that nothing may reach": (
        {"running": 1, "fallback": KEPT}, {**SEED, "fallback": KEPT}, ROLLING, 0, True, ("503",),
    ),
    "an engine argument, twelve replicas": (
        {"running": 12}, {**SEED, "replicas": {"min": 12}}, ROLLING, 0, False,
        ("2 of 12 replicas at a time are replaced; the others answer",),
    ),
    "an engine argument, none runs": (
        {**ZERO, "fallback": SPILL}, {**SEED, **ZERO, "fallback": SPILL}, ROLLING, 0, False, ("no replica runs",),
    ),
    "Surge: replicas now × GPUs of a new one": (
        {"running": 3}, {**LONGER, "replicas": {"min": 1, "max": 3}}, REVISION, 12, False,
        ("Surge: a second Ray cluster", "12 nvidia-h100 GPUs (3 × 4) must be free", "5, 25, 50, 100 %", "each for 2m"),
    ),
    "Surge to larger replicas": (
        {"running": 2},
        {"hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 8}, "replicas": {"min": 2}},
        REVISION, 16, False, ("16 nvidia-h100 GPUs (2 × 8) must be free",),
    ),
    "Surge under a lower ceiling": (
        {"running": 3}, {**LONGER, "replicas": {"min": 1, "max": 2}}, REVISION, 8, False, ("(2 × 4) must be free",),
    ),
    "Bridge: no GPU beyond those given back": (
        {"running": 2, **upgraded("Bridge")}, {**upgraded("Bridge", **LONGER), "replicas": {"min": 2}},
        REVISION, 0, False, ("Bridge: the old Ray cluster goes before", "(2 × 4) are given back first", "at most 30m"),
    ),
    "Bridge to larger replicas": (
        {"running": 1, **upgraded("Bridge")},
        upgraded("Bridge", hardware={"accelerator": "nvidia-h100", "gpusPerReplica": 8}),
        REVISION, 4, False, ("4 more must be free",),
    ),
    "Recreate is an outage": (
        {"running": 1, **upgraded("Recreate")}, upgraded("Recreate", **LONGER), REVISION, 0, True,
        ("Recreate: an outage",),
    ),
    "suspending without a closed API": (
        {"running": 1}, {"suspend": True}, REVISION, 0, True, ("4 nvidia-h100 GPUs (1 × 4) given back", "503"),
    ),
    "suspending with one": (
        {"running": 1, "fallback": SPILL}, {"suspend": True, "fallback": SPILL}, REVISION, 0, False,
        ("answers from the closed API",),
    ),
    "resuming": ({"suspend": True}, {}, REVISION, 4, False, ("starts: 4 nvidia-h100 GPUs (1 × 4) must be free",)),
    "a change while suspended": (
        {"suspend": True}, {"suspend": True, **LONGER}, REVISION, 0, False, ("when it resumes",),
    ),
    "to an external engine": (
        {"running": 2}, EXTERNAL, REVISION, 0, False, ("turns to the external engine; then 8 nvidia-h100 GPUs",),
    ),
    "from an external engine": (EXTERNAL, {}, REVISION, 4, False, ("Nothing local runs now",)),
    "ranks on cpu": (
        {"running": 1, "hardware": {"accelerator": "cpu", "gpusPerReplica": 2}},
        {"hardware": {"accelerator": "cpu", "gpusPerReplica": 1}}, REVISION, 1, False, ("1 CPU ranks (1 × 1)",),
    ),
    "the costliest of several": (
        {"running": 1}, {**LONGER, "slo": {"ttftP95": "1s"}, "experts": {"redundant": 4}}, REVISION, 4, False, (),
    ),
}  # fmt: skip


def judged(name: str) -> DiffReport:
    """Both sides with the same bounds of replicas, wide enough for what runs, where a row says none."""
    old, new, *_ = CASES[name]
    bounds = {"replicas": {"min": 1, "max": old.get("running", 1)}}
    return report(resource(**bounds | old), resource(**bounds | new))


@pytest.mark.parametrize("name", CASES)
def test_what_a_change_means(name: str) -> None:
    _, _, cost, gpus, outage, words = CASES[name]
    found = judged(name)
    assert (found.worst, found.gpus_needed_free, found.outage) == (cost, gpus, outage), found.meaning
    assert [word for word in words if word not in found.meaning] == [], found.meaning
    assert found.changed is (cost is not None)


def test_every_change_with_its_class() -> None:
    found = report(resource(), resource(**LONGER, slo={"ttftP95": "1s"}, experts={"redundant": 4}))
    assert {change.path: (change.old, change.new, change.disruption) for change in found.changes} == {
        "spec.engine.maxModelLen": (None, 32_768, REVISION),
        "spec.experts.redundant": (0, 4, ROLLING),
        "spec.slo.ttftP95": ("2s", "1s", HOT),
    }
    text = lines(found)
    assert text[0] == "chat/qwen3: 3 changes"
    assert "  spec.slo.ttftP95: 2s → 1s (hot)" in text
    assert text[-2].startswith("revision: Surge")


def test_what_is_created() -> None:
    found = report(None, resource())
    assert (found.creates, found.changed, found.worst, found.gpus_needed_free) == (True, True, None, 4)
    assert lines(found)[:2] == [
        "chat/qwen3: would be created",
        "new: a Ray cluster starts: 4 nvidia-h100 GPUs (1 × 4) must be free.",
    ]
    assert report(None, resource(suspend=True)).gpus_needed_free == 0
    assert "no GPU is taken" in report(None, resource(**EXTERNAL)).meaning


def test_labels_and_annotations_of_the_file_alone() -> None:
    old = resource(metadata={"labels": {"team": "a", "kept": "x"}, "annotations": {"moestack.dev/paused": "true"}})
    new = resource(metadata={"labels": {"team": "b"}})
    found = report(old, new)
    assert [(change.path, change.old, change.new) for change in found.changes] == [("metadata.labels[team]", "a", "b")]
    assert found.worst is HOT


FITS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "it does": ({}, "True", "Fits", "fits (Fits): qwen3-235b-a22b in fp8 on 4 × nvidia-h100"),
    "it does not": (
        {"model": {"id": "Qwen/Qwen3-235B-A22B"}}, "False", "DoesNotFit", "does not fit: no pods would be made for it"),
    "nobody knows": ({"model": {"id": "org/own"}}, "Unknown", "UnknownModel", "fit unknown (UnknownModel)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_the_verdict_on_the_new_spec(name: str) -> None:
    groups, status, reason, words = FITS[name]
    found = report(resource(), resource(**groups))
    assert (found.fit.status, found.fit.reason) == (status, reason)
    assert lines(found)[-1].startswith(words)


def test_no_secret_is_shown() -> None:
    key = "sk-live-0123456789abcdef"
    env = [{"name": "NOTE", "value": key}]
    found = report(resource(), resource(podTemplate={"env": env}))
    assert found.changes
    assert key not in json.dumps(found.to_json())
    assert key not in "\n".join(lines(found))


Moectl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moectl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Moectl:
    """Runs moectl in this process: exit code, stdout, stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moectl", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def write(path: Path, **groups: Any) -> Path:
    path.write_text(yaml.safe_dump(document(**groups)))
    return path


def test_exit_codes(moectl: Moectl, tmp_path: Path) -> None:
    old, new = write(tmp_path / "old.yaml"), write(tmp_path / "new.yaml", **LONGER)
    code, out, _ = moectl("diff", old, "--against", old)
    assert (code, out.splitlines()[0]) == (0, "chat/qwen3: no change")
    code, out, _ = moectl("diff", new, "--against", old)
    assert code == 1
    assert "spec.engine.maxModelLen: unset → 32768 (revision)" in out
    code, out, err = moectl("diff", write(tmp_path / "bad.yaml", slo={"ttftP95": 800}), "--against", old)
    assert (code, out) == (2, "")
    assert "spec.slo.ttftP95" in err
    code, _, err = moectl("diff", new, "--against", tmp_path / "none.yaml")
    assert code == 2
    assert "there is no such file" in err


def test_the_report_for_programs(moectl: Moectl, tmp_path: Path) -> None:
    old, new = write(tmp_path / "old.yaml"), write(tmp_path / "new.yaml", **LONGER)
    code, out, err = moectl("diff", new, "--against", old, "--json")
    found = json.loads(out)
    assert (code, err) == (1, "")
    assert found["changes"] == [{"path": "spec.engine.maxModelLen", "new": 32768, "disruption": "revision"}]
    assert (found["worst"], found["outage"], found["gpusNeededFree"]) == ("revision", False, 4)
    assert found["fit"]["status"] == "True"
    assert found["fit"]["plan"]["tensor"] == 4


def test_another_object_is_called_one(moectl: Moectl, tmp_path: Path) -> None:
    old = write(tmp_path / "old.yaml", metadata={"name": "other"})
    code, out, _ = moectl("diff", write(tmp_path / "new.yaml"), "--against", old)
    assert (code, out.splitlines()[0]) == (0, "chat/qwen3: no change (against another object, chat/other)")


def kubeconfig(folder: Path, url: str) -> Path:
    path = folder / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "current-context": "one",
                "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": url}}],
                "users": [{"name": "u", "user": {"token": "a-token-of-a-person"}}],
            }
        )
    )
    return path


PATH = "/apis/moestack.dev/v1alpha1/namespaces/{}/moedeployments/qwen3"
LIVE = document(3, metadata={"uid": "u-1", "resourceVersion": "7", "managedFields": [{"manager": "kubectl"}]})
# name: (what the API server answers, exit code, words on standard output, words on standard error)
ANSWERS: dict[str, tuple[Handler, int, str, str]] = {
    "the object": (answer(LIVE), 1, "12 nvidia-h100 GPUs (3 × 4) must be free", ""),
    "none yet": (status(404, "not found", reason="NotFound", name="qwen3"), 1, "chat/qwen3: would be created", ""),
    "no such kind": (answer("404 page not found", 404), 3, "", "install the chart"),
    "no right": (status(403, "u cannot get moedeployments", reason="Forbidden"), 3, "", "ask for the right"),
    "a broken server": (status(500, "etcd is gone"), 3, "", "etcd is gone"),
    "an object of another version": (
        answer({**LIVE, "spec": {**LIVE["spec"], "later": 1}}), 2, "", "update moectl",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
async def test_what_is_in_the_cluster(name: str, moectl: Moectl, tmp_path: Path) -> None:
    handler, wanted, said, complained = ANSWERS[name]
    file = write(tmp_path / "new.yaml", **LONGER, replicas={"min": 1, "max": 3})
    async with stand_in() as server:
        server.answers = [handler]
        code, out, err = await asyncio.to_thread(
            moectl, "diff", file, "--kubeconfig", kubeconfig(tmp_path, server.url), "--context", "one"
        )
    assert code == wanted, err
    assert (said in out, complained in err) == (True, True), out + err
    assert [(asked.method, asked.path) for asked in server.asked] == [("GET", PATH.format("chat"))]
    assert "a-token-of-a-person" not in out + err


async def test_a_namespace_for_a_file_without_one(moectl: Moectl, tmp_path: Path) -> None:
    plain = document()
    del plain["metadata"]["namespace"]
    file = tmp_path / "new.yaml"
    file.write_text(yaml.safe_dump(plain))
    async with stand_in() as server:
        server.answers = [status(404, "not found", reason="NotFound", name="qwen3")]
        config = kubeconfig(tmp_path, server.url)
        code, out, _ = await asyncio.to_thread(moectl, "diff", file, "--kubeconfig", config, "-n", "team")
    assert (code, out.splitlines()[0]) == (1, "team/qwen3: would be created")
    assert server.asked[0].path == PATH.format("team")


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "a namespace that is not the file's": (["--namespace", "other"], 2, "--namespace: other is not the namespace"),
    "two sources": (["--against", "old.yaml", "--context", "one"], 2, "no cluster is asked"),
    "no kubeconfig": (["--kubeconfig", "none"], 2, "no kubeconfig at none"),
    "nobody listens": (["--kubeconfig", "kubeconfig"], 3, "the API server does not answer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, moectl: Moectl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, wanted, complaint = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    kubeconfig(tmp_path, "http://127.0.0.1:1")
    code, out, err = moectl("diff", write(tmp_path / "new.yaml"), *words)
    assert (code, out) == (wanted, "")
    assert complaint in err
