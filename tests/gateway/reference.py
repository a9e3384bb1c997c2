"""The tables of docs/gateway.md that are made from the code: `python -m tests.gateway.reference` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

from moe_core.metrics import ALL
from moe_gateway.tracing import ATTRIBUTES

DOCS = Path(__file__).parents[2] / "docs" / "gateway.md"
_ATTRIBUTES = "| attribute | meaning |\n| --- | --- |\n"
_METRICS = "| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n"


def written(text: str) -> str:
    """The guide with its tables as the code has them."""
    attributes = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in ATTRIBUTES.items())
    metrics = "".join(
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |\n"
        for metric in ALL
        if metric.name.startswith(("moestack_gateway_", "gen_ai_"))
    )
    for head, rows in ((_ATTRIBUTES, attributes), (_METRICS, metrics)):
        found = re.search(re.escape(head) + r"(?:\|.*\n)*", text)
        if found is None:
            raise ValueError(f"{DOCS}: has no table {head.splitlines()[0]}")
        text = text[: found.start()] + head + rows + text[found.end() :]
    return text


if __name__ == "__main__":
    DOCS.write_text(written(DOCS.read_text()))
