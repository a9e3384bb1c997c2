"""`python -m moe_gateway --config FILE.json`: one line of JSON on stdout when ready, logs on stderr."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import orjson
import uvloop

from moe_core import log
from moe_gateway import supervisor, worker
from moe_gateway.server import GatewayServer, run
from moe_gateway.settings import ConfigRefused, load
from moe_gateway.supervisor import Supervisor


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="moe_gateway", description=__doc__)
    made.add_argument("--config", required=True, type=Path, help="GatewayConfig as JSON")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # by its parent alone
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 after an orderly stop, 1 when a part died, 2 for a configuration that cannot be served."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.worker:
            boot = worker.boot_line()
            log.configure(boot.config.log_level)
            return uvloop.run(worker.run(boot, arguments.config))
        loaded = load(arguments.config)
        log.configure(loaded.config.log_level)
        if loaded.config.workers > 1:
            return uvloop.run(supervisor.run(loaded, arguments.config, _announce))
        return uvloop.run(run(GatewayServer(loaded.config, file=arguments.config, file_hash=loaded.hash), _announce))
    except ConfigRefused as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except ValueError as error:
        sys.stderr.write(f"logLevel: {error}\n")
        return 2


def _announce(server: GatewayServer | Supervisor) -> None:
    line = orjson.dumps({"ready": True, "port": server.port, "adminPort": server.admin_port})
    sys.stdout.write(line.decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
