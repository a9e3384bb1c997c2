"""How many experts a batch touches, and how unevenly it loads the ranks that hold them."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=512)
def inclusion(experts: int, topk: int, skew: float) -> tuple[float, ...]:
    """Probability that a token picks each expert, most popular first; they add up to `topk`.

    Popularity follows Zipf's law with exponent `skew` (0: uniform). An expert is picked at most once by a token: what a
    probability would exceed 1 goes to the others in proportion.
    """
    weights = [(rank + 1) ** -skew for rank in range(experts)]
    certain = 0
    while certain < topk:
        scale = (topk - certain) / sum(weights[certain:])
        if weights[certain] * scale < 1.0:
            break
        certain += 1
    else:
        scale = 0.0
    return tuple([1.0] * certain + [min(1.0, weight * scale) for weight in weights[certain:]])


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
