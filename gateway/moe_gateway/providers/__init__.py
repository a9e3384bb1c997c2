"""One adapter for each kind of closed API: pure functions between OpenAI's form and the provider's."""

from __future__ import annotations

from moe_core.clock import Clock
from moe_core.config import TargetConfig
from moe_gateway.providers.anthropic import AnthropicAdapter
from moe_gateway.providers.base import Adapter
from moe_gateway.providers.gemini import GeminiAdapter
from moe_gateway.providers.openai import AzureAdapter, BedrockAdapter, CompatibleAdapter, OpenAiAdapter

_ADAPTERS: dict[str, type[Adapter]] = {
    "openai": OpenAiAdapter,
    "openai-compatible": CompatibleAdapter,
    "anthropic": AnthropicAdapter,
    "gemini": GeminiAdapter,
    "azure-openai": AzureAdapter,
    "bedrock": BedrockAdapter,
}
SUPPORTED = tuple(_ADAPTERS)


def adapter_of(target: TargetConfig, clock: Clock) -> Adapter:
    """The adapter of a target whose provider is supported; the clock dates answers that come without a date."""
    return _ADAPTERS[target.provider](target, clock)
