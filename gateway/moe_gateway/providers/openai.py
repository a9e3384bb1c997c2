"""OpenAI, servers that speak as it does, Azure's deployments of it, and Bedrock's OpenAI-compatible endpoint."""

from __future__ import annotations

import urllib.parse
from typing import Any, ClassVar

import orjson

from moe_gateway.openai_api import ApiRequest, Endpoint
from moe_gateway.providers.base import Adapter, Unsupported

OPENAI_URL = "https://api.openai.com/v1"
AZURE_API_VERSION = "2024-10-21"
"""Newest dated version of Azure's data plane that is no preview (learn.microsoft.com, Azure OpenAI, REST reference)."""

CHAT_FIELDS = frozenset(
    {
        *("audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs"),
        *("max_completion_tokens", "max_tokens", "messages", "metadata", "modalities", "model", "moderation", "n"),
        *("parallel_tool_calls", "prediction", "presence_penalty", "prompt_cache_key", "prompt_cache_options"),
        *("prompt_cache_retention", "reasoning_effort", "response_format", "safety_identifier", "seed"),
        *("service_tier", "stop", "store", "stream", "stream_options", "temperature", "tool_choice", "tools"),
        *("top_logprobs", "top_p", "user", "verbosity", "web_search_options"),
    }
)
"""Fields of a chat request by OpenAI's own types; the tests hold this set to them."""


def stays_local(endpoint: Endpoint) -> Unsupported | None:
    """An embedding of another model is another vector, and a response of another's has items that our engine cannot
    go on from: neither leaves for any target."""
    if endpoint in {Endpoint.EMBEDDINGS, Endpoint.RESPONSES}:
        return Unsupported(endpoint.value.removeprefix("/"), "answered by the deployment's own model alone")
    return None


def rewrite(request: ApiRequest, model: str, output_cap: int | None, *, newer: bool) -> bytes:
    """The body for a target: its model name, usage asked for in streams (money is settled from it), and `output_cap`
    where the request has no output limit of its own. `newer`: limits go by max_completion_tokens, the one name that
    OpenAI's reasoning models take."""
    document = dict(request.document)
    document["model"] = model
    if request.stream:
        options = document.get("stream_options")
        document["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    if request.output_limit is None and output_cap is not None:
        document["max_completion_tokens" if newer else "max_tokens"] = output_cap
    elif newer and document.get("max_tokens") is not None:
        document["max_completion_tokens"] = request.output_limit
        del document["max_tokens"]
    return orjson.dumps(document)


class CompatibleAdapter(Adapter):
    """Any server with OpenAI's API: it gets the client's fields as they are, its own extensions too."""

    def takes(self, request: ApiRequest) -> Unsupported | None:
        return stays_local(request.endpoint)

    def body(self, request: ApiRequest, output_cap: int | None) -> bytes:
        return rewrite(request, self.target.model, output_cap, newer=False)

    def path(self, request: ApiRequest) -> str:
        return request.endpoint.value


class OpenAiAdapter(Adapter):
    """OpenAI itself. Chat alone, as it serves its current models by nothing older."""

    URL: ClassVar[str | None] = OPENAI_URL

    def takes(self, request: ApiRequest) -> Unsupported | None:
        if request.endpoint is Endpoint.COMPLETIONS:
            return Unsupported("completions", "ask by chat completions")
        return stays_local(request.endpoint) or _foreign(request.document)

    def body(self, request: ApiRequest, output_cap: int | None) -> bytes:
        return rewrite(request, self.target.model, output_cap, newer=True)

    def path(self, request: ApiRequest) -> str:
        return request.endpoint.value


class AzureAdapter(OpenAiAdapter):
    """Azure OpenAI: the deployment is in the path, the key in a header of its own. `model` names the deployment."""

    URL = None

    def path(self, request: ApiRequest) -> str:
        version = urllib.parse.quote(self.target.api_version or AZURE_API_VERSION, safe="")
        deployment = urllib.parse.quote(self.target.model, safe="")
        return f"/openai/deployments/{deployment}{request.endpoint.value}?api-version={version}"

    def headers(self, key: str | None) -> dict[str, str]:
        return {} if key is None else {"api-key": key}


class BedrockAdapter(OpenAiAdapter):
    """Bedrock's OpenAI-compatible endpoint with a Bedrock API key, which needs no AWS signature; it serves the models
    that AWS lists for it. Converse, with its binary event stream, is not spoken."""

    URL = None


def _foreign(document: dict[str, Any]) -> Unsupported | None:
    """The first field that asks for something and is none of OpenAI's: an extension of our own engine, say."""
    for name, value in document.items():
        if name not in CHAT_FIELDS and value is not None:
            return Unsupported(name[:100], "no field of OpenAI's chat API; leave it out for this target to be used")
    return None
