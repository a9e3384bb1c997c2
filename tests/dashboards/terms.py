"""What a PromQL expression names: its series, their matchers, and the labels by which it groups."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TEXT = re.compile(r'"(?:\\.|[^"\\])*"')
_GROUPED = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SERIES = re.compile(r"(?<![\w:$.])([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?(?![\w:]|\s*\()")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*("(?:\\.|[^"\\])*")')
_WORDS = {"and", "or", "unless", "bool", "offset"}


@dataclass(frozen=True)
class Matcher:
    """`label op value`."""

    label: str
    operator: str
    value: str

    def takes(self, value: str) -> bool:
        if self.operator in {"=~", "!~"}:
            return bool(re.fullmatch(self.value, value)) is (self.operator == "=~")
        return (value == self.value) is (self.operator == "=")


@dataclass(frozen=True)
class Series:
    """One selector."""

    name: str
    matchers: tuple[Matcher, ...]


def series(expr: str) -> list[Series]:
    """Every selector of an expression, in order."""
    return [
        Series(name, tuple(Matcher(label, how, value[1:-1]) for label, how, value in _MATCHER.findall(inside)))
        for name, inside in _SERIES.findall(_GROUPED.sub("", _kept(expr)))
        if name not in _WORDS
    ]


def grouped(expr: str) -> set[str]:
    """Labels that the expression groups or joins by."""
    inside = _GROUPED.findall(_TEXT.sub('""', expr))
    return {label for labels in inside for label in re.findall(r"\w+", labels)}


def _kept(expr: str) -> str:
    """Without texts that are no matcher's: label names and templates of label_replace."""
    return re.sub(rf"([=~]?)({_TEXT.pattern})", lambda found: found[0] if found[1] else '""', expr)
