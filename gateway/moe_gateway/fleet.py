"""The upstreams of the configuration in force, and those that have left it and still have requests in flight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from moe_core.clock import Clock
from moe_core.config import GatewayConfig, RevisionConfig, TargetConfig
from moe_core.latency import LatencyEstimate
from moe_core.prices import Overrides, Price, PriceFileInvalid, price_of, read_overrides
from moe_gateway.providers import adapter_of
from moe_gateway.settings import ConfigRefused, KeyFile
from moe_gateway.upstream import TOKENS_PER_BYTE_PRIOR, Upstream


@dataclass(frozen=True)
class Fleet:
    """Replaced as a whole: a request keeps the `Upstream` that it was sent to, whatever became of the fleet."""

    revisions: tuple[Upstream, ...] = ()
    targets: tuple[Upstream, ...] = ()
    leaving: tuple[Upstream, ...] = ()

    @property
    def all(self) -> tuple[Upstream, ...]:
        return (*self.revisions, *self.targets, *self.leaving)

    @property
    def by_name(self) -> dict[str, Upstream]:
        """Those of the configuration in force."""
        return {upstream.name: upstream for upstream in (*self.revisions, *self.targets)}

    @property
    def names(self) -> dict[str, bool]:
        """Name → whether it is local, of every upstream; those of the configuration in force come first."""
        names: dict[str, bool] = {}
        for upstream in self.all:
            names.setdefault(upstream.name, upstream.local)
        return names

    def prompt_tokens(self, body_bytes: int) -> int:
        """Prompt tokens that a body of so many bytes probably has; revisions of one deployment tokenize alike."""
        known = self.revisions or self.targets
        return known[0].prompt_tokens(body_bytes) if known else 1

    def in_flight(self, name: str) -> int:
        """Requests now at upstreams of a name: one of today and, after a change of its address, one of before."""
        return sum(upstream.ledger.in_flight for upstream in self.all if upstream.name == name)

    def probing(self, name: str) -> bool:
        """Whether the upstream of a name in the configuration in force is given probes alone."""
        upstream = self.by_name.get(name)
        return upstream is not None and upstream.probing()

    def settled(self) -> Fleet:
        """Without those that have left and whose last request has ended."""
        busy = tuple(upstream for upstream in self.leaving if upstream.ledger.in_flight)
        return self if len(busy) == len(self.leaving) else replace(self, leaving=busy)


def renew(fleet: Fleet, config: GatewayConfig, clock: Clock) -> Fleet:
    """The fleet of a configuration. What is configured as before keeps what is known of it: its ledger, breaker and
    estimates. Raises ConfigRefused for a key file that is missing or empty, and for a target without a price."""
    revisions = tuple(_revision(fleet, revision) for revision in config.revisions)
    overrides = _overrides(config)
    targets = tuple(_target(fleet, index, target, overrides, clock) for index, target in enumerate(config.targets))
    kept = {id(upstream) for upstream in (*revisions, *targets)}
    gone = tuple(upstream for upstream in fleet.all if id(upstream) not in kept)
    return Fleet(revisions, targets, gone).settled()


def _revision(fleet: Fleet, revision: RevisionConfig) -> Upstream:
    url, ours = revision.url.rstrip("/"), revision.board_url is not None
    for known in fleet.all:
        if known.local and (known.name, known.base_url, known.ours) == (revision.name, url, ours):
            return known
    # Revisions of one deployment tokenize alike, so that a new one need not learn it again.
    tokens_per_byte = fleet.revisions[0].tokens_per_byte if fleet.revisions else TOKENS_PER_BYTE_PRIOR
    return Upstream(revision.name, url, tokens_per_byte=tokens_per_byte, ours=ours)


def _overrides(config: GatewayConfig) -> Overrides:
    if config.price_file is None:
        return {}
    try:
        return read_overrides(Path(config.price_file))
    except PriceFileInvalid as error:
        raise ConfigRefused(f"priceFile: {error}") from None


def _price(where: str, target: TargetConfig, overrides: Overrides, clock: Clock) -> Price:
    """The price to keep a target's books by. Raises ConfigRefused where there is none: money could leave uncounted."""
    own = Price(target.usd_per_m_input, target.usd_per_m_output, target.cached_input_usd_per_m)
    at = datetime.fromtimestamp(clock.time(), UTC)
    found = price_of(target.provider, target.model, own, overrides, at)
    if found is None:
        raise ConfigRefused(
            f"{where}: no price of {target.provider} {target.model} is known, so no budget could hold;"
            " set usdPerMInput and usdPerMOutput, or put it into priceFile"
        )
    return found


def _target(fleet: Fleet, index: int, target: TargetConfig, overrides: Overrides, clock: Clock) -> Upstream:
    known = next((upstream for upstream in fleet.targets if upstream.name == target.name), None)
    where, key = f"targets[{index}] ({target.name})", None
    same_target = known is not None and known.target == target
    if known is not None and same_target:
        key = known.key
    elif target.api_key_file is not None:
        key = KeyFile(Path(target.api_key_file), f"{where}.apiKeyFile", clock)
    price = _price(where, target, overrides, clock)
    if known is not None and same_target and known.price == price:
        return known
    # A closed API shows no queue: its TTFT is nearly the same for every length, and starts from a common figure.
    prior = LatencyEstimate(base_prior_s=0.6, slope_prior_s=2e-5, itl_s=0.02)
    adapter = adapter_of(target, clock)
    url = (target.base_url or adapter.URL or "").rstrip("/")
    made = Upstream(target.name, url, target, key, adapter=adapter, price=price, estimate=prior)
    if known is not None and known.target is not None:
        same = (known.target.model, known.base_url) == (target.model, made.base_url)
        return replace(made, estimate=known.estimate, tokens_per_byte=known.tokens_per_byte) if same else made
    return made
