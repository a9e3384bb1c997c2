"""What the CPU's lent collectives do on a real gloo group: run as two processes, `python gloo_ranks.py RANK FILE`."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist

from moe_serving.mends import all_gatherv, reduce_scatterv

SIZES = [3, 1]


def rows(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a rank, all different: 10, 11, 12 of rank 0 and 20 of rank 1, each with its negative beside it."""
    column = torch.arange(SIZES[rank]) + 10 * (rank + 1)
    return torch.stack([column, -column], dim=1).to(dtype)


def main(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    me = SimpleNamespace(world_size=2, rank_in_group=rank, device_group=dist.group.WORLD)
    kinds = (torch.float32, torch.bfloat16, torch.int32, torch.int64)
    lists = all_gatherv(me, [rows(rank, kind) for kind in kinds], 0, SIZES)
    assert [one.dtype for one in lists] == list(kinds)
    summand = torch.arange(8, dtype=torch.bfloat16).view(4, 2) * (rank + 1)
    found = {
        "gathered": [one.float().tolist() for one in lists],
        "even": all_gatherv(me, rows(0, torch.float32) + rank).tolist(),
        "one of a rank": all_gatherv(me, torch.tensor([float(rank)])).tolist(),
        "reduced": reduce_scatterv(me, summand, 0, SIZES).float().tolist(),
        "reduced evenly": reduce_scatterv(me, summand, 0).float().tolist(),
        "untouched": summand.float().tolist(),
    }
    dist.destroy_process_group()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
