"""The engine: vLLM that we run, or an external one behind the same gateway."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import GetJsonSchemaHandler, StringConstraints
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from moe_api.common import Count, SecretKeyRef, Url
from moe_api.enums import EngineKind, EngineSignal, KvCacheDtype, MetricsDialect
from moe_api.fields import Disruption, ListOf, MapOf, Rule, SpecModel, group, hot, revision, rolling

ArgKind = Literal["flag", "int", "decimal", "word"]
EXTRA_ARGS: dict[str, ArgKind] = {
    "all2all-backend": "word",
    "async-scheduling": "flag",
    "attention-backend": "word",
    "block-size": "int",
    "chat-template-content-format": "word",
    "cpu-offload-gb": "decimal",
    "disable-custom-all-reduce": "flag",
    "dtype": "word",
    "enable-auto-tool-choice": "flag",
    "enable-chunked-prefill": "flag",
    "enable-dbo": "flag",
    "enable-prefix-caching": "flag",
    "enforce-eager": "flag",
    "gpu-memory-utilization": "decimal",
    "kv-cache-memory-bytes": "int",
    "long-prefill-token-threshold": "int",
    "max-logprobs": "int",
    "max-long-partial-prefills": "int",
    "max-num-partial-prefills": "int",
    "moe-backend": "word",
    "reasoning-parser": "word",
    "scheduling-policy": "word",
    "seed": "int",
    "tokenizer-mode": "word",
    "tool-call-parser": "word",
}
"""vLLM arguments that may be passed on, by the form of their value. None of them names code or a file to run."""

FOREIGN_CODE = frozenset(
    {
        "trust-remote-code",
        "tool-parser-plugin",
        "reasoning-parser-plugin",
        "logits-processors",
        "middleware",
        "worker-cls",
    }
    | {"worker-extension-cls", "scheduler-cls", "hf-overrides", "model-loader-extra-config", "kv-transfer-config"}
    | {"io-processor-plugin", "load-format", "chat-template", "additional-config", "speculative-config"}
)
"""Known arguments that can run code from outside the image; named so that the refusal can say why."""

OWN_FIELDS = {
    "data-parallel-size": "spec.parallelism.data",
    "enable-expert-parallel": "spec.parallelism.expert",
    "kv-cache-dtype": "spec.engine.kvCacheDtype",
    "max-model-len": "spec.engine.maxModelLen",
    "max-num-batched-tokens": "spec.engine.maxBatchedTokens",
    "max-num-seqs": "spec.engine.maxActiveSeqs",
    "model": "spec.model",
    "pipeline-parallel-size": "spec.parallelism.pipeline",
    "quantization": "spec.model.quantization",
    "revision": "spec.model.revision",
    "served-model-name": "spec.model.id",
    "tensor-parallel-size": "spec.parallelism.tensor",
}
"""Arguments that have a field of their own."""

_FORMS: dict[ArgKind, str] = {
    "flag": r"^(true|false)$",
    "int": r"^[0-9]{1,15}$",
    "decimal": r"^[0-9]{1,6}(\.[0-9]{1,6})?$",
    "word": r"^[A-Za-z0-9][-A-Za-z0-9_.]*$",
}
_FORM_TEXT: dict[ArgKind, str] = {
    "flag": '"true" or "false"',
    "int": 'a whole number in quotes, such as "16"',
    "decimal": 'a decimal in quotes, such as "0.9"',
    "word": "letters, digits, '-', '_' and '.'",
}


def _quoted(names: Iterable[str]) -> str:
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"


class _ExtraArgs(MapOf):
    """Arguments from the allow-list, each value in the form of its argument."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        rendered = super().__get_pydantic_json_schema__(schema, handler)
        rules = [(f"k in {_quoted(EXTRA_ARGS)}", f"allows only {', '.join(EXTRA_ARGS)}")]
        for kind, form in _FORMS.items():
            names = [name for name, own in EXTRA_ARGS.items() if own == kind]
            test = f"!(k in {_quoted(names)}) || self[k].matches(r'{form}')"
            rules.append((test, f"{', '.join(names)} must be {_FORM_TEXT[kind]}"))
        rendered["x-kubernetes-validations"] = [
            {"rule": f"self.all(k, {test})", "message": message} for test, message in rules
        ]
        return rendered

    def _refusal(self, key: str, value: Any) -> str | None:
        kind = EXTRA_ARGS.get(key)
        if kind is not None:
            return None if re.fullmatch(_FORMS[kind], value) else f"must be {_FORM_TEXT[kind]}"
        bare = key.lstrip("-").replace("_", "-")
        if bare in FOREIGN_CODE:
            return "is refused: it can run code from outside the image"
        if bare in EXTRA_ARGS:
            return f"is not allowed: write {bare}"
        if bare in OWN_FIELDS:
            return f"is not allowed: set {OWN_FIELDS[bare]}"
        return f"is not allowed: remove it, or use one of {', '.join(EXTRA_ARGS)}"


class MetricName(SpecModel):
    """One signal of ours and the metric of the external engine that carries it."""

    signal: EngineSignal = hot("Our signal.")
    metric: Annotated[
        str, StringConstraints(strict=True, min_length=1, max_length=128, pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$")
    ] = hot("The engine's Prometheus metric.", allowed="the name of a Prometheus metric")


class EngineMetrics(SpecModel):
    """How the gateway reads an external engine's load."""

    dialect: MetricsDialect = hot("Whose metric names the engine exports; Custom takes `names`.", MetricsDialect.VLLM)
    url: Url | None = hot(
        "Prometheus endpoint of the engine; by default /metrics beside its API.",
        None,
        allowed="an http or https address without credentials",
    )
    names: Annotated[tuple[MetricName, ...], ListOf(16, key="signal")] = group("Metric names for dialect Custom.", ())

    RULES = (
        Rule(
            "self.dialect != 'Custom' || size(self.names) > 0",
            "is needed with dialect Custom: map at least one signal",
            ".names",
            lambda s: s.dialect != MetricsDialect.CUSTOM or len(s.names) > 0,
        ),
    )


class EngineSpec(SpecModel):
    """Engine and its launch-time ceilings."""

    kind: EngineKind = revision(
        "VLLM (deployed by us) or External (an OpenAI-compatible server at `url`).", EngineKind.VLLM
    )
    url: Url | None = revision(
        "Base of the external engine's OpenAI API, such as http://sglang:30000/v1.",
        None,
        allowed="an http or https address without credentials",
    )
    api_key_secret_ref: SecretKeyRef | None = group(
        "Secret with the external engine's API key.", None, disruption=Disruption.HOT
    )
    metrics: EngineMetrics = group("How an external engine's load is read.", EngineMetrics())
    image: (
        Annotated[
            str,
            StringConstraints(
                strict=True,
                min_length=1,
                max_length=512,
                pattern=r"^[a-zA-Z0-9][-a-zA-Z0-9._/:]*(@sha256:[a-f0-9]{64})?$",
            ),
        ]
        | None
    ) = revision(
        "Container image with Ray and vLLM; by default the chart's. A revision keeps its name: name a digest.",
        None,
        allowed="an image reference",
    )
    max_model_len: Count | None = revision(
        "Longest context; by default the model's own.", None, unit="tokens", le=16_777_216
    )
    max_active_seqs: Count | None = revision(
        "Launch-time ceiling of sequences in a batch; by default the planner's.",
        None,
        unit="sequences",
        lowered=Disruption.HOT,
        le=65_536,
    )
    max_batched_tokens: Count | None = revision(
        "Launch-time ceiling of tokens in a step; by default the planner's.",
        None,
        unit="tokens",
        lowered=Disruption.HOT,
        le=16_777_216,
    )
    kv_cache_dtype: KvCacheDtype = revision(
        "Number format of the KV cache; Auto is the model's own.", KvCacheDtype.AUTO
    )
    extra_args: Annotated[
        dict[str, Annotated[str, StringConstraints(strict=True, min_length=1, max_length=128)]], _ExtraArgs(32)
    ] = rolling(f"Further vLLM arguments, from this list: {', '.join(EXTRA_ARGS)}.", {})

    RULES = (
        Rule(
            "self.kind != 'External' || has(self.url)",
            "is needed with kind External: the base of its OpenAI API, such as http://sglang:30000/v1",
            ".url",
            lambda s: s.kind != EngineKind.EXTERNAL or s.url is not None,
        ),
        Rule(
            "self.kind == 'External' || !has(self.url)",
            "belongs to kind External: remove it, or set kind: External",
            ".url",
            lambda s: s.kind == EngineKind.EXTERNAL or s.url is None,
        ),
        Rule(
            "self.kind == 'External' || !has(self.apiKeySecretRef)",
            "belongs to kind External: remove it, or set kind: External",
            ".apiKeySecretRef",
            lambda s: s.kind == EngineKind.EXTERNAL or s.api_key_secret_ref is None,
        ),
        Rule(
            "self.kind != 'External' || !has(self.image)",
            "has no effect with kind External: remove it",
            ".image",
            lambda s: s.kind != EngineKind.EXTERNAL or s.image is None,
        ),
        Rule(
            "self.kind != 'External' || size(self.extraArgs) == 0",
            "has no effect with kind External: remove it",
            ".extraArgs",
            lambda s: s.kind != EngineKind.EXTERNAL or not s.extra_args,
        ),
        Rule(
            "!has(self.maxActiveSeqs) || !has(self.maxBatchedTokens) || self.maxBatchedTokens >= self.maxActiveSeqs",
            "must be at least maxActiveSeqs: every running sequence needs a token in each step",
            ".maxBatchedTokens",
            lambda s: None in (s.max_active_seqs, s.max_batched_tokens) or s.max_batched_tokens >= s.max_active_seqs,
        ),
    )

    def typed_extra_args(self) -> dict[str, str | int | float | bool]:
        """`extraArgs` as vLLM's Python API takes them: names with underscores, values typed."""
        return {
            name.replace("-", "_"): _typed(EXTRA_ARGS[name], text) for name, text in sorted(self.extra_args.items())
        }


def _typed(kind: ArgKind, text: str) -> str | int | float | bool:
    match kind:
        case "flag":
            return text == "true"
        case "int":
            return int(text)
        case "decimal":
            return float(text)
        case "word":
            return text
