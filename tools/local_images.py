"""Writes images as docker archives without an engine for containers, for a node on this machine (`make e2e`).

A layer is a tar of files as they are to lie in the image, owned by root: the same files make the same layer.
`ctr images import -` reads what Image.write makes. What goes into the images is in tools/image_contents.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any


@dataclass
class Layer:
    """A tar of files. Folders that files need are made as they come."""

    path: Path
    _tar: tarfile.TarFile = field(init=False, repr=False)
    _known: set[str] = field(default_factory=set)

    def __enter__(self) -> Layer:
        self._tar = tarfile.open(self.path, "w", format=tarfile.PAX_FORMAT)
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def folder(self, name: str, mode: int = 0o755, owner: int = 0) -> None:
        """A folder, and those above it."""
        if name == "/":
            return
        self.folder(str(Path(name).parent))
        if self._new(name):
            self._add(name, tarfile.DIRTYPE, mode, owner=owner)

    def link(self, name: str, target: str) -> None:
        self.folder(str(Path(name).parent))
        if self._new(name):
            self._add(name, tarfile.SYMTYPE, 0o777, target=target)

    def text(self, name: str, content: str, mode: int = 0o644) -> None:
        self.folder(str(Path(name).parent))
        if self._new(name):
            data = content.encode()
            self._add(name, tarfile.REGTYPE, mode, data=io.BytesIO(data), size=len(data))

    def file(self, name: str, source: Path) -> None:
        """A file of this machine, what links lead to; only whether it may be run is kept of its mode."""
        self.folder(str(Path(name).parent))
        if self._new(name):
            facts = source.stat()
            with source.open("rb") as data:
                mode = 0o755 if facts.st_mode & 0o111 else 0o644
                # Byte code of Python is good for a source of that time alone.
                self._add(name, tarfile.REGTYPE, mode, data=data, size=facts.st_size, mtime=int(facts.st_mtime))

    def tree(self, name: str, source: Path, leave_out: Callable[[Path], bool] = lambda path: False) -> None:
        """A folder of this machine with all that is in it; `leave_out` is asked of each path below it."""
        self.folder(name)
        for path in sorted(source.iterdir()):
            inside = f"{name}/{path.name}"
            if leave_out(path):
                continue
            if path.is_symlink():
                self.link(inside, str(path.readlink()))
            elif path.is_dir():
                self.tree(inside, path, leave_out)
            elif path.is_file():
                self.file(inside, path)

    def _new(self, name: str) -> bool:
        new = name not in self._known
        self._known.add(name)
        return new

    def _add(
        self,
        name: str,
        kind: bytes,
        mode: int,
        *,
        owner: int = 0,
        target: str = "",
        data: IO[bytes] | None = None,
        size: int = 0,
        mtime: int = 0,
    ) -> None:
        entry = tarfile.TarInfo(name.strip("/"))
        entry.type, entry.mode, entry.linkname, entry.size, entry.mtime = kind, mode, target, size, mtime
        entry.uid = entry.gid = owner
        self._tar.addfile(entry, data)


@dataclass(frozen=True)
class Image:
    """An image whose layers are files. `config`: as in an image, such as User, Env, Cmd."""

    tag: str
    layers: tuple[Path, ...]
    config: Mapping[str, Any]

    def write(self, stream: IO[bytes]) -> None:
        """Writes it as a docker archive, layer by layer, without a copy of its own."""
        digests = [_digest(layer) for layer in self.layers]
        image = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": dict(self.config),
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
            }
        ).encode()
        name = f"{hashlib.sha256(image).hexdigest()}.json"
        manifest = [{"Config": name, "RepoTags": [self.tag], "Layers": [f"{digest}.tar" for digest in digests]}]
        with tarfile.open(fileobj=stream, mode="w|") as tar:
            for inside, content in ((name, image), ("manifest.json", json.dumps(manifest).encode())):
                entry = tarfile.TarInfo(inside)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            for digest, layer in zip(digests, self.layers, strict=True):
                entry = tarfile.TarInfo(f"{digest}.tar")
                entry.size = layer.stat().st_size
                with layer.open("rb") as data:
                    tar.addfile(entry, data)


def _digest(layer: Path) -> str:
    """SHA-256 of a layer, kept beside it: some have gigabytes."""
    kept = layer.with_suffix(".sha256")
    if not kept.exists():
        with layer.open("rb") as data:
            kept.write_text(hashlib.file_digest(data, "sha256").hexdigest())
    return kept.read_text()


def made_once(folder: Path, kind: str, key: str, fill: Callable[[Layer], None]) -> Path:
    """The layer KIND-KEY.tar, made where it is not there yet; then older ones of its kind go, for some are large."""
    path = folder / f"{kind}-{key}.tar"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{path.name}.{os.getpid()}"
        with Layer(part) as layer:
            fill(layer)
        part.replace(path)
        for old in folder.glob(f"{kind}-*"):
            if old.stem != path.stem:
                old.unlink()
    return path
