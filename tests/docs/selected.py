"""How many tests each `pytest …` of the docs selects: by pytest's own matchers, on one collection of all.

    python -m tests.docs.selected < commands.json     # a list of lists of words; prints a list of counts

It stands for the collection of a session that has collected less than everything.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from _pytest.mark import KeywordMatcher, MarkMatcher
from _pytest.mark.expression import Expression

ROOT = Path(__file__).resolve().parents[2]


def count(items: Sequence[pytest.Item], words: Sequence[str]) -> int:
    """Items that `pytest WORDS` selects. Raises ValueError for an option that the docs have no use for."""
    paths: list[str] = []
    keyword = marker = ""
    rest = iter(words)
    for word in rest:
        if word == "-k":
            keyword = next(rest)
        elif word == "-m":
            marker = next(rest)
        elif word.startswith("-"):
            if word not in ("-s", "-q", "-x"):
                raise ValueError(f"{word}: what does it select?")
        else:
            paths.append(word)
    return sum(
        1
        for item in items
        if _under(item, paths)
        and (not keyword or Expression.compile(keyword).evaluate(KeywordMatcher.from_item(item)))
        and (not marker or Expression.compile(marker).evaluate(MarkMatcher.from_markers(item.iter_markers())))
    )


def _under(item: pytest.Item, paths: Sequence[str]) -> bool:
    here = item.nodeid.partition("[")[0]
    return not paths or any(here == path or here.startswith((f"{path}/", f"{path}::")) for path in paths)


class Keep:
    """Holds the collected items."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items = list(items)


def main() -> int:
    asked: list[list[str]] = json.load(sys.stdin)
    paths = {word for words in asked for word in words if word.startswith("tests/")} or {"tests"}
    if any(not any(word.startswith("tests/") for word in words) for words in asked):
        paths = {"tests"}
    keep, out = Keep(), sys.stdout
    sys.stdout = sys.stderr
    status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sorted(paths)], plugins=[keep])
    names = sorted({item.nodeid.partition("[")[0].rpartition("::")[2] for item in keep.items})
    json.dump({"status": int(status), "counts": [count(keep.items, words) for words in asked], "names": names}, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
