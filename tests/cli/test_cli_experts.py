"""`moectl experts`: windows, levels, the map in a terminal of any width, and pictures."""

from __future__ import annotations

import io
import json
import os
import xml.etree.ElementTree as ET
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from moe_cli import heat_picture, heat_text
from moe_cli.experts import ExpertsOptions, run
from moe_cli.heat import LEVELS, level
from moe_cli.outcome import Exit, Refusal
from moe_cli.say import Say
from moe_core.clock import FakeClock
from moe_core.expert_load import Of, binned, grid, since
from moe_core.wire import ExpertKnobs, ExpertMatrix, LayerFactors, LayerLoad


def layer(number: int, demand: list[int], assigned: list[int] | None = None, **changes: Any) -> LayerLoad:
    """A layer of two EP ranks that hold half of the experts each."""
    assigned = demand if assigned is None else assigned
    half = len(demand) // 2
    values: dict[str, Any] = {
        "layer": number,
        "tokens": sum(demand) // 2,
        "demand": demand,
        "assigned": assigned,
        "rank_demand": [sum(demand[:half]), sum(demand[half:])],
        "rank_assigned": [sum(assigned[:half]), sum(assigned[half:])],
    }
    return LayerLoad.model_validate(values | changes)


def matrix(*layers: LayerLoad, **changes: Any) -> ExpertMatrix:
    knobs = ExpertKnobs.model_validate({"overflow": "Drop", "capacityFactorPrefill": "1.25"})
    values: dict[str, Any] = {
        "replica": "r1", "model": "tiny", "started_at_s": 100.0, "at_s": 130.0, "ranks": 2, "knobs_version": 4,
        "knobs": knobs, "layers": layers,
    }  # fmt: skip
    return ExpertMatrix(**(values | changes))


SKEWED = matrix(
    layer(0, [80, 10, 10, 0], [40, 10, 10, 0], dropped=40),
    layer(1, [25, 25, 25, 25]),
    layer(2, [0, 0, 0, 0]),
    layer(3, [0, 0, 0, 0], hooked=False),
)


def drawn(found: ExpertMatrix, of: Of = Of.DEMAND, width: int = 80, **options: Any) -> list[str]:
    return heat_text.render(found, grid(found, of), width, **options).plain.splitlines()


@pytest.mark.parametrize(
    ("name", "load", "wanted"),
    [("nothing", 0.0, 0), ("a trace", 0.01, 1), ("half", 0.5, 3), ("mean", 1.0, 4), ("twice", 2.0, 7), ("worst", 9, 8)],
)
def test_levels(name: str, load: float, wanted: int) -> None:
    assert level(load) == wanted


def test_every_level_has_a_shape_of_its_own() -> None:
    assert len(set(heat_text.BLOCKS)) == len(set(heat_text.ASCII)) == LEVELS
    assert heat_text.ASCII.isascii()


def test_the_map_names_model_replica_knobs_and_window() -> None:
    head = drawn(SKEWED)[:3]
    assert head[0] == "tiny · replica r1 · 2 EP ranks"
    assert head[1] == "knobs version 4: Drop, capacity factor prefill 1.25, decode uncapped"
    assert head[2] == "window 30 s: 50 tokens routed"


def test_the_map_says_that_layers_have_capacity_of_their_own() -> None:
    knobs = SKEWED.knobs.model_copy(update={"capacity_factor_by_layer": {1: LayerFactors(decode=Decimal(2))}})
    head = drawn(SKEWED.model_copy(update={"knobs": knobs}), width=120)
    assert head[1].endswith("prefill 1.25, decode uncapped; 1 layer has its own")


def test_a_row_shows_load_over_mean_and_what_capacity_did() -> None:
    lines = drawn(SKEWED)
    row = next(line for line in lines if line.startswith("    0 "))
    assert row.split()[1] == "▇▇▇▇▂▂▂▂▂▂▂▂····"
    assert row.split()[2:] == ["3.20", "1.80→1.67", "D"]
    even = next(line for line in lines if line.startswith("    1 "))
    assert even.split()[1:] == ["▄" * 16, "1.00", "1.00→1.00"]
    assert any("D dropped slots" in line for line in lines)


def test_layers_that_are_idle_or_not_counted_are_not_drawn_as_cold() -> None:
    lines = drawn(SKEWED)
    assert "idle" in next(line for line in lines if line.startswith("    2 "))
    assert "bypassed" in next(line for line in lines if line.startswith("    3 "))
    assert "1 of 4 layers bypass the router's hook: their load is unknown, not zero" in lines


def test_the_assigned_map_shows_load_after_capacity() -> None:
    row = next(line for line in drawn(SKEWED, Of.ASSIGNED) if line.startswith("    0 "))
    assert row.split()[2] == "2.67"


def test_by_rank_has_a_column_for_each_rank() -> None:
    row = next(line for line in drawn(SKEWED, Of.RANK_DEMAND) if line.startswith("    0 "))
    assert row.split()[1] == "▆▆▆▆▁▁▁▁"


def test_without_unicode_the_map_is_ascii() -> None:
    text = "\n".join(drawn(SKEWED, unicode=False))
    assert text.isascii()
    assert "####----" in text


@given(st.integers(1, 300), st.integers(32, 200), st.lists(st.integers(0, 50), min_size=1, max_size=300), st.booleans())
def test_a_map_fits_its_width_and_loses_no_hot_expert(layers: int, width: int, load: list[int], unicode: bool) -> None:
    load = load if len(load) % 2 == 0 else [*load, 1]
    found = matrix(*(layer(n, load, dropped=1, rerouted=2) for n in (0, layers)))
    assert max(map(len, drawn(found, width=width, unicode=unicode))) <= width
    cells = grid(found, Of.DEMAND).rows[0].cells
    if cells is not None:
        assert max(binned(cells, width)[0]) == max(cells)


def test_a_window_is_what_was_counted_in_between() -> None:
    later = matrix(layer(0, [90, 10, 20, 0], [50, 10, 20, 0], dropped=40), *SKEWED.layers[1:], at_s=135.0)
    found = since(SKEWED, later)
    assert found.layers[0].demand == (10, 0, 10, 0)
    assert found.layers[0].rank_assigned == (10, 10)
    assert (found.layers[0].dropped, found.at_s - found.started_at_s) == (0, 5.0)


def test_a_window_over_a_restart_begins_at_the_restart() -> None:
    later = matrix(layer(0, [1, 0, 0, 0]), started_at_s=132.0, at_s=135.0)
    assert since(SKEWED, later) == later


def test_colours_tell_cold_mean_hot_and_nothing_apart() -> None:
    assert len({heat_picture.colour(x) for x in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)}) == 6
    assert heat_picture.colour(9.0) == heat_picture.colour(4.0)


def test_the_svg_is_well_formed_and_says_what_it_shows() -> None:
    root = ET.fromstring(heat_picture.svg(heat_picture.scene(SKEWED.model_copy(update={"model": "a<b>&c"}))))
    words = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert "a<b>&c · replica r1 · 2 EP ranks" in words
    assert {"demand by expert (before capacity)", "assigned by rank", "bypassed: not counted", "40.0%"} <= set(words)


def test_the_png_has_the_colour_of_the_hottest_expert() -> None:
    made = heat_picture.scene(SKEWED)
    image = Image.open(io.BytesIO(heat_picture.png(made, scale=1.0))).convert("RGB")
    x, y, w, h = made.boxes[heat_picture.colour(3.2)][0]
    red, green, blue = image.getpixel((round(x + w / 2), round(y + h / 2)))
    assert f"#{red:02x}{green:02x}{blue:02x}" == heat_picture.colour(3.2)


def test_a_large_model_is_one_small_picture() -> None:
    big = matrix(*(layer(n, [(e * 7919 + n) % 97 for e in range(256)]) for n in range(61)))
    assert len(heat_picture.svg(heat_picture.scene(big))) < 2_000_000


class HurriedClock(FakeClock):
    """A sleep takes no real time, and is remembered."""

    slept_s = 0.0

    async def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


class World:
    """A board that answers with the next of its matrices."""

    def __init__(self, *answers: list[ExpertMatrix]) -> None:
        self.answers = list(answers)
        self.out = io.StringIO()
        self.say = Say(Console(file=self.out, width=90), Console(file=io.StringIO()))
        self.clock = HurriedClock()

    async def run(self, tmp_path: Path, **options: Any) -> Exit:
        app = web.Application()
        app.router.add_get("/v1/experts", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            return await run(ExpertsOptions(tmp_path, **({"url": url} | options)), self.say, self.clock)
        finally:
            await runner.cleanup()

    async def _answer(self, _: web.Request) -> web.Response:
        answer = self.answers.pop(0)
        return web.json_response([one.to_json() for one in answer])


async def test_json_is_the_whole_matrix(tmp_path: Path) -> None:
    world = World([SKEWED])
    assert await world.run(tmp_path, as_json=True) is Exit.OK
    assert [ExpertMatrix.model_validate(one) for one in json.loads(world.out.getvalue())] == [SKEWED]


@pytest.mark.parametrize("ending", ["svg", "png"])
async def test_a_picture_for_each_replica(tmp_path: Path, ending: str) -> None:
    world = World([SKEWED, SKEWED.model_copy(update={"replica": "r2"})])
    assert await world.run(tmp_path, output=tmp_path / f"map.{ending}") is Exit.OK
    assert sorted(os.listdir(tmp_path)) == [f"map-r1.{ending}", f"map-r2.{ending}"]


async def test_a_window_is_counted_between_two_answers(tmp_path: Path) -> None:
    later = matrix(layer(0, [90, 10, 20, 0]), *SKEWED.layers[1:], at_s=133.0)
    world = World([SKEWED], [later])
    assert await world.run(tmp_path, as_json=True, window_s=3.0) is Exit.OK
    assert json.loads(world.out.getvalue())[0]["layers"][0]["demand"] == [10, 0, 10, 0]
    assert world.clock.slept_s == 3.0


@pytest.mark.parametrize(
    ("name", "answers", "options", "wanted"),
    [
        ("no stack and no board named", [], {"url": None}, "--url"),
        ("a picture that we do not draw", [], {"output": Path("map.gif")}, "map.gif is no .svg or .png file"),
        ("nobody answered", [[]], {}, "no replica answered"),
        ("an unknown replica", [[SKEWED]], {"replica": "r9"}, "there are: r1"),
        ("nobody listens", [], {"url": "http://127.0.0.1:9"}, "moectl status"),
    ],
)
async def test_refusals_name_the_remedy(
    tmp_path: Path, name: str, answers: list[list[ExpertMatrix]], options: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(Refusal, match=wanted):
        await World(*answers).run(tmp_path, **options)
