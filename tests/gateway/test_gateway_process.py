"""The process as it is run: ready line, exit codes, an orderly end with streams open, and no secret anywhere."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from moe_core.clock import FakeClock
from moe_core.config import GatewayConfig, config_hash
from moe_core.wire import GatewayDigest
from moe_gateway.__main__ import main
from moe_gateway.settings import ConfigRefused, KeyFile, check
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import KEY, PASS, Answer, chat, config, read, until

ROOT = Path(__file__).parents[2]
PARTS = ("api", "core", "gateway")


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    """`main` sets the process's logger up; other tests read theirs through pytest."""
    logger = logging.getLogger("moestack")
    before = (logger.level, logger.propagate, list(logger.handlers))
    yield
    logger.level, logger.propagate, logger.handlers = before


@dataclass
class Process:
    """A gateway process under test."""

    process: asyncio.subprocess.Process
    port: int
    admin_port: int
    stderr: list[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stderr]

    async def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 30)


async def spawn(file: Path) -> asyncio.subprocess.Process:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in PARTS)}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moe_gateway", "--config", str(file)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )


def written(folder: Path, settings: GatewayConfig) -> Path:
    file = folder / "gateway.json"
    file.write_text(json.dumps(settings.to_json()))
    return file


@asynccontextmanager
async def started(file: Path) -> AsyncIterator[Process]:
    process = await spawn(file)
    assert process.stdout is not None
    assert process.stderr is not None
    stderr: list[bytes] = []
    reader = asyncio.create_task(_collect(process.stderr, stderr))
    try:
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        assert set(ready) == {"ready", "port", "adminPort"}
        yield Process(process, ready["port"], ready["adminPort"], stderr)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reader


async def _collect(stream: asyncio.StreamReader, lines: list[bytes]) -> None:
    while line := await stream.readline():
        lines.append(line)


async def test_sigterm_lets_streams_end_and_takes_no_more(tmp_path: Path) -> None:
    slow = Behaviour(tokens=20, gap_s=0.1)
    async with (
        FakeUpstream(slow) as local,
        started(written(tmp_path, config(local))) as gateway,
        aiohttp.ClientSession() as session,
    ):
        streams = [asyncio.create_task(_stream(session, gateway.url)) for _ in range(10)]
        await until(lambda: len(local.requests) == 10)
        ended = asyncio.create_task(gateway.terminate())
        await until(lambda: any(line["msg"] == "draining" for line in gateway.lines))
        await asyncio.sleep(0.3)  # the listener is closed on the server's next tick
        with pytest.raises(aiohttp.ClientConnectorError):
            await aiohttp.ClientSession.post(session, gateway.url, json=chat())
        for answer in await asyncio.gather(*streams):
            assert answer.events[-1] == "[DONE]"
            assert answer.whole
        assert await ended == 0


async def test_after_the_deadline_streams_end_honestly(tmp_path: Path) -> None:
    async with (
        FakeUpstream(Behaviour(tokens=10_000, gap_s=0.05)) as local,
        started(written(tmp_path, config(local, limits={"drainS": 0.5}))) as gateway,
        aiohttp.ClientSession() as session,
    ):
        streams = [asyncio.create_task(_stream(session, gateway.url)) for _ in range(5)]
        local.behaviours = [Behaviour(stall=True)]
        waiting = asyncio.create_task(_stream(session, gateway.url))
        await until(lambda: len(local.requests) == 6)
        await asyncio.sleep(0.3)
        assert await gateway.terminate() == 0
        answers = await asyncio.gather(*streams, waiting)
        unanswered = [answer for answer in answers if answer.status == 503]
        assert len(unanswered) == 1
        assert unanswered[0].error["code"] == "stopping"
        for answer in answers:
            if answer.status == 200:
                assert answer.events[-1]["error"]["code"] == "stream_cut"
                assert answer.whole
        assert [line["outcome"] for line in gateway.lines if line["msg"] == "request"].count("cut") == 5


async def test_a_mounted_configuration_is_followed_through_the_swap_of_its_link(tmp_path: Path) -> None:
    """As kubelet does it: the file is a link into `..data`, which is a link that is replaced."""

    def mount(version: str, settings: GatewayConfig) -> str:
        folder = tmp_path / version
        folder.mkdir()
        (folder / "gateway.json").write_text(json.dumps(settings.to_json()))
        (tmp_path / "..new").symlink_to(version)
        (tmp_path / "..new").rename(tmp_path / "..data")
        return config_hash((folder / "gateway.json").read_bytes())

    async with FakeUpstream(Behaviour(tokens=30, gap_s=0.1)) as old, FakeUpstream() as new:
        first = mount("..v1", config([old, new]))
        (tmp_path / "gateway.json").symlink_to("..data/gateway.json")
        async with (
            started(tmp_path / "gateway.json") as gateway,
            aiohttp.ClientSession() as session,
        ):

            async def digest() -> GatewayDigest:
                async with session.get(f"http://127.0.0.1:{gateway.admin_port}/v1/digest", headers=PASS) as response:
                    return GatewayDigest.model_validate_json(await response.read())

            assert (await digest()).config_hash == first
            stream = asyncio.create_task(_stream(session, gateway.url))
            await until(lambda: len(old.requests) == 1)
            second = mount("..v2", config([old, new], weights={"r1": 100}, weightsVersion=2))
            await until(lambda: any(line.get("hash") == second for line in gateway.lines))
            after = await digest()
            assert (after.config_hash, after.weights_version, after.weights["r1"]) == (second, 2, 100)
            assert (await _stream(session, gateway.url)).status == 200
            assert len(new.requests) == 1
            assert (await stream).events[-1] == "[DONE]"
            assert await gateway.terminate() == 0


async def _stream(session: aiohttp.ClientSession, url: str) -> Answer:
    async with session.post(url, json=chat()) as response:
        return await read(response)


async def test_no_key_and_no_prompt_in_logs_metrics_or_errors(tmp_path: Path) -> None:
    """The target quotes our key in every kind of error; one request fails inside the gateway's reach of each."""
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n")
    leak = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}, sk-te****cdef"}}).encode()
    secret_prompt = "the launch code is swordfish"
    messages = [{"role": "user", "content": secret_prompt}]
    seen = b""
    async with FakeUpstream() as local, FakeUpstream() as target:
        await local.close()
        settings = config(local, target, key_file=key_file)
        async with started(written(tmp_path, settings)) as gateway, aiohttp.ClientSession() as session:
            for status in (200, 400, 401, 422, 429, 500):
                target.behaviours = [Behaviour(status=status, body=None if status == 200 else leak)]
                for stream in (True, False):
                    async with session.post(gateway.url, json=chat(stream, messages=messages)) as response:
                        answer = await read(response)
                        seen += answer.body + repr(answer.headers).encode()
            for path in ("/metrics", "/v1/digest", "/readyz"):
                async with session.get(f"http://127.0.0.1:{gateway.admin_port}{path}", headers=PASS) as response:
                    seen += await response.read()
            assert await gateway.terminate() == 0
        assert {headers["Authorization"] for headers in target.headers} == {f"Bearer {KEY}"}
        seen += b"".join(gateway.stderr)
    assert b"moestack_gateway_requests_total" in seen
    assert sum(line["msg"] == "request" for line in gateway.lines) == 12
    for secret in (KEY, KEY[:12], "cdef", secret_prompt, "swordfish"):
        assert secret.encode() not in seen


def one(**target: str) -> dict[str, Any]:
    return {"targets": [{"name": "a", "model": "m", **target}]}


REFUSED = [
    pytest.param(one(provider="gemini"), "targets[0] (a).apiKeyFile: needed for gemini", id="gemini"),
    pytest.param(one(provider="azure-openai"), "e.g. https://RESOURCE.openai.azure.com", id="no Azure resource"),
    pytest.param(one(provider="bedrock"), "targets[0] (a).baseUrl: needed for bedrock", id="no Bedrock endpoint"),
    pytest.param(one(provider="anthropic", apiVersion="1"), "apiVersion: is of azure-openai alone", id="a version"),
    pytest.param(one(provider="openai-compatible"), "targets[0] (a).baseUrl", id="no base URL"),
    pytest.param(one(provider="openai-compatible", baseUrl="ftp://x"), "targets[0] (a).baseUrl", id="no HTTP"),
    pytest.param(one(provider="openai"), "targets[0] (a).apiKeyFile", id="no key file"),
    pytest.param(one(provider="openai", apiKeyFile="/nowhere/k"), "apiKeyFile: /nowhere/k: No such", id="no such file"),
    pytest.param({"revisions": []}, "weights.r0: no such revision; there are none", id="no revision"),
    pytest.param({"weights": {"r7": 100}}, "weights.r7", id="weight of nothing"),
    pytest.param({"weights": {"r0": -1}}, "weights.r0", id="weight below 0"),
    pytest.param({"trustedKeys": ["nonsense"]}, "trustedKeys", id="no public key"),
    pytest.param({"colour": "blue"}, "colour", id="unknown field"),
    pytest.param({"slo": {"ttftP95S": 0, "itlP95S": 1}}, "slo.ttftP95S", id="no SLO"),
    pytest.param({"host": "203.0.113.1"}, "port: 203.0.113.1:0", id="an address of another machine"),
    pytest.param({"logLevel": "LOUD"}, "logLevel", id="unknown log level"),
]


@pytest.mark.parametrize(("changed", "says"), REFUSED)
def test_a_configuration_that_cannot_be_served_names_its_field(
    changed: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**config(FakeUpstream()).to_json(), **changed}))
    assert main(["--config", str(file)]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.out == ""


def test_a_configuration_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "none.json")]) == 2
    assert "none.json: No such file" in capsys.readouterr().err


def test_a_budget_for_a_priced_target_needs_a_folder() -> None:
    settings = config(FakeUpstream(), FakeUpstream(), price=("1", "1"), spill={"usdPerDay": "5"})
    with pytest.raises(ConfigRefused, match="stateDir"):
        check(settings)


def test_a_key_is_read_again_and_a_bad_file_keeps_the_last_good_one(tmp_path: Path) -> None:
    file, clock = tmp_path / "key", FakeClock()
    file.write_text("first\n")
    key = KeyFile(file, "targets[0].apiKeyFile", clock)

    def later(content: str | None) -> str:
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
        asyncio.run(clock.advance(1.0))
        return key.value()

    assert (key.value(), repr(key)) == ("first", f"KeyFile({file})")
    assert later("second key\n") == "first", "two words are no key"
    assert later("second\n") == "second"
    assert later("") == "second"
    assert later(None) == "second"
    assert later("third") == "third"
