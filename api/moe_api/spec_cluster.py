"""How revisions take over and what their pods and clusters look like: upgrade, pod template, cluster, monitoring."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from moe_api.common import (
    QUALIFIED_NAME,
    AbsolutePath,
    Annotations,
    Flag,
    Interval,
    Labels,
    LabelValue,
    Name,
    SecretKeyRef,
    Subdomain,
    Url,
)
from moe_api.enums import GcsFaultTolerance, Toggle, UpgradeStrategy
from moe_api.fields import Disruption, ListOf, MapOf, Rule, SpecModel, group, hot, revision
from moe_api.scalars import QUALIFIED_NAME_PATTERN, Duration, Quantity

Percent = Annotated[int, Field(strict=True, ge=1, le=100)]
Unprivileged = Annotated[int, Field(strict=True, ge=1, le=2_147_483_647)]
QualifiedName = Annotated[
    str, StringConstraints(strict=True, min_length=1, max_length=316, pattern=QUALIFIED_NAME_PATTERN)
]
Quantities = Annotated[dict[str, Quantity], MapOf(16, QUALIFIED_NAME_PATTERN, key_form=QUALIFIED_NAME)]


class UpgradeSpec(SpecModel):
    """How traffic moves to a new revision."""

    strategy: UpgradeStrategy = hot(
        "Surge (both at once: needs free GPUs), Bridge (the old one goes first and the closed API carries the traffic)"
        " or Recreate (an outage).",
        UpgradeStrategy.SURGE,
    )
    steps: Annotated[tuple[Percent, ...], ListOf(16)] = hot(
        "Traffic of the new revision at each step; ends at 100.", (5, 25, 50, 100), unit="percent"
    )
    step_duration: Interval = hot("How long the SLO must hold before the next step.", Duration("2m"), unit="duration")
    progress_deadline: Interval = hot(
        "Longest wait for a new revision to answer; then the traffic goes back.", Duration("30m"), unit="duration"
    )
    drain_timeout: Interval = hot(
        "Longest wait for requests in flight on the old revision.", Duration("10m"), unit="duration"
    )
    rollback_on_slo_miss: Flag = hot("Move the traffic back where the new revision breaks the SLO.", True)

    RULES = (
        Rule(
            "size(self.steps) > 0 && self.steps[size(self.steps) - 1] == 100",
            "must end at 100",
            ".steps",
            lambda s: len(s.steps) > 0 and s.steps[-1] == 100,
        ),
        Rule(
            "self.steps.all(s, self.steps.exists_one(t, t == s)) && self.steps.isSorted()",
            "must rise from step to step",
            ".steps",
            lambda s: all(first < second for first, second in zip(s.steps, s.steps[1:], strict=False)),
        ),
    )


class Toleration(SpecModel):
    """A taint that the pods accept."""

    key: QualifiedName | None = revision("Taint key; by default every key.", None, allowed="a label key")
    operator: Literal["Exists", "Equal"] = revision("Exists or Equal.", "Equal")
    value: LabelValue | None = revision("Taint value, for Equal.", None, allowed="a label value")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = revision(
        "Effect; by default every effect.", None
    )
    toleration_seconds: Annotated[int, Field(strict=True, ge=0, le=2_147_483_647)] | None = revision(
        "How long NoExecute is tolerated; by default for ever.", None, unit="seconds"
    )

    RULES = (
        Rule(
            "self.operator == 'Exists' || has(self.key)",
            "is needed with operator Equal",
            ".key",
            lambda s: s.operator == "Exists" or s.key is not None,
        ),
        Rule(
            "self.operator == 'Equal' || !has(self.value)",
            "belongs to operator Equal: remove it",
            ".value",
            lambda s: s.operator == "Equal" or s.value is None,
        ),
    )


class TopologySpread(SpecModel):
    """How the pods spread over a topology."""

    topology_key: QualifiedName = revision("Node label that names the domain.", allowed="a label key")
    max_skew: Annotated[int, Field(strict=True, ge=1, le=1000)] = revision(
        "Largest difference between domains.", 1, unit="pods"
    )
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = revision(
        "DoNotSchedule or ScheduleAnyway.", "ScheduleAnyway"
    )


class PodResources(SpecModel):
    """What a pod asks for beside its GPUs, which follow from spec.hardware."""

    requests: Quantities = revision("Requests by resource.", {}, unit="quantity")
    limits: Quantities = revision("Limits by resource.", {}, unit="quantity")


OPEN_CREDENTIAL = "^(.*_)?(TOKEN|SECRET|PASSWORD|API_KEY)$"
REFUSED_ENV = "^(LD_.*|PYTHON.*|VLLM_PLUGINS|MOESTACK_.*|RAY_AUTH_.*)$"


class EnvVar(SpecModel):
    """An environment variable of the engine: a value, or a key of a Secret."""

    name: Annotated[
        str, StringConstraints(strict=True, min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    ] = revision("Name of the variable.", allowed="letters, digits and '_'")
    value: Annotated[str, StringConstraints(strict=True, max_length=4096)] | None = revision(
        "Its value, in the open.", None
    )
    secret_ref: SecretKeyRef | None = group("Secret that holds its value.", None)

    RULES = (
        Rule(
            "has(self.value) != has(self.secretRef)",
            "needs either value or secretRef",
            ".name",
            lambda s: (s.value is None) != (s.secret_ref is None),
        ),
        Rule(
            f"has(self.secretRef) || !self.name.matches(r'{OPEN_CREDENTIAL}')",
            "looks like a secret in the open: use secretRef",
            ".name",
            lambda s: s.secret_ref is not None or not re.fullmatch(OPEN_CREDENTIAL, s.name),
        ),
        Rule(
            f"!self.name.matches(r'{REFUSED_ENV}')",
            "must not be a variable that runs code (LD_*, PYTHON*, VLLM_PLUGINS) or is ours (MOESTACK_*, RAY_AUTH_*)",
            ".name",
            lambda s: not re.fullmatch(REFUSED_ENV, s.name),
        ),
    )


class ClaimMount(SpecModel):
    """A volume claim mounted into the engine, read-only."""

    name: Name = revision("Volume claim.", allowed="the name of a PersistentVolumeClaim")
    path: AbsolutePath = revision("Where it is mounted.", allowed="an absolute path")


class PodSecurity(SpecModel):
    """Identity of the engine's processes. Never root, never privileged."""

    run_as_user: Unprivileged | None = revision("User id; by default the image's.", None)
    run_as_group: Unprivileged | None = revision("Group id; by default the image's.", None)
    fs_group: Unprivileged | None = revision("Group that owns mounted volumes.", None)


class PodTemplateSpec(SpecModel):
    """Pods of the engine, as far as they are a person's to shape."""

    labels: Labels = revision("Further labels.", {})
    annotations: Annotations = revision("Further annotations.", {})
    node_selector: Labels = revision("Labels that a node must carry.", {})
    tolerations: Annotated[tuple[Toleration, ...], ListOf(16)] = group("Taints that the pods accept.", ())
    topology_spread: Annotated[tuple[TopologySpread, ...], ListOf(8, key="topologyKey")] = group(
        "How the pods spread.", ()
    )
    resources: PodResources = group("What a pod asks for beside its GPUs.", PodResources())
    env: Annotated[tuple[EnvVar, ...], ListOf(32, key="name")] = group("Environment of the engine.", ())
    claims: Annotated[tuple[ClaimMount, ...], ListOf(8, key="name")] = group("Volume claims mounted read-only.", ())
    image_pull_secrets: Annotated[tuple[Subdomain, ...], ListOf(8, unique=True)] = revision(
        "Secrets that pull the image.", ()
    )
    service_account_name: Subdomain | None = revision(
        "Service account; by default one without rights.", None, allowed="the name of a ServiceAccount"
    )
    shared_memory: Quantity | None = revision("Size of /dev/shm; by default the planner's.", None, unit="bytes")
    security: PodSecurity = group("Identity of the engine's processes.", PodSecurity())


class GcsSpec(SpecModel):
    """Whether Ray's control store outlives its head pod."""

    kind: GcsFaultTolerance = revision('"None" or Redis.', GcsFaultTolerance.NONE)
    address: (
        Annotated[
            str,
            StringConstraints(
                strict=True, min_length=1, max_length=253, pattern=r"^[A-Za-z0-9][-A-Za-z0-9.]*:[0-9]{1,5}$"
            ),
        ]
        | None
    ) = revision("host:port of the Redis or Valkey server.", None, allowed="host:port")
    password_secret_ref: SecretKeyRef | None = group("Secret with its password.", None)

    RULES = (
        Rule(
            "self.kind != 'Redis' || has(self.address)",
            "is needed with kind Redis: host:port of the server",
            ".address",
            lambda s: s.kind != GcsFaultTolerance.REDIS or s.address is not None,
        ),
    )


class ClusterSpec(SpecModel):
    """The Ray cluster of a revision."""

    gcs_fault_tolerance: GcsSpec = group("Whether Ray's control store outlives its head pod.", GcsSpec())
    queue: Name | None = revision(
        "Kueue queue that admits the pods; by default none.", None, allowed="the name of a LocalQueue"
    )
    priority: Subdomain | None = revision("Priority class of the pods.", None, allowed="the name of a PriorityClass")


class PrometheusSource(SpecModel):
    """Where the tuner asks for history."""

    url: Url | None = hot(
        "Prometheus API; by default the one that the chart was told.",
        None,
        allowed="an http or https address without credentials",
    )
    token_secret_ref: SecretKeyRef | None = group("Secret with its bearer token.", None, disruption=Disruption.HOT)


class MonitoringSpec(SpecModel):
    """Metrics, alerts and dashboards."""

    monitors: Toggle = hot("PodMonitors of the Prometheus operator.", Toggle.AUTO)
    alerts: Toggle = hot("PrometheusRule with the alerts of this deployment.", Toggle.AUTO)
    dashboards: Toggle = hot("Grafana dashboards as ConfigMaps.", Toggle.AUTO)
    scrape_interval: Interval = hot("How often Prometheus reads.", Duration("10s"), unit="duration")
    labels: Labels = hot("Labels by which Prometheus selects monitors and rules.", {})
    prometheus: PrometheusSource = group("Where the tuner asks for history.", PrometheusSource())
