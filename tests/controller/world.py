"""A whole cluster in memory for the operator: API server, KubeRay, gateways, clock; and an operator that may die.

Everything moves in turns: the operator looks, the other controllers act, time passes. Nothing waits for anything, so a
hundred upgrades take a second.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_api.annotations import DEPLOYMENT_LABEL, OPERATOR_MANAGER, TUNER_MANAGER
from moe_core.addresses import gateway_admin_name
from moe_core.clock import FakeClock
from moe_core.config import OperatorConfig
from moe_core.moments import rfc3339
from moe_core.wire import GatewayDigest, TargetDigest
from moe_kube import objects as k
from moe_kube.errors import ApiError, Busy, Conflict, NotFound
from moe_kube.fake import FakeCluster
from moe_kube.fake_kinds import ALL
from moe_kube.faults import Crash, Journal
from moe_kube.faulty import FaultyApi
from moe_kube.objects import Kind, Obj, Ref
from moe_operator.children import NOT_OURS, WATCHED, Child, Key, project
from moe_operator.names import MANAGED_BY, gateway_name
from moe_operator.reconcile import reconcile
from moe_operator.requests import AskGateways, Gateways, Observed, Outcome, SendWeights, Tell
from moe_operator.shell import Performer, run

NAMESPACE = "serving"
KEY: Key = (NAMESPACE, "moe")
USER = "operator"
TURN_S = 5
CONFIG = OperatorConfig(
    engine_image="registry.example.com/moestack/engine@sha256:" + "a" * 64,
    gateway_image="registry.example.com/moestack/gateway@sha256:" + "b" * 64,
    trusted_keys=("-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n",),
    signing_key_file="/var/run/moestack/key",
)
SPEC: Obj = {
    "model": {"id": "Qwen/Qwen3-235B-A22B-FP8"},
    "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
    "fallback": {
        "targets": [
            {
                "name": "gpt",
                "provider": "openai",
                "model": "gpt-5.5",
                "secretRef": {"name": "openai", "key": "apiKey"},
                "price": {"inputUsdPerMTokens": 5, "outputUsdPerMTokens": 30},
            }
        ],
        "budget": {"usdPerDay": "200"},
    },
    "gateway": {"replicas": {"min": 1, "max": 2}},
    "upgrade": {"steps": [20, 100], "stepDuration": "15s", "drainTimeout": "40s", "progressDeadline": "90s"},
}


def now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits for something")


class HandClock(FakeClock):
    """A clock that is moved by hand."""

    def move(self, seconds: float) -> None:
        self._now += seconds


@dataclass
class KubeRay:
    """Makes a RayCluster for each RayService, and says that it serves after a while."""

    ready_after_s: float = 10.0
    never_ready: set[str] = field(default_factory=set)
    unready: set[str] = field(default_factory=set)

    def turn(self, cluster: FakeCluster, clock: FakeClock) -> None:
        for service in cluster.peek(k.RAY_SERVICE):
            meta = service["metadata"]
            if "deletionTimestamp" in meta:
                continue
            name = meta["name"]
            born = Ref(k.RAY_CLUSTER, meta["namespace"], f"{name}-abcde")
            groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
            if cluster.find(born) is None:
                cluster.create(born, self._cluster(service, born, groups), user="kuberay")
            made = cluster.get(born)
            age = clock.time() - float(made["metadata"]["annotations"]["born"])
            ready = age >= self.ready_after_s and name not in self.never_ready | self.unready
            workers = sum(group["minReplicas"] for group in made["spec"]["workerGroupSpecs"]) if age >= 5 else 0
            cluster.set_status(born, {"availableWorkerReplicas": workers, "state": "ready"}, user="kuberay")
            self._tell(cluster, service, born.name, ready, clock)

    def _cluster(self, service: Obj, born: Ref, groups: list[Obj]) -> Obj:
        meta = service["metadata"]
        return {
            "metadata": {
                "name": born.name,
                "namespace": born.namespace,
                "labels": {**meta["labels"], "ray.io/originated-from-cr-name": meta["name"]},
                "annotations": {"born": str(self._clock_time)},
                "ownerReferences": [
                    {
                        "apiVersion": "ray.io/v1",
                        "kind": "RayService",
                        "name": meta["name"],
                        "uid": meta["uid"],
                        "controller": True,
                    }
                ],
            },
            "spec": {"workerGroupSpecs": groups},
        }

    _clock_time: float = 0.0

    def _tell(self, cluster: FakeCluster, service: Obj, born: str, ready: bool, clock: FakeClock) -> None:
        ref = k.ref_of(k.RAY_SERVICE, service)
        before = (service.get("status") or {}).get("conditions") or [{}]
        status = "True" if ready else "False"
        since = before[0].get("lastTransitionTime") if before[0].get("status") == status else None
        cluster.set_status(
            ref,
            {
                "activeServiceStatus": {
                    "rayClusterName": born,
                    "applicationStatuses": {"moestack": _application(ready)},
                },
                "numServeEndpoints": 1 if ready else 0,
                "observedGeneration": service["metadata"]["generation"],
                "serviceStatus": "Running" if ready else "",
                "conditions": [
                    {
                        "type": "Ready",
                        "status": status,
                        "reason": "NonZeroServeEndpoints" if ready else "ZeroServeEndpoints",
                        "message": "",
                        "lastTransitionTime": since or rfc3339(clock.time()),
                    }
                ],
            },
            user="kuberay",
        )


def _application(ready: bool) -> Obj:
    return {"status": "RUNNING"} if ready else {"status": "DEPLOYING", "message": "loading weights"}


@dataclass
class Pods:
    """Gateway pods: a Deployment becomes available, its pods get addresses, take weights and count requests."""

    addresses: tuple[str, ...] = ("10.0.0.1",)
    version: int = 0
    in_flight: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    """Share of a revision's requests within the SLO; 1 by default."""
    silent: bool = False
    deaf: bool = False
    """Takes weights neither from the operator nor from its file."""
    arrivals: int = 0

    def turn(self, cluster: FakeCluster) -> None:
        for deployment in cluster.peek(k.DEPLOYMENT):
            meta = deployment["metadata"]
            if "deletionTimestamp" in meta:
                continue
            status = {"availableReplicas": 1, "observedGeneration": meta["generation"], "replicas": 1}
            cluster.set_status(k.ref_of(k.DEPLOYMENT, deployment), status, user="deployment-controller")
            owner = meta["labels"][DEPLOYMENT_LABEL]
            service = cluster.find(Ref(k.SERVICE, meta["namespace"], gateway_admin_name(owner)))
            if service is not None:
                self._slice(cluster, owner, service)
            config = cluster.find(Ref(k.CONFIG_MAP, meta["namespace"], gateway_name(owner)))
            if config is not None and not self.deaf:
                document = json.loads(next(iter(config["data"].values())))
                self.version = max(self.version, document.get("weightsVersion", 0))

    def _slice(self, cluster: FakeCluster, owner: str, service: Obj) -> None:
        ref = Ref(k.ENDPOINT_SLICE, service["metadata"]["namespace"], f"{service['metadata']['name']}-x1")
        if cluster.find(ref) is None:
            body = {
                "metadata": {
                    "name": ref.name,
                    "namespace": ref.namespace,
                    "labels": {**MANAGED_BY, DEPLOYMENT_LABEL: owner},
                    "ownerReferences": [
                        {
                            "apiVersion": "v1",
                            "kind": "Service",
                            "name": service["metadata"]["name"],
                            "uid": service["metadata"]["uid"],
                            "controller": True,
                        }
                    ],
                },
                "addressType": "IPv4",
                "endpoints": [{"addresses": [address]} for address in self.addresses],
                "ports": [{"name": "admin", "port": 8001, "protocol": "TCP"}],
            }
            cluster.create(ref, body, user="endpointslice-controller")

    async def ask(self, request: AskGateways) -> Gateways:
        if self.silent:
            return Gateways(silent=len(request.pods))
        names = {*self.shares, *self.in_flight, *self.weighted}
        rows = tuple(self._row(name) for name in sorted(names))
        digest = GatewayDigest(
            gateway="gw",
            at_s=0.0,
            window_s=request.window_s,
            weights_version=self.version,
            arrivals=self.arrivals,
            targets=rows,
        )
        return Gateways(digests=(digest,) * len(request.pods))

    weighted: tuple[str, ...] = ()

    def _row(self, name: str) -> TargetDigest:
        count = 100 if name in self.weighted else 0
        met = round(count * self.shares.get(name, 1.0))
        return TargetDigest(
            name=name, local=True, requests=count, met=met, missed=count - met, in_flight=self.in_flight.get(name, 0)
        )

    async def send(self, request: SendWeights) -> int:
        if self.silent or self.deaf:
            return 0
        self.version = max(self.version, request.weights.version)
        return len(request.pods)


class LiveCaches:
    """Caches that are as new as the cluster, or `lag` writes behind."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.lag = 0
        self._projected: dict[tuple[Ref, str], Child] = {}

    def look(self, key: Key) -> Observed:
        store = self.cluster.store
        version = max(store.compacted, store.version - self.lag)
        namespace, name = key
        resources = store.all_at(k.MOE_DEPLOYMENT, version)
        found = next((s.copy() for s in resources if (s.ref.namespace, s.ref.name) == key), None)
        absent, children = set(), []
        for kind in WATCHED:
            if not self._installed(kind):
                absent.add(kind)
                continue
            for stored in store.all_at(kind, version):
                labels = stored.labels
                if stored.ref.namespace == namespace and labels.get(DEPLOYMENT_LABEL) == name and _managed(labels):
                    children.append(self._child(kind, stored.ref, stored.obj))
        return Observed(found, tuple(children), frozenset(absent), self.cluster.clock.time())

    def _installed(self, kind: Kind) -> bool:
        try:
            self.cluster.store.traits(kind)
        except NotFound:
            return False
        return True

    def _child(self, kind: Kind, ref: Ref, obj: Obj) -> Child:
        at = (ref, obj["metadata"]["resourceVersion"])
        if at not in self._projected:
            self._projected[at] = project(kind, obj)
        return self._projected[at]

    def learn(self, ref: Ref, obj: Obj) -> None:
        """These caches are the cluster itself."""

    def forget(self, ref: Ref, uid: str) -> None:
        """These caches are the cluster itself."""


def _managed(labels: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in MANAGED_BY.items())


@dataclass
class Told:
    """Events as they are told."""

    events: list[Tell] = field(default_factory=list)

    def tell(self, tell: Tell) -> None:
        self.events.append(tell)


class World:
    """One cluster with one operator."""

    def __init__(self, *, kinds: tuple[Kind, ...] = ALL, config: OperatorConfig = CONFIG) -> None:
        self.clock = HandClock()
        self.cluster = FakeCluster(clock=self.clock, kinds=kinds)
        self.config = config
        self.journal = Journal()
        self.api = FaultyApi(self.cluster.client(USER), journal=self.journal, clock=self.clock)
        self.caches = LiveCaches(self.cluster)
        self.ray = KubeRay()
        self.pods = Pods()
        self.told = Told()
        self.crashes = 0
        self.errors: list[str] = []
        self.due: dict[Key, float] = {}
        self._failures: Counter[Key] = Counter()
        self._seen = -1

    # What people and other controllers do

    def put(
        self, spec: Mapping[str, Any] = SPEC, name: str = KEY[1], *, annotations: Mapping[str, str] | None = None
    ) -> None:
        """`kubectl apply` of a MoEDeployment."""
        ref = Ref(k.MOE_DEPLOYMENT, NAMESPACE, name)
        meta = {"name": name, "namespace": NAMESPACE, "annotations": dict(annotations or {})}
        body = {"apiVersion": ref.kind.api_version, "kind": ref.kind.kind, "metadata": meta, "spec": spec}
        self.cluster.apply(ref, body, manager="kubectl")

    def drop(self, name: str = KEY[1]) -> None:
        self.cluster.delete(Ref(k.MOE_DEPLOYMENT, NAMESPACE, name))

    def tune(self, tuning: Mapping[str, Any], name: str = KEY[1]) -> None:
        """The tuner's own write of status.tuning."""
        ref = Ref(k.MOE_DEPLOYMENT, NAMESPACE, name)
        meta = {"name": name, "namespace": NAMESPACE}
        body = {"apiVersion": ref.kind.api_version, "kind": ref.kind.kind, "metadata": meta}
        self.cluster.apply(ref, {**body, "status": {"tuning": tuning}}, manager=TUNER_MANAGER, subresource="status")

    def resource(self, name: str = KEY[1]) -> Obj | None:
        return self.cluster.find(Ref(k.MOE_DEPLOYMENT, NAMESPACE, name))

    def others(self) -> None:
        """A turn of every other controller."""
        self.ray._clock_time = self.clock.time()
        self.ray.turn(self.cluster, self.clock)
        self.pods.turn(self.cluster)
        self.pods.weighted = tuple(
            r["name"]
            for obj in self.cluster.peek(k.MOE_DEPLOYMENT)
            for r in (obj.get("status") or {}).get("revisions", ())
            if r.get("weight")
        )
        self.cluster.collect_garbage()

    # The operator

    def reconcile(self, key: Key = KEY) -> Outcome | None:
        """One reconcile; None where it failed or the process died. A failure is tried again after a back-off."""
        performer = Performer(self.api, caches=self.caches, fleet=self.pods, teller=self.told)
        try:
            outcome: Outcome = now(run(reconcile(key, self.config), performer.perform))
        except Crash:
            self.crashes += 1
            self._check_intent(key)
            return None
        except ApiError as error:
            self._again(key, error)
            return None
        if outcome.error:
            self._again(key, outcome.error)
        else:
            self._failures.pop(key, None)
            self.due.pop(key, None)
        if outcome.requeue_s is not None:
            self._due(key, outcome.requeue_s)
        return outcome

    def _check_intent(self, key: Key) -> None:
        """What was done so far was in status before: the weights of gateways, and each RayService."""
        namespace, name = key
        status = (self.resource(name) or {}).get("status") or {}
        config = self.cluster.find(Ref(k.CONFIG_MAP, namespace, gateway_name(name)))
        if config is not None and self.resource(name) is not None:
            document = json.loads(next(iter(config["data"].values())))
            assert document.get("weightsVersion", 0) <= status.get("weightsVersion", 0), "weights before their intent"

    def _again(self, key: Key, error: ApiError | str) -> None:
        self.errors.append(str(error))
        self._failures[key] += 1
        wait_s = min(60.0, 0.5 * 2 ** min(self._failures[key], 10))
        if isinstance(error, Conflict):
            wait_s = min(wait_s, 1.0)
        if isinstance(error, Busy) and error.retry_after_s:
            wait_s = max(wait_s, error.retry_after_s)
        self._due(key, wait_s)

    def _due(self, key: Key, wait_s: float) -> None:
        at = self.clock.time() + wait_s
        self.due[key] = min(self.due.get(key, at), at)

    def keys(self) -> list[Key]:
        return [(ref.namespace, ref.name) for ref in self.cluster.refs(k.MOE_DEPLOYMENT)]

    def turn(self) -> None:
        """Others act, the operator looks at what changed or is due, until it rests; then time passes."""
        self.others()
        for _ in range(12):
            due = [key for key, at in self.due.items() if at <= self.clock.time()]
            moved = self._seen != self.cluster.version
            self._seen = self.cluster.version
            keys = [*dict.fromkeys([*(self.keys() if moved else ()), *due])]
            waiting = {key for key, at in self.due.items() if at > self.clock.time() and self._failures[key]}
            keys = [key for key in keys if key not in waiting]
            if not keys:
                break
            for key in keys:
                self.due.pop(key, None)
                if self.reconcile(key) is None and not self._failures[key]:
                    self._seen = -1  # the process died: a new one looks at everything
            self.cluster.collect_garbage()
        self.clock.move(TURN_S)

    def run(self, seconds: float) -> None:
        end = self.clock.time() + seconds
        while self.clock.time() < end:
            self.turn()

    def idle_writes(self, rounds: int = 10) -> int:
        """Writes of that many further reconciles of every key, with nothing else going on."""
        before = len(self.journal.writes)
        for _ in range(rounds):
            for key in self.keys():
                self.reconcile(key)
        return len(self.journal.writes) - before

    # What came of it

    def counts(self) -> Counter[tuple[str, str]]:
        """Objects that the operator made and deleted: {(ADDED | DELETED, kind): n}."""
        return Counter({at: n for at, n in self.cluster.counts(USER, OPERATOR_MANAGER).items() if at[0] != "MODIFIED"})

    def state(self) -> Obj:
        """Everything that exists, without what differs between two runs of the same story."""
        found = {}
        for kind in (k.MOE_DEPLOYMENT, *WATCHED):
            if kind in NOT_OURS or not self.caches._installed(kind):
                continue
            for obj in self.cluster.peek(kind):
                found[str(k.ref_of(kind, obj))] = _plain(obj)
        return found

    def revisions(self, name: str = KEY[1]) -> dict[str, tuple[str, int]]:
        """Phase and weight of each revision in status."""
        status = (self.resource(name) or {}).get("status") or {}
        return {r["name"]: (r["phase"], r["weight"]) for r in status.get("revisions", ())}

    def condition(self, kind: str, name: str = KEY[1]) -> Obj:
        status = (self.resource(name) or {}).get("status") or {}
        return next((dict(c) for c in status.get("conditions", ()) if c["type"] == kind), {})


_VARIES = {"uid", "resourceVersion", "creationTimestamp", "managedFields", "generation", "lastTransitionTime", "at"}
_VARIES |= {
    "createdAt",
    "stepStartedAt",
    "drainDeadline",
    "observedGeneration",
    "weightsVersion",
    "failedGeneration",
    "failedFor",
}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in _VARIES}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str) and value.startswith("{") and "weightsVersion" in value:
        return _plain(json.loads(value))
    return value
