"""`python -m moe_operator` as others start it, without a cluster: bad files refused, the address of none, the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_core.signing import Signer
from moe_operator.__main__ import main

ROOT = Path(__file__).parents[2]
PARTS = ("api", "core", "planner", "kube", "operator")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in PARTS)}
TOKEN = "a-token-that-nobody-may-see"


def kubeconfig(path: Path, server: str = "http://127.0.0.1:1") -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "x", "cluster": {"server": server}}],
        "users": [{"name": "x", "user": {"token": TOKEN}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))
    return path


def _text(text: str) -> Callable[[Path], str]:
    return lambda _: text


def _with(**fields: Any) -> Callable[[Path], str]:
    return lambda _: json.dumps(fields)


def _bad_key(folder: Path) -> str:
    (folder / "key").write_text("this is a SECRET and no key")
    return json.dumps({"signingKeyFile": str(folder / "key")})


REFUSED: dict[str, tuple[Callable[[Path], str], str]] = {
    "no JSON": (_text("{"), "Invalid JSON"),
    "an unknown field": (_with(wokers=3), "wokers"),
    "no worker": (_with(workers=0), "workers"),
    "a pace of nothing": (_with(qps=0), "qps"),
    "a namespace twice": (_with(namespaces=["a", "b", "a"]), "namespaces: 'a'"),
    "a namespace without a name": (_with(namespaces=[""]), "namespaces: ''"),
    "no namespace of its own": (_with(namespace=""), "namespace: must name"),
    "a key that is not there": (_with(signingKeyFile="/nowhere/key"), "signingKeyFile /nowhere/key: cannot be read"),
    "a key that is none": (_bad_key, "signingKeyFile: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_configuration_is_refused_by_field_with_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, says = REFUSED[case]
    path = tmp_path / "operator.json"
    path.write_text(make(tmp_path))
    assert main(["--config", str(path), "--kubeconfig", str(kubeconfig(tmp_path / "kc"))]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "SECRET" not in said


def test_a_configuration_that_is_not_there_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "not: [yaml", "{}"], ids=["missing", "broken", "empty"])
def test_a_kubeconfig_that_cannot_be_used_is_exit_code_2(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, access = tmp_path / "operator.json", tmp_path / "kc"
    config.write_text("{}")
    if content is not None:
        access.write_text(content)
    assert main(["--config", str(config), "--kubeconfig", str(access)]) == 2
    assert str(access) in capsys.readouterr().err


def test_without_an_api_server_it_lives_says_so_and_ends_at_sigterm(tmp_path: Path) -> None:
    key = tmp_path / "key"
    Signer.generate().save(key)
    config = tmp_path / "operator.json"
    config.write_text(json.dumps({"signingKeyFile": str(key), "leaseS": 3}))
    command = [sys.executable, "-m", "moe_operator", "--config", str(config), "--kubeconfig"]
    process = subprocess.Popen(
        [*command, str(kubeconfig(tmp_path / "kc"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["ready"] is True
        assert ready["port"] > 0
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    lines = [json.loads(line) for line in said.splitlines()]
    assert lines[-1]["msg"] == "stopped"
    assert any("Connect" in str(line.get("reason")) for line in lines)
    assert TOKEN not in said
