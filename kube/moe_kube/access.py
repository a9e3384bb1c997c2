"""Where the API server is and who we are, kept fresh: tokens and certificates change while a process runs."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from moe_core.clock import Clock
from moe_core.log import get_log

FRESH_S = 60.0
"""Credentials are looked at again after this long: kubelet writes a new token well before the old one ends."""
RETRY_S = 10.0
"""Wait after credentials that could not be read, and the least time between two that the server refused."""


class AccessError(Exception):
    """The API server's address or our credentials cannot be told. The message names the file and the remedy."""


@dataclass(frozen=True)
class Access:
    """One state of it. `authorization` is the whole value of the header, empty without one."""

    host: str
    authorization: str = field(default="", repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    verify: bool = True
    server_name: str | None = None
    proxy: str | None = field(default=None, repr=False)


Load = Callable[[bool], Awaitable[Access]]
"""Reads the access anew; True: the server has just refused it, so nothing remembered may be used."""


class Credentials:
    """The access in force, read again when it is old or refused. What cannot be read leaves the last one in force."""

    def __init__(self, access: Access, load: Load, clock: Clock) -> None:
        self.tls: ssl.SSLContext | bool = True
        """For new connections. Another object when certificates have changed: open connections keep the old ones."""
        self._access = access
        self._load = load
        self._clock = clock
        self._read_again_at = clock.monotonic() + FRESH_S
        self._refused = False
        self._forced_at = float("-inf")
        self._lock = asyncio.Lock()
        self._files: tuple[tuple[str, int], ...] = ()
        self._log = get_log("kube.access")
        self._trust(access)

    async def current(self) -> Access:
        """The access to use for the next call."""
        if not self._due():
            return self._access
        async with self._lock:
            if self._due():
                await self._read()
            return self._access

    def refused(self) -> None:
        """The server answered 401: read everything anew before the next call, but not more often than each 10 s."""
        if self._clock.monotonic() - self._forced_at >= RETRY_S:
            self._refused = True

    def _due(self) -> bool:
        return self._refused or self._clock.monotonic() >= self._read_again_at

    async def _read(self) -> None:
        anew, self._refused = self._refused, False
        if anew:
            self._forced_at = self._clock.monotonic()
        try:
            access = await self._load(anew)
            self._trust(access)
        except (AccessError, OSError, ssl.SSLError) as error:
            self._log.warning("credentials could not be read again; the last ones stay in use", reason=str(error))
            self._read_again_at = self._clock.monotonic() + RETRY_S
            return
        self._access = access
        self._read_again_at = self._clock.monotonic() + FRESH_S

    def _trust(self, access: Access) -> None:
        """Take the certificates into use, if their files have changed."""
        paths = [path for path in (access.ca_file, access.cert_file, access.key_file) if path]
        files = tuple((path, Path(path).stat().st_mtime_ns) for path in paths)
        if access.host.startswith("https:") and (files != self._files or self.tls is True):
            self.tls = _context(access)
            self._files = files


def _context(access: Access) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=access.ca_file)
    # A cluster's own authority often lacks the key identifiers that Python 3.13 asks for and Go does not.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if access.cert_file:
        context.load_cert_chain(access.cert_file, access.key_file)
    if not access.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
