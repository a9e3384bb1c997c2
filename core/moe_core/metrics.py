"""Every Prometheus metric that our processes export, in one table: name, kind, labels, meaning.

Exporters build from it, the tuner's queries, dashboards and alerts are checked against it. Expert metrics stay low in
cardinality: per layer, never per layer × expert but for the few hottest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

# Otherwise each counter and histogram has a second series that is in no row of this table.
disable_created_metrics()  # type: ignore[no-untyped-call]

_REPLICA = ("deployment", "revision", "replica")
_LAYER = (*_REPLICA, "layer")
_GATEWAY = ("deployment", "target")

LATENCY_BUCKETS_S = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.25),
    *(1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0),
)


@dataclass(frozen=True)
class Metric:
    """One metric family. A counter's name ends in `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


def _counter(name: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(name, "counter", labels, text)


def _gauge(name: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(name, "gauge", labels, text)


def _histogram(name: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(name, "histogram", labels, text)


# Exported by the board, for every replica of its revision.
EXPERT_SLOTS = _counter(
    "moestack_expert_slots_total", _LAYER, "(token, expert) slots that the router asked for, before capacity"
)
EXPERT_TOKENS = _counter("moestack_expert_tokens_total", _LAYER, "Tokens routed")
EXPERT_DROPPED = _counter("moestack_expert_dropped_slots_total", _LAYER, "Slots left empty by capacity")
EXPERT_REROUTED = _counter("moestack_expert_rerouted_slots_total", _LAYER, "Slots moved to another expert by capacity")
EXPERT_OVERFLOW_KEPT = _counter(
    "moestack_expert_overflow_kept_slots_total", _LAYER, "Slots kept above capacity because a group limit forced it"
)
EXPERT_LOST_GATE_MASS = _counter(
    "moestack_expert_lost_gate_mass_total",
    _LAYER,
    "Gate mass lost to capacity, summed over tokens; divide by moestack_expert_tokens_total",
)
EXPERT_IMBALANCE = _gauge(
    "moestack_expert_imbalance_ratio",
    (*_LAYER, "by"),
    "max/mean of load in the last window: by=expert (demand), by=rank (after capacity), by=rank_demand (before)",
)
EXPERT_CV = _gauge("moestack_expert_load_cv_ratio", _LAYER, "Coefficient of variation of demand over experts")
EXPERT_HOT = _counter("moestack_expert_hot_slots_total", (*_LAYER, "expert"), "Slots of the few hottest experts")
EXPERT_MAX_PREFILL = _gauge(
    "moestack_expert_prefill_step_max_slots", _LAYER, "Most slots that one expert took in one prefill step, last window"
)
CAPACITY_FACTOR = _gauge(
    "moestack_expert_capacity_factor", (*_REPLICA, "phase"), "Capacity factor in force by phase; +Inf is uncapped"
)
LAYERS_HOOKED = _gauge("moestack_expert_layers", (*_REPLICA, "state"), "MoE layers by state: hooked or bypassed")
REPLICA_STARTED = _gauge(
    "moestack_replica_start_time_seconds",
    _REPLICA,
    "Unix time since which the replica's counters run; they go back only here",
)
KNOBS_VERSION = _gauge("moestack_knobs_version", _REPLICA, "Lowest version of the knobs in force on any rank")
ENGINE_RUNNING = _gauge("moestack_engine_running_requests", _REPLICA, "Requests in the engine's batch")
ENGINE_WAITING = _gauge("moestack_engine_waiting_requests", _REPLICA, "Requests waiting in the engine")
ENGINE_KV_USAGE = _gauge("moestack_engine_kv_cache_usage_ratio", _REPLICA, "Share of KV cache blocks in use")
ENGINE_ACTIVE_LIMIT = _gauge("moestack_engine_active_seqs_limit", _REPLICA, "maxActiveSeqs in force")
ENGINE_BATCHED_LIMIT = _gauge("moestack_engine_batched_tokens_limit", _REPLICA, "maxBatchedTokens in force")
ENGINE_PROMPT_TOKENS = _counter("moestack_engine_prompt_tokens_total", _REPLICA, "Prompt tokens processed")
ENGINE_OUTPUT_TOKENS = _counter("moestack_engine_generation_tokens_total", _REPLICA, "Tokens generated")
ENGINE_PREEMPTIONS = _counter("moestack_engine_preemptions_total", _REPLICA, "Requests pushed out of the KV cache")
ENGINE_STEPS = _counter("moestack_engine_steps_total", _REPLICA, "Forward passes")
ENGINE_BUSY = _counter("moestack_engine_busy_seconds_total", _REPLICA, "Seconds in forward passes, slowest rank")
ENGINE_DECODE_STEPS = _counter("moestack_engine_decode_steps_total", _REPLICA, "Forward passes without a prefill token")
ENGINE_DECODE_BUSY = _counter(
    "moestack_engine_decode_busy_seconds_total", _REPLICA, "Seconds in forward passes without a prefill token"
)
ENGINE_DECODE_BYTES = _counter(
    "moestack_engine_decode_read_bytes_total",
    _REPLICA,
    "Bytes of weights (experts touched, and all else once) and KV cache that those passes had to read",
)
ENGINE_FLOPS = _counter(
    "moestack_engine_flops_total", _REPLICA, "Floating-point operations of all passes, from parameters and slots"
)
ENGINE_TOUCHED = _gauge(
    "moestack_engine_experts_touched", _REPLICA, "Distinct experts in a layer and decode step, mean of the last window"
)
ENGINE_SMBU = _gauge(
    "moestack_engine_smbu_ratio", _REPLICA, "S-MBU of the last window: bytes read over peak bandwidth, decode passes"
)
ENGINE_SMFU = _gauge(
    "moestack_engine_smfu_ratio", _REPLICA, "S-MFU of the last window: operations over peak arithmetic, all passes"
)
ENGINE_TTFT = _histogram(
    "moestack_engine_ttft_seconds", _REPLICA, "Time to first token as an external engine measures it, in its buckets"
)
ENGINE_ITL = _histogram(
    "moestack_engine_itl_seconds", _REPLICA, "Time between tokens as an external engine measures it, in its buckets"
)
RANK_MOE_SECONDS = _counter("moestack_rank_moe_seconds_total", (*_REPLICA, "rank"), "Seconds in expert kernels")
BOARD_REPLICAS = _gauge("moestack_board_replicas", ("deployment", "revision"), "Replicas registered with the board")

# Exported by the gateway.
GATEWAY_REQUESTS = _counter(
    "moestack_gateway_requests_total",
    (*_GATEWAY, "tier", "outcome"),
    "Requests by target (none: never sent) and outcome: ok, client_error, error, cut, cancelled or shed",
)
GATEWAY_TTFT = _histogram("moestack_gateway_ttft_seconds", _GATEWAY, "Arrival to first content token")
GATEWAY_ITL = _histogram("moestack_gateway_itl_seconds", _GATEWAY, "A request's mean time between output tokens")
GATEWAY_DURATION = _histogram("moestack_gateway_request_seconds", _GATEWAY, "Arrival to last byte")
GATEWAY_IN_FLIGHT = _gauge("moestack_gateway_in_flight_requests", _GATEWAY, "Requests now at a target")
GATEWAY_BREAKER_OPEN = _gauge(
    "moestack_gateway_breaker_open",
    _GATEWAY,
    "1 while an upstream that failed again and again is given probes alone, 0 while it is given requests",
)
GATEWAY_SPILLED = _counter("moestack_gateway_spilled_requests_total", (*_GATEWAY, "reason"), "Sent to a closed API")
GATEWAY_SHED = _counter("moestack_gateway_shed_requests_total", ("deployment", "reason"), "Refused by 529 or 503")
GATEWAY_RETRIES = _counter(
    "moestack_gateway_retries_total",
    (*_GATEWAY, "result"),
    "Attempts beyond a request's first: result=sent, or refused by the retry budget",
)
GATEWAY_BROKEN = _counter(
    "moestack_gateway_broken_streams_total",
    (*_GATEWAY, "how", "why"),
    "Decisions on streams that broke at a target after their first token: how=continue, splice or stop, and why",
)
GATEWAY_PROMPT_TOKENS = _counter("moestack_gateway_prompt_tokens_total", _GATEWAY, "Prompt tokens")
GATEWAY_OUTPUT_TOKENS = _counter("moestack_gateway_output_tokens_total", _GATEWAY, "Output tokens")
GATEWAY_SPEND = _counter("moestack_gateway_spend_usd_total", _GATEWAY, "Dollars owed to closed APIs")
GATEWAY_FORECASTS = _counter(
    "moestack_gateway_forecasts_total",
    (*_GATEWAY, "bin", "result"),
    "Requests by the P(miss) foretold (bin: its lower end) and what came true: result=met, missed, spilled or unknown",
)
GATEWAY_FORECAST_PROBABILITY = _counter(
    "moestack_gateway_forecast_probability_total",
    (*_GATEWAY, "bin"),
    "Sum of the P(miss) foretold of those met or missed: over their number, where the bin's mean lies",
)
GATEWAY_FORECAST_SQUARED = _counter(
    "moestack_gateway_forecast_squared_error_total",
    _GATEWAY,
    "Sum of (P(miss) - missed)^2 of those met or missed: over their number, the Brier score",
)
GATEWAY_FORECAST_BRIER = _gauge(
    "moestack_gateway_forecast_brier_score",
    _GATEWAY,
    "Brier score of P(miss) over the last minutes, of streams answered by a revision; spilled ones are not in it",
)
GATEWAY_SHADOW_SPILLED = _counter(
    "moestack_gateway_shadow_spilled_requests_total",
    (*_GATEWAY, "reason"),
    "Requests that shadow mode kept and an active gateway would have sent to a closed API",
)
GATEWAY_SHADOW_SPEND = _counter(
    "moestack_gateway_shadow_spend_usd_total",
    _GATEWAY,
    "What those would have cost there, by the tokens of the own model",
)
LOCAL_RENT = _counter(
    "moestack_gateway_local_rent_usd_total",
    (*_GATEWAY, "phase"),
    "Rent of own GPUs since their replicas started: phase=prefill, decode or idle; each gateway tells the same",
)
GATEWAY_EGRESS = _counter(
    "moestack_gateway_egress_requests_total",
    (*_GATEWAY, "region", "policy", "result"),
    "Attempts at a closed API by its region and the deployment's policy: result=sent, or refused at the last moment",
)
GATEWAY_SLO = _counter(
    "moestack_gateway_slo_requests_total",
    ("deployment", "tier", "result"),
    "Finished requests by their tier's SLO: result=met or missed",
)
GATEWAY_KNOBS_VERSION = _gauge("moestack_gateway_knobs_version", ("deployment",), "Version of the knobs in force")
GATEWAY_WEIGHTS_VERSION = _gauge("moestack_gateway_weights_version", ("deployment",), "Version of the weights in force")
GATEWAY_CONFIG_LOADED = _gauge(
    "moestack_gateway_config_loaded",
    ("deployment",),
    "1 while the configuration file is in force, 0 while the newest one is refused and the one before goes on",
)
_GEN_AI = ("deployment", "gen_ai_provider_name", "gen_ai_request_model")
GEN_AI_DURATION = _histogram(
    "gen_ai_server_request_duration_seconds", _GEN_AI, "As moestack_gateway_request_seconds, by provider and model"
)
GEN_AI_TTFT = _histogram(
    "gen_ai_server_time_to_first_token_seconds", _GEN_AI, "As moestack_gateway_ttft_seconds, by provider and model"
)
GEN_AI_ITL = _histogram(
    "gen_ai_server_time_per_output_token_seconds", _GEN_AI, "As moestack_gateway_itl_seconds, by provider and model"
)

# Exported by the tuner.
TUNER_DECISIONS = _counter(
    "moestack_tuner_decisions_total", ("deployment", "loop", "action"), "Decisions by loop (fast, slow) and action"
)
TUNER_EXPLORING = _gauge("moestack_tuner_exploring", ("deployment",), "1 while a trial may run, 0 while it may not")
TUNER_KNOBS_VERSION = _gauge("moestack_tuner_knobs_version", ("deployment",), "Version that the tuner last sent")
TUNER_TRIALS = _counter("moestack_tuner_trials_total", ("deployment", "state"), "Trials of the slow loop by end state")
TUNER_ACK_SECONDS = _histogram(
    "moestack_tuner_ack_seconds", ("deployment",), "From decision to the last rank's acknowledgement"
)
TUNER_TICK_SECONDS = _histogram("moestack_tuner_tick_seconds", ("deployment",), "Time of one fast tick")
TUNER_LEADER = _gauge(
    "moestack_tuner_leader", (), "1 while this process tunes, 0 while it stands by; in a cluster, where it has a lease"
)
TUNER_RECORDS = _counter(
    "moestack_tuner_records_total", ("result",), "Writes of status.tuning: result=written or failed"
)

# Exported by the operator. No label names an object: a cluster may hold thousands.
OPERATOR_RECONCILE_SECONDS = _histogram(
    "moestack_operator_reconcile_seconds",
    ("result",),
    "Time of one reconcile: result=settled (nothing to do), changed, retried (lost a race), failed or fenced",
)
OPERATOR_QUEUE_DEPTH = _gauge("moestack_operator_queue_depth", (), "MoEDeployments that wait for a worker")
OPERATOR_QUEUE_AGE = _gauge(
    "moestack_operator_queue_oldest_seconds", (), "How long the one that waits longest has waited"
)
OPERATOR_WORK_AGE = _gauge(
    "moestack_operator_longest_running_seconds", (), "How long the longest reconcile under way has taken"
)
OPERATOR_QUEUE_ADDS = _counter("moestack_operator_queue_adds_total", (), "MoEDeployments put into the queue")
OPERATOR_RETRIES = _counter("moestack_operator_retries_total", (), "Reconciles tried again with back-off")
OPERATOR_API_CALLS = _counter(
    "moestack_operator_api_calls_total",
    ("verb", "kind", "code"),
    "Calls on the API server by HTTP status; code=0: no answer; a watch counts when it begins",
)
OPERATOR_API_SECONDS = _histogram(
    "moestack_operator_api_call_seconds", ("verb",), "Time of one call on the API server, watches apart"
)
OPERATOR_THROTTLED_SECONDS = _counter(
    "moestack_operator_throttled_seconds_total", (), "Time that calls waited for the operator's own pace (qps)"
)
OPERATOR_LEADER = _gauge("moestack_operator_leader", (), "1 while this process holds the lease, 0 while it stands by")
OPERATOR_OBJECTS = _gauge("moestack_operator_objects", (), "MoEDeployments that this process looks after")
OPERATOR_CONDITIONS = _gauge(
    "moestack_operator_conditions", ("type", "status"), "MoEDeployments by condition and its status"
)
OPERATOR_CACHE_LISTS = _counter("moestack_operator_cache_lists_total", ("kind",), "Lists of a kind: relists, mostly")
OPERATOR_CACHE_WATCHES = _counter("moestack_operator_cache_watches_total", ("kind",), "Watches begun on a kind")
OPERATOR_CACHE_BEHIND = _gauge(
    "moestack_operator_cache_behind", ("kind",), "1 while list or watch of a kind fails, and its cache may be behind"
)
OPERATOR_CACHE_OBJECTS = _gauge("moestack_operator_cache_objects", ("kind",), "Objects in a cache")
OPERATOR_EVENTS_DROPPED = _counter(
    "moestack_operator_events_dropped_total", (), "Events that could not be written, or were too many"
)

ALL: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


def counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    """A prometheus_client counter for a row of the table."""
    return Counter(metric.name.removesuffix("_total"), metric.help, metric.labels, registry=registry)


def gauge(metric: Metric, registry: CollectorRegistry) -> Gauge:
    """A prometheus_client gauge for a row of the table."""
    return Gauge(metric.name, metric.help, metric.labels, registry=registry)


def histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    """A prometheus_client histogram for a row of the table, with the latency buckets of this project."""
    return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=LATENCY_BUCKETS_S)


def family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
    """An empty family of a row that is no histogram, for a collector that builds its samples at each scrape."""
    if metric.kind == "counter":
        return CounterMetricFamily(metric.name.removesuffix("_total"), metric.help, labels=metric.labels)
    return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
