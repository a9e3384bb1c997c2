"""What a process has set aside and spent, on its own disk, so that its successor can give back what it held.

A line is written before the money can leave. It is not forced to the disk: the operating system keeps it when the
process dies, and after a crash of the machine the journal is not believed (its boot id is another).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from moe_gateway.money import Spent

SUFFIX = ".budget-journal"
COMPACT_BYTES = 4 << 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Reserved:
    """Money set aside for one call."""

    day: str
    tenant: str
    target: str
    pico: int


@dataclass
class Account:
    """What a process has spent, by day, and what it has set aside."""

    spent: dict[str, Spent] = field(default_factory=dict)
    reserved: dict[str, Reserved] = field(default_factory=dict)

    def spend(self, reserved: Reserved, amount: int) -> None:
        if amount:
            row = self.spent.setdefault(reserved.day, {}).setdefault(reserved.tenant, {})
            row[reserved.target] = row.get(reserved.target, 0) + amount

    def settle(self, reservation: str, amount: int) -> None:
        self.spend(self.reserved.pop(reservation), amount)


@dataclass(frozen=True)
class Found:
    """The journal of a process that is no more; what it had set aside counts as spent."""

    holder: str
    spent: dict[str, Spent]
    path: Path


class Journal:
    """The journal of this process. Raises OSError where the disk does not take a line."""

    def __init__(self, folder: Path, holder: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{holder}{SUFFIX}"
        self._holder = holder
        self._file = self._begin(self.path, Account())

    def reserve(self, reservation: str, reserved: Reserved) -> None:
        self._write([reservation, reserved.day, reserved.tenant, reserved.target, reserved.pico])

    def settle(self, reservation: str, amount: int) -> None:
        self._write([reservation, amount])

    def forget(self, day: str) -> None:
        """A day's account has ended in the books."""
        self._write(["", day, "ended"])

    def compact(self, account: Account) -> None:
        """Begin anew with the account as it stands, once the journal has grown."""
        if self._size < COMPACT_BYTES:
            return
        fresh = self.path.with_suffix(".new")
        file = self._begin(fresh, account)
        os.replace(fresh, self.path)
        os.close(self._file)
        self._file = file

    def end(self, keep: bool) -> None:
        """Let go of it; `keep` where something in it is not in the books yet."""
        if not keep:
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self._file)

    def _begin(self, path: Path, account: Account) -> int:
        file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            rows = {name: [r.day, r.tenant, r.target, r.pico] for name, r in account.reserved.items()}
            head = {"holder": self._holder, "boot": boot_id(), "spent": account.spent, "reserved": rows}
            self._size = os.write(file, orjson.dumps(head) + b"\n")
        except BaseException:
            os.close(file)
            raise
        return file

    def _write(self, row: list[str | int]) -> None:
        line = orjson.dumps(row) + b"\n"
        written = os.write(self._file, line)
        self._size += written
        if written < len(line):
            raise OSError("the journal's disk is full")


def boot_id() -> str:
    """Which start of the machine this is; empty where nobody says, and then no journal is believed."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def orphans(folder: Path) -> Iterator[Found]:
    """Journals whose process is dead: their lock can be had. Those of another start of the machine are dropped."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with contextlib.suppress(OSError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            found = _read(path, file.read())
            if found is not None:
                yield found
            else:
                path.unlink()


def _read(path: Path, text: bytes) -> Found | None:
    head, *lines = text.split(b"\n")
    try:
        document = orjson.loads(head)
        if not boot_id() or document["boot"] != boot_id():
            return None
        reserved = {name: Reserved(*row) for name, row in document["reserved"].items()}
        account = Account(document["spent"], reserved)
        for line in lines[:-1]:  # What follows the last newline was never finished, and so never acted upon.
            name, *row = orjson.loads(line)
            if len(row) == 1:
                account.settle(name, row[0])
            elif len(row) == 2:
                account.spent.pop(row[0], None)
            else:
                account.reserved[name] = Reserved(*row)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
        return None
    for name in list(account.reserved):
        account.settle(name, account.reserved[name].pico)
    return Found(document["holder"], account.spent, path)
