"""Answers in the form of Anthropic's messages API: chat answers and events translated, Anthropic's own passed on."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Iterable, Iterator
from typing import Any

import orjson

from moe_gateway.exchange import Exchange, Header
from moe_gateway.openai_api import ApiError, read_usage
from moe_gateway.responder import Responder
from moe_gateway.sse import event_end, payload_of

_STOP = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Types of error by status (docs.claude.com, API, errors)."""


class MessagesResponder(Responder):
    """Takes what a `Responder` takes, in OpenAI's form, and gives Anthropic's. While `native` is set the bytes are
    Anthropic's already."""

    def __init__(self, exchange: Exchange, request_id: str) -> None:
        super().__init__(exchange, request_id)
        self.add_header(b"request-id", request_id)
        self._request_id = request_id
        self._stream: MessageEvents | None = None

    async def start(self, status: int, headers: Iterable[Header]) -> None:
        if status == 200 and not self.native and any(value.startswith(b"text/event-stream") for _, value in headers):
            self._stream = MessageEvents(self._request_id)
        await super().start(status, headers)

    async def write(self, data: bytes) -> None:
        if out := self._form(data):
            await super().write(out)

    def write_soon(self, data: bytes) -> Awaitable[None] | None:
        out = self._form(data)
        return super().write_soon(out) if out else None

    async def finish(self, data: bytes = b"") -> None:
        if self._stream is not None:
            data = self._stream.feed(data) + self._stream.end()
            self._stream = None
        await super().finish(data)

    async def whole(self, status: int, content_type: bytes, body: bytes, headers: Iterable[Header] = ()) -> None:
        if status != 200:
            body = error_from(status, body, self._request_id)
            content_type = b"application/json"
        elif not self.native:
            body = message_from(orjson.loads(body))
        await super().whole(status, content_type, body, headers)

    def _form(self, data: bytes) -> bytes:
        return data if self._stream is None else self._stream.feed(data)

    async def error(self, error: ApiError) -> None:
        if self.started and not self.finished:
            self._stream = None
            body = error_document(error.status, error.message, self._request_id)
            await self.finish(b"event: error\ndata: " + body + b"\n\n")
            return
        await super().error(error)


def error_document(status: int, message: str, request_id: str) -> bytes:
    """An error in Anthropic's form."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})


def error_from(status: int, body: bytes, request_id: str) -> bytes:
    """An error body of OpenAI's form, or of none, in Anthropic's."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return error_document(status, message if isinstance(message, str) else f"HTTP {status}", request_id)


def message_from(completion: dict[str, Any]) -> bytes:
    """A whole chat completion as a message."""
    choice = completion["choices"][0]
    said = choice["message"]
    content: list[dict[str, Any]] = []
    if thoughts := said.get("reasoning") or said.get("reasoning_content"):
        content.append({"type": "thinking", "thinking": thoughts, "signature": ""})
    if text := said.get("content") or said.get("refusal"):
        content.append({"type": "text", "text": text})
    for call in said.get("tool_calls") or ():
        function = call["function"]
        content.append(
            {"type": "tool_use", "id": call["id"], "name": function["name"], "input": _object(function["arguments"])}
        )
    reason, sequence = _stop(choice)
    return orjson.dumps(
        {
            "id": _message_id(completion.get("id")),
            "type": "message",
            "role": "assistant",
            "model": completion.get("model", ""),
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": _usage(completion),
        }
    )


class MessageEvents:
    """Chat chunks as the events of one message. Feed it whole events."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._open: tuple[str, int] | None = None
        """Kind of the block that is being written, and for a tool its place among the calls."""
        self._index = -1
        self._begun = False
        self._ended = False
        self._stop: tuple[str, str | None] | None = None
        self._usage: dict[str, Any] | None = None

    def feed(self, data: bytes) -> bytes:
        out: list[bytes] = []
        start = 0
        while start < len(data) and not self._ended:
            end = event_end(data, start) or len(data)
            out.extend(self._event(payload_of(data[start:end])))
            start = end
        return b"".join(out)

    def end(self) -> bytes:
        """The message's end, where the answer has one and it has not been written."""
        if self._ended or self._stop is None:
            return b""
        self._ended = True
        reason, sequence = self._stop
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        usage = self._usage or {"output_tokens": 0}
        return b"".join(
            (
                *self._close(),
                _event("message_delta", delta=delta, usage=usage),
                _event("message_stop"),
            )
        )

    def _event(self, payload: bytes) -> Iterator[bytes]:
        if payload == b"[DONE]":
            yield self.end()
            return
        if not payload:
            return
        chunk = orjson.loads(payload)
        if chunk.get("error") is not None:
            error = chunk["error"]
            message = error.get("message") if isinstance(error, dict) else None
            yield self._failed(message if isinstance(message, str) else "the model failed")
            return
        try:
            yield from self._chunk(chunk)
        except (AttributeError, KeyError, TypeError):  # an engine that writes chunks of a form of its own
            yield self._failed("the model sent a malformed event")

    def _failed(self, message: str) -> bytes:
        self._ended = True
        return b"event: error\ndata: " + error_document(500, message, self._request_id) + b"\n\n"

    def _chunk(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            yield _event("message_start", message=_beginning(chunk))
        if read_usage(chunk) is not None:
            self._usage = _usage(chunk)
        for choice in chunk.get("choices") or ():
            yield from self._delta(choice.get("delta") or {})
            if choice.get("finish_reason") is not None:
                self._stop = _stop(choice)

    def _delta(self, delta: dict[str, Any]) -> Iterator[bytes]:
        if thoughts := delta.get("reasoning") or delta.get("reasoning_content"):
            yield from self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._more({"type": "thinking_delta", "thinking": thoughts})
        if text := delta.get("content") or delta.get("refusal"):
            yield from self._block("text", {"type": "text", "text": ""})
            yield self._more({"type": "text_delta", "text": text})
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            place = call.get("index", 0)
            if self._open != ("tool_use", place):
                name, id_ = function.get("name") or "", call.get("id") or f"toolu_{uuid.uuid4().hex}"
                yield from self._block("tool_use", {"type": "tool_use", "id": id_, "name": name, "input": {}}, place)
            if function.get("arguments"):
                yield self._more({"type": "input_json_delta", "partial_json": function["arguments"]})

    def _block(self, kind: str, block: dict[str, Any], place: int = 0) -> Iterator[bytes]:
        """Begin a block, unless it is open."""
        if self._open == (kind, place):
            return
        yield from self._close()
        self._open, self._index = (kind, place), self._index + 1
        yield _event("content_block_start", index=self._index, content_block=block)

    def _more(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            self._open = None
            yield _event("content_block_stop", index=self._index)


def _beginning(chunk: dict[str, Any]) -> dict[str, Any]:
    """The empty message. Its usage is told at the end, when the engine has counted it."""
    return {
        "id": _message_id(chunk.get("id")),
        "type": "message",
        "role": "assistant",
        "model": chunk.get("model", ""),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"


def _message_id(chat_id: object) -> str:
    return f"msg_{chat_id}" if isinstance(chat_id, str) and chat_id else f"msg_{uuid.uuid4().hex}"


def _stop(choice: dict[str, Any]) -> tuple[str, str | None]:
    """Stop reason and stop sequence: vLLM tells in `stop_reason` which of the request's sequences was met."""
    reason, met = choice.get("finish_reason"), choice.get("stop_reason")
    if reason == "stop" and isinstance(met, str):
        return "stop_sequence", met
    return _STOP.get(str(reason), "end_turn"), None


def _usage(document: dict[str, Any]) -> dict[str, Any]:
    """Usage in Anthropic's form, where cached input is counted apart."""
    seen = read_usage(document)
    if seen is None:
        return {"input_tokens": 0, "output_tokens": 0}
    return {
        "input_tokens": seen.prompt_tokens - seen.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": seen.cached_tokens,
        "output_tokens": seen.output_tokens,
    }


def _object(text: str) -> dict[str, Any]:
    """Arguments of a call; what a model wrote that is no JSON object is kept as text."""
    try:
        value = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {"arguments": text}
