"""Stands in for the step that makes a tiny checkpoint."""

import json
import sys

if __name__ == "__main__":
    sys.stdout.write(json.dumps({"ready": True, "path": "/fake/checkpoint"}) + "\n")
