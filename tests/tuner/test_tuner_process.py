"""`python -m moe_tuner` as others start it: ready line, endpoints, a burst answered, SIGTERM, and bad files refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from moe_core.retune import decide
from moe_core.retune_state import RetuneState
from moe_core.signing import Signer
from moe_tuner.__main__ import main
from moe_tuner.report import DecisionRecord, TuningReport
from tests.tuner.fakes import DEPLOYMENT, FakeBoard, FakeGateway, served
from tests.tuner.tuner_world import Plant, Traffic, context, setting

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("api", "core", "planner", "tuner")),
}


def document(tmp_path: Path, **changes: object) -> dict[str, object]:
    return {
        "deployment": DEPLOYMENT,
        "boardUrl": "http://127.0.0.1:1",
        "gatewayAdminUrls": ["http://127.0.0.1:1"],
        "prometheusUrl": "http://127.0.0.1:1",
        "signingKeyFile": str(tmp_path / "key.pem"),
        "storageUrl": f"sqlite:///{tmp_path / 'tuner.db'}",
        "decisionLog": str(tmp_path / "state" / "decisions.jsonl"),
        "slo": {"ttftP95S": 0.8, "itlP95S": 0.05},
        "bounds": {
            "capacityFactorMin": "1",
            "capacityFactorMax": "2",
            "activeSeqsMin": 4,
            "activeSeqsMax": 64,
        },
        "tickS": 0.05,
        **changes,
    }


@asynccontextmanager
async def tuner(tmp_path: Path, **changes: object) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A tuner process that is ready; yields it with its base URL."""
    config = tmp_path / "tuner.json"
    config.write_text(json.dumps(document(tmp_path, **changes)))
    with (tmp_path / "stderr.log").open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moe_tuner", "--config", str(config)),
            env=ENVIRONMENT,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    try:
        assert process.stdout is not None
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        assert ready["ready"] is True
        yield process, f"http://127.0.0.1:{ready['port']}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def get(url: str) -> Any:
    async with aiohttp.ClientSession() as client, client.get(url) as response:
        if response.content_type == "application/json":
            return await response.json()
        return await response.text()


async def until(done: Callable[[TuningReport], bool], url: str, limit_s: float = 30.0) -> TuningReport:
    deadline = time.monotonic() + limit_s
    while True:
        report = TuningReport.model_validate(await get(f"{url}/v1/status"))
        if done(report):
            return report
        assert time.monotonic() < deadline, f"{report.exploring_reason} / {report.fast_reason}"
        await asyncio.sleep(0.1)


async def test_the_process_answers_a_burst_and_stops_gracefully(tmp_path: Path) -> None:
    signer = Signer.generate()
    signer.save(tmp_path / "key.pem")
    board, gateway = FakeBoard(signer), FakeGateway()
    async with served(board.routes()) as board_url, served(gateway.routes()) as gateway_url:
        urls = {"boardUrl": board_url, "gatewayAdminUrls": [gateway_url]}
        async with tuner(tmp_path, **urls) as (process, url):
            gone = "Prometheus at http://127.0.0.1:1 does not answer: exploring nothing"
            quiet = await until(lambda report: report.exploring_reason == gone, url)
            assert not quiet.exploring
            assert quiet.version == 0
            board.waiting, board.running, board.skew = 20, 16, 1.8
            gateway.arrivals, gateway.ttft_p95_s = 200, 2.0
            moved = await until(lambda report: bool(report.decisions), url)
            assert moved.displaced
            assert moved.decisions[0].action == "Move"
            assert moved.decisions[0].ack_seconds is not None
            assert board.applied[0].experts.capacity_factor_prefill is not None
            history = await get(f"{url}/v1/history?limit=1")
            assert DecisionRecord.model_validate(history[0]).version == moved.decisions[0].version
            assert "error" in await get(f"{url}/v1/history?limit=none")
            metrics = await get(f"{url}/metrics")
            assert f'moestack_tuner_exploring{{deployment="{DEPLOYMENT}"}} 0.0' in metrics
            assert "moestack_tuner_tick_seconds_count" in metrics
            assert await get(f"{url}/healthz") == {"ok": True}
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 20) == 0
    lines = (tmp_path / "stderr.log").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert any(entry["msg"] == gone for entry in logged)
    assert any(entry["msg"] == "decision" and entry["action"] == "Move" for entry in logged)
    assert logged[-1]["msg"] == "stopped"
    assert "PRIVATE KEY" not in "".join(lines)


REFUSED = [
    pytest.param({"tick": 1}, "tick: Extra inputs are not permitted", id="unknown field"),
    pytest.param({"slo": {"ttftP95S": 0}}, "slo.ttftP95S", id="impossible objective"),
    pytest.param({"tickS": 0}, "tickS: must be above 0", id="no tick"),
    pytest.param({"bounds.pinned": ["gamma"]}, "bounds.pinned: 'gamma' names no knob", id="pin that names nothing"),
    pytest.param({"bounds.capacityFactorMin": "3"}, "bounds.capacityFactorMin: above", id="bounds crossed"),
    pytest.param({"bounds.activeSeqsMin": 0}, "bounds.activeSeqsMin: must be at least 1", id="no sequences"),
    pytest.param({"signingKeyFile": "/nowhere/key"}, "signingKeyFile /nowhere/key: cannot be read", id="no key"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_a_bad_configuration_is_one_message_that_names_the_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], words: str
) -> None:
    made = document(tmp_path)
    for path, value in changes.items():
        holder: Any = made
        *parents, last = path.split(".")
        for parent in parents:
            holder = holder[parent]
        holder[last] = value
    config = tmp_path / "tuner.json"
    config.write_text(json.dumps(made))
    assert main(["--config", str(config)]) == 2
    assert words in capsys.readouterr().err


def test_a_key_file_that_is_no_key_is_refused_without_its_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key.pem").write_text("-----BEGIN hunter2-----")
    config = tmp_path / "tuner.json"
    config.write_text(json.dumps(document(tmp_path)))
    assert main(["--config", str(config)]) == 2
    message = capsys.readouterr().err
    assert "signingKeyFile" in message
    assert "hunter2" not in message


def test_a_missing_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_decision_takes_far_less_than_two_milliseconds() -> None:
    """A hundred deployments in a 200 ms tick leave 2 ms each; half of that is the limit here, in CPU time."""
    plant, state = Plant(setting()), RetuneState()
    contexts = [context(float(now), plant.second(Traffic()), plant.setting) for now in range(200)]
    started = time.process_time()
    for tick in contexts:
        _, state = decide(tick, state)
    assert (time.process_time() - started) / len(contexts) < 0.001
