"""What adapters have in common whose provider does not speak OpenAI's form: requests, and streams event by event."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import orjson

from moe_gateway.openai_api import ApiRequest
from moe_gateway.providers import chat
from moe_gateway.providers.base import Adapter, Refusal, Unsupported
from moe_gateway.sse import MAX_EVENT_BYTES, StreamReader, event_end, payload_of

BYTES_PER_TOKEN = 3
"""Output of a stream that broke before its usage is counted by its bytes, because these providers send several tokens
in one event. Three is below the four or so of English, so that the count is not below the bill."""


class TranslatedAdapter(Adapter):
    """Base of adapters that translate a chat request: one translation says both what is sent and what is refused."""

    def takes(self, request: ApiRequest) -> Unsupported | None:
        if (other := chat.not_chat(request)) is not None:
            return other
        try:
            self.document(request, None)
        except Refusal as refusal:
            return refusal.unsupported
        except chat.MALFORMED:
            return chat.NO_FORM
        return None

    def body(self, request: ApiRequest, output_cap: int | None) -> bytes:
        return orjson.dumps(self.document(request, output_cap))

    @abstractmethod
    def document(self, request: ApiRequest, output_cap: int | None) -> dict[str, Any]:
        """The request in the provider's form. Raises Refusal."""


class Translation(StreamReader):
    """Base of translated streams. `raw`: give the provider's bytes as they are, and only keep what is seen."""

    def __init__(self, *, created: int, include_usage: bool, raw: bool = False) -> None:
        super().__init__()
        self._created = created
        self._include_usage = include_usage
        self._raw = raw
        self._content_bytes = 0
        self.id = ""
        self.model = ""
        self.reasoning_tokens = 0

    @property
    def counted_tokens(self) -> int:
        """Output tokens so far, counted by bytes; never fewer than content events."""
        return max(self.content_events, -(-self._content_bytes // BYTES_PER_TOKEN))

    def feed(self, chunk: bytes) -> bytes:
        data = self._buffer + chunk if self._buffer else chunk
        start, out = 0, []
        while not self.broken and not self.done and (end := event_end(data, start)) is not None:
            out.append(self._event(data[start:end]))
            start = end
        self._buffer = data[start:]
        if len(self._buffer) > MAX_EVENT_BYTES:
            self.malformed = True
        return b"".join(out)

    def flush(self) -> bytes:
        tail, self._buffer = self._buffer, b""
        out = self._event(tail) if tail.strip() and not self.broken and not self.done else b""
        if self.finished and not self.done and not self.broken and not self._raw:
            out += self.end()
        return out

    @abstractmethod
    def documents(self, document: dict[str, Any]) -> Iterator[bytes]:
        """OpenAI's events for one of the provider's. Sets `finished`, `usage`, `error` and `id` as they come."""

    def end(self) -> bytes:
        """What closes OpenAI's stream: the usage, where it was asked for, and [DONE]."""
        self.done = True
        tail = b""
        if self._include_usage and self.usage is not None:
            seen = self.usage
            usage = chat.usage_document(
                seen.prompt_tokens, seen.output_tokens, seen.cached_tokens, self.reasoning_tokens
            )
            tail = b"data: " + orjson.dumps({**self._head(), "choices": [], "usage": usage}) + b"\n\n"
        return tail + b"data: [DONE]\n\n"

    def content(self, delta: dict[str, Any], text: str, index: int = 0, **more: Any) -> bytes:
        """An event that holds content: `text` is what of it is counted."""
        self.content_events += 1
        self._content_bytes += len(text.encode())
        return self.chunk(delta, index=index, **more)

    def chunk(self, delta: dict[str, Any], finish: str | None = None, index: int = 0, **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None, **more}
        return b"data: " + orjson.dumps({**self._head(), "choices": [choice]}) + b"\n\n"

    def fail(self, error: dict[str, Any]) -> bytes:
        """The provider's error in band, without its words: they may quote our key."""
        self.error = error
        kind = error.get("type", error.get("status", "upstream_error"))
        return b"data: " + chat.error_body("the model failed", kind) + b"\n\n"

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self._created, "model": self.model}

    def _event(self, event: bytes) -> bytes:
        payload = payload_of(event)
        if not payload:
            return event if self._raw else b""
        try:
            document = orjson.loads(payload)
        except orjson.JSONDecodeError:
            document = None
        if not isinstance(document, dict):
            self.malformed = True
            return b""
        try:
            translated = b"".join(self.documents(document))
        except (AttributeError, KeyError, TypeError, ValueError):  # a field of another form than the provider's own
            self.malformed = True
            return b""
        if self._raw and self.error is not None:  # its words are the provider's
            self.keep_error = False
            return b""
        return event if self._raw else translated
