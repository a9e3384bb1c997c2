"""`python -m moe_operator` of a later version: its renderer has a new number and makes something else."""

from __future__ import annotations

import sys
from typing import Any

from moe_operator.render import objects

VERSION = "2"
MARK = "example.com/rendered-by"

if __name__ == "__main__":
    objects.RENDERER_VERSION = VERSION
    objects.rendered.__kwdefaults__["renderer"] = VERSION
    from moe_operator.render import cluster

    older = cluster.service_spec

    def newer(engine: Any) -> Any:
        spec = older(engine)
        for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
            group["template"]["metadata"].setdefault("annotations", {})[MARK] = VERSION
        return spec

    cluster.service_spec = newer
    from moe_operator.__main__ import main

    sys.exit(main())
