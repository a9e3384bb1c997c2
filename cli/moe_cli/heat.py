"""The expert matrix as a heat map: levels and titles. Pure; terminal and pictures draw it."""

from __future__ import annotations

from moe_core.wire import ExpertMatrix, Overflow

BOUNDS = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 4.0)
"""Load over mean at which one level ends and the next begins; level 0 is a load of exactly nothing."""

LEVELS = len(BOUNDS) + 2


def level(load_over_mean: float) -> int:
    """0 for nothing, then 1 to LEVELS - 1 by BOUNDS."""
    if load_over_mean == 0:
        return 0
    return 1 + sum(load_over_mean >= bound for bound in BOUNDS)


def title(matrix: ExpertMatrix) -> tuple[str, ...]:
    """Model, replica, knobs in force and window."""
    knobs = matrix.knobs
    in_force = "uncapped"
    if knobs.overflow is not Overflow.UNLIMITED:
        factors = [
            f"{phase} {factor.normalize():f}" if factor is not None else f"{phase} uncapped"
            for phase, factor in (("prefill", knobs.capacity_factor_prefill), ("decode", knobs.capacity_factor_decode))
        ]
        own = len(knobs.capacity_factor_by_layer or ())
        apart = f"; {own} {'layer has its' if own == 1 else 'layers have their'} own" if own else ""
        in_force = f"{knobs.overflow.value}, capacity factor {', '.join(factors)}{apart}"
    tiers = "".join(f", k {k} for tier {tier}" for tier, k in sorted(knobs.per_token.items()))
    tokens = max((layer.tokens for layer in matrix.layers), default=0)
    window_s = max(0.0, matrix.at_s - matrix.started_at_s)
    ranks = f"{matrix.ranks} EP ranks" if matrix.ranks > 1 else "1 EP rank"
    return (
        f"{matrix.model or 'experts'} · replica {matrix.replica} · {ranks}",
        f"knobs version {matrix.knobs_version}: {in_force}{tiers}",
        f"window {_duration(window_s)}: {tokens:,} tokens routed",
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
