"""The small pieces: announcements, late binding, ports, secrets, the model cache, what people read."""

from __future__ import annotations

import io
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_api.v1alpha1 import MoEDeployment
from moe_cli import announce, live, ports
from moe_cli.bind import Unbound, bind, references
from moe_cli.checkpoint import CheckpointFacts, hub_snapshot, inspect
from moe_cli.documents import Change, PartState, Phase, StackState, Stage, read_state, write, write_state
from moe_cli.load_stats import LoadReport, Spread, TargetCount
from moe_cli.outcome import Problem, Refusal
from moe_cli.preflight import find_checkpoint, find_secrets, memory_bytes
from moe_cli.processes import Proc, tail
from moe_cli.say import Say
from moe_cli.status import Figures, Report, figures
from moe_cli.targets import env_name
from moe_core.wire import EngineDigest, ExpertKnobs, GatewayDigest, LayerDigest, Overflow, ReplicaDigest
from tests.cli.cli_world import resource, write_checkpoint

FALLBACK = {
    "targets": [
        {
            "name": "g",
            "provider": "openai",
            "model": "m",
            "secretRef": {"name": "openai", "key": "apiKey"},
            "price": {"inputUsdPerMTokens": "1", "outputUsdPerMTokens": "1"},
        }
    ],
    "budget": {"usdPerDay": "1"},
}


@pytest.mark.parametrize(
    ("name", "line", "wanted"),
    [
        ("ready", b'{"ready": true, "port": 5, "url": "u", "pids": [1]}\n', announce.Ready({"port": "5", "url": "u"})),
        ("not yet", b'{"ready": false}\n', None),
        ("stage", b'{"stage": "ray", "state": "start"}\n', announce.Step("ray", "start", "")),
        ("stage of no known state", b'{"stage": "ray", "state": "half"}\n', None),
        (
            "fault",
            b'{"error": {"field": "spec.x", "message": "no", "remedy": "yes"}}\n',
            announce.Fault(Problem(field="spec.x", message="no", remedy="yes")),
        ),
        ("a short fault", b'{"error": "no"}\n', announce.Fault(Problem(message="no"))),
        ("a log line", b"INFO engine started\n", None),
        ("broken JSON", b'{"ready": tr', None),
        ("JSON of something else", b'{"level": "info"}\n', None),
    ],
)
def test_announcements(name: str, line: bytes, wanted: announce.Announcement | None) -> None:
    assert announce.parse(line) == wanted


def test_binding_replaces_references_everywhere() -> None:
    document = {"a": "http://h:${gateway.port}/x", "b": ["${serving.url}", 3, None], "c": "$HOME ${other}"}
    assert references(document) == {"gateway", "serving"}
    bound = bind(document, {"gateway": {"port": "8"}, "serving": {"url": "u"}})
    assert bound == {"a": "http://h:8/x", "b": ["u", 3, None], "c": "$HOME ${other}"}
    with pytest.raises(Unbound, match="serving announced no url"):
        bind(document, {"gateway": {"port": "8"}, "serving": {}})


def test_a_free_port_has_no_holder_and_a_taken_one_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        holder = ports.holder_of(port)
        assert holder is not None
        assert (holder.port, holder.pid) == (port, os.getpid())
        assert str(holder).startswith(f"port {port} is in use by pid {os.getpid()} (")
        assert ports.listening(os.getpid()) is not None
    assert ports.holder_of(port) is None
    assert ports.holder_of(0) is None


def test_a_process_is_known_by_number_and_start() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        proc = Proc.of(child.pid)
        assert proc is not None
        assert proc.alive()
        assert not proc.model_copy(update={"started_at_s": proc.started_at_s - 100}).alive()
    finally:
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not proc.alive(), "a zombie is not alive"
    child.wait()
    assert not proc.alive()
    assert Proc.of(child.pid) is None


# Secrets


def test_secrets_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MOESTACK_SECRET_OPENAI_APIKEY", raising=False)
    wanted, key = resource(fallback=FALLBACK), ("openai", "apiKey")
    folder = tmp_path / "secrets"
    assert find_secrets(wanted, (), folder) == ({}, {})
    configured = tmp_path / "config/moestack/secrets/openai/apiKey"
    configured.parent.mkdir(parents=True)
    configured.write_text("k1")
    assert find_secrets(wanted, (), folder) == ({key: configured}, {})
    monkeypatch.setenv("MOESTACK_SECRET_OPENAI_APIKEY", "k2")
    assert find_secrets(wanted, (), folder) == ({key: folder / "openai__apiKey"}, {folder / "openai__apiKey": "k2"})
    given = tmp_path / "key.txt"
    given.write_text("k3")
    assert find_secrets(wanted, (f"openai/apiKey={given}",), folder) == ({key: given}, {})
    assert not folder.exists(), "looking writes nothing"


def refer(*references: tuple[str, str]) -> MoEDeployment:
    """A resource with a target for each secret."""
    (target,) = FALLBACK["targets"]
    targets = [
        {**target, "name": f"g{index}", "secretRef": {"name": name, "key": key}}
        for index, (name, key) in enumerate(references)
    ]
    return resource(fallback={**FALLBACK, "targets": targets})


def test_no_two_secrets_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that read alike when joined, and keys that look like a way out of the folder."""
    references = [("a.b", "c"), ("a", "b.c"), ("a", "__b"), ("b", ".."), ("b", ".")]
    files = []
    for name, key in references:
        monkeypatch.setenv(env_name(name, key), "k")
        _, to_write = find_secrets(refer((name, key)), (), tmp_path)
        files += to_write
    assert len(set(files)) == len(references)
    assert {file.resolve().parent for file in files} == {tmp_path.resolve()}


def test_a_variable_that_stands_for_two_secrets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = refer(("a.b", "c"), ("a", "b.c"))
    monkeypatch.setenv("MOESTACK_SECRET_A_B_C", "not-a-real-key")
    with pytest.raises(Refusal) as refused:
        find_secrets(alike, (), tmp_path)
    assert "stands for a.b/c and for a/b.c" in str(refused.value)
    assert "not-a-real-key" not in str(refused.value)
    (tmp_path / "key").write_text("k")
    found, to_write = find_secrets(alike, (f"a/b.c={tmp_path / 'key'}",), tmp_path)
    assert (len(found), list(to_write.values())) == (2, ["not-a-real-key"])
    same = refer(("openai", "k"), ("openai", "k"))
    monkeypatch.setenv("MOESTACK_SECRET_OPENAI_K", "k")
    assert len(find_secrets(same, (), tmp_path)[0]) == 1, "two targets may share one secret"


def test_a_container_has_its_share_of_the_memory(tmp_path: Path) -> None:
    whole = memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory_bytes(tmp_path) == 1000


# The checkpoint on this machine


def test_checkpoints_are_found_by_path_by_file_url_and_in_the_hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--org--m"
    snapshot = write_checkpoint(repository / "snapshots/abc", top_k=2)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    local = write_checkpoint(tmp_path / "ckpt")
    assert hub_snapshot("org/m", "abc") == snapshot
    assert hub_snapshot("org/m", "other") is None
    cases: list[tuple[dict[str, Any], Path | None]] = [
        ({"id": "org/m"}, snapshot),
        ({"id": "x", "source": "hf://org/m"}, snapshot),
        ({"id": "org/none"}, None),
        ({"id": "org/m", "source": "s3://bucket/m"}, None),
        ({"id": "org/m", "source": "pvc://claim/m"}, None),
        ({"id": "x", "source": "./ckpt"}, local),
        ({"id": "x", "source": "ckpt"}, local),
        ({"id": "x", "source": str(local)}, local),
        ({"id": "x", "source": f"file://{local}"}, local),
    ]
    for model, wanted in cases:
        found = find_checkpoint(resource(model=model), tmp_path)
        assert (found.path if isinstance(found, CheckpointFacts) else found) == wanted, model


def test_facts_are_read_from_the_configuration_also_of_a_multimodal_model(tmp_path: Path) -> None:
    plain = inspect(write_checkpoint(tmp_path / "a", top_k=6), "spec.model.source")
    assert isinstance(plain, CheckpointFacts)
    assert (plain.experts, plain.top_k, plain.max_model_len) == (16, 6, 4096)
    assert plain.weight_bytes == (tmp_path / "a/model.safetensors").stat().st_size
    inner = {"num_local_experts": 8, "num_experts_per_tok": 1, "max_position_embeddings": 99}
    folder = write_checkpoint(tmp_path / "b")
    (folder / "config.json").write_text(f'{{"model_type": "llama4", "text_config": {inner}}}'.replace("'", '"'))
    nested = inspect(folder, "spec.model.source")
    assert isinstance(nested, CheckpointFacts)
    assert (nested.experts, nested.top_k, nested.max_model_len) == (8, 1, 99)


# What people read


def state(**changes: Any) -> StackState:
    values: dict[str, Any] = {
        "stack_id": "s",
        "deployment": "default/q",
        "model": "Q",
        "ranks": 2,
        "supervisor": Proc(pid=1, started_at_s=0),
        "started_s": 100.0,
    }
    return StackState(**{**values, **changes})


def part(name: str, phase: Phase, **more: Any) -> PartState:
    return PartState(name=name, title=name.title(), phase=phase, **more)


def test_events_tell_each_change_once() -> None:
    engine = Stage(name="engine", state="start", detail="2 ranks", since_s=101)
    first = state(
        parts=(part("serving", Phase.STARTING, since_s=100, stages=(engine,)), part("gateway", Phase.WAITING))
    )
    done = engine.model_copy(update={"state": "done", "done_s": 143.0})
    up = part("serving", Phase.UP, since_s=100, ready_s=160.4, stages=(done,))
    second = state(parts=(up, part("gateway", Phase.STARTING, since_s=160)))
    assert live.events(None, first) == ["Serving: engine starts (2 ranks)", "Serving: starts"]
    assert live.events(first, second) == [
        "Serving: engine done after 42 s",
        "Serving: is ready after 1 min 00 s",
        "Gateway: starts",
    ]
    assert live.events(second, second) == []


def test_figures_from_what_the_parts_answer() -> None:
    digest = GatewayDigest(
        gateway="g", at_s=0, window_s=10, arrivals=40, spilled=10, ttft_p50_s=0.1, ttft_p95_s=0.4, itl_p95_s=0.02
    )
    layers = (
        LayerDigest(layer=0, hooked=True, slots_total=1, rank_max_over_mean=1.2, expert_max_over_mean=2.0),
        LayerDigest(layer=1, hooked=True, slots_total=1, rank_max_over_mean=1.6, expert_max_over_mean=1.9),
    )
    replica = ReplicaDigest(
        replica="r",
        started_at_s=0,
        at_s=0,
        seq=0,
        ranks=2,
        knobs_version=4,
        knobs=ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill="1.25"),
        engine=EngineDigest(
            max_active_seqs=8, max_batched_tokens=9, ceiling_active_seqs=8, ceiling_batched_tokens=9, waiting=3
        ),
        layers=layers,
    )
    report = {"exploringReason": "paused", "decisions": [{"loop": "slow", "action": "roll-back", "reason": "TTFT"}]}
    found = figures(digest.to_json(), [replica.to_json()], report)
    assert (found.rps, found.spill_share, found.ttft_p95_s) == (4.0, 0.25, 0.4)
    assert (found.imbalance, found.expert_imbalance) == (1.6, 2.0)
    assert (found.capacity_factor, found.overflow, found.knobs_version) == ("prefill 1.25", "Reroute", 4)
    assert (found.waiting, found.max_active_seqs) == (3, 8)
    assert (found.exploring, found.decisions) == ("paused", ("slow loop: roll-back: TTFT",))


def test_spills_of_a_burst_that_end_after_it_are_no_more_than_all() -> None:
    digest = GatewayDigest(gateway="g", at_s=0, window_s=10, arrivals=4, spilled=9)
    assert figures(digest.to_json(), None, None).spill_share == 1.0


@pytest.mark.parametrize("answers", [(None, None, None), ({"nonsense": 1}, ["x"], 3), ({}, [], {})])
def test_silence_and_nonsense_are_no_figures(answers: tuple[Any, Any, Any]) -> None:
    assert figures(*answers) == Figures()


def shown(block: Any) -> str:
    console = Console(file=io.StringIO(), width=150)
    console.print(block)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_screen_shows_progress_then_figures_and_places() -> None:
    engine = Stage(name="engine", state="start", detail="2 ranks", since_s=101)
    text = shown(live.screen(state(parts=(part("serving", Phase.STARTING, since_s=100, stages=(engine,)),)), None, 161))
    assert "1 min 01 s" in text
    assert "engine" in text
    facts = {"url": "http://s/v1", "boardUrl": "http://b"}
    parts = (part("serving", Phase.UP, facts=facts), part("gateway", Phase.UP, facts={"port": "7", "adminPort": "8"}))
    text = shown(
        live.screen(state(phase=Phase.UP, parts=parts), Figures(rps=2.5, imbalance=1.31, spill_share=0.125), 0)
    )
    for said in ("2.50 req/s", "1.31 by rank", "12.5%", "http://127.0.0.1:7/v1", "http://b", "Ctrl-C"):
        assert said in text


def test_the_result_of_a_load_run() -> None:
    spread = Spread(p50=0.01, p90=0.02, p95=0.03, p99=1.5, max=2)
    report = LoadReport(
        planned=5,
        sent=4,
        ok=3,
        failed={"http 529": 1},
        interrupted=True,
        seconds=2,
        offered_rps=2,
        completed_rps=1.5,
        ttft=spread,
        slo_attained=0.75,
        targets={"gpt": TargetCount(count=1, ok=1)},
        first_failure="http 529: full",
    )
    text = "\n".join(live.load_lines(report)) + shown(live.load_table(report))
    for said in ("sent 4 of 5, ok 3, failed 1 (interrupted", "http 529: 1", "75.0%", "target gpt", "1.50 s", "30.0 ms"):
        assert said in text


def test_status_of_nothing_and_of_an_orphaned_stack() -> None:
    assert live.report_lines(Report(running=False, state_dir="/s")) == ["nothing is running (state folder /s)"]
    orphaned = Report(running=True, supervised=False, deployment="d", model="m", phase="up")
    assert any("moectl down" in line for line in live.report_lines(orphaned))


def test_text_is_never_markup() -> None:
    out = io.StringIO()
    say = Say(Console(file=out), Console(file=out))
    say.line("[bold]x[/bold] [/tmp]")
    say.problem(Problem(field="spec.a[0]", message="[red]", remedy="r"))
    assert out.getvalue() == "[bold]x[/bold] [/tmp]\nerror: spec.a[0]: [red]\n  → r\n"


# Files


def test_state_is_written_whole_and_read_back(tmp_path: Path) -> None:
    wanted = state(changes=(Change(field="f", asked="a", used="b", why="c"),))
    write_state(tmp_path, wanted)
    assert read_state(tmp_path) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    (tmp_path / "state.json").write_text('{"half":')
    assert read_state(tmp_path) is None
    assert read_state(tmp_path / "none") is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / "a", "\ud800")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\n".join(b"line %d" % n for n in range(5000)) + b"\n\xff end")
    assert tail(path, 2) == ("line 4999", "\N{REPLACEMENT CHARACTER} end")
    assert tail(tmp_path / "none") == ()


def test_a_refusal_holds_every_problem() -> None:
    assert str(Refusal(Problem(message="a"), Problem(field="f", message="b"))) == "a\nf: b"
