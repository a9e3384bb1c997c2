"""What gateways are told, and that the gateway itself takes it."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from moe_api.enums import Provider
from moe_api.spec_engine import EngineSpec
from moe_core import process_config
from moe_core.addresses import GATEWAY_ADMIN_PORT
from moe_core.config import GatewayConfig
from moe_gateway import access, providers, reload, settings
from moe_kube import objects as k
from moe_operator.names import GATEWAY_PORT, GATEWAY_TELL_PORT
from moe_operator.render import gateway
from moe_operator.render.objects import NotRenderable, Rendered
from tests.render.cases import CASES, Case, Edit, example, put


def by_kind(case: Case, kind: k.Kind) -> list[Rendered]:
    return [made for made in case.render() if made.ref.kind == kind]


def told(case: Case) -> dict[str, Any]:
    """The gateway's configuration file."""
    (made,) = [made for made in by_kind(case, k.CONFIG_MAP) if made.ref.name.endswith("-gateway")]
    document: dict[str, Any] = json.loads(made.body["data"][gateway.CONFIG_FILE])
    return document


def configuration(case: Case, **more: Any) -> GatewayConfig:
    given_ = {"revisions": ["r0"], "weights": {"r0": 100}, "weights_version": 1, **more}
    return gateway.gateway_config(case.resource, config=case.config, owner=case.owner, **given_)


@pytest.mark.parametrize("name", CASES)
def test_the_gateway_takes_what_it_is_told(name: str) -> None:
    config = GatewayConfig.model_validate(told(CASES[name]))
    settings.check(config)
    assert sum(config.weights.values()) == (0 if name == "profile-a-api-first" else 100)


def test_operator_and_gateway_agree_on_what_a_gateway_can_do() -> None:
    assert {provider.value for provider in Provider} == set(providers.SUPPORTED)
    assert set(gateway.START_FIELDS) == set(reload.AT_START)


def test_the_gateway_is_told_how_to_know_its_tenants() -> None:
    keys, tokens = configuration(CASES["ingress"]).auth, configuration(CASES["full"]).auth
    assert (keys.mode.value, keys.keys_dir) == ("APIKeys", "/etc/moestack/tenants")
    asked = CASES["full"].resource.spec.gateway.auth
    assert (tokens.mode.value, tokens.issuer, tokens.audience) == ("OIDC", asked.issuer, asked.audience)
    assert tokens.tenant_claim == asked.tenant_claim
    for config in (keys, tokens):
        access.check(config)


def test_what_gateways_of_the_first_release_do_not_know_is_written_only_where_it_says_something() -> None:
    plain_keys, asking_keys = set(told(CASES["laptop"])), set(told(CASES["full"]))
    assert plain_keys & {"auth", "tracing", "logOkShare", "logPrompts"} == set()
    assert asking_keys - plain_keys >= {"auth"}


def test_a_suspended_deployment_has_no_revision_and_goes_on_answering() -> None:
    config = configuration(CASES["profile-a-api-first"], revisions=[], weights={}, weights_version=4)
    assert (config.revisions, config.weights, config.weights_version) == ((), {}, 4)
    assert [target.name for target in config.targets] == ["gpt"]


def test_an_external_engine_is_a_revision_without_a_board() -> None:
    config = configuration(CASES["external-sglang"], revisions=[], weights={})
    (engine,) = config.revisions
    assert (engine.name, engine.url, engine.board_url) == ("external", "http://sglang.inference.svc:30000/v1", None)
    assert config.weights == {"external": 100}
    assert engine.metrics is not None
    assert (engine.metrics.dialect, engine.metrics.url) == ("SGLang", "http://sglang.inference.svc:30000/metrics")


@pytest.mark.parametrize(
    ("dialect", "names", "wanted"),
    [
        ("VLLM", [], "http://e:8000/metrics"),
        ("TensorRTLLM", [], "http://e:8000/prometheus/metrics"),
        ("Custom", [{"signal": "running", "metric": "r"}], "http://e:8000/metrics"),
    ],
)
def test_metrics_of_an_external_engine_lie_beside_its_api(
    dialect: str, names: list[dict[str, str]], wanted: str
) -> None:
    engine = EngineSpec.model_validate(
        {"kind": "External", "url": "http://e:8000/v1", "metrics": {"dialect": dialect, "names": names}}
    )
    found = process_config.foreign_metrics(engine)
    assert (found.url, dict(found.names)) == (wanted, {row["signal"]: row["metric"] for row in names})


def test_an_old_revision_keeps_its_weight_while_the_engine_moves_out() -> None:
    config = configuration(CASES["external-sglang"], revisions=["old"], weights={"old": 100})
    assert config.weights == {"old": 100, "external": 0}


def test_addresses_of_a_revision() -> None:
    (revision,) = configuration(CASES["laptop"], revisions=["q-1"], weights={"q-1": 100}).revisions
    assert revision.url == "http://q-1-serve-svc.default.svc:8000/v1"
    assert revision.board_url == "http://q-1-board.default.svc:8100"


PAID = {
    "targets": [
        {"name": "gpt", "provider": "openai", "model": "gpt-5.5", "secretRef": {"name": "openai", "key": "apiKey"}}
    ],
    "budget": {
        "usdPerDay": "200",
        "usdPerMonth": "4000",
        "tenantUsdPerDay": "20",
        "tenants": [{"name": "acme", "usdPerDay": "50"}],
    },
}
URL = {"name": "budget", "key": "url"}


def pod(case: Case) -> dict[str, Any]:
    (deployment,) = by_kind(case, k.DEPLOYMENT)
    spec: dict[str, Any] = deployment.body["spec"]["template"]["spec"]
    return spec


def paying(*edits: Edit) -> Case:
    return example("laptop", put("fallback", PAID), *edits)


def test_every_pod_keeps_the_whole_budget_in_books_that_all_share() -> None:
    config = configuration(paying(put("gateway.replicas", {"min": 2, "max": 7})))
    assert (config.spill.usd_per_day, config.spill.usd_per_month) == (Decimal(200), Decimal(4000))
    assert config.tenant_budgets.usd_per_day == Decimal(20)
    assert config.tenant_budgets.tenants == {"acme": Decimal(50)}
    store = config.budget_store
    assert (store.kind, store.object, store.pods) == ("Object", "default/qwen3-gateway-budget", 2)
    settings.check(config)


def test_pods_have_an_account_where_their_books_are_an_object_and_only_there() -> None:
    case = paying()
    names = {made.ref.kind: made.ref.name for made in case.render()}
    assert pod(case)["serviceAccountName"] == names[k.SERVICE_ACCOUNT] == names[k.ROLE] == names[k.ROLE_BINDING]
    assert pod(case)["automountServiceAccountToken"] is True
    books = next(made for made in by_kind(case, k.CONFIG_MAP) if made.ref.name.endswith("-budget"))
    assert "data" not in books.body, "what is in them is the gateways'"
    assert books.body["metadata"]["ownerReferences"], "they go with their MoEDeployment"
    for other in (
        example("laptop", put("fallback", None)),
        paying(put("gateway.budgetStore", {"kind": "PostgreSQL", "urlSecretRef": URL})),
    ):
        assert pod(other)["automountServiceAccountToken"] is False
        assert not {made.ref.kind for made in other.render()} & {k.SERVICE_ACCOUNT, k.ROLE, k.ROLE_BINDING}


@pytest.mark.parametrize("kind", ["PostgreSQL", "Valkey"])
def test_the_address_of_a_store_elsewhere_is_a_file(kind: str) -> None:
    case = paying(put("gateway.budgetStore", {"kind": kind, "urlSecretRef": URL}))
    store = configuration(case).budget_store
    (volume,) = [volume for volume in pod(case)["volumes"] if volume["name"] == "budget"]
    assert volume["secret"] == {"secretName": "budget", "items": [{"key": "url", "path": "url"}]}
    (mount,) = [mount for mount in pod(case)["containers"][0]["volumeMounts"] if mount["name"] == "budget"]
    assert (store.kind, store.url_file) == (kind, f"{mount['mountPath']}/url")


def test_a_file_of_one_pod_keeps_no_budget_and_is_refused_by_field() -> None:
    one = (put("gateway.replicas", {"min": 1, "max": 1}), put("gateway.budgetStore", {"kind": "SQLite"}))
    with pytest.raises(
        NotRenderable, match=r"^spec\.gateway\.budgetStore\.kind: .*; take Object, PostgreSQL or Valkey"
    ):
        paying(*one).render()
    example("laptop", put("fallback", None), *one).render()  # nothing can be spent


def test_pods_find_one_another_and_their_workers() -> None:
    case = paying(put("gateway.workers", 4), put("gateway.siblingsSecretRef", {"name": "siblings", "key": "text"}))
    config = configuration(case)
    assert config.workers == 4
    assert config.siblings is not None
    assert (config.siblings.port, config.siblings.workers) == (GATEWAY_TELL_PORT, 4)
    assert config.siblings.peers == ("qwen3-gateway-admin.default.svc",)
    headless = next(made for made in by_kind(case, k.SERVICE) if made.ref.name == "qwen3-gateway-admin")
    assert headless.body["spec"]["clusterIP"] == "None"
    (volume,) = [volume for volume in pod(case)["volumes"] if volume["name"] == "siblings"]
    assert volume["secret"]["items"] == [{"key": "text", "path": "key"}]
    assert config.siblings.key_file == "/etc/moestack/siblings/key"
    policy = next(made for made in by_kind(case, k.NETWORK_POLICY) if made.ref.name == "qwen3-gateway")
    told = [rule for rule in policy.body["spec"]["ingress"] if rule["ports"][0]["protocol"] == "UDP"]
    assert [rule["ports"] for rule in told] == [
        [{"protocol": "UDP", "port": GATEWAY_TELL_PORT, "endPort": GATEWAY_TELL_PORT + 3}]
    ]
    assert pod(case)["containers"][0]["resources"]["requests"]["cpu"] == "2"


def compatible(name: str, **more: str) -> dict[str, Any]:
    return {"name": name, "provider": "openai-compatible", "baseUrl": "http://n.example/v1", "model": "m", **more}


PRICELESS = {"name": "gpt", "provider": "openai", "model": "m", "secretRef": {"name": "s", "key": "k"}}
LEFT_OUT = {
    "another region": (
        (
            put("fallback.dataPolicy", {"egress": "Region", "regions": ["eu"]}),
            put("fallback.targets", [compatible("near", region="eu"), compatible("far", region="us")]),
        ),
        {"far": "spec.fallback.targets[1]"},
    ),
    "no price": ((put("fallback.targets", [PRICELESS]),), {"gpt": "spec.fallback.targets[0].price"}),
    "a name that metrics take": (
        (put("fallback.targets", [compatible("none")]),),
        {"none": "spec.fallback.targets[0].name"},
    ),
}


@pytest.mark.parametrize(("edits", "expected"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_target_that_may_not_be_used_is_left_out_by_field(edits: tuple[Any, ...], expected: dict[str, str]) -> None:
    case = example("laptop", *edits)
    assert {one.name: one.field for one in gateway.left_out(case.resource)} == expected
    assert not {target.name for target in configuration(case).targets} & expected.keys()


def test_the_number_of_pods_is_the_autoscalers() -> None:
    (deployment,) = by_kind(CASES["laptop"], k.DEPLOYMENT)
    assert "replicas" not in deployment.body["spec"]
    (scaler,) = by_kind(CASES["laptop"], k.HORIZONTAL_POD_AUTOSCALER)
    assert (scaler.body["spec"]["minReplicas"], scaler.body["spec"]["maxReplicas"]) == (2, 10)
    assert scaler.body["spec"]["scaleTargetRef"]["name"] == deployment.ref.name


def test_a_pod_has_the_time_to_drain() -> None:
    (deployment,) = by_kind(CASES["laptop"], k.DEPLOYMENT)
    pod = deployment.body["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    leave_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > leave_s + configuration(CASES["laptop"]).limits.drain_s
    assert deployment.body["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_weights_and_targets_start_no_pod() -> None:
    case = CASES["laptop"]

    def deployment(**more: Any) -> Rendered:
        given_ = {"revisions": ["a"], "weights": {"a": 100}, "weights_version": 1, "config": case.config, **more}
        made = gateway.objects(case.resource, owner=case.owner, **given_)
        return next(one for one in made if one.ref.kind == k.DEPLOYMENT)

    later = deployment(revisions=["a", "b"], weights={"a": 75, "b": 25}, weights_version=9)
    assert later.digest == deployment().digest
    louder = case.config.model_copy(update={"log_level": "DEBUG"})
    assert deployment(config=louder).digest != deployment().digest, "a process reads its log level when it starts"


def allowed(policy: Rendered) -> dict[int | None, list[dict[str, Any]] | None]:
    """Port → who may reach it; None: everyone, and the port None is every port."""
    found: dict[int | None, list[dict[str, Any]] | None] = {}
    for rule in policy.body["spec"]["ingress"]:
        for port in rule.get("ports", [{"port": None}]):
            found[port["port"]] = rule.get("from")
    return found


def test_only_those_who_need_a_port_may_reach_it() -> None:
    policies = {made.ref.name: allowed(made) for made in by_kind(CASES["laptop"], k.NETWORK_POLICY)}
    public, engine = policies["qwen3-gateway"], policies["qwen3-engine"]
    assert set(public) == {GATEWAY_PORT, GATEWAY_ADMIN_PORT, GATEWAY_TELL_PORT}
    assert public[GATEWAY_PORT] is None, "clients come from everywhere"
    system = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "moestack-system"}}}
    assert system in (public[GATEWAY_ADMIN_PORT] or [])
    assert set(engine) == {None, 8000, 8080, 8100, 8265}
    (of_dashboard,) = engine[8265] or []
    assert of_dashboard["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
    (own,) = engine[None] or []
    assert own["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "engine"


def test_an_external_engine_has_no_policy_of_ours() -> None:
    assert [made.ref.name for made in by_kind(CASES["external-sglang"], k.NETWORK_POLICY)] == ["sglang-gateway"]
