"""Label selectors, in the API server's syntax."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache

from moe_kube.errors import Invalid

Matcher = Callable[[Mapping[str, str]], bool]
_TERM = re.compile(
    r"\s*(?:(?P<absent>!)\s*(?P<gone>[\w./-]+)"
    r"|(?P<name>[\w./-]+)\s*(?:(?P<sign>==|=|!=)\s*(?P<value>[\w.-]*)|(?P<word>in|notin)\s*\((?P<set>[^)]*)\))?)"
    r"\s*(?:,|$)"
)


@lru_cache(maxsize=1024)
def selector(text: str) -> Matcher:
    """A test on labels: `a=b`, `a!=b`, `a in (b, c)`, `a notin (b)`, `a`, `!a`, joined by commas. Raises Invalid."""
    tests: list[Matcher] = []
    at = 0
    while at < len(text):
        found = _TERM.match(text, at)
        if found is None or found.end() == at:
            raise Invalid(f"unable to parse the label selector {text!r}", status=400, reason="BadRequest")
        tests.append(_test(found))
        at = found.end()
    if len(tests) == 1:
        return tests[0]
    return lambda labels: all(test(labels) for test in tests)


def _test(found: re.Match[str]) -> Matcher:
    name = found["name"]
    if found["absent"]:
        gone = found["gone"]
        return lambda labels: gone not in labels
    if found["word"]:
        wanted = frozenset(part.strip() for part in found["set"].split(","))
        return (
            (lambda labels: labels.get(name) in wanted)
            if found["word"] == "in"
            else (lambda labels: labels.get(name) not in wanted)
        )
    if found["sign"] == "!=":
        value = found["value"]
        return lambda labels: labels.get(name) != value
    if found["sign"]:
        value = found["value"]
        return lambda labels: labels.get(name) == value
    return lambda labels: name in labels
