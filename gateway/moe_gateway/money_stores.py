"""Which store keeps a gateway's books, by its configuration. A client library is loaded only for its store."""

from __future__ import annotations

from pathlib import Path

from moe_core.config import BudgetStoreConfig, GatewayConfig
from moe_gateway.money import Limits
from moe_gateway.money_store import SqliteStore, Store, StoreGone, Versioned

BUDGET_FILE = "budget.sqlite"


class NoStore:
    """Stands for a store whose address cannot be had: it says so, and nothing is spent."""

    report_every_s = 1.0

    def __init__(self, why: str) -> None:
        self._why = why

    async def read(self) -> Versioned | None:
        raise StoreGone(self._why)

    async def swap(self, version: str | None, document: bytes) -> bool:
        raise StoreGone(self._why)

    async def close(self) -> None:
        return None


def limits_of(config: GatewayConfig) -> Limits:
    tenants = config.tenant_budgets
    spill = config.spill
    return Limits(spill.usd_per_day, spill.usd_per_month, tenants.usd_per_day, dict(tenants.tenants))


def store_of(config: GatewayConfig) -> Store | None:
    """The store of a configuration; None where nothing is to be kept, and so nothing may be spent."""
    wanted = config.budget_store
    if wanted.kind == "SQLite":
        if config.state_dir is None:
            return None
        return SqliteStore(Path(config.state_dir) / BUDGET_FILE, config.deployment)
    if wanted.kind == "Object":
        from moe_gateway.money_object import ObjectStore  # noqa: PLC0415

        namespace, _, name = (wanted.object or "").partition("/")
        return ObjectStore(namespace, name)
    from moe_gateway.money_remote import PostgresStore, ValkeyStore  # noqa: PLC0415

    try:
        url = _url(wanted)
        remote = PostgresStore if wanted.kind == "PostgreSQL" else ValkeyStore
        return remote(url, config.deployment)
    except StoreGone as error:
        return NoStore(str(error))


def _url(wanted: BudgetStoreConfig) -> str:
    try:
        return Path(wanted.url_file or "").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreGone(f"budgetStore.urlFile: {wanted.url_file} cannot be read: {type(error).__name__}") from None
