"""The console's server: who may ask what, what is said, and how much of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import subprocess
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moe_core.config import ConsoleConfig
from moe_core.expert_load import Of
from moe_core.setting import ACTIVE_SEQS, CAPACITY, Signals
from moe_tuner.console import answers, pages
from moe_tuner.console.answers import CELLS, TEXT, heat
from moe_tuner.console.guard import API, ORDERS, ROOT, SESSION
from moe_tuner.console.rights import OPERATE_S, Right, TokenRefused, Tokens, host_name, known_host, own_page
from moe_tuner.console.routes import load_tokens
from moe_tuner.console.series import COARSE_KEPT, COLUMNS, FINE_KEPT, Series, sample
from moe_tuner.report import DecisionRecord
from moe_tuner.settings import ConfigRefused, load
from tests.tuner.console_world import MARK, OPERATE, READ, console, costs, matrix
from tests.tuner.tuner_fleet import entry, until
from tests.tuner.tuner_world import setting

MARK_ = {"X_Moestack_Console": "1"}
READS = [API + name for name in ("deployments", "status", "series", "decisions", "experts", "costs", "session")]
FILES = [f"{ROOT}console.mjs", f"{ROOT}draw.mjs"]
NAMED = "?deployment=default/a"
PAUSE = {"deployment": "default/a", "seen": 0, "paused": True}


async def test_a_stranger_gets_401_and_nothing_else(tmp_path: Path) -> None:
    async with console(tmp_path) as here:
        for path in (*READS, *FILES, ORDERS, f"{API}none"):
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                if (method, path) == ("POST", SESSION):
                    continue
                for token in (None, "wrong" * 10, READ[:-1], ""):
                    status, headers, body = await here.ask(path, token, method, body=PAUSE, **MARK_)
                    assert status == 401, (method, path, token)
                    assert body in ({"error": "a token is needed"}, b""), "a stranger learns nothing"
                    assert "default-src 'none'" in headers["Content-Security-Policy"]
                    assert "Set-Cookie" not in headers
        for path in ("/v1/deployments", "/v1/status", "/v1/history"):
            assert (await here.ask(path))[0] == 401
            assert (await here.ask(path, READ))[0] == 200
        for path in ("/metrics", "/healthz"):
            assert (await here.ask(path))[0] == 200, "scraped and probed by who has no token"
        status, _, page = await here.ask(ROOT)
        assert status == 401
        assert (b"default/a" in page, b"signin.mjs" in page) == (False, True)
        for path in ("signin.mjs", "console.css"):
            assert (await here.ask(ROOT + path))[0] == 200


WAYS_ROUND = [
    *("/%63onsole/api/deployments", "//console/api/deployments", "/console//api/deployments", "/console;/api/costs"),
    *("/console/api/../api/deployments", "/Console/api/deployments", "/console%2fapi/costs", "/console/%61pi/costs"),
    *("http://127.0.0.1/console/api/deployments", "/v1/../console/api/deployments", "/./console/api/costs"),
]


@pytest.mark.parametrize("path", WAYS_ROUND)
async def test_no_way_of_writing_a_path_leads_round_the_door(tmp_path: Path, path: str) -> None:
    async with console(tmp_path) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = (await reader.read()).decode()
        writer.close()
        assert answer.split()[1] in ("400", "401", "404"), answer
        assert "default/a" not in answer


async def test_a_reader_reads_all_and_changes_nothing(tmp_path: Path) -> None:
    async with console(tmp_path) as here:
        for path in READS:
            status, headers, body = await here.ask(path, READ)
            assert status == 200, (path, body)
            assert headers["Cache-Control"] == "no-store"
            for method in ("POST", "PUT", "PATCH", "DELETE"):
                if path == SESSION:
                    continue
                assert (await here.ask(path, READ, method, body={}, **MARK_))[0] == 403
        for path in (ROOT, *FILES):
            assert (await here.ask(path, READ))[0] == 200
        status, _, body = await here.ask(ORDERS, READ, "PUT", PAUSE, **MARK_)
        assert (status, body) == (403, {"error": "the operator's token is needed"})
        assert here.fleet.find("default/a").tuner.live.orders is None  # type: ignore[union-attr]


async def test_who_may_operate_pauses_pins_and_sets_free(tmp_path: Path) -> None:
    async with console(tmp_path) as here:
        live = here.fleet.find("default/a").tuner.live  # type: ignore[union-attr]
        assert (await here.ask(ORDERS, OPERATE, "PUT", PAUSE, **MARK_))[0] == 200
        assert live.config.paused
        stale = await here.ask(ORDERS, OPERATE, "PUT", {**PAUSE, "paused": False}, **MARK_)
        assert (stale[0], "changed the orders meanwhile" in stale[2]["error"]) == (409, True)
        pins = {"deployment": "default/a", "seen": 1, "pins": {CAPACITY: None, ACTIVE_SEQS: "24"}}
        assert (await here.ask(ORDERS, OPERATE, "PUT", pins, **MARK_))[0] == 200
        assert live.orders.pins == {CAPACITY: None, ACTIVE_SEQS: Decimal(24)}
        assert live.orders.paused, "what a change does not name stays"
        shown = (await here.ask(API + "status", READ))[2]["report"]["orders"]
        assert shown["pins"] == {CAPACITY: None, ACTIVE_SEQS: "24"}
        free = {"deployment": "default/a", "seen": 2, "paused": False, "unpin": [CAPACITY]}
        assert (await here.ask(ORDERS, OPERATE, "PUT", free, **MARK_))[0] == 200
        assert (live.orders.pins, live.config.paused) == ({ACTIVE_SEQS: Decimal(24)}, False)
        for body, status, words in (
            ({**PAUSE, "seen": 3, "pins": {"gamma": None}}, 422, "names no knob"),
            ({**PAUSE, "seen": 3, "deployment": "default/none"}, 404, "not tuned here"),
            ({**PAUSE, "seen": 3, "more": 1}, 422, "more"),
        ):
            got = await here.ask(ORDERS, OPERATE, "PUT", body, **MARK_)
            assert (got[0], words in got[2]["error"]) == (status, True), got
        assert (await here.ask(ORDERS, OPERATE, "PUT", {"x": "y" * 200_000}, **MARK_))[0] == 413


FORGED = [
    pytest.param({}, id="no header of ours"),
    pytest.param({**MARK_, "Origin": "https://evil.example"}, id="another origin"),
    pytest.param({**MARK_, "Origin": "null"}, id="an origin that hides"),
    pytest.param({**MARK_, "Origin": "http://127.0.0.1:1"}, id="another port"),
    pytest.param({**MARK_, "Sec_Fetch_Site": "cross-site"}, id="the browser says so"),
    pytest.param({**MARK_, "Sec_Fetch_Site": "same-site"}, id="another port, the browser says so"),
]


@pytest.mark.parametrize("headers", FORGED)
async def test_no_other_page_can_make_a_browser_change_anything(tmp_path: Path, headers: dict[str, str]) -> None:
    async with console(tmp_path) as here:
        for method, path, body in (
            ("PUT", ORDERS, PAUSE),
            ("POST", SESSION, {"token": READ}),
            ("DELETE", SESSION, None),
        ):
            status, got, _ = await here.ask(path, OPERATE, method, body, **headers)
            assert (status, "Set-Cookie" in got) == (403, False)
        assert here.fleet.find("default/a").tuner.live.orders is None  # type: ignore[union-attr]


async def test_a_name_that_was_made_to_point_here_gets_nothing(tmp_path: Path) -> None:
    async with console(tmp_path) as here:
        for host in ("evil.example", f"evil.example:{here.port}", "127.0.0.1.evil.example", "", "a@127.0.0.1", "[::1"):
            for path in (ROOT, READS[0], f"{ROOT}signin.mjs", "/v1/status", "/metrics"):
                status, _, body = await here.ask(path, READ, Host=host)
                assert status in (400, 421), (host, path)
                assert b"default/a" not in (body if isinstance(body, bytes) else json.dumps(body).encode())
        assert (await here.ask(READS[0], READ, Host=f"localhost:{here.port}"))[0] == 200


async def test_a_name_that_is_configured_is_known(tmp_path: Path) -> None:
    async with console(tmp_path, loopback=False, config={"hosts": ["Tuner.example"]}) as here:
        assert (await here.ask(READS[0], READ, Host="tuner.example:8080"))[0] == 200
        assert (await here.ask(READS[0], READ, Host="other.example"))[0] == 421
        assert (await here.ask("/metrics", Host="other.example"))[0] == 200, "a Prometheus asks by a pod's address"


async def test_a_token_becomes_cookies_that_scripts_cannot_read(tmp_path: Path) -> None:
    async with console(tmp_path) as here:
        status, headers, _ = await here.ask(SESSION, None, "POST", {"token": "wrong"}, **MARK_)
        assert (status, "Set-Cookie" in headers) == (401, False)
        cookies = {}
        for token, count in ((READ, 1), (OPERATE, 2)):
            status, headers, _ = await here.ask(SESSION, None, "POST", {"token": token}, **MARK_)
            sent = headers.getall("Set-Cookie")
            assert (status, len(sent)) == (204, count)
            for text in sent:
                assert all(word in text for word in ("HttpOnly", "SameSite=Strict", "Path=/console/", "Max-Age="))
                assert token not in text
            cookies[token] = "; ".join(text.partition(";")[0] for text in sent)
        assert (await here.ask(SESSION, Cookie=cookies[READ]))[2] == {"right": "read", "operators": True}
        assert (await here.ask(SESSION, Cookie=cookies[OPERATE]))[2]["right"] == "operate"
        assert (await here.ask(ORDERS, None, "PUT", PAUSE, Cookie=cookies[READ], **MARK_))[0] == 403
        assert (await here.ask(ORDERS, None, "PUT", PAUSE, Cookie=cookies[OPERATE], **MARK_))[0] == 200
        status, headers, _ = await here.ask(f"{SESSION}?only=operate", None, "DELETE", Cookie=cookies[OPERATE], **MARK_)
        assert (status, len(headers.getall("Set-Cookie"))) == (204, 1)
        assert str(here.port) in cookies[READ], "two stacks on one machine"


TOKENS = Tokens(READ, OPERATE)
COOKIES = [
    pytest.param(TOKENS.cookie(Right.READ, 0), Right.READ, 0, Right.READ, id="as given"),
    pytest.param(TOKENS.cookie(Right.READ, 0), Right.OPERATE, 0, Right.NONE, id="a reader's, for more"),
    pytest.param(TOKENS.cookie(Right.READ, 0).replace("read", "operate"), Right.OPERATE, 0, Right.NONE, id="renamed"),
    pytest.param(TOKENS.cookie(Right.OPERATE, 0), Right.OPERATE, OPERATE_S, Right.NONE, id="over"),
    pytest.param(TOKENS.cookie(Right.OPERATE, 0), Right.OPERATE, OPERATE_S - 1, Right.OPERATE, id="not yet over"),
    pytest.param(TOKENS.cookie(Right.OPERATE, 0).replace("900", "999"), Right.OPERATE, 950, Right.NONE, id="longer"),
    pytest.param(Tokens("x" * 40, OPERATE).cookie(Right.READ, 0), Right.READ, 0, Right.NONE, id="another token's"),
    pytest.param(Tokens(READ).cookie(Right.OPERATE, 0), Right.OPERATE, 0, Right.NONE, id="under no token"),
    pytest.param("", Right.READ, 0, Right.NONE, id="nothing"),
    pytest.param("read.١.x", Right.READ, 0, Right.NONE, id="other digits"),
    pytest.param("read.9999.é", Right.READ, 0, Right.NONE, id="no MAC"),
]


@pytest.mark.parametrize(("cookie", "right", "now_s", "granted"), COOKIES)
def test_cookies(cookie: str, right: Right, now_s: float, granted: Right) -> None:
    assert TOKENS.of_cookie(right, cookie, now_s) is granted


def test_nobody_operates_where_no_token_says_so() -> None:
    alone = Tokens(READ)
    assert alone.of_cookie(Right.OPERATE, alone.cookie(Right.OPERATE, 0), 0) is Right.NONE
    assert alone.of_token("") is Right.NONE
    assert alone.of_token("é") is Right.NONE
    assert OPERATE not in repr(TOKENS)


@pytest.mark.parametrize(
    ("read", "operate"), [("short", None), (READ, "short"), (READ, READ), ("é" * 40, None), ("a\n" * 40, None)]
)
def test_tokens_that_guard_nothing_are_refused_unquoted(tmp_path: Path, read: str, operate: str | None) -> None:
    with pytest.raises(TokenRefused):
        Tokens(read, operate)
    (tmp_path / "read").write_bytes(b"short")
    for path in ("read", "none"):
        with pytest.raises(ConfigRefused, match="readTokenFile") as refused:
            load_tokens(ConsoleConfig(read_token_file=str(tmp_path / path)))
        assert "b'short'" not in str(refused.value)


def test_hosts_and_pages() -> None:
    assert [host_name(text) for text in ("a:1", "[::1]:8", "A", "a:b", "u@a", "", "a/b")] == [
        *("a", "::1", "a", None, None, None, None)
    ]
    assert known_host("LOCALHOST:80", frozenset())
    assert not own_page(MARK | {"Origin": "http://b"}, frozenset({"http://a"}))
    assert own_page(MARK | {"Origin": "http://a", "Sec-Fetch-Site": "same-origin"}, frozenset({"http://a"}))


async def test_what_is_tuned_how_well_and_at_what_cost(tmp_path: Path) -> None:
    plan = [
        {"deployment": "default/a", "what": "Model", "value": "qwen"},
        {"deployment": "default/b", "what": "Model", "value": "other"},
    ]
    async with console(tmp_path, "b", config={"usdPerGpuHour": 2.0, "plan": plan}) as here:
        rows = (await here.ask(API + "deployments", READ))[2]["rows"]
        mine = rows[0]
        assert (mine["deployment"], mine["mode"]) == ("default/a", "Auto")
        assert (mine["sloAttained"], mine["usdToday"]) == (1.0, "1.25")
        assert [row["deployment"] for row in rows] == ["default/a", "default/b"]
        assert "usdToday" not in rows[1], "nobody knows"
        detail = (await here.ask(f"{API}status{NAMED}", READ))[2]
        assert detail["slo"]["ttftP95S"] == 0.8
        assert detail["inForce"].startswith("γ 2 Reroute")
        assert [row["value"] for row in detail["plan"]] == ["qwen"]
        told = (await here.ask(f"{API}decisions{NAMED}", READ))[2]["rows"]
        assert told[-1]["action"] == "Move"
        assert "queue" in told[-1]["reason"] or "TTFT" in told[-1]["reason"]
        assert (CAPACITY in told[-1]["changed"], told[-1]["signals"]["waiting"]) == (True, 20)
        assert "inputs" not in told[-1]
        assert detail["newestDecisionS"] == told[0]["time"]
        money = (await here.ask(f"{API}costs{NAMED}", READ))[2]
        assert (money["todayUsd"], money["usdPerDay"], money["prices"][0]["source"]) == ("1.25", "200", "letter")
        # 2 GPUs at $2 for 730 hours over (300 × $5 + 60 × $30) / 360 a million.
        assert money["breakEven"][0]["tokensPerMonth"] == pytest.approx(2 * 2 * 730 / ((300 * 5 + 60 * 30) / 360) * 1e6)
        assert money["forecastDayUsd"] >= 1.25


async def test_a_series_grows_by_what_the_ticks_see(tmp_path: Path) -> None:
    async with console(tmp_path) as here:
        rows: list[Any] = []
        for _ in range(100):
            rows = (await here.ask(f"{API}series{NAMED}", READ))[2]["rows"]
            if rows and rows[-1][7] == 20.0:
                break
            await asyncio.sleep(0.1)
        row = dict(zip(COLUMNS, rows[-1][1:], strict=True))
        assert (row["attained"], row["waiting"]) == (1.0, 20.0)
        later = (await here.ask(f"{API}series{NAMED}&since={rows[-1][0]}", READ))[2]["rows"]
        assert all(moment > rows[-1][0] for moment, *_ in later)
        for query in ("&since=x", "&span=all"):
            assert (await here.ask(f"{API}series{NAMED}{query}", READ))[0] == 422
        assert (await here.ask(f"{API}series?deployment=none", READ))[0] == 404


def test_a_series_keeps_its_room_and_its_means() -> None:
    series = Series()
    blank = sample(Signals(), None, 0)
    for second in range(60 * (COARSE_KEPT + 5)):
        series.add(
            1e9 + second, sample(Signals(slo_attained=int((1e9 + second) // 60) % 2), 1.5, 3) if second % 2 else blank
        )
    fine, coarse = series.rows(0, coarse=False), series.rows(0, coarse=True)
    assert (len(fine), len(coarse)) == (FINE_KEPT, COARSE_KEPT)
    assert fine[1][0] - fine[0][0] == 2.0
    assert {row[1] for row in coarse[5:]} == {0.0, 1.0}, "a mean of what was known"
    assert coarse[-1][2] is None, "what nobody knew stays unknown"
    assert [row[0] for row in coarse] == sorted(row[0] for row in coarse)
    assert series.rows(fine[-2][0], coarse=False) == fine[-1:]


async def test_the_map_shows_the_last_seconds_and_the_whole(tmp_path: Path) -> None:
    async with console(tmp_path) as here:
        got = (await here.ask(f"{API}experts{NAMED}&window=start", READ))[2]
        assert (got["columns"], len(got["rows"]), got["replica"], got["sinceStart"]) == (16, 6, "r0", True)
        assert got["rows"][0]["hottest"] == 15
        assert sum(got["rows"][0]["cells"]) == pytest.approx(1600, abs=8), "hundredths of the mean"
        assert (got["rows"][5]["hooked"], "cells" in got["rows"][5]) == (False, False)
        by_rank = (await here.ask(f"{API}experts{NAMED}&of=rank&window=start", READ))[2]
        assert by_rank["columns"] == 2
        asked = here.books.asked
        await asyncio.gather(*(here.ask(f"{API}experts{NAMED}", READ) for _ in range(8)))
        assert here.books.asked - asked <= 1, "eight pages cost the board what one does"
        assert (await here.ask(f"{API}experts{NAMED}&of=x", READ))[0] == 422
        assert (await here.ask(f"{API}experts{NAMED}&replica=r9", READ))[0] == 404


async def test_who_does_not_answer_is_told_and_what_he_said_is_not(tmp_path: Path) -> None:
    async with console(tmp_path) as here:
        here.books.down = True
        for name, who in (("experts", "the board"), ("costs", "the gateway")):
            status, _, body = await here.ask(f"{API}{name}{NAMED}", READ)
            assert (status, body) == (503, {"error": f"{who} does not say: HTTP 500"})
        assert "usdToday" not in (await here.ask(API + "deployments", READ))[2]["rows"][0]


def test_answers_have_a_size(tmp_path: Path) -> None:
    long = "x" * 10_000
    record = DecisionRecord(
        time=0, loop="fast", action=long, reason=long, mode="Auto", sent=True, signals=Signals(missing=(long,) * 99),
        before=setting(), ack_errors=(long,) * 99, inputs={"secret": long},
    )  # fmt: skip
    assert len(json.dumps(answers.decision(record).to_json())) < 60 * TEXT
    wide = heat(matrix(80, 4096, 1, 0.0), ["r0"] * 1000, Of.DEMAND, since_start=True)
    cells = [len(row.cells or ()) for row in wide.rows]
    assert (sum(cells) <= CELLS, wide.group, len(wide.replicas)) == (True, 6, 64)
    dice = random.Random(7)
    loads = [tuple(int(dice.lognormvariate(6, 1)) for _ in range(256)) for _ in range(61)]
    big = matrix(61, 256, 7, 0.0)
    layers = [
        row.model_copy(update={"hooked": True, "demand": load}) for row, load in zip(big.layers, loads, strict=True)
    ]
    big = big.model_copy(update={"layers": tuple(layers)})
    packed = gzip.compress(json.dumps(heat(big, ["r0"], Of.DEMAND, since_start=True).to_json()).encode())
    assert 15_000 < len(packed) < 40_000, "a map of DeepSeek's size, of loads that nothing can foretell"
    many = costs(today=costs().today * 900, month=costs().month * 900)
    shown = answers.costs(many, None, (), None)
    assert (len(shown.today), shown.rows_left_out, shown.today_usd) == (50, 1700, Decimal("1125.00"))


async def test_files_are_small_packed_and_named_by_their_content(tmp_path: Path) -> None:
    files = pages.load()
    assert sum(len(page.plain) for page in files.values()) < 60_000
    assert sum(len(page.packed) for page in files.values()) < 20_000
    async with console(tmp_path) as here:
        status, headers, body = await here.ask(f"{ROOT}console.mjs", READ, Accept_Encoding="gzip")
        assert (status, headers["Content-Encoding"]) == (200, "gzip")
        assert gzip.decompress(body) == files["console.mjs"].plain
        again = await here.ask(f"{ROOT}console.mjs", READ, If_None_Match=headers["ETag"])
        assert (again[0], again[2]) == (304, b"")
        plain = await here.ask(f"{ROOT}console.mjs", READ, Accept_Encoding="identity")
        assert plain[2] == files["console.mjs"].plain
        assert (await here.ask(ROOT, READ, If_None_Match=files["signin.html"].etag))[0] == 200


def test_the_scale_is_told_by_lightness_alone() -> None:
    """Each of twenty steps is lighter than the one before, whatever colours somebody sees."""
    script = f"""import * as draw from {json.dumps((Path(pages.__file__).parent / "static" / "draw.mjs").as_uri())};
    console.log(JSON.stringify([...Array(21).keys()].map((i) => draw.luminance(draw.scale(i / 20)))));
    console.log(JSON.stringify([0, 0.25, 1, 4, 9].map(draw.heat)));"""
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True, timeout=60
    )
    lights, places = (json.loads(line) for line in done.stdout.splitlines())
    assert all(b > a * 1.02 for a, b in pairwise(lights))
    assert (lights[-1] + 0.05) / (lights[0] + 0.05) > 10
    assert places == [0, 0, 0.5, 1, 1]


def test_pages_hold_no_address_and_no_markup_from_text() -> None:
    for name, page in pages.load().items():
        text = page.plain.decode()
        assert [word for word in ("innerHTML", "insertAdjacent", "document.write", "eval(", " style=", " on") if
                word in (text if word not in (" on",) else "")] == []  # fmt: skip
        assert text.replace("http://www.w3.org/2000/svg", "").count("http") == 0, name
        if name.endswith(".html"):
            assert "<script>" not in text
            assert text.count("<script ") == text.count('<script type="module" src=')


async def test_the_configuration_names_the_console(tmp_path: Path) -> None:
    path = tmp_path / "tuner.json"
    path.write_text(json.dumps(entry(tmp_path, "a", console={"readTokenFile": "/r"})))
    loaded = load(path)
    assert loaded.console is not None
    assert loaded.console.read_token_file == "/r"
    path.write_text(json.dumps({"deployments": [], "console": {"readTokenFile": "/m"}}))
    many = load(path)
    assert many.console is not None
    assert many.console.read_token_file == "/m"


async def test_another_start_signs_nobody_out_and_a_gone_deployment_is_forgotten(tmp_path: Path) -> None:
    async with console(tmp_path) as here:
        await until(lambda: here.fleet.find("default/a") is not None)
        _, headers, _ = await here.ask(SESSION, None, "POST", {"token": READ}, **MARK_)
        cookie = headers["Set-Cookie"].partition(";")[0]
        port = here.port
    async with console(tmp_path, port=port) as again:
        assert (await again.ask(READS[0], Cookie=cookie))[0] == 200
        (again.folder / "tuners.json").write_text(json.dumps({"deployments": []}))
        await again.fleet.follow(load(again.folder / "tuners.json"))
        assert (await again.ask(f"{API}status{NAMED}", READ))[0] == 404
        assert (await again.ask(API + "deployments", READ))[2]["rows"] == []
