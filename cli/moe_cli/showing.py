"""Passes that commands show to gateways and boards: by the stack's own key, or by one that was named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_cli.documents import KEY
from moe_cli.outcome import Problem, Refusal
from moe_core.clock import SystemClock
from moe_core.http import HttpError
from moe_core.passes import Passes
from moe_core.signing import Signer

REMEDY = "give --key FILE, the operator's or the tuner's private key, and --deployment NAMESPACE/NAME"


@dataclass(frozen=True)
class Key:
    """A key that was named for an address elsewhere, and the deployment that is asked about."""

    file: Path | None = None
    deployment: str | None = None

    def token(self) -> str | None:
        """None where no key was named. Raises Refusal."""
        if self.file is None:
            return None
        if self.deployment is None:
            message = "a pass is for one deployment, and none is named"
            raise Refusal(Problem(field="--deployment", message=message, remedy="name it: NAMESPACE/NAME"))
        try:
            return _signed(self.file, self.deployment)
        except (OSError, ValueError):
            message = f"{self.file} is no Ed25519 private key in PEM that can be read"
            raise Refusal(Problem(field="--key", message=message, remedy="name the file of such a key")) from None


NO_KEY = Key()


def of_stack(folder: Path, deployment: str) -> str | None:
    """By the key of the stack that keeps its files there; None where there is none."""
    try:
        return _signed(folder / KEY, deployment)
    except (OSError, ValueError):
        return None


def wanted(error: HttpError, otherwise: str) -> str:
    """What to do about an answer that was none."""
    return REMEDY if error.status == 401 else otherwise


def _signed(file: Path, deployment: str) -> str:
    return Passes(Signer.load(file), SystemClock()).token(deployment)
