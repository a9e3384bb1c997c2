"""What the admin port says of costs: GET /v1/costs from the books that all gateways share, and the rent of own GPUs."""

from __future__ import annotations

from decimal import Decimal

import orjson
from aiohttp import web

from moe_core.costs import CostReport, CostRow, TargetPriceRow
from moe_core.prices import PICO
from moe_gateway.budget import BudgetUnavailable
from moe_gateway.money import DEPLOYMENT, Spent, total, utc_day
from moe_gateway.rent import RentCollector
from moe_gateway.state import Gateway


def register(app: web.Application, gateway: Gateway) -> None:
    async def costs(_: web.Request) -> web.Response:
        body = (await report(gateway)).to_json()
        return web.Response(body=orjson.dumps(body), content_type="application/json")

    app.router.add_get("/v1/costs", costs)
    gateway.telemetry.registry.register(RentCollector(gateway))


async def report(gateway: Gateway) -> CostReport:
    """The books as they are now; where they cannot be had, as they were last seen, and why."""
    error = None
    try:
        book = await gateway.budget.books()
    except BudgetUnavailable as gone:
        book, error = gateway.budget.last_seen, str(gone)
    at_s, spill = gateway.clock.time(), gateway.config.spill
    day = utc_day(at_s)
    targets = [upstream for upstream in gateway.fleet.targets if upstream.target is not None]
    models = {upstream.name: upstream.target.model for upstream in targets if upstream.target is not None}
    today = book.days.get(day)
    spent = {} if today is None else today.known()
    held = 0 if today is None else today.used(DEPLOYMENT) - total(spent)
    return CostReport(
        deployment=gateway.config.deployment,
        at_s=at_s,
        today=_rows(spent, models),
        month=_rows(book.spent_in_month(day[:7]), models),
        held_usd=held / PICO,
        usd_per_day=spill.usd_per_day,
        usd_per_month=spill.usd_per_month,
        left_today_usd=gateway.budget.left_usd(),
        store_error=error,
        prices=tuple(
            TargetPriceRow(
                target=upstream.name,
                model=models[upstream.name],
                input_usd_per_m=upstream.price.input_usd_per_m,
                output_usd_per_m=upstream.price.output_usd_per_m,
                cached_input_usd_per_m=upstream.price.cached_input_usd_per_m,
                source=upstream.price.source,
                dated=upstream.price.dated,
            )
            for upstream in targets
        ),
    )


def _rows(spent: Spent, models: dict[str, str]) -> tuple[CostRow, ...]:
    rows = [
        CostRow(tenant=tenant or None, target=target, model=models.get(target), usd=Decimal(pico) / PICO)
        for tenant, targets in spent.items()
        for target, pico in targets.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.usd, row.tenant or "", row.target)))
