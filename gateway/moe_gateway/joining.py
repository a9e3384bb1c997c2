"""One answer of two attempts: what was sent of the first, the request to go on with it, and the second's events as the
rest of the first's stream: one id, one model, one role, one usage. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import orjson

from moe_gateway.openai_api import ApiRequest, Endpoint, read_request, read_usage
from moe_gateway.overlap import Overlap
from moe_gateway.sse import event_end, payload_of
from moe_gateway.takeover import How, Sent

GO_ON = (
    "Your answer above was cut off by a technical fault. Go on exactly where it ends, from its next character: no"
    " introduction, no comment, and nothing again that it says already."
)
GO_ON_TOKENS = 40
"""What the turn with GO_ON adds to a prompt, about: so many tokens are taken off the prompt that the client is told."""
TEXT_MAX_CHARS = 1 << 20
_FOLD_BYTES = 32 << 10
_HEAD = ("id", "object", "created", "model")
_REASONING = ("reasoning", "reasoning_content")
_NOT_TEXT = ("tool_calls", "function_call", *_REASONING, "refusal", "audio")
_LIMITS = ("max_tokens", "max_completion_tokens")
_FORCED_FORM = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
_NOT_KEPT = (
    *("echo", "suffix", "use_beam_search", "continue_final_message", "return_token_ids", "return_tokens_as_token_ids"),
    *("prompt_embeds", "truncate_prompt_tokens", "kv_transfer_params", "audio", "top_logprobs"),
)
"""Fields that, with any value that asks for something, bind an answer to one run of one engine."""


# What was sent


class Transcript:
    """Keeps what went to the client. Reading it is put off: most streams never break."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self._unread: list[bytes] = []
        self._unread_bytes = 0
        self._text: list[str] = []
        self._chars = 0
        self._bar: str | None = None

    def add(self, events: bytes) -> None:
        """Whole events, as they went out."""
        self._unread.append(events)
        self._unread_bytes += len(events)
        if self._unread_bytes > _FOLD_BYTES:
            self._fold()

    def sent(self, tokens: int) -> Sent:
        self._fold()
        text = "".join(self._text)
        blank = len(list(takewhile(str.isspace, reversed(self._text))))
        self._text = [text]
        bar = self._bar or (None if text else "no text")
        return Sent(text, tokens, bar, min(blank, tokens))

    def _fold(self) -> None:
        data, start = b"".join(self._unread), 0
        self._unread, self._unread_bytes = [], 0
        while start < len(data):
            end = event_end(data, start) or len(data)
            payload = payload_of(data[start:end])
            start = end
            if payload and payload != b"[DONE]":
                self._document(orjson.loads(payload))
        if self._chars > TEXT_MAX_CHARS:
            self._text, self._bar = [], self._bar or "length"

    def _document(self, document: dict[str, Any]) -> None:
        if not self.head:
            self.head = {name: document[name] for name in _HEAD if name in document}
        choices = document.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict):
                continue
            said = choice.get("delta")
            said = said if isinstance(said, dict) else {"content": choice.get("text")}
            found = next((name for name in _NOT_TEXT if said.get(name)), None)
            if choice.get("index"):
                found = "choices"
            elif choice.get("logprobs"):
                found = "logprobs"
            self._bar = self._bar or found
            text = said.get("content")
            if isinstance(text, str) and self._bar is None:
                if not text:
                    continue
                self._text.append(text)
                self._chars += len(text)
            elif text:
                self._bar = self._bar or "content"


# What may not be joined


def bar(request: ApiRequest, how: How) -> str | None:
    """The first field of a request that an answer of two attempts could not keep; None where it can be joined."""
    document = request.document
    if request.endpoint not in {Endpoint.CHAT, Endpoint.COMPLETIONS}:
        return request.endpoint.value.removeprefix("/")
    if request.choices != 1:
        return "n"
    for name in ("logprobs", "prompt_logprobs"):
        if document.get(name) is not None and document[name] is not False:
            return name
    form = document.get("response_format")
    if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
        return "response_format"
    forced = next((name for name in (*_FORCED_FORM, *_NOT_KEPT) if document.get(name)), None)
    if forced is not None:
        return forced
    if document.get("tool_choice") not in (None, "none", "auto"):
        return "tool_choice"
    if document.get("function_call") not in (None, "none", "auto"):
        return "function_call"
    if document.get("add_generation_prompt") is False:
        return "add_generation_prompt"
    if document.get("include_stop_str_in_output") and document.get("stop"):
        return "include_stop_str_in_output"
    options = document.get("stream_options")
    if isinstance(options, dict) and options.get("continuous_usage_stats"):
        return "stream_options.continuous_usage_stats"
    if document.get("seed") is not None and (how is How.SPLICE or document.get("temperature") != 0):
        return "seed"
    return _bar_of_prompt(request, how)


def _bar_of_prompt(request: ApiRequest, how: How) -> str | None:
    if request.endpoint is Endpoint.COMPLETIONS:
        return "prompt" if how is How.SPLICE or not isinstance(request.document.get("prompt"), str) else None
    return None if isinstance(request.document.get("messages"), list) else "messages"


# The request to go on


def continued(request: ApiRequest, sent: Sent) -> ApiRequest:
    """The request by which an own revision writes on.

    Chat: vLLM's `continue_final_message`, which excludes `add_generation_prompt`. White space at the end of what was
    sent is left out: templates strip it, and tokens begin with it; `Joiner` removes it from what comes. Nothing but
    white space is no text to go on from: then it is asked anew.
    """
    text, tokens = sent.text.rstrip(), sent.kept_tokens(How.CONTINUE)
    if request.endpoint is Endpoint.COMPLETIONS:
        return _asked(request, tokens, {"prompt": request.document["prompt"] + text})
    if not text:
        return _asked(request, tokens, {})
    said = {"role": "assistant", "content": text}
    more = {"messages": [*request.document["messages"], said]}
    return _asked(request, tokens, {**more, "add_generation_prompt": False, "continue_final_message": True})


def spliced(request: ApiRequest, sent: Sent) -> ApiRequest:
    """The request by which a model that continues no answer of its own is asked to go on: by a user's turn."""
    said = {"role": "assistant", "content": sent.text}
    return _asked(
        request, sent.tokens, {"messages": [*request.document["messages"], said, {"role": "user", "content": GO_ON}]}
    )


def _asked(request: ApiRequest, tokens: int, changed: Mapping[str, Any]) -> ApiRequest:
    document = {**request.document, **changed}
    for name in _LIMITS:
        if isinstance(document.get(name), int):
            document[name] -= tokens
    if isinstance(document.get("min_tokens"), int):
        document["min_tokens"] = max(0, document["min_tokens"] - tokens)
    # From here on it is a chat request, in whatever form it came: the stream goes on in OpenAI's.
    return read_request(request.endpoint, orjson.dumps(document), document)


# The rest of the stream


@dataclass(frozen=True, slots=True)
class Seam:
    """Where an answer was cut: what its first part was, and how the second one is made."""

    how: How
    sent: Sent
    head: Mapping[str, Any]

    @property
    def kept_tokens(self) -> int:
        """Output tokens of the first part, less those that come again."""
        return self.sent.kept_tokens(self.how)

    @property
    def added_tokens(self) -> int:
        """Prompt tokens of the second attempt that the client's own prompt does not have."""
        return self.kept_tokens + (GO_ON_TOKENS if self.how is How.SPLICE else 0)

    def prompt_tokens(self, told: int) -> int:
        """The client's own prompt, where the second attempt told so many."""
        return max(1, told - self.added_tokens)


class Joiner:
    """Feed it the second attempt's events in OpenAI's form; it gives them back as the rest of the first's."""

    def __init__(self, seam: Seam) -> None:
        self._seam = seam
        text = seam.sent.text
        if seam.how is How.CONTINUE:
            self._overlap = Overlap(text[len(text.rstrip()) :], least=1)
        else:
            self._overlap = Overlap(text)
        self.refused: str | None = None
        """What came that cannot follow what was sent. Nothing is read after it."""

    def feed(self, events: bytes) -> bytes:
        out, start = [], 0
        while start < len(events) and self.refused is None:
            end = event_end(events, start) or len(events)
            out.append(self._event(events[start:end]))
            start = end
        return b"".join(out)

    def _event(self, event: bytes) -> bytes:
        payload = payload_of(event)
        if not payload or payload == b"[DONE]":
            return event
        document = orjson.loads(payload)
        if document.get("error") is not None:
            return event
        rest = {name: value for name, value in document.items() if name not in _HEAD}
        document = {**self._seam.head, **rest}
        if read_usage(document) is not None:
            document["usage"] = self._usage(document["usage"])
        kept = [choice for choice in document.get("choices") or () if self._choice(choice)]
        if self.refused is not None or (not kept and document.get("usage") is None):
            return b""
        document["choices"] = kept
        return b"data: " + orjson.dumps(document) + b"\n\n"

    def _choice(self, choice: dict[str, Any]) -> bool:
        """Fit one choice to what was sent; False where nothing of it is left."""
        finished = choice.get("finish_reason") is not None
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            choice["text"] = self._new(choice.get("text"), finished)
            return finished or bool(choice["text"])
        delta.pop("role", None)
        if any(delta.get(name) for name in _REASONING) and self._seam.how is How.CONTINUE:
            # An engine that takes text for reasoning would lose it; one that begins to reason is not going on.
            self.refused = "reasoning"
            return False
        for name in _REASONING:  # a closed API's thoughts about how to go on are no part of the answer
            delta.pop(name, None)
        other = any(delta.get(name) for name in _NOT_TEXT)
        text = self._new(delta.pop("content", None), finished or other)
        if text:
            delta["content"] = text
        return finished or other or bool(text)

    def _new(self, text: object, last: bool) -> str:
        new = self._overlap.feed(text) if isinstance(text, str) else ""
        return new + self._overlap.end() if last else new

    def _usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The prompt once, and the tokens of both parts."""
        told = read_usage({"usage": usage})
        if told is None:
            return usage
        prompt, output = self._seam.prompt_tokens(told.prompt_tokens), self._seam.kept_tokens + told.output_tokens
        joined = {**usage, "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and told.cached_tokens:
            joined["prompt_tokens_details"] = {**details, "cached_tokens": min(told.cached_tokens, prompt)}
        return joined
