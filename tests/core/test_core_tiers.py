"""Tiers: who gets which, what k it means, and which requests may share cached blocks."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.enums import FallbackRight
from moe_core.config import TierConfig
from moe_core.tiers import OWN_K, SALT_PREFIX, TierRefused, cache_salt, experts_of, may_spill, tier_of
from moe_core.wire import ExpertKnobs, LayerFactors, Overflow

GOLD = TierConfig(name="gold", tenants=("acme", "globex"))
BATCH = TierConfig(name="batch", tenants=("etl",))
DRAFT = TierConfig(name="draft")
TIERS = (GOLD, BATCH, DRAFT)


@pytest.mark.parametrize(
    ("name", "tiers", "tenant", "claim", "want"),
    [
        ("nothing is set up", (), None, None, "default"),
        ("a tenant where nothing is set up", (), "acme", None, "default"),
        ("its tenant's", TIERS, "acme", None, "gold"),
        ("another tenant's", TIERS, "etl", None, "batch"),
        ("nobody's", TIERS, "initech", None, "default"),
        ("no tenant", TIERS, None, None, "default"),
        ("its own, asked for", TIERS, "acme", "gold", "gold"),
        ("an open tier", TIERS, None, "draft", "draft"),
        ("a tenant in an open tier", TIERS, "acme", "draft", "draft"),
        ("default, of nobody's tenant", TIERS, None, "default", "default"),
        ("default has tenants too", (TierConfig(name="default", tenants=("x",)),), "x", "default", "default"),
    ],
)
def test_a_request_gets_a_tier(
    name: str, tiers: tuple[TierConfig, ...], tenant: str | None, claim: str | None, want: str
) -> None:
    assert tier_of(tiers, tenant, claim) == want


@pytest.mark.parametrize(
    ("name", "tiers", "tenant", "claim", "allowed"),
    [
        ("no tenant asks for one that is not open", TIERS, None, "gold", "default, draft"),
        ("a tenant asks for another's", TIERS, "etl", "gold", "batch, draft"),
        ("a tenant leaves its tier", TIERS, "etl", "default", "batch, draft"),
        ("it does not exist", TIERS, "acme", "platinum", "gold, draft"),
        ("there are none", (), None, "gold", "default"),
        ("empty", TIERS, None, "", "default, draft"),
    ],
)
def test_a_tier_that_a_request_may_not_have_is_refused(
    name: str, tiers: tuple[TierConfig, ...], tenant: str | None, claim: str, allowed: str
) -> None:
    with pytest.raises(TierRefused, match=f"x-moestack-tier.*it may be of {allowed}$"):
        tier_of(tiers, tenant, claim)


@pytest.mark.parametrize(
    ("name", "tiers", "tier", "want"),
    [
        ("nothing is said", TIERS, "gold", True),
        ("never", (TierConfig(name="gold", fallback=FallbackRight.NEVER),), "gold", False),
        ("another tier never", (TierConfig(name="gold", fallback=FallbackRight.NEVER), BATCH), "batch", True),
        ("no tier", TIERS, "default", True),
        ("no tiers at all", (), "default", True),
        ("default never", (TierConfig(name="default", fallback=FallbackRight.NEVER),), "default", False),
        ("gone since", TIERS, "silver", False),
    ],
)
def test_which_tiers_spill(name: str, tiers: tuple[TierConfig, ...], tier: str, want: bool) -> None:
    assert may_spill(tiers, tier) is want


@pytest.mark.parametrize(
    ("tier", "want"), [("gold", 4), ("default", 2), (None, 2), ("draft", OWN_K), ("gone since", OWN_K)]
)
def test_experts_per_token_of_a_tier(tier: str | None, want: int) -> None:
    assert experts_of({"gold": 4, "default": 2}, tier) == want


def knobs(overflow: str = "Unlimited", prefill: str | None = None, decode: str | None = None, **k: int) -> ExpertKnobs:
    return ExpertKnobs(
        overflow=Overflow(overflow),
        capacity_factor_prefill=None if prefill is None else Decimal(prefill),
        capacity_factor_decode=None if decode is None else Decimal(decode),
        per_token=k,
    )


def own(prefill: str, overflow: str = "Drop") -> ExpertKnobs:
    """Every layer has γ 2, and layer 3 another."""
    by_layer = {3: LayerFactors(prefill=Decimal(prefill))}
    return knobs(overflow, "2").model_copy(update={"capacity_factor_by_layer": by_layer})


Setting = tuple[str | None, str | None, ExpertKnobs]


@pytest.mark.parametrize(
    ("name", "first", "second", "same"),
    [
        ("stock", (None, None, knobs()), (None, "default", knobs()), True),
        ("a γ that binds nothing", (None, None, knobs()), (None, None, knobs("Unlimited", "1.5")), True),
        ("Reroute of nothing", (None, None, knobs()), (None, None, knobs("Reroute")), True),
        ("γ written otherwise", (None, None, knobs("Drop", "1.5")), (None, None, knobs("Drop", "1.50")), True),
        ("another tier's k", (None, "a", knobs(a=2, b=1)), (None, "a", knobs(a=2, b=3)), True),
        ("k of default goes without saying", (None, None, knobs(default=2)), (None, "default", knobs(default=2)), True),
        ("tier", (None, "a", knobs()), (None, "b", knobs()), False),
        ("a tier and none", (None, "a", knobs()), (None, None, knobs()), False),
        ("γ of prefill", (None, None, knobs("Drop", "1.5")), (None, None, knobs("Drop", "1.25")), False),
        ("γ of the other phase", (None, None, knobs("Drop", "1.5")), (None, None, knobs("Drop", None, "1.5")), False),
        ("overflow", (None, None, knobs("Drop", "1.5")), (None, None, knobs("Reroute", "1.5")), False),
        ("a layer's own γ", (None, None, own("1.5")), (None, None, own("1.25")), False),
        ("a layer's own γ and none", (None, None, own("1.5")), (None, None, knobs("Drop", "2")), False),
        ("a layer's own γ that binds nothing", (None, None, knobs()), (None, None, own("1.5", "Unlimited")), True),
        ("capped and not", (None, None, knobs("Drop", "1.5")), (None, None, knobs()), False),
        ("k", (None, "a", knobs(a=2)), (None, "a", knobs(a=3)), False),
        ("k set and the model's own", (None, None, knobs(default=2)), (None, None, knobs()), False),
        ("client", ("x", "a", knobs()), ("y", "a", knobs()), False),
        ("a client's salt and none", ("null", "a", knobs()), (None, "a", knobs()), False),
        ("a client's salt in another place", ("a", None, knobs(default=2)), (None, "a", knobs(a=2)), False),
    ],
)
def test_requests_share_blocks_exactly_where_these_are_alike(
    name: str, first: Setting, second: Setting, same: bool
) -> None:
    assert (cache_salt(*first) == cache_salt(*second)) is same


gammas = st.none() | st.integers(25, 400).map(lambda hundredths: str(Decimal(hundredths) / 100))
settings = st.tuples(
    st.none() | st.text(min_size=1, max_size=20),
    st.sampled_from([None, "default", "gold", "batch"]),
    st.builds(
        knobs,
        st.sampled_from([overflow.value for overflow in Overflow]),
        gammas,
        gammas,
    ).flatmap(
        lambda found: st.dictionaries(st.sampled_from(["default", "gold", "batch"]), st.integers(1, 8)).map(
            lambda k: found.model_copy(update={"per_token": k})
        )
    ),
)


def meaning(setting: Setting) -> tuple[object, ...]:
    """What a request is computed under, said independently of the salt."""
    client, tier, found = setting
    named = tier or "default"
    factors = (found.capacity_factor_prefill, found.capacity_factor_decode)
    capped = found.overflow is not Overflow.UNLIMITED and factors != (None, None)
    return client, named, found.per_token.get(named), (found.overflow, factors) if capped else None


@given(settings, settings)
def test_equal_settings_and_only_they_give_equal_salts(first: Setting, second: Setting) -> None:
    assert (cache_salt(*first) == cache_salt(*second)) is (meaning(first) == meaning(second))


@given(settings)
def test_a_salt_is_the_clients_own_or_one_that_tells_nothing(setting: Setting) -> None:
    client, *_ = setting
    salt = cache_salt(*setting)
    stock = meaning(setting)[1:] == ("default", None, None)
    assert (salt == client) is stock
    if not stock:
        assert salt is not None
        assert salt.startswith(SALT_PREFIX)
        assert set(salt.removeprefix(SALT_PREFIX)) <= set("0123456789abcdef")
        assert len(salt) == len(SALT_PREFIX) + 64, "vLLM takes at most 128 characters"


def test_no_client_can_name_a_salt_of_ours() -> None:
    ours = cache_salt(None, "gold", knobs("Drop", "1.25", gold=2))
    assert ours is not None
    forged = cache_salt(ours, None, knobs())
    assert forged not in (ours, None)
