"""Routed batches at random, and what the plain reference makes of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from decimal import ROUND_UP, Decimal
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from moe_core.capacity import Assignment, Tokens, assign
from moe_core.wire import ExpertKnobs, Overflow
from moe_serving.capacity import DECODE, PADDING, PREFILL
from moe_serving.rank import Layer, Rank
from moe_serving.scores import Routing, scores, weights

PHASES = {PREFILL: "capacity_factor_prefill", DECODE: "capacity_factor_decode"}


@dataclass(frozen=True)
class Case:
    """A batch of one layer, [T, E] logits, with phases and k [T] (0: the model's own), and the knobs in force."""

    routing: Routing
    top_k: int
    logits: torch.Tensor
    phase: tuple[int, ...]
    k: tuple[int, ...]
    knobs: ExpertKnobs
    seed: int = field(default=0, repr=False)

    @property
    def experts(self) -> int:
        return int(self.logits.shape[1])

    def k_in_force(self) -> list[int]:
        return [k or self.top_k for k in self.k]

    def gamma(self, phase: int) -> Decimal | None:
        value: Decimal | None = getattr(self.knobs, PHASES[phase])
        return None if self.knobs.overflow is Overflow.UNLIMITED else value

    def rows(self, phase: int) -> list[int]:
        return [t for t, p in enumerate(self.phase) if p == phase]

    def tokens(self, rows: list[int]) -> Tokens:
        """These rows as the reference takes them.

        Scores are those of the whole batch: of a part of it their last bit may differ, and with it who comes first.
        """
        batch = scores(self.routing, self.logits)
        groups = None
        if batch.allowed is not None:
            size = self.experts // self.routing.groups
            groups = [
                frozenset(e // size for e, is_open in enumerate(row) if is_open) for row in batch.allowed[rows].tolist()
            ]
        k = self.k_in_force()
        own = [k[t] for t in rows]
        return Tokens(batch.selection[rows].tolist(), batch.gate[rows].tolist(), own, self.routing.groups, groups)

    def router(self, by_index: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and experts of the model's own router, its slots in no order.

        Where scores tie it takes experts by index as the reference does, or whichever torch.topk finds.
        """
        batch = scores(self.routing, self.logits)
        if by_index:
            everyone = list(range(len(self.phase)))
            tokens = self.tokens(everyone)
            own = Tokens(
                tokens.selection, tokens.gate, [self.top_k] * len(everyone), tokens.groups, tokens.allowed_groups
            )
            rows = [list(row) for row in assign(own, Overflow.UNLIMITED, None).experts]
            for row in rows:
                random.Random(self.seed).shuffle(row)
            ids = torch.tensor(rows, dtype=torch.int64).view(len(rows), self.top_k)
        else:
            selection = batch.selection  # a NaN counts as the greatest there
            if batch.allowed is not None:
                selection = selection.masked_fill(~batch.allowed, -torch.inf)
            ids = torch.topk(selection, self.top_k, dim=1, sorted=False).indices
        return weights(self.routing, batch.gate, ids), ids.to(torch.int32)

    def rank(self) -> Rank:
        """A rank of one such layer, with the knobs in force and the step begun."""
        rank = Rank()
        rank.layers.append(Layer(0, "moe.0", self.experts, self.top_k, self.routing))
        rank.apply(self.knobs, 1)
        self.begin(rank)
        return rank

    def begin(self, rank: Rank) -> None:
        rank.begin_step(np.array(self.phase, np.uint8), 0, np.array(self.k, np.int64) if any(self.k) else None)

    def reference(self) -> dict[int, Assignment]:
        """What capacity makes of each phase."""
        return {
            phase: assign(self.tokens(self.rows(phase)), self.knobs.overflow, self.gamma(phase)) for phase in PHASES
        }


def chosen_sets(ids: torch.Tensor) -> list[set[int]]:
    return [{expert for expert in row if expert >= 0} for row in ids.tolist()]


ANY = st.sampled_from(list(Overflow))


@st.composite
def cases(draw: st.DrawFn, overflow: st.SearchStrategy[Overflow] = ANY) -> Case:
    rng = random.Random(draw(st.integers(0, 2**32)))
    groups = draw(st.sampled_from([1, 1, 1, 2, 4]))
    experts = groups * draw(st.integers(2, draw(st.sampled_from([12, 40])) // groups))
    groups_per_token = draw(st.integers(1, groups))
    scoring = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    bias = torch.tensor([rng.choice((-0.25, 0.0, 0.5)) for _ in range(experts)]) if draw(st.booleans()) else None
    routing = Routing(
        scoring, draw(st.booleans()), rng.choice((1.0, 2.5)), groups, groups_per_token, bias, by_gate=groups > 1
    )
    top_k = rng.randint(1, min(experts // groups * groups_per_token, 5))  # k = E where all are open and few
    count = rng.choice((0, 1, 2, 8, 20, 33, 33))
    phase = tuple(rng.choices((PREFILL, DECODE, PADDING), (6, 3, draw(st.integers(0, 3))), k=count))
    fewest = rng.randint(1, top_k)
    tiers = rng.random() < 0.5
    k = tuple(rng.choice((0, rng.randint(fewest, top_k))) if tiers else 0 for _ in range(count))
    smallest = Decimal(1) / (fewest if tiers else top_k)

    def gamma() -> Decimal | None:
        if rng.random() < 0.15:
            return None
        looser = Decimal(rng.choice(("1", "1", "1.1", "1.5")))
        return (smallest * looser).quantize(Decimal("0.000001"), ROUND_UP)

    way = draw(overflow)
    knobs = ExpertKnobs(
        overflow=way,
        capacity_factor_prefill=gamma(),
        capacity_factor_decode=gamma(),
        per_token={"least": fewest} if tiers else {},
    )
    return Case(routing, top_k, _logits(draw, rng, count, experts), phase, k, knobs, rng.randrange(2**32))


def _logits(draw: st.DrawFn, rng: random.Random, count: int, experts: int) -> torch.Tensor:
    """All alike, of few values (ties) or of many; experts of unequal favour; here and there a NaN or an infinity."""
    levels = draw(st.sampled_from([1, 3, 1000]))
    skew = [rng.choice((0.0, 1.0, 3.0)) * (levels > 1) for _ in range(experts)]
    odd: tuple[Any, ...] = draw(st.sampled_from([(), (), (float("nan"),), (float("inf"), float("-inf"), 0.0, -0.0)]))
    rows = [
        [
            rng.choice(odd) if odd and rng.random() < 0.15 else rng.randrange(levels) / max(1, levels - 1) + skew[e]
            for e in range(experts)
        ]
        for _ in range(count)
    ]
    return torch.tensor(rows, dtype=torch.float32).view(count, experts)
