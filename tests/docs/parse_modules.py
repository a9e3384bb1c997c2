"""Whether `python -m MODULE …` takes the words that the docs give it: by the module's own parser, nothing is run.

python -m tests.docs.parse_modules < commands.json     # [[module, words…], …]; prints a list of complaints or null
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import runpy
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

_parse = argparse.ArgumentParser.parse_args


class Parsed(BaseException):
    """The module's parser took the words."""


def _stop(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: Any = None) -> NoReturn:
    _parse(self, args, namespace)
    raise Parsed


def complaint(module: str, words: Sequence[str]) -> str | None:
    """What the module's parser says against the words; None where it takes them."""
    said = io.StringIO()
    sys.argv = [module, *words]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module(module, run_name="__main__")
    except Parsed:
        return None
    except ImportError as error:
        return str(error)
    except SystemExit as end:
        return None if end.code == 0 else said.getvalue().strip().splitlines()[-1]
    return "it parses nothing, and ran"


def main() -> int:
    argparse.ArgumentParser.parse_args = _stop  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    out = sys.stdout
    json.dump([complaint(module, words) for module, *words in json.load(sys.stdin)], out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
