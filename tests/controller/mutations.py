"""The operations of the schema suite: specs in which each leaf says something, and each leaf's changes from there.

A leaf is changed in a spec where the fields that it needs stand (its neighbours), so that what changes is the leaf's
own doing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_api.annotations import API_VERSION, KIND
from moe_api.load import ResourceInvalid, load_object
from moe_kube.objects import Obj
from tests.controller.leaves import UNSET, Leaf, changed

OVERFLOWS = ["Unlimited", "Reroute", "Drop", "ExpertChoice"]
EAST = {
    "name": "east",
    "provider": "openai-compatible",
    "model": "m",
    "baseUrl": "https://east.example.com/v1",
    "region": "us-east-1",
    "zeroRetention": True,
}
RICH: Obj = {
    "model": {
        "id": "Qwen/Qwen3-235B-A22B-FP8",
        "revision": "v1",
        "tokenSecretRef": {"name": "hub", "key": "token"},
        "cache": {"kind": "Claim", "claimName": "models", "path": "/srv/models", "size": "1Ti"},
    },
    "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
    "replicas": {"min": 1, "max": 8},
    "engine": {
        "image": "registry.example.com/engine:1",
        "maxModelLen": 16384,
        "maxActiveSeqs": 32,
        "maxBatchedTokens": 4096,
        "extraArgs": {"seed": "1"},
    },
    "experts": {"capacityFactor": {"prefill": "2.5", "decode": "2.5"}, "overflow": "Reroute", "perToken": 6},
    "quality": {
        "maxLostGateMass": "0.03",
        "minExpertsPerToken": 3,
        "tiers": [{"name": "gold", "maxLostGateMass": "0.01", "minExpertsPerToken": 3}],
    },
    "slo": {"ttftP95": "2s", "itlP95": "80ms"},
    "tiers": [
        {"name": "gold", "tenants": ["alice"], "slo": {"ttftP95": "900ms", "itlP95": "40ms"}, "expertsPerToken": 5},
        {"name": "silver", "tenants": ["bob"]},
    ],
    "fallback": {
        "targets": [
            {
                "name": "gpt",
                "provider": "openai",
                "model": "gpt-5.5",
                "baseUrl": "https://api.example.com/v1",
                "secretRef": {"name": "openai", "key": "apiKey"},
                "region": "eu-north-1",
                "zeroRetention": True,
                "price": {"inputUsdPerMTokens": 5, "cachedInputUsdPerMTokens": "0.5", "outputUsdPerMTokens": 30},
                "limits": {"requestsPerMinute": 100, "tokensPerMinute": 100_000, "concurrency": 10},
            }
        ],
        "trigger": {"missProbability": "0.4", "shareCap": "0.9"},
        "budget": {
            "usdPerDay": "200",
            "usdPerMonth": "5000",
            "tenantUsdPerDay": "20",
            "tenants": [{"name": "alice", "usdPerDay": "50"}],
        },
        "dataPolicy": {"egress": "Allowed", "regions": ["eu-north-1"]},
    },
    "tuning": {
        "mode": "Auto",
        "bounds": {"overflow": OVERFLOWS, "maxActiveSeqs": {"min": 1, "max": 32}, "maxBatchedTokens": {"min": 1}},
    },
    "gateway": {
        "auth": {"secretName": "keys", "issuer": "https://id.example.com", "audience": "moe"},
        "exposure": {
            "host": "moe.example.com",
            "className": "nginx",
            "tlsSecretName": "tls",
            "annotations": {"x": "y"},
        },
        "replicas": {"min": 1, "max": 3},
        "workers": 2,
        "siblingsSecretRef": {"name": "siblings", "key": "text"},
        "budgetStore": {"urlSecretRef": {"name": "store", "key": "url"}},
        "sessions": {"by": ["Header"]},
    },
    "upgrade": {"steps": [100], "stepDuration": "1s", "progressDeadline": "60s", "drainTimeout": "1s"},
    "podTemplate": {
        "labels": {"team": "a"},
        "annotations": {"note": "a"},
        "nodeSelector": {"pool": "a"},
        "tolerations": [{"key": "gpu", "value": "yes", "effect": "NoExecute", "tolerationSeconds": 60}],
        "topologySpread": [{"topologyKey": "zone", "maxSkew": 3}],
        "resources": {"requests": {"cpu": "8"}, "limits": {"memory": "256Gi"}},
        "env": [
            {"name": "MODE", "value": "a"},
            {"name": "LICENCE", "secretRef": {"name": "licence", "key": "text"}},
        ],
        "claims": [{"name": "data", "path": "/data"}],
        "imagePullSecrets": ["pull"],
        "serviceAccountName": "engine",
        "sharedMemory": "16Gi",
        "security": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
    },
    "cluster": {
        "gcsFaultTolerance": {
            "kind": "Redis",
            "address": "redis:6379",
            "passwordSecretRef": {"name": "redis", "key": "password"},
        },
        "queue": "gpus",
        "priority": "high",
    },
    "monitoring": {
        "scrapeInterval": "15s",
        "labels": {"release": "a"},
        "prometheus": {"url": "http://prometheus:9090", "tokenSecretRef": {"name": "prom", "key": "token"}},
    },
}
"""Nearly every leaf set, and valid."""

EXTERNAL: Obj = {
    "model": {"id": "org/elsewhere"},
    "engine": {
        "kind": "External",
        "url": "http://sglang:30000/v1",
        "metrics": {
            "dialect": "Custom",
            "url": "http://sglang:30000/metrics",
            "names": [{"signal": "running", "metric": "moe:running"}],
        },
    },
    "gateway": {"replicas": {"min": 1, "max": 3}},
}
"""An engine that runs elsewhere."""

_IDENTITY: Obj = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "moe"}}
Change = Mapping[str, Any]
_ALONE = {f"tuning.pins.{name}": UNSET for name in ("maxActiveSeqs", "maxBatchedTokens", "missProbability", "shareCap")}
_TWO_TARGETS = {"fallback.targets": [RICH["fallback"]["targets"][0], EAST]}
_NO_LIMITS = {"quality": UNSET, "tiers": UNSET}

NEIGHBOURS: dict[str, Change] = {
    "model.cache.path": {"model.cache.kind": "NodePath"},
    "model.cache.size": {"model.cache.kind": "Ephemeral"},
    "replicas.max": {"replicas.min": 1},
    "engine.apiKeySecretRef.name": {"engine.apiKeySecretRef": {"name": "sglang", "key": "apiKey"}},
    "engine.apiKeySecretRef.key": {"engine.apiKeySecretRef": {"name": "sglang", "key": "apiKey"}},
    "experts.capacityFactor.prefill": _NO_LIMITS,
    "experts.capacityFactor.decode": _NO_LIMITS,
    "experts.overflow": {"experts.capacityFactor": UNSET},
    "experts.perToken": _NO_LIMITS,
    "tiers[].name": {"quality.tiers": UNSET},
    "fallback.targets[].region": {
        **_TWO_TARGETS,
        "fallback.dataPolicy": {"egress": "Region", "regions": ["us-east-1"]},
    },
    "fallback.targets[].zeroRetention": {**_TWO_TARGETS, "fallback.dataPolicy.egress": "ZeroRetentionOnly"},
    "fallback.dataPolicy.regions": {
        **_TWO_TARGETS,
        "fallback.dataPolicy": {"egress": "Region", "regions": ["eu-north-1", "us-east-1"]},
    },
    "fallback.budget.usdPerDay": {"fallback.budget.usdPerMonth": UNSET},
    "gateway.replicas.min": {"gateway.replicas.max": 100},
}
"""What must stand around a leaf for its changes to be valid, or to mean anything."""

VALUES: dict[str, tuple[Any, ...]] = {
    "replicas.min": (2, 0),
    "replicas.max": (2, 3),
    "model.id": ("deepseek-ai/DeepSeek-V3.1", "org/unheard-of"),
    "hardware.accelerator": ("nvidia-h200", "nvidia-b200", "fpga-x"),
    "hardware.gpusPerReplica": (8, 1),
    "engine.maxModelLen": (8192, 32768, 16777216),
    "quality.tiers[].name": ("silver",),
    "fallback.dataPolicy.regions": (["eu-north-1"], ["us-east-1"]),
    "fallback.targets[].region": ("us-east-1", "ap-south-1"),
    "cluster.gcsFaultTolerance.kind": ("None",),
}
"""Values that mean something, where the schema alone cannot know them."""

WITH: dict[tuple[str, Any], Change] = {
    ("engine.kind", "External"): {
        "engine": {"kind": "External", "url": "http://sglang:30000/v1"},
        "hardware": UNSET,
        "parallelism": UNSET,
        "experts": UNSET,
        "quality": UNSET,
    },
    ("gateway.budgetStore.kind", "SQLite"): {"gateway.replicas": {"min": 1, "max": 1}},
    ("podTemplate.tolerations[].operator", "Exists"): {"podTemplate.tolerations[].value": UNSET},
    **{
        ("gateway.exposure.kind", kind): {"gateway.auth.mode": "APIKeys"}
        for kind in ("LoadBalancer", "Ingress", "HTTPRoute")
    },
}
"""What must change along with a value."""


@dataclass(frozen=True)
class Mutations:
    """The changes of one leaf: where they begin, and what is valid and not from there."""

    leaf: Leaf
    start: Obj
    good: tuple[tuple[Any, Obj], ...]
    """Values, each with the whole spec that has it."""
    bad: tuple[Any, ...]


def mutations(leaf: Leaf) -> Mutations:
    """The changes that the suite tries for a leaf."""
    base = EXTERNAL if leaf.path.startswith(("engine.url", "engine.apiKey", "engine.metrics")) else RICH
    start = _with(base, NEIGHBOURS.get(leaf.path, {}))
    assert problems(start) == "", f"{leaf.path}: {problems(start)}"
    bad = [value for value in leaf.bad() if problems(changed(start, leaf.path, value))]
    return Mutations(leaf, start, tuple(_valid(leaf, start)), tuple(bad[:1] + bad[1:][-1:]))


def _valid(leaf: Leaf, start: Obj) -> list[tuple[Any, Obj]]:
    """Values whose specs differ from the start and from one another: both ends of what the leaf takes, and unset."""
    found: dict[str, tuple[Any, Obj]] = {}
    before = _loaded(start)
    unset = ""
    for value in (*VALUES.get(leaf.path, ()), *leaf.good()):
        with_it = WITH.get((leaf.path, value), {}) if isinstance(value, str) else {}
        spec = _with(changed(start, leaf.path, value), with_it)
        if problems(spec) or (loaded := _loaded(spec)) == before:
            continue
        found.setdefault(loaded, (value, spec))
        unset = loaded if value is UNSET else unset
    names = list(found)
    kept = names if "enum" in leaf.schema else [*names[:2], unset, *names[-1:]]
    return [found[name] for name in dict.fromkeys(kept) if name]


def _loaded(spec: Obj) -> str:
    """The spec as it is read, defaults and all."""
    return load_object({**_IDENTITY, "spec": spec}).model_dump_json()


def _with(spec: Obj, change: Change) -> Obj:
    for path, value in change.items():
        spec = changed(spec, path, value)
    return spec


def problems(spec: Obj) -> str:
    """What admission has against a spec; empty where it takes it."""
    try:
        load_object({**_IDENTITY, "spec": spec})
    except ResourceInvalid as error:
        return "; ".join(str(problem) for problem in error.problems)
    return ""
