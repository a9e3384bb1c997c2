"""Looks at this machine before anything is decided: cores, memory, programs, the checkpoint, secrets."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from moe_api.v1alpha1 import MoEDeployment
from moe_cli.checkpoint import CheckpointFacts, hub_snapshot, inspect
from moe_cli.fit import Machine
from moe_cli.outcome import Problem, Refusal
from moe_cli.targets import env_name

SecretFiles = Mapping[tuple[str, str], Path]


def look(resource: MoEDeployment, base: Path, secrets: SecretFiles) -> Machine:
    """This machine, for a resource whose file lies in `base` (relative checkpoint paths start there)."""
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=memory_bytes(),
        python=sys.executable,
        prometheus=shutil.which("prometheus"),
        checkpoint=find_checkpoint(resource, base),
        secrets=secrets,
    )


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may use: the machine's, or a container's smaller share of it."""
    total = psutil.virtual_memory().total
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int((cgroup / name).read_text()))
    return total


def find_checkpoint(resource: MoEDeployment, base: Path) -> CheckpointFacts | Problem | None:
    """The resource's checkpoint on this machine, what is wrong with it, or None where it lies elsewhere."""
    model = resource.spec.model
    if model.source is not None and (path := local_path(model.source, base)) is not None:
        return inspect(path, "spec.model.source")
    repository = (model.source or model.id).removeprefix("hf://")
    if "://" in repository:
        return None
    snapshot = hub_snapshot(repository, model.revision)
    return None if snapshot is None else inspect(snapshot, "spec.model.id")


def local_path(source: str, base: Path) -> Path | None:
    """The folder that a source names on this machine; None for a repository or a store elsewhere."""
    if source.startswith("file://"):
        return Path(source.removeprefix("file://"))
    if source.startswith(("/", "./", "../", "~/")) or source in (".", ".."):
        return (base / Path(source).expanduser()).resolve()
    return (base / source).resolve() if "://" not in source and (base / source).is_dir() else None


def find_secrets(
    resource: MoEDeployment, given: Sequence[str], folder: Path
) -> tuple[dict[tuple[str, str], Path], dict[Path, str]]:
    """Files with the secrets that fallback targets refer to, and what is still to be written to some of them.

    In this order: `--secret NAME/KEY=FILE`, the environment (to be written into `folder`, for its owner alone), and
    $XDG_CONFIG_HOME/moestack/secrets/NAME/KEY. Raises Refusal for an option that cannot be used, and for a variable
    that stands for two secrets: one API's key must not go to another.
    """
    options = parse_secret_options(given)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "moestack" / "secrets"
    found: dict[tuple[str, str], Path] = {}
    to_write: dict[Path, str] = {}
    variables: dict[str, tuple[str, str]] = {}
    for target in resource.spec.fallback.targets:
        if target.secret_ref is None:
            continue
        name, key = target.secret_ref.name, target.secret_ref.key
        if (name, key) in options:
            found[name, key] = options[name, key]
        elif value := os.environ.get(variable := env_name(name, key)):
            first = variables.setdefault(variable, (name, key))
            if first != (name, key):
                message = f"stands for {'/'.join(first)} and for {name}/{key}"
                raise Refusal(Problem(field=variable, message=message, remedy="give each by --secret NAME/KEY=FILE"))
            # A Secret's name holds no "_", so that no two references share a file.
            found[name, key] = folder / f"{name}__{key}"
            to_write[found[name, key]] = value
        elif (config / name / key).is_file():
            found[name, key] = config / name / key
    return found, to_write


def parse_secret_options(given: Sequence[str]) -> dict[tuple[str, str], Path]:
    """`NAME/KEY=FILE` as a table. Raises Refusal; the text of a wrong option is not repeated, for it may be a key."""
    found = {}
    for text in given:
        reference, equals, file = text.partition("=")
        name, slash, key = reference.partition("/")
        if not (equals and slash and name and key and file):
            raise Refusal(
                Problem(field="--secret", message="must be NAME/KEY=FILE", remedy="such as openai/apiKey=key.txt")
            )
        path = Path(file).expanduser().resolve()
        if not path.is_file():
            raise Refusal(Problem(field=f"--secret {reference}", message=f"{path} is no file", remedy="name the file"))
        found[name, key] = path
    return found
