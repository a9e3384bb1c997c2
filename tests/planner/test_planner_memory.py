"""Memory of a GPU: it adds up, is never negative, more GPUs never hold less, and contexts of 32K to 1M."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_planner import kv, memory, weights
from moe_planner.catalog import packaged
from moe_planner.layouts import Impossible, candidates
from moe_planner.memory import CONTEXTS, Ask
from moe_planner.weights import Layout
from tests.planner.planner_world import spec

CATALOG = packaged()
KEYS = sorted(CATALOG.models)
SMALL = settings(max_examples=40, deadline=None)
NOTHING = spec("m", "cpu", 1).parallelism
"""Parallelism of which nothing is asked."""


def ask(key: str, accelerator: str = "nvidia-h200", form: str | None = None, **more: int) -> Ask:
    model = CATALOG.models[key]
    known = Ask(model, CATALOG.precisions[form or model.native], CATALOG.accelerators[accelerator], fp8_cache=False)
    return replace(known, **more)  # type: ignore[arg-type]


def layouts_of(key: str, gpus: int) -> list[Layout]:
    model = CATALOG.models[key]
    found = candidates(NOTHING, gpus, 8, model, CATALOG.precisions[model.native])
    return [] if isinstance(found, Impossible) else list(found)


@SMALL
@given(
    key=st.sampled_from(KEYS),
    accelerator=st.sampled_from(sorted(CATALOG.accelerators)),
    gpus=st.sampled_from([1, 2, 4, 8, 16, 32]),
    step=st.sampled_from([512, 2048, 8192]),
    pick=st.integers(0, 99),
)
def test_bytes_add_up_and_none_is_negative(key: str, accelerator: str, gpus: int, step: int, pick: int) -> None:
    found = layouts_of(key, gpus)
    assume(found)
    room = memory.place(ask(key, accelerator), found[pick % len(found)], step, CATALOG.engine)
    parts = (room.weights, room.redundant, room.activations, room.runtime, room.collectives, room.graphs)
    assert min(*parts, room.fragmentation) >= 0
    assert room.fixed == pytest.approx(sum(parts) + room.fragmentation)
    assert room.fixed + room.cache == pytest.approx(room.usable)
    assert 0 < room.usable <= room.total
    assert room.collectives == 0 if gpus == 1 else room.collectives > 0


@st.composite
def counts(draw: st.DrawFn) -> tuple[str, int]:
    """A model, and a number of GPUs that it can be split over."""
    key = draw(st.sampled_from(KEYS))
    return key, draw(st.sampled_from([count for count in range(1, 33) if layouts_of(key, count)]))


@SMALL
@given(split=counts(), pick=st.integers(0, 99))
def test_ranks_hold_the_whole_model_between_them(split: tuple[str, int], pick: int) -> None:
    """The fullest GPU holds its share at least, and all of them together no less than the model."""
    key, gpus = split
    model = CATALOG.models[key]
    precision = CATALOG.precisions[model.native]
    found = layouts_of(key, gpus)
    held = weights.gpu_bytes(model, precision, found[pick % len(found)])
    assert held * gpus >= weights.total_bytes(model, precision) * (1 - 1e-9)


@SMALL
@given(
    key=st.sampled_from(KEYS), form=st.sampled_from(["bf16", "fp8", "nvfp4", None]), gpus=st.sampled_from([1, 2, 4, 8])
)
def test_another_gpu_never_lowers_what_fits(key: str, form: str | None, gpus: int) -> None:
    """Of the same model on twice the GPUs, the best layout that is served keeps at least as many tokens."""
    assume(layouts_of(key, 2 * gpus))

    def best(count: int) -> int:
        known = ask(key, form=form)
        tokens = [
            memory.most_tokens(known, at, memory.place(known, at, 2048, CATALOG.engine), 2048)
            for at in layouts_of(key, count)
        ]
        return max(tokens, default=0)

    assert best(2 * gpus) >= best(gpus)


@SMALL
@given(
    key=st.sampled_from(KEYS),
    tokens=st.integers(0, 2_000_000),
    more=st.integers(1, 100_000),
    tensor=st.sampled_from([1, 2, 4, 8]),
    fp8=st.booleans(),
)
def test_a_longer_sequence_never_takes_less(key: str, tokens: int, more: int, tensor: int, fp8: bool) -> None:
    model = CATALOG.models[key]
    short, long = (kv.sequence_bytes(model, size, Layout(tensor), fp8=fp8) for size in (tokens, tokens + more))
    assert 0 <= short <= long
    assert kv.sequence_bytes(model, tokens, Layout(2 * tensor), fp8=fp8) <= short


@SMALL
@given(key=st.sampled_from(KEYS), gpus=st.sampled_from([8, 16]), redundant=st.integers(0, 64))
def test_redundant_experts_only_take(key: str, gpus: int, redundant: int) -> None:
    at = Layout(1, data=gpus, expert=gpus)
    none, some = (memory.place(ask(key, redundant=count), at, 2048, CATALOG.engine) for count in (0, redundant))
    one = weights.redundant_bytes(CATALOG.models[key], CATALOG.precisions[CATALOG.models[key].native], at, 1)
    assert none.redundant == 0
    assert some.redundant == pytest.approx(one * -(-redundant // gpus))
    assert some.cache <= none.cache


# Contexts that fit 8 GPUs, by attention kind: (model, accelerator, layout, longest of the table that fits).
LONGEST: dict[str, tuple[str, str, Layout, int]] = {
    "GQA: Qwen3-235B in FP8, its own 256K": ("qwen3-235b-a22b-2507", "nvidia-h200", Layout(8, expert=8), 262_144),
    "MLA: R1 in FP8, its own 160K": ("deepseek-v3", "nvidia-h200", Layout(8, expert=8), 131_072),
    "window in half of the layers: gpt-oss-120b on one GPU": ("gpt-oss-120b", "nvidia-h100", Layout(1), 131_072),
    "chunks: Llama 4 Scout, up to 1M": ("llama-4-scout", "nvidia-h200", Layout(8, expert=8), 1_048_576),
    "compressed: V4-Pro, up to 1M": ("deepseek-v4-pro", "nvidia-h200", Layout(8, expert=8), 1_048_576),
    "recurrent: Qwen3-Next, its own 256K": ("qwen3-next-80b-a3b", "nvidia-h200", Layout(2, expert=2), 262_144),
}


@pytest.mark.parametrize("name", LONGEST)
def test_contexts_by_kind_of_attention(name: str) -> None:
    key, accelerator, layout, wanted = LONGEST[name]
    rows = memory.contexts(ask(key, accelerator), layout, 2048, CATALOG.engine)
    assert [row.context for row in rows] == list(CONTEXTS) == [32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576]
    assert max(row.context for row in rows if row.fits) == wanted
    own = CATALOG.models[key].max_context
    for row in rows:
        assert row.beyond_model is (row.context > own)
        assert row.tokens == row.sequences * row.context
        assert row.fits or row.beyond_model or row.missing > 0
        assert not (row.fits and row.missing)


def test_contexts_say_how_much_is_missing() -> None:
    """V4-Pro on 8×H100: the weights alone leave nothing, so each context lacks its cache and what they lack."""
    known = ask("deepseek-v4-pro", "nvidia-h100")
    rows = memory.contexts(known, Layout(8, expert=8), 2048, CATALOG.engine)
    room = memory.place(known, Layout(8, expert=8), 2048, CATALOG.engine)
    assert room.cache < 0
    assert [row.sequences for row in rows] == [0] * 6
    assert rows[0].missing == pytest.approx(rows[0].sequence_bytes - room.cache)
