"""Tokens of an OIDC issuer: its keys fetched, cached and rotated by their ids, signatures checked by pyjwt."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import aiohttp
import jwt
import orjson

from moe_core.clock import Clock
from moe_core.config import AuthConfig
from moe_core.http import HttpError, call_json
from moe_core.log import get_log
from moe_gateway.auth import CLOCK_SKEW_S, Principal, Unauthenticated, algorithm_allowed, tenant_of_claims

REFRESH_S = 600.0
"""The issuer is asked for its keys so often."""
UNKNOWN_KEY_S = 15.0
"""A token of an unknown key asks sooner, but no oftener than this, whatever strangers send."""
STALE_MAX_S = 24 * 3600.0
"""Keys of an issuer that cannot be reached count for so long."""
MAX_DOCUMENT_BYTES = 1 << 20
KEYS_MAX = 100
KNOWN_TOKENS_MAX = 10_000
_log = get_log("gateway.auth")


class IssuerUnreachable(Exception):
    """No key of the issuer is known, so that no token can be judged."""


class TokenJudge:
    """Judges tokens of one issuer. Fails closed: without a key of the issuer nobody gets in."""

    def __init__(self, config: AuthConfig, clock: Clock) -> None:
        self._issuer = config.issuer or ""
        self._audience = config.audience or ""
        self._tenant_claim = config.tenant_claim
        self._clock = clock
        self._keys: dict[str | None, dict[str, Any]] = {}
        self._known: dict[bytes, tuple[Principal, float]] = {}
        self._fetched_s: float | None = None
        self._tried_s: float | None = None
        self._fetching = asyncio.Lock()

    async def judge(self, client: aiohttp.ClientSession, token: str) -> Principal:
        """Who the token speaks for. Raises Unauthenticated, or IssuerUnreachable."""
        mark = hashlib.sha256(token.encode("latin-1", "replace")).digest()
        now_s = self._clock.time()
        known = self._known.get(mark)
        if known is not None and now_s < known[1] + CLOCK_SKEW_S and self._fresh():
            return known[0]
        header = _header(token)
        key = await self._key(client, header)
        claims = _claims(token, key, str(header.get("alg")))
        tenant = tenant_of_claims(
            claims, issuer=self._issuer, audience=self._audience, tenant_claim=self._tenant_claim, now_s=now_s
        )
        principal = Principal(tenant, tenant)
        if len(self._known) >= KNOWN_TOKENS_MAX:
            self._known.clear()
        self._known[mark] = (principal, float(claims["exp"]))
        return principal

    async def look(self, client: aiohttp.ClientSession) -> None:
        """Fetch the issuer's keys where it is time to. Called each second."""
        now_s = self._clock.monotonic()
        aged = self._fetched_s is None or now_s - self._fetched_s >= REFRESH_S
        if aged and (self._tried_s is None or now_s - self._tried_s >= UNKNOWN_KEY_S):
            await self._fetch(client)

    def _fresh(self) -> bool:
        return self._fetched_s is not None and self._clock.monotonic() - self._fetched_s < STALE_MAX_S

    async def _key(self, client: aiohttp.ClientSession, header: dict[str, Any]) -> dict[str, Any]:
        kid = header.get("kid")
        if not isinstance(kid, str | None):
            raise Unauthenticated("the token names its key wrongly")
        key = self._find(kid)
        now_s = self._clock.monotonic()
        if key is None and (self._tried_s is None or now_s - self._tried_s >= UNKNOWN_KEY_S or self._fetching.locked()):
            await self._fetch(client)
            key = self._find(kid)
        if not self._fresh():
            raise IssuerUnreachable("the issuer of tokens cannot be reached")
        if key is None:
            raise Unauthenticated("the token is signed by a key that its issuer does not have")
        return key

    def _find(self, kid: str | None) -> dict[str, Any] | None:
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)

    async def _fetch(self, client: aiohttp.ClientSession) -> None:
        """One fetch at a time; those who wait for it take what it brought."""
        if self._fetching.locked():
            async with self._fetching:
                return
        async with self._fetching:
            self._tried_s = self._clock.monotonic()
            try:
                keys = await self._download(client)
            except (HttpError, ValueError) as error:
                _log.warning("the keys of the issuer of tokens cannot be read; those known stay", error=str(error))
                return
            if keys != self._keys:
                # A token of a key that was taken away must be judged anew.
                self._known.clear()
                _log.info("keys of the issuer of tokens", keys=len(keys))
            self._keys, self._fetched_s = keys, self._clock.monotonic()

    async def _download(self, client: aiohttp.ClientSession) -> dict[str | None, dict[str, Any]]:
        about = await call_json(
            client,
            "GET",
            self._issuer.rstrip("/") + "/.well-known/openid-configuration",
            max_bytes=MAX_DOCUMENT_BYTES,
        )
        address = about.get("jwks_uri") if isinstance(about, dict) else None
        if not isinstance(address, str) or about.get("issuer") != self._issuer:
            raise ValueError("its configuration names another issuer, or no jwks_uri")
        if not address_allowed(address):
            raise ValueError("its jwks_uri is not https")
        document = await call_json(client, "GET", address, max_bytes=MAX_DOCUMENT_BYTES)
        rows = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(rows, list):
            raise ValueError("its keys are no JWK set")
        found: dict[str | None, dict[str, Any]] = {}
        for row in rows[:KEYS_MAX]:
            if isinstance(row, dict) and row.get("use", "sig") == "sig" and isinstance(row.get("kid"), str | None):
                found.setdefault(row.get("kid"), row)
        return found


def address_allowed(url: str) -> bool:
    """Whether keys may be fetched from here: by https, or from this very machine."""
    return url.startswith(("https://", "http://127.0.0.1:", "http://localhost:", "http://[::1]:"))


def _header(token: str) -> dict[str, Any]:
    try:
        return dict(jwt.get_unverified_header(token))
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise Unauthenticated("the token is not a signed JWT") from None


def _claims(token: str, row: dict[str, Any], algorithm: str) -> dict[str, Any]:
    """The claims of a token whose signature is good. Raises Unauthenticated."""
    if not algorithm_allowed(row.get("kty"), algorithm) or row.get("alg", algorithm) != algorithm:
        raise Unauthenticated("the token's signature is of a kind that is not accepted")
    try:
        key = jwt.PyJWK(row, algorithm)
        payload = jwt.PyJWS().decode(
            token, key, algorithms=[algorithm], options={"verify_signature": True, "enforce_minimum_key_length": True}
        )
        claims = orjson.loads(payload)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        raise Unauthenticated("the token's signature is wrong") from None
    if not isinstance(claims, dict):
        raise Unauthenticated("the token has no claims")
    return claims
