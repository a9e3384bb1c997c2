"""A configuration that changes all the time, well and badly: what is under way goes on, what is bad changes nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from moe_core.config import GatewayConfig
from moe_gateway.reload import AT_START
from tests.gateway import reference
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import chat, config, until
from tests.gateway.test_gateway_reload import followed

KEY, OTHER = "acme-key-0a1b2c3d4e5f6071829", "etl-key-91b2c3d4e5f607182abc"


def keys(folder: Path, name: str, **given: str) -> dict[str, Any]:
    (folder / name).mkdir(exist_ok=True)
    for tenant, key in given.items():
        (folder / name / tenant).write_text(key)
    return {"mode": "APIKeys", "keysDir": str(folder / name)}


async def test_a_stream_goes_on_through_100_reloads_of_everything(tmp_path: Path) -> None:
    gate = asyncio.Event()
    one, two = keys(tmp_path, "one", acme=KEY), keys(tmp_path, "two", etl=OTHER)
    async with (
        FakeUpstream(Behaviour(gate=gate)) as local,
        FakeUpstream() as api,
        followed(config(local, auth=one), tmp_path) as gateway,
    ):
        client = gateway.client
        stream = asyncio.create_task(client.post(chat(), x_api_key=KEY))
        await until(lambda: len(local.requests) == 1)
        for step in range(100):
            if step % 5 == 4:
                await gateway.put(b'{"deployment": "default/tiny", "mod')  # somebody is still writing it
                assert "Invalid JSON" in (client.server.gateway.config_error or "")
                continue
            await gateway.put(
                config(
                    [api] if step % 2 else [local, api],
                    api,
                    auth=({**one, "limits": {"concurrent": 1 + step}}, two, {})[step % 3],
                    price=(str(step), "1"),
                    limits={"drainS": 1 + step},
                    spill={"shareCap": step / 100},
                    logOkShare=step / 100,
                    tracing={"endpoint": f"http://127.0.0.1:9/{step}"} if step % 50 == 3 else None,
                )
            )
            assert client.server.gateway.config_error is None
        gate.set()
        answer = await stream
        assert (answer.status, answer.whole, answer.events[-1]) == (200, True, "[DONE]")
        await until(lambda: not client.server.gateway.calls)


async def test_keys_change_with_the_file_and_a_bad_folder_changes_nothing(tmp_path: Path) -> None:
    one, two = keys(tmp_path, "one", acme=KEY), keys(tmp_path, "two", etl=OTHER)
    short = keys(tmp_path, "short", acme="hunter2")
    async with FakeUpstream() as local, followed(config(local, auth=one), tmp_path) as gateway:

        async def let_in() -> list[bool]:
            return [(await gateway.client.post(chat(), x_api_key=key)).status == 200 for key in (KEY, OTHER, "")]

        assert await let_in() == [True, False, False]
        await gateway.put(config(local, auth=two))
        assert await let_in() == [False, True, False]
        await gateway.put(config(local, auth=short))
        assert "keysDir/acme line 1" in (await gateway.client.digest())["configError"]
        assert await let_in() == [False, True, False]
        await gateway.put(config(local, auth={**two, "limits": {"requestsPerMinute": 1}}))
        assert await let_in() == [False, True, False]
        assert await let_in() == [False, False, False]
        await gateway.put(config(local))
        assert await let_in() == [True, True, True]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"auth": {"mode": "Password"}}, "auth.mode"),
    ({"auth": {"mode": "APIKeys"}}, "auth.keysDir"),
    ({"auth": {"mode": "APIKeys", "keysDir": "/nowhere"}}, "auth: keysDir"),
    ({"auth": {"mode": "OIDC", "issuer": "https://i"}}, "auth.audience"),
    ({"auth": {"mode": "OIDC", "issuer": "ftp://i", "audience": "a"}}, "auth.issuer"),
    ({"auth": {"limits": {"concurrent": 0}}}, "auth.limits.concurrent"),
    ({"auth": {"limits": {"concurrent": 1}}}, "auth.limits"),
    ({"tracing": {"endpoint": "collector:4318"}}, "tracing.endpoint"),
    ({"tracing": {"endpoint": "http://c", "sample": 2}}, "tracing.sample"),
    ({"logOkShare": -1}, "logOkShare"),
    ({"logPrompts": "some"}, "logPrompts"),
    ({"limits": {"idleS": 0}}, "limits.idleS"),
]


@pytest.mark.parametrize(("bad", "field"), BAD, ids=[f"{field} {json.dumps(bad)[:40]}" for bad, field in BAD])
async def test_a_bad_value_is_refused_by_its_field_and_the_old_one_stays(
    bad: dict[str, Any], field: str, tmp_path: Path
) -> None:
    async with FakeUpstream() as local, followed(config(local), tmp_path) as gateway:
        before = gateway.client.server.gateway.config
        await gateway.put(json.dumps({**before.to_json(), **bad}).encode())
        assert field in (gateway.client.server.gateway.config_error or "")
        assert gateway.client.server.gateway.config is before
        assert (await gateway.client.post(chat())).status == 200


def test_the_guide_names_every_field_that_waits_for_a_start() -> None:
    for name in AT_START:
        assert f"`{GatewayConfig.model_fields[name].alias or name}`" in reference.DOCS.read_text(), name
