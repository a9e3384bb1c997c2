"""The door of the client port: who asks, and whether they may ask now. The shell around auth.py and limits.py."""

from __future__ import annotations

import math
from collections.abc import Mapping

import aiohttp

from moe_api.enums import AuthMode
from moe_core.clock import Clock
from moe_core.config import AuthConfig, KeyLimits
from moe_gateway import limits
from moe_gateway.auth import Principal, Unauthenticated, credential
from moe_gateway.auth_keys import KeyStore
from moe_gateway.auth_oidc import IssuerUnreachable, TokenJudge, address_allowed
from moe_gateway.call import Call
from moe_gateway.key_shares import KeyShares
from moe_gateway.openai_api import ApiError
from moe_gateway.responder import Responder
from moe_gateway.settings import ConfigRefused
from moe_gateway.tiers import TENANT_HEADER

LOOK_S = 1.0


class Access:
    """Authentication and limits of one gateway process, by the configuration in force."""

    def __init__(self, config: AuthConfig, clock: Clock) -> None:
        self._clock = clock
        self._config = AuthConfig()
        self._keys: KeyStore | None = None
        self._judge: TokenJudge | None = None
        self._book = limits.Book()
        self.shares = KeyShares()
        self._charged: dict[int, int] = {}
        self.follow(config)

    def follow(self, config: AuthConfig) -> None:
        """Let in by this configuration from now on. Raises ConfigRefused, and has then changed nothing."""
        self.take(self.prepared(config))

    def prepared(self, config: AuthConfig) -> tuple[AuthConfig, KeyStore | None, TokenJudge | None]:
        """What a configuration needs, read and checked. Raises ConfigRefused."""
        check(config)
        before = self._config
        keys, judge = None, None
        if config.mode is AuthMode.API_KEYS:
            same = (before.keys_dir, before.keys_file) == (config.keys_dir, config.keys_file)
            keys = self._keys if same and self._keys is not None else KeyStore(config)
        elif config.mode is AuthMode.OIDC:
            same = before.model_copy(update={"limits": config.limits}) == config
            judge = self._judge if same and self._judge is not None else TokenJudge(config, self._clock)
        return config, keys, judge

    def take(self, prepared: tuple[AuthConfig, KeyStore | None, TokenJudge | None]) -> None:
        self._config, self._keys, self._judge = prepared

    async def run(self, client: aiohttp.ClientSession) -> None:
        """Follow key files and the issuer's keys until cancelled."""
        while True:
            await self.look(client)
            await self._clock.sleep(LOOK_S)

    async def look(self, client: aiohttp.ClientSession) -> None:
        if self._keys is not None:
            await self._keys.look()
        if self._judge is not None:
            await self._judge.look(client)

    async def identify(
        self, headers: Mapping[bytes, bytes], client: aiohttp.ClientSession, out: Responder
    ) -> Principal | None:
        """Who asks; None where nobody is asked to say. Raises ApiError 401, or 503 where it cannot be known."""
        if self._config.mode is AuthMode.NONE:
            return None
        try:
            given = credential(headers)
            if self._keys is not None:
                principal = self._keys.find(given)
                if principal is None:
                    raise Unauthenticated("the API key is not known here; check it, or ask for one")
                return principal
            if self._judge is None:
                raise Unauthenticated("nobody can be let in")
            return await self._judge.judge(client, given)
        except Unauthenticated as error:
            out.add_header(b"www-authenticate", "Bearer")
            raise ApiError(401, str(error), code="invalid_api_key") from None
        except IssuerUnreachable as error:
            raise ApiError(
                503,
                f"{error}; try again",
                kind="server_error",
                code="authentication_unavailable",
                retry_after_s=5,
            ) from None

    async def enter(
        self, call: Call, headers: Mapping[bytes, bytes], client: aiohttp.ClientSession, out: Responder
    ) -> None:
        """Let a call in, by name. Raises ApiError 401, 429 or 503."""
        principal = await self.identify(headers, client, out)
        if principal is None:
            raw = headers.get(TENANT_HEADER.encode())
            call.tenant = None if raw is None else raw.decode("latin-1").strip()
            return
        call.tenant = principal.tenant
        limit = principal.limits or self._config.limits
        now_s = self._clock.monotonic()
        usage = self._of(principal.key_id, limit, now_s)
        elsewhere = 0 if limit.concurrent is None else self.shares.in_flight(principal.key_id, now_s)
        usage, exceeded = limits.admit(usage, now_s, elsewhere)
        self._told(out, usage, now_s)
        if exceeded is not None:
            self._book.keep(principal.key_id, usage)  # what was taken elsewhere is told once
            raise _too_many(exceeded)
        self._keep(principal.key_id, usage, 1, 0)
        call.key_id = principal.key_id
        self._charged[call.id] = 0

    def charge(self, call: Call, tokens: int, out: Responder) -> None:
        """Count the tokens that a call is expected to use. Raises ApiError 429."""
        usage = self._usage(call)
        if usage is None or call.key_id is None:
            return
        now_s = self._clock.monotonic()
        usage, exceeded = limits.charge(usage, tokens, now_s)
        self._told(out, usage, now_s)
        if exceeded is not None:
            raise _too_many(exceeded)
        self._charged[call.id] = tokens
        self._keep(call.key_id, usage, 0, tokens)

    def leave(self, call: Call) -> None:
        """A call has ended: what it really used counts."""
        usage = self._usage(call)
        if usage is None or call.key_id is None:
            return
        used = call.prompt_tokens + call.output_tokens
        charged = self._charged.pop(call.id)
        usage = limits.ended(usage, charged, used, self._clock.monotonic())
        self._keep(call.key_id, usage, 0, used - charged)

    def _of(self, key_id: str, limit: KeyLimits, now_s: float) -> limits.Usage:
        """What a key has taken here and, as far as they told, at the other workers."""
        taken = [] if limit == KeyLimits() else list(self.shares.elsewhere(key_id, now_s))
        usage = self._book.of(key_id, limit, now_s, taken[0].at_s if taken else None)
        for one in taken:
            usage = limits.taken(usage, one.requests, one.tokens, one.at_s)
        return usage

    def _keep(self, key_id: str, usage: limits.Usage, requests: int, tokens: int) -> None:
        self._book.keep(key_id, usage)
        if usage.limits != KeyLimits():
            self.shares.took(key_id, requests, tokens, usage.in_flight)

    def _usage(self, call: Call) -> limits.Usage | None:
        """The usage of the key of a call that was let in."""
        if call.key_id is None or call.id not in self._charged:
            return None
        return self._book.known(call.key_id)

    @staticmethod
    def _told(out: Responder, usage: limits.Usage, now_s: float) -> None:
        for name, value in limits.headers(usage, now_s):
            out.add_header(name, value)


def check(config: AuthConfig) -> None:
    """Raises ConfigRefused, by field and with the remedy."""
    if config.mode is AuthMode.API_KEYS and config.keys_dir is None and config.keys_file is None:
        raise ConfigRefused("auth.keysDir: needed with mode APIKeys, or keysFile; name where the keys are mounted")
    if config.mode is AuthMode.OIDC:
        for field, value in (("issuer", config.issuer), ("audience", config.audience)):
            if not value:
                raise ConfigRefused(f"auth.{field}: needed with mode OIDC")
        if not address_allowed(config.issuer or ""):
            raise ConfigRefused("auth.issuer: must begin with https://")
    if config.mode is AuthMode.NONE and config.limits != KeyLimits():
        raise ConfigRefused("auth.limits: limits are of keys; choose mode APIKeys or OIDC, or leave them out")


def _too_many(exceeded: limits.Exceeded) -> ApiError:
    return ApiError(
        429,
        f"this key may have {exceeded.limit} {exceeded.what}; try again later",
        kind="tokens" if exceeded.what.startswith("tokens") else "requests",
        code="rate_limit_exceeded",
        retry_after_s=max(1, math.ceil(exceeded.wait_s)),
    )
