"""Expert capacity on tensors: the rules of `moe_core.capacity`, vectorised.

On a CPU the shapes may follow the data, so rounds work on the tokens that are still short and end when none is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core.capacity import EXTRA_ROUNDS, GAMMA_SCALE
from moe_core.wire import Overflow


@dataclass(frozen=True)
class Scores:
    """Router scores of a batch, [T, E] float32. `allowed` is a [T, E] mask, or None where all experts are open.

    Experts lie in `groups` equal groups; a mask opens or closes whole groups.
    """

    selection: Tensor
    gate: Tensor
    allowed: Tensor | None = None
    groups: int = 1


@dataclass(frozen=True)
class Capped:
    """Experts of each token, [T, K] int64 in ranking order, -1 where a slot was dropped; and what capacity did.

    `changed` [T] tells tokens whose set differs from the router's own. `lost_gate_mass` is a [T] tensor.
    """

    experts: Tensor
    changed: Tensor
    capacity: int
    dropped: int
    rerouted: int
    overflow_kept: int
    lost_gate_mass: Tensor


def slots_per_expert(gamma_micro: int, total_k: int, experts: int) -> int:
    """C = ceil(gamma * total_k / experts) for gamma in millionths."""
    return -(-gamma_micro * total_k // (experts * GAMMA_SCALE))


def assign(scores: Scores, chosen: Tensor, k: Tensor, overflow: Overflow, gamma_micro: int) -> Capped:
    """Assign experts of one phase's tokens under capacity.

    `chosen` [T, K] are the router's own choices (the first k[t] count, -1 marks an absent one); `k` is [T].
    """
    tokens = chosen.shape[0]
    experts = scores.selection.shape[1]
    limit = slots_per_expert(gamma_micro, int(k.sum()), experts)
    demand = torch.bincount(chosen[chosen >= 0].flatten(), minlength=experts)
    if overflow is not Overflow.EXPERT_CHOICE and int(demand.max()) <= limit:
        # Rounds down the ranking admit every original choice then. Experts that choose do not.
        nothing = torch.zeros(tokens, dtype=torch.bool)
        return Capped(chosen, nothing, limit, 0, 0, 0, torch.zeros(tokens))

    selection = torch.nan_to_num(scores.selection.float(), nan=-torch.inf)
    if scores.allowed is not None:
        selection = selection.masked_fill(~scores.allowed, -torch.inf)
    depth = min(experts, int(k.max()) + EXTRA_ROUNDS)
    ranking = torch.sort(selection, dim=1, descending=True, stable=True).indices
    open_count = torch.full((tokens,), experts) if scores.allowed is None else scores.allowed.sum(dim=1)

    state = _State(selection, torch.full((experts,), limit), torch.zeros(tokens, experts, dtype=torch.bool), k)
    most = int(k.max())
    state.rounds(ranking[:, :most], open_count, torch.ones_like(k))
    overflow_kept = _place_left_over(state, scores, ranking)
    if overflow is Overflow.DROP:
        state.rounds(ranking[:, :most], torch.minimum(open_count, k), k)
    elif overflow is Overflow.REROUTE:
        state.rounds(ranking[:, :depth], open_count, k)
    else:
        _expert_choice(state, scores, ranking)
    return _result(state, scores, ranking, chosen, limit, overflow_kept)


class _State:
    """Slots given so far: `held` [T, E], free slots `room` [E]. Changed in place by rounds."""

    def __init__(self, selection: Tensor, room: Tensor, held: Tensor, k: Tensor) -> None:
        self.selection = selection
        self.room = room
        self.held = held
        self.count = torch.zeros_like(k)
        self.k = k

    def rounds(self, choices: Tensor, choice_count: Tensor, wanted: Tensor) -> None:
        """In round r every token short of `wanted` proposes to its r-th choice, unless it holds that one."""
        for r in range(choices.shape[1]):
            short = torch.nonzero((self.count < wanted) & (r < choice_count)).squeeze(1)
            if short.numel() == 0:
                # Later rounds propose too, but only to tokens that are short now.
                if not bool((self.count < wanted).any()):
                    return
                continue
            expert = choices[short, r]
            free = ~self.held[short, expert]
            self.admit(short[free], expert[free])

    def admit(self, token: Tensor, expert: Tensor) -> None:
        """Experts take proposals by falling score, ties by position, while they have room."""
        if token.numel() == 0:
            return
        by_score = torch.sort(self.selection[token, expert], descending=True, stable=True).indices
        order = by_score[torch.sort(expert[by_score], stable=True).indices]
        sorted_expert = expert[order]
        counts = torch.bincount(sorted_expert, minlength=self.room.numel())
        place = torch.arange(order.numel()) - (counts.cumsum(0) - counts)[sorted_expert]
        won = order[place < self.room[sorted_expert]]
        self.give(token[won], expert[won])

    def give(self, token: Tensor, expert: Tensor) -> None:
        self.held[token, expert] = True
        self.count += torch.bincount(token, minlength=self.count.numel())
        self.room -= torch.bincount(expert, minlength=self.room.numel())


def _place_left_over(state: _State, scores: Scores, ranking: Tensor) -> int:
    if not bool((state.count == 0).any()):
        return 0
    size = state.room.numel() // scores.groups
    for group in range(scores.groups):
        first = group * size
        waiting = state.count == 0
        if scores.allowed is not None:
            waiting = waiting & scores.allowed[:, first]
        tokens = torch.nonzero(waiting).squeeze(1)
        room = state.room[first : first + size]
        free = torch.repeat_interleave(torch.arange(first, first + size), room.clamp(min=0))
        placed = min(tokens.numel(), free.numel())
        state.give(tokens[:placed], free[:placed])
    stranded = torch.nonzero(state.count == 0).squeeze(1)
    state.give(stranded, ranking[stranded, 0])
    return int(stranded.numel())


def _expert_choice(state: _State, scores: Scores, ranking: Tensor) -> None:
    taker = (state.count < state.k).unsqueeze(1) & ~state.held
    if scores.allowed is not None:
        taker &= scores.allowed
    # Two stable sorts put takers first, each by falling score, ties by position.
    by_score = torch.sort(state.selection, dim=0, descending=True, stable=True).indices
    takers_first = torch.sort((~taker).gather(0, by_score).to(torch.uint8), dim=0, stable=True).indices
    order = by_score.gather(0, takers_first)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]).unsqueeze(1).expand_as(order))
    offered = (taker & (place < state.room.unsqueeze(0))).gather(1, ranking)
    keep = offered & (offered.cumsum(1) <= (state.k - state.count).unsqueeze(1))
    token, column = torch.nonzero(keep, as_tuple=True)
    state.give(token, ranking[token, column])


def _result(state: _State, scores: Scores, ranking: Tensor, chosen: Tensor, limit: int, overflow_kept: int) -> Capped:
    width = chosen.shape[1]
    held_ranked = state.held.gather(1, ranking)
    # Positions of held experts in ranking order, the rest after them.
    first = torch.sort((~held_ranked).to(torch.uint8), dim=1, stable=True).indices[:, :width]
    experts = torch.where(held_ranked.gather(1, first), ranking.gather(1, first), -1)

    original = torch.zeros_like(state.held)
    token, column = torch.nonzero(chosen >= 0, as_tuple=True)
    original[token, chosen[token, column].long()] = True
    moved = state.held & ~original
    gate = scores.gate.float()
    whole = (gate * original).sum(1)
    kept = (gate * state.held).sum(1)
    lost = torch.where(torch.isfinite(whole) & (whole > 0), (1.0 - kept / whole).clamp(min=0.0), 0.0)
    return Capped(
        experts,
        (state.held != original).any(1),
        limit,
        int((state.k - state.count).sum()),
        int(moved.sum()),
        overflow_kept,
        lost,
    )
