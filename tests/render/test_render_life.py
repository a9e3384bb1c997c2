"""What of a changed spec reaches a living revision: by the class that the field declares, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moe_api.disruption import Disruption, classify, worst
from moe_api.load import ResourceInvalid, load_object
from moe_api.resource import MoEDeployment
from moe_kube import objects as k
from moe_operator.record import Bounds
from moe_operator.render import gateway, revision
from moe_operator.render.objects import NotRenderable, Rendered
from tests.render.cases import CASES, CONFIG, put

BORN = CASES["full-servable"]
RECORD = BORN.record()
ROLLING_ARGS = {"dtype", "enforceEager", "prefixCaching", "redundantExperts", "engineArgs"}
VALUES: list[Any] = [
    *(1, 2, 4, 8, 16, 64, 128, "0.1", "0.6", "1.7", "3", "250ms", "3s", "2m", "90m", "40Gi", True, False, "other"),
    *("Reroute", "Drop", "ExpertChoice", "Off", "Recommend", "Never", "Allowed", "Surge", "Recreate", "Bridge"),
    *("Disabled", "Enabled", "Auto", "FP8", "FP8E4M3", "BFloat16", "Ephemeral", "None", "ClusterIP", "http://a.b:80"),
    *(
        [],
        {},
        ["a"],
        {"a": "b"},
        {"seed": "2", "enforce-eager": "true"},
        {"dtype": "bfloat16"},
        {"name": "s", "key": "k"},
    ),
    *([10, 100], [{"name": "gold", "tenants": ["x"]}], {"min": 1, "max": 9}, {"min": "1.2", "max": "3"}),
]
Place = tuple[str | int, ...]


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


PLACES = list(places(BORN.document["spec"]))


@st.composite
def changed(draw: st.DrawFn) -> MoEDeployment:
    """The resource with one to three fields set to something else or removed, as far as that is a resource."""
    document = copy.deepcopy(BORN.document)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(PLACES))
        value = draw(st.one_of(st.none(), st.sampled_from(VALUES)))
        node: Any = document["spec"]
        try:
            for part in parents:
                node = node[part]
            if value is None:
                del node[last]
            else:
                node[last] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    try:
        return load_object(document)
    except ResourceInvalid:
        assume(False)
        raise


def ray_service(resource: MoEDeployment, bounds: Bounds = BORN.bounds) -> Rendered:
    return revision.ray_service(RECORD, resource, bounds, BORN.owner)


def parts(made: Rendered) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Any]:
    """(arguments, options of the Serve deployment, the rest of serveConfigV2, the object without it)."""
    body = copy.deepcopy(made.body)
    serve = json.loads(body["spec"].pop("serveConfigV2"))
    (application,) = serve["applications"]
    return application.pop("args"), application.pop("deployments")[0], serve, body


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(changed())
def test_a_change_reaches_a_revision_by_its_class(resource: MoEDeployment) -> None:
    born, now = ray_service(BORN.resource), ray_service(resource)
    match worst(classify(BORN.resource, resource)):
        case None | Disruption.HOT:
            assert now == born, "a hot change must not touch the cluster"
        case Disruption.ROLLING:
            old, new = parts(born), parts(now)
            assert new[1:] == old[1:]
            assert {key for key in old[0] | new[0] if old[0].get(key) != new[0].get(key)} <= ROLLING_ARGS
        case Disruption.REVISION:
            # Another revision is for that: this one stays what it was but for what is rolling.
            old, new = parts(born), parts(now)
            assert new[1:] == old[1:]
            assert new[0].keys() - ROLLING_ARGS == old[0].keys() - ROLLING_ARGS


@pytest.mark.parametrize(
    ("path", "value", "arguments"),
    [
        ("engine.extraArgs", {"seed": "7"}, {"engineArgs"}),
        ("engine.extraArgs", {"dtype": "bfloat16", "enforce-eager": "true"}, {"dtype", "enforceEager", "engineArgs"}),
        ("experts.redundant", 32, {"redundantExperts"}),
    ],
)
def test_a_rolling_change_is_an_argument(path: str, value: Any, arguments: set[str]) -> None:
    document = copy.deepcopy(BORN.document)
    put(path, value)(document["spec"])
    old, new = parts(ray_service(BORN.resource))[0], parts(ray_service(load_object(document)))[0]
    assert {key for key in old if old[key] != new[key]} == arguments


@given(st.integers(0, 50), st.integers(1, 50))
def test_bounds_change_nothing_but_bounds(low: int, more: int) -> None:
    bounds = Bounds(min=low, max=low + more)
    arguments, options, serve, body = parts(ray_service(BORN.resource, bounds))
    born_arguments, born_options, born_serve, born_body = parts(ray_service(BORN.resource))
    assert (arguments, serve) == (born_arguments, born_serve)
    assert options["autoscaling_config"] == {
        **born_options["autoscaling_config"],
        "min_replicas": low,
        "max_replicas": low + more,
    }
    (group,) = body["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (low, low, low + more)
    # The head is a door where no replica may be there to be one: KubeRay changes its label and nothing else.
    assert body["spec"].pop("excludeHeadPodFromServeSvc", False) == (low > 0)
    born_body["spec"].pop("excludeHeadPodFromServeSvc")
    group |= {name: born_body["spec"]["rayClusterConfig"]["workerGroupSpecs"][0][name] for name in group}
    assert body == born_body


def test_the_text_of_the_serve_configuration_is_yaml_too() -> None:
    """KubeRay reads it as YAML; a difference between the two readings would be a difference of clusters."""
    text = ray_service(BORN.resource).body["spec"]["serveConfigV2"]
    assert yaml.safe_load(text) == json.loads(text)


def pods_of(resource: MoEDeployment) -> Any:
    (deployment,) = (
        made
        for made in gateway.objects(
            resource, revisions=["r"], weights={"r": 100}, weights_version=1, config=CONFIG, owner=BORN.owner
        )
        if made.ref.kind == k.DEPLOYMENT
    )
    return deployment.body["spec"]["template"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(changed())
def test_gateways_start_anew_only_for_other_secrets_another_store_or_more_workers(resource: MoEDeployment) -> None:
    """Everything else is read from the file by the running process, and no stream is cut for it."""
    before, after = BORN.resource, resource
    try:
        now = pods_of(after)
    except NotRenderable:
        return

    def keys(spec: MoEDeployment) -> Any:
        secrets = {(target.name, target.secret_ref) for target in gateway.used(spec)}
        own = spec.spec.gateway
        store = gateway.gateway_config(
            spec, revisions=["r"], weights={"r": 100}, weights_version=1, config=CONFIG, owner=BORN.owner
        ).budget_store
        pull = spec.spec.pod_template.image_pull_secrets
        return secrets, own.auth, store, own.budget_store, own.workers, own.siblings_secret_ref, pull

    if keys(after) == keys(before):
        assert now == pods_of(before)
