"""Files that `up` and `validate` refuse: one message with field and remedy, a non-zero exit, nothing started."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_cli import launch
from moe_cli.main import main
from moe_cli.outcome import Exit
from tests.cli.cli_world import document, safetensors, write_checkpoint

ROOT = Path(__file__).parents[2]
Moectl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moectl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Moectl:
    """Runs moectl in this process: exit code, stdout, stderr. Starting a supervisor fails the test."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a stack was started")

    monkeypatch.setattr(launch, "_supervisor", never)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moectl", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def spoil(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def gpus(count: int) -> dict[str, Any]:
    return {"hardware": {"accelerator": "cpu", "gpusPerReplica": count}}


@pytest.mark.parametrize(
    ("name", "groups", "flags", "field", "remedy"),
    [
        ("no model", {"model": None}, ["--tiny"], "spec.model", "add it"),
        ("unknown field", {"slo": {"ttftP95": "1s", "itlP59": "1s"}}, ["--tiny"], "spec.slo.itlP59", "itlP95?"),
        (
            "impossible bounds",
            {"tuning": {"bounds": {"capacityFactor": {"min": "4", "max": "2"}}}},
            ["--tiny"],
            "spec.tuning.bounds.capacityFactor.max",
            "at least min",
        ),
        (
            "γ·k below 1",
            {"experts": {"perToken": 2, "overflow": "Drop", "capacityFactor": {"prefill": "0.25"}}},
            ["--tiny"],
            "spec.experts.capacityFactor.prefill",
            "at least 1",
        ),
        ("an SLO without a unit", {"slo": {"ttftP95": 800}}, ["--tiny"], "spec.slo.ttftP95", "800ms"),
        ("more than the machine has", gpus(1024), [], "spec.hardware.gpusPerReplica", "--tiny"),
        ("a GPU", {"hardware": {"accelerator": "nvidia-h100"}}, [], "spec.hardware.accelerator", "--tiny"),
        ("a model that is elsewhere", gpus(1), [], "spec.model.id", "--tiny"),
        (
            "a missing checkpoint",
            {"model": {"id": "a/b", "source": "/no/such/folder"}},
            ["--tiny"],
            "spec.model.source",
            "config.json",
        ),
    ],
)
def test_a_bad_file_is_refused(
    name: str, groups: dict[str, Any], flags: list[str], field: str, remedy: str, moectl: Moectl, tmp_path: Path
) -> None:
    file = tmp_path / "moe.yaml"
    file.write_text(yaml.safe_dump(document(**groups)))
    code, out, err = moectl("up", file, *flags, "--state-dir", tmp_path / "state")
    assert code == Exit.BAD_INPUT
    assert field in err
    assert remedy in err
    assert (out, "Traceback" in err) == ("", False)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("configuration cut short", spoil("config.json", b'{"architectures": ['), "config.json cannot be read"),
        ("configuration of nothing", spoil("config.json", b"{}"), "names no architecture"),
        ("weights cut short", cut_short, "its header says"),
        ("weights that are a web page", spoil("model.safetensors", b"<html>not found</html>"), "no safetensors"),
        ("an empty file", spoil("model.safetensors", b""), "no safetensors"),
        ("damaged header", spoil("model.safetensors", b"\x05" + b"\0" * 7 + b"hello"), "damaged header"),
        (
            "a shard missing",
            spoil("model.safetensors.index.json", b'{"weight_map": {"w": "m-2.safetensors"}}'),
            "missing",
        ),
        ("damaged index", spoil("model.safetensors.index.json", b"{"), "index.json cannot be read"),
        ("no weights", lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--tiny"]], ids=["as written", "tiny"])
def test_a_corrupt_checkpoint_is_refused_before_anything_starts(
    name: str, damage: Callable[[Path], None], said: str, flags: list[str], moectl: Moectl, tmp_path: Path
) -> None:
    damage(write_checkpoint(tmp_path / "m"))
    file = tmp_path / "moe.yaml"
    file.write_text(yaml.safe_dump(document(model={"id": "a/b", "source": "./m"}, **gpus(1))))
    code, _, err = moectl("up", file, *flags, "--state-dir", tmp_path / "state")
    assert code == Exit.BAD_INPUT
    assert err.count("error:") == 1
    assert "spec.model.source" in err
    assert said in err
    assert "→" in err
    assert not (tmp_path / "state").exists()


def test_a_whole_checkpoint_passes_and_gamma_is_checked_against_its_own_k(moectl: Moectl, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", top_k=2)
    file = tmp_path / "moe.yaml"
    experts = {"overflow": "Reroute", "capacityFactor": {"prefill": "0.4"}}
    file.write_text(yaml.safe_dump(document(model={"id": "a/b", "source": "./m"}, experts=experts, **gpus(1))))
    code, _, err = moectl("up", file, "--state-dir", tmp_path / "state")
    assert code == Exit.BAD_INPUT
    assert "spec.experts.capacityFactor.prefill: 0.4 × 2" in err
    assert "at least 0.5" in err


def test_every_problem_of_every_file_is_told(moectl: Moectl, tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.yaml", tmp_path / "good.yaml"
    bad.write_text(yaml.safe_dump(document(slo={"ttftP95": 800, "itlP59": "1s"})))
    good.write_text(yaml.safe_dump(document()))
    code, out, err = moectl("validate", bad, good, tmp_path / "none.yaml")
    assert code == Exit.BAD_INPUT
    for said in ("spec.slo.ttftP95", "spec.slo.itlP59", "there is no such file"):
        assert said in err
    assert f"{good}: ok" in out


def test_validate_shows_defaults(moectl: Moectl, tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(yaml.safe_dump(document()))
    code, out, _ = moectl("validate", "--show", file)
    shown = yaml.safe_load(out)
    assert code == Exit.OK
    assert shown["spec"]["slo"] == {"ttftP95": "2s", "itlP95": "100ms"}


def test_the_committed_crd_is_what_the_types_give_and_a_changed_one_is_not(moectl: Moectl, tmp_path: Path) -> None:
    committed = ROOT / "manifests/crd/moestack.dev_moedeployments.yaml"
    assert moectl("crd", "--check", committed)[0] == Exit.OK
    written = tmp_path / "crd.yaml"
    assert moectl("crd", "--write", written)[0] == Exit.OK
    assert written.read_bytes() == committed.read_bytes()
    written.write_text(written.read_text().replace("MoEDeployment", "Other", 1))
    code, _, err = moectl("crd", "--check", written)
    assert code == Exit.BAD_INPUT
    assert str(written) in err


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("a secret option without a file", ["--secret", "openai/apiKey"], "NAME/KEY=FILE"),
        ("a secret file that is not there", ["--secret", "openai/apiKey=/no/key"], "/no/key is no file"),
        ("a fallback that is no address", ["--fallback-url", "localhost:9"], "--fallback-url"),
        ("a port that is none", ["--port", "70000"], "--port"),
    ],
)
def test_options_are_refused_by_name(name: str, words: list[str], said: str, moectl: Moectl, tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(yaml.safe_dump(document()))
    code, _, err = moectl("up", file, "--tiny", *words, "--state-dir", tmp_path / "state")
    assert (code, said in err) == (Exit.BAD_INPUT, True)


def test_a_wrong_secret_option_is_not_repeated(moectl: Moectl, tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(yaml.safe_dump(document()))
    assert "pasted-key-by-mistake" not in moectl("up", file, "--secret", "pasted-key-by-mistake")[2]


def test_two_options_with_one_port(moectl: Moectl, tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(yaml.safe_dump(document()))
    code, _, err = moectl("up", file, "--tiny", "--port", "48123", "--prometheus-port", "48123")
    assert (code, "is also" in err) == (Exit.COULD_NOT_START, True)


def test_safetensors_builder_makes_whole_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(safetensors(b"1234"))
    assert (tmp_path / "x").stat().st_size == 8 + int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") + 4
