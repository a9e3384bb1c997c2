"""Adapters of closed APIs: what is sent and what comes back, held to the official SDKs' own types."""

from __future__ import annotations

import json
from typing import Any, get_args

import anthropic.types as a
import openai.types.chat as o
import pytest
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming, MessageCreateParamsStreaming
from google.genai import types as g
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import completion_create_params
from pydantic import BaseModel, ConfigDict, TypeAdapter

from moe_core.clock import FakeClock
from moe_core.config import TargetConfig
from moe_gateway.messages_in import parse_messages
from moe_gateway.openai_api import ApiError, ApiRequest, Endpoint, Usage, parse
from moe_gateway.providers import SUPPORTED, adapter_of
from moe_gateway.providers.base import Adapter
from moe_gateway.providers.openai import CHAT_FIELDS

CAT = "data:image/png;base64,iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": [{"type": "text", "text": "No lists."}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Where?"}, {"type": "image_url", "image_url": {"url": CAT}}],
    },
    {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {"role": "user", "content": "And now?"},
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


class GeminiRequest(BaseModel):
    """The fields of generateContent (ai.google.dev/api/generate-content) that are sent, by Google's own types."""

    model_config = ConfigDict(extra="forbid")
    contents: list[g.Content]
    systemInstruction: g.Content | None = None
    tools: list[g.Tool] | None = None
    toolConfig: g.ToolConfig | None = None
    generationConfig: g.GenerationConfig | None = None


def adapter(provider: str, **more: Any) -> Adapter:
    target = {"name": "t", "provider": provider, "model": "the-model", **more}
    return adapter_of(TargetConfig.model_validate(target), FakeClock())


def asked(endpoint: Endpoint = Endpoint.CHAT, **more: Any) -> ApiRequest:
    document = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **more}
    return parse(endpoint, json.dumps(document).encode())


def sent(provider: str, cap: int | None = None, **more: Any) -> dict[str, Any]:
    made = adapter(provider)
    request = asked(**more)
    assert made.takes(request) is None
    document: dict[str, Any] = json.loads(made.body(request, cap))
    return document


def checked_by_sdk(provider: str, document: dict[str, Any]) -> None:
    """The body passes the official client's own types, with no field that they lack."""
    if provider == "anthropic":
        form = MessageCreateParamsStreaming if document.get("stream") else MessageCreateParamsNonStreaming
        TypeAdapter(form).validate_python(document)
        assert set(document) <= form.__required_keys__ | form.__optional_keys__
    elif provider == "gemini":
        GeminiRequest.model_validate(document)
    else:
        TypeAdapter(o.CompletionCreateParams).validate_python(document)


def test_every_provider_of_the_configuration_has_an_adapter() -> None:
    assert set(get_args(TargetConfig.model_fields["provider"].annotation)) == set(SUPPORTED)


def test_the_fields_of_openai_are_those_of_its_own_types() -> None:
    ours = set(completion_create_params.CompletionCreateParamsStreaming.__annotations__)
    assert ours == CHAT_FIELDS


@pytest.mark.parametrize("provider", SUPPORTED)
@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_with_tools_images_and_a_schema_is_sent_in_the_providers_form(
    provider: str, stream: bool
) -> None:
    document = sent(
        provider,
        messages=TALK,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        response_format=FORMAT,
        reasoning_effort="low",
        stop=["END"],
        max_tokens=9,
        stream=stream,
        n=1,
        temperature=1,
    )
    checked_by_sdk(provider, document)


def test_anthropic_gets_blocks() -> None:
    document = sent("anthropic", messages=TALK, tools=[WEATHER], parallel_tool_calls=False, stop="END", user="u1")
    assert document["model"] == "the-model"
    assert [block["text"] for block in document["system"]] == ["Be brief.", "No lists."]
    user, assistant, after = document["messages"]
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    assert user["content"] == [{"type": "text", "text": "Where?"}, {"type": "image", "source": source}]
    assert assistant["content"][1] == {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}}
    assert after["content"] == [
        {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
        {"type": "text", "text": "And now?"},
    ]
    assert document["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}
    assert (document["stop_sequences"], document["metadata"]) == (["END"], {"user_id": "u1"})


@pytest.mark.parametrize(
    ("given", "cap", "want"),
    [({}, None, 4096), ({}, 77, 77), ({"max_tokens": 5}, 77, 5), ({"max_completion_tokens": 6}, None, 6)],
)
def test_anthropic_always_gets_an_output_limit(given: dict[str, int], cap: int | None, want: int) -> None:
    assert sent("anthropic", cap, **given)["max_tokens"] == want


def test_gemini_gets_contents() -> None:
    document = sent("gemini", 50, messages=TALK, tools=[WEATHER], tool_choice="required", seed=1, top_p=0.5, n=2)
    assert document["systemInstruction"] == {"parts": [{"text": "Be brief."}, {"text": "No lists."}]}
    user, model, after = document["contents"]
    assert user["parts"][1] == {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}}
    call = {"id": "call_1", "name": "weather", "args": {"city": "Oslo"}}
    assert model["parts"][1] == {"functionCall": call, "thoughtSignature": "skip_thought_signature_validator"}
    result = {"id": "call_1", "name": "weather", "response": {"result": "rain"}}
    assert after["parts"] == [{"functionResponse": result}, {"text": "And now?"}]
    assert document["toolConfig"] == {"functionCallingConfig": {"mode": "ANY"}}
    assert document["generationConfig"] == {"seed": 1, "topP": 0.5, "candidateCount": 2, "maxOutputTokens": 50}


def test_a_signature_of_geminis_goes_back_with_its_call() -> None:
    call = {**CALL, "extra_content": {"google": {"thought_signature": "c2ln"}}}
    talk = [TALK[2], {"role": "assistant", "tool_calls": [call]}, TALK[4]]
    (part,) = sent("gemini", messages=talk)["contents"][1]["parts"]
    assert part["thoughtSignature"] == "c2ln"


PATHS = [
    ("openai", {}, "/chat/completions", {"Authorization": "Bearer k"}),
    ("openai-compatible", {}, "/chat/completions", {"Authorization": "Bearer k"}),
    ("bedrock", {}, "/chat/completions", {"Authorization": "Bearer k"}),
    ("azure-openai", {}, "/openai/deployments/the-model/chat/completions?api-version=2024-10-21", {"api-key": "k"}),
    ("anthropic", {}, "/v1/messages", {"x-api-key": "k", "anthropic-version": "2023-06-01"}),
    ("gemini", {}, "/models/the-model:generateContent", {"x-goog-api-key": "k"}),
    ("gemini", {"stream": True}, "/models/the-model:streamGenerateContent?alt=sse", {"x-goog-api-key": "k"}),
]


@pytest.mark.parametrize(("provider", "more", "path", "headers"), PATHS)
def test_paths_and_keys(provider: str, more: dict[str, Any], path: str, headers: dict[str, str]) -> None:
    made = adapter(provider)
    assert (made.path(asked(**more)), made.headers("k")) == (path, headers)
    assert "k" not in made.headers(None).values()


def test_azures_path_is_that_of_its_own_client() -> None:
    import openai

    client = openai.AzureOpenAI(azure_endpoint="https://r.example", api_key="k", api_version="2025-04-01-preview")
    options = openai._models.FinalRequestOptions(
        method="post", url="/chat/completions", json_data={"model": "the-model"}
    )
    theirs = client._build_request(client._prepare_options(options))
    made = adapter("azure-openai", apiVersion="2025-04-01-preview")
    assert str(theirs.url) == "https://r.example" + made.path(asked())
    assert theirs.headers["api-key"] == "k"


LACKS = [
    ("anthropic", {"temperature": 0.2}, "temperature"),
    ("anthropic", {"n": 2}, "n"),
    ("anthropic", {"seed": 1}, "seed"),
    ("anthropic", {"logprobs": True}, "logprobs"),
    ("anthropic", {"logit_bias": {"1": 2}}, "logit_bias"),
    ("anthropic", {"presence_penalty": 0.5}, "presence_penalty"),
    ("anthropic", {"min_p": 0.1}, "min_p"),
    ("anthropic", {"response_format": {"type": "json_object"}}, "response_format.type"),
    ("anthropic", {"reasoning_effort": "minimal"}, "reasoning_effort"),
    ("anthropic", {"messages": [*TALK, {"role": "assistant", "content": "So"}]}, "messages"),
    (
        "anthropic",
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
    ),
    ("anthropic", {"messages": [TALK[5], TALK[0]]}, "messages[1].role"),
    ("anthropic", {"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name"),
    ("anthropic", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ("gemini", {"logit_bias": {"1": 2}}, "logit_bias"),
    ("gemini", {"user": "u"}, "user"),
    ("gemini", {"parallel_tool_calls": False}, "parallel_tool_calls"),
    ("gemini", {"reasoning_effort": "xhigh"}, "reasoning_effort"),
    ("gemini", {"messages": [TALK[4]]}, "messages[0].tool_call_id"),
    (
        "gemini",
        {"tools": [{"type": "function", "function": {"name": "x", "strict": True}}]},
        "tools[0].function.strict",
    ),
    ("openai", {"top_k": 4}, "top_k"),
    ("azure-openai", {"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ("bedrock", {"min_p": 0.1}, "min_p"),
]


@pytest.mark.parametrize(("provider", "more", "field"), LACKS)
def test_what_a_target_lacks_is_refused_by_name(provider: str, more: dict[str, Any], field: str) -> None:
    refused = adapter(provider).takes(asked(**more))
    assert refused is not None
    assert refused.field == field
    assert refused.remedy


@pytest.mark.parametrize("provider", SUPPORTED)
def test_defaults_and_nulls_ask_for_nothing(provider: str) -> None:
    given = {"temperature": None, "n": 1, "presence_penalty": 0, "logprobs": False, "stop": None, "tools": []}
    assert adapter(provider).takes(asked(**given)) is None


@pytest.mark.parametrize("provider", SUPPORTED)
@pytest.mark.parametrize("endpoint", [Endpoint.EMBEDDINGS, Endpoint.RESPONSES, Endpoint.COMPLETIONS])
def test_only_chat_goes_to_another_model(provider: str, endpoint: Endpoint) -> None:
    refused = adapter(provider).takes(asked(endpoint))
    taken = provider == "openai-compatible" and endpoint is Endpoint.COMPLETIONS
    assert (refused is None) is taken


# Answers: built by the provider's own types, read by OpenAI's


def message(**more: Any) -> a.Message:
    usage = a.Usage(input_tokens=10, output_tokens=7, cache_read_input_tokens=4, cache_creation_input_tokens=1)
    usage.output_tokens_details = a.OutputTokensDetails(thinking_tokens=3)
    given = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [],
        "stop_reason": "end_turn",
        "usage": usage,
        **more,
    }
    return a.Message(**given)


def candidates(*found: g.Candidate) -> g.GenerateContentResponse:
    usage = g.GenerateContentResponseUsageMetadata(
        prompt_token_count=15, candidates_token_count=4, thoughts_token_count=3, cached_content_token_count=4
    )
    return g.GenerateContentResponse(
        candidates=list(found), usage_metadata=usage, response_id="r1", model_version="gemini-x"
    )


def candidate(*parts: g.Part, reason: str = "STOP", **more: Any) -> g.Candidate:
    return g.Candidate(
        content=g.Content(role="model", parts=list(parts)), finish_reason=g.FinishReason(reason), index=0, **more
    )


def whole(provider: str, answer: BaseModel) -> o.ChatCompletion:
    raw = answer.model_dump_json(by_alias=True, exclude_none=True).encode()
    return o.ChatCompletion.model_validate_json(adapter(provider).answer(200, raw), strict=False)


THOUGHT = a.ThinkingBlock(type="thinking", thinking="hm", signature="s")
TOOL_USE = a.ToolUseBlock(type="tool_use", id="toolu_1", name="weather", input={"city": "Oslo"})
WHOLE = [
    ("anthropic", message(content=[THOUGHT, a.TextBlock(type="text", text="Hello")])),
    ("gemini", candidates(candidate(g.Part(text="hm", thought=True), g.Part(text="Hello")))),
]


@pytest.mark.parametrize(("provider", "answer"), WHOLE)
def test_a_whole_answer_is_openais_with_every_token_counted(provider: str, answer: BaseModel) -> None:
    got = whole(provider, answer)
    choice = got.choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.role) == ("Hello", "stop", "assistant")
    assert choice.message.model_extra == {"reasoning": "hm"}
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (15, 7, 22)
    assert got.usage.prompt_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens == 4
    assert got.usage.completion_tokens_details is not None
    assert got.usage.completion_tokens_details.reasoning_tokens == 3


@pytest.mark.parametrize(
    ("provider", "answer"),
    [
        (
            "anthropic",
            message(content=[TOOL_USE, TOOL_USE.model_copy(update={"id": "toolu_2"})], stop_reason="tool_use"),
        ),
        (
            "gemini",
            candidates(
                candidate(
                    g.Part(function_call=g.FunctionCall(id="toolu_1", name="weather", args={"city": "Oslo"})),
                    g.Part(function_call=g.FunctionCall(id="toolu_2", name="weather", args={"city": "Oslo"})),
                )
            ),
        ),
    ],
)
def test_tool_calls_side_by_side(provider: str, answer: BaseModel) -> None:
    (choice,) = whole(provider, answer).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert [call.id for call in choice.message.tool_calls] == ["toolu_1", "toolu_2"]
    assert isinstance(choice.message.tool_calls[0], o.ChatCompletionMessageFunctionToolCall)
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Oslo"}


REASONS = [
    *[("anthropic", message(stop_reason=theirs), ours) for theirs, ours in [
        ("end_turn", "stop"), ("stop_sequence", "stop"), ("pause_turn", "stop"), ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"), ("tool_use", "tool_calls"), ("refusal", "content_filter"),
    ]],
    *[("gemini", candidates(candidate(g.Part(text="x"), reason=theirs)), ours) for theirs, ours in [
        ("STOP", "stop"), ("MAX_TOKENS", "length"), ("SAFETY", "content_filter"), ("RECITATION", "content_filter"),
        ("SPII", "content_filter"), ("IMAGE_SAFETY", "content_filter"),
    ]],
]  # fmt: skip


@pytest.mark.parametrize(("provider", "answer", "want"), REASONS)
def test_stop_reasons(provider: str, answer: BaseModel, want: str) -> None:
    assert whole(provider, answer).choices[0].finish_reason == want


def test_every_stop_reason_of_anthropics_types_is_known() -> None:
    from moe_gateway.providers.anthropic import _FINISH

    assert set(get_args(a.StopReason)) == set(_FINISH)


def test_a_prompt_that_gemini_blocks_is_filtered_content() -> None:
    feedback = g.GenerateContentResponsePromptFeedback(block_reason=g.BlockedReason.SAFETY)
    got = whole("gemini", g.GenerateContentResponse(prompt_feedback=feedback, response_id="r", model_version="m"))
    assert (got.choices[0].finish_reason, got.choices[0].message.refusal) == (
        "content_filter",
        "the prompt was blocked",
    )


def test_logprobs_of_gemini() -> None:
    one = g.LogprobsResultCandidate(token="Hi", log_probability=-0.5, token_id=1)
    result = g.LogprobsResult(
        chosen_candidates=[one], top_candidates=[g.LogprobsResultTopCandidates(candidates=[one, one])]
    )
    got = whole("gemini", candidates(candidate(g.Part(text="Hi"), logprobs_result=result)))
    assert got.choices[0].logprobs is not None
    assert got.choices[0].logprobs.content is not None
    (first,) = got.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes, len(first.top_logprobs)) == ("Hi", -0.5, [72, 105], 2)


ERRORS = [
    ("anthropic", 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}, 400),
    ("gemini", 400, {"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}, 400),
    ("gemini", 400, {"error": {"message": "no", "details": [{"reason": "API_KEY_INVALID"}]}}, 401),
    ("openai", 400, {"error": {"message": "no", "type": "t", "code": None, "param": None}}, 400),
]


@pytest.mark.parametrize(("provider", "status", "body", "means"), ERRORS)
def test_errors_are_openais(provider: str, status: int, body: dict[str, Any], means: int) -> None:
    made, raw = adapter(provider), json.dumps(body).encode()
    assert made.status(status, raw) == means
    error = json.loads(made.answer(status, raw))["error"]
    assert (error["message"], set(error)) == ("no", {"message", "type", "code", "param"})


@pytest.mark.parametrize("provider", ["anthropic", "gemini"])
@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"content": 3, "candidates": [3]}', b"null"])
def test_what_is_no_answer_is_refused(provider: str, body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (orjson's own among them)
        adapter(provider).answer(200, body)


def test_usage_tells_cached_tokens() -> None:
    from moe_gateway.openai_api import read_usage

    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    assert read_usage({"usage": usage}) == Usage(9, 2, 4)
    assert read_usage({"usage": {**usage, "prompt_tokens_details": {"cached_tokens": 99}}}) == Usage(9, 2, 9)


# Requests of any form: clients write them, so none may be too much

WORDS = st.sampled_from(
    [
        *("user", "assistant", "tool", "system", "text", "image", "image_url", "tool_use", "tool_result", "thinking"),
        *("function", "auto", "none", "low", "json_schema", "url", "base64", "enabled", "custom", CAT, "{}", ""),
    ]
)
NAMES = st.sampled_from(
    [
        *("role", "content", "type", "text", "image_url", "url", "detail", "tool_calls", "function", "name", "source"),
        *("arguments", "id", "tool_call_id", "tool_use_id", "json_schema", "schema", "input", "parameters", "effort"),
    ]
)
NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**63 - 1) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        *("messages", "tools", "tool_choice", "response_format", "reasoning_effort", "stop", "user", "system", "n"),
        *("output_config", "thinking", "metadata", "service_tier", "stop_sequences", "top_k", "parallel_tool_calls"),
    ]
)


@pytest.mark.parametrize("provider", SUPPORTED)
@given(fields=st.dictionaries(FIELDS, NONSENSE, max_size=4))
def test_whatever_is_asked_a_target_takes_it_or_names_what_it_lacks(provider: str, fields: dict[str, Any]) -> None:
    made, request = adapter(provider), asked(**fields)
    refused = made.takes(request)
    if refused is None:
        assert isinstance(json.loads(made.body(request, 10)), dict)
    else:
        assert refused.field
        assert refused.remedy


@given(fields=st.dictionaries(FIELDS, NONSENSE, max_size=4))
def test_whatever_is_asked_of_messages_is_read_or_refused_by_400(fields: dict[str, Any]) -> None:
    document = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}], **fields}
    try:
        request = parse_messages(json.dumps(document).encode())
    except ApiError as error:
        assert error.status == 400  # noqa: PT017 (either end is right, and one of them it must be)
    else:
        assert request.messages == document
        assert request.document["messages"]
