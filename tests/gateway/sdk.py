"""What the tests of the official clients share: answers of engines and closed APIs, and a gateway with keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_core.config import GatewayConfig
from tests.gateway.fake_upstream import DONE, Behaviour, FakeUpstream, chunk
from tests.gateway.harness import MODEL, config

CLIENT_KEY = "sk-moe-client-3f9c2a71b8d04e6f95a7c1d2e3b4f506"
PROVIDER_KEY = "sk-provider-0f1e2d3c4b5a69788796a5b4c3d2e1f0"
ANSWER_JSON = '{"city": "Oslo", "degrees": 7}'
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 3,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 4},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def gateway(folder: Path, local: FakeUpstream, *targets: FakeUpstream, **more: Any) -> GatewayConfig:
    """A gateway that asks its clients for a key."""
    keys, provider_key = folder / "keys", folder / "provider"
    keys.mkdir(exist_ok=True)
    (keys / "acme").write_text(CLIENT_KEY + "\n")
    provider_key.write_text(PROVIDER_KEY)
    auth = {"mode": "APIKeys", "keysDir": str(keys), **more.pop("auth", {})}
    money = {"price": ("1", "2"), "spill": {"usdPerDay": "1"}, "stateDir": str(folder)} if targets else {}
    return config(local, *targets, auth=auth, **money, **more)


def aimed_at(settings: GatewayConfig, folder: Path, provider: str, base_url: str) -> GatewayConfig:
    """Its first target as one of another provider, which alone answers: the revision has no weight."""
    change = {
        "provider": provider,
        "base_url": base_url,
        "api_key_file": str(folder / "provider"),
        "model": "closed-0",
    }
    target = settings.targets[0].model_copy(update=change)
    return settings.model_copy(update={"targets": (target,), "weights": {"r0": 0}})


def completion(message: dict[str, Any] | None = None, finish: str = "stop", **more: Any) -> Behaviour:
    """A whole chat answer of an engine."""
    said = {"role": "assistant", "content": "Hello there", **(message or {})}
    choice = {"index": 0, "message": said, "finish_reason": finish, "logprobs": None, **more}
    document = {"id": "c1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}
    return Behaviour(body=json.dumps({**document, "usage": USAGE}).encode())


def piece(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    document = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def usage_piece() -> bytes:
    document = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": []}
    return b"data: " + json.dumps({**document, "usage": USAGE}).encode() + b"\n\n"


def streamed(*deltas: dict[str, Any], finish: str = "stop") -> Behaviour:
    """A streamed chat answer of an engine, with a keep-alive before it and its usage after it."""
    first = {"role": "assistant", "content": ""}
    parts = [b": keep-alive\n\n", piece(first), *[piece(one) for one in deltas], piece({}, finish), usage_piece(), DONE]
    return Behaviour(raw=b"".join(parts))


TEXT_STREAM = streamed({"reasoning": "hm"}, {"content": "Hello "}, {"content": "there"})
TOOL_STREAM = streamed(
    {"tool_calls": [{"index": 0, **{**CALL, "function": {"name": "weather", "arguments": ""}}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]},
    finish="tool_calls",
)
CUT_STREAM = Behaviour(raw=piece({"role": "assistant", "content": ""}) + chunk("Hello "))
"""Ends after a token, without a finish reason."""
