"""OpenAI's chat form read for a translation: messages as turns of parts, and answers written in that form.

What a field says is checked as far as the other form needs it; `Refusal` names the field that cannot be said there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from moe_gateway.openai_api import ApiRequest, Endpoint
from moe_gateway.providers.base import Refusal, Unsupported

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+);base64,(.*)", re.DOTALL)
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stop": ([],),
    "temperature": (1, 1.0),
    "tool_choice": (),
    "tools": ([],),
    "top_logprobs": (0,),
    "top_p": (1, 1.0),
    "verbosity": ("medium",),
}
"""Values that ask for what OpenAI does by default: they need no counterpart elsewhere."""
MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
"""What a translation meets where a request is not of OpenAI's form; our engine tells the client what is wrong."""
NO_FORM = Unsupported("body", "is not of the form of OpenAI's chat API")
ROUTING = frozenset({"messages", "model", "stream", "stream_options"})
"""Fields that the gateway itself answers for."""


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image: bytes in base64 with their media type, or an address."""

    media_type: str | None
    data: str | None
    url: str | None


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: dict[str, Any]
    signature: str | None = None
    """What Gemini wants back with the call, where it was Gemini's."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    id: str
    text: str
    where: str


Part = Text | Image | ToolCall | ToolResult


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said without a break. `user` turns hold tool results too."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    system: tuple[str, ...]
    turns: tuple[Turn, ...]


def asked(request: ApiRequest) -> dict[str, Any]:
    """The fields of a chat request that ask for something, without those that the gateway answers for."""
    document = request.document
    return {
        name: value
        for name, value in document.items()
        if name not in ROUTING and value is not None and not _neutral(name, value)
    }


def not_chat(request: ApiRequest) -> Unsupported | None:
    """Only chat is translated."""
    if request.endpoint is Endpoint.CHAT:
        return None
    return Unsupported(request.endpoint.value.removeprefix("/"), "of this target only chat completions can be asked")


def conversation(messages: object) -> Conversation:
    """Messages as turns; neighbours of one side become one turn. Raises Refusal."""
    system: list[str] = []
    turns: list[Turn] = []
    for index, message in enumerate(_list(messages, "messages")):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise Refusal(where, "must be an object")
        role = message.get("role")
        known = {"role", "content", "refusal", "tool_calls", "tool_call_id", "name" if role == "tool" else "role"}
        for name, value in message.items():
            if name not in known and value not in (None, [], {}):
                raise Refusal(f"{where}.{name[:100]}", "has no counterpart at this target; leave it out")
        if role in {"system", "developer"}:
            if turns:
                raise Refusal(f"{where}.role", "put system and developer messages first")
            system.append(_text(message.get("content"), f"{where}.content"))
            continue
        side, parts = _turn(message, role, where)
        if turns and turns[-1].role == side:
            parts = (*turns.pop().parts, *parts)
        turns.append(Turn(side, parts))
    return Conversation(tuple(system), tuple(turns))


def functions(tools: object) -> list[tuple[str, dict[str, Any]]]:
    """(where, function) of each tool. Raises Refusal for a tool that is no function."""
    found = []
    for index, tool in enumerate(_list(tools, "tools")):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refusal(f"tools[{index}].type", "only functions can be used at this target")
        found.append((f"tools[{index}].function", function))
    return found


def chosen_tool(choice: object) -> str:
    """The one function that tool_choice names. Raises Refusal for another form."""
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refusal("tool_choice", "give auto, none, required or one function")
    return str(function["name"])


def json_schema(value: object) -> dict[str, Any] | None:
    """The schema that response_format asks for; None for json_object. Raises Refusal for another form."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind == "json_schema":
        schema = value.get("json_schema")
        if isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
            return dict(schema["schema"])
        raise Refusal("response_format.json_schema.schema", "give the schema")
    if kind == "json_object":
        return None
    raise Refusal("response_format.type", "give text, json_schema or json_object")


def stops(value: object) -> list[str]:
    """Stop sequences as a list."""
    return [value] if isinstance(value, str) else [str(one) for one in _list(value, "stop")]


def completion(answer: Mapping[str, Any]) -> bytes:
    """A whole chat completion."""
    return orjson.dumps({"object": "chat.completion", **answer})


def usage_document(prompt: int, output: int, cached: int, reasoning: int) -> dict[str, Any]:
    """Usage in OpenAI's form: cached tokens are part of the prompt's, reasoning of the output's."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def error_body(message: object, kind: object, code: object = None) -> bytes:
    """An error in OpenAI's form."""
    return orjson.dumps({"error": {"message": str(message), "type": kind, "code": code, "param": None}})


def _neutral(name: str, value: object) -> bool:
    return any(type(value) is type(one) and value == one for one in _NEUTRAL.get(name, ()))


def _turn(message: dict[str, Any], role: object, where: str) -> tuple[str, tuple[Part, ...]]:
    content = message.get("content")
    if role == "user":
        return "user", _parts(content, f"{where}.content")
    if role == "tool":
        result = ToolResult(
            str(message.get("tool_call_id", "")), _text(content, f"{where}.content"), f"{where}.tool_call_id"
        )
        return "user", (result,)
    if role != "assistant":
        raise Refusal(f"{where}.role", "give system, developer, user, assistant or tool")
    said: list[Part] = [] if content in (None, "") else [Text(_text(content, f"{where}.content"))]
    if message.get("refusal"):
        said.append(Text(str(message["refusal"])))
    calls = message.get("tool_calls") or ()
    said.extend(_tool_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(_list(calls, where)))
    return "assistant", tuple(said)


def _tool_call(call: object, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) and call.get("type") == "function" else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise Refusal(f"{where}.type", "only functions can be called at this target")
    text = function.get("arguments") or "{}"
    try:
        arguments = orjson.loads(text)
    except (orjson.JSONDecodeError, TypeError):
        arguments = None
    if not isinstance(arguments, dict):
        raise Refusal(f"{where}.function.arguments", "must be a JSON object for this target")
    extra = call.get("extra_content")
    google = extra.get("google") if isinstance(extra, dict) else None
    signature = google.get("thought_signature") if isinstance(google, dict) else None
    return ToolCall(str(call.get("id", "")), str(function.get("name", "")), arguments, signature)


def _parts(content: object, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Text(content),)
    return tuple(_part(part, f"{where}[{index}]") for index, part in enumerate(_list(content, where)))


def _part(part: object, where: str) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    image = part.get("image_url") if isinstance(part, dict) and kind == "image_url" else None
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise Refusal(f"{where}.type", f"{str(kind)[:40]} cannot be sent to this target; give text or image_url")
    if image.get("detail") not in {None, "auto"}:
        raise Refusal(f"{where}.image_url.detail", "has no counterpart at this target; leave it out")
    data = _DATA_URL.fullmatch(image["url"])
    return Image(None, None, image["url"]) if data is None else Image(data[1], data[2], None)


def _text(content: object, where: str) -> str:
    """Content that can only be text."""
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(_list(content, where)):
        if not isinstance(part, dict) or part.get("type") not in {"text", "refusal"}:
            raise Refusal(f"{where}[{index}].type", "only text can stand here at this target")
        texts.append(str(part.get("text", part.get("refusal", ""))))
    return "\n".join(texts)


def _list(value: object, where: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise Refusal(where, "must be an array")
    return value
