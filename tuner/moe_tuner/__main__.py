"""`python -m moe_tuner --config FILE`: reads the configuration, prints one ready line, tunes until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import signal
import sys
from pathlib import Path

from aiohttp import web
from pydantic import ValidationError

from moe_core.clock import Clock, SystemClock
from moe_core.config import TunerConfig
from moe_core.http import session
from moe_core.log import configure, get_log
from moe_core.setting import KNOBS, unknown_pins
from moe_core.signing import Signer, describe
from moe_tuner.actuate import Actuator
from moe_tuner.daemon import Tuner
from moe_tuner.exporter import Exporter
from moe_tuner.hand import Hand
from moe_tuner.journal import Journal
from moe_tuner.server import application
from moe_tuner.signals import Prometheus, public_url
from moe_tuner.slow import SlowLoop
from moe_tuner.study import Study
from moe_tuner.world import World

GRACE_S = 3.0


class ConfigRefused(Exception):
    """The configuration cannot be used; the message names the field and the remedy."""


def load_config(path: Path) -> TunerConfig:
    """Read and check the configuration. Raises ConfigRefused."""
    try:
        config = TunerConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigRefused(f"--config {path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise ConfigRefused(f"--config {path}: {describe(error)}") from None
    bounds = config.bounds
    if bounds.capacity_factor_min > bounds.capacity_factor_max:
        raise ConfigRefused("bounds.capacityFactorMin: above bounds.capacityFactorMax; swap them")
    if not 1 <= bounds.active_seqs_min <= bounds.active_seqs_max:
        raise ConfigRefused("bounds.activeSeqsMin: must be at least 1 and at most bounds.activeSeqsMax")
    unknown = unknown_pins(bounds)
    if unknown:
        raise ConfigRefused(f"bounds.pinned: {unknown[0]!r} names no knob; knobs are {', '.join(KNOBS)}")
    for name, value in (("tickS", config.tick_s), ("windowS", config.window_s)):
        if value <= 0:
            raise ConfigRefused(f"{name}: must be above 0 seconds")
    return config


async def serve(config: TunerConfig, signer: Signer, clock: Clock, stop: asyncio.Event) -> None:
    """Run one tuner until `stop` is set."""
    log = get_log("tuner", deployment=config.deployment)
    prometheus = Prometheus(config.prometheus_url, config.deployment)
    journal = Journal(config.decision_log, clock, log)
    async with session(connect_s=1.0, read_s=5.0) as client:
        actuator = Actuator(
            deployment=config.deployment,
            board_url=config.board_url,
            gateway_urls=config.gateway_admin_urls,
            signer=signer,
            client=client,
            clock=clock,
            log=log,
        )
        study = Study(config.storage_url, config.deployment)
        slow = SlowLoop(config, source=prometheus, study=study, clock=clock, log=log)
        exporter = Exporter(config.deployment)
        tuner = Tuner(
            config,
            world=World(client, actuator, config.board_url, config.gateway_admin_urls),
            hand=Hand(config, actuator=actuator, journal=journal, exporter=exporter, clock=clock, log=log),
            slow=slow,
            exporter=exporter,
            clock=clock,
            log=log,
        )
        runner = web.AppRunner(application(tuner), access_log=None, shutdown_timeout=GRACE_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, config.host, config.port).start()
            port = runner.addresses[0][1]
            print(json.dumps({"ready": True, "port": port}), flush=True)  # noqa: T201  # the ready line
            log.info("tuning", mode=config.mode, port=port, board=public_url(config.board_url))
            await tuner.run(stop)
        finally:
            await runner.cleanup()
            prometheus.close()
    log.info("stopped")


async def _until_signalled(config: TunerConfig, signer: Signer) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(config, signer, SystemClock(), stop)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_tuner", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON file of moe_core.config.TunerConfig")
    chosen = parser.parse_args(arguments)
    try:
        config = load_config(chosen.config)
        configure(config.log_level)
        try:
            signer = Signer.load(Path(config.signing_key_file))
        except OSError as error:
            raise ConfigRefused(
                f"signingKeyFile {config.signing_key_file}: cannot be read ({error.strerror})"
            ) from None
        except ValueError as error:
            raise ConfigRefused(f"signingKeyFile: {error}") from None
        asyncio.run(_until_signalled(config, signer))
    except ConfigRefused as refusal:
        print(f"tuner: {refusal}", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        where = f"port {config.port} is in use" if error.errno == errno.EADDRINUSE else str(error)
        print(f"tuner: {where}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
