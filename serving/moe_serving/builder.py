"""From a ServingConfig to the Serve application: the import path that serveConfigV2 names, and `moectl up` too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from moe_core.config import ServingConfig
from moe_core.process_config import ENGINE_DEPLOYMENT, autoscaling, unserved

HEALTH_CHECK_PERIOD_S = 2.0
"""A dead engine is seen within two of these; Serve's own default is 10 s."""
DRAIN_S, DRAIN_LOOK_S = 60.0, 0.5
"""A replica that is to stop lets its requests end for so long: the silence that the gateway allows a stream. One that
is idle stops at the first look. Serve's own figures are 20 s and 2 s."""

CORES = "VLLM_CPU_OMP_THREADS_BIND"
"""vLLM's variable for the cores of each rank on a CPU."""


class NotServable(ValueError):
    """A configuration that this engine cannot run; the message names the field."""


def engine_kwargs(config: ServingConfig) -> dict[str, Any]:
    """Arguments of vLLM's engine for a configuration."""
    for problem in unserved(config):
        raise NotServable(str(problem))
    kwargs: dict[str, Any] = {
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "enable_expert_parallel": config.expert_parallel and config.tensor_parallel * config.data_parallel > 1,
        "max_num_seqs": config.max_active_seqs,
        "max_num_batched_tokens": config.max_batched_tokens,
        "enable_prefix_caching": config.prefix_caching,
        "enforce_eager": config.enforce_eager,
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "trust_remote_code": False,
        "worker_extension_cls": "moe_serving.worker.WorkerExtension",
        **config.engine_args,
    }
    if config.data_parallel > 1:
        # Rank, address and port of each data-parallel rank are found by its gang when it starts.
        kwargs["data_parallel_size"] = config.data_parallel
    if config.max_model_len is not None:
        kwargs["max_model_len"] = config.max_model_len
    if config.source_revision is not None and isinstance(_source(config.source), str):
        kwargs |= {"revision": config.source_revision, "tokenizer_revision": config.source_revision}
    if config.quantization is not None:
        kwargs["quantization"] = config.quantization
    return kwargs


def engine_env(config: ServingConfig, cores: Sequence[int]) -> dict[str, str]:
    """Environment of the engine's processes. On a CPU each rank is bound to its share of the cores (their ids)."""
    if config.accelerator != "cpu":
        # The plugin follows both of vLLM's model runners, and has been tried most with the first.
        return {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    ranks = config.tensor_parallel * config.data_parallel
    share = max(1, len(cores) // ranks)
    shares = [cores[rank * share : (rank + 1) * share] for rank in range(ranks)]
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        CORES: "|".join(",".join(map(str, ids)) for ids in shares),
        "HF_HUB_OFFLINE": "1",
    }


def build_app(args: dict[str, Any] | ServingConfig) -> Any:
    """The Serve application. `args` is a ServingConfig in its JSON form. Raises NotServable."""
    from ray import serve
    from ray.serve.llm import build_llm_deployment

    from moe_serving import board
    from moe_serving.server import MoEGangServer, MoEServer

    config = args if isinstance(args, ServingConfig) else ServingConfig.model_validate(args)
    server_config = llm_config(config)
    if config.board_port:
        # Before any replica, so that it answers while engines load, and where there is none yet.
        board.ensure(config)
    # The engine's own HTTP application is served by the replica itself: no ingress process between.
    return build_llm_deployment(
        server_config,
        bind_kwargs={"serving": config.to_json()},
        deployment_cls=serve.ingress()(MoEGangServer if config.data_parallel > 1 else MoEServer),
        override_serve_options={"name": ENGINE_DEPLOYMENT},
    )


def llm_config(config: ServingConfig) -> Any:
    """Ray's configuration of the server. Raises NotServable."""
    from ray.serve.llm import LLMConfig

    return LLMConfig(
        model_loading_config={"model_id": config.model, "model_source": _source(config.source)},
        engine_kwargs=engine_kwargs(config),
        # The workers are all alike, so no replica has to look for a type of GPU that Ray may not know by name.
        accelerator_config={"kind": _kind(config.accelerator)},
        deployment_config={
            "autoscaling_config": autoscaling(config.replicas_min, config.replicas_max, config.max_active_seqs),
            "health_check_period_s": HEALTH_CHECK_PERIOD_S,
            "graceful_shutdown_timeout_s": DRAIN_S,
            "graceful_shutdown_wait_loop_s": DRAIN_LOOK_S,
            "max_ongoing_requests": 1000,
        },
        runtime_env={"env_vars": engine_env(config, sorted(os.sched_getaffinity(0)))},
        log_engine_metrics=False,
        experimental_configs={"stream_batching_interval_ms": 0},
    )


def rank_cores(bound: str, data_rank: int, ranks: int) -> str:
    """Of the cores of all ranks ("0,1|2,3|…"), those of one data-parallel rank, which has `ranks` of its own."""
    return "|".join(bound.split("|")[data_rank * ranks : (data_rank + 1) * ranks])


def _kind(accelerator: str) -> str:
    """Ray's kind of an accelerator: cpu, tpu or gpu."""
    return accelerator if accelerator == "cpu" else "tpu" if accelerator.startswith("tpu-") else "gpu"


def _source(source: str) -> str | dict[str, str]:
    """A checkpoint as Ray's loader takes it: buckets are mirrored, everything else is the engine's to find."""
    return {"bucket_uri": source} if source.startswith(("s3://", "gs://")) else source
