"""`python -m moe_operator --config FILE`: reads the configuration, prints one ready line, works until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import json
import signal
import sys
from pathlib import Path

from pydantic import ValidationError

from moe_core.clock import SystemClock
from moe_core.config import OperatorConfig
from moe_core.log import configure, get_log
from moe_core.signing import Signer, Verifier, describe
from moe_kube.access import AccessError
from moe_kube.connect import connect
from moe_operator.exporter import Exporter
from moe_operator.server import OperatorServer

GC_THRESHOLDS = (50_000, 20, 100)
"""The caches are many small objects without cycles: by default Python would walk them all again and again."""
WATCH_S = 1.0
"""How often the process looks whether one of its parts has died."""


class ConfigRefused(Exception):
    """The configuration cannot be used; the message names the field and the remedy."""


def load_config(path: Path) -> OperatorConfig:
    """Read and check the configuration. Raises ConfigRefused."""
    try:
        config = OperatorConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigRefused(f"--config {path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise ConfigRefused(f"--config {path}: {describe(error)}") from None
    if not config.namespace:
        raise ConfigRefused("namespace: must name the operator's own namespace, where its Lease lies")
    doubled = [name for name in config.namespaces if config.namespaces.count(name) > 1 or not name]
    if doubled:
        raise ConfigRefused(f"namespaces: {doubled[0]!r} is empty or there twice; name each once, or none for all")
    if config.signing_key_file is not None:
        try:
            Signer.load(Path(config.signing_key_file))
        except OSError as error:
            raise ConfigRefused(
                f"signingKeyFile {config.signing_key_file}: cannot be read ({error.strerror})"
            ) from None
        except ValueError as error:
            raise ConfigRefused(f"signingKeyFile: {error}") from None
    keys = [_public_key(index, Path(file)) for index, file in enumerate(config.trusted_key_files)]
    return config.model_copy(update={"trusted_keys": (*config.trusted_keys, *keys)}) if keys else config


def _public_key(index: int, path: Path) -> str:
    """A trusted key of a file, as gateways and boards are told it."""
    try:
        pem = path.read_text()
        Verifier([pem])
    except OSError as error:
        raise ConfigRefused(f"trustedKeyFiles[{index}] {path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigRefused(f"trustedKeyFiles[{index}] {path}: holds no Ed25519 public key in PEM") from None
    return pem


async def serve(config: OperatorConfig, kubeconfig: Path | None) -> int:
    """Run one operator until a signal; exit status 1 if a part of it dies. Raises AccessError."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    clock, exporter = SystemClock(), Exporter()
    async with await connect(kubeconfig, observers=(exporter.called,), clock=clock) as api:
        server = OperatorServer(config, api, clock=clock, exporter=exporter)
        try:
            await server.start()
            print(json.dumps({"ready": True, "port": server.port}), flush=True)  # noqa: T201  # the ready line
            while not stop.is_set() and not server.crashed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), WATCH_S)
            crashed = server.crashed
        finally:
            await server.stop()
    if crashed:
        get_log("operator").error("a part of the operator has died: restart it", part=crashed)
    return 1 if crashed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m moe_operator", description=__doc__)
    made.add_argument("--config", type=Path, required=True, help="JSON file of moe_core.config.OperatorConfig")
    made.add_argument(
        "--kubeconfig", type=Path, help="by default $KUBECONFIG, then the pod's service account, then ~/.kube/config"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    try:
        config = load_config(chosen.config)
        configure(config.log_level)
        gc.set_threshold(*GC_THRESHOLDS)
        return asyncio.run(serve(config, chosen.kubeconfig))
    except ConfigRefused as refusal:
        print(f"operator: {refusal}", file=sys.stderr)  # noqa: T201
        return 2
    except AccessError as error:
        print(f"operator: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        where = f"port {config.port} is in use" if error.errno == errno.EADDRINUSE else str(error)
        print(f"operator: {where}", file=sys.stderr)  # noqa: T201
        return 1


if __name__ == "__main__":
    sys.exit(main())
