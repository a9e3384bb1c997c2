"""Limits of keys: rules that hold for every run of requests, and what OpenAI's clients read of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core.config import KeyLimits
from moe_gateway import limits
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import Answer, chat, config, running, until

KEY = "acme-key-0a1b2c3d4e5f6071829"
STEPS = st.lists(st.tuples(st.floats(0, 30), st.integers(0, 500), st.integers(0, 800)), max_size=60)


def of(**given_: int) -> KeyLimits:
    return KeyLimits.model_validate(given_)


@given(steps=STEPS, requests=st.integers(1, 50))
def test_no_span_of_time_holds_more_requests_than_a_minutes_and_what_flowed_in(
    steps: list[tuple[float, int, int]], requests: int
) -> None:
    usage, now_s, admitted = limits.begun(of(requestsPerMinute=requests), 0.0), 0.0, []
    for wait_s, _, _ in steps:
        now_s += wait_s
        usage, exceeded = limits.admit(usage, now_s)
        if exceeded is None:
            admitted.append(now_s)
            usage = limits.ended(usage, 0, 0, now_s)
        else:
            assert limits.admit(usage, now_s + exceeded.wait_s + 1e-6)[1] is None, "Retry-After is enough"
    for first, begin_s in enumerate(admitted):
        for last in range(first, len(admitted)):
            span_s = admitted[last] - begin_s
            assert last - first + 1 <= requests * (1 + span_s / 60) + 1e-6


@given(steps=STEPS, tokens=st.integers(1, 2000))
def test_tokens_used_stay_within_the_flow_and_one_requests_error(
    steps: list[tuple[float, int, int]], tokens: int
) -> None:
    usage, now_s, used_total = limits.begun(of(tokensPerMinute=tokens), 0.0), 0.0, 0
    for wait_s, expected, used in steps:
        now_s += wait_s
        entered, exceeded = limits.admit(usage, now_s)
        if exceeded is None:
            usage, exceeded = limits.charge(entered, expected, now_s)
            charged, spent = (expected, used) if exceeded is None else (0, 0)
            usage = limits.ended(usage, charged, spent, now_s)
            used_total += spent
            assert used_total <= tokens * (1 + now_s / 60) + 800 + 1e-6
        assert usage.in_flight == 0
        assert usage.tokens is not None
        assert usage.tokens.level <= tokens


def test_a_request_larger_than_a_minutes_allowance_needs_a_full_bucket_and_is_never_stuck() -> None:
    usage = limits.begun(of(tokensPerMinute=100), 0.0)
    usage, exceeded = limits.charge(usage, 1000, 0.0)
    assert exceeded is None
    again, exceeded = limits.charge(usage, 1, 1.0)
    assert exceeded is not None
    assert again.tokens == usage.tokens, "what is refused takes nothing"
    assert limits.charge(usage, 1000, 600.0)[1] is None


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        ({"requestsPerMinute": 10}, {"requestsPerMinute": 20}, 12),
        ({"requestsPerMinute": 10}, {"requestsPerMinute": 5}, -3),
        ({}, {"requestsPerMinute": 5}, 5),
        ({"requestsPerMinute": 10}, {}, None),
    ],
)
def test_what_was_taken_stays_taken_under_other_limits(
    before: dict[str, int], after: dict[str, int], left: int | None
) -> None:
    usage = limits.begun(of(**before), 0.0)
    for _ in range(8):
        usage, _ = limits.admit(usage, 0.0)
    usage = limits.under(usage, of(**after), 0.0)
    assert usage.in_flight == 8
    assert (None if usage.requests is None else usage.requests.level) == left


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.25, "250ms"), (1.5, "1.5s"), (60, "1m0s"), (90.0, "1m30s")]
)
def test_times_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert limits._duration(seconds) == text


def test_keys_that_were_idle_for_longest_are_forgotten_and_none_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEYS_MAX", 2)
    book, some = limits.Book(), of(requestsPerMinute=5)
    busy, _ = limits.admit(limits.begun(some, 0.0), 0.0)
    book.keep("busy", busy)
    for name in ("a", "b", "c"):
        book.keep(name, limits.begun(some, 0.0))
    assert book.known("busy") is busy
    assert book.known("a") is None


def auth(folder: Path, **given_: int) -> dict[str, Any]:
    row = {"tenant": "acme", "id": "laptop", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "limits": given_}
    file = folder / "keys.json"
    file.write_text(json.dumps({"keys": [row]}))
    return {"mode": "APIKeys", "keysFile": str(file)}


def refused(answer: Answer, says: str) -> bool:
    assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(answer.headers["Retry-After"]) <= 300
    return says in answer.error["message"]


async def test_requests_are_limited_and_told_as_openai_tells_it(tmp_path: Path) -> None:
    async with FakeUpstream() as local, running(config(local, auth=auth(tmp_path, requestsPerMinute=2))) as client:
        answers = [await client.post(chat(), x_api_key=KEY) for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert refused(answers[2], "2 requests per minute")
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
        assert answers[0].headers["x-ratelimit-reset-requests"].endswith("s")
        assert len(local.requests) == 2
        assert await client.metric("moestack_gateway_requests_total", outcome="client_error") == 1


async def test_tokens_are_taken_by_estimate_and_put_right(tmp_path: Path) -> None:
    how = Behaviour(prompt_tokens=10, tokens=3)
    async with FakeUpstream(how) as local, running(config(local, auth=auth(tmp_path, tokensPerMinute=1000))) as client:
        first = await client.post(chat(max_tokens=500, stream_options={"include_usage": True}), x_api_key=KEY)
        second = await client.post(chat(False, max_tokens=950), x_api_key=KEY)
        assert int(first.headers["x-ratelimit-remaining-tokens"]) < 500
        assert (first.status, second.status) == (200, 200), "13 were used, 500 were set aside"
        local.default = Behaviour(prompt_tokens=10, tokens=5000)
        assert (await client.post(chat(False, max_tokens=100), x_api_key=KEY)).status == 200
        assert refused(await client.post(chat(False), x_api_key=KEY), "1000 tokens per minute")


async def test_requests_in_flight_are_limited_and_freed_when_a_client_leaves(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        FakeUpstream(Behaviour(gate=gate)) as local,
        running(config(local, auth=auth(tmp_path, concurrent=1))) as client,
    ):
        first = asyncio.create_task(client.post(chat(), x_api_key=KEY))
        await until(lambda: len(local.requests) == 1)
        assert refused(await client.post(chat(), x_api_key=KEY), "1 concurrent requests")
        first.cancel()
        await until(lambda: not client.server.gateway.calls)
        gate.set()
        assert (await client.post(chat(), x_api_key=KEY)).status == 200
