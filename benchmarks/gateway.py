"""What the gateway costs: CPU per request beside vllm-router (Rust) and LiteLLM, latency beside none, memory over time.

    python -m benchmarks.gateway [--rounds 5] [--soak 100000 | --long] [--only ours router] [--parts cpu latency soak]

One mock engine answers at once: a whole answer, or a stream of 100 chunks 2 ms apart. Requests have 2 KB. The gateway
runs with one worker and everything on: API keys, ledger and reports of the engine, a priced target with a budget,
metrics, a log line for each request. CPU is user and system time of the proxy's processes over the requests of a round;
rounds take turns, and a ratio is the median of the rounds' own ratios.

Latency is of whole answers at each rate of `RATES`, all ways in turns; what a way adds is its percentile less the
direct way's at the same rate. `added_p50_ms` and `added_p99_ms` are those at `KEY_RATE`; `added_ms` has all, with the
CPU that a request takes at that rate: caches and processors fall asleep between rare requests, and a proxy pays for
waking them twice. `rss_growth` is what resident memory grew by, as a share, from a tenth of `--soak` short requests to
the end of them, `fds_growth` what file descriptors did; `--long` is a million. It can be interrupted: what was seen
until then is reported.

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
RATES = (50.0, 200.0, 500.0, 800.0)
"""Requests a second at which latency is measured."""
KEY_RATE = 50.0
"""The rate that the goals' figures are of: the dearest at which nothing queues, and the one measured from the start."""
TURNS = 4
PARTS = ("cpu", "latency", "soak")
LONG = 1_000_000
START_S = 120.0


@dataclass(frozen=True)
class Size:
    """Requests of one measurement."""

    unary: int
    streams: int
    latency_s: float
    soak: int


FULL, QUICK = Size(4000, 320, 5.0, 100_000), Size(300, 32, 1.0, 2000)
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


def latency(ports: dict[str, int], proxies: dict[str, Proxy], size: Size, rps: float) -> dict[str, dict[str, float]]:
    """Milliseconds to the whole answer by way at a rate, in turns; for a proxy the CPU of a request too."""
    seen: dict[str, list[float]] = {name: [] for name in ports}
    cpu_s = dict.fromkeys(ports, 0.0)
    for turn in range(TURNS):
        for name in ports if turn % 2 == 0 else reversed(ports):
            before = proxies[name].cpu_s() if name in proxies else 0.0
            found: Seen = uvloop.run(open_loop(ports[name], False, rps, size.latency_s))
            cpu_s[name] += (proxies[name].cpu_s() if name in proxies else 0.0) - before
            seen[name] += found.whole_s
    told = {}
    for name, times in seen.items():
        told[name] = {f"p{q}": float(np.percentile(times, q)) * 1e3 for q in (50, 95, 99)}
        if name in proxies:
            told[name]["cpu"] = cpu_s[name] / len(times) * 1e3
    return told


def added(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What each way adds to the direct one, and its CPU."""
    direct = found["direct"]
    return {
        name: {key: round(value - direct.get(key, 0.0), 3) for key, value in values.items()}
        for name, values in found.items()
        if name != "direct"
    }


def open_files(proxy: Proxy) -> int:
    """File descriptors of a proxy at rest: it sees that clients have left a moment after they did."""
    seen = []
    for _ in range(10):
        seen.append(proxy.process.num_fds())
        time.sleep(0.02)
    return min(seen)


def soak(proxy: Proxy, requests: int) -> dict[str, object]:
    """Memory and file descriptors from a tenth of the requests to the end, or to an interruption."""
    samples: list[tuple[int, float, int]] = []
    step, done = max(1, requests // 50), 0
    started_s = time.monotonic()
    try:
        while done < requests:
            uvloop.run(closed_loop(proxy.port, False, step, 64))
            done += step
            samples.append((done, proxy.rss() / 2**20, open_files(proxy)))
            if sys.stderr.isatty() or done % (5 * step) == 0:
                rps = done / (time.monotonic() - started_s)
                sys.stderr.write(
                    f"soak: {done} of {requests} requests, {samples[-1][1]:.1f} MiB,"
                    f" {samples[-1][2]} file descriptors, {rps:.0f} a second\n"
                )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
    if not samples:
        return {"soak_requests": 0}
    early = next(sample for sample in samples if sample[0] >= samples[-1][0] / 10)
    return {
        "rss_growth": round(samples[-1][1] / early[1] - 1.0, 4),
        "rss_mib": round(samples[-1][1], 1),
        "rss_mib_early": round(early[1], 1),
        "fds_growth": samples[-1][2] - early[2],
        "soak_requests": samples[-1][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--soak", type=int, help="short requests over which memory is watched")
    parser.add_argument("--long", action="store_true", help=f"the same as --soak {LONG}")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
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
        for number in range(-1, rounds if "cpu" in arguments.parts else 0):
            for name in names if number % 2 == 0 else reversed(names):
                for kind in ("unary", "stream"):
                    took = cpu_ms(proxies[name], kind == "stream", QUICK if number < 0 else size)
                    if number >= 0:  # the first round warms up
                        cost[name][kind].append(took)
                        sys.stderr.write(f"round {number}: {name} {kind} {took:.3f} ms of CPU a request\n")
        result: dict[str, object] = {}
        for kind in ("unary", "stream"):
            if "cpu" in arguments.parts and "router" in cost and "ours" in cost:
                ratios = [a / b for a, b in zip(cost["ours"][kind], cost["router"][kind], strict=True)]
                result[f"cpu_ratio_{kind}"] = round(statistics.median(ratios), 3)
        result["cpu_ms"] = {
            name: {kind: round(statistics.median(values), 4) for kind, values in kinds.items()}
            for name, kinds in cost.items()
            if kinds["unary"]
        }
        if "ours" in proxies and "latency" in arguments.parts:
            ports = {"direct": mock_port, **{name: one.port for name, one in proxies.items() if name not in SLOW}}
            by_rate = {}
            for rps in RATES:
                by_rate[f"{rps:g}"] = found = added(latency(ports, proxies, size, rps))
                sys.stderr.write(f"{rps:g} a second: {json.dumps(found)}\n")
            key = by_rate[f"{KEY_RATE:g}"]
            for name, prefix in (("ours", ""), ("router", "router_")):
                if name in key:
                    result |= {f"{prefix}added_{q}_ms": key[name][q] for q in ("p50", "p99")}
            result["added_ms"] = by_rate
        if "ours" in proxies and "soak" in arguments.parts:
            result |= soak(proxies["ours"], LONG if arguments.long else arguments.soak or size.soak)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
