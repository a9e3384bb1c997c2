"""Anthropic's messages API as a target: chat translated to it and back, and its own clients passed byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from moe_gateway.openai_api import ApiRequest, Usage
from moe_gateway.providers import chat
from moe_gateway.providers.base import Refusal, Unsupported
from moe_gateway.providers.translation import TranslatedAdapter, Translation
from moe_gateway.sse import StreamReader

API_VERSION = "2023-06-01"
"""The one version of the messages API (docs.claude.com, API, versioning)."""
DEFAULT_MAX_TOKENS = 4096
"""Anthropic wants an output limit; this one holds at a target without a price for a request without a limit."""
_TAKEN = frozenset(
    {
        *("max_tokens", "max_completion_tokens", "stop", "tools", "tool_choice", "parallel_tool_calls"),
        *("response_format", "reasoning_effort", "user"),
    }
)
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh"}
_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class AnthropicAdapter(TranslatedAdapter):
    """Claude by Anthropic's own API. Sampling parameters are refused: current Claude models take none."""

    URL = "https://api.anthropic.com"

    def takes(self, request: ApiRequest) -> Unsupported | None:
        return super().takes(request) if request.messages is None else _foreign_thinking(request.messages)

    def document(self, request: ApiRequest, output_cap: int | None) -> dict[str, Any]:
        said = _document(request, output_cap) if request.messages is None else request.messages
        return {**said, "model": self.target.model}

    def path(self, request: ApiRequest) -> str:
        return "/v1/messages"

    def headers(self, key: str | None) -> dict[str, str]:
        return {"anthropic-version": API_VERSION, **({} if key is None else {"x-api-key": key})}

    def native(self, request: ApiRequest) -> bool:
        return request.messages is not None

    def answer(self, status: int, body: bytes) -> bytes:
        document = orjson.loads(body)
        if not isinstance(document, dict):
            raise ValueError("no object")
        if document.get("type") == "error" or status != 200:
            error = document.get("error")
            error = error if isinstance(error, dict) else {}
            return chat.error_body(error.get("message", "the model failed"), error.get("type", "api_error"))
        try:
            return _completion(document, int(self.clock.time()))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no message: {error!r}") from None

    def stream(self, request: ApiRequest) -> StreamReader:
        return MessagesStream(
            created=int(self.clock.time()), include_usage=request.include_usage, raw=self.native(request)
        )


def _document(request: ApiRequest, output_cap: int | None) -> dict[str, Any]:
    """A chat request in Anthropic's form. Raises Refusal."""
    asked = chat.asked(request)
    for name in asked:
        if name not in _TAKEN:
            raise Refusal(name[:100], "Claude has no counterpart; leave it out for this target to be used")
    conversation = chat.conversation(request.document.get("messages"))
    if not conversation.turns or conversation.turns[-1].role != "user":
        raise Refusal("messages", "the last one must be of the user or a tool: Claude continues no answer of its own")
    limit = output_cap if request.output_limit is None else request.output_limit
    document: dict[str, Any] = {
        "max_tokens": DEFAULT_MAX_TOKENS if limit is None else limit,
        "messages": [
            {"role": turn.role, "content": [_block(part) for part in turn.parts]} for turn in conversation.turns
        ],
    }
    if conversation.system:
        document["system"] = [{"type": "text", "text": text} for text in conversation.system]
    if request.stream:
        document["stream"] = True
    if "stop" in asked:
        document["stop_sequences"] = chat.stops(asked["stop"])
    if "user" in asked:
        document["metadata"] = {"user_id": str(asked["user"])}
    if "tools" in asked:
        document["tools"] = [_tool(where, function) for where, function in chat.functions(asked["tools"])]
    if (choice := _tool_choice(asked)) is not None:
        document["tool_choice"] = choice
    if (config := _output_config(asked)) is not None:
        document["output_config"] = config
    if asked.get("reasoning_effort") == "none":
        document["thinking"] = {"type": "disabled"}
    return document


def _block(part: chat.Part) -> dict[str, Any]:
    match part:
        case chat.Text(text):
            return {"type": "text", "text": text}
        case chat.Image(_, None, url):
            return {"type": "image", "source": {"type": "url", "url": url}}
        case chat.Image(media_type, data, _):
            return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}
        case chat.ToolCall():
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": part.arguments}
        case chat.ToolResult():
            return {"type": "tool_result", "tool_use_id": part.id, "content": part.text}


def _tool(where: str, function: dict[str, Any]) -> dict[str, Any]:
    tool = {"name": function["name"], "input_schema": function.get("parameters") or {"type": "object"}}
    if function.get("description"):
        tool["description"] = function["description"]
    if function.get("strict") is True:
        tool["strict"] = True
    for name in function:
        if name not in {"name", "parameters", "description", "strict"}:
            raise Refusal(f"{where}.{name[:100]}", "has no counterpart at this target")
    return tool


def _tool_choice(asked: dict[str, Any]) -> dict[str, Any] | None:
    """Anthropic's tool_choice, which also says whether tools may be called side by side."""
    choice, parallel = asked.get("tool_choice"), asked.get("parallel_tool_calls")
    if "tools" not in asked:
        return None
    if choice == "none":
        return {"type": "none"}
    if choice in {None, "auto"} if isinstance(choice, str | None) else False:
        made: dict[str, Any] = {"type": "auto"}
    elif choice == "required":
        made = {"type": "any"}
    else:
        made = {"type": "tool", "name": chat.chosen_tool(choice)}
    if parallel is False:
        made["disable_parallel_tool_use"] = True
    return None if choice is None and parallel is not False else made


def _output_config(asked: dict[str, Any]) -> dict[str, Any] | None:
    config: dict[str, Any] = {}
    effort = asked.get("reasoning_effort")
    if effort not in {None, "none"}:
        if effort not in _EFFORTS:
            raise Refusal("reasoning_effort", f"Claude takes none, {', '.join(_EFFORTS)}")
        config["effort"] = _EFFORTS[effort]
    if "response_format" in asked:
        schema = chat.json_schema(asked["response_format"])
        if schema is None:
            raise Refusal("response_format.type", "Claude takes json_schema with a schema, not json_object")
        config["format"] = {"type": "json_schema", "schema": schema}
    return config or None


def _foreign_thinking(document: dict[str, Any]) -> Unsupported | None:
    """Thinking without a signature is another model's, and Anthropic refuses it."""
    messages = document.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for at, block in enumerate(content if isinstance(content, list) else ()):
            if isinstance(block, dict) and block.get("type") == "thinking" and not block.get("signature"):
                return Unsupported(f"messages[{index}].content[{at}].signature", "leave another model's thinking out")
    return None


def _completion(message: dict[str, Any], created: int) -> bytes:
    content = message["content"]
    said: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(block["text"] for block in content if block["type"] == "text") or None,
        "refusal": None,
    }
    thoughts = "".join(block["thinking"] for block in content if block["type"] == "thinking")
    if thoughts:
        said["reasoning"] = thoughts
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": orjson.dumps(block["input"]).decode()},
        }
        for block in content
        if block["type"] == "tool_use"
    ]
    if calls:
        said["tool_calls"] = calls
    choice = {
        "index": 0,
        "message": said,
        "finish_reason": _FINISH.get(message["stop_reason"], "stop"),
        "logprobs": None,
    }
    seen, thinking = usage_of(message["usage"])
    usage = chat.usage_document(seen.prompt_tokens, seen.output_tokens, seen.cached_tokens, thinking)
    answer = {"id": message["id"], "created": created, "model": message["model"], "choices": [choice], "usage": usage}
    return chat.completion(answer)


def usage_of(usage: dict[str, Any]) -> tuple[Usage, int]:
    """Usage, and how much of the output was thinking. Anthropic counts cached and cache-writing input apart; OpenAI's
    prompt tokens are all of it."""
    cached = usage.get("cache_read_input_tokens") or 0
    prompt = (usage.get("input_tokens") or 0) + cached + (usage.get("cache_creation_input_tokens") or 0)
    details = usage.get("output_tokens_details") or {}
    return Usage(prompt, usage["output_tokens"], cached), details.get("thinking_tokens") or 0


class MessagesStream(Translation):
    """Anthropic's events as chat chunks."""

    def __init__(self, *, created: int, include_usage: bool, raw: bool = False) -> None:
        super().__init__(created=created, include_usage=include_usage, raw=raw)
        self._usage: dict[str, Any] = {}
        self._tools: dict[int, int] = {}
        """Content block → its place among the tool calls."""
        self._silent_tools: set[int] = set()
        """Tool blocks whose input has not begun."""

    def documents(self, document: dict[str, Any]) -> Iterator[bytes]:
        match document["type"]:
            case "message_start":
                message = document["message"]
                self.id, self.model, self._usage = message["id"], message["model"], dict(message["usage"])
                self.prompt_tokens = usage_of({"output_tokens": 0, **self._usage})[0].prompt_tokens
                yield self.chunk({"role": "assistant", "content": ""})
            case "content_block_start":
                yield from self._begin(document["index"], document["content_block"])
            case "content_block_delta":
                yield from self._more(document["index"], document["delta"])
            case "content_block_stop":
                if document["index"] in self._silent_tools:
                    yield self._arguments(document["index"], "{}")
            case "message_delta":
                self._usage |= {name: value for name, value in document["usage"].items() if value is not None}
                self.usage, self.reasoning_tokens = usage_of(self._usage)
                reason = document["delta"].get("stop_reason")
                if reason is not None:
                    self.finished = True
                    yield self.chunk({}, _FINISH.get(reason, "stop"))
            case "message_stop":
                yield self.end()
            case "error":
                yield self.fail(document["error"])

    def _begin(self, index: int, block: dict[str, Any]) -> Iterator[bytes]:
        if block["type"] == "tool_use":
            at = self._tools.setdefault(index, len(self._tools))
            self._silent_tools.add(index)
            function = {"name": block["name"], "arguments": ""}
            call = {"index": at, "id": block["id"], "type": "function", "function": function}
            yield self.content({"tool_calls": [call]}, block["name"])
        elif block["type"] == "text" and block["text"]:
            yield self.content({"content": block["text"]}, block["text"])

    def _more(self, index: int, delta: dict[str, Any]) -> Iterator[bytes]:
        match delta["type"]:
            case "text_delta" if delta["text"]:
                yield self.content({"content": delta["text"]}, delta["text"])
            case "thinking_delta" if delta["thinking"]:
                yield self.content({"reasoning": delta["thinking"]}, delta["thinking"])
            case "input_json_delta" if delta["partial_json"] and index in self._tools:
                yield self._arguments(index, delta["partial_json"])

    def _arguments(self, index: int, text: str) -> bytes:
        self._silent_tools.discard(index)
        return self.content({"tool_calls": [{"index": self._tools[index], "function": {"arguments": text}}]}, text)
