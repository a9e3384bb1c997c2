"""What `moectl up` would start, on which terms, and what it refuses: all without starting anything."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moe_cli.bind import bind, references
from moe_cli.checkpoint import CheckpointFacts
from moe_cli.documents import Part, StackPlan
from moe_cli.fit import Refused
from moe_cli.outcome import Exit, Problem
from moe_cli.stack import plan
from moe_cli.supervisor import waves
from moe_core.config import GatewayConfig, ServingConfig, TunerConfig
from tests.cli.cli_world import QWEN, machine, options, resource

LOCAL = CheckpointFacts(Path("/models/q"), experts=16, top_k=4, max_model_len=4096, weight_bytes=10_000)
PRICED = {"inputUsdPerMTokens": "5", "outputUsdPerMTokens": "30"}
OPENAI = {
    "name": "gpt",
    "provider": "openai",
    "model": "gpt-5.5",
    "secretRef": {"name": "openai", "key": "apiKey"},
    "price": PRICED,
}
FALLBACK = {"targets": [OPENAI], "budget": {"usdPerDay": "200"}}
H100 = {"accelerator": "nvidia-h100", "gpusPerReplica": 4}
TINY = "tiny checkpoint of qwen3_moe"


def made(found: StackPlan | Refused) -> StackPlan:
    assert isinstance(found, StackPlan), found
    return found


def refused(found: StackPlan | Refused) -> Refused:
    assert isinstance(found, Refused), "it was planned"
    return found


def part(stack: StackPlan, name: str) -> Part:
    return next(part for part in stack.parts if part.name == name)


def serving(stack: StackPlan) -> ServingConfig:
    return ServingConfig.model_validate(part(stack, "serving").documents["serving.json"])


def gateway(stack: StackPlan) -> GatewayConfig:
    return GatewayConfig.model_validate(part(stack, "gateway").documents["gateway.json"])


@pytest.mark.parametrize(
    ("name", "groups", "changes", "fields"),
    [
        ("GPUs", {"hardware": H100}, {}, ["spec.hardware.accelerator"]),
        (
            "too many ranks",
            {"hardware": {"accelerator": "cpu", "gpusPerReplica": 4}},
            {},
            ["spec.hardware.gpusPerReplica"],
        ),
        ("too many replicas", {"replicas": {"min": 2}}, {}, ["spec.hardware.gpusPerReplica"]),
        ("a model elsewhere", {}, {"checkpoint": None}, ["spec.model.id"]),
        ("weights above the memory", {}, {"memory_bytes": 12_000}, ["spec.model.id"]),
        ("both", {"hardware": H100}, {"checkpoint": None}, ["spec.hardware.accelerator", "spec.model.id"]),
    ],
)
def test_more_than_the_machine_has_is_refused_and_tiny_is_named(
    name: str, groups: dict[str, Any], changes: dict[str, Any], fields: list[str]
) -> None:
    found = refused(plan(resource(**groups), machine(**{"checkpoint": LOCAL, **changes}), options()))
    assert [problem.field for problem in found.problems] == fields
    assert all("--tiny" in problem.remedy for problem in found.problems)
    assert found.code == Exit.BAD_INPUT


@pytest.mark.parametrize(
    ("name", "groups", "field"),
    [
        ("suspended", {"suspend": True}, "spec.suspend"),
        (
            "external engine",
            {"engine": {"kind": "External", "url": "http://x:1/v1"}, "hardware": None},
            "spec.engine.kind",
        ),
        (
            "γ·k below 1 by the model's k",
            {"experts": {"overflow": "Reroute", "capacityFactor": {"prefill": "0.2"}}},
            "spec.experts.capacityFactor.prefill",
        ),
        (
            "γ bound below 1/k",
            {"tuning": {"bounds": {"capacityFactor": {"min": "0.1"}}}},
            "spec.tuning.bounds.capacityFactor.min",
        ),
        ("unknown family with --tiny", {"model": {"id": "acme/dense-7b"}}, "spec.model.id"),
    ],
)
def test_what_tiny_does_not_mend(name: str, groups: dict[str, Any], field: str) -> None:
    found = refused(plan(resource(**groups), machine(), options(tiny=True)))
    assert [problem.field for problem in found.problems] == [field]
    assert found.problems[0].remedy


def test_a_broken_local_checkpoint_is_refused_even_with_tiny() -> None:
    broken = Problem(field="spec.model.source", message="/m does not exist", remedy="name the folder")
    assert refused(plan(resource(), machine(checkpoint=broken), options(tiny=True))).problems == (broken,)


@pytest.mark.parametrize(
    ("name", "groups", "changes", "told"),
    [
        (
            "GPUs become cores",
            {"hardware": H100},
            {},
            {"spec.hardware.accelerator": "cpu", "spec.hardware.gpusPerReplica": "2"},
        ),
        ("one core, one rank", {"hardware": H100}, {"cores": 1}, {"spec.hardware.gpusPerReplica": "1"}),
        (
            "six cores, four ranks",
            {"hardware": {**H100, "gpusPerReplica": 8}},
            {"cores": 6},
            {"spec.hardware.gpusPerReplica": "4"},
        ),
        (
            "memory bounds ranks",
            {"hardware": H100},
            {"cores": 64, "memory_bytes": 7 * 2**30},
            {"spec.hardware.gpusPerReplica": "2"},
        ),
        (
            "parallel sizes go with the ranks",
            {"hardware": H100, "parallelism": {"tensor": 4}},
            {},
            {"spec.parallelism.tensor": "chosen to fit"},
        ),
        ("replicas", {"replicas": {"min": 3, "max": 6}}, {}, {"spec.replicas.min": "1", "spec.replicas.max": "1"}),
        ("image", {"engine": {"image": "a/b:1"}}, {}, {"spec.engine.image": "none"}),
        ("context", {"engine": {"maxModelLen": 131072}}, {}, {"spec.engine.maxModelLen": "4096"}),
        ("quantization", {"model": {"id": QWEN, "quantization": "FP8"}}, {}, {"spec.model.quantization": "Auto"}),
        (
            "GPU arguments",
            {"hardware": H100, "engine": {"extraArgs": {"moe-backend": "x", "seed": "1"}}},
            {},
            {"spec.engine.extraArgs.moe-backend": "none"},
        ),
        ("redundant experts", {"hardware": H100, "experts": {"redundant": 2}}, {}, {"spec.experts.redundant": "0"}),
        ("experts per token", {"experts": {"perToken": 8}}, {}, {"spec.experts.perToken": "4"}),
        ("of a tier", {"tiers": [{"name": "gold", "expertsPerToken": 8}]}, {}, {"spec.tiers[0].expertsPerToken": "4"}),
        (
            "data-parallel ranks that do not fit",
            {"hardware": H100, "parallelism": {"data": 4}},
            {},
            {"spec.parallelism.data": "chosen to fit"},
        ),
        ("a model in a store", {"model": {"id": QWEN, "source": "s3://b/m"}}, {}, {"spec.model.source": TINY}),
        ("scaled to nothing", {"replicas": {"min": 0}, "fallback": FALLBACK}, {}, {"spec.replicas.min": "1"}),
        ("no secret", {"fallback": FALLBACK}, {}, {"spec.fallback.targets[0]": "left out"}),
    ],
)
def test_tiny_tells_every_substitution(
    name: str, groups: dict[str, Any], changes: dict[str, Any], told: dict[str, str]
) -> None:
    stack = made(plan(resource(**groups), machine(**changes), options(tiny=True)))
    said = {change.field: change.used for change in stack.changes}
    assert said.items() >= told.items()
    assert TINY in said.values()


def test_a_resource_that_fits_is_served_as_it_is() -> None:
    stack = made(plan(resource(), machine(checkpoint=LOCAL), options()))
    assert stack.changes == ()
    assert [row.name for row in stack.parts] == ["prometheus", "serving", "gateway", "tuner"]
    config = serving(stack)
    assert (config.source, config.tensor_parallel, config.max_model_len) == ("/models/q", 2, 4096)
    assert config.trusted_keys == ("PEM",)


@pytest.mark.parametrize(
    ("name", "groups", "fields"),
    [
        ("for all", {"experts": {"perToken": 5}}, ["spec.experts.perToken"]),
        (
            "of one tier of two",
            {"tiers": [{"name": "gold", "expertsPerToken": 4}, {"name": "vast", "expertsPerToken": 8}]},
            ["spec.tiers[1].expertsPerToken"],
        ),
    ],
)
def test_more_experts_per_token_than_the_checkpoint_has_are_refused(
    name: str, groups: dict[str, Any], fields: list[str]
) -> None:
    found = refused(plan(resource(**groups), machine(checkpoint=LOCAL), options()))
    assert [problem.field for problem in found.problems] == fields
    assert all(problem.remedy == "set it to at most 4" for problem in found.problems)


def test_tiers_reach_the_gateway_and_the_engine() -> None:
    tiers = [{"name": "gold", "tenants": ["acme"], "expertsPerToken": 4}, {"name": "batch", "expertsPerToken": 2}]
    stack = made(plan(resource(tiers=tiers), machine(checkpoint=LOCAL), options()))
    assert gateway(stack).to_json()["tiers"] == [
        {"name": "gold", "tenants": ["acme"]},
        {"name": "batch", "tenants": []},
    ]
    knobs = serving(stack).boot_knobs
    assert knobs is not None
    assert knobs.experts.per_token == {"gold": 4, "batch": 2}


def test_a_local_checkpoint_that_fits_stays_with_tiny() -> None:
    stack = made(plan(resource(), machine(checkpoint=LOCAL), options(tiny=True)))
    assert serving(stack).source == "/models/q"
    assert "spec.model.id" not in {change.field for change in stack.changes}


def test_substitutes_reach_the_engine_and_clients_keep_the_name() -> None:
    groups = {"hardware": H100, "experts": {"overflow": "Reroute", "capacityFactor": {"prefill": "1.25"}}}
    stack = made(plan(resource(**groups), machine(), options(tiny=True)))
    config = serving(stack)
    assert (config.model, config.source, config.accelerator) == (QWEN, "${checkpoint.path}", "cpu")
    assert config.boot_knobs is not None
    assert config.boot_knobs.experts.capacity_factor_prefill == Decimal("1.25")
    assert gateway(stack).model == QWEN


@pytest.mark.parametrize(
    ("name", "secrets", "tiny", "url", "targets"),
    [
        ("its key is here", {("openai", "apiKey"): Path("/k")}, False, None, [("openai", "/k", None)]),
        ("missing, tiny", {}, True, None, []),
        ("a lab's server takes them all", {}, False, "http://lab/v1", [("openai-compatible", None, "http://lab/v1")]),
        (
            "and needs no key",
            {("openai", "apiKey"): Path("/k")},
            False,
            "http://lab/v1",
            [("openai-compatible", None, "http://lab/v1")],
        ),
    ],
)
def test_fallback_targets(
    name: str, secrets: dict[tuple[str, str], Path], tiny: bool, url: str | None, targets: list[tuple[str, ...]]
) -> None:
    here = machine(checkpoint=LOCAL, secrets=secrets)
    stack = made(plan(resource(fallback=FALLBACK), here, options(tiny=tiny, fallback_url=url)))
    assert [(t.provider, t.api_key_file, t.base_url) for t in gateway(stack).targets] == targets


def test_a_missing_secret_is_refused_without_tiny() -> None:
    found = refused(plan(resource(fallback=FALLBACK), machine(checkpoint=LOCAL), options()))
    assert found.problems[0].field == "spec.fallback.targets[0].secretRef"
    assert "MOESTACK_SECRET_OPENAI_APIKEY" in found.problems[0].remedy


KEY = {("openai", "apiKey"): Path("/k")}
COMPATIBLE = {"name": "own", "provider": "openai-compatible", "model": "m", "baseUrl": "http://own/v1"}


@pytest.mark.parametrize(("price", "noted"), [({}, True), (PRICED, False)])
def test_an_own_server_without_a_price_is_noted(price: dict[str, str], noted: bool) -> None:
    fallback = {**FALLBACK, "targets": [{**COMPATIBLE, "price": price}]}
    stack = made(plan(resource(fallback=fallback), machine(checkpoint=LOCAL), options()))
    assert any("price" in note for note in stack.notes) is noted


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("no price, and none in the catalog", {"price": {}, "model": "no-such-model"}, "price"),
        ("half a price", {"price": {"inputUsdPerMTokens": "5"}}, "price"),
        ("no address of Bedrock", {"provider": "bedrock"}, "region"),
    ],
)
def test_a_target_that_cannot_be_used_is_refused_and_left_out_with_tiny(
    name: str, change: dict[str, object], field: str
) -> None:
    asked = resource(fallback={**FALLBACK, "targets": [{**OPENAI, **change}]})
    here = machine(checkpoint=LOCAL, secrets=KEY)
    assert refused(plan(asked, here, options())).problems[0].field == f"spec.fallback.targets[0].{field}"
    stack = made(plan(asked, here, options(tiny=True)))
    assert gateway(stack).targets == ()
    assert any(change.field == "spec.fallback.targets[0]" for change in stack.changes)


@pytest.mark.parametrize(
    ("name", "fallback", "spec", "kept"),
    [
        ("nothing may leave", {"dataPolicy": {"egress": "Never"}}, {}, 0),
        ("only to who keeps nothing", {"dataPolicy": {"egress": "ZeroRetentionOnly"}}, {}, 1),
        ("only to a region", {"dataPolicy": {"egress": "Region", "regions": ["eu-west-1"]}}, {}, 1),
        (
            "a tier may not spill, others may",
            {},
            {"tiers": [{"name": "strict", "tenants": ["t"], "fallback": "Never"}]},
            2,
        ),
        ("all may", {}, {}, 2),
    ],
)
@pytest.mark.parametrize("url", [None, "http://lab/v1"])
def test_what_may_not_leave_finds_no_target(
    name: str, fallback: dict[str, object], spec: dict[str, object], kept: int, url: str | None
) -> None:
    quiet = {**OPENAI, "name": "quiet", "zeroRetention": True, "region": "eu-west-1"}
    asked = resource(fallback={**FALLBACK, "targets": [OPENAI, quiet], **fallback}, **spec)
    stack = made(plan(asked, machine(checkpoint=LOCAL, secrets=KEY), options(fallback_url=url)))
    assert len(gateway(stack).targets) == kept


@pytest.mark.parametrize(
    ("budget", "day", "month"),
    [
        ({"usdPerDay": "200"}, "200", None),
        ({"usdPerDay": "200", "usdPerMonth": "310"}, "200", "310"),
    ],
)
def test_the_gateway_keeps_the_days_limit_and_the_months(budget: dict[str, str], day: str, month: str | None) -> None:
    asked = resource(fallback={**FALLBACK, "budget": budget})
    stack = made(plan(asked, machine(checkpoint=LOCAL, secrets=KEY), options()))
    spill = gateway(stack).spill
    assert (spill.usd_per_day, spill.usd_per_month) == (Decimal(day), None if month is None else Decimal(month))


@pytest.mark.parametrize(("asked", "workers"), [({}, 1), ({"workers": 3}, 3)])
def test_the_local_gateway_has_one_worker_unless_more_are_asked_for(asked: dict[str, int], workers: int) -> None:
    stack = made(plan(resource(gateway=asked), machine(checkpoint=LOCAL), options()))
    assert gateway(stack).workers == workers


def test_no_prometheus_could_not_start() -> None:
    found = refused(plan(resource(), machine(checkpoint=LOCAL, prometheus=None), options()))
    assert found.code == Exit.COULD_NOT_START
    assert "tools/system-packages" in found.problems[0].remedy


def test_every_reference_is_announced_by_a_part_that_is_ready_before() -> None:
    stack = made(plan(resource(hardware=H100), machine(), options(tiny=True)))
    done: set[str] = set()
    for wave in waves(stack.parts):
        for row in wave:
            assert references([row.command, row.documents]) <= done, row.name
        done |= {row.name for row in wave}
    assert done == {"prometheus", "checkpoint", "serving", "gateway", "tuner"}


def test_bound_documents_are_valid_configurations() -> None:
    stack = made(plan(resource(hardware=H100), machine(), options(tiny=True)))
    facts = {
        "prometheus": {"port": "9"},
        "checkpoint": {"path": "/tiny"},
        "serving": {"url": "http://h:1/v1", "boardUrl": "http://h:2"},
        "gateway": {"port": "3", "adminPort": "4"},
    }
    bound = {name: bind(row.documents, facts) for row in stack.parts for name, row in [(row.name, row)]}
    assert GatewayConfig.model_validate(bound["gateway"]["gateway.json"]).revisions[0].board_url == "http://h:2"
    tuner = TunerConfig.model_validate(bound["tuner"]["tuner.json"])
    assert tuner.gateway_admin_urls == ("http://127.0.0.1:4",)
    assert tuner.prometheus_url == "http://127.0.0.1:9"


def test_parts_that_need_one_another_are_refused() -> None:
    parts = (Part(name="a", title="a", command=(), needs=("b",)), Part(name="b", title="b", command=(), needs=("a",)))
    with pytest.raises(ValueError, match="circle: a, b"):
        waves(parts)
