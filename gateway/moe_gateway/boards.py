"""Polls the board of each revision once a second. A board that is gone widens the forecast and stops nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from moe_core.forecast import EngineReport, foreign_load
from moe_core.http import HttpError, call_json
from moe_core.wire import ReplicaDigest
from moe_gateway.state import Gateway
from moe_gateway.upstream import Upstream

POLL_S = 1.0
TIMEOUT_S = 0.8
SMOOTH_POLLS = 3
_DIGESTS = TypeAdapter(list[ReplicaDigest])


@dataclass
class Board:
    """What is remembered of one board between polls. Ages are by our own clock, from the moment a digest was new."""

    url: str
    upstream: Upstream
    seen: dict[str, tuple[int, float]] = field(default_factory=dict)
    foreign: list[tuple[int, int]] = field(default_factory=list)
    reachable: bool = True


class BoardPoller:
    """Keeps `Upstream.report` of every revision that has a board."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._boards: list[Board] = []

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            for board in self.boards:
                await self.poll(board)
            await self._gateway.clock.sleep(POLL_S)

    async def poll(self, board: Board) -> None:
        log = self._gateway.log.bind(board=board.url, revision=board.upstream.name)
        try:
            answer = await call_json(self._gateway.client, "GET", f"{board.url}/v1/digests", total_s=TIMEOUT_S)
            digests = _DIGESTS.validate_python(answer)
        except (HttpError, ValidationError) as error:
            if board.reachable:
                detail = str(error) if isinstance(error, HttpError) else "its digests are not of our form"
                log.warning("the board gives no digests; forecasts go by the gateway's own ledger", detail=detail)
            board.reachable = False
            return
        if not board.reachable:
            log.info("the board gives digests again")
        board.reachable = True
        now_s = self._gateway.clock.monotonic()
        board.upstream.replicas = tuple(digests)
        if digests:
            load = self._gateway.load(board.upstream, now_s)
            board.upstream.report = summarise(board, digests, now_s, (load.waiting, load.running))
            board.upstream.report_at_s = now_s

    @property
    def boards(self) -> list[Board]:
        """The boards of the configuration in force. One that stays keeps what is remembered of it."""
        gateway, known = self._gateway, {(board.url, id(board.upstream)): board for board in self._boards}
        wanted = [
            Board(revision.board_url.rstrip("/"), gateway.upstreams[revision.name])
            for revision in gateway.config.revisions
            if revision.board_url is not None
        ]
        self._boards = [known.get((board.url, id(board.upstream)), board) for board in wanted]
        return self._boards


def summarise(
    board: Board, digests: list[ReplicaDigest], now_s: float, known: tuple[int, int] | None = None
) -> EngineReport:
    """One report over the replicas of a revision. Its age is that of the oldest digest.

    `known`: (waiting, running) requests that the gateway's workers sent; by default this one's own.
    """
    if known is None:
        waiting, _, running = board.upstream.ledger.counts(now_s)
        known = (waiting, running)
    seen = {}
    for digest in digests:
        seq, since_s = board.seen.get(digest.replica, (-1, now_s))
        seen[digest.replica] = (digest.seq, now_s if digest.seq != seq else since_s)
    board.seen = seen
    running = sum(digest.engine.running for digest in digests)
    waiting = sum(digest.engine.waiting for digest in digests)
    foreign_running, foreign_waiting = of_others(board, running, waiting, known)
    return EngineReport(
        running=running,
        waiting=waiting,
        kv_usage=max(digest.engine.kv_usage for digest in digests),
        active_limit=sum(digest.engine.max_active_seqs for digest in digests),
        age_s=max(now_s - since_s for _, since_s in seen.values()),
        foreign_running=foreign_running,
        foreign_waiting=foreign_waiting,
        replicas=len(digests),
        step_tokens=max(digest.engine.max_batched_tokens for digest in digests),
    )


def of_others(board: Board, running: int, waiting: int, known: tuple[int, int]) -> tuple[int, int]:
    """(running, waiting) requests that this gateway did not send, from what the engines just said.

    Their counts lag the ledger by a second or so; a load of others that is real shows in several polls running, so the
    smallest of the last few is taken.
    """
    own_waiting, own_running = known
    board.foreign = [*board.foreign, foreign_load(running, waiting, own_running, own_waiting)][-SMOOTH_POLLS:]
    return min(board.foreign, key=sum)
