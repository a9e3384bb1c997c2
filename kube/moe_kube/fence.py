"""Writes only while the lease is held: the last gate before the API server."""

from __future__ import annotations

from collections.abc import Callable

from moe_kube import errors
from moe_kube.api import Api
from moe_kube.calls import Call, Gate


class FencedApi(Gate):
    """An `Api` that refuses each write (errors.Fenced) unless the lease is held for at least `margin_s` more.

    `may_write` is seconds for which it is held, 0 for a follower (`Election.held_for_s`). A write gets no longer than
    that, and the server is told the limit, which it counts from when it reads the request: a server that was stopped as
    a whole for longer than the lease may still carry out what was waiting in its sockets. Kubernetes has no check that
    would refuse it; the next leader's own snapshot then shows the difference and it is put right. Reads pass.
    """

    def __init__(self, api: Api, may_write: Callable[[], float], *, margin_s: float = 1.0) -> None:
        super().__init__(api)
        self._may_write = may_write
        self._margin_s = margin_s

    async def before(self, call: Call, timeout_s: float | None) -> float | None:
        if not call.writes:
            return timeout_s
        left_s = self._may_write()
        if left_s < self._margin_s or left_s <= 0:
            raise errors.Fenced(f"{call}: not sent, the lease is held for {max(0.0, left_s):.1f} s more")
        return left_s if timeout_s is None else min(timeout_s, left_s)
