"""docs/reference, generated: every field, metric, knob, setting and command, from the types that the processes use.

python -m moe_cli.reference --write docs/reference
python -m moe_cli.reference --check docs/reference
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_cli import reference_commands, reference_config, reference_metrics, reference_resource
from moe_cli.reference_text import NOTE

PAGES = {
    "moedeployment.md": reference_resource.page,
    "metrics.md": reference_metrics.metrics_page,
    "knobs.md": reference_metrics.knobs_page,
    "configuration.md": reference_config.page,
    "commands.md": reference_commands.page,
}


def pages() -> dict[str, str]:
    """Name → text of each page, the same bytes each time."""
    return {name: f"{NOTE}\n\n{make().rstrip()}\n" for name, make in PAGES.items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m moe_cli.reference", description=(__doc__ or "").splitlines()[0])
    action = made.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FOLDER", help="write the pages")
    action.add_argument("--check", type=Path, metavar="FOLDER", help="exit with 1 where a page is another")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 where all is well, 1 with the pages that differ on stderr."""
    chosen = parser().parse_args(arguments)
    made = pages()
    if chosen.write is not None:
        chosen.write.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            (chosen.write / name).write_text(text, encoding="utf-8")
        return 0
    problems = [
        f"{chosen.check / name} is not what the types give: write it again with --write"
        for name, text in made.items()
        if not (chosen.check / name).is_file() or (chosen.check / name).read_text(encoding="utf-8") != text
    ]
    known = {*made}
    problems += [f"{path} comes from no type" for path in sorted(chosen.check.glob("*.md")) if path.name not in known]
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
