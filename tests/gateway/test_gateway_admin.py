"""The admin port: who may change knobs and weights, what acts at once, and what is shown."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from moe_core import metrics as table
from moe_core.latency import UNKNOWN
from moe_core.signing import Signer
from moe_core.wire import Ack, GatewayDigest, Knobs, Signed, Weights
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import KEYS, SIGNER, Client, at, chat, config, knobs, running, send, until, weights

FORGER = Signer.generate()


@pytest.fixture
async def two() -> AsyncIterator[tuple[Client, FakeUpstream, FakeUpstream]]:
    """A gateway over revisions r0 and r1, with no target."""
    async with FakeUpstream() as old, FakeUpstream() as new, running(config([old, new], trusted_keys=KEYS)) as client:
        yield client, old, new


Two = tuple[Client, FakeUpstream, FakeUpstream]


async def test_good_knobs_are_acknowledged_and_repeated_ones_too(two: Two) -> None:
    client = two[0]
    for _ in range(2):
        answer = await send(client, knobs(3, miss_probability=0.2))
        ack = Ack.model_validate_json(answer.body)
        assert (answer.status, ack.version, ack.rank, ack.error) == (200, 3, 0, None)
        assert ack.replica == (await client.digest())["gateway"]
    assert (await client.digest())["knobsVersion"] == 3
    assert await client.metric("moestack_gateway_knobs_version") == 3


@pytest.mark.parametrize(
    ("command", "signer", "changed", "status", "says"),
    [
        pytest.param(knobs(9), FORGER, {}, 403, "no trusted key", id="another's key"),
        pytest.param(knobs(9), FORGER, {"key_id": SIGNER.key_id}, 403, "does not match", id="another's key, our id"),
        pytest.param(knobs(9), SIGNER, {"payload": '{"version":9}'}, 403, "does not match", id="changed payload"),
        pytest.param(knobs(9), SIGNER, {"kind": "Weights"}, 403, "expected a signed Knobs", id="another kind"),
        pytest.param(knobs(4), SIGNER, {}, 409, "older", id="older"),
        pytest.param(knobs(5, share_cap=0.9), SIGNER, {}, 409, "another content", id="same version, other content"),
        pytest.param(knobs(9, "default/other"), SIGNER, {}, 422, "deployment", id="another deployment"),
        pytest.param(weights(9, "default/other", r1=100), SIGNER, {}, 422, "deployment", id="another's weights"),
        pytest.param(weights(9, r0=50, r9=50), SIGNER, {}, 422, "percent.r9", id="unknown revision"),
        pytest.param(weights(9, r0=0, r1=100), FORGER, {}, 403, "no trusted key", id="forged weights"),
    ],
)
async def test_a_refused_command_changes_nothing(
    two: Two, command: Knobs | Weights, signer: Signer, changed: dict[str, Any], status: int, says: str
) -> None:
    client = two[0]
    assert (await send(client, knobs(5))).status == 200
    answer = await send(client, command, signer, **changed)
    assert (answer.status, says in answer.json["error"]) == (status, True), answer.body
    digest = await client.digest()
    assert (digest["knobsVersion"], digest["weights"]) == (5, {"r0": 100, "r1": 0})


@pytest.mark.parametrize("body", [b"", b"[]", b'{"kind":"Knobs"}', b"\xff", b'{"a":' + b'"x' * 10_000])
async def test_nonsense_is_refused_by_field(two: Two, body: bytes) -> None:
    answer = await two[0].call("POST", two[0].admin_url + "/v1/knobs", body)
    assert answer.status == 422


async def test_without_trusted_keys_every_command_is_refused() -> None:
    async with FakeUpstream() as local, running(config(local, trusted_keys=())) as client:
        assert (await send(client, knobs(1))).status == 403


@pytest.mark.parametrize(
    ("command", "old", "new", "says"),
    [
        pytest.param(knobs(7), '"version":7', '"version":0', "version", id="version 0"),
        pytest.param(weights(7, r0=100), ":100", ":99", "percent: Value error, sums to 99", id="weights below 100"),
        pytest.param(weights(7, r0=0), ":0", ":-1", "percent.r0", id="a weight below 0"),
    ],
)
async def test_an_invalid_document_under_a_good_signature_is_422(
    two: Two, command: Knobs | Weights, old: str, new: str, says: str
) -> None:
    good = SIGNER.sign(command)
    payload = good.payload.replace(old, new)
    assert payload != good.payload
    signature = base64.b64encode(SIGNER._private.sign(f"{good.kind}\n{payload}".encode())).decode()
    envelope = Signed(kind=good.kind, payload=payload, key_id=good.key_id, signature=signature)
    method, path = ("POST", "/v1/knobs") if isinstance(command, Knobs) else ("PUT", "/v1/weights")
    answer = await two[0].admin(method, path, envelope.to_json())
    assert (answer.status, says in answer.json["error"]) == (422, True), answer.body
    assert (await two[0].digest())["weights"] == {"r0": 100, "r1": 0}


@pytest.mark.parametrize("total", [0, 100])
def test_weights_sum_to_all_or_nothing(total: int) -> None:
    assert sum(weights(1, r0=total, r1=0).percent.values()) == total
    with pytest.raises(ValidationError, match="sums to"):
        weights(1, r0=total + 1 if total == 0 else 99)


async def test_without_weights_the_closed_api_carries_the_traffic_and_then_nobody_does() -> None:
    async with FakeUpstream() as local, FakeUpstream() as api:
        settings = config(local, api, trusted_keys=KEYS, spill={"shareCap": 0})
        async with running(settings) as client:
            assert (await send(client, weights(1, r0=0))).status == 200
            answers = [await client.post(chat(), x_moestack_explain="1") for _ in range(5)]
            assert {answer.headers["x-moestack-reason"] for answer in answers} == {"no_weight"}
            assert (len(local.requests), len(api.requests)) == (0, 5)
            api.behaviours = [Behaviour(status=500)]
            assert (await client.post(chat())).status == 502
            await api.close()
            answer = await client.post(chat())
            assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, "unavailable", "10")
            body = {"model": "tiny", "input": "x"}
            assert (await client.post(body, "/v1/embeddings")).status == 503, "those never leave"
            assert len(local.requests) == 0
            assert (await send(client, weights(2, r0=100))).status == 200
            assert (await client.post(chat())).status == 200


async def test_a_revision_without_weight_drains_to_0_while_its_streams_end(two: Two) -> None:
    client, old, new = two
    gate = asyncio.Event()
    old.default = Behaviour(gate=gate)
    streams = [asyncio.create_task(client.post(chat())) for _ in range(4)]
    whole = asyncio.create_task(client.post(chat(False)))
    await until(lambda: len(old.requests) == 5)
    assert (await send(client, weights(1, r1=100))).status == 200
    for _ in range(3):
        assert (await client.post(chat())).status == 200
    assert (await at(client, "r0"))["inFlight"] == 5
    gate.set()
    for answer in await asyncio.gather(*streams, whole):
        assert answer.status == 200
    await until(lambda: not client.server.gateway.calls)
    assert (len(old.requests), len(new.requests), (await at(client, "r0"))["inFlight"]) == (5, 3, 0)


async def test_a_revision_is_judged_by_what_ended_there_and_what_it_lost() -> None:
    """Of r0: two within the SLO, one too slow between tokens, one cut, one refused (and saved by t0), one lost before
    its first token; a client's own error judges nobody."""
    async with FakeUpstream() as local, FakeUpstream() as api:
        settings = config(local, api, slo={"ttftP95S": 5.0, "itlP95S": 0.05}, spill={"missProbability": 1.0})
        async with running(settings) as client:
            local.behaviours = [
                Behaviour(),
                Behaviour(),
                Behaviour(gap_s=0.2),
                Behaviour(cut_after=1),
                Behaviour(status=429),
                Behaviour(reset=True),
                Behaviour(status=400),
            ]
            for _ in range(7):
                await client.post(chat())
            revision, closed = await at(client, "r0"), await at(client, "t0")
            assert (revision["met"], revision["missed"], revision["requests"], revision["failures"]) == (2, 4, 7, 3)
            assert (closed["met"], closed["missed"]) == (2, 0)


async def test_an_attempt_that_ends_nowhere_is_one_miss(two: Two) -> None:
    two[1].behaviours = [Behaviour(status=500)]
    assert (await two[0].post(chat())).status == 502
    revision = await at(two[0], "r0")
    assert (revision["met"], revision["missed"]) == (0, 1)


async def test_weights_are_kept_exactly_and_replaced_live(two: Two) -> None:
    client, old, new = two
    for version, percent in enumerate([{"r0": 95, "r1": 5}, {"r0": 60, "r1": 40}, {"r1": 100}], 1):
        assert (await send(client, weights(version, **percent))).status == 200
        before = (len(old.requests), len(new.requests))
        for _ in range(20):
            await asyncio.gather(*(client.post(chat(False)) for _ in range(5)))
        got = (len(old.requests) - before[0], len(new.requests) - before[1])
        assert got == (percent.get("r0", 0), percent["r1"])
    assert (await client.digest())["weights"] == {"r0": 0, "r1": 100}


async def test_fallback_knobs_act_at_once() -> None:
    cases = [
        ({}, "t0", "slo_predicted"),
        ({"share_cap": 0.0}, "r0", "late"),
        ({"miss_probability": 1.0}, "r0", "within_slo"),
        ({}, "t0", "slo_predicted"),
    ]
    async with (
        FakeUpstream() as local,
        FakeUpstream() as target,
        running(config(local, target, trusted_keys=KEYS)) as client,
    ):
        revision = client.server.gateway.upstreams["r0"]
        revision.ledger.sent(-1, 1e5)
        for version, (fallback, name, reason) in enumerate(cases, 1):
            assert (await send(client, knobs(version, **fallback))).status == 200
            answer = await client.post(chat(), x_moestack_explain="1")
            got = (answer.headers["x-moestack-target"], answer.headers["x-moestack-reason"])
            assert got == (name, reason), version
            revision.estimate = UNKNOWN  # what was sent there has shown that the queue is not real


async def test_the_digest_counts_its_window() -> None:
    async with FakeUpstream(Behaviour(gap_s=0.01)) as local, running(config(local)) as client:
        local.behaviours = [Behaviour(status=500), Behaviour(cut_after=1), Behaviour(status=400)]
        for _ in range(5):
            await client.post(chat(stream_options={"include_usage": True}))
        digest = GatewayDigest.model_validate(await client.digest())
        assert (digest.arrivals, digest.completed, digest.failed, digest.shed, digest.in_flight) == (5, 2, 2, 0, 0)
        assert (digest.output_tokens, digest.slo_attained) == (2 * 3 + 1, 0.5)
        assert digest.targets[0].requests == 5
        assert digest.targets[0].failures == 2
        await asyncio.sleep(0.05)
        assert GatewayDigest.model_validate(await client.digest(0.01)).arrivals == 0


@pytest.mark.parametrize("window", ["0", "-1", "301", "nan", "soon"])
async def test_a_bad_window_is_refused(two: Two, window: str) -> None:
    answer = await two[0].admin("GET", f"/v1/digest?window={window}")
    assert (answer.status, "window" in answer.json["error"]) == (422, True)


async def test_metrics_are_those_of_the_table() -> None:
    ours = [metric for name, metric in vars(table).items() if name.startswith(("GATEWAY_", "GEN_AI_"))]
    async with FakeUpstream() as local, FakeUpstream() as target, running(config(local, target)) as client:
        await client.post(chat())
        local.behaviours = [Behaviour(status=500)]
        await client.post(chat())
        await local.close()
        await target.close()
        await client.post(chat())
        text = (await client.admin("GET", "/metrics")).body.decode()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert set(families) == {metric.name.removesuffix("_total") for metric in ours}
        for metric in ours:
            family = families[metric.name.removesuffix("_total")]
            assert family.type == metric.kind
            for sample in family.samples:
                assert set(sample.labels) - {"le"} == set(metric.labels), sample


async def test_health(two: Two) -> None:
    client = two[0]
    assert (await client.admin("GET", "/healthz")).status == 200
    assert (await client.admin("GET", "/readyz")).status == 200
    client.server.gateway.draining = True
    assert (await client.admin("GET", "/readyz")).status == 503
    answer = await client.post(chat())
    assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, "stopping", "1")
