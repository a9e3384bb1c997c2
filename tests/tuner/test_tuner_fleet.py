"""Many deployments in one process: each apart from the others, changed live, paused and pinned by signed orders."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moe_api.spec_tuning import PIN_KNOBS
from moe_core.config import TunerConfig
from moe_core.log import get_log
from moe_core.setting import (
    ACTIVE_SEQS,
    BATCHED_TOKENS,
    CAPACITY,
    DECODE_CAPACITY,
    OVERFLOW,
    SHARE_CAP,
    SPILL,
    Setting,
)
from moe_core.signing import Signer
from moe_core.wire import Overflow, TuningOrders
from moe_tuner.live import Live, OrdersRefused, effective, held
from moe_tuner.settings import ConfigRefused, checked, load
from tests.tuner.fakes import FakeGateway, served
from tests.tuner.tuner_fleet import boards, burst, entry, running, until
from tests.tuner.tuner_world import setting

PINNED = {
    CAPACITY: "1.5",
    DECODE_CAPACITY: "2",
    ACTIVE_SEQS: "8",
    BATCHED_TOKENS: "512",
    SPILL: "0.25",
    SHARE_CAP: "0.5",
}


async def test_a_gone_board_a_lost_key_and_a_bad_entry_stop_nobody_else(tmp_path: Path) -> None:
    async with running(tmp_path) as r, boards(r.signer, 2) as made:
        (board, gateway, board_url, gateway_url), (other, other_gateway, other_url, other_gateway_url) = made
        await r.follow(
            entry(tmp_path, "a", board_url, gateway_url),
            entry(tmp_path, "gone"),
            entry(tmp_path, "keyless", signingKeyFile=str(tmp_path / "none.pem")),
            entry(tmp_path, "bad", tick=1),
            entry(tmp_path, "b", other_url, other_gateway_url),
        )
        burst(board, gateway)
        burst(other, other_gateway)
        await until(lambda: bool(board.applied) and bool(other.applied))
        assert {knobs.deployment for knobs in board.applied} == {"default/a"}
        assert {knobs.deployment for knobs in other.applied} == {"default/b"}
        _, told = await r.get("/v1/deployments")
        rows = {row["deployment"]: row for row in told["deployments"]}
        assert [rows[f"default/{name}"]["tuned"] for name in ("a", "b", "gone", "keyless", "bad")] == [
            *(True, True, True),
            *(False, False),
        ]
        assert "signingKeyFile" in rows["default/keyless"]["problem"]
        assert "deployments.3: tick: Extra inputs" in rows["default/bad"]["problem"]
        assert "no answer from board" in rows["default/gone"]["exploringReason"] or rows["default/gone"]["version"] == 0
        assert (await r.get("/v1/status?deployment=default/keyless"))[0] == 503
        assert (await r.get("/v1/status?deployment=default/none"))[0] == 404
        assert (await r.get("/v1/status"))[0] == 422
        assert (await r.get("/healthz"))[0] == 200


async def test_the_file_is_followed_live_and_a_bad_entry_goes_on_by_the_old_one(tmp_path: Path) -> None:
    async with running(tmp_path) as r, boards(r.signer, 1) as made:
        board, gateway, board_url, gateway_url = made[0]
        await r.follow(entry(tmp_path, "a", board_url, gateway_url), entry(tmp_path, "b"))
        await until(lambda: bool(board.seq))
        await r.follow(entry(tmp_path, "a", board_url, gateway_url, paused=True))
        assert r.fleet.names == ("default/a",)
        burst(board, gateway)
        seen = board.seq
        await until(lambda: board.seq > seen + 20)
        assert not board.applied
        assert (await r.status())["fastReason"] == "paused: knobs stay as they are"
        await r.follow(entry(tmp_path, "a", board_url, gateway_url, paused=False, tick=1))
        seen = board.seq
        await until(lambda: board.seq > seen + 5)
        assert (await r.status())["paused"]
        assert "tick" in r.fleet.summaries()[0].problem  # type: ignore[operator]
        await r.follow(entry(tmp_path, "a", board_url, gateway_url))
        await until(lambda: bool(board.applied))


async def test_another_board_is_another_start_with_the_same_memory(tmp_path: Path) -> None:
    async with running(tmp_path) as r, boards(r.signer, 2) as made:
        (board, gateway, board_url, gateway_url), (other, _, other_url, _) = made
        await r.follow(entry(tmp_path, "a", board_url, gateway_url))
        burst(board, gateway)
        await until(lambda: bool(board.applied))
        home = (await r.status())["home"]
        other.put(board.applied[-1])
        await r.follow(entry(tmp_path, "a", other_url, gateway_url))
        await until(lambda: bool(other.seq) and r.fleet.summaries()[0].version is not None)
        while "home" not in (status := await r.status()):  # noqa: ASYNC110 (another process answers)
            await asyncio.sleep(0.01)
        assert (status["home"], status["displaced"]) == (home, True)


async def test_orders_are_signed_obeyed_at_once_and_outlive_the_process(tmp_path: Path) -> None:
    async with running(tmp_path) as r, boards(r.signer, 1) as made:
        board, gateway, board_url, gateway_url = made[0]
        document = entry(tmp_path, "a", board_url, gateway_url)
        await r.follow(document)
        await until(lambda: bool(board.seq))
        assert (await r.order(Signer.generate(), version=1, paused=True))[0] == 403
        assert (await r.order(version=1, paused=True, name="b"))[0] == 422
        assert (await r.order(version=2, paused=True)) == (200, {**(await r.status())["orders"], "version": 2})
        burst(board, gateway)
        seen = board.seq
        await until(lambda: board.seq > seen + 20)
        assert not board.applied
        refused = await r.order(version=1, paused=False)
        assert (refused[0], "not above 2" in refused[1]["error"]) == (409, True)
        await r.fleet.stop()
        await r.follow()
        await r.follow(document)
        await until(lambda: r.fleet.find(None) is not None and r.fleet.find(None).tuner is not None)  # type: ignore[union-attr]
        assert (await r.status())["paused"]
        assert (await r.order(version=3))[0] == 200
        await until(lambda: bool(board.applied))


async def test_a_pin_at_a_value_is_put_in_force_and_held(tmp_path: Path) -> None:
    async with running(tmp_path) as r, boards(r.signer, 1) as made:
        board, gateway, board_url, gateway_url = made[0]
        await r.follow(entry(tmp_path, "a", board_url, gateway_url))
        await until(lambda: bool(board.seq))
        pins = {CAPACITY: Decimal("1.5"), ACTIVE_SEQS: Decimal(24)}
        assert (await r.order(version=1, pins=pins))[0] == 200
        await until(lambda: bool(board.applied))
        assert Setting.of(board.applied[0]) == setting("1.5", seqs=24)
        await until(lambda: r.fleet.summaries()[0].displaced is False)
        burst(board, gateway)
        await until(lambda: len(board.applied) > 1)
        moved = Setting.of(board.applied[1])
        assert (moved.prefill_cap, moved.engine.max_active_seqs) == (Decimal("1.5"), 24)
        history = (await r.get("/v1/history?deployment=default/a"))[1]
        assert [record["action"] for record in history][-1] == "Pin"


CONFIG = TunerConfig.model_validate(entry(Path("/tmp"), "a"))
ORDERS_REFUSED = [
    pytest.param({"pins": {"gamma": None}}, "pins: 'gamma' names no knob", id="no knob"),
    pytest.param({"pins": {CAPACITY: 3}}, f"pins.{CAPACITY}: 3 lies outside 1 to 2", id="outside its bounds"),
    pytest.param({"pins": {ACTIVE_SEQS: "7.5"}}, f"pins.{ACTIVE_SEQS}: 7.5 is no whole number", id="half a sequence"),
    pytest.param({"pins": {OVERFLOW: 1}}, f"pins.{OVERFLOW}: no value can be given", id="a knob without a number"),
]


@pytest.mark.parametrize(("orders", "words"), ORDERS_REFUSED)
def test_orders_that_cannot_be_obeyed_name_the_field(tmp_path: Path, orders: dict[str, Any], words: str) -> None:
    live = Live(CONFIG.model_copy(update={"decision_log": str(tmp_path / "log")}), get_log("test"))
    with pytest.raises(OrdersRefused) as refused:
        live.obey(TuningOrders(deployment=CONFIG.deployment, version=1, **orders))
    assert words in str(refused.value)
    assert live.orders is None


def test_a_value_cannot_be_pinned_where_nothing_may_be_sent(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"decision_log": str(tmp_path / "log"), "mode": "Recommend"})
    with pytest.raises(OrdersRefused, match="mode is Recommend"):
        Live(config, get_log("test")).obey(
            TuningOrders(deployment=CONFIG.deployment, version=1, pins={SPILL: Decimal("0.4")})
        )


def test_orders_that_cannot_be_kept_are_refused_and_a_lost_file_pauses(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"decision_log": str(tmp_path / "none" / "log")})
    order = TuningOrders(deployment=CONFIG.deployment, version=1, paused=True)
    with pytest.raises(OrdersRefused, match="cannot be kept"):
        Live(config, get_log("test")).obey(order)
    config = CONFIG.model_copy(update={"decision_log": str(tmp_path / "log")})
    (tmp_path / "log.orders.json").write_text("{ cut")
    assert Live(config, get_log("test")).config.paused


def test_orders_hold_back_and_never_set_free() -> None:
    config = CONFIG.model_copy(update={"paused": True})
    orders = TuningOrders(deployment=CONFIG.deployment, version=1, pins={SPILL: None})
    assert effective(config, orders).paused
    assert effective(config, orders).bounds.pinned == (SPILL,)
    assert held(setting(seqs=16), orders.pins, config.bounds) == setting(seqs=16)
    value = TuningOrders(deployment=CONFIG.deployment, version=1, pins={SPILL: Decimal("0.4"), CAPACITY: Decimal(1)})
    kept = held(setting(seqs=16), value.pins, config.bounds)
    assert kept.fallback.miss_probability == 0.4
    assert (kept.prefill_cap, kept.experts.overflow) == (Decimal(1), Overflow.REROUTE)


def test_every_knob_that_can_be_pinned_is_held_at_its_value() -> None:
    pins = {knob: Decimal(value) for knob, value in PINNED.items()} | {OVERFLOW: Overflow.DROP}
    kept = held(setting(), pins, CONFIG.bounds)
    assert (kept.experts.overflow, kept.experts.capacity_factor_prefill) == (Overflow.DROP, Decimal("1.5"))
    assert kept.experts.capacity_factor_decode == Decimal(2)
    assert (kept.engine.max_active_seqs, kept.engine.max_batched_tokens) == (8, 512)
    assert (kept.fallback.miss_probability, kept.fallback.share_cap) == (0.25, 0.5)
    assert {*pins} == {*PIN_KNOBS.values()}
    assert held(setting("1"), {OVERFLOW: Overflow.UNLIMITED}, CONFIG.bounds).prefill_cap is None


async def test_a_pod_of_the_gateway_that_comes_later_is_sent_what_is_in_force(tmp_path: Path) -> None:
    async with running(tmp_path) as r, boards(r.signer, 1) as made:
        board, gateway, board_url, gateway_url = made[0]
        await r.follow(entry(tmp_path, "a", board_url, gateway_url))
        burst(board, gateway)
        await until(lambda: bool(board.applied))
        member = r.fleet.find(None)
        assert member is not None
        tuner, later = member.tuner, FakeGateway()
        async with served(later.routes()) as later_url:
            changed = entry(tmp_path, "a", board_url, gateway_url)
            await r.follow({**changed, "gatewayAdminUrls": [gateway_url, later_url]})
            await until(lambda: later.versions != [] and later.versions[-1] == board.version)
            assert member.tuner is tuner
            await r.follow({**changed, "gatewayAdminUrls": [later_url]})
            await until(lambda: member.tuner is not None and member.tuner.report().signals.missing == ())


async def test_knobs_are_sent_by_the_one_that_leads(tmp_path: Path) -> None:
    leads = [False]
    async with running(tmp_path, may_send=lambda: leads[0]) as r, boards(r.signer, 1) as made:
        board, gateway, board_url, gateway_url = made[0]
        await r.follow(entry(tmp_path, "a", board_url, gateway_url))
        burst(board, gateway)
        await until(lambda: any("another process leads" in str(d.note) for d in r.decisions()))
        assert board.posts == 0
        leads[0] = True
        await until(lambda: bool(board.applied))


REFUSED_ENTRIES = [
    pytest.param([{"deployment": "a"}, {"deployment": "a"}], {"a"}, id="twice the same name"),
    pytest.param([{"deployment": "a", "decisionLog": "/l"}, {"deployment": "b", "decisionLog": "/l"}], {"b"}, id="log"),
    pytest.param([{"deployment": "a"}, {"deployment": "b", "bounds": 3}], {"b"}, id="no bounds"),
    pytest.param([{"deployment": 3}], {"deployments.0"}, id="no name"),
]


@pytest.mark.parametrize(("entries", "refused"), REFUSED_ENTRIES)
def test_entries_are_refused_one_by_one(tmp_path: Path, entries: list[dict[str, Any]], refused: set[str]) -> None:
    path = tmp_path / "tuners.json"
    base = {key: value for key, value in entry(tmp_path, "x").items() if key not in ("deployment", "decisionLog")}
    full = [{"decisionLog": f"/{index}", **one} for index, one in enumerate(entries)]
    path.write_text(json.dumps({"deployments": full, "common": base}))
    assert set(load(path).refused) == refused


def test_a_document_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tuners.json"
    for text, words in (("{", "is not JSON"), ('{"deployments": 3}', "deployments:"), ("[]", "document:")):
        path.write_text(text)
        with pytest.raises(ConfigRefused, match=words):
            load(path)
    with pytest.raises(ConfigRefused, match="tickS: must be above 0"):
        checked(entry(tmp_path, "a", tickS=0), "here")
