"""Time from a command to the first token: `moectl up`, a bare `serve.run` with the same ranks, and `vllm serve`.

    python -m benchmarks.startup [--runs N] [--ranks 2] [--only up]

Each run starts from nothing with its own ports; caches of the compiler are warm after the first round, which is not
counted. The plugin is loaded in all three, because without it expert parallelism crashes on a CPU. Ratios compare runs
of one round with one another.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL_LEN, ACTIVE, BATCHED = 4096, 64, 2048
LIMIT_S = 600.0

BARE = f"""
import sys
import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app
source, ranks, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ray.init(address="local", num_cpus=ranks + 4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={{"host": "127.0.0.1", "port": port}})
config = LLMConfig(
    model_loading_config={{"model_id": "tiny", "model_source": source}},
    engine_kwargs=dict(tensor_parallel_size=ranks, enable_expert_parallel=ranks > 1, max_model_len={MODEL_LEN},
                       max_num_seqs={ACTIVE}, max_num_batched_tokens={BATCHED}),
    accelerator_config={{"kind": "cpu"}},
    deployment_config={{"autoscaling_config": {{"min_replicas": 1, "max_replicas": 1}}}},
    runtime_env={{"env_vars": {{}}}},
    log_engine_metrics=False,
)
serve.run(build_openai_app({{"llm_configs": [config]}}), blocking=True)
"""

RESOURCE = """
apiVersion: moestack.dev/v1alpha1
kind: MoEDeployment
metadata: {name: startup}
spec:
  model: {id: tiny, source: "SOURCE"}
  hardware: {accelerator: cpu, gpusPerReplica: RANKS}
  engine: {maxModelLen: 4096, maxActiveSeqs: 64, maxBatchedTokens: 2048}
  slo: {ttftP95: 800ms, itlP95: 50ms}
"""


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(ranks: int) -> dict[str, str]:
    """The same for all three."""
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))) if ranks > 1 else "0-1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def until_first_token(process: subprocess.Popen[bytes], port: int, model: str, started: float) -> float:
    """Seconds until a streamed completion yields its first token. Raises RuntimeError when the process ends first."""
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 1, "stream": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    while time.monotonic() - started < LIMIT_S:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                if answer.readline().startswith(b"data:"):
                    return time.monotonic() - started
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise RuntimeError(f"no token after {LIMIT_S:.0f} s")


def measure(command: list[str], port: int, model: str, ranks: int, log: Path) -> float:
    """Start a server, wait for its first token, stop it and all that it started."""
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment(ranks), cwd=ROOT, start_new_session=True
        )
        try:
            return until_first_token(process, port, model, started)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; the end of {log}: {log.read_text(errors='replace')[-2000:]}") from None
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its session's processes, by their ids."""
    import psutil

    ours = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
    _, left = psutil.wait_procs(ours, timeout=20)
    for child in left:
        child.kill()
    psutil.wait_procs(left, timeout=10)


def main() -> None:
    """Run the comparison; the last line is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="counted rounds")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--only", choices=["up", "bare", "vllm"], action="append", help="short form: these alone")
    options = parser.parse_args()
    from moe_serving.tiny import cached_checkpoint

    source, ranks = str(cached_checkpoint("qwen3_moe")), options.ranks
    folder = Path(tempfile.mkdtemp(prefix="moe-startup-"))
    resource = folder / "startup.yaml"
    resource.write_text(RESOURCE.replace("SOURCE", source).replace("RANKS", str(ranks)))

    def up() -> float:
        port = free_port()
        command = [sys.executable, "-m", "moe_cli.main", "up", str(resource), "--port", str(port), "--plain"]
        command += ["--foreground"]
        return measure([*command, "--state-dir", str(folder / "state")], port, "tiny", ranks, folder / "up.log")

    def bare() -> float:
        port = free_port()
        return measure(
            [sys.executable, "-c", BARE, source, str(ranks), str(port)], port, "tiny", ranks, folder / "bare.log"
        )

    def vllm_serve() -> float:
        port = free_port()
        command = [str(Path(sys.executable).with_name("vllm")), "serve", source, "--port", str(port)]
        command += ["--served-model-name", "tiny", "--tensor-parallel-size", str(ranks)]
        command += ["--max-model-len", str(MODEL_LEN), "--max-num-seqs", str(ACTIVE)]
        command += ["--max-num-batched-tokens", str(BATCHED), "--host", "127.0.0.1"]
        command += ["--enable-expert-parallel"] if ranks > 1 else []
        return measure(command, port, "tiny", ranks, folder / "vllm.log")

    every: dict[str, Callable[[], float]] = {"up": up, "bare": bare, "vllm": vllm_serve}
    kinds = {name: run for name, run in every.items() if not options.only or name in options.only}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(options.warm_up + options.runs):
        for name, run in kinds.items():
            took = run()
            counted = number >= options.warm_up
            print(f"round {number} {name}: {took:.1f} s{'' if counted else ' (warm-up)'}", flush=True)
            if counted:
                seconds[name].append(took)
    print(
        json.dumps(
            {
                "up_to_first_token_s": middle(seconds.get("up", [])),
                "over_bare_serve_run": over(seconds, "bare"),
                "over_vllm_serve": over(seconds, "vllm"),
                "seconds": {name: [round(value, 1) for value in values] for name, values in seconds.items()},
                "ranks": ranks,
                "cores": os.cpu_count(),
            }
        )
    )


def middle(values: list[float]) -> float | None:
    """Median in seconds; None of nothing."""
    return round(statistics.median(values), 1) if values else None


def over(seconds: dict[str, list[float]], other: str) -> float | None:
    """Median over rounds of `moectl up` divided by another; None where one of them was left out."""
    if not seconds.get("up") or not seconds.get(other):
        return None
    return round(statistics.median(a / b for a, b in zip(seconds["up"], seconds[other], strict=True)), 3)


if __name__ == "__main__":
    main()
