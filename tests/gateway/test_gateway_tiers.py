"""Tiers over real sockets: headers decide, our engine is told, a client cannot speak for the gateway."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import MODEL, Client, chat, config, running

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
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_our_engine_is_told_the_tier(name: str, headers: dict[str, str], tier: str, path: str) -> None:
    body = chat(False, vllm_xargs={"session_id": "s"}, prompt="a")
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
