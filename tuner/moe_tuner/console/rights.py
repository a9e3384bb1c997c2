"""Who may do what on the console: tokens, the cookies they are changed for, and what a browser says of a request. Pure.

A token never travels but once: a sign-in changes it for a cookie that holds a right, an end and a MAC under that token.
So nothing is kept here, a restart signs nobody out, and another token signs everybody out.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from urllib.parse import urlsplit

SHORTEST_TOKEN = 32
READ_S, OPERATE_S = 12 * 3600, 15 * 60
"""A sign-in lasts so long; the right to change anything ends soon after it was asked for."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
MARK = "X-Moestack-Console"
"""A header that a form, a picture or a script of another origin cannot send along unasked."""


class Right(IntEnum):
    """Each holds the ones before it."""

    NONE = 0
    READ = 1
    OPERATE = 2


LASTS_S = {Right.READ: READ_S, Right.OPERATE: OPERATE_S}


class TokenRefused(ValueError):
    """A token that nobody should trust in; the message names the remedy, never the token."""


@dataclass(frozen=True)
class Tokens:
    """The secrets. `operate` None: nobody has that right here."""

    read: str = field(repr=False)
    operate: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, token in (("readTokenFile", self.read), ("operateTokenFile", self.operate)):
            if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
                raise TokenRefused(f"console.{name}: needs at least {SHORTEST_TOKEN} printable characters")
        if self.operate is not None and hmac.compare_digest(self.read, self.operate):
            raise TokenRefused("console.operateTokenFile: holds the token of readTokenFile; give it its own")

    def of_token(self, token: str) -> Right:
        """The right of a token."""
        given = token.encode("utf-8", "replace")
        if self.operate is not None and hmac.compare_digest(given, self.operate.encode()):
            return Right.OPERATE
        return Right.READ if hmac.compare_digest(given, self.read.encode()) else Right.NONE

    def cookie(self, right: Right, now_s: float) -> str:
        """What a browser keeps in place of a token."""
        until = int(now_s + LASTS_S[right])
        return f"{right.name.lower()}.{until}.{self._mac(right, until)}"

    def of_cookie(self, right: Right, cookie: str, now_s: float) -> Right:
        """`right` where the cookie grants it, else none."""
        name, _, rest = cookie.partition(".")
        text, _, mac = rest.partition(".")
        if name != right.name.lower() or not (text.isascii() and text.isdecimal() and len(text) <= 12):
            return Right.NONE
        if self._secret(right) is None or not hmac.compare_digest(mac.encode(), self._mac(right, int(text)).encode()):
            return Right.NONE
        return right if int(text) > now_s else Right.NONE

    def _secret(self, right: Right) -> str | None:
        return self.operate if right is Right.OPERATE else self.read

    def _mac(self, right: Right, until: int) -> str:
        secret = self._secret(right) or ""
        return hmac.new(secret.encode(), f"console {right.name} {until}".encode(), hashlib.sha256).hexdigest()


def host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        name, _ = parts.hostname, parts.port
    except ValueError:
        return None
    return name if name and parts.netloc == host and "@" not in host else None


def known_host(host: str, others: frozenset[str]) -> bool:
    """Whether a request was meant for us. A page elsewhere whose name is made to point here still sends its own."""
    name = host_name(host)
    return name is not None and (name in LOOPBACK or name in others)


def own_page(headers: Mapping[str, str], scheme_hosts: frozenset[str]) -> bool:
    """Whether a request that changes something comes from a page of ours, or from no browser at all."""
    if headers.get(MARK) != "1":
        return False
    origin = headers.get("Origin")
    if origin is not None and origin not in scheme_hosts:
        return False
    return headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")
