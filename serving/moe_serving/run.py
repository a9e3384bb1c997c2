"""One machine's serving process: starts a Ray of its own, deploys the application, stays until told to stop.

Progress goes to stdout as JSON lines ({"stage", "state"}), then one {"ready": true, …} or {"error": …}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from moe_core.config import ServingConfig
from moe_core.log import configure, get_log
from moe_core.process_config import APPLICATION, ENGINE_ENV

START_TIMEOUT_S = 900.0
EXIT_COULD_NOT_START = 3
SERVE_STOP_S, RAY_STOP_S, CHILD_STOP_S = 20.0, 8.0, 5.0
"""Longest waits of an end that was asked for, one after another. A Ray that is gone answers nothing for minutes."""

log = get_log("serving")


class StartFailed(Exception):
    """The application did not come up."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--config", type=Path, required=True, help="ServingConfig as JSON")
    made.add_argument("--http-port", type=int, default=0)
    made.add_argument("--board-port", type=int, default=0)
    return made


def main() -> int:
    """Run until SIGTERM or SIGINT; 0 after a stop that was asked for, 3 where nothing could be started."""
    options = parser().parse_args()
    configure()
    config = ServingConfig.model_validate_json(options.config.read_text())
    config = config.model_copy(update={"board_port": options.board_port or _free_port()})
    stop = threading.Event()
    _stop_on_signals(stop)
    temp = Path(tempfile.mkdtemp(prefix="moe-", dir="/tmp"))  # Ray's socket paths must stay short
    try:
        return _serve(config, options.http_port or _free_port(), temp, stop)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _serve(config: ServingConfig, http_port: int, temp: Path, stop: threading.Event) -> int:
    _tell(stage="ray", state="start")
    _environment(temp)
    import ray
    from ray import serve

    from moe_serving import board, builder

    ranks = config.tensor_parallel * config.data_parallel
    # Logical CPUs: one for each rank and for each engine; the rest for Serve's own actors.
    ray.init(
        address="local",
        num_cpus=(config.tensor_parallel + 1) * config.data_parallel * config.replicas_max + 3,
        include_dashboard=False,
        namespace="moestack",
        _temp_dir=str(temp),
        log_to_driver=False,
        configure_logging=False,
    )
    _stop_on_signals(stop)  # Ray has put its own handlers in place, which abort
    try:
        board_url = board.ensure(config)
        serve.start(http_options={"host": "127.0.0.1", "port": http_port})
        _tell(stage="ray", state="done")
        _tell(stage="engine", state="start", detail=f"{config.source}, {ranks} ranks")
        app = builder.build_app(config)
        serve.run_many(
            [serve.RunTarget(app, name=APPLICATION, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        _await_running(serve, stop)
        _tell(stage="engine", state="done")
        _tell(
            ready=True,
            url=f"http://127.0.0.1:{http_port}/v1",
            boardUrl=board_url,
            pids=[os.getpid()],
        )
        while not stop.wait(1.0):
            if not ray.is_initialized():
                raise StartFailed("Ray is gone")
        return 0
    except Exception as error:
        if stop.is_set():
            return 0
        if not isinstance(error, StartFailed | builder.NotServable):
            log.exception("serving could not start or go on")
        _tell(error=_explain(config, str(error)))
        return EXIT_COULD_NOT_START
    finally:
        _shutdown(ray, serve)


def _stop_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())


def _await_running(serve: Any, stop: threading.Event) -> None:
    """Wait until the application runs. Raises StartFailed with Serve's message."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and not stop.is_set():
        status = serve.status().applications.get(APPLICATION)
        if status is not None and status.status == "RUNNING":
            return
        if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            parts = [status.message, *(d.message for d in status.deployments.values())]
            raise StartFailed("\n".join(part for part in parts if part))
        time.sleep(0.25)
    raise StartFailed("stopped" if stop.is_set() else f"not running after {START_TIMEOUT_S:.0f} s")


def _explain(config: ServingConfig, message: str) -> dict[str, str]:
    """An error for people: the field that it comes from, the engine's last sentence, and what to do."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    sentence = next(
        (line for line in reversed(lines) if "Error" in line or "error" in line), lines[-1] if lines else ""
    )
    field, remedy = "spec.engine", "see the serving log for the engine's whole report"
    named = re.search(r"spec\.[A-Za-z][\w.\[\]]*\w", sentence)
    if named is not None:
        text = sentence[named.end() :].lstrip(": ")
        return {"field": named.group(), "message": text[:500], "remedy": "change that field"}
    for mark, where, what in (
        ("max_model_len", "spec.engine.maxModelLen", "lower it to what the checkpoint allows"),
        ("safetensors", "spec.model.source", "the checkpoint is damaged: fetch it again"),
        ("config.json", "spec.model.source", "name a folder that holds a whole checkpoint"),
        ("out of memory", "spec.hardware", "use a smaller model or more memory"),
        ("architectures", "spec.model.id", "use an architecture that this vLLM serves"),
    ):
        if mark in sentence:
            field, remedy = where, what
            break
    return {"field": field, "message": sentence[:500] or f"{config.source} did not start", "remedy": remedy}


def _environment(temp: Path) -> None:
    """Defaults of Ray and vLLM processes that this process starts; what the person set stays."""
    for name, value in {
        **ENGINE_ENV,
        "VLLM_RPC_BASE_PATH": str(temp),  # an engine that is killed leaves its sockets behind
        # Idle workers that import the engine in advance cost two cores more than they save.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "PYTHONPATH": os.pathsep.join(sys.path[1:]),
    }.items():
        os.environ.setdefault(name, value)


def _shutdown(ray: Any, serve: Any) -> None:
    """Stop replicas first, so that their engines end by themselves, then Ray, then whatever is left of ours."""
    import psutil

    me = psutil.Process()
    ours = set(me.children(recursive=True))  # before their parents among them end
    clean = _within(SERVE_STOP_S, "Serve", serve.shutdown) and _within(RAY_STOP_S, "Ray", ray.shutdown)
    ours |= set(me.children(recursive=True))
    _, left = psutil.wait_procs(ours, timeout=CHILD_STOP_S if clean else 0.0)
    for process in left:
        log.warning("killed a process that did not stop", pid=process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=CHILD_STOP_S)


def _within(seconds: float, what: str, stop: Callable[[], None]) -> bool:
    """Whether a call came back in time. One that does not is left behind, in a thread that holds nothing up."""

    def call() -> None:
        try:
            stop()
        except Exception:
            log.exception("did not shut down cleanly", part=what)

    thread = threading.Thread(target=call, name=f"stop {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        log.warning("does not shut down; its processes are killed", part=what, after_s=seconds)
    return not thread.is_alive()


def leave(status: int) -> NoReturn:
    """End at once. Exit handlers of Ray would wait for processes that are gone by now."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tell(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    leave(main())
