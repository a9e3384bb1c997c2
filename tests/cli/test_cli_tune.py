"""`moectl tune` against a running tuner: what it says, what it orders, what it replays and draws."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from moe_cli import tune, tune_picture, tune_replay, tune_series
from moe_cli.documents import PartState, Phase, StackState, write_state
from moe_cli.outcome import Exit, Refusal
from moe_cli.processes import Proc
from moe_cli.say import Say
from moe_cli.tune import Target
from moe_cli.tune_series import Series
from moe_cli.tune_text import OrderChange
from moe_core.http import session
from moe_core.setting import ACTIVE_SEQS, CAPACITY, Signals
from moe_core.signing import Signer
from moe_tuner.report import DecisionRecord, Effect
from tests.tuner.fakes import FakeBoard, served
from tests.tuner.tuner_fleet import Running, boards, burst, entry, running, until
from tests.tuner.tuner_world import setting


@dataclass
class Moectl:
    """Commands and what they print."""

    target: Target
    out: io.StringIO = field(default_factory=io.StringIO)

    @property
    def say(self) -> Say:
        return Say(Console(file=self.out, width=400, highlight=False), Console(file=io.StringIO()))

    def said(self) -> str:
        text = self.out.getvalue()
        self.out.seek(0)
        self.out.truncate()
        return text


@asynccontextmanager
async def tuned(tmp_path: Path, *names: str) -> AsyncIterator[tuple[Running, Moectl, FakeBoard]]:
    """A tuner that has answered a burst, found by moectl as it finds that of `moectl up`."""
    async with running(tmp_path) as r, boards(r.signer, 1) as made:
        board, gateway, board_url, gateway_url = made[0]
        others = (entry(tmp_path, name) for name in names)
        await r.follow(entry(tmp_path, "a", board_url, gateway_url), *others)
        burst(board, gateway)
        await until(lambda: bool(board.applied) and bool(r.fleet.find("default/a").tuner.report().decisions))  # type: ignore[union-attr]
        folder = tmp_path / "state"
        folder.mkdir()
        r.signer.save(folder / "signing.pem")
        port = r.url.rpartition(":")[2]
        part = PartState(name="tuner", title="tuner", log="", phase=Phase.UP, facts={"port": port})
        proc = Proc(pid=1, started_at_s=0)
        write_state(
            folder,
            StackState(
                stack_id="s",
                deployment="default/a",
                model="m",
                ranks=1,
                supervisor=proc,
                started_s=0.0,
                phase=Phase.UP,
                parts=(part,),
            ),
        )
        yield r, Moectl(Target(folder)), board


async def test_status_history_and_why_say_what_was_done_and_from_what(tmp_path: Path) -> None:
    async with tuned(tmp_path) as (_, m, _):
        assert await tune.status(m.target, m.say) is Exit.OK
        text = m.said()
        assert "default/a: Auto" in text
        assert "γ 2 Reroute" in text
        assert "trials     0 of 96 today" in text
        assert await tune.history(m.target, m.say, 10) is Exit.OK
        assert "fast Move version 1: " in m.said()
        assert await tune.why(m.target, m.say, 1) is Exit.OK
        told = m.said()
        assert "changed: experts.capacityFactor.prefill" in told
        assert "waiting 20" in told
        assert "in force   on every rank after" in told
        with pytest.raises(Refusal, match="no decision of the log sent version 99"):
            await tune.why(m.target, m.say, 99)
        as_json = Target(m.target.folder, as_json=True)
        await tune.status(as_json, m.say)
        assert json.loads(m.said())["deployment"] == "default/a"
        await tune.history(as_json, m.say, 10)
        records = [DecisionRecord.model_validate_json(line) for line in m.said().splitlines()]
        assert records[0].inputs is not None


async def test_logged_decisions_come_out_the_same_and_a_forged_one_does_not(tmp_path: Path) -> None:
    async with tuned(tmp_path) as (_, m, _):
        assert await tune.replay(m.target, m.say, limit=100, log=None) is Exit.OK
        assert "1 of 1 decisions come out the same" in m.said()
        log = tmp_path / "a.jsonl"
        record = json.loads(log.read_text().splitlines()[0])
        record["inputs"]["context"]["signals"]["waiting"] = 0
        record["inputs"]["context"]["signals"]["ttftP95S"] = 0.1
        record["inputs"]["context"]["signals"]["rankDemand"] = 1.0
        log.write_text(json.dumps(record) + "\n{ cut\n")
        assert await tune.replay(m.target, m.say, limit=100, log=log) is Exit.CHANGED
        assert "DIFFERS" in m.said()
    with pytest.raises(Refusal, match="cannot be read"):
        tune_replay.read(tmp_path / "none.jsonl", 10)


async def test_orders_change_one_thing_and_leave_the_rest(tmp_path: Path) -> None:
    async with tuned(tmp_path) as (r, m, board):
        await tune.order(m.target, m.say, OrderChange(paused=True))
        assert "default/a: paused" in m.said()
        assert (await r.status())["paused"]
        await tune.order(m.target, m.say, OrderChange(pins={ACTIVE_SEQS: Decimal(24), CAPACITY: None}))
        await tune.order(m.target, m.say, OrderChange(paused=False, unpin=(CAPACITY,)))
        assert m.said().splitlines()[-1] == f"default/a: {ACTIVE_SEQS} at 24"
        await until(lambda: board.applied[-1].engine.max_active_seqs == 24)
        with pytest.raises(Refusal, match="lies outside 4 to 64"):
            await tune.order(m.target, m.say, OrderChange(pins={ACTIVE_SEQS: Decimal(999)}))
        Signer.generate().save(m.target.folder / "signing.pem")
        with pytest.raises(Refusal, match="no trusted key"):
            await tune.order(m.target, m.say, OrderChange(paused=True))
        (m.target.folder / "signing.pem").unlink()
        with pytest.raises(Refusal, match="no signing key"):
            await tune.order(m.target, m.say, OrderChange(paused=True))


async def test_of_several_deployments_each_has_a_row_and_one_is_named(tmp_path: Path) -> None:
    async with tuned(tmp_path, "b") as (_, m, _):
        await tune.status(m.target, m.say)
        rows = m.said().splitlines()
        assert [row.split()[0] for row in rows] == ["default/a", "default/b"]
        with pytest.raises(Refusal, match="name one of default/a, default/b"):
            await tune.history(m.target, m.say, 5)
        await tune.status(Target(m.target.folder, deployment="default/b"), m.say)
        assert "missing    board at" in m.said() or "waiting for the board" in m.said()


async def test_without_a_stack_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no tuner runs here"):
        await tune.status(Target(tmp_path), Moectl(Target(tmp_path)).say)
    with pytest.raises(Refusal):
        await tune.status(Target(tmp_path, url="http://127.0.0.1:9"), Moectl(Target(tmp_path)).say)


PINS = [
    pytest.param("gamma", "gamma is not known", id="no knob"),
    pytest.param(f"{CAPACITY}=fast", "'fast' is no number", id="no number"),
    pytest.param(f"{CAPACITY}=nan", "'nan' is no number", id="nan"),
]


@pytest.mark.parametrize(("text", "words"), PINS)
def test_a_pin_that_means_nothing_is_refused(text: str, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        tune.parse_pin(text)


def test_a_pin_may_have_a_value_or_hold_a_group() -> None:
    assert tune.parse_pin("engine.maxActiveSeqs=24") == (ACTIVE_SEQS, Decimal(24))
    assert tune.parse_pin("experts") == ("experts", None)


def record(at: float, action: str, ratio: float | None = None, gamma: str | None = None) -> DecisionRecord:
    return DecisionRecord(
        time=at,
        loop="slow",
        action=action,
        reason="<b>because</b>",
        mode="Auto",
        sent=True,
        signals=Signals(ttft_p95_s=0.3, slo_attained=0.99),
        before=setting(seqs=16),
        after=setting(gamma, seqs=16),
        measured=None if ratio is None else Effect(ratio=ratio, low=ratio, high=ratio, pairs=5, evidence=30.0),
    )


RECORDS = (
    record(1.0, "Try", gamma="1.5"),
    record(2.0, "RollBack", 1.2),
    record(3.0, "Promote", 0.8, "1.4"),
    record(4.0, "RollBack", 0.9),
    record(5.0, "Promote", 0.5, "1.2"),
)


def test_costs_of_trials_are_chained_over_promotions() -> None:
    found = [(at, pytest.approx(cost), promoted) for at, cost, promoted in tune_picture.trial_costs(RECORDS)]
    assert found == [(2.0, 1.2, False), (3.0, 0.8, True), (4.0, 0.72, False), (5.0, 0.4, True)]


async def test_the_page_has_every_plot_and_is_whole_by_itself(tmp_path: Path) -> None:
    async with tuned(tmp_path) as (r, m, _):
        page = tmp_path / "tuning.html"
        await tune.report_page(m.target, m.say, page, 6.0)
        assert m.said().strip() == str(page)
        with pytest.raises(Refusal, match="cannot be written"):
            await tune.report_page(m.target, m.say, tmp_path / "none" / "tuning.html", 6.0)
        report = r.fleet.find("default/a").tuner.report()  # type: ignore[union-attr]
    assert "Spend on closed APIs, USD since the gateway started: nothing was recorded" in page.read_text()
    points = ((1.0, 0.5), (4.0, 0.9))
    text = tune_picture.html(report, RECORDS, Series(points, points, points, points))
    drawn = text.split("<svg")[1:]
    assert len(drawn) >= 8
    for part in drawn:
        ET.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
    assert "Regret" in text
    assert not any(mark in text for mark in ("src=", "href=", "<script", "url("))
    assert "<b>because" not in text


async def test_prometheus_fills_the_page_and_its_lies_are_gaps() -> None:
    asked: list[str] = []

    async def query_range(request: web.Request) -> web.Response:
        asked.append(request.query["query"])
        values = [[1.0, "0.5"], [2.0, "NaN"], [3.0, "+Inf"], [4.0, "0.9"]]
        return web.json_response({"status": "success", "data": {"result": [{"metric": {}, "values": values}]}})

    async with served([web.get("/api/v1/query_range", query_range)]) as url, session() as client:
        found = await tune_series.from_prometheus(client, url, 'a"b', 1.0)
    assert found.attained == ((1.0, 0.5), (4.0, 0.9))
    assert len(asked) == 4
    assert all('deployment="a\\"b"' in query for query in asked)
    answers: list[Any] = [None, {}, {"data": {"result": []}}, {"data": {"result": [{"values": [["x", "y"]]}]}}]
    assert [tune_series.points(answer) for answer in answers] == [()] * 4
