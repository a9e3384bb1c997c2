"""Layers and docker archives that are written without an engine for containers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from tools.local_images import Image, Layer, made_once

ROOT = Path(__file__).parents[2]


def fill(layer: Layer, source: Path) -> None:
    layer.folder("/tmp", 0o1777)
    layer.link("/bin", "usr/bin")
    layer.text("/etc/passwd", "root:x:0:0::/:/bin/sh\n")
    layer.tree("/opt/app", source, lambda path: path.name == "left-out")


def tree(folder: Path) -> Path:
    """A private folder of its owner alone, as a build in a temporary folder makes it."""
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "run").write_text("#!/bin/sh\n")
    (folder / "inner" / "run").chmod(0o700)
    (folder / "data").write_text("x")
    (folder / "data").chmod(0o600)
    (folder / "left-out").write_text("x")
    (folder / "link").symlink_to("data")
    for path in (folder / "data", folder / "inner" / "run"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return folder


def test_everybody_may_read_a_layer_and_only_root_owns_it(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    path = made_once(tmp_path / "cache", "app", "1", lambda layer: fill(layer, source))
    with tarfile.open(path) as tar:
        found = {entry.name: entry for entry in tar}
    modes = {name: oct(entry.mode) for name, entry in found.items() if not entry.issym()}
    assert modes == {
        "tmp": "0o1777",
        "etc": "0o755",
        "etc/passwd": "0o644",
        "opt": "0o755",
        "opt/app": "0o755",
        "opt/app/data": "0o644",
        "opt/app/inner": "0o755",
        "opt/app/inner/run": "0o755",
    }
    assert {name: entry.linkname for name, entry in found.items() if entry.issym()} == {
        "bin": "usr/bin",
        "opt/app/link": "data",
    }
    assert {(entry.uid, entry.gid) for entry in found.values()} == {(0, 0)}
    # Byte code names the time of its source: with another it would be compiled again in every process.
    assert found["opt/app/data"].mtime == 1_700_000_000


def test_the_same_files_make_the_same_layer_and_a_new_one_replaces_the_old(tmp_path: Path) -> None:
    source, cache = tree(tmp_path / "source"), tmp_path / "cache"
    first = made_once(cache, "app", "1", lambda layer: fill(layer, source)).read_bytes()
    second = made_once(cache, "app", "2", lambda layer: fill(layer, source))
    assert second.read_bytes() == first
    made_once(cache, "other", "1", lambda layer: fill(layer, source))
    assert sorted(path.name for path in cache.iterdir()) == ["app-2.tar", "other-1.tar"]


def test_an_archive_names_its_layers_by_what_is_in_them(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    layer = made_once(tmp_path / "cache", "app", "1", lambda layer: fill(layer, source))
    written = io.BytesIO()
    Image("example.test/app:1", (layer,), {"User": "65532:65532"}).write(written)
    written.seek(0)
    with tarfile.open(fileobj=written) as tar:
        files = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    ((manifest),) = json.loads(files["manifest.json"])
    assert manifest["RepoTags"] == ["example.test/app:1"]
    config = json.loads(files[manifest["Config"]])
    assert config["config"] == {"User": "65532:65532"}
    (name,) = manifest["Layers"]
    assert files[name] == layer.read_bytes()
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(files[name]).hexdigest()}"]


def test_a_base_without_what_the_probes_start_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bash").symlink_to("/bin/bash")
    check = [sys.executable, str(ROOT / "images" / "check-engine")]
    done = subprocess.run(check, capture_output=True, text=True, check=False, env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert [line.strip() for line in done.stderr.splitlines()[1:]] == [
        f"{name}: not on the PATH" for name in ("wget", "grep", "lscpu")
    ]
