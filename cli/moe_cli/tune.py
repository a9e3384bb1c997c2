"""What `moectl tune` asks the tuner of a running stack, and the orders that it signs and sends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
from pydantic import TypeAdapter, ValidationError

from moe_cli import tune_replay, tune_text
from moe_cli.documents import KEY, read_state, read_token
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_cli.tune_picture import html
from moe_cli.tune_series import from_prometheus
from moe_core.http import HttpError, call_json, session
from moe_core.setting import KNOBS
from moe_core.signing import Signer
from moe_core.wire import TuningOrders
from moe_tuner.report import DecisionRecord, DeploymentSummary, TuningReport

ASK_S = 5.0
ALL = 1000
T = TypeVar("T")
_RECORDS = TypeAdapter(tuple[DecisionRecord, ...])
_SUMMARIES = TypeAdapter(tuple[DeploymentSummary, ...])


@dataclass(frozen=True)
class Target:
    """Which tuner is asked, for which deployment."""

    folder: Path
    url: str | None = None
    deployment: str | None = None
    as_json: bool = False


async def status(target: Target, say: Say) -> Exit:
    """One deployment's report, or a row for each where there are several."""
    async with session(connect_s=2.0, read_s=ASK_S) as client:
        url = _url(target)
        summaries = _SUMMARIES.validate_python((await _get(client, target, f"{url}/v1/deployments"))["deployments"])
        if target.deployment is None and len(summaries) != 1:
            if target.as_json:
                say.line(json.dumps({"deployments": [row.to_json() for row in summaries]}))
            for line in [] if target.as_json else tune_text.summary_lines(summaries):
                say.line(line)
            return Exit.OK
        report = await _report(client, target, url)
    if target.as_json:
        say.line(json.dumps(report.to_json()))
    for line in [] if target.as_json else tune_text.status_lines(report):
        say.line(line)
    return Exit.OK


async def history(target: Target, say: Say, limit: int) -> Exit:
    """The last decisions, oldest first."""
    async with session(connect_s=2.0, read_s=ASK_S) as client:
        records = await _history(client, target, _url(target), limit)
    for record in reversed(records):
        if target.as_json:
            say.line(json.dumps(record.to_json()))
        else:
            say.line(tune_text.decision_line(record))
    if not records and not target.as_json:
        say.line("no decision was taken yet")
    return Exit.OK


async def why(target: Target, say: Say, version: int | None) -> Exit:
    """All that is known of one decision: the one that a version of the knobs came from, or the last."""
    async with session(connect_s=2.0, read_s=ASK_S) as client:
        url = _url(target)
        records = await _history(client, target, url, ALL)
        report = await _report(client, target, url)
    found = next((record for record in records if version in (None, record.version)), None)
    if found is None and version is not None:
        message = f"no decision of the log sent version {version}"
        raise Refusal(Problem(field="VERSION", message=message, remedy="moectl tune history lists them"))
    if target.as_json:
        say.line(json.dumps(None if found is None else found.to_json()))
        return Exit.OK
    for line in tune_text.now_lines(report) if found is None else tune_text.why_lines(found, report):
        say.line(line)
    return Exit.OK


async def replay(target: Target, say: Say, *, limit: int, log: Path | None) -> Exit:
    """Take logged decisions again by this release's policies. Exit code 1 where one comes out differently."""
    if log is not None:
        records = tune_replay.read(log, limit)
    else:
        async with session(connect_s=2.0, read_s=ASK_S) as client:
            records = await _history(client, target, _url(target), limit)
    again = tune_replay.replay(tuple(reversed(records)))
    if target.as_json:
        say.line(json.dumps([row.to_json() for row in again]))
    for line in [] if target.as_json else tune_text.replay_lines(again):
        say.line(line)
    return Exit.CHANGED if any(row.same is False for row in again) else Exit.OK


async def report_page(target: Target, say: Say, output: Path, hours: float) -> Exit:
    """Write a page with plots."""
    async with session(connect_s=2.0, read_s=ASK_S) as client:
        url = _url(target)
        records = await _history(client, target, url, ALL)
        now = await _report(client, target, url)
        state = read_state(target.folder)
        prometheus = None if state is None or target.url is not None else state.fact("prometheus", "url")
        series = await from_prometheus(client, prometheus, now.deployment, hours)
    _write(output, html(now, tuple(reversed(records)), series))
    say.line(str(output))
    return Exit.OK


async def order(target: Target, say: Say, change: tune_text.OrderChange) -> Exit:
    """Change what a person ordered, and leave the rest of it as it is."""
    async with session(connect_s=2.0, read_s=ASK_S) as client:
        url = _url(target)
        report = await _report(client, target, url)
        before = report.orders or TuningOrders(deployment=report.deployment, version=1)
        pins = {name: value for name, value in before.pins.items() if name not in change.unpin} | change.pins
        orders = TuningOrders(
            deployment=report.deployment,
            version=1 if report.orders is None else before.version + 1,
            paused=before.paused if change.paused is None else change.paused,
            pins=pins,
        )
        path = f"{url}/v1/orders?deployment={quote(report.deployment, safe='')}"
        try:
            await call_json(client, "PUT", path, _signer(target).sign(orders).to_json(), total_s=ASK_S)
        except HttpError as error:
            raise Refusal(Problem(field="tune", message=_said(error), remedy="")) from None
    if target.as_json:
        say.line(json.dumps(orders.to_json()))
    for line in [] if target.as_json else tune_text.order_lines(orders, report):
        say.line(line)
    return Exit.OK


def parse_pin(text: str) -> tuple[str, Decimal | None]:
    """KNOB, or KNOB=VALUE. Raises Refusal."""
    name, mark, value = text.partition("=")
    if not any(knob == name or knob.startswith(f"{name}.") for knob in KNOBS):
        raise Refusal(Problem(field="KNOB", message=f"{name} is not known", remedy=f"one of {', '.join(KNOBS)}"))
    if not mark:
        return name, None
    try:
        number = Decimal(value)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise Refusal(Problem(field=name, message=f"{value!r} is no number", remedy="write KNOB=1.5"))
    return name, number


def _write(output: Path, page: str) -> None:
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        message = f"cannot be written ({error.strerror})"
        raise Refusal(Problem(field=str(output), message=message, remedy="choose another place")) from None


def _url(target: Target) -> str:
    if target.url is not None:
        return target.url.rstrip("/")
    state = read_state(target.folder)
    port = None if state is None or state.ended else state.fact("tuner", "port")
    if port is None:
        remedy = "start it with moectl up, or give --url"
        raise Refusal(Problem(field="tune", message="no tuner runs here", remedy=remedy))
    return f"http://127.0.0.1:{port}"


def _signer(target: Target) -> Signer:
    try:
        return Signer.load(target.folder / KEY)
    except (OSError, ValueError):
        remedy = "orders are signed with the key of the stack: give its --state-dir"
        message = f"no signing key lies in {target.folder}"
        raise Refusal(Problem(field="--state-dir", message=message, remedy=remedy)) from None


async def _report(client: aiohttp.ClientSession, target: Target, url: str) -> TuningReport:
    return _parsed(TypeAdapter(TuningReport), await _get(client, target, f"{url}/v1/status{_query(target, '?')}"))


async def _history(client: aiohttp.ClientSession, target: Target, url: str, limit: int) -> tuple[DecisionRecord, ...]:
    return _parsed(_RECORDS, await _get(client, target, f"{url}/v1/history?limit={limit}{_query(target, '&')}"))


def _query(target: Target, mark: str) -> str:
    return "" if target.deployment is None else f"{mark}deployment={quote(target.deployment, safe='')}"


async def _get(client: aiohttp.ClientSession, target: Target, url: str) -> Any:
    # A tuner that was named may be anybody's: the stack's token is for its own.
    token = read_token(target.folder) if target.url is None else None
    try:
        return await call_json(client, "GET", url, total_s=ASK_S, token=token)
    except HttpError as error:
        raise Refusal(Problem(field="tune", message=_said(error)), code=Exit.COULD_NOT_START) from None


def _said(error: HttpError) -> str:
    """The tuner's own words where it gave some."""
    try:
        return str(json.loads(error.detail)["error"])
    except (ValueError, KeyError, TypeError):
        return str(error)


def _parsed(kind: TypeAdapter[T], document: Any) -> T:
    try:
        return kind.validate_python(document)
    except ValidationError:
        message = "the tuner's answer cannot be read: it is of another release"
        raise Refusal(Problem(field="tune", message=message, remedy="use the moectl of that release")) from None
