"""Makes the key pairs that sign weights and knobs, once for an installation, as a Secret of the operator's namespace.

    python -m moe_operator.keys --namespace moestack-system --secret moestack-keys

A Secret of that name stays as it is: a second run, or an upgrade, changes no key. The private keys are never printed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_core.signing import Signer
from moe_kube.access import AccessError
from moe_kube.api import Api
from moe_kube.connect import connect
from moe_kube.errors import ApiError, Conflict
from moe_kube.objects import SECRET, Ref

SIGNERS = ("operator", "tuner")
"""Who signs: the operator weights, the tuner knobs. Each has `NAME.key`, its private key, and `NAME.pub`."""


async def ensure(api: Api, namespace: str, name: str) -> bool:
    """Make the Secret unless there is one; True where it was made. Raises ApiError."""
    data: dict[str, str] = {}
    for signer in SIGNERS:
        made = Signer.generate()
        data |= {f"{signer}.key": made.private_pem(), f"{signer}.pub": made.public_pem()}
    body = {
        "apiVersion": SECRET.api_version,
        "kind": SECRET.kind,
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/name": "moestack", "app.kubernetes.io/component": "keys"},
        },
        "type": "Opaque",
        "immutable": True,
        "stringData": data,
    }
    try:
        await api.create(Ref(SECRET, namespace, name), body)
    except Conflict:
        return False
    return True


async def run(namespace: str, name: str, kubeconfig: Path | None) -> str:
    async with await connect(kubeconfig) as api:
        made = await ensure(api, namespace, name)
    return f"Secret {namespace}/{name}: {'made' if made else 'is there, left as it is'}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m moe_operator.keys", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--namespace", required=True, help="the operator's own")
    made.add_argument("--secret", required=True, metavar="NAME")
    made.add_argument("--kubeconfig", type=Path, help="by default the pod's service account")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    try:
        print(asyncio.run(run(chosen.namespace, chosen.secret, chosen.kubeconfig)))  # noqa: T201
    except (AccessError, ApiError) as error:
        print(f"keys: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
