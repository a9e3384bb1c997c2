"""The one logger: a JSON object per line, with bound fields, and no secret in it."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TextIO

import orjson

from moe_api.redact import REDACTED as REDACTED  # noqa: PLC0414 - exported from here
from moe_api.redact import SECRET_MARKS, secret_name
from moe_api.redact import redact as redact  # noqa: PLC0414

_MARKS = re.compile(b"|".join(re.escape(mark.encode()) for mark in SECRET_MARKS))
_HARMLESS: set[str] = set()
"""Names of fields seen so far that hold no secret by their name alone."""
NAMES_MAX = 1024
KEPT_MAX = 64
"""Lines that wait to be written together, at most."""


class Log:
    """A logger with bound fields. `log.bind(deployment="a/b").info("knobs applied", version=3)`."""

    def __init__(self, logger: logging.Logger, fields: Mapping[str, object] | None = None) -> None:
        self._logger = logger
        self._fields = dict(fields or {})

    def bind(self, **fields: object) -> Log:
        return Log(self._logger, {**self._fields, **fields})

    def debug(self, message: str, **fields: object) -> None:
        self._emit(logging.DEBUG, message, fields)

    def info(self, message: str, **fields: object) -> None:
        self._emit(logging.INFO, message, fields)

    def warning(self, message: str, **fields: object) -> None:
        self._emit(logging.WARNING, message, fields)

    def error(self, message: str, **fields: object) -> None:
        self._emit(logging.ERROR, message, fields)

    def exception(self, message: str, **fields: object) -> None:
        """As error, with the traceback of the exception being handled."""
        self._emit(logging.ERROR, message, fields, exc_info=True)

    def _emit(self, level: int, message: str, fields: Mapping[str, object], exc_info: bool = False) -> None:
        logger = self._logger
        if not logger.isEnabledFor(level):
            return
        if _LINES and _ROOT.handlers == _LINES and not logger.handlers and not exc_info:
            # Straight to the stream: a record that nobody else sees costs more than the line itself.
            _LINES[0].put(
                line_of(time.time(), logging.getLevelName(level), logger.name, message, {**self._fields, **fields})
            )
        else:
            logger.log(level, message, extra={"moe_fields": {**self._fields, **fields}}, exc_info=exc_info)

    def info_soon(self, message: str, fields: Mapping[str, object]) -> bool:
        """As info, for a line that may be lost if the process dies at once. True: it waits for `flush`, for the next
        line that does not wait, or for enough of its kind."""
        logger = self._logger
        if not (_LINES and _ROOT.handlers == _LINES and not logger.handlers):
            self._emit(logging.INFO, message, fields)
        elif logger.isEnabledFor(logging.INFO):
            line = line_of(time.time(), "INFO", logger.name, message, {**self._fields, **fields})
            return _LINES[0].keep(line)
        return False


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (RFC 3339, UTC), level, logger, msg, then the bound fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "moe_fields", {})
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        return line_of(record.created, record.levelname, record.name, record.getMessage(), fields)


def line_of(unix_s: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> str:
    """One JSON object, without its line end and without any secret."""
    second = int(unix_s)
    head: dict[str, Any] = {
        "time": f"{_second(second)}.{int((unix_s - second) * 1000):03d}Z",
        "level": level.lower(),
        "logger": logger,
        "msg": message,
    }
    try:
        if fields.keys() <= _HARMLESS or _harmless(fields):
            line = orjson.dumps(head | fields, default=str, option=orjson.OPT_NON_STR_KEYS)
            # A second brace may be a mapping with names of its own.
            if line.find(b"{", 1) < 0 and not _MARKS.search(line):
                return line.decode()
        head["msg"] = redact(message)
        clean = {**head, **redact(fields)}
        return orjson.dumps(clean, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # an integer beyond 64 bits, or half a surrogate pair
        head["msg"] = redact(message)
        return json.dumps({**head, **redact(fields)}, default=str)


def _harmless(fields: Mapping[str, Any]) -> bool:
    """Whether none of the names says that its value is a secret. Names are our own words, so they are few."""
    if not all(isinstance(name, str) for name in fields) or any(secret_name(name) for name in fields):
        return False
    if len(_HARMLESS) < NAMES_MAX:
        _HARMLESS.update(fields)
    return True


class _Lines(logging.StreamHandler[TextIO]):
    """Lines to a stream, in order: each at once, or some together."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._kept: list[str] = []

    def put(self, line: str) -> None:
        self._kept.append(line)
        self.flush()

    def keep(self, line: str) -> bool:
        """Whether it waits now."""
        self._kept.append(line)
        if len(self._kept) < KEPT_MAX:
            return True
        self.flush()
        return False

    def emit(self, record: logging.LogRecord) -> None:
        self.put(self.format(record))

    def flush(self) -> None:
        """Write what waits. Python's logging calls it too, when the process ends."""
        with self.lock or contextlib.nullcontext():
            if not self._kept:
                return
            lines, self._kept = self._kept, []
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more, or the stream is closed
                self.stream.write("\n".join(lines) + "\n")
                self.stream.flush()


def flush() -> None:
    """Write every line that waits."""
    for lines in _LINES:
        lines.flush()


_ROOT = logging.getLogger("moestack")
_LINES: list[_Lines] = []
"""The handler that `configure` has set, alone."""


@lru_cache(maxsize=4)
def _second(unix_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))


def get_log(name: str, **fields: object) -> Log:
    """A logger below `moestack`, with fields that every line of it carries."""
    return Log(logging.getLogger(f"moestack.{name}"), fields)


def configure(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send every moestack log line to `stream` (stderr by default) as JSON. Called once by each process."""
    _ROOT.setLevel(level.upper())
    _ROOT.propagate = False
    for handler in list(_ROOT.handlers):
        _ROOT.removeHandler(handler)
    lines = _Lines(stream or sys.stderr)
    lines.setFormatter(JsonFormatter())
    _ROOT.addHandler(lines)
    _LINES[:] = [lines]
