"""Google's Gemini API (generateContent) as a target: chat translated to it and back."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from typing import Any

import orjson

from moe_gateway.openai_api import ApiRequest, Usage
from moe_gateway.providers import chat
from moe_gateway.providers.base import Refusal
from moe_gateway.providers.translation import TranslatedAdapter, Translation
from moe_gateway.sse import StreamReader

FOREIGN_SIGNATURE = "skip_thought_signature_validator"
"""What Google's pages on thought signatures tell to send with a function call that another model made."""
_RENAMED = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "seed": "seed",
    "n": "candidateCount",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
    "logprobs": "responseLogprobs",
    "top_logprobs": "logprobs",
}
_TAKEN = frozenset(
    {
        *_RENAMED,
        *("max_tokens", "max_completion_tokens", "stop", "tools", "tool_choice", "response_format"),
        *("reasoning_effort", "parallel_tool_calls"),
    }
)
_LEVELS = {"minimal": "MINIMAL", "low": "LOW", "medium": "MEDIUM", "high": "HIGH"}
_FINISH = {"STOP": "stop", "MAX_TOKENS": "length"}
_FILTERED = frozenset({"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR"})
_BROKEN = frozenset(
    {
        *("MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS", "MISSING_THOUGHT_SIGNATURE"),
        *("MALFORMED_RESPONSE", "OTHER", "LANGUAGE"),
    }
)
"""Ends that are no answer: a client must not take them for one that is whole."""


class GeminiAdapter(TranslatedAdapter):
    """Gemini by Google's API for developers."""

    URL = "https://generativelanguage.googleapis.com/v1beta"

    def document(self, request: ApiRequest, output_cap: int | None) -> dict[str, Any]:
        return _document(request, output_cap)

    def path(self, request: ApiRequest) -> str:
        call = "streamGenerateContent?alt=sse" if request.stream else "generateContent"
        return f"/models/{urllib.parse.quote(self.target.model, safe='')}:{call}"

    def headers(self, key: str | None) -> dict[str, str]:
        return {} if key is None else {"x-goog-api-key": key}

    def status(self, status: int, body: bytes) -> int:
        return 401 if status == 400 and b"API_KEY_INVALID" in body else status

    def answer(self, status: int, body: bytes) -> bytes:
        document = orjson.loads(body)
        if isinstance(document, list) and document:  # an error of a stream that was asked for without alt=sse
            document = document[0]
        if not isinstance(document, dict):
            raise ValueError("no object")
        if status != 200 or "error" in document:
            error = document.get("error")
            error = error if isinstance(error, dict) else {}
            return chat.error_body(error.get("message", "the model failed"), error.get("status", "UNKNOWN"))
        try:
            return _completion(document, int(self.clock.time()))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"no answer of Gemini's: {error!r}") from None

    def stream(self, request: ApiRequest) -> StreamReader:
        return GeminiStream(created=int(self.clock.time()), include_usage=request.include_usage)


def _document(request: ApiRequest, output_cap: int | None) -> dict[str, Any]:
    """A chat request in Gemini's form. Raises Refusal."""
    asked = chat.asked(request)
    for name, value in asked.items():
        if name not in _TAKEN or (name == "parallel_tool_calls" and value is not True):
            raise Refusal(name[:100], "Gemini has no counterpart; leave it out for this target to be used")
    conversation = chat.conversation(request.document.get("messages"))
    names = {
        part.id: part.name for turn in conversation.turns for part in turn.parts if isinstance(part, chat.ToolCall)
    }
    contents = [
        {"role": "model" if turn.role == "assistant" else "user", "parts": list(_parts(turn, names))}
        for turn in conversation.turns
    ]
    document: dict[str, Any] = {"contents": contents}
    if conversation.system:
        document["systemInstruction"] = {"parts": [{"text": text} for text in conversation.system]}
    if "tools" in asked:
        declared = [_declaration(where, function) for where, function in chat.functions(asked["tools"])]
        document["tools"] = [{"functionDeclarations": declared}]
        if "tool_choice" in asked:
            document["toolConfig"] = {"functionCallingConfig": _calling(asked["tool_choice"])}
    config = {_RENAMED[name]: value for name, value in asked.items() if name in _RENAMED}
    limit = output_cap if request.output_limit is None else request.output_limit
    if limit is not None:
        config["maxOutputTokens"] = limit
    if "stop" in asked:
        config["stopSequences"] = chat.stops(asked["stop"])
    if "response_format" in asked:
        config["responseMimeType"] = "application/json"
        if (schema := chat.json_schema(asked["response_format"])) is not None:
            config["responseJsonSchema"] = schema
    if "reasoning_effort" in asked:
        if asked["reasoning_effort"] not in _LEVELS:
            raise Refusal("reasoning_effort", f"Gemini takes {', '.join(_LEVELS)}")
        config["thinkingConfig"] = {"thinkingLevel": _LEVELS[asked["reasoning_effort"]]}
    if config:
        document["generationConfig"] = config
    return document


def _parts(turn: chat.Turn, names: dict[str, str]) -> Iterator[dict[str, Any]]:
    first_call = True
    for part in turn.parts:
        match part:
            case chat.Text(text):
                yield {"text": text}
            case chat.Image(_, None, _):
                raise Refusal("messages", "Gemini fetches no image by its address here; give it as a data: URL")
            case chat.Image(media_type, data, _):
                yield {"inlineData": {"mimeType": media_type, "data": data}}
            case chat.ToolCall():
                call: dict[str, Any] = {"functionCall": {"id": part.id, "name": part.name, "args": part.arguments}}
                signature = part.signature or (FOREIGN_SIGNATURE if first_call else None)
                first_call = False
                yield call if signature is None else {**call, "thoughtSignature": signature}
            case chat.ToolResult():
                if part.id not in names:
                    raise Refusal(part.where, "must be the id of a tool call before it")
                response = {"result": part.text}
                yield {"functionResponse": {"id": part.id, "name": names[part.id], "response": response}}


def _declaration(where: str, function: dict[str, Any]) -> dict[str, Any]:
    declared = {"name": function["name"]}
    if function.get("description"):
        declared["description"] = function["description"]
    if function.get("parameters"):
        declared["parametersJsonSchema"] = function["parameters"]
    for name, value in function.items():
        if name == "strict" and value is True:
            raise Refusal(f"{where}.strict", "Gemini keeps to no schema of a tool; leave it out for this target")
        if name not in {"name", "description", "parameters", "strict"}:
            raise Refusal(f"{where}.{name[:100]}", "has no counterpart at this target")
    return declared


def _calling(choice: object) -> dict[str, Any]:
    if isinstance(choice, str):
        modes = {"auto": "AUTO", "none": "NONE", "required": "ANY"}
        if choice not in modes:
            raise Refusal("tool_choice", "give auto, none, required or one function")
        return {"mode": modes[choice]}
    return {"mode": "ANY", "allowedFunctionNames": [chat.chosen_tool(choice)]}


def _usage(document: dict[str, Any]) -> tuple[Usage, int] | None:
    """Usage, and how much of the output was thinking, which Gemini counts beside its candidates."""
    seen = document.get("usageMetadata")
    if not isinstance(seen, dict) or "promptTokenCount" not in seen:
        return None
    thoughts = seen.get("thoughtsTokenCount") or 0
    prompt = (seen["promptTokenCount"] or 0) + (seen.get("toolUsePromptTokenCount") or 0)
    output = (seen.get("candidatesTokenCount") or 0) + thoughts
    return Usage(prompt, output, min(seen.get("cachedContentTokenCount") or 0, prompt)), thoughts


def _call(part: dict[str, Any], number: int, response_id: str) -> dict[str, Any]:
    """A function call as OpenAI's tool call. The signature comes back with the next turn, as Gemini wants it; its
    place is the one that Google's own OpenAI endpoint uses."""
    call = part["functionCall"]
    function = {"name": call["name"], "arguments": orjson.dumps(call.get("args") or {}).decode()}
    made = {"id": call.get("id") or f"call_{response_id}_{number}", "type": "function", "function": function}
    if part.get("thoughtSignature"):
        made["extra_content"] = {"google": {"thought_signature": part["thoughtSignature"]}}
    return made


def _finish(reason: str | None, calls: bool) -> str:
    if reason in _FILTERED or (reason is not None and reason.startswith("IMAGE_")):
        return "content_filter"
    if calls and reason == "STOP":
        return "tool_calls"
    return _FINISH.get(reason or "STOP", "stop")


def _logprobs(candidate: dict[str, Any]) -> dict[str, Any] | None:
    result = candidate.get("logprobsResult")
    if not isinstance(result, dict):
        return None
    tops = result.get("topCandidates") or []
    content = []
    for index, chosen in enumerate(result.get("chosenCandidates") or []):
        others = tops[index].get("candidates") or [] if index < len(tops) else []
        content.append({**_logprob(chosen), "top_logprobs": [_logprob(one) for one in others]})
    return {"content": content, "refusal": None}


def _logprob(one: dict[str, Any]) -> dict[str, Any]:
    token = one["token"]
    return {"token": token, "logprob": one["logProbability"], "bytes": list(token.encode())}


def _completion(document: dict[str, Any], created: int) -> bytes:
    response_id = document.get("responseId", "")
    choices = []
    for place, candidate in enumerate(document.get("candidates") or []):
        if candidate.get("finishReason") in _BROKEN:
            return chat.error_body(f"Gemini ended with {candidate['finishReason']}", "upstream_error")
        parts = (candidate.get("content") or {}).get("parts") or []
        calls = [_call(part, at, response_id) for at, part in enumerate(parts) if "functionCall" in part]
        texts = [part for part in parts if "text" in part]
        said: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(part["text"] for part in texts if not part.get("thought")) or None,
            "refusal": None,
        }
        if thoughts := "".join(part["text"] for part in texts if part.get("thought")):
            said["reasoning"] = thoughts
        if calls:
            said["tool_calls"] = calls
        choices.append(
            {
                "index": candidate.get("index", place),
                "message": said,
                "finish_reason": _finish(candidate.get("finishReason"), bool(calls)),
                "logprobs": _logprobs(candidate),
            }
        )
    if not choices:
        if not (document.get("promptFeedback") or {}).get("blockReason"):
            raise ValueError("no candidate")
        said = {"role": "assistant", "content": None, "refusal": "the prompt was blocked"}
        choices = [{"index": 0, "message": said, "finish_reason": "content_filter", "logprobs": None}]
    answer: dict[str, Any] = {
        "id": response_id,
        "created": created,
        "model": document.get("modelVersion", ""),
        "choices": choices,
    }
    if (seen := _usage(document)) is not None:
        usage, reasoning = seen
        answer["usage"] = chat.usage_document(usage.prompt_tokens, usage.output_tokens, usage.cached_tokens, reasoning)
    return chat.completion(answer)


class GeminiStream(Translation):
    """Gemini's chunks, each a small answer, as chat chunks. Each tells the usage so far."""

    def __init__(self, *, created: int, include_usage: bool) -> None:
        super().__init__(created=created, include_usage=include_usage)
        self._begun: set[int] = set()
        self._calls: dict[int, int] = {}
        self._ended: set[int] = set()

    def documents(self, document: dict[str, Any]) -> Iterator[bytes]:
        if "error" in document:
            yield self.fail(document["error"])
            return
        self.id = document.get("responseId") or self.id
        self.model = document.get("modelVersion") or self.model
        if (seen := _usage(document)) is not None:
            self.usage, self.reasoning_tokens = seen
            self.prompt_tokens = self.usage.prompt_tokens
        candidates = document.get("candidates") or []
        if not candidates and (document.get("promptFeedback") or {}).get("blockReason"):
            self.finished = True
            yield self.content({"role": "assistant", "refusal": "the prompt was blocked"}, "")
            yield self.chunk({}, "content_filter")
        for place, candidate in enumerate(candidates):
            yield from self._candidate(candidate, candidate.get("index", place))

    def _candidate(self, candidate: dict[str, Any], index: int) -> Iterator[bytes]:
        reason = candidate.get("finishReason")
        if reason in _BROKEN:
            yield self.fail({"message": f"Gemini ended with {reason}", "type": "upstream_error"})
            return
        if index not in self._begun:
            self._begun.add(index)
            yield self.chunk({"role": "assistant", "content": ""}, index=index)
        logprobs = _logprobs(candidate)
        for part in (candidate.get("content") or {}).get("parts") or []:
            if "functionCall" in part:
                at = self._calls[index] = self._calls.get(index, -1) + 1
                call = {"index": at, **_call(part, at, self.id)}
                yield self.content({"tool_calls": [call]}, call["function"]["arguments"], index)
            elif part.get("text"):
                kind = "reasoning" if part.get("thought") else "content"
                yield self.content({kind: part["text"]}, part["text"], index, logprobs=logprobs)
                logprobs = None
        if reason is not None and index not in self._ended:
            self._ended.add(index)
            self.finished = self._ended == self._begun
            yield self.chunk({}, _finish(reason, index in self._calls), index)
