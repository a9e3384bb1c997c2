"""What a replica's devices can do at best, from the planner's catalog. What it does not know is not invented."""

from __future__ import annotations

from moe_planner.catalog import Catalog, packaged
from moe_serving.utilisation import Peaks


def peaks_of(accelerator: str, devices: int, weight_bytes: int, catalog: Catalog | None = None) -> Peaks:
    """Peak bandwidth, and dense arithmetic on weights of that many bytes, of all devices together.

    None of either where the catalog has no such accelerator or no published figure: a CPU is in no catalog.
    """
    known = (catalog or packaged()).accelerators.get(accelerator)
    if known is None:
        return Peaks()
    flops = known.flops.get(weight_bytes)
    return Peaks(
        bytes_s=None if known.bandwidth_bytes_s is None else known.bandwidth_bytes_s * devices,
        flops_s=None if flops is None else flops * devices,
    )
