"""One body for apply of each kind that the operator writes, in the API server's own form."""

from __future__ import annotations

from typing import Any

from moe_kube import objects
from moe_kube.objects import Kind, Obj

LABELS = {"app.kubernetes.io/name": "moestack", "app.kubernetes.io/instance": "qwen"}

MOE_SPEC: Obj = {
    "model": {"id": "Qwen/Qwen3-30B-A3B"},
    "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
    "fallback": {
        "targets": [
            {"name": "gpt", "provider": "openai", "model": "gpt-5.5", "secretRef": {"name": "openai", "key": "apiKey"}}
        ],
        "budget": {"usdPerDay": "200"},
    },
    "tiers": [{"name": "gold", "tenants": ["a", "b"]}],
}
TUNING: Obj = {"mode": "Auto", "acknowledged": 3, "pins": [{"knob": "shareCap", "value": "0.2", "source": "Spec"}]}


def condition(kind: str, status: str = "True", **more: Any) -> Obj:
    return {
        "type": kind,
        "status": status,
        "reason": "Tested",
        "message": "told by a test",
        "lastTransitionTime": "2026-01-02T03:04:05Z",
        "observedGeneration": 1,
        **more,
    }


def container(name: str = "main", **more: Any) -> Obj:
    return {
        "name": name,
        "image": "registry.invalid/image:1",
        "args": ["--flag", "value"],
        "env": [
            {"name": "A", "value": "1"},
            {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "key"}}},
        ],
        "ports": [{"containerPort": 8000, "name": "http", "protocol": "TCP"}],
        "resources": {"limits": {"cpu": "2", "memory": "4Gi"}, "requests": {"cpu": "1", "memory": "2Gi"}},
        "volumeMounts": [{"mountPath": "/dev/shm", "name": "shm"}],
        **more,
    }


def pod_spec(**more: Any) -> Obj:
    return {
        "containers": [container()],
        "imagePullSecrets": [{"name": "pull"}],
        "nodeSelector": {"gpu": "h100"},
        "serviceAccountName": "default",
        "tolerations": [{"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}],
        "topologySpreadConstraints": [
            {
                "labelSelector": {"matchLabels": LABELS},
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
            }
        ],
        "volumes": [{"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}, "name": "shm"}],
        **more,
    }


RAY_SPEC: Obj = {
    "excludeHeadPodFromServeSvc": True,
    "rayClusterConfig": {
        "enableInTreeAutoscaling": True,
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": {"metadata": {"labels": LABELS}, "spec": pod_spec()},
        },
        "rayVersion": "2.60.0",
        "workerGroupSpecs": [
            {
                "groupName": "replica",
                "maxReplicas": 2,
                "minReplicas": 1,
                "numOfHosts": 1,
                "rayStartParams": {},
                "replicas": 1,
                "template": {"spec": pod_spec()},
            }
        ],
    },
    "serveConfigV2": "applications: []\n",
    "upgradeStrategy": {"type": "None"},
}

CONTENTS: dict[Kind, Obj] = {
    objects.MOE_DEPLOYMENT: {"spec": MOE_SPEC},
    objects.CONFIG_MAP: {"data": {"config.json": "{}"}},
    objects.SERVICE_ACCOUNT: {"automountServiceAccountToken": False},
    objects.CONTROLLER_REVISION: {"data": {"render": {"a": [1, 2]}}, "revision": 1},
    objects.SERVICE: {
        "spec": {
            "ports": [
                {"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"},
                {"name": "admin", "port": 9000, "protocol": "TCP", "targetPort": 9000},
            ],
            "selector": LABELS,
            "type": "ClusterIP",
        }
    },
    objects.DEPLOYMENT: {
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": LABELS},
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}, "type": "RollingUpdate"},
            "template": {
                "metadata": {"annotations": {"moestack.dev/digest": "x"}, "labels": LABELS},
                "spec": pod_spec(),
            },
        }
    },
    objects.HORIZONTAL_POD_AUTOSCALER: {
        "spec": {
            "maxReplicas": 4,
            "metrics": [
                {
                    "resource": {"name": "cpu", "target": {"averageUtilization": 70, "type": "Utilization"}},
                    "type": "Resource",
                }
            ],
            "minReplicas": 2,
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "gateway"},
        }
    },
    objects.POD_DISRUPTION_BUDGET: {"spec": {"maxUnavailable": 1, "selector": {"matchLabels": LABELS}}},
    objects.NETWORK_POLICY: {
        "spec": {
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": LABELS}}], "ports": [{"port": 8000, "protocol": "TCP"}]}
            ],
            "podSelector": {"matchLabels": LABELS},
            "policyTypes": ["Ingress"],
        }
    },
    objects.INGRESS: {
        "spec": {
            "ingressClassName": "nginx",
            "rules": [
                {
                    "host": "models.example",
                    "http": {
                        "paths": [
                            {
                                "backend": {"service": {"name": "gateway", "port": {"name": "http"}}},
                                "path": "/",
                                "pathType": "Prefix",
                            }
                        ]
                    },
                }
            ],
        }
    },
    objects.LEASE: {"spec": {"holderIdentity": "a", "leaseDurationSeconds": 15}},
    objects.ENDPOINT_SLICE: {
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.1.2.3"], "conditions": {"ready": True}}],
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
    },
    objects.RAY_SERVICE: {"spec": RAY_SPEC},
    objects.RAY_CLUSTER: {"spec": RAY_SPEC["rayClusterConfig"]},
    objects.POD_MONITOR: {
        "spec": {
            "podMetricsEndpoints": [{"path": "/metrics", "port": "metrics"}],
            "selector": {"matchLabels": LABELS},
        }
    },
    objects.PROMETHEUS_RULE: {
        "spec": {"groups": [{"name": "moe", "rules": [{"expr": "vector(1)", "record": "moe:one"}]}]}
    },
    objects.HTTP_ROUTE: {
        "spec": {
            "parentRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "web"}],
            "rules": [{"backendRefs": [{"group": "", "kind": "Service", "name": "gateway", "port": 80, "weight": 1}]}],
        }
    },
}
"""What each kind is beside its metadata."""


def body(kind: Kind, **more: Any) -> Obj:
    """A body for apply with labels; `more` goes into the metadata."""
    return {"metadata": {"labels": dict(LABELS), **more}, **CONTENTS[kind]}
