"""The step of a local stack that makes a family's tiny checkpoint, once, in the user's cache."""

from __future__ import annotations

import json
import sys

from moe_serving.tiny import cached_checkpoint


def main() -> None:
    """Arguments: the family. Prints where its checkpoint lies."""
    print(json.dumps({"ready": True, "path": str(cached_checkpoint(sys.argv[1]))}), flush=True)


if __name__ == "__main__":
    main()
