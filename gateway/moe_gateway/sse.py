"""Reads server-sent events in passing: bytes go on as they came, whole events at a time, while tokens are counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import orjson

from moe_gateway.openai_api import Usage, read_usage

MAX_EVENT_BYTES = 1 << 20
_CONTENT_FIELDS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call", "audio")
_RESPONSE_ENDS = frozenset({"response.completed", "response.incomplete"})


class StreamReader(ABC):
    """Reads an upstream's stream in passing: takes its bytes, gives events in OpenAI's form, keeps what it saw."""

    def __init__(self) -> None:
        self._buffer = b""
        self.content_events = 0
        """Events with content so far: text, reasoning, a refusal, a tool call. A role, a ping, a comment are none."""
        self.done = False
        """The upstream's own end of the stream was seen: nothing follows."""
        self.finished = False
        """A finish reason was seen: the answer is whole, even if the connection now ends."""
        self.malformed = False
        self.error: object | None = None
        self.keep_error = True
        """Whether an error event goes on. A closed API's may quote our key."""
        self.usage: Usage | None = None
        self.prompt_tokens: int | None = None
        """Prompt tokens as the upstream told them early, for a stream that breaks before its usage."""

    @property
    def complete(self) -> bool:
        """Whether the stream may end here: its own end or a finish reason was seen."""
        return self.done or self.finished

    @property
    def broken(self) -> bool:
        return self.malformed or self.error is not None

    @property
    @abstractmethod
    def counted_tokens(self) -> int:
        """Output tokens so far, for a stream that tells no usage."""

    @abstractmethod
    def feed(self, chunk: bytes) -> bytes:
        """Take a chunk; return every whole event that is now complete."""

    @abstractmethod
    def flush(self) -> bytes:
        """At the end of the upstream's bytes: what is left."""


class SseScanner(StreamReader):
    """Feed it chunks; it gives back the bytes to send on, and keeps what it saw.

    Only whole events are given back, so that an error event can follow at any time. With `strip_usage` the final
    usage event, which the client did not ask for, is left out. After `malformed`, `error` or [DONE] nothing is read.
    """

    def __init__(self, strip_usage: bool = False, keep_error: bool = True) -> None:
        super().__init__()
        self._strip_usage = strip_usage
        self.keep_error = keep_error

    @property
    def counted_tokens(self) -> int:
        """OpenAI's servers send about one in an event."""
        return self.content_events

    def feed(self, chunk: bytes) -> bytes:
        if not self._buffer and chunk.startswith(b"data: {") and chunk.endswith(b"}\n\n") and chunk.count(b"\n") == 2:
            return self._single(chunk)
        data = self._buffer + chunk if self._buffer else chunk
        unix, dos = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
        end = max(unix + 2 if unix >= 0 else 0, dos + 4 if dos >= 0 else 0)
        self._buffer = data[end:]
        if len(self._buffer) > MAX_EVENT_BYTES:
            self.malformed = True
            return b""
        return self._read(data[:end]) if end else b""

    def _single(self, event: bytes) -> bytes:
        """One whole event of one line, which is what nearly every chunk of a stream is."""
        if self.broken or self.done:
            return b""
        try:
            document = orjson.loads(event[6:])
        except orjson.JSONDecodeError:
            self.malformed = True
            return b""
        return event if self._object(document) else b""

    def flush(self) -> bytes:
        """At the end of the upstream's bytes: the last event, with the blank line that it lacks, without which clients
        take it for half an event."""
        tail, self._buffer = self._buffer.rstrip(b"\r\n"), b""
        return self._read(tail + b"\n\n") if tail.strip() else b""

    def _read(self, data: bytes) -> bytes:
        kept: list[bytes] | None = None
        start = 0
        while start < len(data) and not self.broken and not self.done:
            end = event_end(data, start) or len(data)
            event = data[start:end]
            keep = self._event(event)
            if self.malformed:
                keep = False
            if kept is not None and keep:
                kept.append(event)
            elif kept is None and not keep:
                kept = [data[:start]]
            start = end
        if kept is not None:
            return b"".join(kept)
        return data if start >= len(data) else data[:start]

    def _event(self, event: bytes) -> bool:
        """Look at one event; False where it is not to be sent on."""
        payload = payload_of(event)
        if not payload:
            return True
        if payload == b"[DONE]":
            self.done = True
            return True
        try:
            document = orjson.loads(payload)
        except orjson.JSONDecodeError:
            self.malformed = True
            return False
        return self._object(document)

    def _object(self, document: object) -> bool:
        """Look at the data of one event; False where it is not to be sent on."""
        if not isinstance(document, dict):
            self.malformed = True
            return False
        if document.get("error") is not None:
            self.error = document["error"]
            return self.keep_error
        return self._document(document)

    def _document(self, document: dict[str, Any]) -> bool:
        kind = document.get("type")
        if isinstance(kind, str):
            self._response_event(kind, document)
        usage = read_usage(document) if document.get("usage") is not None else None
        if usage is not None:
            self.usage = usage
        choices = document.get("choices")
        if not isinstance(choices, list) or not choices:
            return not (self._strip_usage and usage is not None)
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            if choice.get("finish_reason") is not None:
                self.finished = True
            delta = choice.get("delta")
            if choice.get("text") or (isinstance(delta, dict) and _has_content(delta)):
                self.content_events += 1
        return True

    def _response_event(self, kind: str, document: dict[str, Any]) -> None:
        """An event of the Responses API, which has a type, and no choices and no [DONE]."""
        if kind in _RESPONSE_ENDS:
            self.finished = True
            self.usage = read_usage(document.get("response")) or self.usage
        elif kind in {"response.failed", "error"}:
            self.error = document
        elif kind.startswith("response.") and kind.endswith(".delta"):
            self.content_events += 1


def _has_content(delta: dict[str, Any]) -> bool:
    # Asked first of what nearly every event has.
    return bool(delta.get("content")) or any(delta.get(name) for name in _CONTENT_FIELDS)


def payload_of(event: bytes) -> bytes:
    """The data of one event, without its field names."""
    lines = event.replace(b"\r\n", b"\n").split(b"\n")
    return b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))


def event_end(data: bytes, start: int) -> int | None:
    """Index just past the event that begins at `start`, with its blank line; None where that has not come."""
    unix = data.find(b"\n\n", start)
    dos = data.find(b"\r\n\r\n", start)
    ends = [at + size for at, size in ((unix, 2), (dos, 4)) if at >= 0]
    return min(ends, default=None)


def without_last(events: bytes) -> tuple[bytes, bytes]:
    """Whole events, and the last of them apart."""
    start = 0
    while (end := event_end(events, start)) is not None and end < len(events):
        start = end
    return events[:start], events[start:]
