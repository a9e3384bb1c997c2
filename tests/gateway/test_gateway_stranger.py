"""The admin port refuses a stranger; who brings a pass reads, and the gateway shows that pass to its boards."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from moe_core.clock import SystemClock
from moe_core.passes import Passes
from moe_core.signing import Signer
from tests.gateway.fake_upstream import FakeUpstream
from tests.gateway.harness import PASS, chat, config, running
from tests.gateway.test_gateway_workers import pod

READS = ("/v1/digest", "/v1/window", "/v1/costs", "/v1/forecasts")
OPEN = ("/metrics", "/healthz", "/readyz")
STRANGERS = {
    "nothing": {},
    "nonsense": {"Authorization": "Bearer nonsense"},
    "a key of his own": {"Authorization": f"Bearer {Passes(Signer.generate(), SystemClock()).token('default/tiny')}"},
    "the token of a client": {"Authorization": "Bearer sk-test-0123456789abcdef"},
}


@pytest.mark.parametrize("shown", STRANGERS.values(), ids=STRANGERS.keys())
async def test_a_stranger_learns_nothing(shown: dict[str, str]) -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        await client.post(chat())
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
            for path in (*READS, "/", "/v1/none", "/metrics/", "/v1//digest"):
                async with client.session.request(method, client.admin_url + path, headers=shown) as answer:
                    assert answer.status == 401, (method, path)
                    assert b"tiny" not in await answer.read()
        for path in OPEN:
            assert (await client.call("GET", client.admin_url + path, None, **shown)).status == 200


async def test_who_brings_a_pass_reads() -> None:
    async with FakeUpstream() as local, running(config(local)) as client:
        for path in READS:
            assert (await client.admin("GET", path)).status == 200, path


async def test_workers_of_a_pod_refuse_a_stranger_too(tmp_path: Path) -> None:
    async with (
        FakeUpstream() as local,
        pod(config(local, workers=2), tmp_path) as it,
        aiohttp.ClientSession() as session,
    ):
        for path in ("/v1/digest", "/v1/costs", "/v1/forecasts"):
            async with session.get(f"http://127.0.0.1:{it.admin_port}{path}") as answer:
                assert answer.status == 401, path
            async with session.get(f"http://127.0.0.1:{it.admin_port}{path}", headers=PASS) as answer:
                assert answer.status == 200, path
        for path in OPEN:
            async with session.get(f"http://127.0.0.1:{it.admin_port}{path}") as answer:
                assert answer.status == 200, path
