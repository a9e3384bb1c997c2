"""Held-out perplexity of a small trained mixture of experts against capacity factor, overflow policy and k.

The model runs in plain transformers; what its routers answer passes through the capacity code of serving before the
experts see it. A step is a batch of whole sequences, all prefill: capacity counts over its tokens. Its sequences come
from all over the held-out text, as an engine's step mixes requests that have nothing to do with one another.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import trained_moe
from benchmarks.trained_moe import Recipe
from moe_core.wire import ExpertKnobs, Overflow

GAMMAS = (Decimal("1"), Decimal("1.25"), Decimal("1.5"), Decimal("2"))
POLICIES = (Overflow.REROUTE, Overflow.DROP, Overflow.EXPERT_CHOICE)
SEQUENCES_A_STEP = 16
STEPS_TRIED = (1, 4, 16, 64)
"""Sequences a step, for what the size of a step does."""
RANKS = 2
SEEDS = (1, 2, 3)
"""Models of one recipe: the first for the whole grid, all of them for what γ costs."""


@dataclass(frozen=True)
class Setting:
    """What routers are held to. `gamma` None is no capacity; `k` None is the model's own."""

    overflow: Overflow = Overflow.UNLIMITED
    gamma: Decimal | None = None
    k: int | None = None

    @property
    def name(self) -> str:
        capacity = "Unlimited" if self.gamma is None else f"{self.overflow.value} {self.gamma}"
        return capacity if self.k is None else f"{capacity} k={self.k}"


class Held:
    """A model whose routers pass through a `Rank`, as those of a vLLM worker do. A step is one call of the model."""

    def __init__(self, model: Any) -> None:
        from moe_serving.rank import Layer, Rank
        from moe_serving.scores import Routing

        config = model.config
        self.model, self.top_k = model, int(config.num_experts_per_tok)
        self.rank, self.version = Rank(), 0
        rule = Routing("softmax", True)  # Qwen3-MoE's, with norm_topk_prob
        for index in range(config.num_hidden_layers):
            self.rank.layers.append(Layer(index, f"moe.{index}", config.num_experts, self.top_k, rule))

    @contextlib.contextmanager
    def to(self, setting: Setting) -> Iterator[Seen]:
        """The model under `setting`. Raises KnobsRefused for what leaves a token without an expert."""
        knobs = ExpertKnobs(
            overflow=setting.overflow,
            capacity_factor_prefill=setting.gamma,
            per_token={} if setting.k is None else {"all": setting.k},
        )
        self.version += 1
        self.rank.apply(knobs, self.version)
        before = Seen.of(self.rank)
        seen = Seen()
        hooks = [self.model.register_forward_pre_hook(partial(self._begin, setting), with_kwargs=True)]
        for index, layer in enumerate(self.model.model.layers):
            hooks.append(layer.mlp.gate.register_forward_hook(partial(self._route, index, seen)))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
            self.rank.end_step(0.0)
            seen.take(Seen.of(self.rank), before)

    def _begin(self, setting: Setting, _: Any, arguments: Any, named: dict[str, Any]) -> None:
        from moe_serving.rank import PREFILL

        tokens = named["input_ids"].numel()
        k = None if setting.k is None else np.full(tokens, setting.k, np.int64)
        self.rank.begin_step(np.full(tokens, PREFILL, np.uint8), 0, k)

    def _route(self, index: int, seen: Seen, router: Any, _: Any, output: Any) -> Any:
        import torch

        logits, weights, ids = output
        layer = self.rank.layers[index]
        demand, assigned = layer.demand.clone(), layer.assigned.clone()
        weights, ids = self.rank.route(index, weights, ids, logits)
        asked, held = layer.demand - demand, layer.assigned - assigned
        seen.skews.append((index, float(asked.max() / asked.float().mean())))
        seen.falls.append(float(asked.max() / held.max()))
        seen.rank_falls.append(float(asked.view(RANKS, -1).sum(1).max() / held.view(RANKS, -1).sum(1).max()))
        # The model takes no -1: an empty slot is any expert with the weight of nothing.
        return logits, weights, torch.where(ids < 0, 0, ids)


@dataclass
class Seen:
    """What capacity did, over all steps and layers.

    `falls` and `rank_falls`: the largest load of an expert, and of a rank that owns neighbours, before over after;
    `skews`: layer, and its largest load over the mean in one step, as the router asks for it.
    """

    slots: int = 0
    dropped: int = 0
    rerouted: int = 0
    tokens: int = 0
    lost_gate_mass: float = 0.0
    falls: list[float] = field(default_factory=list)
    rank_falls: list[float] = field(default_factory=list)
    skews: list[tuple[int, float]] = field(default_factory=list)

    def skew_by_layer(self) -> list[float]:
        """Mean over steps."""
        layers = sorted({layer for layer, _ in self.skews})
        return [round(statistics.fmean(skew for at, skew in self.skews if at == layer), 3) for layer in layers]

    @staticmethod
    def of(rank: Any) -> Seen:
        """The counters of all its layers."""
        layers = rank.layers
        return Seen(
            sum(int(layer.demand.sum()) for layer in layers),
            sum(int(layer.dropped) for layer in layers),
            sum(int(layer.rerouted) for layer in layers),
            sum(int(layer.tokens) for layer in layers),
            sum(float(layer.lost_gate_mass) for layer in layers),
        )

    def take(self, now: Seen, before: Seen) -> None:
        self.slots, self.dropped = now.slots - before.slots, now.dropped - before.dropped
        self.rerouted, self.tokens = now.rerouted - before.rerouted, now.tokens - before.tokens
        self.lost_gate_mass = now.lost_gate_mass - before.lost_gate_mass


def settings(top_k: int) -> list[Setting]:
    """The grid: no capacity, γ × policy, fewer experts per token, and both together."""
    grid = [Setting()]
    grid += [Setting(policy, gamma) for policy in POLICIES for gamma in GAMMAS]
    fewer = range(top_k - 1, 0, -1)
    grid += [Setting(k=k) for k in fewer]
    return grid + [Setting(Overflow.REROUTE, Decimal("1.25"), k) for k in fewer]


@contextlib.contextmanager
def random_experts(model: Any, seed: int) -> Iterator[None]:
    """The model with the router's weights on experts drawn by lot: what it is worth to it which experts answer."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(router: Any, _: Any, output: Any) -> Any:
        logits, weights, ids = output
        drawn = torch.rand(logits.shape, generator=generator).topk(ids.shape[1], dim=1).indices
        return logits, weights, drawn

    hooks = [layer.mlp.gate.register_forward_hook(draw) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mixed(batch: Any, at_once: int) -> Any:
    """Sequences [n, length] in an order in which each step of `at_once` holds some from all over the batch."""
    steps = max(len(batch) // at_once, 1)
    return batch[[n for first in range(steps) for n in range(first, len(batch), steps)]]


def standard_error(nats: Any, before: Any) -> float:
    """Of the relative change of perplexity, from nats by sequence of the same text: sequences vary, pairs little."""
    return float((nats - before).std() / math.sqrt(len(nats)))


class Trial:
    """One trained model and the held-out text. `say` hears every figure."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        import torch

        self.made = trained_moe.trained(recipe, say)
        self.held = Held(trained_moe.load(self.made.path))
        self.text = trained_moe.held_out_batch(self.made.path, recipe)
        self.say = say
        torch.set_num_threads(1)
        self.none = self.nats(SEQUENCES_A_STEP)

    def nats(self, at_once: int) -> Any:
        return trained_moe.nats_by_sequence(self.held.model, mixed(self.text, at_once), at_once)

    def row(self, setting: Setting, at_once: int = SEQUENCES_A_STEP) -> dict[str, Any]:
        """What the model loses under `setting`, and what capacity did."""
        with self.held.to(setting) as seen:
            nats = self.nats(at_once)
        loss = float(nats.mean() - self.none.mean())
        moved = (seen.rerouted + seen.dropped) / seen.slots
        # A smaller step holds the sequences in another order.
        pairs = at_once == SEQUENCES_A_STEP
        row = {
            "perplexity": round(math.exp(nats.mean()), 5),
            "delta": round(math.expm1(loss), 5),
            "delta_standard_error": round(standard_error(nats, self.none), 5) if pairs else None,
            "dropped": round(seen.dropped / seen.slots, 5),
            "rerouted": round(seen.rerouted / seen.slots, 5),
            "nats_over_share_moved": round(loss / moved, 5) if moved else None,
            "lost_gate_mass": round(seen.lost_gate_mass / seen.tokens, 5),
            "max_over_mean_by_layer": seen.skew_by_layer(),
            "expert_load_fall": round(statistics.median(seen.falls), 3),
            "rank_load_fall": round(statistics.median(seen.rank_falls), 3),
        }
        self.say(f"{setting.name}, {at_once} sequences a step: {row}")
        return row

    def random(self) -> dict[str, Any]:
        with random_experts(self.held.model, 1):
            nats = self.nats(SEQUENCES_A_STEP)
        loss = float(nats.mean() - self.none.mean())
        return {"perplexity": round(math.exp(nats.mean()), 5), "delta": round(math.expm1(loss), 5)}


def measure(recipe: Recipe, say: Callable[[str], None], seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Train (or find) the models and try them on held-out text. `ppl_delta` is the worst of all seeds."""
    first = Trial(replace(recipe, seed=seeds[0]), say)
    rows = {setting.name: first.row(setting) for setting in settings(recipe.k)}
    sizes = [at_once for at_once in STEPS_TRIED if at_once <= len(first.text)]
    aim = Setting(Overflow.REROUTE, Decimal("1.25"))
    by_tokens = {at_once * recipe.sequence: first.row(aim, at_once) for at_once in sizes}
    by_seed = {}
    for seed in seeds:
        trial = first if seed == seeds[0] else Trial(replace(recipe, seed=seed), say)
        asked = [Setting(), *(Setting(Overflow.REROUTE, gamma) for gamma in GAMMAS)]
        by_seed[seed] = {
            **{setting.name: rows[setting.name] if trial is first else trial.row(setting) for setting in asked},
            "experts by lot": trial.random(),
            "training": trial.made.figures,
        }
        say(f"seed {seed}, experts by lot: {by_seed[seed]['experts by lot']}")
    return {
        "ppl_delta": max(found[aim.name]["delta"] for found in by_seed.values()),
        "ppl_delta_by_seed": {seed: found[aim.name]["delta"] for seed, found in by_seed.items()},
        "perplexity": rows,
        "perplexity_by_tokens_a_step": by_tokens,
        "perplexity_by_seed": by_seed,
        "held_out_tokens": int(first.text[:, 1:].numel()),
        "tokens_a_step": SEQUENCES_A_STEP * recipe.sequence,
        "training": first.made.figures,
    }


def picture(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Perplexity over γ, a line for each policy, as SVG."""
    colours = {Overflow.REROUTE: "#1f6feb", Overflow.DROP: "#d1242f", Overflow.EXPERT_CHOICE: "#1a7f37"}
    width, height, left, top, right, bottom = 640, 400, 70, 40, 150, 50
    none = rows["Unlimited"]["perplexity"]
    points = {policy: [rows[Setting(policy, g).name]["perplexity"] for g in GAMMAS] for policy in POLICIES}
    low, high = none, max(max(values) for values in points.values())
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)

    def x(gamma: Decimal) -> float:
        return left + float((gamma - GAMMAS[0]) / (GAMMAS[-1] - GAMMAS[0])) * (width - left - right)

    def y(value: float) -> float:
        return float(top + (high - value) / (high - low) * (height - top - bottom))

    def text(at_x: float, at_y: float, what: str, more: str = "") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" {more}>{what}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(left, 22, "Held-out perplexity of the small trained MoE against capacity factor", 'font-weight="bold"'),
        text((left + width - right) / 2, height - 12, "capacity factor γ", 'text-anchor="middle"'),
    ]
    for n in range(5):
        value = low + (high - low) * n / 4
        parts.append(f'<path d="M{left} {y(value):.1f}H{width - right}" stroke="#d0d7de"/>')
        parts.append(text(left - 8, y(value) + 4, f"{value:.3f}", 'text-anchor="end"'))
    parts += [text(x(gamma), height - bottom + 18, str(gamma), 'text-anchor="middle"') for gamma in GAMMAS]
    parts.append(f'<path d="M{left} {y(none):.1f}H{width - right}" stroke="#57606a" stroke-dasharray="5 4"/>')
    labels = [(y(none), "no capacity", "#57606a")]
    for policy, values in points.items():
        line = " ".join(f"{x(gamma):.1f},{y(value):.1f}" for gamma, value in zip(GAMMAS, values, strict=True))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[policy]}" stroke-width="2"/>')
        labels.append((y(values[-1]), policy.value, colours[policy]))
    at = 0.0
    for wanted, name, colour in sorted(labels):
        at = max(wanted + 4, at + 15)  # labels that would lie on one another step aside
        parts.append(text(width - right + 8, at, name, f'fill="{colour}"'))
    file.write_text("\n".join([*parts, "</svg>", ""]))
