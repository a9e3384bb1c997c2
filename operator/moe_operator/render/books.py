"""Where the gateways of a deployment keep the books of its fallback budget, and the one right that this asks for.

In a ConfigMap they write to that object and read it, by its name, and nothing else in the cluster. We make it and own
no data of it. It goes with its MoEDeployment, and with nothing less: books that were begun anew would spend a day's
budget twice.
"""

from __future__ import annotations

from moe_api.enums import BudgetStoreKind
from moe_api.v1alpha1 import MoEDeployment
from moe_core.config import BudgetStoreConfig
from moe_core.process_config import Problem
from moe_kube import objects as k
from moe_kube.calls import Verb
from moe_operator.names import Owner, gateway_budget_name, gateway_name, labels
from moe_operator.render.objects import Rendered, rendered
from moe_operator.render.pods import Json, Volume, secret_key

BOOKS_VERBS: tuple[Verb, ...] = ("get", "update")
"""What a gateway does with its books. Who grants a right must have it: moe_operator.rbac."""
SEVERAL = 2
"""Pods that may be there at once: a rollout starts a second one. That there are more starts no pod anew."""
URL_FILE = "url"
_URL_DIR = "/etc/moestack/budget"


def in_object(resource: MoEDeployment, *, paid: bool) -> bool:
    """Whether the books are an object of the cluster. `paid`: whether anything can be spent at all."""
    return paid and resource.spec.gateway.budget_store.kind is BudgetStoreKind.OBJECT


def problems_of(resource: MoEDeployment, *, paid: bool) -> tuple[Problem, ...]:
    """Why the budget could not be kept as asked."""
    if not paid or resource.spec.gateway.budget_store.kind is not BudgetStoreKind.SQLITE:
        return ()
    message = "SQLite is a file of one pod, and the pod that takes its place would spend the day's budget again"
    return (Problem("spec.gateway.budgetStore.kind", message, "take Object, PostgreSQL or Valkey"),)


def config(resource: MoEDeployment, owner: Owner, *, paid: bool) -> BudgetStoreConfig:
    """What the gateway is told of its store."""
    if not paid:
        return BudgetStoreConfig()
    store = resource.spec.gateway.budget_store
    if store.kind is BudgetStoreKind.OBJECT:
        name = f"{owner.namespace}/{gateway_budget_name(owner.name)}"
        return BudgetStoreConfig(kind="Object", object=name, pods=SEVERAL)
    kind = BudgetStoreConfig.model_validate({"kind": store.kind.value}).kind
    return BudgetStoreConfig(kind=kind, url_file=f"{_URL_DIR}/{URL_FILE}", pods=SEVERAL)


def volumes(resource: MoEDeployment, *, paid: bool) -> tuple[Volume, ...]:
    """The address of a store elsewhere, which may hold a password: a file, never a variable."""
    store = resource.spec.gateway.budget_store
    if not paid or store.kind is BudgetStoreKind.OBJECT or store.url_secret_ref is None:
        return ()
    reference = secret_key(store.url_secret_ref)
    source: Json = {"secretName": reference["name"], "items": [{"key": reference["key"], "path": URL_FILE}]}
    return (Volume("budget", _URL_DIR, {"secret": source}, read_only=True),)


def objects(owner: Owner) -> tuple[Rendered, ...]:
    """The ConfigMap, and who may write to it: the account of the gateway's pods."""
    name, books, marks = gateway_name(owner.name), gateway_budget_name(owner.name), labels(owner, "gateway")
    rule = {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [books], "verbs": list(BOOKS_VERBS)}
    binding = {
        "roleRef": {"apiGroup": k.ROLE.group, "kind": k.ROLE.kind, "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": owner.namespace}],
    }
    return (
        rendered(k.SERVICE_ACCOUNT, owner, name, marks, {"automountServiceAccountToken": False}),
        rendered(k.ROLE, owner, name, marks, {"rules": [rule]}),
        rendered(k.ROLE_BINDING, owner, name, marks, binding),
        rendered(k.CONFIG_MAP, owner, books, marks, {}),
    )
