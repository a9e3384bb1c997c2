"""Whatever is in a file, loading it ends in a MoEDeployment or in a ResourceInvalid that shows no secret."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_api.load import ResourceInvalid, load_object, load_text

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [path.read_text() for path in sorted((ROOT / "manifests/examples").glob("*.yaml"))]
SECRET = "sk-0123456789abcdefghij"
Place = tuple[str | int, ...]

VALUES: list[Any] = [
    *(0, 1, -1, 101, 2**31, 2**63, 10**400, 1.0, 1.5, float("inf"), float("nan"), True, False, None, [], {}),
    *("", " ", "a\nb", "A", "-a", "1e3", "0s", "80Gi", "Off", "None", "γ", "\x00", "\ud800", "x" * 5000, "{text}"),
    *([1], ["a", "a"], [None], [[]], {"name": None}, {"": ""}, {"a": {"b": [1]}}, b"a"),
    *(SECRET, [SECRET], {SECRET: SECRET}),
]
SNIPPETS = ["\t", ":", "- ", "{", "]", "'", '"', "\n", "&a ", "*a", "!!set ", "? ", "|", "---\n", "\x07", "#", "<<: "]
SNIPPETS.append(SECRET)


def _places(value: Any, place: Place = ()) -> Iterator[Place]:
    yield place
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _places(item, (*place, index))


def _mutated(rng: random.Random, document: dict[str, Any]) -> dict[str, Any]:
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        place = rng.choice([place for place in _places(document) if place])
        node: Any = document
        for part in place[:-1]:
            node = node[part]
        match rng.randint(0, 3):
            case 0:
                del node[place[-1]]
            case 1 if isinstance(node, dict):
                node[rng.choice([SECRET, "apiKey", "zz", "", "ttft_p95", "A.b/c"])] = copy.deepcopy(rng.choice(VALUES))
            case _:
                node[place[-1]] = copy.deepcopy(rng.choice(VALUES))
    return document


def _said(load: Any, *arguments: Any) -> str:
    """What is said about the input; nothing where it is good."""
    try:
        load(*arguments)
    except ResourceInvalid as error:
        return f"{error}{error.problems!r}" if error.problems else pytest.fail("a refusal without a reason")
    return ""


def _run(count: int) -> None:
    rng = random.Random(20261122)
    documents = [yaml.safe_load(text) for text in TEXTS]
    refused = 0
    for _ in range(count):
        mutated = _mutated(rng, rng.choice(documents))
        said = _said(load_object, mutated)
        text = rng.choice(TEXTS)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(SNIPPETS) + text[at + rng.choice([0, 0, 1, 30]) :]
        said += _said(load_text, text, "f.yaml")
        assert SECRET not in said
        refused += bool(said)
    assert 0 < refused < 2 * count


def test_hundreds_of_inputs() -> None:
    _run(300)


@pytest.mark.full
def test_ten_thousand_inputs() -> None:
    _run(10_000)
