"""From a decision to its effect on every rank, while requests stream: how long it takes, and what it costs them.

    python -m benchmarks.actuation [--changes 200] [--streams 6]

Starts `moectl up` on the tiny model with two expert-parallel ranks, keeps some streams going through the gateway, and
changes γ, overflow, and the engine's limits one after another, signed and sent as the tuner sends them. A change ends
when every rank has acknowledged it; the ranks' answers must be alike. `stalled` counts streams that waited longer than
`STALL_S` between two pieces, `failed` those that did not end in `[DONE]`. The tuner is off. What GOALS asks for during
an upgrade needs two revisions, and so a cluster: it is not measured here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from moe_core.clock import SystemClock
from moe_core.passes import Passes
from moe_core.signing import Signer
from moe_core.wire import EngineKnobs, ExpertKnobs, FallbackKnobs, Knobs, Overflow

ROOT = Path(__file__).parents[1]
STALL_S = 1.0
SAMPLES = 20
"""Readings of memory in a run, and lines of progress."""
GIVE_UP_S = 10.0
POLL_S = 0.005
WARM_UP = 10
"""Changes before any is counted: the first of each kind touches code and memory that was never touched."""
CACHE: dict[str, Any] = {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 8}
"""Keys and values of a token take 32 KiB on each of two ranks, so a GiB of KV cache holds 32,768 tokens. The system
gives a process the cache's memory as it is first written: until all of it was, resident memory grows whoever asks."""
CACHE_TOKENS = 32_768
NAME, MODEL = "actuation", "tiny"
RESOURCE = """
apiVersion: moestack.dev/v1alpha1
kind: MoEDeployment
metadata: {name: NAME}
spec:
  model: {id: MODEL, source: "SOURCE"}
  hardware: {accelerator: cpu, gpusPerReplica: 2}
  engine: {maxModelLen: 1024, maxActiveSeqs: 16, maxBatchedTokens: 1024}
  slo: {ttftP95: 2s, itlP95: 500ms}
  tuning: {mode: "Off"}
"""
SETTINGS = (
    (ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal("1.25")), EngineKnobs(max_active_seqs=16)),
    (ExpertKnobs(overflow=Overflow.UNLIMITED), EngineKnobs(max_active_seqs=8)),
    (
        ExpertKnobs(overflow=Overflow.DROP, capacity_factor_prefill=Decimal("1.5")),
        EngineKnobs(max_active_seqs=12, max_batched_tokens=512),
    ),
    (
        ExpertKnobs(
            overflow=Overflow.EXPERT_CHOICE,
            capacity_factor_prefill=Decimal("1.25"),
            capacity_factor_decode=Decimal("2"),
        ),
        EngineKnobs(max_active_seqs=16, max_batched_tokens=1024),
    ),
)


@dataclass
class Seen:
    """What the streams saw."""

    ended: int = 0
    failed: list[str] = field(default_factory=list)
    stalled: int = 0
    longest_wait_s: float = 0.0
    tokens: int = 0
    """Prompts' (a character each, at least) and generated ones."""


class Stack:
    """A stack that `moectl up` started for the MoEDeployment `name` that serves `model`: where its parts are."""

    def __init__(self, state_dir: Path, name: str = NAME, model: str = MODEL) -> None:
        self.state_dir, self.deployment, self.model = state_dir, f"default/{name}", model
        self._state = json.loads((state_dir / "state.json").read_text())

    def _fact(self, part: str, name: str) -> str:
        return str(next(p for p in self._state["parts"] if p["name"] == part)["facts"][name])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._fact('gateway', 'port')}/v1"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self._fact('gateway', 'adminPort')}"

    @property
    def board(self) -> str:
        return self._fact("serving", "boardUrl")

    def signer(self) -> Signer:
        return Signer.load(next(self.state_dir.rglob("*.pem")))

    def ranks_rss_mib(self) -> dict[int, float]:
        """Resident memory of the engine's processes by pid."""
        found = {}
        for process in psutil.process_iter():
            try:
                if self._state["stackId"] in process.environ().values() and "VLLM::" in " ".join(process.cmdline()):
                    found[process.pid] = process.memory_info().rss / 2**20
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


async def stream(http: aiohttp.ClientSession, stack: Stack, number: int, seen: Seen, stop: asyncio.Event) -> None:
    """One client: streams of random prompts, one after another, until told to stop."""
    rng = random.Random(number)
    while not stop.is_set():
        prompt = "".join(rng.choices("abcdefgh ijklmnop", k=rng.randint(10, 120)))
        body = {"model": stack.model, "prompt": prompt, "max_tokens": 48, "stream": True, "ignore_eos": True}
        wait, last, text = 0.0, time.monotonic(), b""
        try:
            async with http.post(f"{stack.url}/completions", json=body) as answer:
                first = True
                async for piece in answer.content.iter_any():
                    now = time.monotonic()
                    wait, last = (0.0 if first else max(wait, now - last)), now
                    first = False
                    text += piece
                if answer.status != 200 or not text.rstrip().endswith(b"[DONE]"):
                    seen.failed.append(f"{answer.status}: {text[-200:]!r}")
                    continue
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            seen.failed.append(f"{type(error).__name__}: {error}")
            continue
        seen.ended += 1
        seen.tokens += len(prompt) + text.count(b"data: {")
        seen.stalled += wait > STALL_S
        seen.longest_wait_s = max(seen.longest_wait_s, wait)


def shown(stack: Stack, signer: Signer) -> dict[str, str]:
    """The pass that the board wants."""
    return {"Authorization": f"Bearer {Passes(signer, SystemClock()).token(stack.deployment)}"}


async def change(http: aiohttp.ClientSession, stack: Stack, signer: Signer, version: int) -> tuple[float, bool]:
    """Seconds from a decision to the last rank's acknowledgement, and whether all ranks took just that."""
    experts, engine = SETTINGS[version % len(SETTINGS)]
    local_only = FallbackKnobs(share_cap=0.0)
    knobs = Knobs(deployment=stack.deployment, version=version, experts=experts, engine=engine, fallback=local_only)
    decided = time.monotonic()
    envelope = signer.sign(knobs).to_json()
    for where in (stack.admin, stack.board):
        async with http.post(f"{where}/v1/knobs", json=envelope) as answer:
            if answer.status >= 300:
                raise RuntimeError(f"{where} refused version {version}: {answer.status} {await answer.text()}")
    while time.monotonic() - decided < GIVE_UP_S:
        async with http.get(
            f"{stack.board}/v1/acks", params={"version": version}, headers=shown(stack, signer)
        ) as answer:
            said: dict[str, Any] = await answer.json()
        if said["complete"]:
            took = time.monotonic() - decided
            return took, all(ack["version"] == version and not ack.get("error") for ack in said["acks"])
        await asyncio.sleep(POLL_S)
    raise RuntimeError(f"version {version} is not in force after {GIVE_UP_S:.0f} s: {said}")


async def measure(stack: Stack, changes: int, streams: int, warm_tokens: int = 0) -> dict[str, Any]:
    """The figures of one run. No change counts before the streams have moved `warm_tokens`."""
    signer, seen, stop = stack.signer(), Seen(), asyncio.Event()
    took: list[float] = []
    drift = 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
        clients = [asyncio.create_task(stream(http, stack, n, seen, stop)) for n in range(streams)]
        try:
            async with http.get(f"{stack.board}/v1/acks", headers=shown(stack, signer)) as answer:
                version = int((await answer.json())["version"])
            warmed = 0
            while warmed < WARM_UP or seen.tokens < warm_tokens:
                version, warmed = version + 1, warmed + 1
                await change(http, stack, signer, version)
            rss = [stack.ranks_rss_mib()]
            for number in range(1, changes + 1):
                version += 1
                seconds, alike = await change(http, stack, signer, version)
                took.append(seconds)
                drift += not alike
                if number % max(1, changes // SAMPLES) == 0:
                    rss.append(stack.ranks_rss_mib())
                    streamed = f"{seen.ended} streams ended, {len(seen.failed)} failed"
                    held = ", ".join(f"{mib:.0f}" for mib in rss[-1].values())
                    print(f"{number} of {changes} changes; {streamed}; {held} MiB", file=sys.stderr, flush=True)
        finally:
            stop.set()
            await asyncio.gather(*clients, return_exceptions=True)
    ordered = sorted(took)
    return {
        "decision_to_effect_p95_s": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 4),
        "failed": len(seen.failed),
        "stalled": seen.stalled,
        "decision_to_effect_p50_s": round(statistics.median(ordered), 4),
        "decision_to_effect_max_s": round(ordered[-1], 4),
        "changes": changes,
        "drift": drift,
        "streams": streams,
        "streams_ended": seen.ended,
        "pieces": seen.tokens,
        "longest_wait_s": round(seen.longest_wait_s, 3),
        "rss_growth_mib": growth(rss),
        "rss_mib": [round(sum(sample.values())) for sample in rss],
        "engine_processes_kept": all(sample.keys() == rss[0].keys() for sample in rss),
        "failures": seen.failed[:5],
        "during_upgrade": None,
    }


def growth(rss: list[dict[int, float]]) -> float:
    """MiB that the process which grew most took on between the first and the last sample of memory by pid."""
    return round(max((rss[-1][pid] - held for pid, held in rss[0].items() if pid in rss[-1]), default=0.0), 1)


@contextlib.contextmanager
def up(folder: Path) -> Iterator[Stack]:
    """The stack, for as long as the block runs."""
    from moe_serving.tiny import cached_checkpoint

    resource, state_dir = folder / "actuation.yaml", folder / "state"
    text = RESOURCE.replace("NAME", NAME).replace("MODEL", MODEL)
    resource.write_text(text.replace("SOURCE", str(cached_checkpoint("qwen3_moe", **CACHE))))
    moectl = [sys.executable, "-m", "moe_cli.main"]
    where = ["--state-dir", str(state_dir)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    command = [*moectl, "up", str(resource), "--detach", "--plain", *where]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=sys.stderr)
    try:
        yield Stack(state_dir)
    finally:
        subprocess.run([*moectl, "down", *where], check=False, cwd=ROOT, env=environment, stdout=sys.stderr)


def main() -> None:
    """Run it; the last line of stdout is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--streams", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moe-actuation-") as folder, up(Path(folder)) as stack:
        result = asyncio.run(measure(stack, options.changes, options.streams, 2 * CACHE_TOKENS))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
