"""Commands that the documentation tells people to run: from its shell blocks, and from code within its sentences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("moectl", "make", "pytest", "python", "helm", "kubectl", "docker", "curl", "openssl")
"""What a sentence may name and a block may run; of anything else a block is asked for by `SHELL`."""
SHELL = ("export", "cd", ".", "git", "cat", "kill", "sleep", "echo", "pip")
"""What else a block may begin with."""


@dataclass(frozen=True)
class Command:
    """One command of one page. `block`: it stands in a block to be typed, and is therefore whole."""

    page: str
    line: int
    words: tuple[str, ...]
    block: bool

    @property
    def program(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """Every page that tells commands."""
    return [ROOT / "README.md", ROOT / "images/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[Command]:
    """Every command of a page, blocks first."""
    name, text = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
    found = []
    blocks, prose = _split(text)
    for line, body in blocks:
        for offset, typed in _lines(body):
            found += [Command(name, line + offset, words, block=True) for words in _words(typed)]
    for line, typed in _inline(prose):
        found += [Command(name, line, words, block=False) for words in _words(typed) if words[0] in PROGRAMS]
    return found


def python_blocks(page: Path) -> list[str]:
    """Programs in Python that a page shows."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _split(text: str) -> tuple[list[tuple[int, str]], str]:
    """(first line, body) of each shell block, and the text with every block blanked out, lines kept."""
    blocks: list[tuple[int, str]] = []
    prose: list[str] = []
    fence: str | None = None
    body: list[str] = []
    before_blank, indented = True, False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            if fence is None:
                fence, body = line[3:].strip() or "text", []
            else:
                if fence in ("sh", "bash", "shell", "console"):
                    blocks.append((number - len(body), "\n".join(body)))
                fence = None
            prose.append("")
        elif fence is not None:
            body.append(line)
            prose.append("")
        else:
            indented = line.startswith("    ") and (before_blank or indented)
            if indented and line.split()[0] in PROGRAMS:
                blocks.append((number, line.strip()))
            prose.append("" if indented else line)
            before_blank = not line.strip()
    return blocks, "\n".join(prose)


def _lines(body: str) -> Iterator[tuple[int, str]]:
    """Logical lines of a block: continuations and quoted lines joined; texts fed to a command (`<<EOF`) left out."""
    end, held, start = "", "", 0
    for offset, line in enumerate(body.splitlines()):
        if end:
            end = "" if line.strip() == end else end
            continue
        start = start if held else offset
        held += line.removeprefix("$ ") if not held else line
        open_quote, typed = _uncommented(held)
        if open_quote:
            held += "\n"
        elif typed.endswith("\\"):
            held = f"{typed[:-1]} "
        else:
            heredoc = re.search(r"<<-?\s*'?(\w+)'?", typed)
            end, held = heredoc.group(1) if heredoc else "", ""
            if typed.strip():
                yield start, typed


def _uncommented(line: str) -> tuple[bool, str]:
    """Whether a quote is open at the end, and the line without its comment."""
    quote = ""
    for place, sign in enumerate(line):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign == "#" and (place == 0 or line[place - 1].isspace()):
            return False, line[:place].rstrip()
    return bool(quote), line.rstrip()


def _words(typed: str) -> list[tuple[str, ...]]:
    """Words of each command of a line, split at pipes, `;`, `&` and `&&`; comments and redirections left out."""
    lexer = shlex.shlex(
        re.sub(r"<<-?\s*'?\w+'?", "", typed).replace("[", " ").replace("]", " "), posix=True, punctuation_chars=True
    )
    lexer.whitespace_split = True
    lexer.commenters = ""
    found: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if skip:
            skip = False
        elif re.fullmatch(r"[;&|()]+", word):
            found.append([])
        elif re.fullmatch(r"[<>]+&?", word):
            skip = True
        elif word != "…":
            found[-1].append(word.removesuffix("…"))
    own = [tuple(dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), words)) for words in found]  # no variables
    return [words for words in own if words]


def _inline(prose: str) -> Iterator[tuple[int, str]]:
    for paragraph in re.finditer(r"(?:[^\n]+\n?)+", prose):
        for code in re.finditer(r"(?<!`)`([^`]+)`(?!`)", paragraph.group()):
            text = " ".join(code.group(1).split())
            if text.split(" ")[0] in PROGRAMS:
                yield prose.count("\n", 0, paragraph.start() + code.start()) + 1, text
