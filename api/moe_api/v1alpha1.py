"""Everything of the v1alpha1 resource under one name."""

from moe_api.annotations import API_VERSION, GROUP, KIND, PLURAL, VERSION
from moe_api.enums import (
    AuthMode,
    BudgetStoreKind,
    Egress,
    EngineKind,
    ExposureKind,
    FallbackRight,
    KvCacheDtype,
    Overflow,
    Provider,
    Quantization,
    TuningMode,
    UpgradeStrategy,
)
from moe_api.resource import MoEDeployment, ObjectMeta
from moe_api.spec import DEFAULT_TIER, MoEDeploymentSpec
from moe_api.spec_cluster import ClusterSpec, MonitoringSpec, PodTemplateSpec, UpgradeSpec
from moe_api.spec_engine import EngineMetrics, EngineSpec
from moe_api.spec_experts import CapacityFactors, ExpertsSpec, QualitySpec
from moe_api.spec_gateway import GatewaySpec
from moe_api.spec_model import HardwareSpec, ModelSpec, ParallelismSpec, ReplicasSpec
from moe_api.spec_traffic import FallbackSpec, FallbackTarget, SloSpec, TierSpec
from moe_api.spec_tuning import TuningBounds, TuningPins, TuningSpec
from moe_api.status import Condition, ConditionType, KnobsInForce, MoEDeploymentStatus, TuningStatus

__all__ = [
    "API_VERSION",
    "DEFAULT_TIER",
    "GROUP",
    "KIND",
    "PLURAL",
    "VERSION",
    "AuthMode",
    "BudgetStoreKind",
    "CapacityFactors",
    "ClusterSpec",
    "Condition",
    "ConditionType",
    "Egress",
    "EngineKind",
    "EngineMetrics",
    "EngineSpec",
    "ExpertsSpec",
    "ExposureKind",
    "FallbackRight",
    "FallbackSpec",
    "FallbackTarget",
    "GatewaySpec",
    "HardwareSpec",
    "KnobsInForce",
    "KvCacheDtype",
    "MoEDeployment",
    "MoEDeploymentSpec",
    "MoEDeploymentStatus",
    "ModelSpec",
    "MonitoringSpec",
    "ObjectMeta",
    "Overflow",
    "ParallelismSpec",
    "PodTemplateSpec",
    "Provider",
    "QualitySpec",
    "Quantization",
    "ReplicasSpec",
    "SloSpec",
    "TierSpec",
    "TuningBounds",
    "TuningMode",
    "TuningPins",
    "TuningSpec",
    "TuningStatus",
    "UpgradeSpec",
    "UpgradeStrategy",
]
