"""Configuration of each process, rendered by the operator in a cluster and by `moectl up` on one machine.

A process reads one JSON document of its type, and nothing else but secrets from files.
"""

from __future__ import annotations

import hashlib
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field

from moe_api.base import Model
from moe_api.enums import (
    AuthMode,
    Egress,
    EngineSignal,
    FallbackMode,
    FallbackRight,
    MetricsDialect,
    MidStream,
    Overflow,
    SessionKey,
)
from moe_core.wire import Knobs, Percent

Port = Annotated[int, Field(ge=0, le=65535)]


def config_hash(document: bytes) -> str:
    """First 16 hex digits of the SHA-256 of a configuration file, byte for byte: which one a process has in force."""
    return hashlib.sha256(document).hexdigest()[:16]


class TargetConfig(Model):
    """A closed API, or any OpenAI-compatible server, that requests may spill to."""

    name: str
    provider: Literal["openai", "openai-compatible", "anthropic", "gemini", "azure-openai", "bedrock"]
    model: str
    base_url: str | None = None
    api_key_file: str | None = Field(default=None, description="file that holds the key; read again when it changes")
    usd_per_m_input: Decimal = Decimal(0)
    usd_per_m_output: Decimal = Decimal(0)
    api_version: str | None = Field(default=None, description="of azure-openai; None: the newest that is no preview")
    cached_input_usd_per_m: Decimal | None = Field(default=None, ge=0, description="None: what other input costs")
    zero_retention: bool = Field(default=False, description="its provider has agreed to keep nothing")
    region: str | None = Field(default=None, description="where its provider processes data, as far as known")


class ForeignMetrics(Model):
    """Where and by which names an engine that is not ours tells its load."""

    url: str = Field(description="address of its Prometheus text, e.g. http://host:30000/metrics")
    dialect: MetricsDialect = MetricsDialect.VLLM
    names: dict[EngineSignal, str] = Field(default_factory=dict, description="of dialect Custom: signal → metric")


class RevisionConfig(Model):
    """One revision behind the gateway: its OpenAI endpoint and its board, or the metrics of an engine not ours."""

    name: str
    url: str = Field(description="base of the OpenAI API, e.g. http://host:8000/v1")
    board_url: str | None = None
    metrics: ForeignMetrics | None = Field(default=None, description="None: an engine of ours, which has a board")


class SloConfig(Model):
    """Promises, in seconds."""

    ttft_p95_s: float = Field(gt=0)
    itl_p95_s: float = Field(gt=0)


class SpillConfig(Model):
    """Starting values of the spill thresholds; knobs replace them live."""

    miss_probability: float = Field(default=0.5, ge=0, le=1)
    share_cap: float = Field(default=1.0, ge=0, le=1)
    usd_per_day: Decimal | None = Field(default=None, description="None: no fallback spending is allowed beyond zero")
    usd_per_month: Decimal | None = Field(default=None, ge=0, description="None: no bound but the day's")
    mode: FallbackMode | None = Field(default=None, description="None: Active, what is decided is done")

    @property
    def shadow(self) -> bool:
        """Whether what would be spilled is told and not done."""
        return self.mode is FallbackMode.SHADOW


class GatewayLimits(Model):
    """Bounds of one request, and of the gateway's own end."""

    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1, description="a larger request is answered 413")
    first_token_s: float = Field(default=30.0, gt=0, description="then another target is tried, where one may be")
    response_s: float = Field(default=600.0, gt=0, description="longest wait for an answer's first token")
    idle_s: float = Field(default=60.0, gt=0, description="longest silence of an upstream in mid-stream")
    client_stall_s: float = Field(default=60.0, gt=0, description="longest wait for a client to send or to read")
    drain_s: float = Field(default=30.0, ge=0, description="from SIGTERM to the end of the last stream")
    spill_output_tokens: int = Field(
        default=4096, ge=1, description="output limit set at a priced target where the request has none"
    )


class TierConfig(Model):
    """A class of tenants, as the gateway tells them apart."""

    name: str
    tenants: tuple[str, ...] = Field(default=(), description="none: whoever asks for the tier may have it")
    fallback: FallbackRight | None = Field(default=None, description="None: its requests may spill")
    slo: SloConfig | None = Field(default=None, description="its own promise; None: the deployment's")


class KeyLimits(Model):
    """What one key, or one tenant of tokens, may take from one gateway process. None: no limit."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1, description="prompt and output tokens together")
    concurrent: int | None = Field(default=None, ge=1, description="requests in flight at once")


class AuthConfig(Model):
    """How the gateway knows who asks. All of it can change while it runs."""

    mode: AuthMode = AuthMode.NONE
    keys_dir: str | None = Field(
        default=None, description="APIKeys: folder with a file a tenant, its name the tenant, each line a key"
    )
    keys_file: str | None = Field(default=None, description="APIKeys: JSON of keys hashed by SHA-256, with limits")
    issuer: str | None = Field(default=None, description="OIDC: address of the issuer, as tokens name it")
    audience: str | None = Field(default=None, description="OIDC: what a token's aud must hold")
    tenant_claim: str = Field(default="sub", min_length=1, description="OIDC: claim that names the tenant")
    limits: KeyLimits = Field(default=KeyLimits(), description="of each key that has none of its own")


class TracingConfig(Model):
    """Where traces go. Without it none is made."""

    endpoint: str = Field(description="OTLP over HTTP, e.g. http://collector:4318/v1/traces")
    sample: float = Field(default=1.0, ge=0, le=1, description="share of requests whose client has not decided")


class BudgetStoreConfig(Model):
    """What keeps the budget between the processes and pods of a gateway."""

    kind: Literal["SQLite", "PostgreSQL", "Valkey", "Object"] = "SQLite"
    url_file: str | None = Field(default=None, description="file with the address, for PostgreSQL and Valkey")
    object: str | None = Field(default=None, description="namespace/name of a ConfigMap, for Object")
    pods: int = Field(default=1, ge=1, description="most pods that use it at once; SQLite serves one")


class EgressRule(Model):
    """Which targets may get data."""

    egress: Egress = Egress.ALLOWED
    regions: tuple[str, ...] = Field(default=(), description="of egress Region")


class EgressConfig(Model):
    """Which targets may get whose data. All rules that apply hold at once."""

    deployment: EgressRule = EgressRule()
    tenants: dict[str, EgressRule] = Field(default_factory=dict)
    tiers: dict[str, EgressRule] = Field(default_factory=dict)


class TenantBudgets(Model):
    """What tenants may spend of the deployment's budget, each."""

    usd_per_day: Decimal | None = Field(default=None, ge=0, description="of each that is not named; None: no own bound")
    tenants: dict[str, Annotated[Decimal, Field(ge=0)]] = Field(default_factory=dict)


class SiblingsConfig(Model):
    """How the gateway's workers and pods tell one another what they have sent (UDP)."""

    host: str = "0.0.0.0"  # noqa: S104  # every address of the pod: the others are pods of their own
    port: int = Field(ge=1, le=65535, description="of the first worker of a pod; each further one takes the next")
    workers: int = Field(default=1, ge=1, le=64, description="of a pod: ports that are listened on and told")
    peers: tuple[str, ...] = Field(default=(), description="names or addresses of pods; all addresses of a name count")
    key_file: str | None = Field(default=None, description="file with a secret that all share; signs every datagram")


class MidStreamConfig(Model):
    """What becomes of a stream that breaks after its first token."""

    mode: MidStream = Field(default=MidStream.OFF, description="Continue: on a revision; Splice: at a target as well")
    takeovers: int = Field(default=1, ge=1, le=4, description="most upstreams that may go on with one answer")


class RecordConfig(Model):
    """Where the gateway writes down what it decided and from what, to be decided again later. No prompt, no key."""

    dir: str = Field(description="folder of its files, one JSON line for each decision")
    file_bytes: int = Field(default=16 * 1024 * 1024, ge=4096, description="then the next file is begun")
    files: int = Field(default=8, ge=2, description="most files in the folder; the oldest are deleted")


class GatewayConfig(Model):
    """Everything a gateway process knows."""

    deployment: str
    model: str = Field(description="model name that clients use")
    host: str = "127.0.0.1"
    port: Port = 0
    admin_host: str = "127.0.0.1"
    admin_port: Port = 0
    revisions: tuple[RevisionConfig, ...]
    weights: Percent
    weights_version: int = Field(default=0, ge=0, description="a signed command of a lower version changes nothing")
    slo: SloConfig
    tiers: tuple[TierConfig, ...] | None = Field(default=None, description="None: every request is of tier default")
    targets: tuple[TargetConfig, ...] = ()
    spill: SpillConfig = SpillConfig()
    limits: GatewayLimits = GatewayLimits()
    trusted_keys: tuple[str, ...] = Field(default=(), description="public keys (PEM) that may change knobs, weights")
    state_dir: str | None = Field(default=None, description="where the budget store lies (SQLite)")
    log_level: str = "INFO"
    auth: AuthConfig = AuthConfig()
    tracing: TracingConfig | None = Field(default=None, description="None: no traces, at no cost")
    log_ok_share: float = Field(default=1.0, ge=0, le=1, description="share of lines of requests that went well")
    log_prompts: bool = Field(default=False, description="prompts into the log: for debugging, never for production")
    budget_store: BudgetStoreConfig = BudgetStoreConfig()
    tenant_budgets: TenantBudgets = TenantBudgets()
    gpu_usd_per_hour: float | None = Field(default=None, ge=0, description="rent of one GPU of the deployment's own")
    egress: EgressConfig = EgressConfig()
    price_file: str | None = Field(
        default=None, description="TOML or JSON with prices of models, in place of the catalog's"
    )
    siblings: SiblingsConfig | None = Field(
        default=None, description="None: the workers of a pod tell one another, and no other pod"
    )
    workers: int = Field(default=1, ge=1, le=64, description="processes that share the port")
    mid_stream: MidStreamConfig = MidStreamConfig()
    sessions: tuple[SessionKey, ...] = Field(default=(), description="none: no request belongs to another")
    record: RecordConfig | None = Field(default=None, description="None: decisions are not written down")


class KnobBounds(Model):
    """What the tuner may do, from spec.tuning and the engine's launch-time ceilings."""

    capacity_factor_min: Decimal
    capacity_factor_max: Decimal
    active_seqs_min: int
    active_seqs_max: int
    overflow: Literal["Reroute", "Drop"] = "Reroute"
    miss_probability_min: float | None = Field(default=None, ge=0, le=1, description="None: the policy's own floor")
    miss_probability_max: float | None = Field(default=None, ge=0, le=1)
    pinned: tuple[str, ...] = ()


class PlanRow(Model):
    """One line of what was planned for a deployment, in words for people."""

    deployment: str
    what: str
    value: str
    why: str = ""


class ConsoleConfig(Model):
    """The tuner's web page. Tokens lie in files, 32 characters at least, and are read when the process starts."""

    read_token_file: str = Field(description="who has its content may look")
    operate_token_file: str | None = Field(default=None, description="may pause and pin too; None: nobody may, there")
    hosts: tuple[str, ...] = Field(default=(), description="names under which it is reached, beside those of loopback")
    usd_per_gpu_hour: float | None = Field(default=None, ge=0, description="rent of an own GPU, for break-evens")
    plan: Annotated[tuple[PlanRow, ...], Field(max_length=1000)] = ()


class TunerConfig(Model):
    """Everything a tuner process knows about one deployment on one machine."""

    deployment: str
    mode: Literal["Off", "Recommend", "Auto"] = "Auto"
    board_url: str
    gateway_admin_urls: tuple[str, ...]
    prometheus_url: str
    signing_key_file: str
    storage_url: str = Field(description="Optuna storage, e.g. sqlite:////var/lib/moestack/tuner.db")
    decision_log: str = Field(description="append-only JSON lines, one for each decision")
    host: str = "127.0.0.1"
    port: Port = 0
    slo: SloConfig
    bounds: KnobBounds
    max_lost_gate_mass: float = 0.02
    changes_per_hour: int = 60
    tick_s: float = 1.0
    window_s: float = 10.0
    paused: bool = False
    log_level: str = "INFO"
    trials_per_day: int = Field(default=96, ge=0, description="live trials of the slow loop in 24 hours")
    simulator_only_s: float = Field(
        default=86_400.0, ge=0, description="after Auto first begins, trials run only in the simulator for this long"
    )
    promote_alpha: float = Field(
        default=0.05, gt=0, lt=1, description="highest chance that a candidate without any gain is promoted"
    )
    storage_password_file: str | None = Field(
        default=None, description="file with the password of storageUrl, which then has none; read at each connection"
    )
    console: ConsoleConfig | None = Field(default=None, description="None: no web page")
    pins: dict[str, Decimal | Overflow | None] = Field(
        default_factory=dict,
        description="knob → value that it is held at, beside bounds.pinned, which names it too; null: where it is",
    )


class TunersConfig(Model):
    """A tuner process for many deployments. Each entry is a TunerConfig, checked by itself: one that is refused stops
    no other. What an entry does not say is taken from `common`; host, port and logLevel of entries mean nothing."""

    deployments: tuple[dict[str, Any], ...]
    common: dict[str, Any] = Field(default_factory=dict)
    host: str = "127.0.0.1"
    port: Port = 0
    log_level: str = "INFO"
    console: ConsoleConfig | None = None


class ClusterTunerConfig(Model):
    """A tuner process for the MoEDeployments of a cluster: what they do not say themselves."""

    namespaces: tuple[str, ...] = Field(
        default=(), description="namespaces whose MoEDeployments it tunes; none: the whole cluster"
    )
    namespace: str = Field(default="moestack-system", description="its own, where its Lease lies")
    identity: str = Field(
        default="", description="name of this pod in the Lease, in Events and in status.tuning; by default the host's"
    )
    prometheus_url: str
    signing_key_file: str = Field(description="private key that signs knobs")
    storage_url: str | None = Field(
        default=None, description="PostgreSQL for all studies; None: SQLite files in stateDir, lost with the pod"
    )
    storage_password_file: str | None = None
    state_dir: str = Field(default="/var/lib/moestack", description="decision logs, saved states, studies")
    tick_s: float = Field(default=1.0, gt=0)
    window_s: float = Field(default=10.0, gt=0)
    simulator_only_s: float = Field(default=86_400.0, ge=0)
    record_every_s: float = Field(default=10.0, gt=0, description="least time between two writes of one status.tuning")
    qps: float = Field(default=20.0, gt=0, description="calls a second on the API server")
    burst: int = Field(default=40, ge=1)
    lease_s: float = Field(default=15.0, gt=1)
    host: str = "127.0.0.1"
    port: Port = 0
    log_level: str = "INFO"
    console: ConsoleConfig | None = Field(
        default=None,
        description="None: there is none. It takes no orders: those are annotations of the resource",
    )


class ServingConfig(Model):
    """Arguments of the Serve application's builder (`moe_serving.builder:build_app`): what serveConfigV2 carries."""

    deployment: str = Field(description="namespace/name")
    revision: str = "local"
    model: str = Field(description="model name that clients use")
    source: str = Field(description="checkpoint: a path, a repository id, or an address in a bucket")
    source_revision: str | None = Field(default=None, description="commit, tag or branch of the repository")
    accelerator: str = "cpu"
    tensor_parallel: int = Field(default=1, ge=1)
    data_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    expert_parallel: bool = True
    replicas_min: int = Field(default=1, ge=0)
    replicas_max: int = Field(default=1, ge=1)
    max_model_len: int | None = None
    max_active_seqs: int = Field(default=64, ge=1, description="launch-time ceiling")
    max_batched_tokens: int = Field(default=2048, ge=1, description="launch-time ceiling")
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    kv_cache_gib: int = Field(default=1, ge=1, description="KV cache of a rank on a CPU")
    enforce_eager: bool = False
    prefix_caching: bool = True
    redundant_experts: int = 0
    engine_args: dict[str, str | int | float | bool] = Field(default_factory=dict)
    board_host: str = "127.0.0.1"
    board_port: Port = 0
    trusted_keys: tuple[str, ...] = ()
    boot_knobs: Knobs | None = Field(default=None, description="what a replica boots with, until the board says more")


class OperatorConfig(Model):
    """Everything an operator process knows beside its credentials."""

    namespaces: tuple[str, ...] = Field(
        default=(), description="namespaces that it looks after; none: the whole cluster"
    )
    namespace: str = Field(default="moestack-system", description="its own, where its Lease lies")
    identity: str = Field(default="", description="name of this process in the Lease; by default host and process id")
    engine_image: str | None = Field(default=None, description="image of engines that name none; pinned per revision")
    gateway_image: str | None = Field(default=None, description="image of gateways")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    trusted_keys: tuple[str, ...] = Field(default=(), description="public keys (PEM) of operator and tuner")
    trusted_key_files: tuple[str, ...] = Field(
        default=(), description="files of more such keys, read at start: a key that was made in the cluster"
    )
    signing_key_file: str | None = Field(default=None, description="private key that signs weights")
    tuner_namespace: str = Field(default="moestack-system", description="where the tuner runs: it may reach boards")
    workers: int = Field(default=4, ge=1, le=64)
    qps: float = Field(default=50.0, gt=0, description="calls a second on the API server")
    burst: int = Field(default=100, ge=1)
    lease_s: float = Field(default=15.0, gt=1)
    resync_s: float = Field(default=600.0, gt=0, description="longest time between two looks at an object")
    host: str = "127.0.0.1"
    port: Port = Field(default=0, description="of /healthz, /readyz and /metrics")
    log_level: str = "INFO"
