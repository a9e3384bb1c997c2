"""Which traffic weights are in force: the configuration file's or a signed command's, by their versions. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from moe_core.config import GatewayConfig
from moe_core.wire import Weights


def newest(config: GatewayConfig, command: Weights | None) -> Weights | None:
    """The newest weights known, of file and command; None where the file's have no version and nothing was commanded.

    The file's version is the floor after a restart. At the same version the command's stay, which the file repeats.
    """
    if command is not None and command.version >= config.weights_version:
        return command
    if config.weights_version == 0:
        return None
    return Weights(deployment=config.deployment, version=config.weights_version, percent=config.weights)


def in_force(config: GatewayConfig, command: Weights | None) -> tuple[int, Mapping[str, int]]:
    """(version, percent by revision). A command that sends traffic to a revision which the file no longer has is
    void, and the file's weights are in force."""
    known = newest(config, command)
    if known is None or given(known.percent).keys() - {revision.name for revision in config.revisions}:
        return config.weights_version, config.weights
    return known.version, known.percent


def given(percent: Mapping[str, int]) -> dict[str, int]:
    """The shares above 0: what two ways of writing the same weights have in common."""
    return {name: share for name, share in percent.items() if share > 0}
