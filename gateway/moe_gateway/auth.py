"""Who asks: credentials read from headers, keys matched by their hashes, tokens judged by their claims. Pure.

Keys are random and have at least 128 bits, so a fast hash is enough: nobody can try 2^128 keys, and a slow hash would
only let a stranger burn the gateway's CPU. A password would need one; what is too short to be random is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moe_core.config import KeyLimits

KEY_CHARS_MIN = 22
"""128 bits in base64: the least that a key may have."""
KEY_DISTINCT_MIN = 8
"""A random key of 22 characters has fewer different ones once in about 2^70 draws, a repeated word always."""
KEY_CHARS_MAX = 4096
CREDENTIAL_CHARS_MAX = 16_384
"""Longest token that is looked at."""
CLOCK_SKEW_S = 30.0
TENANT_CHARS_MAX = 253
ALGORITHMS: Mapping[str, frozenset[str]] = {
    "RSA": frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    "EC": frozenset({"ES256", "ES384", "ES512"}),
    "OKP": frozenset({"EdDSA"}),
}
"""Signatures that count, by type of the issuer's key. None is symmetric: a public key is no secret to sign with."""
_SCHEME = b"bearer "
HEADERS = ("authorization", "x-api-key", "api-key")
"""Where a credential may stand: OpenAI's clients, Anthropic's, Azure's. The first that is there counts."""


class Unauthenticated(Exception):
    """A credential that is missing or not good. The message never holds any part of it."""


class KeyRefused(ValueError):
    """A key that may not be used; the message names its place and the remedy, never the key."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, as authentication found."""

    tenant: str
    key_id: str
    limits: KeyLimits | None = None
    """Its own; None: those of every key."""


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key by its SHA-256 alone."""

    principal: Principal
    digest: bytes = field(repr=False)


@dataclass(frozen=True)
class KeyTable:
    """Keys by the first 8 bytes of their hash; the rest is compared in constant time."""

    entries: Mapping[bytes, KeyEntry] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, key: str) -> Principal | None:
        digest = digest_of(key)
        entry = self.entries.get(digest[:8])
        return entry.principal if entry is not None and hmac.compare_digest(entry.digest, digest) else None


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def credential(headers: Mapping[bytes, bytes]) -> str:
    """The key or token of a request. Raises Unauthenticated where there is none that could be one."""
    for name in HEADERS:
        raw = headers.get(name.encode())
        if raw is None:
            continue
        if name == "authorization":
            if raw[: len(_SCHEME)].lower() != _SCHEME:
                raise Unauthenticated("the Authorization header must be Bearer and the key")
            raw = raw[len(_SCHEME) :]
        text = raw.strip().decode("latin-1")
        if text and len(text) <= CREDENTIAL_CHARS_MAX:
            return text
        raise Unauthenticated(f"the {name} header holds no key")
    raise Unauthenticated("no API key was given; send it as Authorization: Bearer KEY")


def check_key(where: str, key: str) -> None:
    """Raises KeyRefused for what cannot be a random key of 128 bits."""
    remedy = "take a random one, e.g. of `openssl rand -base64 32`"
    if not key.isascii() or not key.isprintable() or " " in key:
        raise KeyRefused(f"{where}: a key is one printable ASCII word; {remedy}")
    if len(key) < KEY_CHARS_MIN or len(set(key)) < KEY_DISTINCT_MIN:
        raise KeyRefused(f"{where}: the key is too short or too regular to be 128 random bits; {remedy}")
    if len(key) > KEY_CHARS_MAX:
        raise KeyRefused(f"{where}: the key is longer than {KEY_CHARS_MAX} characters; {remedy}")


def check_tenant(where: str, tenant: str) -> None:
    if not 0 < len(tenant) <= TENANT_CHARS_MAX or not tenant.isprintable():
        raise KeyRefused(f"{where}: a tenant's name has 1 to {TENANT_CHARS_MAX} printable characters; rename it")


def entries_of(tenant: str, text: str) -> list[KeyEntry]:
    """The keys of a tenant's file: one a line, so that the old and the new one are good while clients change over."""
    where = f"keysDir/{tenant}"
    check_tenant(where, tenant)
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise KeyRefused(f"{where}: holds no key; put it there, alone, or delete the file")
    found = []
    for number, key in enumerate(keys, 1):
        check_key(f"{where} line {number}", key)
        found.append(_entry(tenant, digest_of(key)))
    return found


def hashed_entries(document: object) -> list[KeyEntry]:
    """The entries of a file of hashed keys: {"keys": [{"tenant", "sha256", "id"?, "limits"?}]}. Raises KeyRefused."""
    rows = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise KeyRefused('keysFile: must be {"keys": [{"tenant": NAME, "sha256": HEX}]}')
    found = []
    for index, row in enumerate(rows):
        where = f"keysFile keys[{index}]"
        known = {"tenant", "sha256", "id", "limits"}
        if not isinstance(row, dict) or not isinstance(tenant := row.get("tenant"), str) or row.keys() - known:
            raise KeyRefused(f"{where}: must have tenant and sha256, and may have id and limits, nothing else")
        check_tenant(f"{where}.tenant", tenant)
        try:
            digest = bytes.fromhex(row.get("sha256") or "")
            limits = KeyLimits.model_validate(row["limits"]) if row.get("limits") is not None else None
        except (ValueError, TypeError):
            raise KeyRefused(f"{where}: sha256 must be hexadecimal, and limits as in auth.limits") from None
        if len(digest) != 32:
            raise KeyRefused(f"{where}.sha256: must be 64 hexadecimal digits, as `printf %s KEY | sha256sum` prints")
        name = row.get("id")
        if name is not None:
            if not isinstance(name, str):
                raise KeyRefused(f"{where}.id: must be a name")
            check_tenant(f"{where}.id", name)
        found.append(_entry(tenant, digest, name, limits))
    return found


def table_of(entries: Iterable[KeyEntry]) -> KeyTable:
    """Raises KeyRefused where a key is of two tenants: nobody could say who asks."""
    found: dict[bytes, KeyEntry] = {}
    for entry in entries:
        before = found.setdefault(entry.digest[:8], entry)
        if before.principal.tenant != entry.principal.tenant:
            names = f"{before.principal.tenant!r} and {entry.principal.tenant!r}"
            raise KeyRefused(f"keys: tenants {names} have the same key; give each its own")
    return KeyTable(found)


def tenant_of_claims(
    claims: Mapping[str, object], *, issuer: str, audience: str, tenant_claim: str, now_s: float
) -> str:
    """The tenant of a token whose signature is good. `now_s` is Unix time. Raises Unauthenticated."""
    if claims.get("iss") != issuer:
        raise Unauthenticated("the token is of another issuer")
    held = claims.get("aud")
    if audience not in (held if isinstance(held, list) else [held]):
        raise Unauthenticated("the token is for another audience")
    expires, begins = _instant(claims.get("exp")), _instant(claims.get("nbf", 0))
    if expires is None or begins is None:
        raise Unauthenticated("the token has no time of expiry")
    if now_s >= expires + CLOCK_SKEW_S:
        raise Unauthenticated("the token has expired; get a new one")
    if now_s < begins - CLOCK_SKEW_S:
        raise Unauthenticated("the token is not valid yet")
    tenant = claims.get(tenant_claim)
    if not isinstance(tenant, str) or not 0 < len(tenant) <= TENANT_CHARS_MAX or not tenant.isprintable():
        raise Unauthenticated("the token names no tenant")
    return tenant


def algorithm_allowed(key_type: object, algorithm: object) -> bool:
    """Whether a signature of this algorithm by a key of this type counts."""
    return isinstance(key_type, str) and algorithm in ALGORITHMS.get(key_type, frozenset())


def _instant(value: object) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12
    return float(value) if good and isinstance(value, int | float) else None


def _entry(tenant: str, digest: bytes, name: str | None = None, limits: KeyLimits | None = None) -> KeyEntry:
    """8 hexadecimal digits of a key's hash tell two keys of a tenant apart, and nothing of the key."""
    return KeyEntry(Principal(tenant, name or f"{tenant}/{digest[:4].hex()}", limits), digest)


def parsed(text: str) -> object:
    """JSON of a file of hashed keys. Raises KeyRefused."""
    try:
        return json.loads(text)
    except ValueError:
        raise KeyRefused("keysFile: is not JSON; write it whole, under another name, and move it there") from None
