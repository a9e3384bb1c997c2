"""API keys in mounted files, read again when they change, without a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from moe_core.config import AuthConfig
from moe_core.log import get_log
from moe_gateway.auth import KeyEntry, KeyRefused, KeyTable, Principal, entries_of, hashed_entries, parsed, table_of
from moe_gateway.settings import ConfigRefused

MAX_FILE_BYTES = 16 << 20
_log = get_log("gateway.auth")
Stamp = dict[str, tuple[int, int, int]]


class KeyStore:
    """The keys of a folder, of a file, or of both. Only their hashes stay in memory.

    At start, and at a change of the configuration, a bad entry is refused by name. Afterwards an entry gone bad loses
    its own keys alone (a key that was taken away must not stay good), and a folder that cannot be read keeps them all.
    """

    def __init__(self, config: AuthConfig) -> None:
        self._folder = None if config.keys_dir is None else Path(config.keys_dir)
        self._file = None if config.keys_file is None else Path(config.keys_file)
        try:
            self._stamp = self._stamps()
            problems, self._table = self._read()
        except OSError as error:
            where = "keysDir" if error.filename is None or str(error.filename) == config.keys_dir else error.filename
            raise ConfigRefused(f"auth: {where}: {error.strerror}; mount the keys there") from None
        if problems:
            raise ConfigRefused(f"auth.{problems[0]}")
        if not self._table:
            raise ConfigRefused("auth: there is no key, so nobody could ask; put one into keysDir or keysFile")

    def __repr__(self) -> str:
        return f"KeyStore({len(self._table)} keys)"

    def find(self, key: str) -> Principal | None:
        return self._table.find(key)

    async def look(self) -> None:
        """Take up what changed. Called each second."""
        try:
            stamp = await asyncio.to_thread(self._stamps)
            if stamp == self._stamp:
                return
            problems, table = await asyncio.to_thread(self._read)
        except OSError as error:
            _log.warning("the keys cannot be read; those known stay", error=type(error).__name__)
            return
        self._stamp, self._table = stamp, table
        _log.info("API keys read again", keys=len(table))
        for problem in problems:
            _log.error("an entry of the keys is refused; it lets nobody in", error=problem)

    def _names(self) -> Iterator[Path]:
        if self._folder is not None:
            # A mounted Secret has its links (..data, ..2026_11_23) beside its entries.
            yield from sorted(path for path in self._folder.iterdir() if not path.name.startswith("."))
        if self._file is not None:
            yield self._file

    def _stamps(self) -> Stamp:
        found = {}
        for path in self._names():
            stat = path.stat()
            found[str(path)] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        return found

    def _read(self) -> tuple[list[str], KeyTable]:
        """(what is wrong with entries, the keys of all others)."""
        problems: list[str] = []
        found: list[KeyEntry] = []
        for path in self._names():
            try:
                if path.stat().st_size > MAX_FILE_BYTES:
                    raise KeyRefused(f"{path.name}: is larger than {MAX_FILE_BYTES} bytes; it is no file of keys")
                text = path.read_bytes().decode("utf-8", "replace")
                made = hashed_entries(parsed(text)) if path == self._file else entries_of(path.name, text)
                table_of([*found, *made])
                found += made
            except KeyRefused as refused:
                problems.append(str(refused))
        return problems, table_of(found)
