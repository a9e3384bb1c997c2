"""`python -m moe_tuner --config FILE`: reads the configuration, prints one ready line, tunes until SIGTERM.

With `--cluster FILE` it tunes the MoEDeployments of a cluster, which say themselves how.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from aiohttp import web

from moe_core.clock import Clock, SystemClock
from moe_core.http import session
from moe_core.log import configure, get_log
from moe_tuner.console.rights import LOOPBACK
from moe_tuner.console.routes import load_tokens, mount
from moe_tuner.deployment import Shared
from moe_tuner.exporter import Families
from moe_tuner.fleet import ConfigWatch, Fleet
from moe_tuner.process import told_to_stop, why
from moe_tuner.server import application
from moe_tuner.settings import ConfigRefused, Loaded, load, load_signer
from moe_tuner.workers import Workers, share_evenly

GRACE_S = 3.0


async def serve(path: Path, loaded: Loaded, clock: Clock, stop: asyncio.Event) -> None:
    """Tune every deployment of a configuration file until `stop` is set."""
    log, workers, families = get_log("tuner"), Workers(), Families()
    async with session(connect_s=1.0, read_s=5.0) as client:
        fleet = Fleet(Shared(client, clock, log, workers, families))
        watch = ConfigWatch(fleet, path, loaded.hash, clock, log)
        app = application(fleet, families)
        if loaded.console is not None:
            tokens, loopback = load_tokens(loaded.console), loaded.host in LOOPBACK
            mount(app, fleet, loaded.console, tokens, client=client, clock=clock, log=log, loopback=loopback)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=GRACE_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, loaded.host, loaded.port).start()
            port = runner.addresses[0][1]
            await fleet.follow(loaded)
            print(json.dumps({"ready": True, "port": port}), flush=True)  # noqa: T201  # the ready line
            log.info("ready", port=port, deployments=len(loaded.configs), refused=len(loaded.refused))
            watching = asyncio.create_task(watch.run())
            await stop.wait()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await fleet.stop()
        finally:
            await runner.cleanup()
            workers.close()
    log.info("stopped")


async def _until_signalled(path: Path, loaded: Loaded) -> None:
    await serve(path, loaded, SystemClock(), told_to_stop())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m moe_tuner", description=__doc__)
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("--config", type=Path, help="JSON file of moe_core.config.TunerConfig, or of TunersConfig")
    where.add_argument("--cluster", type=Path, help="JSON file of moe_core.config.ClusterTunerConfig")
    made.add_argument(
        "--kubeconfig", type=Path, help="by default $KUBECONFIG, then the pod's service account, then ~/.kube/config"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    if chosen.cluster is not None:
        from moe_tuner import cluster  # noqa: PLC0415  # one machine needs no client of Kubernetes

        return cluster.run(chosen.cluster, chosen.kubeconfig)
    try:
        loaded = load(chosen.config)
        configure(loaded.log_level)
        share_evenly()
        if len(loaded.configs) == 1 and not loaded.refused:
            # Alone in its process, a deployment whose key is missing has nothing to wait for.
            load_signer(loaded.configs[0].signing_key_file)
        asyncio.run(_until_signalled(chosen.config, loaded))
    except ConfigRefused as refusal:
        print(f"tuner: {refusal}", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        print(f"tuner: {why(error, loaded.port)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
