"""How fast the operator makes what thousands of MoEDeployments ask for, against a bare loop that applies the same.

    python -m benchmarks.operator_scale [--n 1000 5000] [--workers 2]

Both work on one real API server (etcd and kube-apiserver alone: no other controller takes its time), with the same
client, the same bodies and as many calls at once. The bare loop knows every body beforehand, applies each once (the
children of each MoEDeployment, then its status), and does nothing else: no look before it makes, no watch, no Events;
half of it runs before the operator and half after it, each in a namespace of its own. `rate_over_bare_children` leaves
the status out of the bare loop, and only there.

The operator is a process of its own. Its time runs from its first call about an object, when its caches are filled, to
the last write that it makes. A second process then finds everything settled: whatever it writes counts as
`idle_writes`, and its memory, at its highest while it lists everything, as well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import requests
from prometheus_client.parser import text_string_to_metric_families

from moe_api.annotations import OPERATOR_MANAGER
from moe_core.config import OperatorConfig
from moe_kube import objects as k
from moe_kube.calls import Call
from moe_kube.connect import connect
from moe_kube.objects import Obj, Ref
from moe_operator import __main__ as operator_process
from moe_operator.controller import Result
from moe_operator.exporter import Exporter
from moe_operator.reconcile import reconcile, status_document
from moe_operator.requests import Apply, Look, Observed, WriteStatus

ROOT = Path(__file__).parents[1]
NAME = "m000000"
"""Of the object whose bodies are the pattern of all others': names of one length, so that replacing text is enough."""
BATCH = 50
"""Bodies are prepared for so many at once, while no clock runs."""
DIGEST = "sha256:" + "a" * 64
SPEC: Obj = {
    "model": {"id": "Qwen/Qwen3-235B-A22B-FP8"},
    "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 4},
    "slo": {"ttftP95": "800ms", "itlP95": "50ms"},
}
POLL_S = 4.0
"""Rarely: each look costs the operator some milliseconds of the CPU that is being measured."""
QUIET_S = 5.0
"""Nothing was written for so long: everything is done."""
LIMIT_S = 3600.0


def name_of(number: int) -> str:
    return f"m{number:06d}"


def configuration(workers: int, namespace: str) -> OperatorConfig:
    return OperatorConfig(
        namespaces=(namespace,),
        namespace=namespace,
        engine_image=f"registry.example.com/engine@{DIGEST}",
        gateway_image=f"registry.example.com/gateway@{DIGEST}",
        workers=workers,
        qps=100_000.0,  # no pace of its own: what it can do is the question
        burst=100_000,
        resync_s=7200.0,
        log_level="WARNING",
    )


# -- the operator's process


class Recorder(Exporter):
    """The operator's metrics, with every reconcile's time and the moments of the first call and the last write."""

    latest: Recorder

    def __init__(self) -> None:
        super().__init__()
        self.seconds = array("d")
        self.first_s = self.last_s = self.first_cpu_s = self.last_cpu_s = 0.0
        Recorder.latest = self

    def called(self, call: Call, status: int, seconds: float) -> None:
        super().called(call, status, seconds)
        if call.kind in (k.LEASE, k.EVENT) or call.verb in ("list", "watch"):
            return
        now = time.time()
        if not self.first_s:
            self.first_s, self.first_cpu_s = now - seconds, time.process_time()
        if call.writes:
            self.last_s, self.last_cpu_s = now, time.process_time()

    def reconciled(self, result: Result, seconds: float) -> None:
        super().reconciled(result, seconds)
        self.seconds.append(seconds)


def run_operator(config: str, kubeconfig: str, report: str) -> int:
    """The whole operator as it is, with a recorder in place of its exporter; writes a report in the end."""
    operator_process.Exporter = Recorder  # type: ignore[attr-defined]
    status = operator_process.main(["--config", config, "--kubeconfig", kubeconfig])
    seen = Recorder.latest
    found = {"firstS": seen.first_s, "lastS": seen.last_s, "seconds": sorted(seen.seconds)}
    Path(report).write_text(json.dumps({**found, "cpuS": seen.last_cpu_s - seen.first_cpu_s}))
    return status


@dataclass
class Operator:
    process: subprocess.Popen[str]
    url: str
    report: Path

    def samples(self) -> dict[str, dict[tuple[str, ...], float]]:
        """/metrics: name → label values in the order of their names → value."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(requests.get(f"{self.url}/metrics", timeout=60).text):
            for sample in family.samples:
                labels = tuple(sample.labels[name] for name in sorted(sample.labels))
                found.setdefault(sample.name, {})[labels] = sample.value
        return found

    def status(self) -> tuple[float, float, float]:
        """Writes so far (leases and Events apart), reconciles so far, MoEDeployments with a status."""
        samples = self.samples()
        calls = samples.get("moestack_operator_api_calls_total", {})
        writes = sum(
            count
            for (_, kind, verb), count in calls.items()
            if verb in ("create", "patch", "update", "delete") and kind not in ("Lease", "Event")
        )
        reconciles = sum(samples.get("moestack_operator_reconcile_seconds_count", {}).values())
        return writes, reconciles, samples.get("moestack_operator_conditions", {}).get(("True", "Accepted"), 0.0)

    def peak_rss_mib(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM"))) / 1024

    def end(self) -> dict[str, Any]:
        """Stop it; what it recorded."""
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(120) != 0:
            raise RuntimeError("the operator failed: see above")
        found: dict[str, Any] = json.loads(self.report.read_text())
        return found


@contextlib.contextmanager
def operator(folder: Path, config: OperatorConfig, kubeconfig: Path) -> Iterator[Operator]:
    """An operator process, ready."""
    path, report = folder / "operator.json", folder / "report.json"
    path.write_text(config.model_dump_json(by_alias=True))
    arguments = ["-m", "benchmarks.operator_scale", "--operator", str(path), str(kubeconfig), str(report)]
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **PATHS}
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        if not ready:
            raise RuntimeError("the operator did not start: see above")
        yield Operator(process, f"http://127.0.0.1:{json.loads(ready)['port']}", report)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


PARTS = ("api", "core", "planner", "kube", "operator")
PATHS = {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (*PARTS, "cli", "."))}


def until_quiet(running: Operator, n: int, what: str) -> float:
    """Wait until every object was looked at, and nothing was written for a while. Writes in all."""
    end, seen, since = time.monotonic() + LIMIT_S, (-1.0, -1.0, -1.0), time.monotonic()
    while time.monotonic() < end:
        time.sleep(POLL_S)
        now = running.status()
        if now != seen:
            seen, since = now, time.monotonic()
            say(f"{what}: {now[0]:.0f} writes, {now[1]:.0f} reconciles, {now[2]:.0f} of {n} with a status")
        elif now[1] >= n and now[2] >= n and time.monotonic() - since > QUIET_S:
            return now[0]
    raise RuntimeError(f"{what}: not done within {LIMIT_S:.0f} s")


# -- the bare loop


def resource(name: str, namespace: str) -> Obj:
    return {
        "apiVersion": "moestack.dev/v1alpha1",
        "kind": "MoEDeployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": SPEC,
    }


@dataclass(frozen=True)
class Document:
    """One apply of the operator: where, and the body as JSON."""

    ref: Ref
    raw: bytes
    subresource: str = ""


def pattern(config: OperatorConfig, namespace: str, live: Obj) -> list[Document]:
    """What the operator applies for one MoEDeployment, as the reconcile itself asks for it; its one status last."""
    absent = frozenset({k.POD_MONITOR, k.PROMETHEUS_RULE, k.HTTP_ROUTE})
    steps = reconcile((namespace, NAME), config)
    answer: Any = None
    found: list[Document] = []
    try:
        while True:
            request = steps.send(answer)
            answer = None
            match request:
                case Look():
                    answer = Observed(live, (), absent, time.time())
                case Apply(rendered):
                    found.append(Document(rendered.ref, orjson.dumps(rendered.body)))
                    answer = rendered.body
                case WriteStatus(ref, status) if not any(document.subresource for document in found):
                    found.append(Document(ref, orjson.dumps(status_document(ref, dict(status), "")), "status"))
                    answer = live
                case WriteStatus():
                    answer = live  # about our answers, which are no server's
    except StopIteration:
        return sorted(found, key=lambda document: document.subresource != "")


Bodies = list[tuple[Ref, Obj, str]]


@dataclass
class Bare:
    """What the bare loop took, in seconds, all MoEDeployments together."""

    children_s: float = 0.0
    status_s: float = 0.0
    cpu_s: float = 0.0


async def bare_loop(
    kubeconfig: Path, documents: list[Document], namespace: str, numbers: range, workers: int, took: Bare
) -> None:
    """Apply all documents of these MoEDeployments, so many at once."""
    async with await connect(kubeconfig) as api:

        async def work(bodies: list[Bodies]) -> None:
            while bodies:
                for ref, body, subresource in bodies.pop():
                    force = bool(subresource)  # as the operator does
                    await api.apply(ref, body, manager=OPERATOR_MANAGER, force=force, subresource=subresource)

        async def timed(some: list[Document], batch: range) -> float:
            bodies = [_bodies(some, namespace, name_of(number)) for number in batch]
            began, cpu_began_s = time.monotonic(), time.process_time()
            await asyncio.gather(*(work(bodies) for _ in range(workers)))
            took.cpu_s += time.process_time() - cpu_began_s
            return time.monotonic() - began

        for start in range(numbers.start, numbers.stop, BATCH):
            batch = range(start, min(start + BATCH, numbers.stop))
            took.children_s += await timed([d for d in documents if not d.subresource], batch)
            took.status_s += await timed([d for d in documents if d.subresource], batch)
            say(f"bare loop: {batch.stop - numbers.start} of {len(numbers)}, {took.children_s + took.status_s:.1f} s")


def _bodies(documents: list[Document], namespace: str, name: str) -> Bodies:
    made = []
    for document in documents:
        ref = document.ref
        text = document.raw.replace(NAME.encode(), name.encode()).replace(ref.namespace.encode(), namespace.encode())
        new = Ref(ref.kind, namespace, ref.name.replace(NAME, name))
        made.append((new, orjson.loads(text), document.subresource))
    return made


async def put_resources(kubeconfig: Path, namespace: str, wanted: range, at_once: int = 8) -> None:
    async with await connect(kubeconfig) as api:
        numbers = list(wanted)

        async def work() -> None:
            while numbers:
                name = name_of(numbers.pop())
                await api.create(Ref(k.MOE_DEPLOYMENT, namespace, name), resource(name, namespace))

        await asyncio.gather(*(work() for _ in range(at_once)))


# -- one size


def measure(n: int, workers: int, folder: Path) -> dict[str, Any]:
    """One size on a fresh control plane."""
    from tests.cluster.control_plane import running
    from tests.cluster.kuberay import install_crds

    with running(folder / "plane") as plane:
        install_crds(plane)
        plane.install_crds(ROOT / "manifests" / "crd" / "moestack.dev_moedeployments.yaml")
        plane.stop_component("kube-controller-manager")
        access = plane.kubeconfigs["admin"]
        ours, before, after = "scale-operator", "scale-bare-one", "scale-bare-two"
        for namespace in (ours, before, after):
            answer = plane.ask("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
            assert answer.ok, answer.text
        config = configuration(workers, ours)
        half = n - n // 2
        say(f"{n} MoEDeployments are put into the cluster, and as many for the bare loop")
        for namespace, numbers in ((ours, range(n)), (before, range(half)), (after, range(half, n))):
            asyncio.run(put_resources(access, namespace, numbers))
        live = plane.ask("GET", k.MOE_DEPLOYMENT.path(ours, name_of(0))).json()
        documents, bare = pattern(config, ours, live), Bare()
        server = [plane.components[name].pid for name in ("etcd", "kube-apiserver")]
        server_s = [_cpu_s(server)]
        asyncio.run(bare_loop(access, documents, before, range(half), workers, bare))
        server_s.append(_cpu_s(server))
        with operator(folder, config, access) as first:
            writes = until_quiet(first, n, "operator")
            rss_mib = first.peak_rss_mib()
            done = first.end()
        server_s.append(_cpu_s(server))
        asyncio.run(bare_loop(access, documents, after, range(half, n), workers, bare))
        server_s.append(_cpu_s(server))
        with operator(folder, config, access) as second:
            idle_writes = until_quiet(second, n, "settled")
            settled_rss_mib = second.peak_rss_mib()
            second.end()
        memory = {name: round(size / 2**20) for name, size in plane.rss_bytes().items()}
    operator_s, bare_s = done["lastS"] - done["firstS"], bare.children_s + bare.status_s
    return {
        "n": n,
        "rate_over_bare_client": round(bare_s / operator_s, 3),
        "reconcile_p99_ms": round(1000 * _quantile(done["seconds"], 0.99), 1),
        "idle_writes": int(idle_writes),
        "rss_mib": round(max(rss_mib, settled_rss_mib), 1),
        "rss_making_mib": round(rss_mib, 1),
        "rss_starting_mib": round(settled_rss_mib, 1),
        "rate_over_bare_children": round(bare.children_s / operator_s, 3),
        "operator_s": round(operator_s, 1),
        "bare_s": round(bare_s, 1),
        "operator_cpu_ms_each": round(1000 * done["cpuS"] / n, 1),
        "bare_cpu_ms_each": round(1000 * bare.cpu_s / n, 1),
        "server_cpu_ms_each": round(1000 * (server_s[2] - server_s[1]) / n, 1),
        "server_cpu_ms_each_bare": round(1000 * (server_s[1] - server_s[0] + server_s[3] - server_s[2]) / n, 1),
        "documents_each": len(documents),
        "writes_each": round(writes / n, 2),
        "reconcile_p50_ms": round(1000 * _quantile(done["seconds"], 0.5), 1),
        "reconciles": len(done["seconds"]),
        "workers": workers,
        "control_plane_mib": memory,
    }


def _cpu_s(pids: list[int]) -> float:
    """CPU that these processes have used so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime of proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


_began = time.monotonic()
_lock = threading.Lock()


def say(text: str) -> None:
    with _lock:
        print(f"{time.monotonic() - _began:7.1f} s  {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[1000], help="how many MoEDeployments; several sizes")
    parser.add_argument("--workers", type=int, default=2, help="of the operator, and calls at once of the bare loop")
    parser.add_argument("--operator", nargs=3, metavar=("CONFIG", "KUBECONFIG", "REPORT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.operator:
        return run_operator(*chosen.operator)
    for n in chosen.n:
        with tempfile.TemporaryDirectory(prefix="operator-scale-") as folder:
            print(json.dumps(measure(n, chosen.workers, Path(folder))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
