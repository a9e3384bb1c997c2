"""The admin port: who may change knobs and weights, what acts at once, and what is shown."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_core import metrics as table
from moe_core.latency import UNKNOWN
from moe_core.signing import Signer
from moe_core.wire import Ack, FallbackKnobs, GatewayDigest, Knobs, Signed, Weights
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import Answer, Client, chat, config, running

SIGNER = Signer.generate()
FORGER = Signer.generate()
KEYS = (SIGNER.public_pem(),)


def knobs(version: int, deployment: str = "default/tiny", **fallback: float) -> Knobs:
    return Knobs(deployment=deployment, version=version, fallback=FallbackKnobs.model_validate(fallback))


def weights(version: int, **percent: int) -> Weights:
    return Weights(deployment="default/tiny", version=version, percent=percent)


async def send(client: Client, command: Knobs | Weights, signer: Signer = SIGNER, **changed: Any) -> Answer:
    """Sign and send a command; `changed` fields of the envelope are put in after signing."""
    envelope = signer.sign(command).model_copy(update=changed)
    method, path = ("POST", "/v1/knobs") if isinstance(command, Knobs) else ("PUT", "/v1/weights")
    return await client.admin(method, path, envelope.to_json())


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
        pytest.param(weights(9, r0=50, r1=49), SIGNER, {}, 422, "percent: sums to 99", id="weights below 100"),
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
    async with FakeUpstream() as local, running(config(local)) as client:
        assert (await send(client, knobs(1))).status == 403


async def test_an_invalid_document_under_a_good_signature_is_422(two: Two) -> None:
    good = SIGNER.sign(knobs(7))
    payload = good.payload.replace('"version":7', '"version":0')
    private = SIGNER._private
    signature = base64.b64encode(private.sign(f"Knobs\n{payload}".encode())).decode()
    envelope = Signed(kind="Knobs", payload=payload, key_id=good.key_id, signature=signature)
    answer = await two[0].admin("POST", "/v1/knobs", envelope.to_json())
    assert (answer.status, "version" in answer.json["error"]) == (422, True)


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
    ours = [metric for name, metric in vars(table).items() if name.startswith("GATEWAY_")]
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
