"""Ranks that route the same tokens switch knobs together or not at all, whatever each was told."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_serving.agreement import Proposal, objection


def proposal(rank: int, version: int = 4, in_force: int = 3, knobs: str = "{}", error: str | None = None) -> Proposal:
    return Proposal(rank, version, knobs, in_force, error)


@pytest.mark.parametrize(
    ("proposals", "words"),
    [
        ([proposal(0)], None),
        ([proposal(0), proposal(1)], None),
        ([proposal(0, version=3), proposal(1, version=3)], None),
        ([proposal(0), proposal(1, version=5)], "told different knobs (version 4 at rank 0, version 5 at rank 1)"),
        ([proposal(0), proposal(1, knobs='{"overflow": "Drop"}')], "told different knobs"),
        ([proposal(0), proposal(1, error="layer moe.7 bypasses the router")], "layer moe.7 bypasses the router"),
        ([proposal(0, in_force=2), proposal(1)], None),
        ([proposal(0, in_force=2), proposal(1, in_force=4)], "a version above 4 brings them together"),
        ([proposal(0, version=0, in_force=0), proposal(1, version=0, in_force=0)], None),
    ],
    ids=[
        "one rank", "two alike", "sent again", "two versions", "one version, two contents", "one cannot follow",
        "a newer version mends a drift", "a drift that it would not mend", "as booted",
    ],
)  # fmt: skip
def test_all_switch_or_none(proposals: list[Proposal], words: str | None) -> None:
    answers = {objection(order) for order in itertools.permutations(proposals)}
    assert len(answers) == 1, "ranks that see them in another order would conclude otherwise"
    answer = answers.pop()
    assert (answer is None) == (words is None)
    assert words is None or words in str(answer)


RANK = """
import json, sys, torch.distributed as dist
from moe_core.wire import ExpertKnobs
from moe_serving.agreement import Proposal, everyone, objection
from moe_serving.rank import Layer, Rank
from moe_serving.scores import Routing

number, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
rank = Rank()
rank.layers.append(Layer(0, "moe.0", 8, 2, Routing("softmax", True)))
seen = []
for told in ((1, 1), (2, 3), (3, 3), (2, 2)):
    version = told[number]
    knobs = ExpertKnobs(overflow="Reroute", capacity_factor_prefill=str(1 + version))
    mine = Proposal(number, version, knobs.model_dump_json(), rank.knobs_version)
    error = objection(everyone(mine, None, 2))
    if error is None:
        rank.apply(knobs, version)
    seen.append((rank.knobs_version, rank.layers[0].gamma_micro.tolist(), error is None))
print(json.dumps(seen))
dist.destroy_process_group()
"""


def test_real_ranks_that_are_told_different_versions_stay_alike(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(number), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    # Told 1 and 1; 2 and 3: nobody switches; 3 and 3; 2 again, which is older and changes nothing.
    assert first == [
        [1, [2_000_000, 0], True],
        [1, [2_000_000, 0], False],
        [3, [4_000_000, 0], True],
        [3, [4_000_000, 0], True],
    ]
