"""Keeps a running gateway to its configuration file: a valid change acts at once, an invalid one changes nothing."""

from __future__ import annotations

from pathlib import Path

from moe_core.config import GatewayConfig
from moe_gateway.settings import ConfigRefused, check, load
from moe_gateway.state import Gateway

POLL_S = 1.0
AT_START = (
    *("deployment", "host", "port", "admin_host", "admin_port", "state_dir", "log_level", "budget_store"),
    *("siblings", "workers"),
)
"""Fields that a running process cannot change."""


class ConfigWatch:
    """Looks at the file each second, by content: a mounted ConfigMap changes by the swap of a link, an editor writes in
    place or moves a new file there."""

    def __init__(self, gateway: Gateway, path: Path) -> None:
        self._gateway = gateway
        self._path = path

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self._gateway.clock.sleep(POLL_S)
            await self.look()

    async def look(self) -> None:
        """Bring the gateway to the file as it is now. A refused file is tried again each time: what it lacks, such as
        the file of a key, may come later."""
        gateway = self._gateway
        try:
            loaded = load(self._path)
            if loaded.hash != gateway.config_hash:
                config, waiting = at_runtime(gateway.config, loaded.config)
                check(config)
                await gateway.reconfigure(config, loaded.hash)
                if waiting:
                    gateway.log.warning("these fields change with the next start of the process", fields=waiting)
        except ConfigRefused as refusal:
            gateway.config_refused(str(refusal))
        else:
            gateway.config_refused(None)
        gateway.settle_fleet()


def at_runtime(running: GatewayConfig, wanted: GatewayConfig) -> tuple[GatewayConfig, list[str]]:
    """The wanted configuration as far as a running process can take it up, and the fields that it cannot."""
    waiting = [name for name in AT_START if getattr(running, name) != getattr(wanted, name)]
    config = wanted.model_copy(update={name: getattr(running, name) for name in waiting})
    return config, [GatewayConfig.model_fields[name].alias or name for name in waiting]
