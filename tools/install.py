"""Writes manifests/install.yaml, for `kubectl apply -f`: the chart with its defaults, and the namespace it lives in.

python3 tools/install.py HELM            write it with that helm
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "moestack-system"
IMAGE = "moestack"
"""To be replaced by where your image lies: `kubectl kustomize` and `sed` both do it."""
HEADER = f"""\
# The chart with its defaults, written by tools/install.py; a test compares. Apply it once the image is where your nodes
# find it, as `{IMAGE}:0.1.0` or by another name put in its place:
#     sed 's|{IMAGE}:0.1.0|YOUR/{IMAGE}:0.1.0|' manifests/install.yaml | kubectl apply --server-side -f -
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    app.kubernetes.io/name: moestack
    pod-security.kubernetes.io/enforce: restricted
"""


def render(helm: Path) -> str:
    """The manifest. Raises CalledProcessError."""
    command = [helm, "template", "moestack", ROOT / "charts" / "moestack", "--namespace", NAMESPACE, "--skip-tests"]
    done = subprocess.run(
        [*command, "--set", f"image.repository={IMAGE}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    # Hooks are Helm's: for kubectl they are objects like others, and the operator's pods wait for the Secret.
    return HEADER + re.sub(r"\n  annotations:(\n    helm\.sh/hook[^\n]*)+", "", done.stdout)


if __name__ == "__main__":
    (ROOT / "manifests" / "install.yaml").write_text(render(Path(sys.argv[1])))
