"""What Prometheus texts of other engines mean in our terms.

The texts are written by hand from the engines' documentation and collectors (see moe_core.foreign), in the form that
their servers answer in; none was recorded from a running server.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.enums import EngineSignal, MetricsDialect
from moe_core.foreign import (
    DIALECTS,
    NO_LIMIT,
    ForeignLoad,
    Histogram,
    NotUnderstood,
    names_of,
    read,
    unsupported,
)
from moe_core.wire import EngineKnobs, ExpertKnobs, FallbackKnobs, Knobs

SGLANG = """\
# HELP sglang:prompt_tokens_total Number of prefill tokens processed.
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="m"} 8.128902e+06
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{model_name="m"} 7.557572e+06
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m",tp_rank="0",pp_rank="0"} 0.28
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m",tp_rank="0",pp_rank="0"} 162.0
sglang:num_running_reqs{model_name="m",tp_rank="1",pp_rank="0"} 162.0
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{model_name="m",tp_rank="0",pp_rank="0"} 2826.0
# TYPE sglang:time_to_first_token_seconds histogram
sglang:time_to_first_token_seconds_sum{model_name="m"} 12.5
sglang:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 6.0
sglang:time_to_first_token_seconds_bucket{le="1.0",model_name="m"} 27.0
sglang:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 30.0
sglang:time_to_first_token_seconds_count{model_name="m"} 30.0
# TYPE sglang:time_per_output_token_seconds histogram
sglang:time_per_output_token_seconds_sum{model_name="m"} 1.0
sglang:time_per_output_token_seconds_bucket{le="+Inf",model_name="m"} 10.0
sglang:time_per_output_token_seconds_count{model_name="m"} 10.0
"""

TENSORRT_LLM = """\
# TYPE trtllm_num_requests_running gauge
trtllm_num_requests_running{engine_type="trtllm",model_name="m"} 7.0
# TYPE trtllm_num_requests_waiting gauge
trtllm_num_requests_waiting{engine_type="trtllm",model_name="m"} 2.0
# TYPE trtllm_max_num_active_requests gauge
trtllm_max_num_active_requests{engine_type="trtllm",model_name="m"} 64.0
# TYPE trtllm_kv_cache_utilization gauge
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="m"} 0.62
# TYPE trtllm_prompt_tokens_total counter
trtllm_prompt_tokens_total{engine_type="trtllm",model_name="m"} 1000.0
# TYPE trtllm_generation_tokens_total counter
trtllm_generation_tokens_total{engine_type="trtllm",model_name="m"} 500.0
# TYPE trtllm_time_per_output_token_seconds histogram
trtllm_time_per_output_token_seconds_bucket{engine_type="trtllm",le="0.01",model_name="m"} 3.0
trtllm_time_per_output_token_seconds_bucket{engine_type="trtllm",le="+Inf",model_name="m"} 4.0
trtllm_time_per_output_token_seconds_sum{engine_type="trtllm",model_name="m"} 0.07
trtllm_time_per_output_token_seconds_count{engine_type="trtllm",model_name="m"} 4.0
"""

VLLM = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.1
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.4
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="m"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 2.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 1.5
vllm:time_to_first_token_seconds_bucket{engine="1",le="0.5",model_name="m"} 2.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="+Inf",model_name="m"} 2.0
vllm:time_to_first_token_seconds_sum{engine="1",model_name="m"} 0.5
"""

CASES = {
    "SGLang: ranks tell the same requests again, and an older name of the ITL": (
        MetricsDialect.SGLANG,
        SGLANG,
        ForeignLoad(162, 2826, 0.28, 8128902.0, 7557572.0, None, Histogram(((0.1, 6), (1.0, 27), (math.inf, 30)), 12.5),
                    Histogram(((math.inf, 10),), 1.0)),
    ),
    "TensorRT-LLM: tells its limit, and here no TTFT": (
        MetricsDialect.TENSORRT_LLM,
        TENSORRT_LLM,
        ForeignLoad(7, 2, 0.62, 1000.0, 500.0, 64, None, Histogram(((0.01, 3), (math.inf, 4)), 0.07)),
    ),
    "vLLM: data-parallel engines add up, the fullest cache counts": (
        MetricsDialect.VLLM,
        VLLM,
        ForeignLoad(7, 0, 0.4, None, None, None, Histogram(((0.5, 3), (math.inf, 4)), 2.0), None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_dialects(name: str) -> None:
    dialect, text, wanted = CASES[name]
    assert read(text, DIALECTS[dialect]) == wanted


def test_custom_names_map_the_signals_that_are_given() -> None:
    names = names_of(MetricsDialect.CUSTOM, {EngineSignal.RUNNING: "lmdeploy:running", EngineSignal.KV_USAGE: "kv"})
    load = read('lmdeploy:running 3\nkv{a="b"} 0.5\n', names)
    assert (load.running, load.kv_usage, load.waiting) == (3, 0.5, None)
    assert load.missing == ("waiting",)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("another engine's names", TENSORRT_LLM, "is the dialect right"),
        ("empty", "", "are the engine's metrics enabled"),
        ("a web page", "<html>no</html>", "no Prometheus text"),
        ("JSON, as TensorRT-LLM's other endpoint answers", '[{"numActiveRequests": 3}]', "Prometheus text|holds none"),
        ("values that are no numbers", "sglang:num_running_reqs NaN\nsglang:token_usage -1\n", "holds none"),
    ],
)
def test_what_is_not_understood_says_why(name: str, text: str, why: str) -> None:
    with pytest.raises(NotUnderstood, match=why):
        read(text, DIALECTS[MetricsDialect.SGLANG])


@pytest.mark.parametrize(
    ("name", "load", "limit"),
    [
        ("told", ForeignLoad(running=3, waiting=5, active_limit=8), 8),
        ("some wait: those that run are all that may", ForeignLoad(running=3, waiting=5), 3),
        ("nobody waits", ForeignLoad(running=3, waiting=0), NO_LIMIT),
    ],
)
def test_the_limit_of_running_requests(name: str, load: ForeignLoad, limit: int) -> None:
    assert load.limit == limit


def test_histograms_of_different_buckets_are_not_added_up() -> None:
    name = "sglang:time_to_first_token_seconds"
    text = (
        f'{name}_bucket{{le="0.1",a="1"}} 5\n{name}_bucket{{le="+Inf",a="1"}} 6\n'
        f'{name}_bucket{{le="0.2",a="2"}} 1\n{name}_bucket{{le="+Inf",a="2"}} 1\n{name}_sum 1\nsglang:token_usage 0\n'
    )
    assert read(text, DIALECTS[MetricsDialect.SGLANG]).ttft is None


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    for names in DIALECTS.values():
        try:
            load = read(text, names)
        except NotUnderstood:
            continue
        assert load != ForeignLoad()


@pytest.mark.parametrize(
    ("name", "knobs", "wanted"),
    [
        ("nothing asked of the engine", Knobs(deployment="a/b", version=1), ()),
        ("thresholds are the gateway's own",
         Knobs(deployment="a/b", version=1, fallback=FallbackKnobs(miss_probability=0.2)), ()),
        ("capacity",
         Knobs(deployment="a/b", version=1,
               experts=ExpertKnobs.model_validate({"overflow": "Drop", "capacityFactorPrefill": "1.5"})),
         ("experts.overflow", "experts.capacityFactor.prefill")),
        ("capacity of a layer",
         Knobs(deployment="a/b", version=1,
               experts=ExpertKnobs.model_validate({"capacityFactorByLayer": {"3": {"prefill": "1.5"}}})),
         ("experts.capacityFactorByLayer",)),
        ("limits and k",
         Knobs(deployment="a/b", version=1, engine=EngineKnobs(max_active_seqs=4, max_batched_tokens=64),
               experts=ExpertKnobs(per_token={"free": 2})),
         ("experts.perToken", "engine.maxActiveSeqs", "engine.maxBatchedTokens")),
    ],
)  # fmt: skip
def test_knobs_that_another_engine_lacks_are_named(name: str, knobs: Knobs, wanted: tuple[str, ...]) -> None:
    assert unsupported(knobs) == wanted
