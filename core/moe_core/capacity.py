"""Expert capacity, in plain Python: the definition that every faster form is tested against.

Terms. A batch has T tokens in order; token t asks for k_t of E experts. Its *selection score* orders experts (a
router's correction bias included), its *gate score* is the router's unbiased score and becomes the weight. Experts
outside the groups that a group-limited router picked for t are not *allowed*. The *ranking* of t is its allowed
experts by falling selection score, ties by expert index; the first k_t are its *original* choices.

Rules. Capacity is C = ceil(gamma * sum(k) / E) slots for each expert in a step, prefill and decode tokens apart
(after Capacity-Aware Inference, C = gamma*T*k/E). In a round every token that is still short proposes to one expert,
and an expert admits proposals by falling selection score, ties by position in the batch, while it has room. Nothing
admitted is revoked.

1. Everyone gets one slot. In rounds r = 0 … max(k)-1 a token without a slot proposes to the r-th expert of its
   ranking. Tokens left over take free allowed slots in batch order, experts by index, group after group where there
   are groups. A token that finds none keeps its best expert above C (*overflow kept*).
2. The rest. Drop: rounds over the token's original choices. Reroute: k + 8 rounds down the ranking. ExpertChoice:
   each expert offers its room once, to its best tokens, and a token keeps the best of what it is offered.
3. Slots still empty are *dropped*. Admitted experts that were no original choice are *rerouted*. Lost gate mass of a
   token is 1 - sum(gate of assigned)/sum(gate of original), at least 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from moe_core.wire import Overflow

EXTRA_ROUNDS = 8
"""Rounds of Reroute beyond k."""

GAMMA_SCALE = 1_000_000
"""Capacity factors are exact to six decimals, so that C never hangs on binary rounding."""


class CapacityRefused(ValueError):
    """A capacity factor that could leave a token without an expert."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of one phase in batch order. `selection` and `gate` are [T][E], `k` is [T].

    `allowed_groups[t]` are the expert groups open to token t, of `groups` equal ones; None opens all.
    """

    selection: Sequence[Sequence[float]]
    gate: Sequence[Sequence[float]]
    k: Sequence[int]
    groups: int = 1
    allowed_groups: Sequence[frozenset[int]] | None = None


@dataclass(frozen=True)
class Assignment:
    """Experts of each token in ranking order (fewer than k where slots were dropped), and what capacity did."""

    experts: tuple[tuple[int, ...], ...]
    capacity: int | None
    dropped: int = 0
    rerouted: int = 0
    overflow_kept: int = 0
    lost_gate_mass: tuple[float, ...] = field(default=())

    def load(self, experts: int) -> list[int]:
        """Slots that each expert holds."""
        counts = [0] * experts
        for chosen in self.experts:
            for expert in chosen:
                counts[expert] += 1
        return counts


def capacity(gamma: Decimal, total_k: int, experts: int) -> int:
    """C = ceil(gamma * total_k / experts), exact. total_k is the sum of k over the tokens routed together."""
    scaled = int(gamma * GAMMA_SCALE)
    return -(-scaled * total_k // (experts * GAMMA_SCALE))


def check_gamma(gamma: Decimal | None, smallest_k: int) -> None:
    """Raises CapacityRefused unless gamma * smallest_k >= 1: below that, a token may find no slot at all."""
    if gamma is not None and gamma * smallest_k < 1:
        raise CapacityRefused(
            f"capacity factor {gamma} with {smallest_k} experts per token leaves less than one slot a token; "
            f"it must be at least {Decimal(1) / smallest_k:.4f}"
        )


def assign(tokens: Tokens, overflow: Overflow, gamma: Decimal | None) -> Assignment:
    """Assign experts under capacity. Raises CapacityRefused for gamma * min(k) < 1."""
    rankings = [_ranking(tokens, t) for t in range(len(tokens.k))]
    original = [ranking[:k] for ranking, k in zip(rankings, tokens.k, strict=True)]
    if overflow is Overflow.UNLIMITED or gamma is None or not tokens.k:
        return Assignment(tuple(tuple(row) for row in original), None, lost_gate_mass=(0.0,) * len(original))
    check_gamma(gamma, min(tokens.k))

    experts = len(tokens.selection[0])
    limit = capacity(gamma, sum(tokens.k), experts)
    room = [limit] * experts
    held: list[set[int]] = [set() for _ in tokens.k]

    def admit(proposals: Sequence[tuple[int, int]]) -> None:
        for token, expert in sorted(proposals, key=lambda p: (-_score(tokens.selection[p[0]][p[1]]), p[0])):
            if room[expert] > 0:
                room[expert] -= 1
                held[token].add(expert)

    def rounds(count: int, choices: Sequence[Sequence[int]], wanted: Sequence[int]) -> None:
        for r in range(count):
            admit(
                [
                    (t, choices[t][r])
                    for t in range(len(held))
                    if len(held[t]) < wanted[t] and r < len(choices[t]) and choices[t][r] not in held[t]
                ]
            )

    most = max(tokens.k)
    rounds(most, rankings, [1] * len(held))
    overflow_kept = _place_left_over(tokens, rankings, room, held)
    if overflow is Overflow.DROP:
        rounds(most, original, tokens.k)
    elif overflow is Overflow.REROUTE:
        rounds(most + EXTRA_ROUNDS, rankings, tokens.k)
    else:
        _expert_choice(tokens, rankings, room, held)

    assigned = tuple(tuple(e for e in rankings[t] if e in held[t]) for t in range(len(held)))
    return Assignment(
        assigned,
        limit,
        dropped=sum(k - len(row) for k, row in zip(tokens.k, assigned, strict=True)),
        rerouted=sum(len(set(row) - set(first)) for row, first in zip(assigned, original, strict=True)),
        overflow_kept=overflow_kept,
        lost_gate_mass=tuple(_lost(tokens.gate[t], assigned[t], original[t]) for t in range(len(held))),
    )


def _score(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _ranking(tokens: Tokens, token: int) -> list[int]:
    experts = len(tokens.selection[token])
    size = experts // tokens.groups
    groups = None if tokens.allowed_groups is None else tokens.allowed_groups[token]
    open_to = [e for e in range(experts) if groups is None or e // size in groups]
    return sorted(open_to, key=lambda e: (-_score(tokens.selection[token][e]), e))


def _place_left_over(
    tokens: Tokens, rankings: Sequence[Sequence[int]], room: list[int], held: Sequence[set[int]]
) -> int:
    size = len(room) // tokens.groups
    for group in range(tokens.groups):
        free = [e for e in range(group * size, (group + 1) * size) for _ in range(room[e])]
        waiting = [t for t in range(len(held)) if not held[t] and group * size in _first_of_groups(rankings[t], size)]
        for token, expert in zip(waiting, free, strict=False):
            held[token].add(expert)
            room[expert] -= 1
    kept = 0
    for token, ranking in enumerate(rankings):
        if not held[token]:
            held[token].add(ranking[0])
            kept += 1
    return kept


def _first_of_groups(ranking: Sequence[int], size: int) -> set[int]:
    return {expert // size * size for expert in ranking}


def _expert_choice(
    tokens: Tokens, rankings: Sequence[Sequence[int]], room: list[int], held: Sequence[set[int]]
) -> None:
    offers: list[set[int]] = [set() for _ in held]
    for expert in range(len(room)):
        takers = [
            t
            for t in range(len(held))
            if len(held[t]) < tokens.k[t] and expert in rankings[t] and expert not in held[t]
        ]
        takers.sort(key=lambda t: (-_score(tokens.selection[t][expert]), t))
        for token in takers[: room[expert]]:
            offers[token].add(expert)
    for token, ranking in enumerate(rankings):
        wanted = tokens.k[token] - len(held[token])
        held[token].update([e for e in ranking if e in offers[token]][:wanted])


def _lost(gate: Sequence[float], assigned: Sequence[int], original: Sequence[int]) -> float:
    whole = sum(gate[e] for e in original)
    if not whole > 0 or not math.isfinite(whole):
        return 0.0
    return max(0.0, 1.0 - sum(gate[e] for e in assigned) / whole)
