"""From the cluster to the fleet: what is watched, and each MoEDeployment brought to what it says now."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from moe_api.annotations import DEPLOYMENT_LABEL, MANAGED_SELECTOR
from moe_core.addresses import gateway_admin_name
from moe_core.clock import Clock
from moe_core.config import ClusterTunerConfig, TunerConfig
from moe_core.log import get_log
from moe_core.retry import Backoff
from moe_kube.api import Api
from moe_kube.endpoints import EndpointFacts, endpoint_facts
from moe_kube.objects import ENDPOINT_SLICE, MOE_DEPLOYMENT, Kind, Obj, Ref
from moe_kube.queue import QueueClosed, WorkQueue
from moe_kube.reflector import Reflector
from moe_kube.waits import at_most
from moe_tuner.fleet import Fleet
from moe_tuner.resource import Wanted, read

Key = tuple[str, str]
"""Namespace and name of a MoEDeployment."""
WORKERS = 16
"""Each waits most of its time: for a tuner that ends, which takes back what is unproven first."""
AGAIN = Backoff(initial_s=0.5, max_s=60.0)
_META = ("name", "namespace", "uid", "annotations", "deletionTimestamp")
_STATUS = ("revisions", "tuning")


@dataclass(frozen=True, slots=True)
class Slice:
    """What is kept of an EndpointSlice. `deployment` is empty where it is none of a gateway's admin ports."""

    namespace: str
    deployment: str
    facts: EndpointFacts


def name_of(key: Key) -> str:
    return f"{key[0]}/{key[1]}"


def resource_part(obj: Obj) -> Obj:
    """What is kept of a MoEDeployment."""
    status = obj.get("status") or {}
    return {
        "apiVersion": obj.get("apiVersion", MOE_DEPLOYMENT.api_version),
        "kind": obj.get("kind", MOE_DEPLOYMENT.kind),
        "metadata": {name: obj["metadata"][name] for name in _META if name in obj["metadata"]},
        "spec": obj.get("spec") or {},
        "status": {name: status[name] for name in _STATUS if name in status},
    }


def slice_part(obj: Obj) -> Slice:
    """Ours is what the Service of a gateway's admin ports controls: a label anybody may put on anything."""
    meta = obj["metadata"]
    deployment = (meta.get("labels") or {}).get(DEPLOYMENT_LABEL, "")
    admin = ("Service", gateway_admin_name(deployment))
    owners = meta.get("ownerReferences") or ()
    owned = any(owner.get("controller") and (owner.get("kind"), owner.get("name")) == admin for owner in owners)
    return Slice(meta.get("namespace", ""), deployment if owned else "", endpoint_facts(obj))


class Follower:
    """`run` keeps the caches, always: a process that stands by knows the cluster when it leads. Between `start` and
    `stop` each change is brought to the fleet at once."""

    def __init__(self, api: Api, config: ClusterTunerConfig, fleet: Fleet, clock: Clock) -> None:
        self._config = config
        self._fleet = fleet
        self._clock = clock
        self._queue: WorkQueue[Key] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._log = get_log("tuner.follow")
        self.wanted: dict[Key, Wanted] = {}
        """What was read last of each that is there."""
        places = config.namespaces or (None,)
        self._resources = [
            Reflector(
                api,
                MOE_DEPLOYMENT,
                project=resource_part,
                clock=clock,
                namespace=place,
                on_change=lambda ref, old, new: self._wake((ref.namespace, ref.name)),
            )
            for place in places
        ]
        self._slices = [
            Reflector(
                api,
                ENDPOINT_SLICE,
                project=slice_part,
                clock=clock,
                namespace=place,
                labels=MANAGED_SELECTOR,
                index=_key_of,
                on_change=lambda ref, old, new: self._wake_by(old, new),
            )
            for place in places
        ]

    # -- what is known

    def resource(self, key: Key) -> Obj | None:
        """A MoEDeployment that is there and not on its way out."""
        found = (cache.get(Ref(MOE_DEPLOYMENT, *key)) for cache in self._resources)
        obj = next((one for one in found if one is not None), None)
        return None if obj is None or obj["metadata"].get("deletionTimestamp") else obj

    def learn(self, obj: Obj) -> None:
        """The answer to a write of ours, ahead of the watch."""
        for cache in self._resources:
            if cache.get(Ref(MOE_DEPLOYMENT, obj["metadata"]["namespace"], obj["metadata"]["name"])) is not None:
                cache.learn(obj)

    def behind(self) -> tuple[tuple[Kind, str], ...]:
        """Caches that were never filled, with the reason."""
        caches: list[Reflector[Obj] | Reflector[Slice]] = [*self._resources, *self._slices]
        return tuple((one.kind, str(one.trouble or "not listed yet")) for one in caches if not one.synced)

    # -- life

    async def run(self) -> None:
        """Follow the API server until cancelled."""
        async with asyncio.TaskGroup() as group:
            for running in [cache.run() for cache in self._resources] + [cache.run() for cache in self._slices]:
                group.create_task(running)

    async def start(self) -> None:
        """Begin to bring changes to the fleet, as soon as the caches are filled. Returns at once."""
        if self._queue is None:
            self._queue = WorkQueue(self._clock, backoff=AGAIN)
            self._tasks = [asyncio.create_task(self._term(self._queue), name="tuner term")]

    async def stop(self) -> None:
        """Let every deployment go."""
        queue, self._queue = self._queue, None
        if queue is None:
            return
        tasks, self._tasks = self._tasks, []
        queue.close()
        # One that is being changed ends by itself: cut off, it would not take back what is unproven.
        await at_most(self._clock, queue.join(), self._config.lease_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._fleet.stop()
        self.wanted.clear()

    @property
    def broken(self) -> bool:
        """Whether its workers have ended though it should work: a bug, and only a new process goes on."""
        return self._queue is not None and any(task.done() for task in self._tasks)

    async def _term(self, queue: WorkQueue[Key]) -> None:
        filled = [cache.wait_synced() for cache in self._resources] + [cache.wait_synced() for cache in self._slices]
        await asyncio.gather(*filled)
        keys = [(ref.namespace, ref.name) for cache in self._resources for ref, _ in cache.items()]
        self._log.info("tuning what there is", deployments=len(keys))
        for key in keys:
            queue.add(key)
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._work(queue))

    async def _work(self, queue: WorkQueue[Key]) -> None:
        while True:
            try:
                key = await queue.get()
            except QueueClosed:
                return
            try:
                await self._bring(key, queue)
                queue.forget(key)
            except Exception:
                wait_s = queue.add_rate_limited(key)
                self._log.exception("it cannot be followed: this is a bug", deployment=name_of(key), again_in_s=wait_s)
            finally:
                queue.done(key)

    async def _bring(self, key: Key, queue: WorkQueue[Key]) -> None:
        """Bring one deployment to what its resource says now."""
        name, obj = name_of(key), self.resource(key)
        before = self.wanted.get(key)
        if obj is None:
            self.wanted.pop(key, None)
            await self._fleet.drop(name)
            return
        again = before is not None and before.uid == obj["metadata"].get("uid")
        in_force: TunerConfig | None = before.config if before is not None and again else None
        slices = (part.facts for cache in self._slices for _, part in cache.by(key))
        wanted = read(obj, slices, self._config, in_force, self._clock.time())
        self.wanted[key] = wanted
        if wanted.changes_at_s is not None:
            queue.add_after(key, max(0.1, wanted.changes_at_s - self._clock.time()))
        if wanted.config is not None:
            await self._fleet.put(wanted.config)
        else:
            await self._fleet.drop(name)
        if wanted.problem:
            self._fleet.refuse(name, wanted.problem)

    def _wake(self, key: Key) -> None:
        if self._queue is not None:
            self._queue.add(key)

    def _wake_by(self, *parts: Slice | None) -> None:
        for part in parts:
            if part is not None and part.deployment:
                self._wake((part.namespace, part.deployment))


def _key_of(part: Slice) -> Iterable[Hashable]:
    return ((part.namespace, part.deployment),) if part.deployment else ()
