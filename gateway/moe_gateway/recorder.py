"""Writes down what was decided and from what, for `moectl replay`: bounded files, never in a request's way.

A line has names of upstreams, counts, times and prices: no prompt, no key, no tenant. What cannot be written is dropped
and said once; the next line then holds the whole state, so that what follows can still be decided again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from moe_core import recorded
from moe_core.clock import Clock
from moe_core.config import RecordConfig
from moe_core.forecast import SpillContext
from moe_core.log import Log
from moe_core.recorded import Noted
from moe_core.spill import Decision, SpillState

FLUSH_S = 0.25
WAITING_MAX = 20_000
"""Decisions that wait to be written; what comes on top is dropped."""
PREFIX = "decisions-"


class Recorder:
    """The files of one process in a folder that others may share."""

    def __init__(self, config: RecordConfig, clock: Clock, log: Log) -> None:
        self.config = config
        self._clock, self._log = clock, log
        self._waiting: deque[Noted] = deque()
        self._last: dict[str, SpillState] = {}
        self._numbers: dict[str, int] = {}
        self._file: BinaryIO | None = None
        self._written = self._files = 0
        self._begun: set[str] = set()
        """Chains that are in the file already."""
        self._failed = False
        self._writing: asyncio.Task[None] | None = None

    def note(
        self, chain: str, context: SpillContext, before: SpillState, decision: Decision, after: SpillState
    ) -> None:
        """Remember one decision. `chain`: decisions whose states follow one another."""
        if len(self._waiting) >= WAITING_MAX:
            self._last.clear()
            return
        follows = self._last.get(chain) is before
        self._last[chain] = after
        number = self._numbers[chain] = self._numbers.get(chain, -1) + 1
        whole = replace(context, targets=tuple(context.targets))  # what is made lazily reads what will have changed
        self._waiting.append(Noted(chain, number, whole, decision, before, follows))

    async def flush(self) -> None:
        """Write what waits. A writing that has begun goes on to its end, whoever stops waiting for it."""
        if self._writing is None and self._waiting:
            noted = [self._waiting.popleft() for _ in range(len(self._waiting))]
            self._writing = asyncio.create_task(self._write_out(noted), name="decisions")
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def close(self) -> None:
        """Write the rest, and end the file."""
        while self._writing is not None or self._waiting:
            await self.flush()
        self._shut()

    async def _write_out(self, noted: list[Noted]) -> None:
        try:
            await asyncio.to_thread(self._write, noted)
            self._failed = False
        except (OSError, TypeError, ValueError) as error:  # no record is worth a gateway
            self._last.clear()
            self._shut()
            if not self._failed:
                self._log.error("decisions cannot be written down", folder=self.config.dir, error=str(error))
            self._failed = True
        finally:
            self._writing = None

    def _shut(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _write(self, noted: list[Noted]) -> None:
        for each in noted:
            if self._file is None or self._written >= self.config.file_bytes:
                self._file = self._next()
            data = recorded.line(each, whole=each.chain not in self._begun)
            self._begun.add(each.chain)
            self._file.write(data)
            self._written += len(data)
        if self._file is not None:
            self._file.flush()

    def _next(self) -> BinaryIO:
        self._shut()
        folder = Path(self.config.dir)
        folder.mkdir(parents=True, exist_ok=True)
        # The oldest go, whoever wrote them: a process that is started again and again does not fill the disk.
        found = sorted(folder.glob(f"{PREFIX}*.jsonl"), key=_changed)
        for old in found[: max(0, len(found) + 1 - self.config.files)]:
            old.unlink(missing_ok=True)
        self._files += 1
        file = (folder / f"{PREFIX}{int(self._clock.time())}-{os.getpid()}-{self._files:06d}.jsonl").open("wb")
        file.write(recorded.head())
        self._written, self._begun = len(recorded.head()), set()
        return file


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
