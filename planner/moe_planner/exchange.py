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
    """

    reduce: float
    route: float
    stage: float
    collectives: int  # calls in a forward pass

    @property
    def total(self) -> float:
        return self.reduce + self.route + self.stage


def link(accelerator: Accelerator, group: int) -> Link | str:
    """The slowest link that a group of `group` neighbours crosses, or the figure that is not known."""
    if group <= 1:
        return Link("none", math.inf)
    if group > accelerator.domain_gpus:
        if accelerator.nic_bytes_s is None:
            return "nic_bytes_s"
        return Link("nic", accelerator.nic_bytes_s)
    if accelerator.nvlink_bytes_s is not None:
        return Link("nvlink", accelerator.nvlink_bytes_s)
    if accelerator.pcie_bytes_s is not None:
        return Link("pcie", accelerator.pcie_bytes_s)
    return "nvlink_bytes_s"


def crossing(accelerator: Accelerator, group: int) -> float:
    """Share of a rank's peers in a group that lie outside its own NVLink domain."""
    if group <= 1:
        return 0.0
    return max(0.0, (group - accelerator.domain_gpus) / (group - 1))


def remote_ranks(topk: int, ranks: int) -> float:
    """Expected ranks other than its own that a token's `topk` experts lie on, each as likely as another."""
    if ranks <= 1:
        return 0.0
    return (ranks - 1) * (1.0 - (1.0 - 1.0 / ranks) ** topk)


def traffic(model: ModelFacts, layout: Layout) -> Traffic:
    """Bytes and calls of a layout.

    Tensor ranks: a ring all-reduce sends 2·(t − 1)/t of the hidden state, after attention and after the experts. Data
    ranks: with expert parallelism each token goes once to every rank that has one of its experts and comes back;
    without, tokens are gathered by all ranks, and sums scattered back.
    """
    t, d = layout.tensor, layout.data
    layers = math.ceil(model.layers / layout.pipeline)
    sparse = layers * model.moe_layers / model.layers
    hidden = model.hidden
    ring = 2.0 * (t - 1) / t * hidden * ACTIVATION_BYTES
    if d == 1:
        reduce, route = 2.0 * layers * ring, 0.0
        calls = 2 * layers if t > 1 else 0
    elif layout.expert > 1:
        reduce = (2.0 * layers - sparse) * ring
        # Tensor ranks of a data rank share its tokens out before they send them.
        route = sparse * remote_ranks(model.topk, t * d) * hidden * (DISPATCH_BYTES + ACTIVATION_BYTES) / t
        calls = round(2 * sparse) + (2 * layers - round(sparse) if t > 1 else 0)
    else:
        reduce = (2.0 * layers - sparse) * ring
        route = sparse * (d - 1) * hidden * 2 * ACTIVATION_BYTES / t
        calls = round(2 * sparse) + (2 * layers - round(sparse) if t > 1 else 0)
    stage = hidden * ACTIVATION_BYTES / t if layout.pipeline > 1 else 0.0
    return Traffic(reduce, route, stage, calls)
