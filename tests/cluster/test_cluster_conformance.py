"""The real API server and our client pass the suite that the in-memory one passes: what it finds is true of both."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from moe_kube.connect import connect
from moe_kube.fake_kinds import BUILT_IN
from moe_kube.objects import MOE_DEPLOYMENT, RAY_CLUSTER, RAY_SERVICE
from tests.cluster.control_plane import ControlPlane
from tests.kube.conformance import CASES, Server

pytestmark = pytest.mark.cluster

KINDS = frozenset({*BUILT_IN, MOE_DEPLOYMENT, RAY_SERVICE, RAY_CLUSTER})
COLLECT_S = 30.0


def _etcd(plane: ControlPlane) -> str:
    command = Path(f"/proc/{plane.components['etcd'].pid}/cmdline").read_text()
    found = re.search(r"--listen-client-urls=([^\0]+)", command)
    assert found is not None
    return found[1]


async def _forget(etcd: str, token: str) -> str:
    """Compact, as the API server does every five minutes, and age the token: the server remembers the last minutes."""
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{etcd}/v3/kv/range", data=json.dumps({"key": "AA=="})) as answer:
            revision = (await answer.json(content_type=None))["header"]["revision"]
        async with session.post(f"{etcd}/v3/kv/compaction", data=json.dumps({"revision": revision})) as answer:
            assert answer.status == 200, await answer.text()
    place = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    return base64.urlsafe_b64encode(json.dumps({**place, "rv": 1}).encode()).decode().rstrip("=")


@pytest.mark.parametrize("name", CASES)
async def test_the_real_api_server(name: str, crds: ControlPlane, namespace: str) -> None:
    async def collect(done: Callable[[], Awaitable[bool]]) -> None:
        end_s = time.monotonic() + COLLECT_S
        while not await done():
            assert time.monotonic() < end_s, "the garbage collector did not do it"
            await asyncio.sleep(0.1)

    async with await connect(crds.kubeconfigs["admin"]) as api:
        server = Server(api, namespace, asyncio.sleep, lambda token: _forget(_etcd(crds), token), collect, KINDS)
        await CASES[name](server)
