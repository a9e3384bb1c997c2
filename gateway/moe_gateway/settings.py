"""Reads the gateway's configuration and its secrets, and refuses what it cannot serve, by field and with the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from moe_core.clock import Clock
from moe_core.config import GatewayConfig, TargetConfig, config_hash
from moe_core.log import get_log
from moe_core.prices import FREE_PROVIDER
from moe_core.signing import Verifier, describe

_KEYLESS = frozenset({"openai-compatible"})
_URL_FORM = {
    "openai-compatible": "https://host/v1",
    "azure-openai": "https://RESOURCE.openai.azure.com",
    "bedrock": "https://bedrock-runtime.REGION.amazonaws.com/openai/v1",
}
"""What baseUrl looks like for a provider that has no one address."""
KEY_CHECK_S = 1.0


class ConfigRefused(Exception):
    """The configuration cannot be served; the message names the field and the remedy."""


@dataclass(frozen=True)
class Loaded:
    """A configuration as it was read, and the hash of its file."""

    config: GatewayConfig
    hash: str


def load(path: Path) -> Loaded:
    """The configuration in a JSON file, checked. Raises ConfigRefused."""
    try:
        document = path.read_bytes()
        config = GatewayConfig.model_validate_json(document)
    except OSError as error:
        raise ConfigRefused(f"--config {path}: {error.strerror}; name a readable JSON file") from None
    except ValidationError as error:
        raise ConfigRefused(f"{path}: {describe(error)}") from None
    check(config)
    return Loaded(config, config_hash(document))


def check(config: GatewayConfig) -> None:
    """Refuse what the types allow and this gateway cannot do. Raises ConfigRefused."""
    revisions = [revision.name for revision in config.revisions]
    names = [*revisions, *(target.name for target in config.targets)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigRefused(f"revisions, targets: the name {name!r} is used twice; names must differ")
        if name == "none":
            raise ConfigRefused("revisions, targets: 'none' stands for no target in metrics; take another name")
    for name in config.weights:
        if name not in revisions:
            raise ConfigRefused(f"weights.{name}: no such revision; there are {', '.join(revisions) or 'none'}")
    for index, target in enumerate(config.targets):
        _check_target(f"targets[{index}] ({target.name})", target)
    priced = any(
        target.provider != FREE_PROVIDER or target.usd_per_m_input or target.usd_per_m_output
        for target in config.targets
    )
    _check_store(config, priced)
    if config.siblings is not None and config.siblings.workers < config.workers:
        raise ConfigRefused(
            f"siblings.workers: {config.siblings.workers} ports are too few; set it to workers, {config.workers}"
        )
    if config.spill.usd_per_day is not None and config.spill.usd_per_day < 0:
        raise ConfigRefused("spill.usdPerDay: must not be below 0")
    if config.tracing is not None and not config.tracing.endpoint.startswith(("http://", "https://")):
        raise ConfigRefused("tracing.endpoint: must begin with http:// or https://")
    try:
        Verifier(config.trusted_keys)
    except ValueError:
        raise ConfigRefused("trustedKeys: each must be an Ed25519 public key in PEM") from None


def _check_store(config: GatewayConfig, priced: bool) -> None:
    store = config.budget_store
    if store.kind == "SQLite":
        if store.pods > 1:
            raise ConfigRefused(
                "budgetStore.kind: SQLite serves one host, not several pods; take Object, PostgreSQL or Valkey"
            )
        if priced and config.spill.usd_per_day is not None and config.state_dir is None:
            raise ConfigRefused("stateDir: needed to keep spill.usdPerDay; name a writable folder")
    if store.kind in {"PostgreSQL", "Valkey"} and store.url_file is None:
        raise ConfigRefused(f"budgetStore.urlFile: needed for {store.kind}; name the file that holds its address")
    if store.kind == "Object" and (store.object or "").count("/") != 1:
        raise ConfigRefused("budgetStore.object: needed for Object, as namespace/name of a ConfigMap")


def _check_target(where: str, target: TargetConfig) -> None:
    if target.provider in _URL_FORM and target.base_url is None:
        raise ConfigRefused(f"{where}.baseUrl: needed for {target.provider}, e.g. {_URL_FORM[target.provider]}")
    if target.base_url is not None and not target.base_url.startswith(("http://", "https://")):
        raise ConfigRefused(f"{where}.baseUrl: must begin with http:// or https://")
    if target.api_version is not None and target.provider != "azure-openai":
        raise ConfigRefused(f"{where}.apiVersion: is of azure-openai alone; leave it out")
    if target.provider not in _KEYLESS and target.api_key_file is None:
        raise ConfigRefused(f"{where}.apiKeyFile: needed for {target.provider}; name the file that holds the key")
    if target.usd_per_m_input < 0 or target.usd_per_m_output < 0:
        raise ConfigRefused(f"{where}: usdPerMInput and usdPerMOutput must not be below 0")


class KeyFile:
    """An API key in a mounted file, read again when the file changes. Its repr never shows the key."""

    def __init__(self, path: Path, field: str, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._log = get_log("gateway.key", file=str(path))
        self._checked_s = clock.monotonic()
        try:
            self._stamp, self._key = self._read()
        except (OSError, ValueError) as error:
            detail = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigRefused(f"{field}: {path}: {detail}; put the API key there, alone") from None

    def __repr__(self) -> str:
        return f"KeyFile({self._path})"

    def value(self) -> str:
        """The key. The file is looked at once a second at most; a file gone bad keeps the last good key."""
        now_s = self._clock.monotonic()
        if now_s - self._checked_s >= KEY_CHECK_S:
            self._checked_s = now_s
            try:
                if self._stat() != self._stamp:
                    self._stamp, self._key = self._read()
                    self._log.info("API key read again")
            except (OSError, ValueError) as error:
                self._log.warning("API key file is unusable; the last good key stays", error=type(error).__name__)
        return self._key

    def _stat(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> tuple[tuple[int, int, int], str]:
        stamp = self._stat()
        key = self._path.read_text(encoding="utf-8", errors="replace").strip()
        if not key:
            raise ValueError("the file is empty")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("the file holds more than one printable ASCII word")
        return stamp, key
