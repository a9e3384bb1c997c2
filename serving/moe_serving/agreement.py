"""Ranks that route the same tokens switch knobs together or not at all: else what one drops another would not compute.

They are asked at one point between two steps, tell one another what they were told, and each draws the same conclusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Proposal:
    """What one rank was told to put in force, what it holds, and why it cannot follow, if it cannot."""

    rank: int
    version: int
    knobs: str
    in_force: int
    error: str | None = None


def objection(proposals: Sequence[Proposal]) -> str | None:
    """Why no rank may switch; None: all do. The same answer for any order of the same proposals."""
    proposals = sorted(proposals, key=lambda proposal: proposal.rank)
    for proposal in proposals:
        if proposal.error is not None:
            return proposal.error
    told = {(proposal.version, proposal.knobs) for proposal in proposals}
    if len(told) > 1:
        return f"ranks were told different knobs ({_by_rank(proposals, 'version')}): none switches"
    held = {proposal.in_force for proposal in proposals}
    if len(held) > 1 and proposals[0].version <= max(held):
        return (
            f"ranks hold different knobs ({_by_rank(proposals, 'in_force')}): a version above {max(held)} brings them "
            "together"
        )
    return None


def everyone(proposal: Proposal, group: Any, size: int) -> list[Proposal]:
    """The proposals of all `size` ranks of a torch.distributed `group` on the CPU; each of them must call this."""
    if size == 1:
        return [proposal]
    import torch.distributed

    answers: list[Any] = [None] * size
    torch.distributed.all_gather_object(answers, proposal, group=group)
    return answers


def _by_rank(proposals: Sequence[Proposal], name: str) -> str:
    return ", ".join(f"version {getattr(proposal, name)} at rank {proposal.rank}" for proposal in proposals)
