"""The console in a real browser: Debian's chromium, driven by playwright-core. What it must be to everybody's eyes and
hands, and what it costs a slow link in requests and bytes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from moe_core.setting import Signals
from moe_tuner.report import DecisionRecord
from tests.tuner.console_world import OPERATE, READ, console
from tests.tuner.fakes import served
from tests.tuner.tuner_fleet import entry
from tests.tuner.tuner_world import setting

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("console_browser.mjs")
HOSTILE = "default/z<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FIRST_REQUESTS, FIRST_BYTES, STEADY_BYTES = 16, 32_000, 20_000
"""Until the first figures stand, on an empty cache, signing in too; and of ten seconds of an open page."""

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("CI") != "true",
        reason="no chromium here: tools/system-packages browser installs it (414 MB)",
    ),
]


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    out, err = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0, err.decode()
    return out.decode().strip()


@pytest.fixture(scope="module")
def saw(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the browser saw, once for all tests."""
    assert CHROMIUM is not None, "CI installs chromium"
    return asyncio.run(watched(tmp_path_factory.mktemp("console")))


async def watched(folder: Path) -> Any:
    reason = "<img src=x onerror=alert(1)>"
    record = DecisionRecord(
        time=1.7e9,
        loop="fast",
        action="Move",
        reason=reason,
        mode="Auto",
        sent=False,
        signals=Signals(),
        before=setting(),
    )
    (folder / "a.jsonl").write_text(record.model_dump_json(by_alias=True, exclude_none=True) + "\n")
    hostile = {**entry(folder, "b"), "deployment": HOSTILE}

    async def blank(_: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>elsewhere</title>", content_type="text/html")

    modules = await run(sys.executable, str(ROOT / "tools" / "node_sdks.py"), "node-browser")
    async with (
        console(folder, others=(hostile,), config={"usdPerGpuHour": 2.0}) as here,
        served([web.get("/", blank)]) as other,
    ):
        told = {
            **{"modules": modules, "chromium": CHROMIUM, "url": here.url, "other": other, "hostile": HOSTILE},
            **{"read": READ, "operate": OPERATE, "pictures": os.environ.get("CONSOLE_PICTURES")},
        }
        found = json.loads(await run("node", str(SCRIPT), json.dumps(told)))
        found["orders"] = here.fleet.find("default/a").tuner.live.orders  # type: ignore[union-attr]
        return found


def test_nothing_broke_and_nothing_came_from_elsewhere(saw: Any) -> None:
    assert saw.get("broke") is None, saw["broke"]
    assert (saw["complaints"], saw["violations"], saw["elsewhere"]) == ([], [], [])


def test_a_stranger_sees_a_sign_in_and_no_more(saw: Any) -> None:
    assert (saw["stranger"]["status"], saw["stranger"]["title"]) == (401, "Sign in – moestack console")
    assert "default/" not in saw["stranger"]["text"]
    assert saw["strangerProblems"]["found"] == []
    assert (saw["byForm"], saw["left"]) == ("moestack console", "Sign in – moestack console")


def test_the_token_leaves_the_address_and_scripts_cannot_read_it(saw: Any) -> None:
    assert saw["address"].endswith("/console/")
    assert saw["scriptsSee"] == ""


def test_names_and_reasons_are_text(saw: Any) -> None:
    assert saw["hostile"] == {"scripts": 1, "images": 0, "named": True, "reason": True}
    assert "No map" in saw["other"]


def test_every_theme_can_be_read(saw: Any) -> None:
    grounds = {name: found[0] for name, found in saw["themes"].items()}
    assert grounds["light"] == grounds["chosenLight"] == grounds["keptLight"]
    assert grounds["dark"] == grounds["chosenDark"] != grounds["light"]
    for name, (_, *found) in saw["themes"].items():
        for page in found:
            assert page["found"] == [], name
            assert (page["least"] >= 4.5, page["texts"] > 100) == (True, True)
    assert saw["operatorProblems"]["found"] == []


def test_the_keyboard_reaches_all_in_order_and_is_seen_to(saw: Any) -> None:
    tab = saw["tab"]
    assert tab["wanted"] > 20
    assert (tab["inOrder"], tab["reached"], tab["bare"]) == (True, tab["wanted"], [])
    assert saw["cell"] == "Layer 1, expert 1: 0.32 × the layer's mean."
    assert saw["focusAfter"] == "pause"


def test_nothing_moves_for_who_wants_it_still(saw: Any) -> None:
    assert saw["moving"] == [0, "auto"]


def test_it_fits_360_pixels(saw: Any) -> None:
    assert (saw["narrow"]["page"], saw["narrow"]["wide"]) == (360, [])


def test_only_the_operators_token_changes_anything(saw: Any) -> None:
    assert saw["reader"] == {"hidden": True, "put": 403, "bare": 403}
    assert "lies outside 4 to 64" in saw["refused"]
    assert (saw["orders"].paused, saw["orders"].version) == (False, 4), "another origin changed nothing"


def test_what_is_shown_is_said_when_it_is_old(saw: Any) -> None:
    assert "Figures are of" in saw["gone"]
    assert saw["headings"] == [
        *("Now", "SLO and spill over time", "Load of experts", "Decisions of the tuner", "Cost and break-even"),
        *("Plan", "All deployments", "Pause and pin"),
    ]
    assert "Seen" in saw["why"]


def test_a_slow_link_has_little_to_carry(saw: Any) -> None:
    slow = saw["slow"]
    assert (slow["requests"] <= FIRST_REQUESTS, slow["bytes"] <= FIRST_BYTES) == (True, True), slow
    assert slow["bytesInTenSeconds"] <= STEADY_BYTES, slow
