"""The quality benchmark's model under capacity: nothing changes where nothing is asked, and what is asked is held."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import capacity_quality, trained_moe  # noqa: E402
from benchmarks.capacity_quality import Held, Setting  # noqa: E402
from benchmarks.trained_moe import Recipe  # noqa: E402
from moe_core.capacity import capacity  # noqa: E402
from moe_core.wire import Overflow  # noqa: E402
from moe_serving.rank import KnobsRefused  # noqa: E402
from moe_serving.tiny import Skew, make_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint("qwen3_moe", path, skew=Skew((0, 1), 6.0), num_hidden_layers=2)
    return trained_moe.load(path)


@pytest.fixture(scope="module")
def batch() -> Any:
    return torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))


def logits(model: Any, batch: Any, setting: Setting | None) -> Any:
    with torch.no_grad():
        if setting is None:
            return model(input_ids=batch, use_cache=False).logits
        with Held(model).to(setting):
            return model(input_ids=batch, use_cache=False).logits


def test_unlimited_is_the_model_itself_bit_for_bit(model: Any, batch: Any) -> None:
    assert torch.equal(logits(model, batch, None), logits(model, batch, Setting()))


def test_the_model_is_itself_again_afterwards(model: Any, batch: Any) -> None:
    before = logits(model, batch, None)
    changed = logits(model, batch, Setting(Overflow.REROUTE, Decimal(1)))
    assert not torch.equal(before, changed)
    assert torch.equal(before, logits(model, batch, None))


def test_capacity_that_nobody_reaches_changes_nothing(model: Any, batch: Any) -> None:
    ample = Setting(Overflow.REROUTE, Decimal(16))
    assert torch.equal(logits(model, batch, None), logits(model, batch, ample))


@pytest.mark.parametrize("overflow", capacity_quality.POLICIES)
def test_experts_get_no_more_than_their_capacity(model: Any, batch: Any, overflow: Overflow) -> None:
    loads: list[Any] = []

    def note(_: Any, arguments: Any) -> None:
        _, experts, weights = arguments
        loads.append(torch.bincount(experts[weights > 0], minlength=16))

    hooks = [layer.mlp.experts.register_forward_pre_hook(note) for layer in model.model.layers]
    with Held(model).to(Setting(overflow, Decimal("1.25"))) as seen:
        logits(model, batch, None)
    for hook in hooks:
        hook.remove()
    assert len(loads) == 2
    assert max(int(load.max()) for load in loads) <= capacity(Decimal("1.25"), batch.numel() * 4, 16)
    assert sum(int(load.sum()) for load in loads) == seen.slots - seen.dropped
    assert min(seen.falls) > 1.3, "the skewed router was to overload its experts"


def test_fewer_experts_are_the_best_of_the_router_with_weights_that_sum_to_one(model: Any, batch: Any) -> None:
    given: list[Any] = []
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    for setting in (Setting(), Setting(k=2)):
        logits(model, batch, setting)
    hook.remove()
    (_, all_ids, _), (_, ids, weights) = given
    kept = weights > 0
    assert torch.equal(kept.sum(1), torch.full((batch.numel(),), 2))
    assert torch.equal(ids[kept].view(-1, 2), all_ids[:, :2])
    assert torch.allclose(weights.sum(1), torch.ones(batch.numel()))


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        (Setting(k=5), "experts.perToken: 5 for tier all"),
        (Setting(k=0), "experts.perToken: 0 for tier all"),
        (Setting(Overflow.DROP, Decimal("0.5"), k=1), "experts.capacityFactor.prefill: .* less than one slot"),
    ],
)
def test_what_would_leave_a_token_without_an_expert_is_refused(model: Any, setting: Setting, why: str) -> None:
    with pytest.raises(KnobsRefused, match=why), Held(model).to(setting):
        pass


def test_a_document_is_held_out_whole_and_always_the_same() -> None:
    texts = {f"document {n}": f"text {n};".encode() for n in range(200)}
    train, held_out = trained_moe.split(texts, 16)
    assert 0 < held_out.count(b";") < 40
    assert train.count(b";") + held_out.count(b";") == 200
    assert trained_moe.split(dict(reversed(texts.items())), 16) == (train, held_out)


def test_the_same_text_makes_the_same_tokenizer_and_comes_back_whole() -> None:
    text = "def f(x):\n\treturn 'é' # 2×3\n".encode() * 9
    first, second = (trained_moe.make_tokenizer(text, 270) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 270
    ids = trained_moe.tokens_of(first, text).tolist()
    assert first.decode(ids).encode() == text
    assert len(ids) < len(text)


def test_upcycled_experts_answer_as_the_dense_model_that_they_come_from(batch: Any) -> None:
    recipe = Recipe(hidden=32, layers=2, experts=8, k=2, intermediate=16)
    tokenizer = trained_moe.make_tokenizer(b"text", 259)
    dense = trained_moe._model(recipe, tokenizer, 1, 1).eval()
    mixture = trained_moe._upcycled(recipe, tokenizer, dense).eval()
    load = trained_moe.expert_load(mixture, batch)
    assert [len(experts) for experts in load] == [8, 8]
    assert min(sum(slots > 0 for slots in experts) for experts in load) > recipe.k, "all tokens go the same way"
    torch.testing.assert_close(logits(mixture, batch, None), logits(dense, batch, None), rtol=1e-4, atol=1e-4)
    held = Setting(Overflow.REROUTE, Decimal(1))
    torch.testing.assert_close(logits(mixture, batch, held), logits(dense, batch, None), rtol=1e-4, atol=1e-4)


def test_experts_by_lot_are_not_the_routers_and_only_while_asked_for(model: Any, batch: Any) -> None:
    before = logits(model, batch, None)
    with capacity_quality.random_experts(model, 1):
        drawn, again = logits(model, batch, None), logits(model, batch, None)
    assert not torch.equal(before, drawn)
    assert not torch.equal(drawn, again)
    assert torch.equal(before, logits(model, batch, None))


@pytest.mark.parametrize(("sequences", "at_once"), [(12, 4), (16, 16), (7, 3), (3, 8), (5, 1)])
def test_a_step_mixes_sequences_from_all_over_the_text(sequences: int, at_once: int) -> None:
    order = capacity_quality.mixed(torch.arange(sequences), at_once).tolist()
    assert sorted(order) == list(range(sequences)), "each once"
    if sequences % at_once == 0:
        steps = sequences // at_once
        for first in range(0, sequences, at_once):
            assert order[first : first + at_once] == list(range(order[first], sequences, steps))


def test_the_standard_error_is_that_of_the_difference_by_sequence() -> None:
    before = torch.tensor([1.0, 5.0, 3.0, 2.0])
    assert capacity_quality.standard_error(before + 0.25, before) == 0
    assert capacity_quality.standard_error(before + torch.tensor([0.0, 0.2, 0.0, 0.2]), before) == pytest.approx(
        0.11547 / 2, rel=1e-4
    )


def test_the_picture_shows_every_policy(tmp_path: Path) -> None:
    import xml.etree.ElementTree as ET

    rows = {setting.name: {"perplexity": 4.0 + n / 100} for n, setting in enumerate(capacity_quality.settings(4))}
    capacity_quality.picture(rows, tmp_path / "picture.svg")
    tree = ET.parse(tmp_path / "picture.svg").getroot()
    texts = [element.text for element in tree.iter() if element.tag.endswith("text")]
    assert {"no capacity", *(policy.value for policy in capacity_quality.POLICIES)} <= set(texts)


@pytest.mark.full
def test_minutes_less_of_training_still_learn_far_more_than_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = capacity_quality.measure(trained_moe.QUICK, lambda text: None, (1,))
    assert found["perplexity"]["Unlimited"]["perplexity"] < found["training"]["uniform_perplexity"] / 6
    assert found["training"]["held_out_perplexity"] == pytest.approx(
        found["perplexity"]["Unlimited"]["perplexity"], rel=1e-3
    )
    assert found["ppl_delta"] == found["perplexity"]["Reroute 1.25"]["delta"]
    assert found["perplexity_by_seed"][1]["experts by lot"]["delta"] > found["ppl_delta"]
    again = trained_moe.trained(trained_moe.QUICK)
    assert again.figures == found["training"], "the cached one was not found again"
    assert (again.path / "model.safetensors").is_file()
