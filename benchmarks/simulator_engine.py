"""The real engine under open-loop loads, measured step by step, for `benchmarks.simulator`.

    python -m benchmarks.simulator_engine OUT.json [--rounds 12] [--seconds 2.5] [--clock wall | steady]
        [--quick]

vLLM with the tiny Qwen3-MoE on one thread, engine core in this process. Requests come at Poisson times; between two
steps those that are due are handed over, as an engine core does it. A first burst shows the capacity; the loads are
shares of it, taken in turn, so that a machine whose speed drifts drifts for all of them.

`--clock steady` is for machines that others use as well, where a step takes twice as long from one second to the next:
time is the CPU time of this process, divided by how slow the machine is now. A small fixed piece of work, run after
each step and not counted, tells that: the median of its last times over that of the warm-up. `wall` is the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

LOADS = (0.3, 0.45, 0.6, 0.75)
"""Shares of the capacity. `benchmarks.simulator` fits on the first and third."""
MAX_SEQS, MAX_TOKENS, MAX_LEN = 16, 256, 1024
INPUTS, OUTPUTS = (64.0, 300.0), (24.0, 96.0)
"""(median, 99th percentile) of log-normal lengths."""
Row = dict[str, float]


def log_normal(rng: random.Random, median: float, p99: float) -> int:
    from math import exp, log

    return max(2, min(round(median * exp(rng.gauss(0.0, log(p99 / median) / 2.326))), MAX_LEN // 2 - 1))


class WallClock:
    """Seconds of the clock."""

    def __call__(self) -> float:
        return time.monotonic()

    def look(self) -> None:
        """Nothing to look at."""


class SteadyClock:
    """CPU seconds of this process on a machine as fast as it was at first."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._matrix = torch.ones(96, 96)
        self._last, self._now = time.process_time(), 0.0
        self._usual = statistics.median(self._work() for _ in range(201))
        self._seen = deque([self._usual], maxlen=9)
        self._last = time.process_time()

    def _work(self) -> float:
        started = time.process_time()
        total = 0
        for i in range(1500):
            total += i * i
        product = self._matrix
        for _ in range(6):
            product = self._torch.nn.functional.silu(product @ self._matrix * 1e-3)
        return time.process_time() - started

    def __call__(self) -> float:
        cpu = time.process_time()
        self._now += (cpu - self._last) * self._usual / statistics.median(self._seen)
        self._last = cpu
        return self._now

    def look(self) -> None:
        """See how fast the machine is; the look takes no time of this clock."""
        self()
        self._seen.append(self._work())
        self._last = time.process_time()


class Timed:
    """The engine, its clock, and what it scheduled in each step."""

    def __init__(self, clock_name: str, *, eager: bool = False) -> None:
        from vllm import LLM

        from moe_serving.tiny import cached_checkpoint

        llm = LLM(
            str(cached_checkpoint("qwen3_moe")),
            dtype="float32",
            enable_prefix_caching=False,
            max_model_len=MAX_LEN,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=MAX_TOKENS,
            disable_log_stats=True,
            enforce_eager=eager,
        )
        self.llm, self.engine = llm, llm.llm_engine
        self.clock = WallClock() if clock_name == "wall" else SteadyClock()
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        config = core.vllm_config.cache_config
        self.block, self.blocks = int(config.block_size), int(config.num_gpu_blocks)
        self.prompt_tokens = self.decodes = 0
        schedule = self.scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.prompt_tokens = self.decodes = 0
            for request_id, tokens in output.num_scheduled_tokens.items():
                request = self.scheduler.requests[request_id]
                if request.num_computed_tokens - tokens < request.num_prompt_tokens:
                    self.prompt_tokens += tokens
                else:
                    self.decodes += 1
            return output

        self.scheduler.schedule = counted

    def play(self, requests: list[tuple[float, int, int]], name: str) -> dict[str, list[Row]]:
        """Hand requests over when they are due, and step until all are done."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        rng = random.Random(name)
        prompts = [TokensPrompt(prompt_token_ids=[rng.randrange(16, 240) for _ in range(n)]) for _, n, _ in requests]
        params = [SamplingParams(temperature=0, max_tokens=out, ignore_eos=True) for _, _, out in requests]
        rows: list[Row] = [{"at_s": at, "input": n, "output": out} for at, n, out in requests]
        steps: list[Row] = []
        skipped, start, sent = 0.0, self.clock(), 0
        while sent < len(requests) or self.engine.has_unfinished_requests():
            now = self.clock() - start + skipped
            if not self.engine.has_unfinished_requests() and requests[sent][0] > now:
                skipped += requests[sent][0] - now  # nothing to do: on to the next arrival
                now = requests[sent][0]
            begun = now
            while sent < len(requests) and requests[sent][0] <= now:
                self.engine.add_request(f"{name}-{sent}", prompts[sent], params[sent])
                sent += 1
            outputs = self.engine.step()
            now = self.clock() - start + skipped
            steps.append({"s": now - begun, "prompt": self.prompt_tokens, "decodes": self.decodes})
            for output in outputs:
                row = rows[int(output.request_id.rsplit("-", 1)[1].split("_")[0])]
                if output.outputs and output.outputs[0].token_ids and "first_s" not in row:
                    row["first_s"] = now
                if output.finished:
                    row["last_s"] = now
            self.clock.look()
        return {"requests": rows, "steps": steps}


def poisson(rng: random.Random, rps: float, seconds: float) -> list[tuple[float, int, int]]:
    """Arrivals of so many seconds, a few at least."""
    at = 0.0
    out: list[tuple[float, int, int]] = []
    while (at := at + rng.expovariate(rps)) < seconds or len(out) < 3:
        out.append((at, log_normal(rng, *INPUTS), log_normal(rng, *OUTPUTS)))
    return out


def main() -> None:
    """Measure, and write everything that was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=12, help="of all loads in turn")
    parser.add_argument("--seconds", type=float, default=2.5, help="of arrivals at each load in a round")
    parser.add_argument("--clock", choices=["wall", "steady"], default="wall")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that it works")
    options = parser.parse_args()
    rounds, seconds = (1, 2.0) if options.quick else (options.rounds, options.seconds)
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }
    timed = Timed(options.clock, eager=options.quick)  # compiling takes longer than all of the quick form
    rng = random.Random(1)
    print("up; warming", file=sys.stderr, flush=True)
    timed.play([(0.0, n, 8) for n in (1, 8, 32, 64, 128, 200, 256, 300, 500) for _ in range(3)], "warm")
    burst = [(0.0, log_normal(rng, *INPUTS), log_normal(rng, *OUTPUTS)) for _ in range(40 if options.quick else 200)]
    timed.play(burst, "again")
    capacity = len(burst) / max(row["last_s"] for row in timed.play(burst, "burst")["requests"])
    print(f"capacity {capacity:.1f} requests/s", file=sys.stderr, flush=True)
    document: dict[str, Any] = {
        "clock": options.clock,
        "capacity_rps": capacity,
        "max_seqs": MAX_SEQS,
        "max_tokens": MAX_TOKENS,
        "block": timed.block,
        "blocks": timed.blocks,
        "segments": [],
    }
    for number in range(rounds):
        for load in LOADS:
            requests = poisson(rng, load * capacity, seconds)
            seen = timed.play(requests, f"load{load}round{number}")
            document["segments"].append({"load": load, "round": number, **seen})
            print(f"round {number}, load {load}: {len(requests)} requests", file=sys.stderr, flush=True)
        options.out.write_text(json.dumps(document))  # each round, so that one that is cut short is of use


if __name__ == "__main__":
    main()
