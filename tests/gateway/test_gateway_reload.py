"""A configuration file that changes under a running gateway: what acts at once, what waits, what is refused."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moe_core.config import GatewayConfig, config_hash
from moe_core.signing import Signer
from moe_core.wire import Weights
from moe_gateway.boards import BoardPoller
from moe_gateway.reload import ConfigWatch, at_runtime
from moe_gateway.weights import in_force, newest
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import KEYS, SIGNER, Client, at, chat, config, knobs, running, send, until, weights


class Followed:
    """A running gateway and the file that it follows. `put` changes the file and lets the gateway look at it."""

    def __init__(self, client: Client, file: Path) -> None:
        self.client = client
        self.file = file
        self._watch = ConfigWatch(client.server.gateway, file)

    async def put(self, content: GatewayConfig | bytes) -> bytes:
        document = content if isinstance(content, bytes) else json.dumps(content.to_json()).encode()
        self.file.write_bytes(document)
        await self.look()
        return document

    async def look(self) -> None:
        await self._watch.look()


@asynccontextmanager
async def followed(settings: GatewayConfig, folder: Path) -> AsyncIterator[Followed]:
    async with running(settings) as client:
        yield Followed(client, folder / "gateway.json")


def file_of(*names: str, version: int = 0, **percent: int) -> GatewayConfig:
    """A configuration of these revisions with weights."""
    document = {
        **config(FakeUpstream()).to_json(),
        "revisions": [{"name": name, "url": f"http://{name}/v1"} for name in names],
        "weights": percent,
        "weightsVersion": version,
    }
    return GatewayConfig.model_validate(document)


@pytest.mark.parametrize(
    ("file", "command", "want"),
    [
        pytest.param(file_of("a", a=100), None, (0, {"a": 100}), id="the file alone"),
        pytest.param(file_of("a", "b", a=100), weights(1, b=100), (1, {"b": 100}), id="a command over no version"),
        pytest.param(file_of("a", "b", a=100, version=4), weights(5, b=100), (5, {"b": 100}), id="a newer command"),
        pytest.param(file_of("a", "b", a=100, version=6), weights(5, b=100), (6, {"a": 100}), id="a newer file"),
        pytest.param(file_of("a", "b", a=100, version=5), weights(5, b=100), (5, {"b": 100}), id="a tie stays"),
        pytest.param(file_of("a", "b", a=100, version=4), weights(5, b=0), (5, {"b": 0}), id="a command for nobody"),
        pytest.param(
            file_of("b", b=100, version=4), weights(5, a=10, b=90), (4, {"b": 100}), id="a revision has gone: void"
        ),
        pytest.param(
            file_of("b", b=0, version=4), weights(5, a=0, b=100), (5, {"a": 0, "b": 100}), id="gone, but without share"
        ),
    ],
)
def test_which_weights_are_in_force(
    file: GatewayConfig, command: Weights | None, want: tuple[int, dict[str, int]]
) -> None:
    assert in_force(file, command) == want


def test_the_newest_version_known_is_the_floor() -> None:
    assert newest(file_of("a", a=100), None) is None
    for file, command, floor in ((3, None, 3), (3, 2, 3), (3, 7, 7)):
        known = newest(file_of("a", a=100, version=file), None if command is None else weights(command, a=100))
        assert known is not None
        assert known.version == floor


def test_what_a_running_process_cannot_take_up_waits_by_name() -> None:
    before = file_of("a", a=100)
    changed = {"port": 81, "adminHost": "::1", "deployment": "x/y", "logLevel": "DEBUG", "model": "other"}
    wanted = GatewayConfig.model_validate({**before.to_json(), **changed})
    config, waiting = at_runtime(before, wanted)
    assert waiting == ["deployment", "port", "adminHost", "logLevel"]
    assert config == before.model_copy(update={"model": "other"})


async def test_a_removed_revision_keeps_its_streams_to_the_end(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with FakeUpstream() as old, FakeUpstream() as new, followed(config([old, new]), tmp_path) as gateway:
        client, old.default = gateway.client, Behaviour(gate=gate)
        tasks = [asyncio.create_task(client.post(chat(index < 4))) for index in range(5)]
        await until(lambda: len(old.requests) == 5)
        after = config([old, new], weights={"r1": 100})
        await gateway.put(after.model_copy(update={"revisions": after.revisions[1:]}))
        assert (await client.digest())["weights"] == {"r1": 100}
        for _ in range(3):
            assert (await client.post(chat())).status == 200
        await gateway.look()
        assert (await at(client, "r0"))["inFlight"] == 5
        gate.set()
        assert {answer.events[-1] for answer in await asyncio.gather(*tasks[:4])} == {"[DONE]"}
        assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 5
        assert len(old.requests) == 5, "nothing new went there"
        await until(lambda: not client.server.gateway.calls)
        assert (await at(client, "r0"))["inFlight"] == 0
        await gateway.look()
        assert [target["name"] for target in (await client.digest())["targets"]] == ["r1"]
        text = (await client.admin("GET", "/metrics")).body.decode()
        assert 'moestack_gateway_in_flight_requests{deployment="default/tiny",target="r0"}' not in text
        assert await client.metric("moestack_gateway_requests_total", target="r0") == 5


async def test_requests_in_flight_are_counted_over_a_change_of_address_and_a_return(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream(Behaviour(gate=gate)) as first,
        FakeUpstream(Behaviour(gate=gate)) as moved,
        FakeUpstream() as other,
        followed(config(first), tmp_path) as gateway,
    ):
        client = gateway.client
        streams = [asyncio.create_task(client.post(chat())) for _ in range(2)]
        await until(lambda: len(first.requests) == 2)
        await gateway.put(config(moved))
        streams.append(asyncio.create_task(client.post(chat())))
        await until(lambda: len(moved.requests) == 1)
        assert (await at(client, "r0"))["inFlight"] == 3
        assert await client.metric("moestack_gateway_in_flight_requests", target="r0") == 3
        await gateway.put(config(other))
        assert (await at(client, "r0"))["inFlight"] == 3
        upstream = next(upstream for upstream in client.server.gateway.fleet.leaving if upstream.base_url == first.url)
        await gateway.put(config(first))
        assert client.server.gateway.upstreams["r0"] is upstream, "it is back with what is known of it"
        assert (await at(client, "r0"))["inFlight"] == 3
        gate.set()
        assert {answer.events[-1] for answer in await asyncio.gather(*streams)} == {"[DONE]"}
        await until(lambda: not client.server.gateway.calls)
        assert (await at(client, "r0"))["inFlight"] == 0


async def test_no_request_is_lost_while_the_file_changes_all_the_time(tmp_path: Path) -> None:
    steps = [{"r0": 100}, {"r0": 50, "r1": 50}, {"r1": 100}, {"r0": 5, "r1": 95}]
    async with (
        FakeUpstream(Behaviour(gap_s=0.01)) as a,
        FakeUpstream(Behaviour(gap_s=0.01)) as b,
        followed(config([a, b], weights=steps[0]), tmp_path) as gateway,
    ):
        tasks = []
        for index in range(60):
            tasks += [asyncio.create_task(gateway.client.post(chat(index % 2 == 0))) for _ in range(2)]
            now = config([a, b], weights=steps[index % 4], weightsVersion=index, limits={"drainS": 1 + index})
            gone = 1 if set(now.weights) == {"r0"} else 2
            await gateway.put(now.model_copy(update={"revisions": now.revisions[:gone]}))
            await asyncio.sleep(0.005)
        answers = await asyncio.gather(*tasks)
        assert {answer.status for answer in answers} == {200}
        assert all(answer.whole for answer in answers)
        digest = await gateway.client.digest()
        assert (digest["completed"], digest["inFlight"], digest["weightsVersion"]) == (120, 0, 59)
        assert sum(target["requests"] for target in digest["targets"]) == 120


async def test_weights_of_file_and_command_go_by_version(tmp_path: Path) -> None:
    async with FakeUpstream() as a, FakeUpstream() as b:

        def file(version: int, **percent: int) -> GatewayConfig:
            return config([a, b], trusted_keys=KEYS, weights=percent, weightsVersion=version)

        async with followed(file(3, r0=100), tmp_path) as gateway:
            client = gateway.client

            async def now() -> tuple[int, dict[str, int]]:
                digest = await client.digest()
                assert await client.metric("moestack_gateway_weights_version") == digest["weightsVersion"]
                return digest["weightsVersion"], digest["weights"]

            assert await now() == (3, {"r0": 100, "r1": 0})
            assert (await send(client, weights(2, r1=100))).status == 409, "the file's version is the floor"
            assert (await send(client, weights(3, r1=100))).status == 409, "the same version says something else"
            assert (await send(client, weights(3, r0=100, r1=0))).status == 200
            assert (await send(client, weights(5, r0=75, r1=25))).status == 200
            await gateway.put(file(4, r0=90, r1=10))
            assert await now() == (5, {"r0": 75, "r1": 25})
            await gateway.put(file(6, r0=50, r1=50))
            assert await now() == (6, {"r0": 50, "r1": 50})
            for _ in range(2):
                assert (await send(client, weights(7, r1=100))).status == 200, "a repetition is acknowledged"
            assert (await send(client, weights(6, r0=50, r1=50))).status == 409
            await gateway.put(file(7, r0=0, r1=100))
            assert await now() == (7, {"r0": 0, "r1": 100})


async def test_what_is_in_force_is_told_by_the_hash_of_its_file(tmp_path: Path) -> None:
    async with FakeUpstream() as local, followed(config(local), tmp_path) as gateway:
        before = (await gateway.client.digest())["configHash"]
        document = await gateway.put(config(local, limits={"drainS": 7}))
        assert before != (await gateway.client.digest())["configHash"] == config_hash(document)
        assert await gateway.client.metric("moestack_gateway_config_loaded") == 1


async def test_every_hot_field_acts_at_once(tmp_path: Path) -> None:
    other = Signer.generate()
    async with (
        FakeUpstream() as local,
        FakeUpstream() as api,
        followed(config(local, trusted_keys=()), tmp_path) as gateway,
    ):
        client = gateway.client
        assert (await send(client, knobs(1))).status == 403
        await gateway.put(config(local, trusted_keys=KEYS))
        assert (await send(client, knobs(1))).status == 200
        await gateway.put(config(local, trusted_keys=(other.public_pem(),)))
        assert (await send(client, knobs(2), SIGNER)).status == 403
        assert (await send(client, knobs(2), other)).status == 200

        await gateway.put(config(local, limits={"maxBodyBytes": 10}))
        assert (await client.post(chat())).status == 413
        await gateway.put(config(local, model="renamed"))
        assert (await client.post(chat())).status == 404
        await gateway.put(config(local, slo={"ttftP95S": 1e-6, "itlP95S": 1e-6}))
        await client.post(chat())
        assert (await at(client, "r0"))["missed"] == 1

        client.server.gateway.upstreams["r0"].ledger.sent(-1, 1e6)
        assert (await client.post(chat())).status == 529
        await gateway.put(config(local, api))
        assert (await client.post(chat(), x_moestack_explain="1")).headers["x-moestack-target"] == "t0"
        await gateway.put(config(local, api, spill={"shareCap": 0}))
        assert (await client.post(chat(), x_moestack_explain="1")).headers["x-moestack-reason"] == "late"
        await gateway.put(config(local))
        assert [target["name"] for target in (await client.digest())["targets"]] == ["r0"]


async def test_a_budget_changes_with_the_file(tmp_path: Path) -> None:
    def file(usd: str | None) -> GatewayConfig:
        spill = {} if usd is None else {"usdPerDay": usd}
        return config(local, api, price=("1", "1"), stateDir=str(tmp_path), spill=spill, weights={"r0": 0})

    async with FakeUpstream() as local, FakeUpstream() as api, followed(file(None), tmp_path) as gateway:
        budget = gateway.client.server.gateway.budget
        for usd, status in ((None, 503), ("5", 200), ("0.000001", 503), ("5", 200)):
            await gateway.put(file(usd))
            assert (await gateway.client.post(chat())).status == status, usd
        await until(lambda: budget.left_usd() == Decimal(5) - Decimal("0.000026"))


async def test_boards_follow_the_file(tmp_path: Path) -> None:
    async with FakeUpstream() as a, FakeUpstream() as b, followed(config(a), tmp_path) as gateway:
        poller = BoardPoller(gateway.client.server.gateway)
        (first,) = poller.boards
        await gateway.put(config([a, b]))
        assert [board.url for board in poller.boards] == [a.board_url, b.board_url]
        assert poller.boards[0] is first
        alone = config([a, b], weights={"r1": 100})
        await gateway.put(alone.model_copy(update={"revisions": alone.revisions[1:]}))
        assert [board.url for board in poller.boards] == [b.board_url]


async def test_a_target_keeps_what_was_learned_unless_it_is_another_model(tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream() as api, followed(config(local, api), tmp_path) as gateway:
        await gateway.client.server.gateway.budget.open()
        await gateway.put(config(local, api, weights={"r0": 0}))
        for _ in range(3):
            await gateway.client.post(chat())
        learned = gateway.client.server.gateway.upstreams["t0"]
        await gateway.put(config(local, api, weights={"r0": 100}))
        assert gateway.client.server.gateway.upstreams["t0"] is learned
        dearer = config(local, api, price=("1", "1"))
        await gateway.put(dearer)
        repriced = gateway.client.server.gateway.upstreams["t0"]
        assert (repriced.price.input_usd_per_m, repriced.price.output_usd_per_m) == (1, 1)
        assert repriced.estimate == learned.estimate
        (target,) = dearer.targets
        await gateway.put(dearer.model_copy(update={"targets": (target.model_copy(update={"model": "new"}),)}))
        assert gateway.client.server.gateway.upstreams["t0"].estimate != learned.estimate


REFUSED = [
    pytest.param(lambda good: b"{", "Invalid JSON", id="half a file"),
    pytest.param(lambda good: b"", "Invalid JSON", id="an empty file"),
    pytest.param(lambda good: {**good, "colour": 1}, "colour", id="an unknown field"),
    pytest.param(lambda good: {**good, "revisions": []}, "weights.r0: no such revision", id="no revision"),
    pytest.param(lambda good: {**good, "weights": {"r0": 99}}, "weights: Value error, sums to 99", id="weights"),
    pytest.param(lambda good: {**good, "weights": {"r9": 100}}, "weights.r9", id="weight of nothing"),
    pytest.param(lambda good: {**good, "trustedKeys": ["x"]}, "trustedKeys", id="no public key"),
    pytest.param(
        lambda good: {**good, "targets": [{"name": "t", "provider": "openai", "model": "m", "apiKeyFile": "/no/k"}]},
        "apiKeyFile: /no/k: No such",
        id="a key that is not there",
    ),
    pytest.param(
        lambda good: {
            **good,
            "stateDir": "/tmp/x",
            "spill": {"usdPerDay": "1"},
            "targets": [
                {
                    "name": "t",
                    "provider": "openai-compatible",
                    "baseUrl": "http://x",
                    "model": "m",
                    "usdPerMInput": "1",
                }
            ],
        },
        "stateDir",
        id="a budget store that only a start can open",
    ),
]


@pytest.mark.parametrize(("bad", "says"), REFUSED)
async def test_an_invalid_file_is_refused_and_the_old_one_goes_on(
    bad: Any, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeUpstream() as local:
        good = config(local)
        content = bad(good.to_json())
        async with followed(good, tmp_path) as gateway:
            client = gateway.client
            await gateway.put(good)
            before = client.server.gateway.config
            with caplog.at_level(logging.INFO, "moestack"):
                await gateway.put(content if isinstance(content, bytes) else json.dumps(content).encode())
                await gateway.look()
            refusals = [record for record in caplog.records if "refused" in record.getMessage()]
            assert len(refusals) == 1, "said once"
            digest = await client.digest()
            assert says in digest["configError"]
            assert await client.metric("moestack_gateway_config_loaded") == 0
            assert client.server.gateway.config is before
            assert (await client.post(chat())).status == 200
            await gateway.put(good)
            assert "configError" not in await client.digest()
            assert await client.metric("moestack_gateway_config_loaded") == 1


async def test_a_file_that_is_gone_changes_nothing_and_a_key_may_come_later(tmp_path: Path) -> None:
    async with FakeUpstream() as local, FakeUpstream() as api, followed(config(local), tmp_path) as gateway:
        await gateway.look()
        assert "No such file" in (await gateway.client.digest())["configError"]
        await gateway.put(config(local, api, key_file=tmp_path / "key", weights={"r0": 0}))
        assert "apiKeyFile" in (await gateway.client.digest())["configError"]
        assert (await gateway.client.post(chat())).status == 200
        (tmp_path / "key").write_text("k-1")
        await gateway.look()
        assert (await gateway.client.post(chat())).status == 200
        assert api.headers[-1]["Authorization"] == "Bearer k-1"


async def test_ports_wait_for_a_restart_and_the_rest_acts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with FakeUpstream() as local, followed(config(local), tmp_path) as gateway:
        with caplog.at_level(logging.WARNING, "moestack"):
            await gateway.put(config(local, port=1, deployment="default/other", limits={"maxBodyBytes": 10}))
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert [record.moe_fields["fields"] for record in warnings] == [["deployment", "port"]]  # type: ignore[attr-defined]
        assert (await gateway.client.post(chat())).status == 413
        assert gateway.client.server.gateway.config.deployment == "default/tiny"
