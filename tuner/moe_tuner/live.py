"""What holds for one deployment now: its configuration, with what a person ordered on top; both may change live."""

from __future__ import annotations

import os
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_core.config import KnobBounds, TunerConfig
from moe_core.log import Log
from moe_core.setting import (
    ACTIVE_SEQS,
    BATCHED_TOKENS,
    CAPACITY,
    DECODE_CAPACITY,
    KNOBS,
    OVERFLOW,
    SHARE_CAP,
    SPILL,
    Setting,
    pinned,
    unknown_pins,
)
from moe_core.wire import Overflow, TuningOrders

HELD_AT = (CAPACITY, ACTIVE_SEQS, SPILL)
"""Knobs that a pin may hold at a value."""
AT_START = (
    *("board_url", "prometheus_url", "signing_key_file", "storage_url"),
    *("storage_password_file", "decision_log"),
)
"""Fields that need a new start of the deployment's tuner."""


class OrdersRefused(Exception):
    """Orders that cannot be obeyed; the message names the field and the remedy. `older`: they came too late."""

    def __init__(self, message: str, *, older: bool = False) -> None:
        self.older = older
        super().__init__(message)


class Live:
    """Configuration and orders of one deployment. Orders outlive the process in a file of their own."""

    def __init__(self, config: TunerConfig, log: Log) -> None:
        self._log = log
        self._file = config
        self._path = Path(config.decision_log + ".orders.json")
        self.orders: TuningOrders | None = self._read(config.deployment)
        self.config = effective(config, self.orders)

    def reconfigure(self, config: TunerConfig) -> None:
        """Take another configuration from now on."""
        self._file = config
        self.config = effective(config, self.orders)

    def obey(self, orders: TuningOrders) -> None:
        """Put a person's orders in force, once they are on the disk. Raises OrdersRefused."""
        check(orders, self._file, self.orders)
        beside = self._path.with_name(self._path.name + ".new")
        try:
            beside.write_text(orders.model_dump_json(by_alias=True), encoding="utf-8")
            os.replace(beside, self._path)
        except OSError as error:
            # An order that a restart would forget is no order: a paused system must stay paused.
            raise OrdersRefused(f"orders cannot be kept at {self._path} ({error.strerror}): mend the disk") from None
        self.orders = orders
        self.config = effective(self._file, orders)
        self._log.info("orders obeyed", version=orders.version, paused=orders.paused, pins=sorted(orders.pins))

    def _read(self, deployment: str) -> TuningOrders | None:
        try:
            orders = TuningOrders.model_validate_json(self._path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValidationError) as error:
            # A person may have paused this system; what they said cannot be read, so nothing moves.
            self._log.error("orders cannot be read: paused", path=str(self._path), why=type(error).__name__)
            return TuningOrders(deployment=deployment, version=1, paused=True)
        return orders if orders.deployment == deployment else None


def effective(config: TunerConfig, orders: TuningOrders | None) -> TunerConfig:
    """The configuration with a person's orders on top: they hold back, and never set free what the resource holds."""
    if orders is None:
        return config
    pinned = tuple(dict.fromkeys((*config.bounds.pinned, *orders.pins)))
    bounds = config.bounds.model_copy(update={"pinned": pinned})
    valued = {name: value for name, value in orders.pins.items() if value is not None or name not in config.pins}
    paused = config.paused or orders.paused
    return config.model_copy(update={"paused": paused, "bounds": bounds, "pins": {**config.pins, **valued}})


def check(orders: TuningOrders, config: TunerConfig, current: TuningOrders | None) -> None:
    """Raises OrdersRefused for orders that are late, meant for another, or ask for what cannot be."""
    if orders.deployment != config.deployment:
        raise OrdersRefused(f"deployment: this tuner serves {config.deployment!r}")
    if current is not None and orders.version <= current.version and orders != current:
        message = f"version {orders.version} is not above {current.version}, the newest one known here"
        raise OrdersRefused(message, older=True)
    unknown = unknown_pins(config.bounds.model_copy(update={"pinned": tuple(orders.pins)}))
    if unknown:
        raise OrdersRefused(f"pins: {unknown[0]!r} names no knob; knobs are {', '.join(KNOBS)}")
    for name, value in orders.pins.items():
        if value is None:
            continue
        if config.mode != "Auto":
            raise OrdersRefused(f"pins.{name}: mode is {config.mode}, in which nothing is sent; pin it without a value")
        if name not in HELD_AT:
            raise OrdersRefused(f"pins.{name}: no value can be given; only {', '.join(HELD_AT)} take one")
        low, high = _range(name, config.bounds)
        if not low <= value <= high:
            raise OrdersRefused(f"pins.{name}: {value} lies outside {low} to {high}; choose a value inside")
        if name == ACTIVE_SEQS and value != int(value):
            raise OrdersRefused(f"pins.{name}: {value} is no whole number")


def held(setting: Setting, pins: Mapping[str, Decimal | Overflow | None], bounds: KnobBounds) -> Setting:
    """A setting with every knob that is pinned at a value put there."""
    values = {name: value for name, value in pins.items() if value is not None}
    if (policy := values.pop(OVERFLOW, None)) is not None:
        setting = setting.capped(setting.experts.capacity_factor_prefill, Overflow(str(policy)))
    experts, engine, fallback = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for name, text in values.items():
        value = Decimal(text)
        if name == CAPACITY:
            if setting.experts.overflow is Overflow.UNLIMITED and not pinned(OVERFLOW, bounds):
                experts["overflow"] = Overflow(bounds.overflow)
            experts["capacity_factor_prefill"] = value
        elif name == DECODE_CAPACITY:
            experts["capacity_factor_decode"] = value
        elif name == ACTIVE_SEQS:
            engine["max_active_seqs"] = int(value)
        elif name == BATCHED_TOKENS:
            engine["max_batched_tokens"] = int(value)
        elif name == SPILL:
            fallback["miss_probability"] = float(value)
        elif name == SHARE_CAP:
            fallback["share_cap"] = float(value)
    return setting.model_copy(
        update={
            "experts": setting.experts.model_copy(update=experts),
            "engine": setting.engine.model_copy(update=engine),
            "fallback": setting.fallback.model_copy(update=fallback),
        }
    )


def _range(name: str, bounds: KnobBounds) -> tuple[Decimal, Decimal]:
    if name == CAPACITY:
        return bounds.capacity_factor_min, bounds.capacity_factor_max
    if name == ACTIVE_SEQS:
        return Decimal(bounds.active_seqs_min), Decimal(bounds.active_seqs_max)
    low, high = bounds.miss_probability_min or 0.0, bounds.miss_probability_max
    return Decimal(str(low)), Decimal(1) if high is None else Decimal(str(high))
