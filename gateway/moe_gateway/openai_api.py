"""The OpenAI API as the gateway needs it: what to read of a request, how to change it for a target, how errors look."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson

IMAGE_TOKENS_BOUND = 8192
"""Most prompt tokens that one image, audio or file part is reserved for."""


class Endpoint(StrEnum):
    """An API call by its path below the base URL."""

    CHAT = "/chat/completions"
    COMPLETIONS = "/completions"
    EMBEDDINGS = "/embeddings"
    RESPONSES = "/responses"
    MESSAGES = "/messages"
    """Anthropic's. A request of it is a chat request once it is read."""


class ApiError(Exception):
    """An answer in OpenAI's error form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.close = close

    def body(self) -> bytes:
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.kind, "code": self.code, "param": self.param}}
        )

    def event(self) -> bytes:
        """The same as a server-sent event, for a stream that has begun. No [DONE] follows it."""
        return b"data: " + self.body() + b"\n\n"


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A request, read as far as routing needs; `raw` goes upstream unchanged where nothing must change."""

    endpoint: Endpoint
    raw: bytes
    model: str
    stream: bool = False
    include_usage: bool = False
    output_limit: int | None = None
    choices: int = 1
    messages: dict[str, Any] | None = None
    """The request in Anthropic's messages form, where it came in that; `document` and `raw` are its translation."""
    verdicts: dict[object, object] = field(default_factory=dict, compare=False, repr=False)
    """What adapters have said of it, so that a decision that is made again does not translate again."""
    document: dict[str, Any] = field(default_factory=dict)


def parse(endpoint: Endpoint, raw: bytes) -> ApiRequest:
    """Read a request. Raises ApiError 400 for what is no JSON object or has no model name."""
    return read_request(endpoint, raw, read_object(raw))


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError 400."""
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return document


def read_request(
    endpoint: Endpoint, raw: bytes, document: dict[str, Any], messages: dict[str, Any] | None = None
) -> ApiRequest:
    """What routing needs of a request. Raises ApiError 400 where it has no model name."""
    model = document.get("model")
    if not isinstance(model, str) or not model:
        raise ApiError(400, "model: a model name is needed", code="missing_required_parameter", param="model")
    stream = document.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise ApiError(400, "stream: must be true or false", code="invalid_type", param="stream")
    options = document.get("stream_options")
    limits = [_count(document.get(name)) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
    given = [limit for limit in limits if limit is not None]
    return ApiRequest(
        endpoint=endpoint,
        raw=raw,
        model=model,
        stream=bool(stream) and endpoint is not Endpoint.EMBEDDINGS,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        output_limit=max(given) if given else None,
        choices=max(_count(document.get("n")) or 1, _count(document.get("best_of")) or 1) * _prompts(document),
        messages=messages,
        document=document,
    )


def prompt_bound(request: ApiRequest) -> int:
    """Most prompt tokens that the request can have: a token is at least a byte, and template tokens are fewer than
    the bytes of JSON around a text. Parts that are no text count `IMAGE_TOKENS_BOUND` each."""
    media = 0
    messages = request.document.get("messages")
    for message in messages if isinstance(messages, list) else ():
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, list):
            media += sum(isinstance(part, dict) and part.get("type") not in {"text", "refusal"} for part in parts)
    return len(request.raw) + media * IMAGE_TOKENS_BOUND


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the upstream counted them."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    """Those prompt tokens that were read from the provider's cache; part of `prompt_tokens`."""


def read_usage(document: object) -> Usage | None:
    """The usage in an answer or a stream event, if it is there and makes sense. The Responses API has other names."""
    usage = document.get("usage") if isinstance(document, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt = _count(usage.get("prompt_tokens", usage.get("input_tokens")))
    output = _count(usage.get("completion_tokens", usage.get("output_tokens", 0)))
    if prompt is None or output is None:
        return None
    details = usage.get("prompt_tokens_details", usage.get("input_tokens_details"))
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return Usage(prompt, output, min(cached or 0, prompt))


def _count(value: object) -> int | None:
    """A non-negative integer, or None. Nonsense is left for the upstream to refuse."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _prompts(document: dict[str, Any]) -> int:
    """How many prompts a completions call holds."""
    prompt = document.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
