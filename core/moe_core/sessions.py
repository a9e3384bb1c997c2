"""Where a session belongs: the same place in every process, with nothing remembered. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import TypeVar

SESSION_SLACK = 32
"""Requests by which sessions may put a revision above its share."""
T = TypeVar("T")


def belonging(session: str, among: Iterable[tuple[T, str, int]]) -> list[T]:
    """Things, each with its name and weight (above 0), in the order in which a session prefers them.

    Weighted rendezvous hashing (Schindelhauer and Schomaker 2005): over many sessions each thing comes first in
    proportion to its weight; a change of weights moves no more sessions than it must; one that is gone moves its own.
    """
    return [
        thing for _, thing in sorted(((_far(session, name, weight), thing) for thing, name, weight in among), key=_by)
    ]


def _by(pair: tuple[float, object]) -> float:
    return pair[0]


def _far(session: str, name: str, weight: int) -> float:
    drawn = int.from_bytes(hashlib.blake2b(f"{session}/{name}".encode(), digest_size=6).digest(), "big")
    return -math.log((drawn + 0.5) / 2**48) / weight


def session_key(*parts: str) -> str:
    """The key of a session: 16 hex digits from which nothing that it was made of can be read."""
    return hashlib.blake2b("\0".join(parts).encode(errors="replace"), digest_size=8).hexdigest()
