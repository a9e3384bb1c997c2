"""The books of a running simulation: each figure is counted on its own, so that tests can hold them to laws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_planner.sim.simulate import Run


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Tokens are output tokens."""

    now_s: float
    in_system: int
    asked: int
    """Of all requests that have arrived."""
    made: int
    left: int
    """Of requests in flight, yet to be made."""
    lost: int
    """Of shed, failed and cut requests, never to be made."""
    free_blocks: tuple[int, ...]
    held_blocks: tuple[int, ...]
    total_blocks: int


def books(run: Run) -> Snapshot:
    """Count everything now."""
    replicas = run.replicas
    return Snapshot(
        run.now,
        run.arrived - run.ended,
        sum(run.output[: run.arrived]),
        sum(replica.tokens_out for replica in replicas) + run.closed.made,
        sum(replica.tokens_left() for replica in replicas) + run.closed.left,
        run.lost,
        tuple(replica.free for replica in replicas),
        tuple(replica.blocks_held() for replica in replicas),
        run.world.engine.blocks,
    )
