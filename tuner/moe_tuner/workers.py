"""Threads for calls that block, by what they call: a storage or a Prometheus that hangs delays no other."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
QUERY_THREADS = 4
SWITCH_S = 0.0005


class Workers:
    """Pools by address, shared by all deployments that name it."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, str], ThreadPoolExecutor] = {}

    def storage(self, url: str) -> ThreadPoolExecutor:
        """One thread: SQLite and Optuna see their calls in order."""
        return self._pool("study", url, 1)

    def prometheus(self, url: str) -> ThreadPoolExecutor:
        return self._pool("prometheus", url, QUERY_THREADS)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        self._pools.clear()

    def _pool(self, kind: str, url: str, threads: int) -> ThreadPoolExecutor:
        pool = self._pools.get((kind, url))
        if pool is None:
            pool = self._pools[kind, url] = ThreadPoolExecutor(threads, thread_name_prefix=kind)
        return pool


def share_evenly() -> None:
    """Let the loop's thread have the interpreter back soon: by Python's own 5 ms, each of the many small writes of a
    tick would wait that long for a thread that parses an answer."""
    sys.setswitchinterval(SWITCH_S)


async def run_in(pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, call)
