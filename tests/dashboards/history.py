"""A past in a real Prometheus: samples as if they had been scraped for 40 minutes, written as blocks and served."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.dashboards.exporters import Sample

SPAN_S, STEP_S = 2400, 15
_BLOCK_S = 7200
END_S = int(time.time()) // _BLOCK_S * _BLOCK_S - _BLOCK_S - STEP_S
"""Inside one of Prometheus' two-hour blocks, and past."""
COUNTED = ("counter", "histogram")


def open_metrics(samples: Sequence[Sample]) -> str:
    """Counters rise evenly from 0 to what was counted; a gauge has stood still."""
    lines = []
    steps = SPAN_S // STEP_S
    for sample in samples:
        labels = ",".join(f"{name}={json.dumps(value)}" for name, value in sample.labels)
        for step in range(steps + 1):
            value = sample.value * step / steps if sample.kind in COUNTED else sample.value
            lines.append(f"{sample.name}{{{labels}}} {value!r} {END_S - SPAN_S + step * STEP_S}")
    return "\n".join([*lines, "# EOF", ""]).replace(" inf ", " +Inf ")


class Prometheus:
    """A server over that past."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """Samples of an expression at the end of the past. Raises AssertionError where Prometheus refuses it."""
        query = urllib.parse.urlencode({"query": expr, "time": END_S})
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/query?{query}", timeout=30) as answer:
                result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: {error.read().decode()}") from None
        return result


@contextmanager
def prometheus(samples: Sequence[Sample], folder: Path) -> Iterator[Prometheus]:
    """Blocks made by promtool, and Prometheus over them on a free port."""
    (folder / "past.txt").write_text(open_metrics(samples))
    made = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "past.txt", "data"]
    subprocess.run(made, cwd=folder, check=True, capture_output=True)
    (folder / "prometheus.yml").write_text("scrape_configs: []\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--storage.tsdb.retention.time=10y"]
    command = ["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            _wait(process, url, folder)
            yield Prometheus(url)
        finally:
            process.terminate()
            process.wait(30)


def _wait(process: subprocess.Popen[bytes], url: str, folder: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, (folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("Prometheus is not ready")
