"""How many experts a batch touches, and how unevenly it loads the ranks that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

_NEWTON_STEPS = 200


def picked(popularity: Sequence[float], topk: int) -> tuple[float, ...]:
    """Probability that a token picks each expert, in the order given; they add up to `topk`.

    A token takes `topk` different experts, each by its popularity among those that are left: successive sampling, in
    its Poisson form 1 − exp(−θ·pᵢ) with the θ at which they add up. Within 0.016 of drawing tokens (Zipf 0.3 to 1.2,
    top 2 of 8 to top 8 of 256).
    """
    if topk >= len(popularity):
        return (1.0,) * len(popularity)
    total = sum(popularity)
    shares = [each / total for each in popularity]
    # 1 − exp(−x) ≤ x, so θ ≥ topk; the sum is concave in θ, so Newton's steps come from below and never pass it.
    theta = float(topk)
    for _ in range(_NEWTON_STEPS):
        missed = [math.exp(-theta * share) for share in shares]
        short = topk - (len(shares) - sum(missed))
        slope = sum(share * each for share, each in zip(shares, missed, strict=True))
        if short <= 1e-12 * topk or slope <= 0.0:
            break
        theta += short / slope
    taken = [-math.expm1(-theta * share) for share in shares]
    scale = topk / sum(taken)
    return tuple(min(1.0, each * scale) for each in taken)


@lru_cache(maxsize=512)
def inclusion(experts: int, topk: int, skew: float) -> tuple[float, ...]:
    """`picked` where popularity follows Zipf's law with exponent `skew` (0: uniform), most popular first."""
    return picked([(rank + 1) ** -skew for rank in range(experts)], topk)


def touched(experts: int, topk: int, tokens: float, skew: float = 0.0) -> float:
    """Expected distinct experts of a layer that `tokens` independent tokens pick: Σᵢ 1 − (1 − qᵢ)^tokens."""
    if not skew:
        return experts * (1.0 - _missed(topk / experts, tokens))
    return sum(1.0 - _missed(q, tokens) for q in inclusion(experts, topk, skew))


def _missed(q: float, tokens: float) -> float:
    return math.exp(tokens * math.log1p(-q)) if q < 1.0 else 0.0


@lru_cache(maxsize=512)
def placement(experts: int, topk: int, ranks: int, skew: float) -> float:
    """Max/mean of the ranks' expected loads where experts are dealt to them in turn by popularity."""
    if ranks <= 1 or not skew:
        return 1.0
    q = inclusion(experts, topk, skew)
    return max(sum(q[rank::ranks]) for rank in range(ranks)) * ranks / topk
