"""The books of a budget as one document that every gateway process shares: what is spent, what is lent, what is left.

A process takes a tranche of a day's money (`lend`), spends from it by itself, and writes down what it has spent and
what it keeps (`report`). Its entry is its whole state, never a difference, so that writing it twice changes nothing: a
write whose answer was lost is settled by reading. What a process holds counts as used, so that a process that died
costs what it held and never more than the budget; who finds its journal gives the rest back (`fold`).

Everything here is pure: a `Book` is read from bytes, changed in memory and written again by compare-and-swap.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any

import orjson

from moe_core.prices import pico

DEPLOYMENT = ""
"""Scope of the budget of all tenants together; every other scope is a tenant."""
DAYS_KEPT = 3
MONTHS_KEPT = 3
TRANCHE_SHARE = 20
"""A tranche is at least one part in so many of what is left: few trips to the store, and little is lost by a crash."""
MAX_BYTES = 900_000
"""An object of Kubernetes holds 1 MiB."""

LOST = "lost"
"""In place of a target: held by a process that died and left no journal."""

Spent = dict[str, dict[str, int]]
"""Tenant ("" for nobody known) → target → pico-dollars."""


class BookInvalid(Exception):
    """The document is not one of these books."""


@dataclass(frozen=True)
class Limits:
    """What may be spent. `usd_per_day` None: nothing."""

    usd_per_day: Decimal | None = None
    usd_per_month: Decimal | None = None
    tenant_usd_per_day: Decimal | None = None
    """Of each tenant that has no figure of its own; None: no bound but the deployment's."""
    tenants: Mapping[str, Decimal] = field(default_factory=dict)

    def scopes(self, tenant: str | None) -> tuple[str, ...]:
        """The budgets that a tenant's call must fit into."""
        return (DEPLOYMENT,) if not tenant or self.of_tenant(tenant) is None else (DEPLOYMENT, tenant)

    def of_tenant(self, tenant: str) -> Decimal | None:
        return self.tenants.get(tenant, self.tenant_usd_per_day)


@dataclass
class Entry:
    """What one process holds of a day (scope → pico-dollars) and has spent of it."""

    granted: dict[str, int] = field(default_factory=dict)
    spent: Spent = field(default_factory=dict)

    def used(self, scope: str) -> int:
        return max(self.granted.get(scope, 0), total(self.spent, scope))


@dataclass
class Day:
    """Money of one day (UTC): what was spent by processes that have ended their account, and what others hold."""

    spent: Spent = field(default_factory=dict)
    held: dict[str, Entry] = field(default_factory=dict)

    def used(self, scope: str) -> int:
        return total(self.spent, scope) + sum(entry.used(scope) for entry in self.held.values())

    def known(self) -> Spent:
        """Spent as far as reported, by processes that still hold something too."""
        found: Spent = {}
        for spent in (self.spent, *(entry.spent for entry in self.held.values())):
            add(found, spent)
        return found


@dataclass
class Book:
    """Days by name, older days folded into months, and the last day that was folded."""

    days: dict[str, Day] = field(default_factory=dict)
    months: dict[str, Spent] = field(default_factory=dict)
    folded: str = ""
    serial: int = 0
    """Counts writes, so that no two documents are the same."""

    @staticmethod
    def read(document: bytes) -> Book:
        """Raises BookInvalid."""
        if not document:
            return Book()
        try:
            raw: dict[str, Any] = orjson.loads(document)
            if raw["version"] != 1:
                raise BookInvalid(f"the books are of version {raw['version']}, which is unknown here")
            days = {
                name: Day(day["spent"], {holder: Entry(**entry) for holder, entry in day["held"].items()})
                for name, day in raw["days"].items()
            }
            return Book(days, raw["months"], raw["folded"], raw["serial"])
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise BookInvalid("the document is not a book of this gateway") from None

    def write(self) -> bytes:
        """Raises BookInvalid where it would be larger than every store can take."""
        days = {
            name: {
                "spent": day.spent,
                "held": {holder: {"granted": e.granted, "spent": e.spent} for holder, e in day.held.items()},
            }
            for name, day in self.days.items()
        }
        head = {"version": 1, "serial": self.serial, "folded": self.folded}
        document = orjson.dumps({**head, "days": days, "months": self.months})
        if len(document) > MAX_BYTES:
            raise BookInvalid("the books of so many tenants are larger than a store takes")
        return document

    def left(self, day: str, scope: str, limits: Limits) -> int:
        """Pico-dollars that nobody has spent or holds. A folded day has nothing left: its books are closed."""
        if day <= self.folded:
            return 0
        today = self.days.get(day)
        used = 0 if today is None else today.used(scope)
        if scope != DEPLOYMENT:
            limit = limits.of_tenant(scope)
            return 0 if limit is None else pico(limit) - used
        if limits.usd_per_day is None:
            return 0
        left = pico(limits.usd_per_day) - used
        if limits.usd_per_month is not None:
            left = min(left, pico(limits.usd_per_month) - self.used_in_month(day[:7]))
        return left

    def used_in_month(self, month: str) -> int:
        days = (day for name, day in self.days.items() if name[:7] == month)
        return total(self.months.get(month, {}), DEPLOYMENT) + sum(day.used(DEPLOYMENT) for day in days)

    def spent_in_month(self, month: str) -> Spent:
        """As far as reported."""
        found: Spent = {}
        add(found, self.months.get(month, {}))
        for name, day in self.days.items():
            if name[:7] == month:
                add(found, day.known())
        return found

    def entry(self, day: str, holder: str) -> Entry:
        """What a process holds of a day; nothing where it has no account."""
        known = self.days.get(day)
        return Entry() if known is None else known.held.get(holder, Entry())

    def lend(
        self, holder: str, day: str, account: Entry, needs: Mapping[str, int], limits: Limits
    ) -> dict[str, int] | None:
        """Lend a process what it needs in each scope, and a tranche more where there is enough. `account` is what it
        holds and has spent so far. Returns what it holds now, or None where a budget would be passed."""
        self.report(holder, day, account)
        left = {scope: self.left(day, scope, limits) for scope in needs}
        for scope in left:
            # What was spent beyond what is held counts as used already, and is part of the need.
            left[scope] += max(0, total(account.spent, scope) - account.granted.get(scope, 0))
        if any(need > left[scope] for scope, need in needs.items()):
            return None
        more = {scope: max(need, left[scope] // TRANCHE_SHARE) for scope, need in needs.items()}
        granted = {**account.granted}
        for scope, amount in more.items():
            granted[scope] = granted.get(scope, 0) + amount
        self.report(holder, day, Entry(granted, account.spent))
        return granted

    def report(self, holder: str, day: str, account: Entry) -> None:
        """Write down what a process holds and has spent. An account with nothing in it is not kept, and a folded day
        has counted all of it."""
        if day <= self.folded:
            return
        held = self.days.setdefault(day, Day()).held
        granted = {scope: amount for scope, amount in account.granted.items() if amount}
        if granted or account.spent:
            held[holder] = Entry(granted, account.spent)
        else:
            held.pop(holder, None)

    def fold(self, holder: str, day: str, spent: Spent) -> None:
        """End a process's account of a day: what it spent stays, what else it held is free again."""
        known = self.days.get(day)
        if known is not None and known.held.pop(holder, None) is not None:
            add(known.spent, spent)

    def tidy(self, holder: str = "") -> None:
        """Fold the oldest days into their months. By their number, not by a clock, which may be wrong. What is still
        held then is lost: whoever held it is dead, and nobody knows what it spent. A day of which `holder`, who tidies,
        holds something waits, and those after it: its clock was wrong, and it is alive."""
        for name in sorted(self.days)[:-DAYS_KEPT]:
            if holder in self.days[name].held:
                break
            day = self.days.pop(name)
            month = self.months.setdefault(name[:7], {})
            add(month, day.known())
            lost = day.used(DEPLOYMENT) - total(day.known())
            if lost:
                add(month, {"": {LOST: lost}})
            self.folded = max(self.folded, name)
        for name in sorted(self.months)[:-MONTHS_KEPT]:
            del self.months[name]


def total(spent: Spent, scope: str = DEPLOYMENT) -> int:
    """Pico-dollars of a tenant, or of all."""
    if scope != DEPLOYMENT:
        return sum(spent.get(scope, {}).values())
    return sum(sum(targets.values()) for targets in spent.values())


def add(into: Spent, more: Spent) -> None:
    for tenant, targets in more.items():
        row = into.setdefault(tenant, {})
        for target, amount in targets.items():
            row[target] = row.get(target, 0) + amount


def utc_day(unix_s: float) -> str:
    return _day(int(unix_s // 86_400))


@lru_cache(maxsize=8)  # asked for each request
def _day(days: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(days * 86_400))
