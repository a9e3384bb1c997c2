"""Requests of Anthropic's messages API, read as chat requests: what our own engine and all other targets are asked.

A field without a counterpart is refused by name; none is dropped but `cache_control`, a hint that changes no answer.
"""

from __future__ import annotations

from typing import Any

import orjson

from moe_gateway.openai_api import ApiError, ApiRequest, Endpoint, read_object, read_request

_SAME = ("model", "max_tokens", "stream", "temperature", "top_p", "top_k")
_READ = frozenset(
    {
        *_SAME,
        *("messages", "system", "metadata", "stop_sequences", "tools", "tool_choice", "thinking", "output_config"),
        *("cache_control", "service_tier"),
    }
)
_EFFORTS = frozenset({"low", "medium", "high", "xhigh", "max"})


def parse_messages(raw: bytes) -> ApiRequest:
    """Read a request. Raises ApiError 400, which names the field."""
    document = read_object(raw)
    for name, value in document.items():
        if name not in _READ and value is not None:
            raise _refused(name[:100], "not served; leave it out")
    limit = document.get("max_tokens")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise _refused("max_tokens", "a whole number of 1 or more is needed")
    chat = {name: document[name] for name in _SAME if document.get(name) is not None}
    if chat.get("stream"):
        chat["stream_options"] = {"include_usage": True}  # the last event of a message tells it
    try:
        chat["messages"] = _messages(document)
        chat |= _options(document)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ApiError(400, "the body is not of the form of the messages API", code="invalid_request") from None
    return read_request(Endpoint.CHAT, orjson.dumps(chat), chat, messages=document)


def _messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    messages = []
    if document.get("system"):
        messages.append({"role": "system", "content": _texts(document["system"], "system")})
    asked = document.get("messages")
    if not isinstance(asked, list) or not asked:
        raise _refused("messages", "at least one message is needed")
    for index, message in enumerate(asked):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role == "user":
            messages.extend(_user(_blocks(message.get("content"), f"{where}.content"), f"{where}.content"))
        elif role == "assistant":
            messages.append(_assistant(_blocks(message.get("content"), f"{where}.content"), f"{where}.content"))
        elif role == "system":
            messages.append({"role": "system", "content": _texts(message.get("content"), f"{where}.content")})
        else:
            raise _refused(f"{where}.role", "give user or assistant")
    return messages


def _user(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """One user message, after a tool message for each tool result in it."""
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        match block["type"]:
            case "text":
                parts.append({"type": "text", "text": _string(block, "text", place)})
            case "image":
                parts.append(
                    {"type": "image_url", "image_url": {"url": _image(block.get("source"), f"{place}.source")}}
                )
            case "tool_result":
                content = block.get("content")
                text = "" if content is None else _texts(content, f"{place}.content")
                if block.get("is_error") is True:
                    text = f"Error: {text}"
                results.append({"role": "tool", "tool_call_id": _string(block, "tool_use_id", place), "content": text})
            case kind:
                raise _refused(f"{place}.type", f"{kind[:40]} is not served; give text, image or tool_result")
    if len(parts) == 1 and parts[0]["type"] == "text":
        return [*results, {"role": "user", "content": parts[0]["text"]}]
    return [*results, {"role": "user", "content": parts}] if parts else results


def _assistant(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        match block["type"]:
            case "text":
                texts.append(_string(block, "text", place))
            case "thinking":
                thoughts.append(_string(block, "thinking", place))
            case "tool_use":
                function = {
                    "name": _string(block, "name", place),
                    "arguments": orjson.dumps(block.get("input") or {}).decode(),
                }
                calls.append({"id": _string(block, "id", place), "type": "function", "function": function})
            case kind:
                raise _refused(f"{place}.type", f"{kind[:40]} is not served; give text, thinking or tool_use")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or None}
    if thoughts:
        message["reasoning"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _options(document: dict[str, Any]) -> dict[str, Any]:
    """What is not the conversation."""
    chat: dict[str, Any] = {}
    if document.get("stop_sequences"):
        chat["stop"] = document["stop_sequences"]
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and metadata.get("user_id"):
        chat["user"] = str(metadata["user_id"])
    if document.get("service_tier") not in {None, "auto"}:
        raise _refused("service_tier", "only auto is served")
    if document.get("tools"):
        chat["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(document["tools"])]
    choice = document.get("tool_choice")
    if choice is not None:
        chat |= _tool_choice(choice)
    chat |= _thinking(document.get("thinking"))
    config = document.get("output_config") or {}
    if not isinstance(config, dict):
        raise _refused("output_config", "must be an object")
    for name in config:
        if name not in {"effort", "format"}:
            raise _refused(f"output_config.{name[:100]}", "not served; leave it out")
    if (effort := config.get("effort")) is not None:
        if effort not in _EFFORTS:
            raise _refused("output_config.effort", f"give one of {', '.join(sorted(_EFFORTS))}")
        chat.setdefault("reasoning_effort", effort)
    if (form := config.get("format")) is not None:
        if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
            raise _refused("output_config.format", "give type json_schema and a schema")
        schema = {"name": "answer", "schema": form["schema"], "strict": True}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    return chat


def _tool(tool: object, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") not in {None, "custom"}:
        raise _refused(f"{where}.type", "Anthropic runs such tools itself, which this server cannot; give custom tools")
    for name, value in tool.items():
        if name not in {"type", "name", "description", "input_schema", "strict", "cache_control"} and value is not None:
            raise _refused(f"{where}.{name[:100]}", "not served; leave it out")
    function = {"name": _string(tool, "name", where), "parameters": tool.get("input_schema") or {"type": "object"}}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _tool_choice(choice: object) -> dict[str, Any]:
    kind = choice.get("type") if isinstance(choice, dict) else None
    plain = {"auto": "auto", "any": "required", "none": "none"}
    if not isinstance(choice, dict) or kind not in {*plain, "tool"}:
        raise _refused("tool_choice.type", "give auto, any, tool or none")
    chosen: object = plain.get(str(kind))
    if kind == "tool":
        chosen = {"type": "function", "function": {"name": _string(choice, "name", "tool_choice")}}
    parallel = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") is True else {}
    return {"tool_choice": chosen, **parallel}


def _thinking(thinking: object) -> dict[str, Any]:
    """Whether, and for how long, the model may think: in the words of vLLM."""
    if thinking is None:
        return {}
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if not isinstance(thinking, dict) or kind not in {"enabled", "adaptive", "disabled"}:
        raise _refused("thinking.type", "give enabled, adaptive or disabled")
    if kind == "disabled":
        return {"reasoning_effort": "none"}
    return (
        {"thinking_token_budget": thinking["budget_tokens"]}
        if kind == "enabled" and "budget_tokens" in thinking
        else {}
    )


def _blocks(content: object, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _refused(where, "must be text or an array of blocks")
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise _refused(f"{where}[{index}].type", "a type is needed")
    return content


def _texts(content: object, where: str) -> str:
    """Text alone, blocks joined."""
    texts = []
    for index, block in enumerate(_blocks(content, where)):
        if block["type"] != "text":
            raise _refused(f"{where}[{index}].type", "only text can stand here")
        texts.append(_string(block, "text", f"{where}[{index}]"))
    return "\n".join(texts)


def _image(source: object, where: str) -> str:
    """The image as an address, a data: URL for one that came along."""
    kind = source.get("type") if isinstance(source, dict) else None
    if isinstance(source, dict) and kind == "url":
        return _string(source, "url", where)
    if isinstance(source, dict) and kind == "base64":
        return f"data:{_string(source, 'media_type', where)};base64,{_string(source, 'data', where)}"
    raise _refused(f"{where}.type", "give base64 or url")


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise _refused(f"{where}.{name}", "text is needed")
    return value


def _refused(field: str, remedy: str) -> ApiError:
    return ApiError(400, f"{field}: {remedy}", code="invalid_request", param=field)
