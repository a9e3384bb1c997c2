"""moectl with real processes: fake parts, a real Prometheus, the real gateway where it matters. Nothing is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from moe_cli import processes
from moe_cli.documents import Phase, StackState, read_state
from moe_cli.outcome import Exit
from tests.cli.cli_world import write_resource

ROOT = Path(__file__).parents[2]
MOECTL = str(Path(__file__).parent / "moectl_with_fakes.py")
FOLDERS = ("api", "core", "planner", "kube", "operator", "serving", "gateway", "tuner", "cli")
LIMIT_S = 180.0  # for machines that are busy with an engine


class Bench:
    """A folder with a resource, and moectl to run on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.file = write_resource(folder, hardware={"accelerator": "nvidia-h100", "gpusPerReplica": 4})
        self.started: list[subprocess.Popen[str]] = []
        self.seen: set[str] = set()

    def start(self, *words: str, mode: str = "ok", **env: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, MOECTL, *words, "--state-dir", str(self.state_dir)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": ":".join(str(ROOT / f) for f in FOLDERS), "FAKE_SERVING": mode, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(child)
        return child

    def run(self, *words: str, mode: str = "ok", **env: str) -> tuple[int, str, str]:
        child = self.start(*words, mode=mode, **env)
        out, err = child.communicate(timeout=LIMIT_S)
        self.state()
        return child.returncode, out, err

    def up(self, *words: str, mode: str = "ok", **env: str) -> tuple[int, str, str]:
        return self.run("up", str(self.file), "--tiny", *words, mode=mode, **env)

    def state(self) -> StackState | None:
        state = read_state(self.state_dir)
        if state is not None:
            self.seen.add(state.stack_id)
        return state

    def await_state(self, reached: Callable[[StackState], bool]) -> StackState:
        def look() -> StackState | None:
            state = self.state()
            return state if state is not None and reached(state) else None

        return eventually(look)

    def left(self) -> list[psutil.Process]:
        self.state()
        return [process for stack in self.seen for process in processes.marked(stack)]


def eventually(look: Callable[[], Any]) -> Any:
    """What `look` gives, once it gives something. Real processes have no fake clock."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("it never came")


def is_up(state: StackState) -> bool:
    return state.phase is Phase.UP


def serving_pid(state: StackState) -> int:
    part = state.part("serving")
    assert part is not None
    assert part.proc is not None
    return part.proc.pid


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for child in bench.started:
        if child.poll() is None:
            child.kill()
        child.communicate()
    left = bench.left()
    for stack in bench.seen:
        processes.end_marked(stack, grace_s=0.5)
    assert left == [], "the test left processes behind"


def test_up_serves_says_where_and_down_ends_it(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code, out, err = bench.up("--chat", "--fallback-url", "http://127.0.0.1:9/v1", "--port", str(port), KEEP="gateway")
    assert code == Exit.OK, err
    assert "substituted: spec.hardware.accelerator: nvidia-h100 → cpu" in out
    assert "answer from local: 't0 t1 t2 t3 '" in out
    state = bench.await_state(is_up)
    page = next(line for line in out.splitlines() if line.startswith("console:")).split()[-1]
    token = (bench.state_dir / "console.read").read_text()
    assert page == f"http://127.0.0.1:{state.fact('tuner', 'port')}/console/#token={token}"
    assert bench.run("console")[1].strip() == page
    assert (bench.state_dir / "console.operate").read_text() in bench.run("console", "--operate")[1]
    for name in ("console.read", "console.operate"):
        assert (bench.state_dir / name).stat().st_mode & 0o077 == 0
        assert (bench.state_dir / name).read_text() not in (bench.state_dir / "state.json").read_text()
    for line in (f"OpenAI API:    http://127.0.0.1:{port}/v1", "Prometheus:", "board:", "curl http", "left running"):
        assert line in out
    assert [p.name for p in (bench.state_dir / "signing.pem", bench.state_dir) if p.stat().st_mode & 0o077] == []

    code, out, _ = bench.run("status", "--json")
    report = json.loads(out)
    assert code == Exit.OK
    assert report["running"]
    assert {part["name"]: part["answers"] for part in report["parts"]} == {
        "prometheus": True,
        "serving": True,
        "gateway": True,
        "tuner": True,
    }
    figures = report["figures"]
    assert (figures["imbalance"], figures["overflow"], figures["maxActiveSeqs"]) == (1.5, "Unlimited", 64)
    assert figures["decisions"] == ["fast loop: tighten → version 2: queue of 9 above 4"]

    prometheus = state.fact("prometheus", "url")
    jobs = {"moestack-board", "moestack-gateway"}
    assert eventually(lambda: scraped(f"{prometheus}") >= jobs)

    code, out, err = bench.run("up", str(bench.file), "--tiny")
    assert code == Exit.COULD_NOT_START
    assert f"supervisor pid {state.supervisor.pid}" in err
    assert "moectl down" in err

    code, out, _ = bench.run("load", "--rps", "50", "--seconds", "1", "--burstiness", "0.5", "--json")
    result = json.loads(out)
    assert code == Exit.OK
    assert result["sent"] == result["ok"] > 10
    assert result["targets"]["local"]["ok"] == result["ok"]

    assert bench.run("down")[0] == Exit.OK
    assert bench.left() == []
    assert list(bench.state_dir.glob("console.*")) == [], "tokens end with their stack"
    assert bench.run("console")[0] == Exit.COULD_NOT_START
    code, out, _ = bench.run("down")
    assert (code, "nothing is running" in out) == (Exit.OK, True)
    assert "nothing is running" in bench.run("status")[1]


def test_the_console_of_a_real_tuner_answers_who_has_its_token(bench: Bench) -> None:
    code, out, err = bench.up("--detach", KEEP="gateway tuner")
    assert code == Exit.OK, err
    page = next(line for line in out.splitlines() if line.startswith("console:")).split()[-1]
    base, _, token = page.partition("#token=")

    def ask(path: str, **headers: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(base + path, headers=headers), timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    assert ask("api/status") == (401, '{"error":"a token is needed"}')
    status, text = ask("api/status", Authorization=f"Bearer {token}")
    assert status == 200
    plan = {row["what"]: row["value"] for row in json.loads(text)["plan"]}
    assert plan["spec.hardware.accelerator"] == "nvidia-h100 → cpu"
    assert bench.run("tune", "status")[0] == Exit.OK
    assert ask("../v1/status")[0] == 401
    assert {part["name"]: part["answers"] for part in json.loads(bench.run("status", "--json")[1])["parts"]}["tuner"]
    assert bench.run("down")[0] == Exit.OK


def scraped(prometheus: str) -> set[str]:
    with urllib.request.urlopen(f"{prometheus}/api/v1/query?query=up==1", timeout=5) as answer:
        rows = json.load(answer)["data"]["result"]
    return {row["metric"]["job"] for row in rows}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(bench: Bench, number: signal.Signals) -> None:
    child = bench.start("up", str(bench.file), "--tiny", "--foreground")
    bench.await_state(is_up)
    child.send_signal(number)
    out, _ = child.communicate(timeout=LIMIT_S)
    assert child.returncode == Exit.INTERRUPTED
    assert "everything was stopped" in out
    assert bench.left() == []


def test_a_signal_while_it_starts_ends_everything(bench: Bench) -> None:
    child = bench.start("up", str(bench.file), "--tiny")
    bench.await_state(lambda state: state.part("prometheus").proc is not None)  # type: ignore[union-attr]
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=LIMIT_S)
    assert child.returncode == Exit.INTERRUPTED
    assert bench.left() == []


def test_a_crash_of_a_part_ends_the_rest_and_shows_its_last_words(bench: Bench) -> None:
    child = bench.start("up", str(bench.file), "--tiny", "--foreground")
    state = bench.await_state(is_up)
    request = urllib.request.Request(f"{state.fact('serving', 'url')}".replace("/v1", "/crash"), method="POST")
    with pytest.raises(OSError, match=r"closed|reset"):
        urllib.request.urlopen(request, timeout=5)
    _, err = child.communicate(timeout=LIMIT_S)
    assert child.returncode == Exit.CRASHED
    assert "Ray Serve + vLLM (part serving) ended with exit code 9" in err
    assert "the engine saw a NaN" in err
    assert bench.left() == []


@pytest.mark.parametrize(
    ("mode", "code", "said"),
    [
        ("refuse", Exit.COULD_NOT_START, "spec.model.id: no such architecture\n  → use another one"),
        ("crash", Exit.CRASHED, "segfault in the expert kernel"),
    ],
)
def test_an_engine_that_does_not_start(bench: Bench, mode: str, code: Exit, said: str) -> None:
    found, _, err = bench.up(mode=mode)
    assert found == code
    assert said in err
    assert bench.left() == []


def test_a_part_that_ignores_sigterm_is_killed(bench: Bench) -> None:
    assert bench.up(mode="stubborn")[0] == Exit.OK
    state = bench.await_state(is_up)
    assert bench.run("down")[0] == Exit.OK
    assert not psutil.pid_exists(serving_pid(state))
    assert bench.left() == []


def test_a_part_is_told_to_end_before_its_children_are(bench: Bench) -> None:
    """The engine's process ends its replicas through Ray, which it has started: Ray must be there for that."""
    assert bench.up(mode="needs-its-child")[0] == Exit.OK
    assert bench.run("down")[0] == Exit.OK
    assert (bench.folder / "child.txt").read_text() == "there"
    assert bench.left() == []


def test_what_a_part_detaches_without_the_mark_is_ended_too(bench: Bench) -> None:
    assert bench.up(mode="litter")[0] == Exit.OK
    litter = psutil.Process(int((bench.folder / "litter.pid").read_text()))
    state = bench.await_state(is_up)
    assert litter.ppid() == state.supervisor.pid, "the orphan was adopted"
    assert bench.run("down")[0] == Exit.OK
    assert not litter.is_running()


def test_no_part_outlives_a_killed_supervisor_and_down_finds_the_rest(bench: Bench) -> None:
    assert bench.up(mode="stubborn")[0] == Exit.OK
    state = bench.await_state(is_up)
    os.kill(state.supervisor.pid, signal.SIGKILL)
    # Well-behaved parts end with it; the engine here ignores SIGTERM, and is found by its mark.
    eventually(lambda: [p.pid for p in bench.left()] == [serving_pid(state)])
    assert "its supervisor is gone" in bench.run("status")[1]
    code, out, _ = bench.run("down")
    assert (code, "ended 1 processes" in out) == (Exit.OK, True)
    assert bench.left() == []


def test_the_next_up_clears_what_a_killed_supervisor_left(bench: Bench) -> None:
    assert bench.up(mode="stubborn")[0] == Exit.OK
    state = bench.await_state(is_up)
    os.kill(state.supervisor.pid, signal.SIGKILL)
    eventually(lambda: not state.supervisor.alive())
    code, out, _ = bench.up()
    assert (code, "crashed stack" in out) == (Exit.OK, True)
    assert not psutil.pid_exists(serving_pid(state))
    assert bench.run("down")[0] == Exit.OK


def test_a_killed_foreground_command_takes_its_stack_along(bench: Bench) -> None:
    child = bench.start("up", str(bench.file), "--tiny", "--foreground")
    bench.await_state(is_up)
    child.kill()
    child.communicate()
    eventually(lambda: bench.left() == [])


def test_down_spares_a_process_that_got_a_reused_number(bench: Bench) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        bench.state_dir.mkdir()
        reused = {"pid": bystander.pid, "startedAtS": 1.0}
        state = {"stackId": "gone", "deployment": "default/t", "model": "m", "ranks": 1, "startedS": 1.0}
        (bench.state_dir / "state.json").write_text(json.dumps({**state, "supervisor": reused, "phase": "up"}))
        code, out, _ = bench.run("down")
        assert (code, "nothing is running" in out) == (Exit.OK, True)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_port_in_use_is_refused_by_saying_who_has_it(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, _, err = bench.up("--port", str(port))
    assert code == Exit.COULD_NOT_START
    assert f"--port: port {port} is in use by pid {os.getpid()} (" in err
    assert "pytest" in err
    assert bench.state() is None


def test_a_secret_from_the_environment_is_nowhere_in_sight_and_gone_at_the_end(bench: Bench) -> None:
    target = {"name": "gpt", "provider": "openai", "model": "m", "secretRef": {"name": "openai", "key": "apiKey"}}
    bench.file = write_resource(bench.folder, fallback={"targets": [target], "budget": {"usdPerDay": "1"}})
    key = "not-a-real-key-0123"
    code, out, err = bench.up(MOESTACK_SECRET_OPENAI_APIKEY=key)
    assert code == Exit.OK, err
    path = bench.state_dir / "secrets" / "openai__apiKey"
    assert (path.read_text(), path.stat().st_mode & 0o777) == (key, 0o600)
    written = [
        p for p in bench.state_dir.rglob("*") if p.is_file() and p.suffix in (".json", ".log") and key in p.read_text()
    ]
    assert (key in out + err, written) == (False, [])
    assert bench.run("down")[0] == Exit.OK
    assert not path.exists()


def test_the_next_up_wipes_the_secrets_of_a_killed_stack(bench: Bench) -> None:
    target = {"name": "gpt", "provider": "openai", "model": "m", "secretRef": {"name": "openai", "key": "apiKey"}}
    bench.file = write_resource(bench.folder, fallback={"targets": [target], "budget": {"usdPerDay": "1"}})
    assert bench.up(MOESTACK_SECRET_OPENAI_APIKEY="not-a-real-key-0123")[0] == Exit.OK
    state = bench.await_state(is_up)
    path = bench.state_dir / "secrets" / "openai__apiKey"
    os.kill(state.supervisor.pid, signal.SIGKILL)
    eventually(lambda: not bench.left())
    assert path.exists()
    bench.file = write_resource(bench.folder)
    assert bench.up()[0] == Exit.OK
    assert not path.exists()
    assert bench.run("down")[0] == Exit.OK
