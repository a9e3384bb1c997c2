"""Reads a tuner's configuration: one deployment's document, or a list of them in which a bad one harms no other."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_core.config import ClusterTunerConfig, ConsoleConfig, TunerConfig, TunersConfig, config_hash
from moe_core.setting import KNOBS, unknown_pins
from moe_core.signing import Signer, describe


class ConfigRefused(Exception):
    """The configuration cannot be used; the message names the field and the remedy."""


@dataclass(frozen=True)
class Loaded:
    """A configuration that was read. `refused` tells what is wrong with the entries that nobody tunes."""

    configs: tuple[TunerConfig, ...]
    host: str
    port: int
    log_level: str
    hash: str
    refused: dict[str, str] = field(default_factory=dict)
    console: ConsoleConfig | None = None


def load(path: Path) -> Loaded:
    """Read and check a configuration file. Raises ConfigRefused where nothing of it can be used."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigRefused(f"--config {path}: cannot be read ({error.strerror})") from None
    try:
        document = json.loads(text)
    except ValueError:
        raise ConfigRefused(f"--config {path}: is not JSON") from None
    if isinstance(document, dict) and "deployments" in document:
        return _many(path, document, config_hash(text))
    config = checked(document, f"--config {path}")
    return Loaded((config,), config.host, config.port, config.log_level, config_hash(text), console=config.console)


def checked(document: Any, where: str) -> TunerConfig:
    """One deployment's configuration. Raises ConfigRefused."""
    try:
        config = TunerConfig.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise ConfigRefused(f"{where}: {describe(error)}") from None
    verify(config)
    return config


def load_cluster(path: Path) -> ClusterTunerConfig:
    """Read and check the configuration of a cluster's tuner. Raises ConfigRefused."""
    try:
        config = ClusterTunerConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigRefused(f"--cluster {path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise ConfigRefused(f"--cluster {path}: {describe(error)}") from None
    if not config.namespace:
        raise ConfigRefused("namespace: must name the tuner's own namespace, where its Lease lies")
    doubled = [name for name in config.namespaces if config.namespaces.count(name) > 1 or not name]
    if doubled:
        raise ConfigRefused(f"namespaces: {doubled[0]!r} is empty or there twice; name each once, or none for all")
    if config.console is not None and config.console.operate_token_file is not None:
        why = "in a cluster orders are annotations of the resource, which outlive a pod; leave it out"
        raise ConfigRefused(f"console.operateTokenFile: {why}")
    load_signer(config.signing_key_file)
    return config


def load_signer(path: str) -> Signer:
    """The key that signs knobs. Raises ConfigRefused."""
    try:
        return Signer.load(Path(path))
    except OSError as error:
        raise ConfigRefused(f"signingKeyFile {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigRefused(f"signingKeyFile: {error}") from None


def verify(config: TunerConfig) -> None:
    """Raises ConfigRefused for what its fields do not tell one by one."""
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


def _many(path: Path, document: dict[str, Any], digest: str) -> Loaded:
    try:
        many = TunersConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigRefused(f"--config {path}: {describe(error)}") from None
    configs, refused = dict[str, TunerConfig](), dict[str, str]()
    logs = dict[str, str]()
    for index, entry in enumerate(many.deployments):
        name = entry.get("deployment")
        name = name if isinstance(name, str) and name else f"deployments.{index}"
        try:
            config = checked({**many.common, **entry}, f"deployments.{index}")
        except ConfigRefused as refusal:
            refused[name] = str(refusal)
            continue
        if name in configs:
            # Two tuners of one deployment would fight; which entry is meant nobody can tell.
            refused[name] = f"deployments.{index}.deployment: {name!r} is there twice; leave one out"
            configs.pop(name)
        elif name not in refused and (other := logs.get(config.decision_log)) is not None:
            refused[name] = f"deployments.{index}.decisionLog: is also that of {other!r}; give each its own"
        elif name not in refused:
            configs[name], logs[config.decision_log] = config, name
    return Loaded(tuple(configs.values()), many.host, many.port, many.log_level, digest, refused, many.console)
