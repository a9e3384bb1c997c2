"""Expert capacity on tensors: the rules of `moe_core.capacity` in fixed shapes, for CPU and GPU alike.

Nothing here waits for the device or takes a shape from data, so the same code runs eagerly, traced whole and inside a
captured graph; overflow and capacity factors are read from tensors. Both phases go in one pass: expert e of phase p
is *seat* (p - 1)·E + e, and a token that proposes to nobody proposes to the last seat, which has no room.

`early_out` is for tensors in the CPU's own memory and an eager call, where a look at them costs nothing: rounds in
which nobody is short are left out then, with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core.capacity import EXTRA_ROUNDS, GAMMA_SCALE
from moe_core.wire import Overflow

PADDING, PREFILL, DECODE = 0, 1, 2
"""Phase of a token. Padding is routed by nobody's leave and never counted."""
PHASES = 2
MODES = {Overflow.UNLIMITED: 0, Overflow.REROUTE: 1, Overflow.DROP: 2, Overflow.EXPERT_CHOICE: 3}
"""Overflow as the number that a tensor holds."""

_EXPERTS = 1 << 16  # more than any model has
_CHOSEN = 1 << 56  # above any score: the router's own choices lead its ranking also where scores tie
_SCORES = 1 << 48  # no score reaches it
_CLOSED = -(1 << 62)  # below any score
_AFTER_ALL = 1 << 62


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
class Limits:
    """What is in force: `overflow` [] int64 of MODES, `gamma_micro` [2] int64, γ in millionths by phase, 0 uncapped."""

    overflow: Tensor
    gamma_micro: Tensor


@dataclass(frozen=True)
class Capped:
    """Experts of each token, [T, K] int64 in ranking order, -1 where a slot was dropped; and what capacity did.

    `changed` [T] tells tokens whose set differs from the router's own. `capacity` [2] is C by phase (0: uncapped),
    `lost_gate_mass` is [T] float32, the rest are int64 scalars. Tokens of an uncapped phase keep their choices.
    """

    experts: Tensor
    changed: Tensor
    capacity: Tensor
    dropped: Tensor
    rerouted: Tensor
    overflow_kept: Tensor
    lost_gate_mass: Tensor


def preference(score: Tensor, expert: Tensor) -> Tensor:
    """int64 that orders experts: by falling float32 `score`, ties by index `expert`; NaN counts as minus infinity.

    The bits of a float order as an integer does, once those of negative ones are turned; 0 and -0 are made alike.
    """
    clean = torch.nan_to_num(score.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).add_(0.0)
    bits = clean.view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    return ordered.to(torch.int64).mul_(_EXPERTS).add_(_EXPERTS - 1 - expert)


def slots_per_expert(gamma_micro: Tensor, total_k: Tensor, experts: int) -> Tensor:
    """C = ceil(gamma * total_k / experts) for gamma in millionths; exact in int64."""
    return -torch.div(-gamma_micro * total_k, experts * GAMMA_SCALE, rounding_mode="floor")


def assign(scores: Scores, chosen: Tensor, k: Tensor, phase: Tensor, limits: Limits, early_out: bool = False) -> Capped:
    """Assign experts under capacity.

    `chosen` [T, K] int64 are the router's own choices in any order (k[t] of them, -1 marks an absent one); `k` and
    `phase` are [T] int64.
    """
    experts = scores.selection.shape[1]
    segment = (phase - 1).clamp(min=0)
    member = (phase > PADDING) & (limits.gamma_micro[segment] > 0) & (limits.overflow != MODES[Overflow.UNLIMITED])
    k = torch.where(member, k, 0)
    total_k = torch.zeros(PHASES, dtype=torch.int64, device=k.device).scatter_add(0, segment, k)
    limit = slots_per_expert(limits.gamma_micro, total_k, experts)
    if early_out and not _may_bind(chosen, segment, member, limits, limit, experts):
        nothing = torch.zeros((), dtype=torch.int64)
        no_token = torch.zeros(chosen.shape[0])
        return Capped(chosen, no_token > 0, limit, nothing, nothing, nothing, no_token)

    state = _State(scores, chosen, k, segment, member, limit, early_out)
    most = torch.zeros_like(total_k).scatter_reduce(0, segment, k, "amax")[segment]
    state.first_slots(torch.minimum(state.open_count, most))
    overflow_kept = _place_left_over(state, scores.groups)
    down_the_ranking = torch.where(
        limits.overflow == MODES[Overflow.REROUTE], torch.minimum(state.open_count, most + EXTRA_ROUNDS), 0
    )
    original_only = torch.where(limits.overflow == MODES[Overflow.DROP], torch.minimum(state.open_count, k), 0)
    state.other_slots(down_the_ranking + original_only)
    slots = state.slots()
    by_choice = limits.overflow == MODES[Overflow.EXPERT_CHOICE]
    if not early_out or bool(by_choice):
        slots = torch.cat((slots, _expert_choice(state, slots, by_choice)), dim=1)
    return _result(state, scores, slots, chosen, limit, overflow_kept)


def _may_bind(chosen: Tensor, segment: Tensor, member: Tensor, limits: Limits, limit: Tensor, experts: int) -> bool:
    """Rounds down the ranking admit every original choice where demand is below C. Experts that choose may not."""
    if not bool(member.any()):
        return False
    if bool(limits.overflow == MODES[Overflow.EXPERT_CHOICE]):
        return True
    demand = seat_counts(chosen, segment, member, experts)
    return bool((demand > limit.unsqueeze(1)).any())


def seat_counts(chosen: Tensor, segment: Tensor, counted: Tensor, experts: int) -> Tensor:
    """Slots by phase and expert, [2, E] int64, of the choices [T, K] of tokens that are `counted` [T]."""
    nobody = PHASES * experts
    seat = torch.where((chosen >= 0) & counted.unsqueeze(1), segment.unsqueeze(1) * experts + chosen, nobody).flatten()
    counts = torch.zeros(nobody + 1, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add(0, seat, torch.ones_like(seat))[:nobody].view(PHASES, experts)


class _State:
    """Slots given so far: each token's `first` expert, `more` of them round by round, their `count`, all [T]; and free
    slots by seat in `room`, none in the last.

    `preference` [T, E] orders a token's experts, the router's choices first; `ranking` and `score` are [D, T], the D
    best. `open` [T, E] are the experts that a token may have, None for all.
    """

    def __init__(
        self, scores: Scores, chosen: Tensor, k: Tensor, segment: Tensor, member: Tensor, limit: Tensor, early_out: bool
    ) -> None:
        tokens, width = chosen.shape
        self.experts = scores.selection.shape[1]
        self.width, self.k, self.segment, self.member, self.early_out = width, k, segment, member, early_out
        index = torch.arange(self.experts, device=chosen.device)
        self.preference = preference(scores.selection, index)
        self.preference.scatter_add_(1, chosen.clamp(min=0), (chosen >= 0) * _CHOSEN)
        self.open, self.open_count = None, torch.full_like(k, self.experts)
        if scores.allowed is not None:
            self.open = _open(scores.allowed, scores.groups, self.preference > _SCORES)
            self.open_count = self.open.sum(1)
            self.preference.masked_fill_(~self.open, _CLOSED)
        best = torch.topk(self.preference, min(self.experts, width + EXTRA_ROUNDS), dim=1)
        self.ranking = best.indices.t().contiguous()
        self.score = _score(best.values).t().contiguous()
        nobody = torch.zeros(1, dtype=torch.int64, device=chosen.device)
        self.room = torch.cat((limit.repeat_interleave(self.experts, output_size=PHASES * self.experts), nobody))
        self.first = torch.full_like(k, -1)
        self.more: list[Tensor] = []
        self.count = torch.zeros_like(k)
        self.position = torch.arange(tokens, device=chosen.device)

    def first_slots(self, reach: Tensor) -> None:
        """In round r < reach[t] a token without a slot proposes to its r-th expert."""
        for r in range(self._rounds(min(self.width, self.ranking.shape[0]), reach)):
            short = self.member & (self.count == 0)
            if self.early_out and not bool(short.any()):
                return
            self.hold_first(self.ranking[r], self._admit(r, short & (r < reach)))

    def other_slots(self, reach: Tensor) -> None:
        """The same for tokens short of k. What a token won here it won at that r: only its first may come again."""
        for r in range(self._rounds(self.ranking.shape[0], reach)):
            short = self.count < self.k
            if self.early_out and not bool(short.any()):
                return
            won = self._admit(r, short & (r < reach) & (self.ranking[r] != self.first))
            self.count = self.count + won
            self.more.append(torch.where(won, self.ranking[r], -1))

    def _rounds(self, most: int, reach: Tensor) -> int:
        return min(most, int(reach.max())) if self.early_out else most

    def _admit(self, r: int, proposes: Tensor) -> Tensor:
        """Experts take proposals by falling score, ties by position, while they have room; returns who won, [T]."""
        seat = torch.where(proposes, self.segment * self.experts + self.ranking[r], PHASES * self.experts)
        order = torch.sort(seat * (1 << 33) - self.score[r], stable=True).indices
        in_order = seat[order]
        counts = torch.zeros_like(self.room).scatter_add_(0, seat, torch.ones_like(seat))
        place = self.position - (counts.cumsum(0) - counts)[in_order]
        won = torch.empty_like(proposes).scatter_(0, order, place < self.room[in_order])
        self.room = self.room - torch.minimum(counts, self.room)
        return won

    def hold_first(self, expert: Tensor, won: Tensor) -> None:
        """Tokens that `won` [T] hold `expert` [T] as their first."""
        self.first = torch.where(won, expert, self.first)
        self.count = self.count + won

    def slots(self) -> Tensor:
        """[T, K or more], -1 where a slot is empty."""
        held = torch.stack((self.first, *self.more), dim=1)
        return torch.nn.functional.pad(held, (0, max(0, self.width - held.shape[1])), value=-1)


def _mask(chosen: Tensor, experts: int) -> Tensor:
    """[T, E] bool of the experts named in [T, K]; -1 names none."""
    named = torch.zeros(chosen.shape[0], experts + 1, dtype=torch.bool, device=chosen.device)
    return named.scatter(1, torch.where(chosen >= 0, chosen, experts), True)[:, :experts]


def _open(allowed: Tensor, groups: int, chose: Tensor) -> Tensor:
    # Where groups tie, the router may have picked others than we did: then its own are the ones that are open.
    by_group = chose.view(chose.shape[0], groups, chose.shape[1] // groups)
    its_own = by_group.any(2, keepdim=True).expand_as(by_group).reshape(chose.shape)
    return torch.where((chose & ~allowed).any(1, keepdim=True), its_own, allowed)


def _score(preference: Tensor) -> Tensor:
    """The part of a preference that is the score: what experts go by."""
    return torch.where(preference > _SCORES, preference - _CHOSEN, preference) >> 16


def _place_left_over(state: _State, groups: int) -> Tensor:
    """Tokens without a slot take what is free, in batch order; returns how many found nothing and were kept above C."""
    if state.early_out and not bool((state.member & (state.count == 0)).any()):
        return torch.zeros((), dtype=torch.int64)
    size = state.experts // groups
    phases = torch.arange(PHASES, device=state.segment.device).unsqueeze(1)
    for first in range(0, state.experts, size):
        waiting = state.member & (state.count == 0) & (state.segment == phases)
        if state.open is not None:
            waiting &= state.open[:, first]
        place = waiting.cumsum(1) - 1
        free = state.room[:-1].view(PHASES, state.experts)[:, first : first + size]
        taken_up_to = free.cumsum(1)
        fits = waiting & (place < taken_up_to[:, -1:])
        expert = torch.searchsorted(taken_up_to, place.clamp(min=0).contiguous(), right=True)
        won = fits.any(0)
        taken = torch.where(fits, expert + first, 0).sum(0)
        seat = torch.where(won, state.segment * state.experts + taken, PHASES * state.experts)
        state.room = state.room.scatter_add(0, seat, -won.to(torch.int64))
        state.hold_first(taken, won)
    stranded = state.member & (state.count == 0)
    state.hold_first(state.ranking[0], stranded)
    return stranded.sum()


def _expert_choice(state: _State, slots: Tensor, in_force: Tensor) -> Tensor:
    """Each expert offers its room once, to its best tokens; returns what tokens keep, [T, K], -1 where nothing."""
    held = _mask(slots, state.experts)
    taker = ((state.count < state.k) & in_force).unsqueeze(1) & ~held
    if state.open is not None:
        taker &= state.open
    taker = taker.t()
    # By phase, then by falling score, ties by position; tokens that take nothing come last.
    key = torch.where(taker, state.segment * (1 << 33) - _score(state.preference).t(), _AFTER_ALL)
    order = torch.sort(key, dim=1, stable=True).indices
    takers = torch.stack([(taker & (state.segment == p)).sum(1) for p in range(PHASES)])
    later = state.segment[order]
    place = state.position - torch.where(later > 0, takers[0].unsqueeze(1), 0)
    room = state.room[:-1].view(PHASES, state.experts).t().gather(1, later)
    offered_in_order = (place < room) & (state.position < takers.sum(0).unsqueeze(1))
    offered = torch.zeros_like(taker).scatter(1, order, offered_in_order).t()
    best = torch.topk(torch.where(offered, state.preference, _CLOSED), state.width, dim=1)
    keeps = (best.values > _CLOSED) & (
        torch.arange(state.width, device=slots.device) < (state.k - state.count).unsqueeze(1)
    )
    state.count = state.count + keeps.sum(1)
    return torch.where(keeps, best.indices, -1)


def _result(
    state: _State, scores: Scores, slots: Tensor, chosen: Tensor, limit: Tensor, overflow_kept: Tensor
) -> Capped:
    by_ranking = torch.where(slots >= 0, state.preference.gather(1, slots.clamp(min=0)), _CLOSED)
    first = torch.topk(by_ranking, chosen.shape[1], dim=1).indices
    experts = torch.where(state.member.unsqueeze(1), slots.gather(1, first), chosen)
    moved = (experts >= 0) & (state.preference.gather(1, experts.clamp(min=0)) < _SCORES)
    fewer = (experts >= 0).sum(1) != (chosen >= 0).sum(1)
    whole, kept = (_mass(scores.gate.float(), which) for which in (chosen, experts))
    lost = torch.nan_to_num((1.0 - kept / whole).clamp(min=0.0), nan=0.0)
    return Capped(
        experts,
        moved.any(1) | fewer,
        limit,
        (state.k - state.count).sum(),
        moved.sum(),
        overflow_kept,
        torch.where(state.member & torch.isfinite(whole) & (whole > 0), lost, 0.0),
    )


def _mass(gate: Tensor, experts: Tensor) -> Tensor:
    """Gate mass [T] of experts [T, K], in one order so that equal sets weigh the same."""
    return torch.where(experts >= 0, gate.gather(1, experts.clamp(min=0)), 0.0).sum(1)
