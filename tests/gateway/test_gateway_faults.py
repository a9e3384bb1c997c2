"""Every way in which an upstream fails, over real sockets: the answer, who gave it, and what the metrics say."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from moe_gateway import retries
from tests.gateway.fake_upstream import DONE, Behaviour, FakeUpstream, chunk
from tests.gateway.harness import Client, chat, config, running, until

IN_BAND = b'data: {"error": {"message": "out of memory", "type": "server_error", "code": 500, "param": null}}\n\n'
BEFORE_FIRST_TOKEN = [
    pytest.param(Behaviour(status=500), id="500"),
    pytest.param(Behaviour(status=502), id="502"),
    pytest.param(Behaviour(status=503), id="503"),
    pytest.param(Behaviour(status=429, headers={"Retry-After": "7"}), id="429"),
    pytest.param(Behaviour(status=408), id="408"),
    pytest.param(Behaviour(status=529), id="529"),
    pytest.param(Behaviour(reset=True), id="reset"),
    pytest.param(Behaviour(stall=True), id="no answer in time"),
    pytest.param(Behaviour(role_then_stall=True), id="a role and no token in time"),
    pytest.param(Behaviour(cut_after=0), id="cut before the first token"),
    pytest.param(Behaviour(raw=IN_BAND), id="an error in band at once"),
    pytest.param(Behaviour(raw=b"data: {not json\n\n"), id="malformed"),
    pytest.param(Behaviour(raw=b": keep-alive\n\n" * 9), id="keep-alives and the end"),
]
SOON = {"firstTokenS": 0.3, "responseS": 0.6, "idleS": 0.3}


@pytest.mark.parametrize("fault", BEFORE_FIRST_TOKEN)
async def test_before_the_first_token_another_target_takes_over(fault: Behaviour) -> None:
    async with (
        FakeUpstream(fault) as local,
        FakeUpstream() as target,
        running(config(local, target, limits=SOON)) as client,
    ):
        answer = await client.post(chat(), x_moestack_explain="1")
        assert (answer.status, answer.text, answer.whole) == (200, "w0 w1 w2 ", True)
        assert answer.events[-1] == "[DONE]"
        assert answer.headers["x-moestack-target"] == "t0"
        reason = answer.headers["x-moestack-reason"]
        assert reason == ("local_overloaded" if fault.status in {429, 503, 529} else "local_failed")
        assert target.requests[0]["model"] == "closed-0"
        assert await client.metric("moestack_gateway_spilled_requests_total", target="t0", reason=reason) == 1
        targets = {item["name"]: item for item in (await client.digest())["targets"]}
        assert (targets["r0"]["failures"], targets["t0"]["failures"]) == (1, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_refused_goes_to_the_target(stream: bool) -> None:
    async with FakeUpstream() as local, FakeUpstream() as target:
        await local.close()
        async with running(config(local, target)) as client:
            answer = await client.post(chat(stream))
            assert answer.status == 200
            assert len(target.requests) == 1


async def test_of_two_revisions_the_other_takes_over_before_any_target() -> None:
    async with (
        FakeUpstream(Behaviour(reset=True)) as bad,
        FakeUpstream() as good,
        FakeUpstream() as target,
        running(config([bad, good], target, weights={"r0": 50, "r1": 50})) as client,
    ):
        assert [(await client.post(chat())).text for _ in range(4)] == ["w0 w1 w2 "] * 4
        assert target.requests == []


@pytest.mark.parametrize(
    ("fault", "stream", "want"),
    [
        pytest.param(Behaviour(status=500), True, (502, "bad_gateway"), id="500"),
        pytest.param(Behaviour(status=500), False, (502, "bad_gateway"), id="500 whole"),
        pytest.param(Behaviour(reset=True), False, (502, "bad_gateway"), id="reset"),
        pytest.param(Behaviour(raw=IN_BAND), True, (502, "bad_gateway"), id="error in band"),
        pytest.param(Behaviour(body=b"<html>"), False, (502, "bad_gateway"), id="no JSON"),
        pytest.param(Behaviour(body=b'{"error": {"message": "x"}}'), False, (502, "bad_gateway"), id="error in a 200"),
        pytest.param(Behaviour(stall=True), True, (503, "unavailable"), id="stalled"),
        pytest.param(Behaviour(stall=True), False, (503, "unavailable"), id="stalled whole"),
        pytest.param(Behaviour(status=503), True, (529, "overloaded"), id="the engine's queue is full"),
        pytest.param(Behaviour(status=429), False, (529, "overloaded"), id="429"),
    ],
)
async def test_with_no_target_there_is_one_honest_error(fault: Behaviour, stream: bool, want: tuple[int, str]) -> None:
    async with FakeUpstream(fault) as local, running(config(local, limits=SOON)) as client:
        answer = await client.post(chat(stream))
        assert (answer.status, answer.error["code"]) == want
        assert ("Retry-After" in answer.headers) == (answer.status in {503, 529})
        label = "shed" if answer.status == 529 else "error"
        assert await client.metric("moestack_gateway_requests_total", outcome=label) == 1
        assert await client.metric("moestack_gateway_slo_requests_total", result="missed") == 1


async def test_both_sides_down_is_503_with_retry_after() -> None:
    async with FakeUpstream() as local, FakeUpstream() as target:
        await local.close()
        await target.close()
        async with running(config(local, target)) as client:
            for _ in range(5):
                answer = await client.post(chat())
                assert (answer.status, answer.error["code"]) == (503, "unavailable")
                assert int(answer.headers["Retry-After"]) >= 1


async def test_a_slow_first_token_is_waited_for_where_nobody_else_may_answer() -> None:
    async with (
        FakeUpstream(Behaviour(first_s=0.5)) as local,
        running(config(local, limits={"firstTokenS": 0.1, "responseS": 5})) as client,
    ):
        assert (await client.post(chat())).text == "w0 w1 w2 "


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        pytest.param(Behaviour(cut_after=2), "stream_cut", id="connection broken"),
        pytest.param(Behaviour(stall_after=2), "stream_cut", id="silent"),
        pytest.param(Behaviour(after=b"data: {not json\n\n" + chunk("never") + DONE), "stream_cut", id="malformed"),
        pytest.param(Behaviour(after=b'data: {"choices": [{"del'), "stream_cut", id="half an event and the end"),
        pytest.param(Behaviour(after=b""), "stream_cut", id="ended without a finish reason"),
        pytest.param(Behaviour(after=IN_BAND + chunk("never") + DONE), 500, id="the model's own error"),
    ],
)
async def test_in_mid_stream_a_fault_is_told_and_never_hidden(fault: Behaviour, code: Any) -> None:
    async with (
        FakeUpstream(fault) as local,
        FakeUpstream() as target,
        running(config(local, target, limits=SOON)) as client,
    ):
        answer = await client.post(chat())
        assert answer.status == 200
        assert answer.events[-1]["error"]["code"] == code
        assert "[DONE]" not in answer.events
        assert b"never" not in answer.body
        assert answer.whole
        assert answer.body.startswith(chunk() + chunk("w0 "))
        assert target.requests == []
        assert await client.metric("moestack_gateway_requests_total", outcome="cut", target="r0") == 1


async def test_a_dead_local_side_costs_a_few_probes_not_one_for_each_request() -> None:
    async with (
        FakeUpstream(Behaviour(status=500)) as local,
        FakeUpstream() as target,
        running(config(local, target)) as client,
    ):
        answers = [await client.post(chat(), x_moestack_explain="1") for _ in range(12)]
        assert {answer.status for answer in answers} == {200}
        assert 3 <= len(local.requests) <= 5  # a probe for each second that twelve requests may take
        assert "local_down" in {answer.headers["x-moestack-reason"] for answer in answers[-3:]}
        local.default = Behaviour()
        client.server.gateway.upstreams["r0"].breaker = _due(client)
        assert (await client.post(chat(), x_moestack_explain="1")).headers["x-moestack-target"] == "r0"
        assert (await client.post(chat(), x_moestack_explain="1")).headers["x-moestack-target"] == "r0"


def _due(client: Client) -> Any:
    """The breaker with its open time over."""
    return replace(client.server.gateway.upstreams["r0"].breaker, until_s=0.0)


async def test_an_overloaded_engine_is_not_taken_for_dead() -> None:
    async with (
        FakeUpstream(Behaviour(status=429)) as local,
        FakeUpstream() as target,
        running(config(local, target)) as client,
    ):
        for _ in range(6):
            await client.post(chat())
        assert len(local.requests) == 6


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_targets_wrong_key_is_not_the_clients_error(status: int) -> None:
    body = b'{"error": {"message": "Incorrect API key provided: sk-te***cdef"}}'
    async with (
        FakeUpstream() as local,
        FakeUpstream(Behaviour(status=status, body=body)) as bad,
        FakeUpstream() as good,
    ):
        await local.close()
        async with running(config(local, bad, good)) as client:
            answer = await client.post(chat(), x_moestack_explain="1")
            assert (answer.status, answer.headers["x-moestack-target"]) == (200, "t1")
        async with running(config(local, bad)) as client:
            answer = await client.post(chat())
            assert answer.status == 503
            assert b"sk-" not in answer.body


async def test_what_a_target_refuses_goes_back_to_a_revision() -> None:
    async with (
        FakeUpstream() as local,
        FakeUpstream(Behaviour(status=400, body=b'{"error":{}}')) as target,
        running(config(local, target)) as client,
    ):
        _make_late(client, 1e5)
        answer = await client.post(chat(top_k=40), x_moestack_explain="1")
        assert (answer.status, answer.headers["x-moestack-target"]) == (200, "r0")
        assert len(target.requests) == 1


def _make_late(client: Client, tokens: float = 1e6) -> None:
    """Let the gateway believe that one long prompt waits at the revision."""
    gateway = client.server.gateway
    gateway.upstreams["r0"].ledger.sent(-1, tokens)


async def test_a_predicted_miss_spills_before_it_happens() -> None:
    async with FakeUpstream() as local, FakeUpstream() as target, running(config(local, target)) as client:
        assert (await client.post(chat(), x_moestack_explain="1")).headers["x-moestack-target"] == "r0"
        _make_late(client)
        answer = await client.post(chat(), x_moestack_explain="1")
        assert answer.headers["x-moestack-target"] == "t0"
        assert answer.headers["x-moestack-reason"] == "slo_predicted"
        client.server.gateway.upstreams["r0"].ledger.ended(-1)
        assert (await client.post(chat(), x_moestack_explain="1")).headers["x-moestack-target"] == "r0"
        assert (await client.digest())["spilled"] == 1


async def test_a_real_queue_spills() -> None:
    """Requests that wait at a slow engine are enough: no board, no setting by hand."""
    slow = Behaviour(first_s=1.0)
    settings = {"slo": {"ttftP95S": 0.3, "itlP95S": 1.0}}
    async with (
        FakeUpstream(slow) as local,
        FakeUpstream() as target,
        running(config(local, target, **settings)) as client,
    ):
        await client.post(chat())  # an idle engine is always tried; now its TTFT is known
        answers = await asyncio.gather(*(client.post(chat(), x_moestack_explain="1") for _ in range(5)))
        assert {answer.headers["x-moestack-target"] for answer in answers} == {"t0"}


async def test_a_hopeless_queue_without_a_target_is_shed() -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        _make_late(client)
        answer = await client.post(chat())
        assert (answer.status, answer.error["code"]) == (529, "overloaded")
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert local.requests == []
        assert await client.metric("moestack_gateway_shed_requests_total", reason="overload") == 1


async def test_the_share_cap_holds_for_failures_too() -> None:
    async with FakeUpstream() as local, FakeUpstream() as target:
        await local.close()
        async with running(config(local, target, spill={"shareCap": 0.5})) as client:
            statuses = [(await client.post(chat())).status for _ in range(10)]
            assert statuses.count(200) == len(target.requests)
            assert statuses.count(200) in {4, 5}  # older arrivals count a little less
            assert statuses.count(503) == 10 - statuses.count(200)
        async with running(config(local, target, spill={"shareCap": 0.0})) as client:
            assert [(await client.post(chat())).status for _ in range(3)] == [503] * 3


async def test_a_stream_for_a_client_that_asked_no_usage_carries_none() -> None:
    async with FakeUpstream() as local, FakeUpstream() as target, running(config(local, target)) as client:
        await local.close()
        plain = await client.post(chat())
        assert all(event == "[DONE]" or event["choices"] for event in plain.events)
        asked = await client.post(chat(stream_options={"include_usage": True}))
        assert [event["usage"]["prompt_tokens"] for event in asked.events if "usage" in event] == [10]
        assert json.loads(target.bodies[0])["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_probe_of_a_stalled_upstream_gives_way_after_a_few_promises(stream: bool) -> None:
    # A Serve application without a replica takes requests and holds them: the probe must not wait as long.
    async with FakeUpstream(Behaviour(reset=True)) as local, FakeUpstream() as target:
        slo = {"ttftP95S": 0.3, "itlP95S": 0.02}
        async with running(config(local, target, slo=slo, limits={"firstTokenS": 60})) as client:
            for _ in range(3):
                await client.post(chat())
            assert client.server.gateway.upstreams["r0"].probing()
            client.server.gateway.upstreams["r0"].breaker = _due(client)
            local.default = Behaviour(stall=True)
            asked = len(local.requests)
            answer = await asyncio.wait_for(client.post({**chat(stream), "max_tokens": 5}), 10)
            assert answer.status == 200
            assert len(local.requests) == asked + 1
            assert len(target.requests) == 4


async def test_a_failing_pair_is_not_hammered_by_second_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FLOOR_PER_S", 0.2)
    always = Behaviour(status=429)  # overload opens no breaker: only the budget holds attempts back
    async with FakeUpstream(always) as local, FakeUpstream(always) as target, running(config(local, target)) as client:
        answers = [await client.post(chat(False)) for _ in range(20)]
        assert {answer.status for answer in answers} <= {503, 529}
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers)
        assert len(local.requests) == 20
        assert len(target.requests) <= 0.2 * 20 + 0.2 * 10
        assert await client.metric("moestack_gateway_retries_total", result="sent") == len(target.requests)
        assert await client.metric("moestack_gateway_retries_total", result="refused") == 20 - len(target.requests)


async def test_with_one_upstream_alone_its_breaker_sends_one_probe_and_lets_it_come_back() -> None:
    async with FakeUpstream(Behaviour(status=500)) as local, running(config(local)) as client:
        assert [(await client.post(chat(False))).status for _ in range(3)] == [502] * 3
        refused = [await client.post(chat(False)) for _ in range(5)]
        assert {(answer.status, answer.error["code"]) for answer in refused} == {(503, "unavailable")}
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert len(local.requests) == 3, "a dead upstream is left alone"
        client.server.gateway.upstreams["r0"].breaker = _due(client)
        gate = asyncio.Event()
        local.default = Behaviour(gate=gate)
        probe = asyncio.create_task(client.post(chat(False)))
        await until(lambda: len(local.requests) == 4)
        assert (await client.post(chat(False))).status == 503, "one probe at a time"
        gate.set()
        assert (await probe).status == 200
        assert [(await client.post(chat(False))).status for _ in range(3)] == [200] * 3
