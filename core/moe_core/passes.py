"""Who may read the state of a gateway or a board: who shows a pass, signed by a key whose public half is trusted there.

A pass names one deployment and ends after ten minutes, so that one that was seen on the wire opens little, and not for
long.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

from pydantic import ValidationError

from moe_core.clock import Clock
from moe_core.signing import CommandInvalid, SignatureRefused, Signer, Verifier
from moe_core.wire import ReadPass, Signed

PASS_S = 600.0
LONGEST_S = 900.0
"""A receiver takes no pass that ends later than this from now: clocks may differ by five minutes."""
MAX_CHARS = 4096
REMEMBERED = 8
"""Passes that are known to be good: a tuner shows the same one each second."""


class Passes:
    """Passes by one key. Each is shown until half of its time has gone."""

    def __init__(self, signer: Signer, clock: Clock) -> None:
        self.signer, self._clock = signer, clock
        self._made: dict[str, tuple[float, str]] = {}

    def token(self, deployment: str) -> str:
        """For the header `Authorization: Bearer …` of a question about that deployment (namespace/name)."""
        now_s = self._clock.time()
        until_s, token = self._made.get(deployment, (0.0, ""))
        if not PASS_S / 2 < until_s - now_s <= PASS_S:
            self._made = {name: made for name, made in self._made.items() if made[0] > now_s}
            until_s = now_s + PASS_S
            signed = self.signer.sign(ReadPass(deployment=deployment, until_s=until_s))
            token = base64.urlsafe_b64encode(signed.model_dump_json(by_alias=True).encode()).decode()
            self._made[deployment] = (until_s, token)
        return token


class Door:
    """Lets in who shows a pass for `deployment`. With no trusted key it lets in nobody."""

    def __init__(self, deployment: str, verifier: Callable[[], Verifier], clock: Clock) -> None:
        """`verifier`: of the keys that are trusted now."""
        self._deployment, self._verifier, self._clock = deployment, verifier, clock
        self._known: dict[str, float] = {}
        self._known_by: Verifier | None = None

    def admits(self, authorization: str) -> bool:
        """Whether this value of the header `Authorization` is a pass that holds here and now."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(token) <= MAX_CHARS:
            return False
        verifier, now_s = self._verifier(), self._clock.time()
        if verifier is not self._known_by:
            self._known, self._known_by = {}, verifier
        until_s = self._known.get(token)
        if until_s is None:
            until_s = self._end_of(token, verifier)
        if until_s is None or not now_s < until_s <= now_s + LONGEST_S:
            return False
        self._known[token] = until_s
        if len(self._known) > REMEMBERED:
            del self._known[min(self._known, key=self._known.__getitem__)]
        return True

    def _end_of(self, token: str, verifier: Verifier) -> float | None:
        try:
            envelope = Signed.model_validate_json(base64.b64decode(token, altchars=b"-_", validate=True))
            found = verifier.open(envelope, ReadPass)
        except (binascii.Error, ValueError, ValidationError, SignatureRefused, CommandInvalid):
            return None
        return found.until_s if found.deployment == self._deployment else None
