"""Resources and what they render to, as files that a person can read: `python -m tests.render.cases` writes them anew.

golden/ is what this version renders. released/N/ is what renderer N made of records that it pinned: those files are
never written again, for clusters run by them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moe_api.enums import EngineKind
from moe_api.load import load_object
from moe_api.resource import MoEDeployment
from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_operator.names import Owner
from moe_operator.record import Bounds, RevisionRecord
from moe_operator.render import gateway, monitoring, revision
from moe_operator.render.objects import RENDERER_VERSION, NotRenderable, Rendered
from moe_planner.fit import check
from moe_planner.plan import Plan

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLES = ROOT / "manifests" / "examples"
GOLDEN, RELEASED = HERE / "golden", HERE / "released"
PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----
"""
CONFIG = OperatorConfig(
    engine_image="registry.example.com/moestack/engine:0.1.0",
    gateway_image="registry.example.com/moestack/gateway:0.1.0",
    trusted_keys=(PUBLIC_KEY,),
)
MONITORING = frozenset({k.POD_MONITOR, k.PROMETHEUS_RULE})
Edit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """A resource and the circumstances that it is rendered in."""

    document: dict[str, Any]
    plan: Plan | None = None  # None: the fit check's
    runs: bool = True  # whether its revision takes traffic
    config: OperatorConfig = field(default=CONFIG)
    shown: tuple[k.Kind, ...] = ()  # kinds of the golden file; all where none is named

    @property
    def resource(self) -> MoEDeployment:
        return load_object(self.document)

    @property
    def owner(self) -> Owner:
        meta = self.resource.metadata
        return Owner(meta.namespace, meta.name, "5f0d8a3e-9d4b-4f2e-8a56-0c9d6b7d1e11")

    @property
    def revision(self) -> str:
        return f"{self.resource.metadata.name}-0123456789"

    @property
    def bounds(self) -> Bounds:
        replicas = self.resource.spec.replicas
        return Bounds(min=replicas.min, max=replicas.ceiling)

    def record(self) -> RevisionRecord:
        resource = self.resource
        plan = self.plan or check(resource.spec).plan
        assert plan is not None
        image = resource.spec.engine.image or self.config.engine_image or ""
        return revision.pin(resource, plan, image=image, config=self.config, name=self.revision, number=1)

    def render(self) -> list[Rendered]:
        """Everything. Raises NotRenderable."""
        return [*self._revision(), *self._gateway(), *self._monitoring()]

    def _revision(self) -> Iterator[Rendered]:
        if self.resource.spec.engine.kind is EngineKind.EXTERNAL or not self.runs:
            return
        record = self.record()
        yield revision.controller_revision(record, self.owner)
        yield revision.ray_service(record, self.resource, self.bounds, self.owner)
        yield revision.board_service(record, self.owner)

    def _gateway(self) -> tuple[Rendered, ...]:
        served = self.runs and self.resource.spec.engine.kind is EngineKind.VLLM
        return gateway.objects(
            self.resource,
            revisions=[self.revision] if served else [],
            weights={self.revision: 100} if served else {},
            weights_version=3,
            config=self.config,
            owner=self.owner,
        )

    def _monitoring(self) -> tuple[Rendered, ...]:
        revisions = [self.revision] if self.runs else []
        return monitoring.objects(
            self.resource, present=MONITORING, config=self.config, owner=self.owner, revisions=revisions
        )


def example(name: str, *edits: Edit, **more: Any) -> Case:
    """A file of manifests/examples with changes."""
    document = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    for edit in edits:
        edit(document["spec"])
    return Case(document, **more)


def put(path: str, value: Any) -> Edit:
    """Set a field of the spec, by its path; None removes it."""
    *parents, last = path.split(".")

    def edit(spec: dict[str, Any]) -> None:
        for name in parents:
            spec = spec.setdefault(name, {})
        spec[last] = value
        if value is None:
            del spec[last]

    return edit


SERVABLE = (
    put("parallelism", {"tensor": 8, "expert": 8}),
    put("gateway.auth", {"mode": "None"}),
    put("gateway.exposure", {"kind": "ClusterIP", "annotations": {"example.com/team": "ml"}}),
    put("tiers", []),
    put("quality.tiers", []),
)
"""What full.yaml asks for beyond what can be served yet."""

TWO_NODES = Plan(
    tensor=16,
    data=1,
    expert=16,
    pipeline=1,
    nodes_per_replica=2,
    gpus_per_node=8,
    catalog_version="test",
    shared_memory_bytes=20 * 2**30,
    max_model_len=65536,
    max_active_seqs=256,
    max_batched_tokens=8192,
)
KEYS = put("gateway.auth", {"mode": "APIKeys", "secretName": "tenants"})
OUTSIDE = {"host": "llm.example.com", "className": "edge", "annotations": {"example.com/timeout": "600"}}

ENGINE = (k.RAY_SERVICE,)
BRIEF = (k.RAY_SERVICE, k.CONFIG_MAP, k.DEPLOYMENT, k.HORIZONTAL_POD_AUTOSCALER, k.PROMETHEUS_RULE)
WAY_IN = (k.SERVICE, k.INGRESS, k.HTTP_ROUTE, k.NETWORK_POLICY)

CASES: dict[str, Case] = {
    **{path.stem: example(path.stem, shown=BRIEF) for path in sorted(EXAMPLES.glob("*.yaml"))},
    "laptop": example("laptop"),
    "external-sglang": example("external-sglang"),
    "profile-a-api-first": example("profile-a-api-first", runs=False),
    "full-servable": example("full", *SERVABLE, shown=BRIEF),
    "two-nodes": example("laptop", put("hardware.gpusPerReplica", 16), plan=TWO_NODES, shown=ENGINE),
    "data-parallel": example(
        "laptop", put("hardware.gpusPerReplica", 8), put("parallelism", {"data": 8}), shown=ENGINE
    ),
    "data-parallel-tensor": example(
        "laptop",
        put("hardware.gpusPerReplica", 8),
        put("parallelism", {"tensor": 4, "data": 2, "expert": 8}),
        shown=ENGINE,
    ),
    # An ITL with room for many requests at once: data ranks are clearly faster.
    "parallel-auto": example("laptop", put("hardware.gpusPerReplica", 8), put("slo.itlP95", "1s"), shown=ENGINE),
    "data-parallel-nodes": example(
        "laptop",
        put("hardware.gpusPerReplica", 16),
        put("parallelism", {"tensor": 2, "data": 8, "expert": 16}),
        put("engine.extraArgs", {"all2all-backend": "deepep_high_throughput"}),
        put("replicas", {"min": 1, "max": 2}),
        shown=ENGINE,
    ),
    "data-parallel-cpu": example(
        "laptop",
        put("hardware", {"accelerator": "cpu", "gpusPerReplica": 2}),
        put("parallelism", {"data": 2}),
        put("model.source", "pvc://models/tiny"),
        shown=ENGINE,
    ),
    "cpu": example(
        "laptop",
        put("hardware", {"accelerator": "cpu", "gpusPerReplica": 2}),
        put("model.source", "pvc://models/tiny"),
        shown=ENGINE,
    ),
    "scale-from-zero": example("laptop", put("replicas", {"min": 0, "max": 3}), shown=ENGINE),
    "gcs-redis": example(
        "laptop",
        put("cluster.gcsFaultTolerance", {"kind": "Redis", "address": "redis.inference.svc:6379"}),
        shown=ENGINE,
    ),
    "amd": example(
        "laptop", put("hardware.accelerator", "amd-mi300x"), put("model.cache.size", "1500Gi"), shown=ENGINE
    ),
    "ingress": example(
        "laptop",
        KEYS,
        put("gateway.exposure", {"kind": "Ingress", "tlsSecretName": "llm-tls", **OUTSIDE}),
        shown=(*WAY_IN, k.DEPLOYMENT),
    ),
    "http-route": example("laptop", KEYS, put("gateway.exposure", {"kind": "HTTPRoute", **OUTSIDE}), shown=WAY_IN),
    "load-balancer": example(
        "laptop",
        KEYS,
        put("gateway.exposure", {"kind": "LoadBalancer", "annotations": OUTSIDE["annotations"]}),
        shown=WAY_IN,
    ),
}


class _Plain(yaml.SafeDumper):
    """Text in blocks where it has lines, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Plain.add_representer(str, _text)


def as_yaml(bodies: list[dict[str, Any]]) -> str:
    return yaml.dump_all(bodies, Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)


def golden(case: Case) -> str:
    """The text of a golden file: every object, or why there is none."""
    try:
        text = as_yaml([made.body for made in case.render() if made.ref.kind in (case.shown or (made.ref.kind,))])
    except NotRenderable as error:
        return "".join(f"# refused: {problem}\n" for problem in error.problems)
    out = gateway.left_out(case.resource)
    return "".join(f"# left out: {one.name} ({one.field}): {one.why}\n" for one in out) + text


@dataclass(frozen=True)
class Released:
    """A record that a renderer pinned, the resource of its day, and the RayService that it rendered to."""

    folder: Path

    @property
    def record(self) -> RevisionRecord:
        return RevisionRecord.model_validate_json((self.folder / "record.json").read_text())

    @property
    def case(self) -> Case:
        return Case(yaml.safe_load((self.folder / "resource.yaml").read_text()))

    @property
    def expected(self) -> str:
        return (self.folder / "rendered.yaml").read_text()

    def rendered(self) -> str:
        record, case = self.record, self.case
        return as_yaml(
            [
                revision.ray_service(record, case.resource, case.bounds, case.owner).body,
                revision.board_service(record, case.owner).body,
            ]
        )

    def write(self, case: Case) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "record.json").write_text(json.dumps(case.record().to_json(), indent=1) + "\n")
        (self.folder / "resource.yaml").write_text(as_yaml([case.document]))
        (self.folder / "rendered.yaml").write_text(self.rendered())


def released() -> list[Released]:
    return [Released(path.parent) for path in sorted(RELEASED.glob("*/*/record.json"))]


def main() -> None:
    """Write golden/ anew, and what this renderer pins where nothing of its version is there yet."""
    for path in GOLDEN.glob("*.yaml"):
        path.unlink()
    for name, case in CASES.items():
        (GOLDEN / f"{name}.yaml").write_text(golden(case))
    for name in ("laptop", "full-servable", "two-nodes", "cpu", "data-parallel-nodes"):
        kept = Released(RELEASED / RENDERER_VERSION / name)
        if not kept.folder.exists():
            kept.write(CASES[name])


if __name__ == "__main__":
    main()
