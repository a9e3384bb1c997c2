"""What the gateway costs: CPU per request beside vllm-router (Rust) and LiteLLM, latency beside none, memory over time.

    python -m benchmarks.gateway [--rounds 5] [--soak 100000] [--only ours router] [--quick]

One mock engine answers at once: a whole answer, or a stream of 100 chunks 2 ms apart. Requests have 2 KB. The gateway
runs with one worker and everything on: API keys, ledger and reports of the engine, a priced target with a budget,
metrics, a log line for each request. CPU is user and system time of the proxy's processes over the requests of a round;
rounds take turns, and a ratio is the median of the rounds' own ratios. Added latency is the gateway's less the direct
way's at the same percentile, whole answers at 50 requests a second, in turns. `rss_growth` is what resident memory
grew by, as a share, from a tenth of `--soak` short requests to the end of them; `--soak 1000000` is the long form.

The rivals are installed from requirements/rivals-*.txt into the cache, each in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import uvloop

from benchmarks.gateway_load import KEY, Seen, closed_loop, open_loop

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moestack"
RIVALS = ("router", "litellm")
CHUNKS, GAP_MS = 100, 2.0
CONNECTIONS = 16
START_S = 120.0


@dataclass(frozen=True)
class Size:
    """Requests of one measurement."""

    unary: int
    streams: int
    latency_s: float
    soak: int


FULL, QUICK = Size(4000, 320, 10.0, 100_000), Size(300, 32, 1.0, 2000)
SLOW = {"litellm": 0.05}
"""Share of the requests that a proxy gets which is slow by far."""


@dataclass
class Proxy:
    """A running proxy."""

    name: str
    port: int
    process: psutil.Process

    def cpu_s(self) -> float:
        total = 0.0
        for one in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system
        return total

    def rss(self) -> int:
        return int(self.process.memory_info().rss)


def environment(rival: str) -> Path:
    """The rival's own environment, made from its lock where it is missing."""
    where, lock = CACHE / "rivals" / rival, ROOT / "requirements" / f"rivals-{rival}.txt"
    stamp = where / ".locked"
    if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
        uv = str(CACHE / "uv" / "bin" / "uv")
        subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, str(where)], check=True)
        python = str(where / "bin" / "python")
        subprocess.run([uv, "pip", "sync", "-q", "--python", python, "--require-hashes", str(lock)], check=True)
        stamp.write_bytes(lock.read_bytes())
    return where / "bin"


@contextlib.contextmanager
def started(command: list[str], log: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A process with its own session; ended with all its children when the block ends."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            cwd=ROOT,
            env={**os.environ, **more},
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def gateway_config(mock: str, folder: Path) -> dict[str, object]:
    """Everything on."""
    key = folder / "target.key"
    key.write_text("sk-target-0123456789abcdef\n")
    tenants = folder / "tenants"
    tenants.mkdir()
    (tenants / "bench").write_text(KEY)
    return {
        "deployment": "default/bench",
        "model": "bench",
        "revisions": [
            {"name": "r0", "url": f"{mock}/v1", "metrics": {"url": f"{mock}/metrics", "dialect": "VLLM"}},
        ],
        "weights": {"r0": 100},
        "slo": {"ttftP95S": 5.0, "itlP95S": 1.0},
        "targets": [
            {
                "name": "closed",
                "provider": "openai-compatible",
                "model": "closed",
                "baseUrl": f"{mock}/v1",
                "apiKeyFile": str(key),
                "usdPerMInput": "5",
                "usdPerMOutput": "30",
            }
        ],
        "spill": {"usdPerDay": "100"},
        "stateDir": str(folder / "state"),
    }


@contextlib.contextmanager
def proxy(name: str, mock: str, folder: Path) -> Iterator[Proxy]:
    """A proxy in front of the mock, once it answers a chat."""
    folder.mkdir()
    log = folder / "log"
    if name == "ours":
        (folder / "gateway.json").write_text(json.dumps(gateway_config(mock, folder)))
        with started([sys.executable, "-m", "moe_gateway", "--config", str(folder / "gateway.json")], log) as process:
            line = process.stdout.readline() if process.stdout is not None else ""
            if not line:
                raise SystemExit(f"the gateway did not start: {log.read_text()[-2000:]}")
            yield _ready(name, int(json.loads(line)["port"]), process, log)
        return
    port, bin_ = free_port(), environment(name)
    if name == "router":
        command = [str(bin_ / "vllm-router"), "--host", "127.0.0.1", "--port", str(port), "--worker-urls", mock]
        command += ["--prometheus-port", str(free_port())]
        command += ["--log-dir", str(folder)]
    else:
        parameters = {"model": "openai/bench", "api_base": f"{mock}/v1", "api_key": "none"}
        document = {
            "model_list": [{"model_name": "bench", "litellm_params": parameters}],
            "general_settings": {"master_key": KEY},
        }
        (folder / "litellm.json").write_text(json.dumps(document))
        command = [str(bin_ / "litellm"), "--config", str(folder / "litellm.json"), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--telemetry", "False"]
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    with started(command, log, **offline) as process:
        yield _ready(name, port, process, log)


def _ready(name: str, port: int, process: subprocess.Popen[str], log: Path) -> Proxy:
    """Wait until a chat is answered."""
    body = json.dumps({"model": "bench", "messages": [{"role": "user", "content": "hi"}]}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    url, until = f"http://127.0.0.1:{port}/v1/chat/completions", time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5):
                return Proxy(name, port, psutil.Process(process.pid))
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"{name} did not answer: {log.read_text()[-2000:]}")


def cpu_ms(proxy: Proxy, stream: bool, size: Size) -> float:
    """CPU milliseconds of the proxy for a request. Raises LoadFailed for an answer that is not whole."""
    share = SLOW.get(proxy.name, 1.0)
    count = max(CONNECTIONS, round((size.streams if stream else size.unary) * share))
    before = proxy.cpu_s()
    seen = uvloop.run(closed_loop(proxy.port, stream, count, CONNECTIONS))
    if stream and seen.chunks != count * CHUNKS:
        raise SystemExit(f"{proxy.name}: {seen.chunks} chunks came of {count * CHUNKS}")
    return (proxy.cpu_s() - before) / count * 1e3


def latency(ports: dict[str, int], size: Size, turns: int = 4) -> dict[str, dict[str, float]]:
    """Milliseconds to the whole answer by way, in turns."""
    seen: dict[str, list[float]] = {name: [] for name in ports}
    for turn in range(turns):
        for name in ports if turn % 2 == 0 else reversed(ports):
            found: Seen = uvloop.run(open_loop(ports[name], False, 50.0, size.latency_s))
            seen[name] += found.whole_s
    return {name: {f"p{q}": float(np.percentile(times, q)) * 1e3 for q in (50, 95, 99)} for name, times in seen.items()}


def soak(proxy: Proxy, requests: int) -> dict[str, float]:
    """Memory and file descriptors from a tenth of the requests to the end."""
    uvloop.run(closed_loop(proxy.port, False, requests // 10, 64))
    early, early_fds = proxy.rss(), proxy.process.num_fds()
    uvloop.run(closed_loop(proxy.port, False, requests - requests // 10, 64))
    time.sleep(1.0)
    return {
        "rss_growth": proxy.rss() / early - 1.0,
        "rss_mib": proxy.rss() / 2**20,
        "fds_growth": float(proxy.process.num_fds() - early_fds),
        "soak_requests": float(requests),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--soak", type=int, help="short requests over which memory is watched")
    parser.add_argument("--only", nargs="*", default=["ours", *RIVALS], choices=["ours", *RIVALS])
    parser.add_argument("--quick", action="store_true", help="to see that it works: figures mean nothing")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    rounds = 1 if arguments.quick else arguments.rounds
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moestack-gateway-")))
        command = [sys.executable, "-m", "benchmarks.gateway_mock", "--chunks", str(CHUNKS), "--gap-ms", str(GAP_MS)]
        mock = stack.enter_context(started(command, folder / "mock.log"))
        assert mock.stdout is not None
        mock_port = int(mock.stdout.readline())
        names = [name for name in ("ours", *RIVALS) if name in arguments.only]
        proxies = {
            name: stack.enter_context(proxy(name, f"http://127.0.0.1:{mock_port}", folder / name)) for name in names
        }
        cost: dict[str, dict[str, list[float]]] = {name: {"unary": [], "stream": []} for name in names}
        for number in range(-1, rounds):
            for name in names if number % 2 == 0 else reversed(names):
                for kind in ("unary", "stream"):
                    took = cpu_ms(proxies[name], kind == "stream", QUICK if number < 0 else size)
                    if number >= 0:  # the first round warms up
                        cost[name][kind].append(took)
                        sys.stderr.write(f"round {number}: {name} {kind} {took:.3f} ms of CPU a request\n")
        result: dict[str, object] = {}
        for kind in ("unary", "stream"):
            if "router" in cost and "ours" in cost:
                ratios = [a / b for a, b in zip(cost["ours"][kind], cost["router"][kind], strict=True)]
                result[f"cpu_ratio_{kind}"] = round(statistics.median(ratios), 3)
        result["cpu_ms"] = {
            name: {kind: round(statistics.median(values), 4) for kind, values in kinds.items()}
            for name, kinds in cost.items()
        }
        if "ours" in proxies:
            ports = {"direct": mock_port, **{name: one.port for name, one in proxies.items() if name not in SLOW}}
            found = latency(ports, size)
            for q in ("p50", "p99"):
                result[f"added_{q}_ms"] = round(found["ours"][q] - found["direct"][q], 3)
                if "router" in found:
                    result[f"router_added_{q}_ms"] = round(found["router"][q] - found["direct"][q], 3)
            result["latency_ms"] = {name: {q: round(value, 3) for q, value in qs.items()} for name, qs in found.items()}
            result |= {
                key: round(value, 4) for key, value in soak(proxies["ours"], arguments.soak or size.soak).items()
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
