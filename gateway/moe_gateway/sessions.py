"""Which session a request belongs to, by what the configuration says tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from moe_api.enums import SessionKey
from moe_core.sessions import session_key
from moe_gateway.openai_api import ApiRequest

HEADER = b"x-moestack-session"
TEXT_HEAD = 1024
"""Characters of a prompt that is one text, by which it is known again when more has been said."""
HEAD_BYTES = 16384


def session_of(
    by: Sequence[SessionKey], headers: Mapping[bytes, bytes], request: ApiRequest, tenant: str | None
) -> str | None:
    """The key of a request's session, by the first of `by` that it has; None where it has none. Tenants share none."""
    for kind in by:
        told = _told(kind, headers, request.document)
        if told:
            return session_key(kind.value, tenant or "", told)
    return None


def _told(kind: SessionKey, headers: Mapping[bytes, bytes], document: Mapping[str, Any]) -> str | None:
    if kind is SessionKey.HEADER:
        return headers.get(HEADER, b"").decode("latin-1").strip()
    if kind is SessionKey.PROMPT_HEAD:
        return _head(document)
    value = document.get("user" if kind is SessionKey.USER else "prompt_cache_key")
    return value if isinstance(value, str) else None


def _head(document: Mapping[str, Any]) -> str | None:
    """What stays the same in each turn of a conversation: all up to the user's first message, or how a text begins."""
    for name in ("messages", "input", "prompt"):
        prompt = document.get(name)
        if isinstance(prompt, str):
            return prompt[:TEXT_HEAD]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            last = next((at for at, each in enumerate(prompt) if _is_users(each)), len(prompt))
            return orjson.dumps(prompt[: last + 1])[:HEAD_BYTES].decode(errors="replace")
    return None


def _is_users(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") == "user"
