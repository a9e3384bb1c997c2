"""Secrets out of what people read: the one redaction, used by errors here and by the logger above."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

_SECRET_NAMES = re.compile(r"(api[-_]?key|authorization|secret|token|password|credential)$", re.IGNORECASE)
_SECRET_VALUES = re.compile(
    r"(sk-[A-Za-z0-9_-]{8,}|Bearer\s+\S{8,}|AIza[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{16,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----)"
)
SECRET_MARKS = ("sk-", "Bearer", "AIza", "hf_", "-----BEGIN ")
"""What every match of `_SECRET_VALUES` begins with: a text with none of them holds no secret by its look."""
REDACTED = "[redacted]"


@lru_cache(maxsize=1024)  # a log line asks for the same two dozen names, for every request
def secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret by its name alone."""
    return bool(_SECRET_NAMES.search(name))


def redact(value: object) -> Any:
    """The value without secrets: by the name of a field, and by the look of a key inside a string."""
    if isinstance(value, str):
        return _SECRET_VALUES.sub(REDACTED, value)
    if isinstance(value, Mapping):
        return {
            str(name): REDACTED if secret_name(str(name)) and isinstance(item, str) else redact(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value
