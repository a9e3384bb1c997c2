"""What expert capacity costs, what it wins, and what it does to a model's quality.

    python -m benchmarks.capacity [--quick] [--intermediate 1536] [--rounds 3]

`benchmarks.capacity_layer` measures an MoE layer of real shape on two simulated ranks. Needs vLLM for CPU.
"""

from __future__ import annotations

import argparse
import json
import os
from decimal import Decimal

# One thread: a rank of a CPU deployment owns one core, and times are those of one thread. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks import capacity_layer
from benchmarks.capacity_layer import Shape

GAMMAS = (Decimal("1"), Decimal("1.1"), Decimal("1.25"), Decimal("1.5"))


def main(arguments: list[str] | None = None) -> None:
    """Measure; the last line is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and one round: shows that it works")
    parser.add_argument("--rounds", type=int, default=3, help="of all settings in turn")
    parser.add_argument("--tokens", type=int, default=4096, help="of a prefill step")
    parser.add_argument("--intermediate", type=int, default=1536, help="width of an expert")
    options = parser.parse_args(arguments)
    if options.quick:
        shape = Shape(tokens=256, hidden=256, intermediate=64, experts=32, k=4)
        layer = capacity_layer.measure(shape, GAMMAS[:3], 1, (16,))
    else:
        shape = Shape(tokens=options.tokens, intermediate=options.intermediate)
        layer = capacity_layer.measure(shape, GAMMAS, options.rounds, (32, 256))
    print(json.dumps(layer))


if __name__ == "__main__":
    main()
