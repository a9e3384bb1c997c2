"""YAML text to plain values, the way the API server would see them, with the line of every path."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from moe_api.redact import redact

MAX_BYTES = 1024 * 1024
MAX_NODES = 50_000
MAX_DEPTH = 64

Path = tuple[str | int, ...]


class DocumentInvalid(Exception):
    """The text is no single YAML mapping. `line` and `column` count from 1; 0 where there is no place to name."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.message, self.line, self.column = message, line, column


@dataclass(frozen=True)
class Document:
    """Values and where they stand."""

    values: dict[str, Any]
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """Line of the path, or of its nearest ancestor that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses keys given twice and leaves times as text, as JSON would."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _at("a key must be plain text", key)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise _at(f"{key.value!r} is there twice (first in line {seen[key.value].start_mark.line + 1})", key)
            seen[key.value] = key
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def _at(message: str, node: yaml.Node) -> DocumentInvalid:
    return DocumentInvalid(message, node.start_mark.line + 1, node.start_mark.column + 1)


def parse(text: str) -> Document:
    """The one YAML mapping in the text. Raises DocumentInvalid."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise DocumentInvalid(f"is larger than {MAX_BYTES // 1024} KiB: a MoEDeployment is a few")
    try:
        roots = _roots(text)
        if not roots:
            raise DocumentInvalid("is empty: write one MoEDeployment (apiVersion, kind, metadata, spec)")
        if len(roots) > 1:
            raise _at(f"holds {len(roots)} documents: keep one MoEDeployment in a file", roots[1])
        root = roots[0]
        if not isinstance(root, yaml.MappingNode):
            raise _at("is not a mapping: begin with apiVersion, kind, metadata and spec", root)
        lines = dict(_lines(root))
        loader = _Loader("")
        values: dict[str, Any] = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context or "cannot be read"
        raise DocumentInvalid(
            f"is not YAML: {what}", mark.line + 1 if mark else 0, mark.column + 1 if mark else 0
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DocumentInvalid(f"is not YAML: character {error.character!r} is not allowed", line) from None
    except RecursionError:
        raise DocumentInvalid("is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise DocumentInvalid(f"is not YAML: {str(error)[:200]}") from None
    return Document(values, lines)


def _roots(text: str) -> list[yaml.Node]:
    loader = _Loader(text)
    try:
        roots = []
        while loader.check_node():
            node = loader.get_node()
            if node is not None and not (isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None):
                roots.append(node)
        return roots
    finally:
        loader.dispose()


def _lines(root: yaml.Node) -> Iterator[tuple[Path, int]]:
    """Every path with its line. Aliases are followed, so the count of nodes bounds what they unfold to."""
    stack: list[tuple[Path, yaml.Node]] = [((), root)]
    count = 0
    while stack:
        path, node = stack.pop()
        count += 1
        if count > MAX_NODES or len(path) > MAX_DEPTH:
            raise _at("is too large once its aliases are followed, or nested too deeply", node)
        if node.tag not in _PLAIN:
            raise _at(f"the tag {redact(node.tag)} is not allowed: write plain values", node)
        yield path, node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag.rpartition(":")[2] not in ("str", "merge"):
                    raise _at("a key must be text: write it in quotes", key)
                stack.append(((*path, key.value), value))
        elif isinstance(node, yaml.SequenceNode):
            stack.extend(((*path, index), item) for index, item in enumerate(node.value))
