"""Every command that README and docs tell people: taken by the real parser, or run where that is cheap.

The tutorial's own commands are run, in order, on the real stack by test_docs_tutorial.py.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_cli.main import main
from tests.docs import selected
from tests.docs.checks import CHECKS, PLACEHOLDERS
from tests.docs.conftest import COLLECTED
from tests.docs.shell import PROGRAMS, ROOT, Command, commands, pages, python_blocks

ALL = [command for page in pages() for command in commands(page)]
ENOUGH = 4000
"""A session that has collected so many tests has collected all that docs may name."""
EXAMPLE = "manifests/examples/profile-b-qwen3.yaml"
SCENARIOS = "planner/moe_planner/sim/scenarios.json"
STAND_INS = {"FILE": EXAMPLE, "FILE.yaml": EXAMPLE, "FILE.json": SCENARIOS, **PLACEHOLDERS}
TRACES = ("requests.csv", "azure_llm_2023_code.csv")
RUN = ("plan", "simulate", "validate", "crd", "version", "diff")
"""Commands of moectl that need nothing but files."""
NEEDS = {
    "../shared/": "data that is not in this repository",
    "DIR": "traces that are not in this repository",
    "--config": "a config.json that a person has",
}
"""What a command that is parsed and not run would need."""


def runnable(command: Command) -> bool:
    """Whether a command of a block can be run here: by files of this repository alone."""
    if not command.block or command.program != "moectl" or len(command.words) < 2 or command.words[1] not in RUN:
        return False
    if command.words[1] == "diff" and "--against" not in command.words:
        return False  # asks a cluster
    return not any(need in word for word in command.words for need in NEEDS)


def test_there_are_commands_of_every_program() -> None:
    found = {program: sum(command.program == program for command in ALL) for program in PROGRAMS}
    assert len(ALL) > 200
    assert all(found[program] > 0 for program in ("moectl", "make", "pytest", "python", "helm", "kubectl")), found


def test_every_program_of_a_block_is_known() -> None:
    unknown = [str(command) for command in ALL if command.program not in (*CHECKS, "pytest", "python")]
    assert unknown == []


@pytest.mark.parametrize("program", sorted(CHECKS))
def test_its_own_parser_takes_every_command(program: str) -> None:
    asked = [command for command in ALL if command.program == program]
    complaints = [f"{command}: {said}" for command in asked if (said := CHECKS[program](command))]
    assert complaints == []


def test_a_command_that_is_wrong_is_found() -> None:
    wrong = {
        "moectl": [("moectl", "serve"), ("moectl", "plan", "--gpu", "4"), ("moectl", "load", "--rps", "many")],
        "make": [("make", "everything")],
        "kubectl": [("kubectl", "apply", "-f", "manifests/none.yaml"), ("kubectl", "get", "moes")],
        "helm": [("helm", "install", "m", "charts/none"), ("helm", "install", "m", "--set", "image.repo=x")],
        "docker": [("docker", "build", "-f", "images/none.Dockerfile")],
        "curl": [("curl", "$URL/v1/chats")],
    }
    for program, cases in wrong.items():
        for words in cases:
            assert CHECKS[program](Command("page", 1, words, block=True)), words


def test_modules_take_what_the_docs_give_them() -> None:
    asked = [command for command in ALL if command.program == "python" and command.words[1:2] == ("-m",)]
    others = {command.words[1] for command in ALL if command.program == "python" and command not in asked}
    assert others <= {"-", "-c"}, "a program that the page shows itself"
    whole = [[*command.words[2:]] for command in asked]
    done = _json("tests.docs.parse_modules", [*whole, ["moe_gateway", "--confg", "x"]])
    assert isinstance(done, list)
    assert done.pop() is not None, "a wrong option is found"
    named = [
        said if command.block or len(command.words) > 3 else None for command, said in zip(asked, done, strict=True)
    ]
    assert [f"{command}: {said}" for command, said in zip(asked, named, strict=True) if said] == []


def test_tests_that_the_docs_name_are_there(request: pytest.FixtureRequest) -> None:
    asked = [command for command in ALL if command.program == "pytest"]
    words = sorted({command.words[1:] for command in asked})
    items = request.config.stash[COLLECTED]
    if len(items) >= ENOUGH:
        counts = [selected.count(items, each) for each in words]
        names = {item.nodeid.partition("[")[0].rpartition("::")[2] for item in items}
        none = selected.count(items, ("tests/docs", "-k", "no_such_test_is_here"))
    else:
        done = _json("tests.docs.selected", [["tests"], *map(list, words)])
        assert isinstance(done, dict)
        counts, names, none = done["counts"][1:], set(done["names"]), 0
    assert none == 0
    empty = [each for each, count in zip(words, counts, strict=True) if count == 0]
    assert [str(command) for command in asked if command.words[1:] in empty] == []
    named = {
        name
        for page in pages()
        for code in re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8"))
        for name in re.findall(r"\btest_[a-z0-9_]{12,}\b(?!\.py)", code)
    }
    stems = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert sorted(named - names - stems) == []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which relative paths of the docs work, and what is written goes nowhere else."""
    for name in ("manifests", "charts", "planner", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = [f"2026-01-01 00:{second // 60:02}:{second % 60:02}.0000000,700,90" for second in range(300)]
    for name in TRACES:
        (tmp_path / name).write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    own = re.search(r"^```toml\n(.*?)^```", (ROOT / "docs/howto/profile-d.md").read_text(), re.MULTILINE | re.DOTALL)
    assert own is not None
    (tmp_path / "mine.toml").write_text(own.group(1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHEAP = sorted({command.words for command in ALL if runnable(command)})


@pytest.mark.parametrize("words", CHEAP, ids=" ".join)
def test_what_needs_only_files_is_run(
    words: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [STAND_INS.get(word, word) for word in words])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    refused = "refused" in _comment(words)
    assert ended.value.code == (2 if refused else 1 if words[1] == "diff" else 0), told.err
    assert refused or told.out or "--output" in words
    assert not (place / "none").exists()


def _comment(words: tuple[str, ...]) -> str:
    """What the page says behind a command: `# refused: …` is a command that is shown because it fails."""
    page, line = next((command.page, command.line) for command in ALL if command.words == words)
    return (ROOT / page).read_text(encoding="utf-8").splitlines()[line - 1].partition(" # ")[2]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"`[^`]*`", "", text))
    own = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in own if not (page.parent / link).exists()] == []


def test_python_that_the_docs_show_compiles() -> None:
    for page in pages():
        for block in python_blocks(page):
            ast.parse(block)


def _json(module: str, asked: object) -> object:
    """What a module of these tests answers, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.index(done.stdout.lstrip()[0]) :])
