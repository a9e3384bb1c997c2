"""Words that fields of the resource choose from."""

from __future__ import annotations

from enum import StrEnum


class Overflow(StrEnum):
    """What happens to a (token, expert) slot above an expert's capacity."""

    UNLIMITED = "Unlimited"
    REROUTE = "Reroute"
    DROP = "Drop"
    EXPERT_CHOICE = "ExpertChoice"


class EngineKind(StrEnum):
    """Who runs the model."""

    VLLM = "VLLM"
    EXTERNAL = "External"


class Quantization(StrEnum):
    """Form of the weights; Auto reads it from the checkpoint."""

    AUTO = "Auto"
    FP8 = "FP8"
    MXFP4 = "MXFP4"
    NVFP4 = "NVFP4"
    AWQ = "AWQ"
    GPTQ = "GPTQ"
    COMPRESSED_TENSORS = "CompressedTensors"
    BITS_AND_BYTES = "BitsAndBytes"

    @property
    def engine_name(self) -> str | None:
        """vLLM's word for it; None lets vLLM read the checkpoint."""
        return {
            "Auto": None,
            "NVFP4": "modelopt_fp4",
            "CompressedTensors": "compressed-tensors",
        }.get(self.value, self.value.lower())


class KvCacheDtype(StrEnum):
    """Number format of the KV cache; Auto is the model's own."""

    AUTO = "Auto"
    BFLOAT16 = "BFloat16"
    FP8 = "FP8"
    FP8_E4M3 = "FP8E4M3"
    FP8_E5M2 = "FP8E5M2"

    @property
    def engine_name(self) -> str:
        """vLLM's word for it."""
        return {"FP8E4M3": "fp8_e4m3", "FP8E5M2": "fp8_e5m2"}.get(self.value, self.value.lower())


class CacheKind(StrEnum):
    """Where a downloaded checkpoint is kept."""

    EPHEMERAL = "Ephemeral"
    CLAIM = "Claim"
    NODE_PATH = "NodePath"


class MetricsDialect(StrEnum):
    """Whose metric names an external engine exports."""

    VLLM = "VLLM"
    SGLANG = "SGLang"
    TENSORRT_LLM = "TensorRTLLM"
    CUSTOM = "Custom"


class EngineSignal(StrEnum):
    """Signals that we read from an external engine."""

    RUNNING = "running"
    WAITING = "waiting"
    KV_USAGE = "kvUsage"
    PROMPT_TOKENS = "promptTokens"
    GENERATION_TOKENS = "generationTokens"


class Provider(StrEnum):
    """Kinds of closed API that a request may spill to."""

    OPENAI = "openai"
    OPENAI_COMPATIBLE = "openai-compatible"
    ANTHROPIC = "anthropic"
    GEMINI = "gemini"
    AZURE_OPENAI = "azure-openai"
    BEDROCK = "bedrock"


class Egress(StrEnum):
    """Which requests may leave for a closed API."""

    ALLOWED = "Allowed"
    ZERO_RETENTION_ONLY = "ZeroRetentionOnly"
    REGION = "Region"
    NEVER = "Never"


class MidStream(StrEnum):
    """What becomes of a stream that breaks after its first token."""

    OFF = "Off"
    CONTINUE = "Continue"
    SPLICE = "Splice"


class FallbackRight(StrEnum):
    """Whether a tier's requests may spill."""

    ALLOWED = "Allowed"
    NEVER = "Never"


class FallbackMode(StrEnum):
    """Whether what the spill policy decides is done."""

    ACTIVE = "Active"
    SHADOW = "Shadow"


class SessionKey(StrEnum):
    """What tells that requests belong to one session."""

    HEADER = "Header"
    PROMPT_CACHE_KEY = "PromptCacheKey"
    USER = "User"
    PROMPT_HEAD = "PromptHead"


class TuningMode(StrEnum):
    """What the tuner may do."""

    OFF = "Off"
    RECOMMEND = "Recommend"
    AUTO = "Auto"


class AuthMode(StrEnum):
    """How the gateway knows who asks."""

    NONE = "None"
    API_KEYS = "APIKeys"
    OIDC = "OIDC"


class ExposureKind(StrEnum):
    """How clients reach the gateway."""

    CLUSTER_IP = "ClusterIP"
    LOAD_BALANCER = "LoadBalancer"
    INGRESS = "Ingress"
    HTTP_ROUTE = "HTTPRoute"


class BudgetStoreKind(StrEnum):
    """What keeps the fallback budget between gateway pods."""

    OBJECT = "Object"
    POSTGRESQL = "PostgreSQL"
    VALKEY = "Valkey"
    SQLITE = "SQLite"


class UpgradeStrategy(StrEnum):
    """How a new revision takes over."""

    SURGE = "Surge"
    BRIDGE = "Bridge"
    RECREATE = "Recreate"


class GcsFaultTolerance(StrEnum):
    """Whether Ray's control store outlives its head pod."""

    NONE = "None"
    REDIS = "Redis"


class Toggle(StrEnum):
    """A feature whose needs may be missing: Auto turns it on where they are there."""

    AUTO = "Auto"
    ENABLED = "Enabled"
    DISABLED = "Disabled"
