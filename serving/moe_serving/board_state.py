"""What the board knows, and its rules: pure, so that they are tested without Ray and without sockets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe_core.signing import Verifier
from moe_core.wire import Ack, Knobs, ReplicaDigest, Signed

SILENT_S = 10.0
"""A replica that has not been heard for this long is no longer expected to acknowledge."""


class OlderVersion(Exception):
    """A command with a version at or below the one in force, and another content."""

    def __init__(self, current: int) -> None:
        super().__init__(f"version {current} is in force already; send a higher one")
        self.current = current


class WrongDeployment(Exception):
    """A command for another MoEDeployment."""


@dataclass
class _Replica:
    ranks: int
    heard_s: float
    newest: tuple[float, int] = (0.0, 0)  # start and number of the newest digest
    digest: ReplicaDigest | None = None
    acks: dict[int, dict[int, Ack]] = field(default_factory=dict)


class BoardState:
    """Registers replicas, keeps the newest knobs, collects acknowledgements and digests. Decides nothing."""

    def __init__(self, deployment: str, revision: str, verifier: Verifier) -> None:
        self.deployment = deployment
        self.revision = revision
        self._verifier = verifier
        self._replicas: dict[str, _Replica] = {}
        self.envelope: Signed | None = None
        self.version = 0

    def offer(self, envelope: Signed) -> bool:
        """Take knobs. True if they are new, False if these very ones are in force.

        Raises SignatureRefused or CommandInvalid (moe_core.signing), WrongDeployment, or OlderVersion.
        """
        knobs = self._verifier.open(envelope, Knobs)
        if knobs.deployment != self.deployment:
            raise WrongDeployment(f"these knobs are for {knobs.deployment}; this is the board of {self.deployment}")
        if knobs.version <= self.version:
            if self.envelope is not None and envelope.payload == self.envelope.payload:
                return False
            raise OlderVersion(self.version)
        self.envelope = envelope
        self.version = knobs.version
        return True

    def newer_than(self, version: int) -> Signed | None:
        """The knobs in force, if they are newer than `version`."""
        return self.envelope if self.version > version else None

    def register(self, replica: str, ranks: int, now_s: float, has: Signed | None) -> None:
        """A replica is there. What it has in force is adopted if it is newer: so a board that died forgets nothing."""
        before = self._replicas.get(replica)
        self._replicas[replica] = _Replica(ranks, now_s, (0.0, 0) if before is None else before.newest)
        if has is not None:
            knobs = self._verifier.open(has, Knobs)
            if knobs.version > self.version and knobs.deployment == self.deployment:
                self.envelope, self.version = has, knobs.version

    def known(self, replica: str) -> bool:
        return replica in self._replicas

    def report(self, digest: ReplicaDigest, now_s: float) -> None:
        """A replica's digest. One that is not registered is ignored: it is told to register. So is one that was
        overtaken by a newer one: counters would go back."""
        replica = self._replicas.get(digest.replica)
        if replica is None:
            return
        replica.heard_s = now_s
        if (digest.started_at_s, digest.seq) > replica.newest:
            replica.newest = (digest.started_at_s, digest.seq)
            replica.digest = digest

    def acknowledge(self, acks: list[Ack], asked: int) -> None:
        """Acks of one replica for the version that it was asked to apply."""
        for ack in acks:
            replica = self._replicas.get(ack.replica)
            if replica is not None:
                replica.acks.setdefault(asked, {})[ack.rank] = ack
                for old in sorted(replica.acks)[:-32]:
                    del replica.acks[old]

    def acks(self, version: int, now_s: float) -> dict[str, Any]:
        """Who acknowledged a version, and whether everyone who is expected to did so without an error."""
        expected = {
            name: replica.ranks for name, replica in self._replicas.items() if now_s - replica.heard_s <= SILENT_S
        }
        given = [ack for name in expected for ack in self._replicas[name].acks.get(version, {}).values()]
        good = {(ack.replica, ack.rank) for ack in given if ack.error is None and ack.version >= version}
        complete = bool(expected) and all(
            (name, rank) in good for name, ranks in expected.items() for rank in range(ranks)
        )
        return {
            "version": version,
            "complete": complete,
            "expected": [{"replica": name, "ranks": ranks} for name, ranks in expected.items()],
            "acks": [ack.to_json() for ack in given],
        }

    def digests(self, now_s: float) -> list[ReplicaDigest]:
        """Newest digest of each replica that is not silent."""
        return [
            replica.digest
            for replica in self._replicas.values()
            if replica.digest is not None and now_s - replica.heard_s <= SILENT_S
        ]
