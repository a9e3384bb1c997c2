"""One streaming chat request, timed as its client feels it. Used by `--chat` and by the load generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from moe_core.clock import Clock

EXPLAIN = {"x-moestack-explain": "1"}
TARGET_HEADER = "x-moestack-target"
OK = "ok"


@dataclass(frozen=True)
class Outcome:
    """How one request went. Times are monotonic seconds; `due_s` is when it should have been sent."""

    kind: str  # "ok", or what failed: "http 529", "connect", "timeout", "cut", "error in stream"
    due_s: float
    sent_s: float
    end_s: float
    first_s: float | None = None  # first token
    last_s: float | None = None  # last token
    longest_gap_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    target: str = ""
    detail: str = ""
    text: str = ""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def itl_s(self) -> float | None:
        """Mean time between output tokens; None with fewer than two."""
        if self.first_s is None or self.last_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.due_s


class _Reading:
    """What a stream has shown so far."""

    def __init__(self, keep_text: bool) -> None:
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.longest_gap_s = 0.0
        self.chunks = 0
        self.usage: dict[str, Any] = {}
        self.finished = False
        self.error = ""
        self.text: list[str] = []
        self._keep_text = keep_text

    def take(self, data: bytes, now_s: float) -> None:
        """One event's data. Content without characters (a role, usage) is no token."""
        if data == b"[DONE]":
            self.finished = True
            return
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            self.error = "an event that is not JSON"
            return
        if not isinstance(event, dict):
            self.error = "an event that is no object"
            return
        if event.get("error"):
            error = event["error"]
            self.error = str(error.get("message", error) if isinstance(error, dict) else error)
            return
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            piece = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
            if piece:
                self._token(piece, now_s)

    def _token(self, piece: str, now_s: float) -> None:
        if self.first_s is None:
            self.first_s = now_s
        elif self.last_s is not None:
            self.longest_gap_s = max(self.longest_gap_s, now_s - self.last_s)
        self.last_s = now_s
        self.chunks += 1
        if self._keep_text:
            self.text.append(piece)


async def chat(
    client: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    clock: Clock,
    *,
    due_s: float | None = None,
    keep_text: bool = False,
) -> Outcome:
    """Send a chat with `stream: true` to an OpenAI-compatible API at `url` (its /v1) and read it to its end."""
    sent_s = clock.monotonic()
    due_s = sent_s if due_s is None else due_s
    reading = _Reading(keep_text)
    target, kind, detail = "", OK, ""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.post(f"{url}/chat/completions", json=body, headers=EXPLAIN) as response:
            target = response.headers.get(TARGET_HEADER, "")
            if response.status != 200:
                kind = f"http {response.status}"
                detail = (await response.content.read(500)).decode("utf-8", "replace")
            else:
                async for line in response.content:
                    if line.startswith(b"data:"):
                        reading.take(line[5:].strip(), clock.monotonic())
    except aiohttp.ClientConnectorError as error:
        kind, detail = "connect", str(error)
    except TimeoutError:
        kind, detail = "timeout", ""
    except (aiohttp.ClientError, ValueError) as error:
        kind, detail = "cut", str(error) or type(error).__name__
    if kind == OK and reading.error:
        kind, detail = "error in stream", reading.error
    elif kind == OK and not reading.finished:
        kind, detail = "cut", "the stream ended without [DONE]"
    usage = reading.usage
    return Outcome(
        kind=kind,
        due_s=due_s,
        sent_s=sent_s,
        end_s=clock.monotonic(),
        first_s=reading.first_s,
        last_s=reading.last_s,
        longest_gap_s=reading.longest_gap_s,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        output_tokens=int(usage.get("completion_tokens") or reading.chunks),
        target=target,
        detail=detail[:300],
        text="".join(reading.text),
    )
