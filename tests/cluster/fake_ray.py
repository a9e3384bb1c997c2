"""Ray's dashboard and Serve's proxies without Ray, where KubeRay looks for them, with failures on demand.

    fake_ray.behave(namespace, name, application="DEPLOYING")     # name: a RayService's or a RayCluster's
    fake_ray.behave(namespace, name, dashboard=500)               # the others keep what they had
    fake_ray.behave(namespace, name, proxy=503, hangs=True)
    fake_ray.forget(namespace, name)                              # what a new head pod has lost: its applications
    fake_ray.puts(namespace, name)                                # every Serve configuration that KubeRay has PUT
    fake_ray.asked(namespace, name)                               # how often it has asked at all

With `--use-kubernetes-proxy` KubeRay asks its API server, not the pod:
    GET, PUT …/services/<head service>:dashboard/proxy/api/serve/applications/     the dashboard
    GET      …/pods/<head pod>:<port>/proxy/-/healthz                              the Serve proxy of the head pod
Pods that kwok plays have addresses that nobody answers at, and the real API server refuses to go to a loopback
address, which is all that a test has. So this stands before the API server, for KubeRay alone: it answers those
paths itself and passes everything else on, watches included. That also makes every failure a table entry.

As in Ray, a cluster has no applications until a configuration is PUT, and what it then reports is one `application`
status for all of them. A service or pod that is not there is answered as the API server would: 404.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from tests.cluster.credentials import Certificates

PROXIED = re.compile(r"/api/v1/namespaces/([^/]+)/(services|pods)/([^/:]+)(?::[^/]*)?/proxy/(.*)")
APPLICATIONS = "api/serve/applications/"
HEALTH = "-/healthz"
# Headers of one connection, not of the message: never passed on.
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "host", "content-length"}
HANG_POLL_S = 0.05

Application = Literal["NOT_STARTED", "DEPLOYING", "DEPLOY_FAILED", "RUNNING", "UNHEALTHY", "DELETING"]
DEPLOYMENTS: dict[Application, str] = {
    "NOT_STARTED": "UPDATING",
    "DEPLOYING": "UPDATING",
    "DEPLOY_FAILED": "DEPLOY_FAILED",
    "RUNNING": "HEALTHY",
    "UNHEALTHY": "UNHEALTHY",
    "DELETING": "UPDATING",
}


@dataclass(frozen=True)
class Behaviour:
    """What a cluster answers from now on."""

    application: Application = "RUNNING"
    message: str = ""
    dashboard: int = 200  # status of the dashboard's answers to GET
    put: int = 200  # and to PUT: a configuration that is refused is recorded, not taken
    proxy: int = 200  # status of the Serve proxy's health
    hangs: bool = False  # no answer until this changes; KubeRay waits for ever, and with it its other RayServices


@dataclass(frozen=True)
class Put:
    """One Serve configuration that KubeRay sent."""

    cluster: str
    config: dict[str, Any]
    token: str  # what Ray's token authentication got, without "Bearer "; empty where it is off


class FakeRay:
    """Every Ray cluster of a control plane. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self.url = ""
        self._behaviours: dict[tuple[str, str], Behaviour] = {}
        self._configs: dict[tuple[str, str], dict[str, Any]] = {}
        self._puts: list[tuple[str, Put]] = []
        self._asked: list[tuple[str, str]] = []
        self._cluster_of: dict[str, str] = {}
        self._lock = threading.Lock()

    # -- what tests say and ask

    def behave(self, namespace: str, name: str, **changes: Any) -> None:
        """Changes what the clusters of a RayService, or one RayCluster, answer: fields of Behaviour."""
        with self._lock:
            now = self._behaviours.get((namespace, name), Behaviour())
            self._behaviours[namespace, name] = dataclasses.replace(now, **changes)

    def recover(self) -> None:
        """Ends every failure: all clusters answer as healthy ones do, those that hang at once."""
        with self._lock:
            self._behaviours.clear()

    def forget(self, namespace: str, name: str) -> None:
        """Takes the applications from the clusters of that name, as the loss of a head pod does."""
        with self._lock:
            for key in [key for key in self._configs if key[0] == namespace and _belongs(key[1], name)]:
                del self._configs[key]

    def puts(self, namespace: str, name: str) -> list[Put]:
        """What KubeRay has sent to the clusters of that name, oldest first."""
        with self._lock:
            return [put for where, put in self._puts if where == namespace and _belongs(put.cluster, name)]

    def asked(self, namespace: str, name: str) -> int:
        """How many requests the clusters of that name have got, those that hang included."""
        with self._lock:
            return sum(where == namespace and _belongs(cluster, name) for where, cluster in self._asked)

    # -- what KubeRay asks

    def _behaviour(self, namespace: str, cluster: str) -> Behaviour:
        """The nearest name wins: what was said of one cluster before what was said of its RayService."""
        with self._lock:
            names = [name for where, name in self._behaviours if where == namespace and _belongs(cluster, name)]
            return self._behaviours[namespace, max(names, key=len)] if names else Behaviour()

    async def answer(self, namespace: str, cluster: str, path: str, request: web.Request) -> web.Response:
        with self._lock:
            self._asked.append((namespace, cluster))
        while (now := self._behaviour(namespace, cluster)).hangs:  # noqa: ASYNC110  set from other threads
            await asyncio.sleep(HANG_POLL_S)
        if path == HEALTH:
            return web.Response(status=now.proxy, text="success" if now.proxy == 200 else "unhealthy")
        if path != APPLICATIONS or request.method not in {"GET", "PUT"}:
            return web.Response(status=404, text=f"the fake Ray has no {request.method} {path}")
        if request.method == "GET":
            if now.dashboard != 200:
                return web.Response(status=now.dashboard, text="the dashboard fails, as it was told to")
            with self._lock:
                config = self._configs.get((namespace, cluster), {})
            return web.json_response(details(config, now))
        config = json.loads(await request.text())
        token = request.headers.get("x-ray-authorization", "").removeprefix("Bearer ")
        with self._lock:
            self._puts.append((namespace, Put(cluster, config, token)))
            if now.put == 200:
                self._configs[namespace, cluster] = config
        return web.Response(status=now.put, text="" if now.put == 200 else "refused, as it was told to")

    def remember(self, path: str, cluster: str) -> None:
        self._cluster_of[path] = cluster

    def cluster_of(self, path: str) -> str | None:
        return self._cluster_of.get(path)


def _belongs(cluster: str, name: str) -> bool:
    """KubeRay names a RayService's clusters after it, with a suffix."""
    return cluster == name or cluster.startswith(f"{name}-")


def details(config: dict[str, Any], behaviour: Behaviour) -> dict[str, Any]:
    """Serve's answer about its applications, as far as KubeRay reads it."""
    told = {"status": behaviour.application, "message": behaviour.message}
    deployment = {"status": DEPLOYMENTS[behaviour.application], "message": behaviour.message}
    return {
        "applications": {
            application["name"]: {
                "name": application["name"],
                "route_prefix": application.get("route_prefix", "/"),
                "deployments": {
                    one["name"]: {"name": one["name"], **deployment} for one in application.get("deployments", ())
                },
                **told,
            }
            for application in config.get("applications", ())
        }
    }


class _Front:
    """The HTTP server: fake answers, and everything else from the API server."""

    def __init__(self, fake: FakeRay, api_url: str, ca: Path) -> None:
        self.fake = fake
        self.api_url = api_url
        self.tls = ssl.create_default_context(cafile=str(ca))
        self.session: ClientSession | None = None

    @property
    def api(self) -> ClientSession:
        if self.session is None:
            # Watches last as long as they like; both limits belong to whom asks.
            self.session = ClientSession(
                connector=TCPConnector(ssl=self.tls, limit=0), timeout=ClientTimeout(total=None), auto_decompress=False
            )
        return self.session

    async def handle(self, request: web.Request) -> web.StreamResponse:
        matched = PROXIED.fullmatch(request.path)
        if matched is None:
            return await self.forward(request)
        namespace, kind, name, path = matched.groups()
        cluster = await self.cluster(f"/api/v1/namespaces/{namespace}/{kind}/{name}", request)
        if cluster is None:
            return web.json_response({"kind": "Status", "code": 404, "reason": "NotFound"}, status=404)
        return await self.fake.answer(namespace, cluster, path, request)

    async def cluster(self, path: str, request: web.Request) -> str | None:
        """The Ray cluster of a service or pod, which says so in a label; None where there is none."""
        known = self.fake.cluster_of(path)
        if known is None:
            headers = {"Authorization": request.headers.get("Authorization", ""), "Accept": "application/json"}
            async with self.api.get(self.api_url + path, headers=headers) as answer:
                labels = (await answer.json()).get("metadata", {}).get("labels", {}) if answer.status == 200 else {}
            known = labels.get("ray.io/cluster")
            if known is not None:
                self.fake.remember(path, known)
        return known

    async def forward(self, request: web.Request) -> web.StreamResponse:
        headers = [(key, value) for key, value in request.headers.items() if key.lower() not in HOP_BY_HOP]
        body = await request.read()
        try:
            answer = await self.api.request(
                request.method, self.api_url + request.raw_path, headers=headers, data=body or None
            )
        except ClientError as failed:
            return web.Response(status=502, text=f"the API server does not answer: {failed}")
        async with answer:
            response = web.StreamResponse(status=answer.status)
            for key, value in answer.headers.items():
                if key.lower() not in HOP_BY_HOP:
                    response.headers.add(key, value)
            await response.prepare(request)
            async for part in answer.content.iter_any():  # as it comes: a watch must not wait for a full buffer
                await response.write(part)
            await response.write_eof()
            return response

    async def close(self) -> None:
        if self.session is not None:
            await self.session.close()


@contextmanager
def fake_ray_before(api_url: str, certificates: Certificates) -> Iterator[FakeRay]:
    """A fake Ray before the API server at `api_url`; its own address is `.url`, for KubeRay's kubeconfig.

    It speaks TLS as the API server does: Go's client sends its token to nobody else.
    """
    fake = FakeRay()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fake-ray", daemon=True)
    thread.start()
    front = _Front(fake, api_url, certificates.ca)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificates.server, certificates.server_key)

    async def begin() -> web.AppRunner:
        application = web.Application(client_max_size=1 << 26)
        application.router.add_route("*", "/{path:.*}", front.handle)
        # A client that hangs up ends its handler, or the API server would hold a watch that nobody reads.
        runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        fake.url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def end(runner: web.AppRunner) -> None:
        await front.close()
        await runner.cleanup()

    runner = asyncio.run_coroutine_threadsafe(begin(), loop).result(10)
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(end(runner), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
