"""Rules that every object keeps: names within length, nothing empty, no privileges, no secret in the open."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_api.annotations import NAME_MAX
from moe_api.scalars import parse_quantity
from moe_kube import objects as k
from moe_operator.names import revision_name
from moe_operator.render import gateway
from moe_operator.render.objects import NotRenderable, Rendered
from moe_operator.render.quantity import canonical, size
from tests.render.cases import CASES, Case, example, put

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
EMPTY_BY_MEANING = {"emptyDir", "namespaceSelector"}
KUBERAY_SUFFIX = len("-xxxxx")  # of a RayCluster's name
PODS = (k.RAY_SERVICE, k.DEPLOYMENT)


def all_rendered() -> Iterator[tuple[str, Rendered]]:
    for name, case in CASES.items():
        try:
            yield from ((name, made) for made in case.render())
        except NotRenderable:
            continue


def nodes(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from nodes(item, (*path, str(key)))


def pod_specs(made: Rendered) -> Iterator[dict[str, Any]]:
    for path, value in nodes(made.body):
        if path[-2:] == ("template", "spec"):
            yield value


@pytest.mark.parametrize("name", ["a", "a" * NAME_MAX, "q" + "-9" * 17, "x1-y"])
def test_names_stay_within_length(name: str) -> None:
    case = example("laptop")
    case.document["metadata"]["name"] = name
    revision = revision_name(name, "f" * 32)
    assert len(revision) <= 47, "KubeRay's limit"
    names = [made.ref.name for made in case.render()]
    names += [f"{revision}{'x' * KUBERAY_SUFFIX}-serve-svc", f"{revision}-head-svc", f"{revision}-board"]
    assert [name for name in names if not DNS_LABEL.fullmatch(name)] == []


def test_a_name_that_begins_with_a_digit_is_refused_by_field() -> None:
    case = example("laptop")
    case.document["metadata"]["name"] = "7b"
    with pytest.raises(NotRenderable, match=r"metadata\.name: begins with a digit.*choose a name"):
        case.record()


def test_each_object_belongs_to_its_owner_alone() -> None:
    for name, made in all_rendered():
        owner = CASES[name].owner
        metadata = made.body["metadata"]
        assert metadata["ownerReferences"] == [owner.reference()]
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "moestack-operator"
        assert (made.ref.namespace, made.ref.name) == (metadata["namespace"], metadata["name"])
        assert made.ref.kind.kind == made.body["kind"]


def test_no_object_is_made_twice() -> None:
    refs = [(name, made.ref) for name, made in all_rendered()]
    assert len(refs) == len(set(refs))


def test_nothing_is_null_or_empty_but_what_means_something() -> None:
    for name, made in all_rendered():
        if made.ref.kind == k.CONTROLLER_REVISION:
            continue  # its data is a document of ours, kept as it is
        for path, value in nodes(made.body):
            assert value is not None, (name, made.ref, path)
            meant = path and path[-1] in EMPTY_BY_MEANING
            # Of the Service behind an HTTPRoute, and of the ConfigMap that a Role names.
            core_group = value == "" and path[-2:] in {("0", "group"), ("apiGroups", "0")}
            assert meant or core_group or value not in ({}, [], ""), (made.ref, path)


def test_label_values_are_label_values() -> None:
    for _, made in all_rendered():
        if made.ref.kind == k.PROMETHEUS_RULE:
            continue  # Prometheus' labels, which take any text
        for path, value in nodes(made.body):
            if path and path[-1] in ("labels", "matchLabels", "selector") and isinstance(value, dict):
                found = {key: one for key, one in value.items() if isinstance(one, str)}
                assert [one for one in found.values() if not LABEL_VALUE.fullmatch(one)] == [], (made.ref, path)


def test_every_container_is_without_privileges() -> None:
    met = 0
    for _, made in all_rendered():
        for pod in pod_specs(made):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            # Only a gateway whose books are an object of the cluster speaks to it.
            keeps_books = pod.get("serviceAccountName", "").endswith("-gateway")
            assert pod["automountServiceAccountToken"] is keeps_books
            for container in pod["containers"]:
                met += 1
                security = container["securityContext"]
                assert security["allowPrivilegeEscalation"] is False
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert made.ref.kind != k.DEPLOYMENT or security["readOnlyRootFilesystem"] is True
    assert met > 20


def test_no_key_is_a_variable_and_each_is_mounted_by_name() -> None:
    """A key of a closed API is a file in the gateway alone; only what the spec itself puts into env is there."""
    case = CASES["laptop"]
    (deployment,) = (made for made in case.render() if made.ref.kind == k.DEPLOYMENT)
    (pod,) = pod_specs(deployment)
    assert "env" not in pod["containers"][0]
    keys = next(volume for volume in pod["volumes"] if volume["name"] == "keys")
    source = {"secret": {"name": "openai", "items": [{"key": "apiKey", "path": "gpt"}]}}
    assert keys["projected"]["sources"] == [source]
    others = [made for made in case.render() if made.ref.kind not in (k.DEPLOYMENT, k.CONTROLLER_REVISION)]
    assert "openai" not in str([made.body for made in others if made.ref.kind == k.RAY_SERVICE])


def test_the_head_has_no_gpu_and_no_secret_of_the_engine() -> None:
    (service,) = (made for made in CASES["full-servable"].render() if made.ref.kind == k.RAY_SERVICE)
    head, worker = pod_specs(service)
    assert "nvidia.com/gpu" not in str(head["containers"][0]["resources"])
    assert "secretKeyRef" not in str(head["containers"])
    assert "serviceAccountName" not in head, "KubeRay makes the autoscaler's own only where the head names none"
    names = {variable["name"] for variable in worker["containers"][0]["env"]}
    assert {"HF_TOKEN", "NCCL_IB_HCA"} <= names


REFUSED: dict[str, tuple[Case, str]] = {
    "data parallel, experts in slices": (
        example("laptop", put("parallelism", {"data": 4, "expert": 1})),
        r"spec\.parallelism\.expert: .*set it to 4",
    ),
    "microbatches": (
        example("laptop", put("engine.extraArgs", {"enable-dbo": "true"})),
        r"spec\.engine\.extraArgs\.enable-dbo",
    ),
    "pipeline": (example("laptop", put("parallelism", {"pipeline": 2})), r"spec\.parallelism\.pipeline"),
    "an unknown vendor": (
        example("laptop", put("hardware.accelerator", "intel-gaudi3")),
        r"spec\.hardware\.accelerator: intel-gaudi3",
    ),
    "redundant experts on cpu": (
        example("laptop", put("hardware", {"accelerator": "cpu"}), put("experts.redundant", 2)),
        r"spec\.experts\.redundant",
    ),
    "an address that nobody reads": (example("laptop", put("model.source", "az://c/m")), r"spec\.model\.source"),
    "a claim over the cache": (
        example("laptop", put("podTemplate.claims", [{"name": "m", "path": "/var/lib/moestack/cache"}])),
        r"spec\.podTemplate\.claims\[m\]\.path",
    ),
    "a claim inside another": (
        example("laptop", put("podTemplate.claims", [{"name": "m", "path": "/m"}, {"name": "n", "path": "/m/n/"}])),
        r"claims\[n\]\.path: /m/n/ lies over a folder that is claim m's",
    ),
}


@pytest.mark.parametrize(("case", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_made_is_refused_by_field(case: Case, match: str) -> None:
    with pytest.raises(NotRenderable, match=match):
        case.record()


def test_a_gateway_is_refused_where_it_could_not_keep_its_word() -> None:
    asked = {
        "spec.engine.apiKeySecretRef": example(
            "external-sglang", put("engine.apiKeySecretRef", {"name": "s", "key": "k"})
        ),
        "spec.gateway.exposure.className": example(
            "laptop",
            put(
                "gateway",
                {
                    "exposure": {"kind": "HTTPRoute", "host": "a.example.com"},
                    "auth": {"mode": "APIKeys", "secretName": "s"},
                },
            ),
        ),
    }
    for field, case in asked.items():
        assert field in {problem.field for problem in gateway.problems_of(case.resource, case.config)}
    nameless = CASES["laptop"].config.model_copy(update={"gateway_image": None})
    assert [problem.field for problem in gateway.problems_of(CASES["laptop"].resource, nameless)] == ["gatewayImage"]


@given(st.integers(0, 2**50), st.sampled_from(["", "m", "k", "M", "G", "Ki", "Mi", "Gi", "Ti"]))
def test_a_canonical_quantity_stays_as_it_is_and_keeps_its_value(number: int, suffix: str) -> None:
    once = canonical(f"{number}{suffix}")
    assert canonical(once) == once
    if suffix != "m":
        assert parse_quantity(once) == parse_quantity(f"{number}{suffix}")


@settings(max_examples=50)
@given(st.integers(1, 2**59))
def test_a_size_in_bytes_is_exact(number: int) -> None:
    assert parse_quantity(size(number)) == number
