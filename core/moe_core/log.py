"""The one logger: a JSON object per line, with bound fields, and no secret in it."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TextIO

import orjson

from moe_api.redact import REDACTED as REDACTED  # noqa: PLC0414 - exported from here
from moe_api.redact import redact as redact  # noqa: PLC0414


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
        if self._logger.isEnabledFor(level):
            self._logger.log(level, message, extra={"moe_fields": {**self._fields, **fields}}, exc_info=exc_info)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (RFC 3339, UTC), level, logger, msg, then the bound fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": redact(record.getMessage()),
        }
        line.update(redact(getattr(record, "moe_fields", {})))
        if record.exc_info:
            line["exception"] = redact(self.formatException(record.exc_info))
        try:
            return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # an integer beyond 64 bits, or half a surrogate pair
            return json.dumps(line, default=str)


@lru_cache(maxsize=4)
def _second(unix_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))


def get_log(name: str, **fields: object) -> Log:
    """A logger below `moestack`, with fields that every line of it carries."""
    return Log(logging.getLogger(f"moestack.{name}"), fields)


def configure(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send every moestack log line to `stream` (stderr by default) as JSON. Called once by each process."""
    root = logging.getLogger("moestack")
    root.setLevel(level.upper())
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root.addHandler(handler)
