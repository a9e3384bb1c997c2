"""What the client port really serves, as one table: the OpenAPI document is made from it, and tests are held to it.

Requests are described as far as the gateway itself reads them. What else a body holds is the engine's or the target's
to judge, so further fields are allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from moe_gateway.openai_api import Endpoint

OPENAPI_PATH = "/openapi.json"
Json = dict[str, Any]
_COUNT: Json = {"type": "integer", "minimum": 1}
_TEXT: Json = {"type": "string"}
_OBJECT: Json = {"type": "object"}
_EVENT: Json = {"type": "object", "properties": {"event": _TEXT, "data": _TEXT}}
"""One server-sent event by its fields."""


@dataclass(frozen=True)
class Route:
    """One call."""

    method: str
    path: str
    summary: str
    body: Mapping[str, Json] | None = None
    """Fields of its JSON body that the gateway reads; None: it has no body."""
    required: tuple[str, ...] = ()
    anthropic: bool = False
    """Whether its errors have Anthropic's form."""
    streams: bool = False
    open: bool = False
    """Whether it may be asked without a key."""


_CHAT: Mapping[str, Json] = {
    "model": _TEXT,
    "messages": {"type": "array", "items": _OBJECT},
    "stream": {"type": "boolean"},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "max_tokens": _COUNT,
    "max_completion_tokens": _COUNT,
    "n": _COUNT,
}
ROUTES = (
    Route("POST", "/v1" + Endpoint.CHAT.value, "A chat completion", _CHAT, ("model", "messages"), streams=True),
    Route(
        "POST",
        "/v1" + Endpoint.COMPLETIONS.value,
        "A completion of text",
        {"model": _TEXT, "prompt": _TEXT, "stream": {"type": "boolean"}, "max_tokens": _COUNT, "n": _COUNT},
        ("model", "prompt"),
        streams=True,
    ),
    Route(
        "POST", "/v1" + Endpoint.EMBEDDINGS.value, "Embeddings", {"model": _TEXT, "input": _TEXT}, ("model", "input")
    ),
    Route(
        "POST",
        "/v1" + Endpoint.RESPONSES.value,
        "A response of OpenAI's Responses API; none is stored",
        {"model": _TEXT, "input": _TEXT, "stream": {"type": "boolean"}, "max_output_tokens": _COUNT},
        ("model", "input"),
        streams=True,
    ),
    Route(
        "POST",
        "/v1" + Endpoint.MESSAGES.value,
        "A message of Anthropic's Messages API",
        {
            "model": _TEXT,
            "messages": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["role", "content"],
                    "properties": {"role": {"enum": ["user", "assistant"]}, "content": _TEXT},
                },
            },
            "max_tokens": _COUNT,
            "stream": {"type": "boolean"},
        },
        ("model", "messages", "max_tokens"),
        anthropic=True,
        streams=True,
    ),
    Route("GET", "/v1/models", "The models that are served: one"),
    Route("GET", "/v1/models/{model}", "One model"),
    Route("GET", OPENAPI_PATH, "This document", open=True),
)
ERRORS: Mapping[int, str] = {
    400: "the request is not understood, or what it asks for is not served",
    401: "no good key or token came with it",
    403: "its tier or key may not ask for this",
    404: "there is no such model or path",
    405: "the path takes another method",
    408: "the request did not arrive in time",
    413: "the body is too large",
    414: "the address is too long",
    429: "the key's limit is reached; see Retry-After",
    431: "the headers are too large",
    500: "the gateway failed",
    502: "the model answered badly",
    503: "the model is not available, or the gateway is stopping; see Retry-After",
    529: "the model is overloaded; see Retry-After",
}
"""Statuses of errors that the gateway itself answers. An engine's own client errors pass on as they came."""


def document(model: str) -> bytes:
    """The OpenAPI 3.1 document of a gateway that serves this model."""
    paths: dict[str, Json] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, model)
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": "moestack gateway", "version": "1", "description": f"Serves {model}."},
            "paths": paths,
            "components": {
                "schemas": {"Error": _error_schema(), "AnthropicError": _anthropic_error_schema()},
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
                },
            },
        }
    )


def _operation(route: Route, model: str) -> Json:
    good: Json = {"application/json": {"schema": _OBJECT}}
    if route.streams:
        good["text/event-stream"] = {"schema": _EVENT}
    form = "AnthropicError" if route.anthropic else "Error"
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{form}"}}}
    made: Json = {
        "summary": route.summary,
        "responses": {
            "200": {"description": "the answer", "content": good},
            **{str(status): {"description": text, "content": error} for status, text in ERRORS.items()},
        },
        "security": [] if route.open else [{"bearer": []}, {"x-api-key": []}, {"api-key": []}, {}],
    }
    if route.body is not None:
        schema = {"type": "object", "properties": dict(route.body), "required": list(route.required)}
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{model}" in route.path:
        place = {"name": "model", "in": "path", "required": True, "schema": _TEXT, "example": model}
        made["parameters"] = [place]
    return made


def _error_schema() -> Json:
    text_or_null = {"type": ["string", "null"]}
    fields: Json = {"message": _TEXT, "type": _TEXT, "code": text_or_null, "param": text_or_null}
    error = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}


def _anthropic_error_schema() -> Json:
    error = {"type": "object", "properties": {"type": _TEXT, "message": _TEXT}, "required": ["type", "message"]}
    return {"type": "object", "properties": {"type": {"const": "error"}, "error": error}, "required": ["type", "error"]}
