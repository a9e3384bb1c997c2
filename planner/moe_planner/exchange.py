"""What ranks send each other for a token, and over which link: the seconds of all-reduce and all-to-all."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_planner.catalog import Accelerator, ModelFacts
from moe_planner.weights import Layout

ACTIVATION_BYTES = 2  # BF16 residuals
DISPATCH_BYTES = 1  # DeepEP and its like dispatch in FP8 and combine in BF16 (DeepSeek-V3 paper, section 3.2)


@dataclass(frozen=True, slots=True)
class Link:
    """What joins the ranks of a group. `bytes_s`: one GPU, one direction."""

    name: str  # "nvlink", "pcie", "nic" or "none"
    bytes_s: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one GPU sends, of one token of its data rank, through all layers of its stage.

    `reduce`: all-reduce between tensor ranks; `route`: dispatch and combine between expert ranks; `stage`: to the next.
    `crossing`: those beside them that leave the NVLink domain.
    """

    reduce: float
    route: float
    stage: float
    crossing: float
    collectives: int  # calls in a forward pass

    @property
    def inside(self) -> float:
        """Bytes over the link inside a domain."""
        return self.reduce + self.route + self.stage

    @property
    def total(self) -> float:
        return self.inside + self.crossing


def link(accelerator: Accelerator, group: int) -> Link | str:
    """What joins a group of `group` neighbours inside a domain, or the figure that is not known."""
    if group <= 1:
        return Link("none", math.inf)
    if accelerator.nvlink_bytes_s is not None:
        return Link("nvlink", accelerator.nvlink_bytes_s)
    if accelerator.pcie_bytes_s is not None:
        return Link("pcie", accelerator.pcie_bytes_s)
    return "nvlink_gb_s"


def network(accelerator: Accelerator, group: int) -> Link | str:
    """What joins domains where a group is larger than one, or the figure that is not known."""
    if group <= accelerator.domain_gpus:
        return Link("none", math.inf)
    if accelerator.nic_bytes_s is not None:
        return Link("nic", accelerator.nic_bytes_s)
    return "nic_gb_s"


def remote_ranks(topk: int, ranks: int) -> float:
    """Expected ranks other than its own that a token's `topk` experts lie on, each as likely as another."""
    if ranks <= 1:
        return 0.0
    return (ranks - 1) * (1.0 - (1.0 - 1.0 / ranks) ** topk)


def traffic(model: ModelFacts, layout: Layout, domain: int) -> Traffic:
    """Bytes and calls of a layout whose NVLink domains have `domain` GPUs.

    Tensor ranks: a ring all-reduce sends 2·(t − 1)/t of the hidden state, after attention and after the experts. Data
    ranks: with expert parallelism each token goes once to every rank that has one of its experts and comes back, and
    to another domain once for all its ranks there (DeepSeek-V3 paper, section 3.2.2); without, tokens are gathered by
    all ranks, and sums scattered back. An all-reduce across domains crosses once for all GPUs of a domain.
    """
    t, d, ranks = layout.tensor, layout.data, layout.tensor * layout.data
    layers = math.ceil(model.layers / layout.pipeline)
    sparse = layers * model.moe_layers / model.layers
    hidden = model.hidden
    ring = 2.0 * (t - 1) / t * hidden * ACTIVATION_BYTES
    domains = math.ceil(ranks / domain)
    reduces = 2.0 * layers if d == 1 else 2.0 * layers - sparse
    calls = round(reduces) if t > 1 else 0
    route = crossing = 0.0
    if t > domain:
        crossing += reduces * 2.0 * (1.0 - domain / t) * hidden * ACTIVATION_BYTES / domain
    if d > 1:
        calls += round(2 * sparse)
        pair = sparse * hidden / t  # tensor ranks of a data rank share its tokens out before they send them
        if layout.expert > 1:
            both = DISPATCH_BYTES + ACTIVATION_BYTES
            route = pair * both * remote_ranks(model.topk, min(ranks, domain)) * (1 if domains == 1 else 1 / domains)
            crossing += pair * both * remote_ranks(model.topk, domains)
        else:
            route = pair * (d - 1) * 2 * ACTIVATION_BYTES
            if domains > 1:
                crossing += route * (1.0 - 1.0 / domains) / min(d, domain)
    stage = hidden * ACTIVATION_BYTES / t if layout.pipeline > 1 else 0.0
    return Traffic(reduces * ring, route, stage, crossing, calls)
