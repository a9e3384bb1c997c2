"""A look at a checkpoint before any engine starts: seconds instead of minutes until a broken one is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_cli.outcome import Problem

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")
_LENGTH = ("max_position_embeddings", "max_seq_len", "n_positions")
_MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint says about itself; None where it does not."""

    path: Path
    experts: int | None = None
    top_k: int | None = None
    max_model_len: int | None = None
    weight_bytes: int = 0


def inspect(path: Path, field: str) -> CheckpointFacts | Problem:
    """Check a checkpoint folder: configuration readable, every weight file there and whole. `field`: for problems."""

    def problem(message: str, remedy: str) -> Problem:
        return Problem(field=field, message=message, remedy=remedy)

    again = "copy or download the checkpoint again"
    if not path.is_dir():
        what = "is a file, not a checkpoint folder" if path.exists() else "does not exist"
        return problem(f"{path} {what}", "name the folder that holds config.json and the *.safetensors files")
    try:
        config = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        return problem(f"{path} has no config.json", "name a folder with a complete checkpoint")
    except (OSError, ValueError) as error:
        return problem(f"{path}/config.json cannot be read: {error}", again)
    if not isinstance(config, dict) or not (config.get("architectures") or config.get("model_type")):
        return problem(f"{path}/config.json names no architecture", again)
    try:
        files = _weight_files(path)
    except (OSError, ValueError, KeyError) as error:
        return problem(f"{path}/model.safetensors.index.json cannot be read: {error}", again)
    if not files:
        return problem(f"{path} holds no *.safetensors file", "name a folder with a complete checkpoint")
    for file in files:
        if (fault := safetensors_fault(file)) is not None:
            return problem(f"{file} {fault}", again)
    inner = config.get("text_config")
    sources = (config, inner) if isinstance(inner, dict) else (config,)
    return CheckpointFacts(
        path,
        experts=_first_int(sources, _EXPERTS),
        top_k=_first_int(sources, _TOP_K),
        max_model_len=_first_int(sources, _LENGTH),
        weight_bytes=sum(file.stat().st_size for file in files),
    )


def safetensors_fault(path: Path) -> str | None:
    """What is wrong with a safetensors file, from its header and its size alone; None: nothing.

    Layout: 8 bytes of header length N (little endian), N bytes of JSON, then the data that its offsets address.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                return f"is cut short or no safetensors file ({size} bytes)"
            header = json.loads(file.read(length))
        ends = [row["data_offsets"][1] for name, row in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return "has a damaged header"
    if size != expected:
        return f"has {size} bytes where its header says {expected}: it is damaged or cut short"
    return None


def hub_snapshot(repository: str, revision: str | None) -> Path | None:
    """Where the Hugging Face cache of this machine holds a repository, or None. Nothing is downloaded."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    root = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{repository.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = (root / "refs" / wanted).read_text().strip()
    except OSError:
        commit = wanted
    snapshot = root / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() else None


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return [path / name for name in sorted(names)]
    return sorted(path.glob("*.safetensors"))


def _first_int(sources: Iterable[dict[str, Any]], names: tuple[str, ...]) -> int | None:
    for source in sources:
        for name in names:
            if isinstance(source.get(name), int):
                return int(source[name])
    return None
