"""One adapter for each kind of closed API: pure functions between OpenAI's form and the provider's."""

from __future__ import annotations

from moe_core.config import TargetConfig
from moe_gateway.providers.base import Adapter
from moe_gateway.providers.openai import AzureAdapter, BedrockAdapter, CompatibleAdapter, OpenAiAdapter

_ADAPTERS: dict[str, type[Adapter]] = {
    "openai": OpenAiAdapter,
    "openai-compatible": CompatibleAdapter,
    "azure-openai": AzureAdapter,
    "bedrock": BedrockAdapter,
}
SUPPORTED = tuple(_ADAPTERS)


def adapter_of(target: TargetConfig) -> Adapter:
    """The adapter of a target whose provider is supported."""
    return _ADAPTERS[target.provider](target)
