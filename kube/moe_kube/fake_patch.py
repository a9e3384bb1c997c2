"""JSON Patch (RFC 6902) for the in-memory API server."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from moe_kube.errors import Invalid


def patched(document: Any, operations: Sequence[Mapping[str, Any]]) -> Any:
    """The document after all operations; it is changed in place. Raises Invalid where one fails, `test` included."""
    for operation in operations:
        name, path = operation["op"], _parts(operation["path"])
        if name == "test":
            if _read(document, path) != operation["value"]:
                raise _refused(f"testing path {operation['path']} failed: test failed")
        elif name in ("add", "replace"):
            if name == "replace":
                _read(document, path)
            document = _write(document, path, copy.deepcopy(operation["value"]), insert=name == "add")
        elif name == "remove":
            _read(document, path)
            _drop(document, path)
        elif name in ("move", "copy"):
            source = _parts(operation["from"])
            value = copy.deepcopy(_read(document, source))
            if name == "move":
                _drop(document, source)
            document = _write(document, path, value, insert=True)
        else:
            raise Invalid(f"unexpected operation {name!r} in a JSON patch", status=400, reason="BadRequest")
    return document


def _refused(message: str) -> Invalid:
    return Invalid(f"the server rejected our request due to an error in our request: {message}", status=422)


def _parts(path: str) -> list[str]:
    if path and not path.startswith("/"):
        raise Invalid(f"a path of a JSON patch begins with /: {path!r}", status=400, reason="BadRequest")
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]


def _read(document: Any, path: Sequence[str]) -> Any:
    for part in path:
        try:
            document = document[int(part)] if isinstance(document, list) else document[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise _refused(f"path /{'/'.join(path)} does not exist") from None
    return document


def _write(document: Any, path: Sequence[str], value: Any, *, insert: bool) -> Any:
    if not path:
        return value
    parent = _read(document, path[:-1])
    if isinstance(parent, list):
        index = len(parent) if path[-1] == "-" else int(path[-1])
        if index > len(parent):
            raise _refused(f"path /{'/'.join(path)} does not exist")
        parent[index : index if insert else index + 1] = [value]
    elif isinstance(parent, dict):
        parent[path[-1]] = value
    else:
        raise _refused(f"path /{'/'.join(path)} does not exist")
    return document


def _drop(document: Any, path: Sequence[str]) -> None:
    parent = _read(document, path[:-1])
    del parent[int(path[-1]) if isinstance(parent, list) else path[-1]]
