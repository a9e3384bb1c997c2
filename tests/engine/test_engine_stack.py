"""`moectl up` as a person runs it: answers, metrics, a hundred live changes, a retuned burst, a killed worker, the end.

One stack serves the whole file, in order; the last test takes it down.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from benchmarks import actuation
from moe_core.wire import EngineKnobs, ExpertKnobs, Knobs, Overflow
from tests.engine import stack_checks as checks
from tests.engine.stack import Stack, acknowledged, complete, paused, until
from tests.engine.stack_checks import LOCAL_ONLY
from tests.engine.upstream import ClosedApi, closed_api

pytestmark = pytest.mark.engine

HOT = (0, 1, 2)
TOP_K = 4
SHAPE = {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 3}

RESOURCE = """
apiVersion: moestack.dev/v1alpha1
kind: MoEDeployment
metadata: {{name: stack}}
spec:
  model: {{id: tiny-skewed, source: "{source}"}}
  hardware: {{accelerator: cpu, gpusPerReplica: 2}}
  engine: {{maxModelLen: 1024, maxActiveSeqs: 16, maxBatchedTokens: 1024}}
  slo: {{ttftP95: 2s, itlP95: 500ms}}
  quality: {{maxLostGateMass: "0.5"}}
  tiers:
  - {{name: gold, tenants: [acme], expertsPerToken: 4}}
  - {{name: thrift, tenants: [etl], expertsPerToken: 2}}
  - {{name: draft, expertsPerToken: 1}}
  fallback:
    targets:
    - name: closed
      provider: openai
      model: closed-1
      secretRef: {{name: closed, key: apiKey}}
      price: {{inputUsdPerMTokens: "1", outputUsdPerMTokens: "2"}}
    budget: {{usdPerDay: "50"}}
  tuning:
    mode: Auto
    bounds:
      capacityFactor: {{min: "1", max: "4"}}
      maxActiveSeqs: {{min: 2, max: 16}}
"""


@pytest.fixture(scope="module")
def closed() -> Iterator[ClosedApi]:
    with closed_api() as api:
        yield api


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, closed: ClosedApi) -> Iterator[Stack]:
    from moe_serving.tiny import Skew, cached_checkpoint

    folder = tmp_path_factory.mktemp("stack")
    resource, key = folder / "stack.yaml", folder / "key"
    source = cached_checkpoint("qwen3_moe", skew=Skew(HOT, 3.0), **SHAPE)
    resource.write_text(RESOURCE.format(source=source))
    key.write_text("sk-not-a-real-key-0123456789")
    it = Stack(folder / "state")
    done = it.moectl(
        "up", str(resource), "--detach", "--plain", "--chat", "--fallback-url", closed.url,
        "--secret", f"closed/apiKey={key}", timeout=900,
    )  # fmt: skip
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "answer" in done.stdout
        yield it
    finally:
        it.moectl("down", timeout=180)


@dataclass
class Load:
    """What streams saw while they ran."""

    ok: int = 0
    spilled: int = 0
    honest: int = 0
    failures: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0


@contextmanager
def streams(stack: Stack, count: int, tokens: int = 48) -> Iterator[Load]:
    """Keep `count` streams going until the block ends. A gap is the wait between two pieces of one stream."""
    load, stop, lock = Load(), threading.Event(), threading.Lock()

    def one(number: int) -> None:
        rng = random.Random(number)
        while not stop.is_set():
            prompt = "".join(rng.choices("abcdefgh ijklmnop", k=rng.randint(10, 120)))
            try:
                answer = complete(stack, prompt, tokens, stream=True)
                target = answer.headers.get("x-moestack-target", "")
                last, gap, text = time.monotonic(), 0.0, b""
                if answer.status_code in (503, 529):
                    with lock:
                        load.honest += 1
                    stop.wait(0.2)
                    continue
                answer.raise_for_status()
                for piece in answer.iter_content(None):
                    gap, last = max(gap, time.monotonic() - last), time.monotonic()
                    text += piece
                with lock:
                    if text.rstrip().endswith(b"[DONE]"):
                        load.ok += 1
                        load.spilled += target not in ("", "local")
                    elif b'"error"' in text:
                        load.honest += 1
                    else:
                        load.failures.append(f"ended without [DONE] or an error: {text[-200:]!r}")
                    load.longest_gap_s = max(load.longest_gap_s, gap)
            except (requests.RequestException, OSError) as error:
                with lock:
                    load.failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        stop.set()
        for thread in threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in threads), "a request hangs"


def test_answers_over_the_openai_api(stack: Stack) -> None:
    answer = complete(stack, "Hello")
    assert answer.status_code == 200
    assert answer.headers["x-moestack-target"] == "local"
    assert answer.json()["usage"]["completion_tokens"] == 8
    assert stack.get(f"{stack.url}/models")["data"][0]["id"] == "tiny-skewed"
    digest = stack.digest()
    assert digest["ranks"] == 2
    assert [layer["hooked"] for layer in digest["layers"]] == [True] * 3


def test_prometheus_holds_the_load_that_was_routed(stack: Stack) -> None:
    time.sleep(2.5)
    before = {row["metric"]["layer"]: float(row["value"][1]) for row in stack.prometheus("moestack_expert_slots_total")}
    matrix_before = stack.matrix()
    usage = [complete(stack, f"{i} sheep and {i * i} wolves").json()["usage"] for i in range(20)]
    routed = sum(u["prompt_tokens"] + u["completion_tokens"] - 1 for u in usage)
    # The prefix cache spares tokens that it holds; these prompts share less than one block.
    want = {layer: before[layer] + routed * TOP_K for layer in before}

    def scraped() -> bool:
        rows = stack.prometheus("moestack_expert_slots_total")
        return {row["metric"]["layer"]: float(row["value"][1]) for row in rows} == want

    until(scraped, 15, f"moestack_expert_slots_total = {want}")
    imbalance = {
        row["metric"]["layer"]: float(row["value"][1])
        for row in stack.prometheus('max_over_time(moestack_expert_imbalance_ratio{by="expert"}[20s])')
    }
    for old, new in zip(matrix_before, stack.matrix(), strict=True):
        demand = [a - b for a, b in zip(new["demand"], old["demand"], strict=True)]
        assert sum(sorted(demand)[-3:]) > 0.5 * sum(demand), "the router is not skewed"
        computed = max(demand) * len(demand) / sum(demand)
        assert imbalance[str(new["layer"])] == pytest.approx(computed, rel=0.25)
        assert computed > 2


def test_each_request_takes_the_experts_of_its_tier(stack: Stack) -> None:
    with paused(stack.pid("tuner")):
        checks.requests_take_the_k_of_their_tier(stack)
        checks.tiers_mix_under_load(stack)
        checks.a_request_without_a_tier_is_left_alone(stack)


def test_the_prefix_cache_keeps_tiers_and_settings_apart(stack: Stack) -> None:
    with paused(stack.pid("tuner")):
        checks.cached_blocks_stay_apart(stack)


def test_a_layer_may_have_capacity_of_its_own(stack: Stack) -> None:
    with paused(stack.pid("tuner")):
        checks.capacity_by_layer_is_acknowledged_or_refused(stack)


def test_responses_take_the_experts_of_their_tier(stack: Stack) -> None:
    with paused(stack.pid("tuner")):
        checks.responses_take_the_k_of_their_tier(stack)


def test_the_actuation_benchmark_in_short(stack: Stack) -> None:
    running = actuation.Stack(stack.state_dir, name="stack", model="tiny-skewed")
    with paused(stack.pid("tuner")):
        seen = asyncio.run(actuation.measure(running, changes=12, streams=3))
        version = stack.newest() + 1
        home = Knobs(deployment=stack.deployment, version=version, engine=EngineKnobs(max_active_seqs=2))
        assert stack.send(home).status_code == 202
        acknowledged(stack, version)
    assert (seen["failed"], seen["stalled"], seen["drift"]) == (0, 0, 0), seen
    assert seen["streams_ended"] > 0
    assert 0 < seen["decision_to_effect_p50_s"] <= seen["decision_to_effect_p95_s"]
    assert seen["engine_processes_kept"]


def test_a_hundred_changes_under_load(stack: Stack) -> None:
    settings = [
        (ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal("1")), 2),
        (ExpertKnobs(overflow=Overflow.UNLIMITED), 16),
        (ExpertKnobs(overflow=Overflow.DROP, capacity_factor_prefill=Decimal("1.5")), 4),
        (ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal("1.25")), 8),
    ]
    engine = {p.pid for p in stack.processes("VLLM::")}
    replica = stack.digest()["replica"]
    slow: list[float] = []
    with paused(stack.pid("tuner")), streams(stack, 6) as load:
        version = stack.newest()
        for number in range(100):
            experts, active = settings[number % len(settings)]
            version += 1
            knobs = Knobs(
                deployment=stack.deployment,
                version=version,
                experts=experts,
                engine=EngineKnobs(max_active_seqs=active),
                fallback=LOCAL_ONLY,
            )
            started = time.monotonic()
            assert stack.send(knobs).status_code == 202
            acknowledged(stack, version)
            slow.append(time.monotonic() - started)
        # Behaviour, not only a gauge: few may run, the rest waits; rerouting happens under Reroute alone.
        for experts, active in (settings[0], settings[1]):
            version += 1
            engine_knobs = EngineKnobs(max_active_seqs=active)
            knobs = Knobs(
                deployment=stack.deployment,
                version=version,
                experts=experts,
                engine=engine_knobs,
                fallback=LOCAL_ONLY,
            )
            stack.send(knobs)
            until(lambda v=version: stack.digest()["knobsVersion"] == v, 5, "in force")
            time.sleep(2.5)
            first = stack.digest()
            states, ends = [], time.monotonic() + 3
            while time.monotonic() < ends:
                states.append(stack.digest()["engine"])
                time.sleep(0.2)
            second = stack.digest()
            rerouted = sum(
                b["reroutedTotal"] - a["reroutedTotal"] for a, b in zip(first["layers"], second["layers"], strict=True)
            )
            assert max(state["running"] for state in states) <= active, states
            if active == 2:
                # In one second of a busy machine the clients may be what everything waits for.
                assert max(state["waiting"] for state in states) > 0, states
                assert rerouted > 0
            else:
                assert rerouted == 0
        # A tight home that may not spill: the burst that follows is the tuner's to answer. Otherwise the gateway, by
        # what it has learned so far and as fast as this machine is, may send so much away that nothing presses.
        version += 1
        engine_knobs = EngineKnobs(max_active_seqs=2)
        home = Knobs(deployment=stack.deployment, version=version, engine=engine_knobs, fallback=LOCAL_ONLY)
        assert stack.send(home).status_code == 202
        acknowledged(stack, version)
    print(f"100 changes: slowest {max(slow):.2f} s; {load}")
    assert load.failures == []
    assert (load.honest, load.spilled) == (0, 0)
    assert load.ok > 20
    assert load.longest_gap_s <= 1.0
    assert max(slow) <= 2.0
    assert {p.pid for p in stack.processes("VLLM::")} == engine
    assert stack.digest()["replica"] == replica


def decisions(stack: Stack) -> list[dict[str, Any]]:
    path = stack.state_dir / "decisions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_tuner_answers_a_burst_and_says_why(stack: Stack) -> None:
    before = len(decisions(stack))
    burst = stack.moectl(
        "load", "--rps", "30", "--burstiness", "0.3", "--seconds", "10", "--input-tokens", "200,600",
        "--output-tokens", "24,48", "--json", timeout=300,
    )  # fmt: skip
    assert burst.returncode == 0, burst.stderr

    def moves() -> list[dict[str, Any]]:
        return [row for row in decisions(stack)[before:] if row["action"] == "Move" and row["sent"]]

    changed = until(moves, 20, "a move in the log")
    fresh = decisions(stack)[before:]
    assert all(row["reason"] for row in fresh)
    status = stack.tuner("/v1/status")
    assert status["decisions"][0]["reason"]
    shown = stack.moectl("status").stdout
    assert changed[-1]["reason"][:20] in shown or status["decisions"][0]["reason"][:20] in shown
    rows = until(
        lambda: stack.prometheus('sum(moestack_tuner_decisions_total{loop="fast"})'), 15, "decisions in Prometheus"
    )
    assert float(rows[0]["value"][1]) >= 1


def test_prometheus_shows_what_moectl_experts_shows(stack: Stack) -> None:
    checks.prometheus_holds_what_ranks_counted(stack)
    with paused(stack.pid("tuner")):
        checks.gauges_are_those_of_the_digests(stack)
        # From here on requests may spill again.
        version = stack.newest() + 1
        home = Knobs(deployment=stack.deployment, version=version, engine=EngineKnobs(max_active_seqs=2))
        assert stack.send(home).status_code == 202
        acknowledged(stack, version)


def test_without_prometheus_it_explores_nothing_and_says_so(stack: Stack) -> None:
    with paused(stack.pid("prometheus")):
        status = until(
            lambda: (
                (s := stack.tuner("/v1/status")) and not s["exploring"] and "Prometheus" in s["exploringReason"] and s
            ),
            60,
            "it says that Prometheus does not answer",
        )
        tried = [row for row in decisions(stack) if row["action"] == "Try"]
        time.sleep(5)
        assert [row for row in decisions(stack) if row["action"] == "Try"] == tried
        assert "Prometheus" in stack.moectl("status").stdout
    assert status["exploring"] is False


def test_a_killed_worker_costs_no_request_more_than_one_honest_error(stack: Stack, closed: ClosedApi) -> None:
    replica = stack.digest()["replica"]
    asked = closed.requests
    with streams(stack, 4, tokens=64) as load:
        until(lambda: load.ok > 4, 60, "traffic flows")
        killed = time.monotonic()
        worker = next(p for p in stack.processes("VLLM::Worker"))
        worker.kill()
        until(lambda: closed.requests > asked, 60, "requests reach the closed API")
        bridged = time.monotonic() - killed
        until(lambda: stack.digest()["replica"] != replica, 400, "a new replica reports")
        until(lambda: complete(stack, "back?").headers.get("x-moestack-target") == "local", 120, "local answers")
        recovered = time.monotonic() - killed
    print(f"bridged after {bridged:.1f} s, recovered after {recovered:.1f} s; {load}")
    assert load.failures == []
    assert load.spilled > 0
    assert complete(stack, "and on it goes").ok


def test_knobs_outlive_the_replica(stack: Stack) -> None:
    version = stack.newest()
    assert version > 0
    until(lambda: stack.digest()["knobsVersion"] == version, 20, "the new replica has the newest knobs")
    started = stack.prometheus("last_over_time(moestack_replica_start_time_seconds[1h])")
    assert len(started) > 1, started
    checks.no_counter_went_back(stack)


def test_down_leaves_nothing(stack: Stack) -> None:
    """Right after traffic, and without the kill that would leave Ray's folder."""
    ours = stack.state["stackId"]
    folders = {word.split("=", 1)[1] for p in stack.processes("raylet") for word in p.cmdline() if "temp_dir=" in word}
    assert len(folders) == 1
    with streams(stack, 4) as load:
        until(lambda: load.ok > 2, 60, "traffic flows")
    started = time.monotonic()
    done = stack.moectl("down", timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"down took {time.monotonic() - started:.1f} s")
    assert time.monotonic() - started < 30
    assert [folder for folder in folders if Path(folder).exists()] == []
    assert "killed" not in (stack.state_dir / "logs" / "supervisor.log").read_text()
    left = []
    for process in psutil.process_iter():
        try:
            if ours in process.environ().values():
                left.append(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    assert left == []
    secret = subprocess.run(
        ["grep", "-rl", "sk-not-a-real-key", str(stack.state_dir)], capture_output=True, text=True, check=False
    )
    assert secret.stdout == ""
