"""A user's own figures: entries added and overridden, and one clear error for what is wrong in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_planner import catalog, config_json, overlay
from moe_planner.catalog import CatalogInvalid, packaged
from tests.planner.published_configs import PUBLISHED

MINE = """
[accelerators.my-gpu]
aliases = ["MyGPU"]
[accelerators.my-gpu.memory]
memory_gb = 100
bandwidth_gb_s = 4000
source = "own measurement"
date = "2026-11-20"

[accelerators.nvidia-h100.rent]
rent_usd_per_hour = 1.5
source = "our contract"
date = "2026-11-20"

[models.mine]
like = "qwen3-235b-a22b"
[[models.mine.from]]
max_context = 65536
source = "own config.json"
date = "2026-11-20"

[models.mixtral-8x7b]
aliases = ["house-mixtral"]
[[models.mixtral-8x7b.from]]
max_context = 16384
source = "our limit"
date = "2026-11-20"

[prices.house]
provider = "house"
input_usd_per_m = 0.2
output_usd_per_m = 0.4
source = "our contract"
date = "2026-11-20"
"""


def test_entries_are_added_and_overridden_figure_by_figure() -> None:
    found, before = overlay.parse({"mine.toml": MINE}), packaged()
    assert found.accelerators["my-gpu"].memory_bytes == 100 * 10**9
    assert found.accelerator_named("MyGPU (rack 7)") == found.accelerators["my-gpu"]
    h100, packaged_h100 = found.accelerators["nvidia-h100"], before.accelerators["nvidia-h100"]
    assert (h100.rent_usd_per_hour, h100.figures["rent_usd_per_hour"].source) == (1.5, "our contract")
    assert (h100.memory_bytes, h100.flops) == (packaged_h100.memory_bytes, packaged_h100.flops)
    known = found.model("org/mine-FP8")
    assert known is not None
    assert (known[0].layers, known[0].max_context, known[1].name) == (94, 65_536, "fp8")
    mixtral = found.model("house-mixtral")
    assert mixtral is not None
    assert (mixtral[0].max_context, mixtral[0].layers, mixtral[0].figures["max_context"].source) == (
        16_384,
        32,
        "our limit",
    )
    assert set(found.models) == {*before.models, "mine"}
    assert found.version != before.version
    assert overlay.parse({}).models.keys() == before.models.keys()


def test_later_files_win() -> None:
    dearer = MINE.replace("rent_usd_per_hour = 1.5", "rent_usd_per_hour = 9.0")
    first = overlay.parse({"a.toml": MINE, "b.toml": dearer})
    last = overlay.parse({"b.toml": dearer, "a.toml": MINE})
    rents = [found.accelerators["nvidia-h100"].rent_usd_per_hour for found in (first, last)]
    assert rents == [9.0, 1.5]


def test_files_are_read_from_disk_with_their_prices(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    assert "mine" in overlay.load([tmp_path / "mine.toml"]).models
    prices = overlay.load_prices([tmp_path / "mine.toml"])
    assert (prices["house"].input_usd_per_m, prices["house"].cached_usd_per_m) == (0.2, None)
    assert prices["gpt-5.5"].output_usd_per_m == 30.0
    with pytest.raises(CatalogInvalid, match=r"gone\.toml: cannot be read"):
        overlay.load([tmp_path / "gone.toml"])


def test_a_config_json_becomes_an_entry() -> None:
    facts = config_json.read(json.dumps(PUBLISHED["Qwen/Qwen3-30B-A3B"]), "org/Own-30B")
    found = overlay.with_model(packaged(), facts)
    for name in ("org/Own-30B", "mirror/own-30b", "org/Own-30B-FP8"):
        known = found.model(name)
        assert known is not None
        assert known[0] is facts
    assert found.version != packaged().version
    assert packaged().model("org/Own-30B") is None


def changed(old: str, new: str) -> str:
    assert old in MINE
    return MINE.replace(old, new, 1)


WRONG: dict[str, tuple[str, str]] = {
    "no TOML": ("[models", "mine.toml: is no TOML"),
    "an unknown table": (MINE + "\n[gpus.x]\n", "mine.toml: gpus: is not known: one of models, accelerators, prices"),
    "no table": ("models = 3\n", "mine.toml: models: must hold a table for each entry"),
    "an unknown key of a model": (changed('like = "qwen3', 'as = "qwen3'), "mine.toml: mine.as: is not known"),
    "like nothing": (changed('like = "qwen3-235b-a22b"', 'like = "qwen9"'), "mine.toml: mine.like: qwen9 is no other"),
    "like itself, round the corner": (
        '[models.a]\nlike = "b"\n[models.b]\nlike = "a"\n', "mine.toml: b.like: a is no other model"),
    "a model without its figures": (changed('like = "qwen3-235b-a22b"', ""), "mine.toml: mine.attention: is missing"),
    "no source": (changed('source = "our limit"\n', ""), "mine.toml: mixtral-8x7b: has no source"),
    "no day": (changed('source = "our contract"\ndate = "2026-11-20"', 'source = "us"'), "of mine.toml: has no date"),
    "a text for a number": (changed("max_context = 65536", 'max_context = "64K"'), "mine.max_context: must be a whole"),
    "a negative figure": (changed("max_context = 65536", "max_context = -1"), "mine.max_context: must not be negative"),
    "nothing where something must be": (changed("max_context = 65536", "heads = 0"), "mine.heads: must be above zero"),
    "a kind of attention that is none": (
        changed("max_context = 65536", 'attention = "flash"'), "attention: must be one of gqa, mla, csa, deltanet"),
    "more experts a token than there are": (changed("max_context = 65536", "topk = 129"), "topk: 129 of 128 experts"),
    "other parameters cut in no known way": (
        changed("max_context = 65536", 'others = [{name = "x", params = 1, cut = "sideways"}]'),
        "mine.others: cut must be one of expert, tensor, kv, none"),
    "other parameters below nothing": (
        changed("max_context = 65536", 'others = [{name = "x", params = -1}]'), "mine.others: params must be a whole"),
    "other parameters without a count": (changed("max_context = 65536", 'others = [{name = "x"}]'), "mine.others: "),
    "an unknown figure of a GPU": (changed("memory_gb = 100", "memory_tb = 1"), "my-gpu.memory_tb: is not known"),
    "a GPU without memory": (changed("memory_gb = 100\n", ""), "mine.toml: my-gpu: has neither memory_mib nor"),
    "a rent of nothing": (changed("hour = 1.5", "hour = 0"), "nvidia-h100.rent_usd_per_hour: must be above zero"),
    "a name that another has": (changed('"house-mixtral"', '"dbrx-base"'), "dbrx-base is a name of"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    text, words = WRONG[name]
    with pytest.raises(CatalogInvalid) as caught:
        overlay.parse({"mine.toml": text})
    assert words in str(caught.value)


PRICES: dict[str, tuple[str, str, str]] = {
    "a negative price": ("input_usd_per_m = 0.2", "input_usd_per_m = -1", "house.input_usd_per_m: must be an amount"),
    "a missing price": ("output_usd_per_m = 0.4\n", "", "house.output_usd_per_m: is missing"),
    "no provider": ('provider = "house"\n', "", "house.provider: is missing"),
    "an unknown figure": ("input_usd_per_m = 0.2", "input_usd_per_m = 0.2\nvat = 1", "house.vat: is not known"),
    "no source": ('source = "our contract"\ndate = "2026-11-20"\n', "", "house: has no source"),
    "a price of infinity": (
        "input_usd_per_m = 0.2",
        "input_usd_per_m = inf",
        "house.input_usd_per_m: must be an amount",
    ),
    "a price of a word": ("input_usd_per_m = 0.2", 'input_usd_per_m = "2"', "house.input_usd_per_m: must be an amount"),
    "a provider that is a number": ('provider = "house"', "provider = 1", "house.provider: must be a name"),
    "a long context without its start": (
        "input_usd_per_m = 0.2",
        "input_usd_per_m = 0.2\nlong_input_usd_per_m = 1",
        "house.long_from_tokens: is missing",
    ),
    "a negative long price": (
        "input_usd_per_m = 0.2",
        "input_usd_per_m = 0.2\nlong_from_tokens = 9\nlong_input_usd_per_m = -1\nlong_output_usd_per_m = 1",
        "house.long_input_usd_per_m: must be an amount",
    ),
}


@pytest.mark.parametrize("name", PRICES)
def test_a_wrong_price_is_named(name: str, tmp_path: Path) -> None:
    old, new, words = PRICES[name]
    own = MINE[MINE.index("[prices.house]") :]
    assert old in own
    (tmp_path / "mine.toml").write_text(own.replace(old, new, 1))
    with pytest.raises(CatalogInvalid) as caught:
        overlay.load_prices([tmp_path / "mine.toml"])
    assert str(caught.value).startswith("mine.toml: ")
    assert words in str(caught.value)


LINES = [line for line in MINE.splitlines() if line]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_file_is_read_or_refused_with_its_name(data: st.DataObject) -> None:
    """Lines left out, repeated, or with another value: a catalog, or an error that names a file."""
    lines = data.draw(st.lists(st.sampled_from(LINES), max_size=30))
    value = data.draw(st.sampled_from(["-1", "0", '"x"', "[]", "true", "1e400", "{a = 1}", "[[1]]", "9" * 20]))
    at = data.draw(st.integers(0, 40))
    if at < len(lines) and "=" in lines[at]:
        lines[at] = f"{lines[at].partition('=')[0]}= {value}"
    try:
        found = overlay.parse({"mine.toml": "\n".join(lines)})
    except CatalogInvalid as error:
        where = error.where
    else:
        where = "mine.toml"
        assert set(found.models) >= set(packaged().models)
    assert "mine.toml" in where or where.startswith(catalog.FILES)
