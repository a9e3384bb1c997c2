"""Moments as others read them: RFC 3339 in UTC with whole seconds."""

from __future__ import annotations

from datetime import UTC, datetime


def rfc3339(unix_s: float) -> str:
    """1700000000 → 2023-11-14T22:13:20Z."""
    return datetime.fromtimestamp(int(unix_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unix_s(text: str | None) -> int | None:
    """The other way; None for what is no RFC 3339 time, and for None."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return int(moment.timestamp()) if moment.tzinfo is not None else None
