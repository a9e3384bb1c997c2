"""Nothing leaves that a policy forbids: the rule by itself, and the whole way through a gateway over real sockets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_api.enums import Egress
from moe_core.config import EgressConfig, EgressRule, GatewayConfig, TargetConfig, TierConfig
from moe_gateway import egress
from moe_gateway.egress import permits, read_header
from moe_gateway.upstream import Fault, UpstreamFailed
from tests.gateway.fake_upstream import FakeUpstream
from tests.gateway.harness import Client, chat, config, running

NEVER, ZERO = EgressRule(egress=Egress.NEVER), EgressRule(egress=Egress.ZERO_RETENTION_ONLY)
EU = EgressRule(egress=Egress.REGION, regions=("eu",))


def target(name: str = "t", *, zero: bool = False, region: str | None = None) -> TargetConfig:
    return TargetConfig(name=name, provider="openai-compatible", model=name, zero_retention=zero, region=region)


PLAIN, KEEPS_NOTHING, IN_EU = target(), target(zero=True), target(region="eu")
CASES = {
    "no policy": (EgressConfig(), PLAIN, {}, None),
    "never": (EgressConfig(deployment=NEVER), KEEPS_NOTHING, {}, "deployment"),
    "zero retention, kept": (EgressConfig(deployment=ZERO), PLAIN, {}, "deployment"),
    "zero retention, nothing kept": (EgressConfig(deployment=ZERO), KEEPS_NOTHING, {}, None),
    "the region that may": (EgressConfig(deployment=EU), IN_EU, {}, None),
    "another region": (EgressConfig(deployment=EU), target(region="us"), {}, "deployment"),
    "an unknown region": (EgressConfig(deployment=EU), PLAIN, {}, "deployment"),
    "a tenant that may not": (EgressConfig(tenants={"a": NEVER}), PLAIN, {"tenant": "a"}, "tenant"),
    "another tenant": (EgressConfig(tenants={"a": NEVER}), PLAIN, {"tenant": "b"}, None),
    "who is not known may be that tenant": (EgressConfig(tenants={"a": NEVER}), PLAIN, {}, "tenant"),
    "a tier that may not": (EgressConfig(tiers={"gold": EU}), PLAIN, {"tier": "gold"}, "tier"),
    "a request that may not": (EgressConfig(), PLAIN, {"header": "never"}, "request"),
    "a request that asks for less": (EgressConfig(), IN_EU, {"header": "region=us"}, "request"),
    "a request cannot widen": (EgressConfig(deployment=NEVER), PLAIN, {"header": "allowed"}, "deployment"),
    "a tenant cannot widen": (
        EgressConfig(deployment=NEVER, tenants={"a": EgressRule()}),
        PLAIN,
        {"tenant": "a"},
        "deployment",
    ),
    "a word that is not known": (EgressConfig(), PLAIN, {"header": "Nope"}, "request"),
}


@pytest.mark.parametrize(("policy", "to", "who", "forbidden_by"), CASES.values(), ids=CASES)
def test_who_may_send_where(
    policy: EgressConfig, to: TargetConfig, who: dict[str, str], forbidden_by: str | None
) -> None:
    asked: dict[str, Any] = {"tenant": None, "tier": "default", "header": None} | who
    refusal = permits(policy, to, **asked)
    assert (None if refusal is None else refusal.rule) == forbidden_by


ODD = ["", "never ", "NEVER", "zero", "region", "region=", "region=,", "allowed=1", "\xff", "never;allowed"]


@pytest.mark.parametrize("header", ODD)
def test_what_is_not_understood_is_never(header: str) -> None:
    assert read_header(header).egress is Egress.NEVER


RULES = st.builds(
    EgressRule,
    egress=st.sampled_from(Egress),
    regions=st.lists(st.sampled_from(["eu", "us"]), max_size=2, unique=True).map(tuple),
)
POLICIES = st.builds(
    EgressConfig,
    deployment=st.one_of(st.just(EgressRule()), RULES),
    tenants=st.dictionaries(st.sampled_from(["a", "b"]), RULES, max_size=2),
    tiers=st.dictionaries(st.sampled_from(["gold", "free"]), RULES, max_size=2),
)
TARGETS = st.tuples(st.booleans(), st.sampled_from([None, "eu", "us"]))
HEADERS = st.one_of(
    st.none(),
    st.sampled_from(["allowed", "never", "zero-retention", "region=eu", "region=eu,us", "Zero-Retention", "junk", ""]),
)


def may(policy: EgressConfig, to: TargetConfig, tenant: str | None, tier: str, header: str | None) -> bool:
    """The same rule, written the other way round: the set of targets that each part allows."""
    parts = [policy.deployment, policy.tiers.get(tier, EgressRule())]
    parts += [rule for name, rule in policy.tenants.items() if tenant in {None, name}]
    allowed = True
    for part in parts:
        allowed &= {
            Egress.ALLOWED: True,
            Egress.NEVER: False,
            Egress.ZERO_RETENTION_ONLY: to.zero_retention,
            Egress.REGION: to.region in part.regions,
        }[part.egress]
    said = {
        None: True,
        "allowed": True,
        "zero-retention": to.zero_retention,
        "region=eu": to.region == "eu",
        "region=eu,us": to.region in {"eu", "us"},
    }
    return allowed and said.get(None if header is None else header.lower(), False)


@given(POLICIES, TARGETS, st.sampled_from([None, "a", "b", "c"]), st.sampled_from(["gold", "free", "default"]), HEADERS)
def test_a_request_and_a_rule_more_only_tighten(
    policy: EgressConfig, to: tuple[bool, str | None], tenant: str | None, tier: str, header: str | None
) -> None:
    made = target(zero=to[0], region=to[1])
    if permits(policy, made, tenant, tier, header) is None:
        assert permits(policy, made, tenant, tier, None) is None
        assert permits(EgressConfig(deployment=policy.deployment), made, tenant, tier, None) is None


@dataclass
class World:
    """A gateway whose own model is down, and closed APIs that remember what they got."""

    runner: asyncio.Runner
    client: Client
    closed: FakeUpstream
    base: GatewayConfig


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> World:
            local, closed = FakeUpstream(), FakeUpstream()
            await stack.enter_async_context(closed)
            async with local:
                base = config(local, closed)
            return World(runner, await stack.enter_async_context(running(base)), closed, base)

        try:
            yield runner.run(start())
        finally:
            runner.run(stack.aclose())


TIERS = (TierConfig(name="gold"), TierConfig(name="free"))


@settings(max_examples=60)
@given(
    policy=POLICIES,
    targets=st.lists(TARGETS, min_size=1, max_size=4),
    tenant=st.sampled_from([None, "a", "b", "c"]),
    tier=st.sampled_from([None, "gold", "free"]),
    header=HEADERS,
    stream=st.booleans(),
)
def test_nothing_forbidden_is_ever_sent(
    world: World,
    policy: EgressConfig,
    targets: list[tuple[bool, str | None]],
    tenant: str | None,
    tier: str | None,
    header: str | None,
    stream: bool,
) -> None:
    made = [
        target(f"t{index}", zero=zero, region=region).model_copy(update={"base_url": world.closed.url})
        for index, (zero, region) in enumerate(targets)
    ]
    sent = {"x_moestack_tenant": tenant, "x_moestack_tier": tier, "x_moestack_egress": header}
    headers = {name: value for name, value in sent.items() if value is not None}
    allowed = {one.model for one in made if may(policy, one, tenant, tier or "default", header)}

    async def ask() -> int:
        world.closed.requests.clear()
        updated = world.base.model_copy(update={"targets": tuple(made), "egress": policy, "tiers": TIERS})
        await world.client.server.gateway.reconfigure(updated, "x")
        return (await world.client.post(chat(stream), **headers)).status

    status = world.runner.run(ask())
    got = {request["model"] for request in world.closed.requests}
    assert got <= allowed
    assert (status == 200) == bool(allowed), "and what is allowed is served"


async def test_a_policy_that_tightens_after_the_choice_still_holds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The list was made under the old policy; the last look is at the new one."""
    async with FakeUpstream() as local, FakeUpstream() as closed, running(config(local, closed)) as client:
        await local.close()
        gateway = client.server.gateway
        caplog.set_level(logging.INFO, "moestack.gateway")
        assert (await client.post(chat(), x_moestack_tenant="acme")).status == 200
        choose = gateway.decide

        def and_then_tighten(*args: Any, **named: Any) -> Any:
            decision = choose(*args, **named)
            if decision.target == "t0":
                tight = EgressConfig(deployment=NEVER)
                gateway.config = gateway.config.model_copy(update={"egress": tight})
            return decision

        monkeypatch.setattr(gateway, "decide", and_then_tighten)
        answer = await client.post(chat())
        assert (answer.status, len(closed.requests)) == (503, 1)
        assert not gateway.upstreams["t0"].probing(), "the target is not to blame"
        name = "moestack_gateway_egress_requests_total"
        assert await client.metric(name, target="t0", result="sent", policy="Allowed") == 1
        assert await client.metric(name, target="t0", result="refused", policy="Never") == 1
        lines = [record.moe_fields for record in caplog.records if record.getMessage() == "egress"]  # type: ignore[attr-defined]
        assert [(line["tenant"], line["target"], line["result"]) for line in lines] == [
            ("acme", "t0", "sent"),
            (None, "t0", "refused"),
        ]
        assert "Say hello" not in str([record.__dict__ for record in caplog.records])


async def test_two_headers_are_the_tighter_one() -> None:
    async with FakeUpstream() as local, FakeUpstream() as closed, running(config(local, closed)) as client:
        await local.close()
        twice = [("x-moestack-egress", word) for word in ("never", "allowed")]
        async with client.session.post(client.url + "/v1/chat/completions", json=chat(), headers=twice) as response:
            assert response.status == 503
        assert closed.requests == []


def test_a_fault_of_policy_is_told_by_its_rule() -> None:
    refusal = egress.Asking(EgressConfig(deployment=NEVER), None, "default", None).refusal(PLAIN)
    failed = UpstreamFailed(Fault.FORBIDDEN, str(refusal))
    assert str(failed) == "the egress policy of the deployment forbids it: nothing may leave"
