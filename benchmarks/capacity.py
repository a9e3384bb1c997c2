"""What expert capacity costs, what it wins, and what it does to a model's quality.

    python -m benchmarks.capacity [--quick] [--only layer | quality] [--rounds 3] [--picture FILE.svg]
    python -m benchmarks.capacity --device cuda [--quick] [--rounds 3]

`benchmarks.capacity_layer` measures an MoE layer of real shape on two simulated ranks, `benchmarks.capacity_quality`
the perplexity of the small models that `benchmarks.trained_moe` trains, on their first use, for some minutes each.
Needs vLLM for CPU. With `--device` only `benchmarks.capacity_device` runs: the hook alone, there, without vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

# One thread: a rank of a CPU deployment owns one core, and times are those of one thread. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks import capacity_device, capacity_layer, capacity_quality
from benchmarks.capacity_layer import Shape, say
from benchmarks.capacity_quality import SEEDS
from benchmarks.trained_moe import QUICK, Recipe

GAMMAS = (Decimal("1"), Decimal("1.1"), Decimal("1.25"))
QUICK_SHAPE = Shape(tokens=256, hidden=256, intermediate=64, experts=32, k=4)


def main(arguments: list[str] | None = None) -> None:
    """Measure; the last line is the result as JSON. Keys of a part that was left out are null."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, one round: shows that it works")
    parser.add_argument("--only", choices=["layer", "quality"], help="one part")
    parser.add_argument("--rounds", type=int, default=3, help="of all settings in turn")
    parser.add_argument("--tokens", type=int, default=4096, help="of a prefill step")
    parser.add_argument("--intermediate", type=int, default=1536, help="width of an expert")
    parser.add_argument("--picture", type=Path, help="draw perplexity over γ as SVG there")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="time the hook alone on this device")
    options = parser.parse_args(arguments)
    if options.device is not None:
        tokens, rounds = ((16,), 1) if options.quick else ((1, 32, 256, 4096), 10 * options.rounds)
        print(json.dumps(capacity_device.measure(options.device, tokens, rounds)))
        return
    keys = ("hook_overhead_count", "hook_overhead_reroute", "layer_speedup_over_bound", "gemm_share", "ppl_delta")
    found: dict[str, Any] = dict.fromkeys(keys)
    if options.only != "quality":
        if options.quick:
            found |= capacity_layer.measure(QUICK_SHAPE, GAMMAS, 1, (16,))
        else:
            shape = Shape(tokens=options.tokens, intermediate=options.intermediate)
            found |= capacity_layer.measure(shape, GAMMAS, options.rounds, (32, 256))
    if options.only != "layer":
        recipe, seeds = (QUICK, SEEDS[:1]) if options.quick else (Recipe(), SEEDS)
        quality = capacity_quality.measure(recipe, say, seeds)
        found |= quality
        if options.picture is not None:
            capacity_quality.picture(quality["perplexity"], options.picture)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
