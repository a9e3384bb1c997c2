"""The whole spec, with the rules that span its groups."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic.alias_generators import to_snake

from moe_api.common import Flag
from moe_api.enums import Egress, EngineKind, Overflow, UpgradeStrategy
from moe_api.fields import ListOf, Rule, SpecModel, group, revision
from moe_api.spec_cluster import ClusterSpec, MonitoringSpec, PodTemplateSpec, UpgradeSpec
from moe_api.spec_engine import EngineSpec
from moe_api.spec_experts import ExpertsSpec, QualitySpec
from moe_api.spec_gateway import GatewaySpec
from moe_api.spec_model import HardwareSpec, ModelSpec, ParallelismSpec, ReplicasSpec
from moe_api.spec_traffic import MAX_TIERS, FallbackSpec, SloSpec, TierSpec
from moe_api.spec_tuning import TuningSpec

DEFAULT_TIER = "default"

_GAMMAS = {
    ".experts.capacityFactor.prefill": lambda s: s.experts.capacity_factor.prefill,
    ".experts.capacityFactor.decode": lambda s: s.experts.capacity_factor.decode,
    ".tuning.bounds.capacityFactor.min": lambda s: s.tuning.bounds.capacity_factor.min,
}
_COUNTS = {
    "self.experts.perToken": lambda s: (s.experts.per_token,),
    "self.quality.minExpertsPerToken": lambda s: (s.quality.min_experts_per_token,),
    "self.tiers[].expertsPerToken": lambda s: tuple(t.experts_per_token for t in s.tiers),
    "self.quality.tiers[].minExpertsPerToken": lambda s: tuple(t.min_experts_per_token for t in s.quality.tiers),
}


def _enough_slots(gamma: str, count: str) -> Rule:
    """γ·k ≥ 1: with less, capacity cannot hold one slot for each token. Both have at most six decimal places."""
    get_gamma, get_counts = _GAMMAS[gamma], _COUNTS[count]
    product = f"double(self{gamma}) * double({{}}) >= 0.9999995"
    if "[]" in count:
        items, field = count.split("[].")
        rule = f"{items}.all(t, !has(t.{field}) || {product.format('t.' + field)})"
    else:
        rule = f"!has({count}) || {product.format(count)}"
    name = count.removeprefix("self.")

    def holds(spec: MoEDeploymentSpec) -> bool:
        factor: Decimal | None = get_gamma(spec)  # type: ignore[no-untyped-call]
        counts: tuple[int | None, ...] = get_counts(spec)  # type: ignore[no-untyped-call]
        return factor is None or all(k is None or factor * k >= 1 for k in counts)

    return Rule(
        f"!has(self{gamma}) || ({rule})",
        f"times {name} must be at least 1, or a token has no expert: raise one of them",
        gamma,
        holds,
    )


def _product_fits(spec: MoEDeploymentSpec) -> bool:
    if spec.hardware is None:
        return True
    sizes = (spec.parallelism.tensor, spec.parallelism.data, spec.parallelism.pipeline)
    product = 1
    for size in sizes:
        product *= size or 1
    gpus = spec.hardware.gpus_per_replica
    return product == gpus if None not in sizes else gpus % product == 0


def _tier_counts_allowed(spec: MoEDeploymentSpec) -> bool:
    return all(
        tier.experts_per_token is None or least is None or tier.experts_per_token >= least
        for tier in spec.tiers
        for least in [spec.min_experts_per_token(tier.name)]
    )


def _tenants_in_one_tier(spec: MoEDeploymentSpec) -> bool:
    tenants = [tenant for tier in spec.tiers for tenant in tier.tenants]
    return len(tenants) == len(set(tenants))


_SIZE = "(has(self.parallelism.{0}) ? self.parallelism.{0} : 1)"
_PRODUCT = " * ".join(_SIZE.format(name) for name in ("tensor", "data", "pipeline"))
_ALL_SIZES = " && ".join(f"has(self.parallelism.{name})" for name in ("tensor", "data", "pipeline"))


def _below_ceiling(field: str) -> Rule:
    """The tuner stays below what the engine was launched with."""
    name = to_snake(field)

    def holds(spec: MoEDeploymentSpec) -> bool:
        ceiling, most = getattr(spec.engine, name), getattr(spec.tuning.bounds, name).max
        return ceiling is None or most is None or most <= ceiling

    bound = f"self.tuning.bounds.{field}.max"
    return Rule(
        f"!has(self.engine.{field}) || !has({bound}) || {bound} <= self.engine.{field}",
        f"must be at most engine.{field}, the launch-time ceiling",
        f".tuning.bounds.{field}.max",
        holds,
    )


class MoEDeploymentSpec(SpecModel):
    """What a person asks for."""

    model: ModelSpec = group("The checkpoint.")
    hardware: HardwareSpec | None = group("What one replica runs on; needed but for an external engine.", None)
    parallelism: ParallelismSpec = group(
        "How one replica is cut into ranks; by default the planner's choice.", ParallelismSpec()
    )
    replicas: ReplicasSpec = group("How many replicas autoscaling may run.", ReplicasSpec())
    engine: EngineSpec = group("Engine and its launch-time ceilings.", EngineSpec())
    experts: ExpertsSpec = group("Capacity of experts and what happens above it.", ExpertsSpec())
    quality: QualitySpec = group("What Auto must not go below.", QualitySpec())
    slo: SloSpec = group("Latency that 95 of 100 requests must keep.", SloSpec())
    tiers: Annotated[tuple[TierSpec, ...], ListOf(MAX_TIERS, key="name")] = group("Classes of tenants.", ())
    fallback: FallbackSpec = group("Closed APIs that take what the SLO cannot wait for.", FallbackSpec())
    tuning: TuningSpec = group("What the tuner may do.", TuningSpec())
    gateway: GatewaySpec = group("The proxy in front of the engine and the closed APIs.", GatewaySpec())
    upgrade: UpgradeSpec = group("How traffic moves to a new revision.", UpgradeSpec())
    pod_template: PodTemplateSpec = group("Pods of the engine.", PodTemplateSpec())
    cluster: ClusterSpec = group("The Ray cluster of a revision.", ClusterSpec())
    monitoring: MonitoringSpec = group("Metrics, alerts and dashboards.", MonitoringSpec())
    suspend: Flag = revision(
        "Give the GPUs back; the gateway answers from the closed API, or with 503. Resuming starts a new cluster.",
        False,
    )

    RULES = (
        Rule(
            "self.engine.kind == 'External' || has(self.hardware)",
            "is needed: name the accelerator, such as accelerator: nvidia-h100 (or cpu), and gpusPerReplica",
            ".hardware",
            lambda s: s.engine.kind == EngineKind.EXTERNAL or s.hardware is not None,
        ),
        Rule(
            "self.engine.kind != 'External' || !has(self.hardware)",
            "has no effect on an external engine: remove it",
            ".hardware",
            lambda s: s.engine.kind != EngineKind.EXTERNAL or s.hardware is None,
        ),
        Rule(
            "self.engine.kind != 'External' || self.experts.overflow == 'Unlimited'",
            "cannot be held on an external engine: remove it",
            ".experts.overflow",
            lambda s: s.engine.kind != EngineKind.EXTERNAL or s.experts.overflow == Overflow.UNLIMITED,
        ),
        Rule(
            f"!has(self.hardware) || ({_ALL_SIZES} ? {_PRODUCT} == self.hardware.gpusPerReplica"
            f" : self.hardware.gpusPerReplica % ({_PRODUCT}) == 0)",
            "tensor × data × pipeline must be hardware.gpusPerReplica; sizes left out are chosen to fit",
            ".parallelism",
            _product_fits,
        ),
        Rule(
            "self.replicas.min > 0 || size(self.fallback.targets) > 0",
            "0 leaves nobody to answer: set 1 or more, or add a fallback target",
            ".replicas.min",
            lambda s: s.replicas.min > 0 or len(s.fallback.targets) > 0,
        ),
        *(_enough_slots(gamma, count) for gamma in _GAMMAS for count in _COUNTS),
        Rule(
            "!has(self.experts.perToken) || !has(self.quality.minExpertsPerToken)"
            " || self.experts.perToken >= self.quality.minExpertsPerToken",
            "must be at least quality.minExpertsPerToken",
            ".experts.perToken",
            lambda s: (
                None in (s.experts.per_token, s.quality.min_experts_per_token)
                or s.experts.per_token >= s.quality.min_experts_per_token
            ),
        ),
        Rule(
            "self.tiers.all(t, !has(t.expertsPerToken)"
            " || (self.quality.tiers.exists(q, q.name == t.name && has(q.minExpertsPerToken))"
            " ? self.quality.tiers.all(q, q.name != t.name || !has(q.minExpertsPerToken)"
            " || t.expertsPerToken >= q.minExpertsPerToken)"
            " : !has(self.quality.minExpertsPerToken) || t.expertsPerToken >= self.quality.minExpertsPerToken))",
            "expertsPerToken must be at least minExpertsPerToken of spec.quality, for its tier or for all",
            ".tiers",
            _tier_counts_allowed,
        ),
        Rule(
            "self.quality.tiers.all(q, self.tiers.exists(t, t.name == q.name))",
            "must each be a tier of spec.tiers",
            ".quality.tiers",
            lambda s: {q.name for q in s.quality.tiers} <= {t.name for t in s.tiers},
        ),
        Rule(
            "self.tiers.all(a, self.tiers.all(b, a.name == b.name || !a.tenants.exists(t, t in b.tenants)))",
            "must not name one tenant in two tiers",
            ".tiers",
            _tenants_in_one_tier,
        ),
        _below_ceiling("maxActiveSeqs"),
        _below_ceiling("maxBatchedTokens"),
        Rule(
            "self.upgrade.strategy != 'Bridge'"
            " || (size(self.fallback.targets) > 0 && self.fallback.dataPolicy.egress != 'Never')",
            "Bridge needs a fallback target that may be used: add one, or choose Surge or Recreate",
            ".upgrade.strategy",
            lambda s: (
                s.upgrade.strategy != UpgradeStrategy.BRIDGE
                or (len(s.fallback.targets) > 0 and s.fallback.data_policy.egress != Egress.NEVER)
            ),
        ),
    )

    def experts_per_token(self) -> dict[str, int]:
        """Tier → experts per token (k), for tiers whose k is set: the others take the model's own. `default` is for
        those whom no tier names."""
        counts = {} if self.experts.per_token is None else {DEFAULT_TIER: self.experts.per_token}
        for tier in self.tiers:
            if (count := tier.experts_per_token or self.experts.per_token) is not None:
                counts[tier.name] = count
        return counts

    def min_experts_per_token(self, tier: str) -> int | None:
        """Fewest experts per token that Auto may give a tier; None: never lower than the model's own."""
        own = next((q.min_experts_per_token for q in self.quality.tiers if q.name == tier), None)
        return own if own is not None else self.quality.min_experts_per_token

    def max_lost_gate_mass(self, tier: str) -> Decimal:
        """Largest mean share of gate mass that capacity may lose for a tier."""
        own = next((q.max_lost_gate_mass for q in self.quality.tiers if q.name == tier), None)
        return own if own is not None else self.quality.max_lost_gate_mass
