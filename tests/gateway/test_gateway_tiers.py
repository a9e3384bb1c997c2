"""Tiers over real sockets: headers decide, our engine is told, a client cannot speak for the gateway."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from moe_core.config import TierConfig
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import MODEL, Client, chat, config, running, until

TIERS = [{"name": "gold", "tenants": ["acme"]}, {"name": "batch", "tenants": ["etl"]}, {"name": "draft"}]
RAW = b'{"messages": [{"role":"user","content":"h\\u00e9"}],\n "model":"tiny", "seed" : 1.50}'


@pytest.mark.parametrize(
    ("name", "headers", "tier"),
    [
        ("a tenant of a tier", {"x_moestack_tenant": "acme"}, "gold"),
        ("a tenant that asks for its own", {"x_moestack_tenant": "etl", "x_moestack_tier": "batch"}, "batch"),
        ("an open tier", {"x_moestack_tier": "draft"}, "draft"),
    ],
)
@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"stream": True, "n": 2}),
        ("/v1/responses", {"input": "a", "store": False}),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "best_of": 3, "cache_salt": "mine"}),
    ],
    ids=["chat", "a stream of two choices", "a response", "several prompts and a salt"],
)
async def test_our_engine_is_told_the_tier(
    name: str, headers: dict[str, str], tier: str, path: str, more: dict[str, Any]
) -> None:
    body = chat(False, vllm_xargs={"session_id": "s"}) | more
    async with FakeUpstream() as local, running(config(local, tiers=TIERS)) as client:
        assert (await client.post(body, path, **headers)).status == 200
        assert local.requests == [{**body, "vllm_xargs": {"session_id": "s", "moestack_tier": tier}}]
        assert "x-moestack-tenant" not in local.headers[0]
        scrape = (await client.call("GET", client.admin_url + "/metrics")).body.decode()
        assert f'tier="{tier}"' in scrape


@pytest.mark.parametrize(
    ("name", "tiers", "headers"),
    [
        ("no tiers", None, {}),
        ("no tiers, and a tenant", None, {"x_moestack_tenant": "acme"}),
        ("nobody's tenant", TIERS, {"x_moestack_tenant": "initech"}),
        ("no tenant", TIERS, {"x_moestack_tier": "default"}),
    ],
)
async def test_a_request_of_tier_default_passes_byte_for_byte(
    name: str, tiers: list[dict[str, Any]] | None, headers: dict[str, str]
) -> None:
    async with FakeUpstream() as local, running(config(local, tiers=tiers)) as client:
        assert (await client.post(RAW, **headers)).status == 200
        assert local.bodies == [RAW]


async def refusal(client: Client, local: FakeUpstream, body: object, **headers: str) -> dict[str, Any]:
    answer = await client.post(body, **headers)
    assert local.requests == []
    return {"status": answer.status, **answer.error}


@pytest.mark.parametrize(
    ("name", "headers"),
    [
        ("nobody asks for gold", {"x_moestack_tier": "gold"}),
        ("a tenant asks for another's", {"x_moestack_tenant": "etl", "x_moestack_tier": "gold"}),
        ("a tenant leaves its tier", {"x_moestack_tenant": "etl", "x_moestack_tier": "default"}),
        ("there is no such tier", {"x_moestack_tier": "platinum"}),
    ],
)
async def test_a_tier_that_a_request_may_not_have_is_refused(name: str, headers: dict[str, str]) -> None:
    async with FakeUpstream() as local, running(config(local, tiers=TIERS)) as client:
        error = await refusal(client, local, chat(False), **headers)
        assert (error["status"], error["code"], error["param"]) == (403, "tier_refused", "x-moestack-tier")


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("the tier", {"moestack_tier": "gold"}, "reserved_parameter"),
        ("anything of ours", {"session_id": "s", "moestack_later": 1}, "reserved_parameter"),
        ("escaped", b'{"moestack\\u005ftier": "gold"}', "reserved_parameter"),
        ("no object", ["moestack_tier"], "invalid_type"),
    ],
)
@pytest.mark.parametrize("tenant", [{}, {"x_moestack_tenant": "acme"}])
async def test_a_client_cannot_set_what_is_the_gateways(
    name: str, arguments: Any, code: str, tenant: dict[str, str]
) -> None:
    given = arguments if isinstance(arguments, bytes) else json.dumps(arguments).encode()
    raw = b'{"model": "tiny", "messages": [], "vllm_xargs": ' + given + b"}"
    async with FakeUpstream() as local, running(config(local, tiers=TIERS)) as client:
        error = await refusal(client, local, raw, **tenant)
        assert (error["status"], error["code"], error["param"]) == (400, code, "vllm_xargs")


async def test_the_engine_reads_what_was_checked_where_a_name_is_given_twice() -> None:
    raw = b'{"model": "tiny", "vllm_xargs": {"moestack_tier": "gold"}, "vllm_xargs": {"a": 1}, "messages": []}'
    async with FakeUpstream() as local, running(config(local, tiers=TIERS)) as client:
        assert (await client.post(raw)).status == 200
        assert b"moestack" not in local.bodies[0]
        assert local.requests == [{"model": MODEL, "vllm_xargs": {"a": 1}, "messages": []}]


async def test_only_our_own_engine_is_told() -> None:
    document = config(FakeUpstream(), tiers=TIERS).to_json()
    async with FakeUpstream(Behaviour(status=500)) as external, FakeUpstream() as target:
        made = config(external, target, tiers=TIERS)
        made = made.model_copy(update={"revisions": (made.revisions[0].model_copy(update={"board_url": None}),)})
        async with running(made) as client:
            assert (await client.post(RAW, x_moestack_tenant="acme")).status == 200
    assert external.bodies == [RAW]
    assert "vllm_xargs" not in target.requests[0]
    assert document["tiers"][2] == {"name": "draft", "tenants": []}


async def test_embeddings_carry_no_tier() -> None:
    raw = b'{"model":"tiny", "input" : "a"}'
    async with FakeUpstream() as local, running(config(local, tiers=TIERS)) as client:
        assert (await client.post(raw, "/v1/embeddings", x_moestack_tenant="acme")).status == 200
        assert local.bodies == [raw]


async def test_the_tier_goes_along_to_the_next_revision() -> None:
    async with FakeUpstream(Behaviour(status=500)) as first, FakeUpstream() as second:
        made = config([first, second], tiers=TIERS)
        async with running(made.model_copy(update={"weights": {"r0": 50, "r1": 50}})) as client:
            answers = [await client.post(chat(False), x_moestack_tenant="acme") for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 200]
    told = [request["vllm_xargs"] for request in (*first.requests, *second.requests)]
    assert len(told) > 2
    assert told == [{"moestack_tier": "gold"}] * len(told)


async def test_beams_that_would_lose_their_tier_are_refused() -> None:
    body = chat(False, use_beam_search=True, n=2)
    async with FakeUpstream() as local, running(config(local, tiers=TIERS)) as client:
        error = await refusal(client, local, body, x_moestack_tenant="acme")
        assert (error["status"], error["code"], error["param"]) == (400, "unsupported_parameter", "use_beam_search")
        assert "'gold'" in error["message"]
        assert (await client.post(body)).status == 200
        assert (await client.post(chat(False, use_beam_search=False), x_moestack_tenant="acme")).status == 200


async def test_beams_of_an_engine_that_knows_no_tiers_pass() -> None:
    async with FakeUpstream() as external:
        made = config(external, tiers=TIERS)
        made = made.model_copy(update={"revisions": (made.revisions[0].model_copy(update={"board_url": None}),)})
        async with running(made) as client:
            assert (await client.post(chat(False, use_beam_search=True), x_moestack_tenant="acme")).status == 200


@pytest.mark.parametrize("path", ["/v1/responses/resp_1/cancel", "/v1/responses/resp_1"])
async def test_a_call_that_would_go_without_its_tier_is_refused_by_name(path: str) -> None:
    async with FakeUpstream() as local, running(config(local, tiers=TIERS)) as client:
        answer = await client.post({"model": MODEL, "input": "a"}, path, x_moestack_tenant="acme")
        assert (answer.status, answer.error["code"]) == (404, "unsupported_url")
        assert f"{path} is not served; use " in answer.error["message"]
        assert local.requests == []


SPILLING = [{"name": "gold", "tenants": ["acme"], "fallback": "Never"}, {"name": "batch", "tenants": ["etl"]}]


@pytest.mark.parametrize(
    ("name", "tiers", "tenant", "status"),
    [
        ("may not spill", SPILLING, "acme", 529),
        ("may", SPILLING, "etl", 200),
        ("has no tier", SPILLING, "initech", 200),
        ("nobody without a tier may", [{"name": "default", "fallback": "Never"}], "initech", 529),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_spills_where_its_tier_may(
    name: str, tiers: list[dict[str, Any]], tenant: str, status: int, stream: bool
) -> None:
    async with (
        FakeUpstream(Behaviour(status=503)) as local,
        FakeUpstream() as target,
        running(config(local, target, tiers=tiers)) as client,
    ):
        answer = await client.post(chat(stream), x_moestack_tenant=tenant)
    assert answer.status == status
    assert len(target.requests) == (status == 200)
    assert all("vllm_xargs" not in request for request in target.requests)


async def test_tiers_that_change_bind_new_requests_and_what_is_under_way_spills_no_further() -> None:
    gate = asyncio.Event()
    async with FakeUpstream() as local, FakeUpstream() as target:
        local.behaviours = [Behaviour(gate=gate), Behaviour(status=503, first_s=0.3)]
        made = config(local, target, tiers=TIERS)
        async with running(made) as client:
            under_way = [asyncio.create_task(client.post(chat(False), x_moestack_tenant="acme"))]
            await until(lambda: len(local.requests) == 1)
            under_way.append(asyncio.create_task(client.post(chat(False), x_moestack_tenant="acme")))
            await until(lambda: len(local.requests) == 2)
            changed = made.model_copy(update={"tiers": (TierConfig(name="silver", tenants=("acme",)),)})
            await client.server.gateway.reconfigure(changed, "2")
            gate.set()
            assert [(await answer).status for answer in under_way] == [200, 529]
            assert target.requests == []
            assert (await client.post(chat(False), x_moestack_tier="gold")).status == 403
            assert (await client.post(chat(False), x_moestack_tenant="acme")).status == 200
    assert [request["vllm_xargs"]["moestack_tier"] for request in local.requests] == ["gold", "gold", "silver"]
