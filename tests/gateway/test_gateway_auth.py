"""Who may ask: keys by their hashes, tokens by the issuer's keys, rotation without a restart, and no key anywhere."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.clock import FakeClock
from moe_core.config import AuthConfig
from moe_core.log import JsonFormatter
from moe_gateway.auth import KeyRefused, Unauthenticated, credential, entries_of, hashed_entries, table_of
from moe_gateway.auth_keys import KeyStore
from moe_gateway.server import GatewayServer
from moe_gateway.settings import ConfigRefused
from tests.gateway.fake_upstream import FakeUpstream
from tests.gateway.harness import Client, chat, config, running

ACME, ETL = "acme-key-0a1b2c3d4e5f6071829", "etl-key-91b2c3d4e5f607182abc"
TIERS = [{"name": "gold", "tenants": ["acme"]}, {"name": "batch", "tenants": ["etl"]}]
KEYS = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", min_size=22, max_size=80).filter(
    lambda key: len(set(key)) >= 8
)


def mounted(folder: Path, **keys: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    for tenant, key in keys.items():
        (folder / tenant).write_text(key)
    return {"mode": "APIKeys", "keysDir": str(folder)}


WAYS = {
    "openai": {"Authorization": f"Bearer {ACME}"},
    "openai in small letters": {"authorization": f"bearer  {ACME}"},
    "anthropic": {"x-api-key": ACME},
    "azure": {"api-key": ACME},
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_known_key_is_let_in_and_decides_the_tier(way: str, tmp_path: Path) -> None:
    headers, auth = WAYS[way], mounted(tmp_path / "keys", acme=ACME, etl=ETL)
    async with FakeUpstream() as local, running(config(local, auth=auth, tiers=TIERS)) as client:
        answer = await client.post(chat(False), **headers, x_moestack_tenant="etl")
        assert answer.status == 200
        assert local.requests[0]["vllm_xargs"] == {"moestack_tier": "gold"}, "the header is nobody's word here"
        assert not {"authorization", "x-api-key", "api-key"} & {header.lower() for header in local.headers[0]}
        assert (await client.call("GET", client.url + "/v1/models", **headers)).status == 200


STRANGERS: dict[str, tuple[dict[str, str], str]] = {
    "none": ({}, "no API key was given"),
    "unknown": ({"Authorization": f"Bearer {ACME[:-1]}0"}, "not known"),
    "no bearer": ({"Authorization": f"Basic {ACME}"}, "must be Bearer"),
    "empty": ({"Authorization": "Bearer "}, "holds no key"),
    "too long": ({"x-api-key": "a" * 20_000}, "holds no key"),
    "a good one beside a bad one": ({"Authorization": "Bearer x", "x-api-key": ACME}, "not known"),
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
async def test_anyone_else_is_told_401(path: str, tmp_path: Path) -> None:
    auth = mounted(tmp_path / "keys", acme=ACME)
    async with FakeUpstream() as local, running(config(local, auth=auth)) as client:
        for name, (headers, says) in STRANGERS.items():
            data = json.dumps(chat()).encode() if "chat" in path else None
            answer = await client.call("POST" if data else "GET", client.url + path, data, **headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), name
            assert answer.error["type"] == "invalid_request_error"
            assert says in answer.error["message"]
            assert answer.headers.get("www-authenticate") == "Bearer"
        assert local.requests == []


async def test_a_stranger_at_anthropics_call_is_told_in_anthropics_form(tmp_path: Path) -> None:
    auth = mounted(tmp_path / "keys", acme=ACME)
    body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "Say hello"}]}
    async with FakeUpstream() as local, running(config(local, auth=auth)) as client:
        refused = await client.post(body, "/v1/messages", x_api_key="nobody")
        assert (refused.status, refused.json["type"]) == (401, "error")
        assert refused.json["error"]["type"] == "authentication_error"
        assert (await client.post(body, "/v1/messages", x_api_key=ACME)).status == 200


async def test_keys_are_rotated_without_a_restart(tmp_path: Path) -> None:
    auth = mounted(tmp_path / "keys", acme=ACME)
    new = "acme-new-77b2c3d4e5f60718293a"
    async with FakeUpstream() as local, running(config(local, auth=auth)) as client:
        access = client.server.gateway.access

        async def statuses() -> list[int]:
            await access.look(client.session)
            return [(await client.post(chat(), x_api_key=key)).status for key in (ACME, new, ETL)]

        assert await statuses() == [200, 401, 401]
        mounted(tmp_path / "keys", acme=f"{new}\n{ACME}\n", etl=ETL)
        assert await statuses() == [200, 200, 200]
        mounted(tmp_path / "keys", acme=new, etl="short")
        assert await statuses() == [401, 200, 401], "a bad entry lets nobody in, and harms nobody else"
        (tmp_path / "keys" / "acme").unlink()
        mounted(tmp_path / "keys", etl=ETL)
        assert await statuses() == [401, 401, 200]


async def test_a_folder_that_cannot_be_read_keeps_the_keys(tmp_path: Path) -> None:
    store = KeyStore(AuthConfig.model_validate(mounted(tmp_path / "keys", acme=ACME)))
    (tmp_path / "keys").rename(tmp_path / "away")
    await store.look()
    assert store.find(ACME) is not None


def test_a_file_of_hashed_keys(tmp_path: Path) -> None:
    row = {"tenant": "acme", "sha256": hashlib.sha256(ACME.encode()).hexdigest(), "id": "laptop"}
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [row | {"limits": {"concurrent": 2}}]}))
    store = KeyStore(AuthConfig.model_validate({"mode": "APIKeys", "keysFile": str(tmp_path / "keys.json")}))
    found = store.find(ACME)
    assert found is not None
    assert (found.tenant, found.key_id, found.limits and found.limits.concurrent) == ("acme", "laptop", 2)
    assert store.find(row["sha256"]) is None, "who has read the file has no key"


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("short", {"acme": "hunter2"}, "keysDir/acme line 1: the key is too short"),
        (
            "a word again and again",
            {"acme": "password" * 4},
            "keysDir/acme line 1: the key is too short or too regular",
        ),
        ("two words", {"acme": "a1b2c3d4e5f6 a1b2c3d4e5f6"}, "keysDir/acme line 1: a key is one printable"),
        ("empty", {"acme": "\n"}, "keysDir/acme: holds no key"),
        ("shared", {"acme": ACME, "etl": ACME}, "tenants 'acme' and 'etl' have the same key"),
        ("no key at all", {}, "there is no key"),
    ],
)
def test_bad_keys_are_refused_by_name(name: str, keys: dict[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigRefused) as refused:
        KeyStore(AuthConfig.model_validate(mounted(tmp_path / "keys", **keys)))
    assert says in str(refused.value)
    assert not any(key in str(refused.value) for key in keys.values() if key.strip())


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tenant": "a"}, "keys[0].sha256"),
        ({"tenant": "a", "sha256": "zz"}, "keys[0]: sha256"),
        ({"tenant": "a", "sha256": 7}, "keys[0]: sha256"),
        ({"tenant": "a", "sha256": "00" * 32, "key": ACME}, "keys[0]: must have"),
        ({"tenant": "a\n", "sha256": "00" * 32}, "keys[0].tenant"),
        ({"tenant": "a", "sha256": "00" * 32, "limits": {"concurrent": 0}}, "keys[0]: sha256"),
        ({"tenant": "a", "sha256": "00" * 32, "id": 7}, "keys[0].id"),
    ],
)
def test_bad_rows_of_hashed_keys_are_refused_by_place(row: dict[str, Any], says: str) -> None:
    with pytest.raises(KeyRefused) as refused:
        hashed_entries({"keys": [row]})
    assert says in str(refused.value)
    assert ACME not in str(refused.value)


@settings(max_examples=50)
@given(keys=st.lists(KEYS, min_size=1, max_size=5, unique=True), other=KEYS)
def test_a_key_finds_its_tenant_and_no_other_key_does(keys: list[str], other: str) -> None:
    table = table_of(entry for index, key in enumerate(keys) for entry in entries_of(f"t{index}", key))
    for index, key in enumerate(keys):
        found = table.find(key)
        assert found is not None
        assert found.tenant == f"t{index}"
        shown = repr((table, found, entries_of("t", key))) + str(credential({b"x-api-key": key.encode()}) == key)
        assert key not in shown
        assert hashlib.sha256(key.encode()).hexdigest()[8:] not in shown
    assert (table.find(other) is not None) == (other in keys)


@settings(max_examples=6, deadline=None)
@given(key=KEYS, wrong=KEYS)
def test_no_key_is_in_a_log_a_metric_an_error_or_a_repr(key: str, wrong: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.json"
        file.write_text(json.dumps({"keys": [{"tenant": "acme", "sha256": hashlib.sha256(key.encode()).hexdigest()}]}))
        asyncio.run(_no_trace_of(key, wrong, file))


async def _no_trace_of(key: str, wrong: str, file: Path) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    formatter = JsonFormatter()
    handler.emit = lambda record: lines.append(formatter.format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("moestack")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        auth = {"mode": "APIKeys", "keysFile": str(file), "limits": {"requestsPerMinute": 2}}
        async with FakeUpstream() as local, running(config(local, auth=auth)) as client:
            seen = []
            for headers in (
                {"x_api_key": key},
                {"Authorization": f"Bearer {wrong}"},
                {"api_key": key},
                {"api_key": key},
            ):
                answer = await client.post(chat(), **headers)
                seen.append(answer.body.decode() + repr(answer.headers))
                assert answer.status in {200, 401, 429}
            seen.append(repr((await client.admin("GET", "/metrics")).body))
            seen.append(json.dumps(await client.digest()))
            seen.append(repr(vars(client.server.gateway.access)))
            seen.append(repr([dict(headers) for headers in local.headers]))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert any(json.loads(line).get("key_id", "").startswith("acme/") for line in lines)
    for secret in {key, wrong}:
        assert secret not in "\n".join([*seen, *lines])


# Tokens of an issuer


class Issuer:
    """An OIDC issuer over real sockets, with keys that a test rotates."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.asked = 0
        self.down = False
        self.url = ""

    def rotate(self, *kids: str) -> None:
        self.keys = {kid: rsa.generate_private_key(65537, 2048) for kid in kids}

    def token(self, kid: str | None = "k1", *, key: Any = None, alg: str = "RS256", **claims: Any) -> str:
        now = int(time.time())
        body = {"iss": self.url, "aud": "moestack", "sub": "acme", "exp": now + 300, "iat": now, **claims}
        body = {name: value for name, value in body.items() if value is not None}
        signer = key if key is not None else self.keys[kid or "k1"]
        return jwt.encode(body, signer, algorithm=alg, headers={} if kid is None else {"kid": kid})

    async def about(self, _: web.Request) -> web.Response:
        if self.down:
            return web.Response(status=503)
        return web.json_response({"issuer": self.url, "jwks_uri": self.url + "/jwks"})

    async def jwks(self, _: web.Request) -> web.Response:
        self.asked += 1
        rows = []
        for kid, key in self.keys.items():
            kind = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
            rows.append({**kind.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"})
        return web.json_response({"keys": rows})


@asynccontextmanager
async def issuing() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    issuer.rotate("k1")
    app = web.Application()
    app.router.add_get("/.well-known/openid-configuration", issuer.about)
    app.router.add_get("/jwks", issuer.jwks)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    issuer.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield issuer
    finally:
        await runner.cleanup()


def oidc(issuer: Issuer, **more: Any) -> dict[str, Any]:
    return {"mode": "OIDC", "issuer": issuer.url, "audience": "moestack", **more}


async def ask(client: Client, token: str) -> tuple[int, str]:
    answer = await client.post(chat(False), Authorization=f"Bearer {token}")
    return answer.status, "" if answer.status == 200 else answer.error["message"]


async def test_tokens_are_judged_by_issuer_audience_time_and_signature() -> None:
    async with issuing() as issuer, FakeUpstream() as local, running(config(local, auth=oidc(issuer))) as client:
        now = time.time()
        assert (await ask(client, issuer.token()))[0] == 200
        assert (await ask(client, issuer.token(aud=["other", "moestack"])))[0] == 200
        assert (await ask(client, issuer.token(exp=int(now) - 10)))[0] == 200, "clocks may differ a little"
        assert (await ask(client, issuer.token(kid=None)))[0] == 200, "with one key there is no doubt"
        stranger = rsa.generate_private_key(65537, 2048)
        weak = rsa.generate_private_key(65537, 1024)
        # The known confusion: the public key, which everybody has, used as the secret of an HMAC.
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        public = issuer.keys["k1"].public_key().public_bytes(encoding, form)
        forged = (
            jwt.utils.base64url_encode(b'{"alg":"HS256","kid":"k1"}') + b"." + issuer.token().split(".")[1].encode()
        )
        mac = jwt.utils.base64url_encode(hmac.digest(public, forged, "sha256"))
        bad = {
            "expired": issuer.token(exp=int(now) - 60),
            "not valid yet": issuer.token(nbf=int(now) + 60),
            "no time of expiry": issuer.token(exp=None),
            "another issuer": issuer.token(iss="https://evil.example.com"),
            "another audience": issuer.token(aud="other"),
            "names no tenant": issuer.token(sub=None),
            "signature is wrong": issuer.token(key=stranger),
            "does not have": issuer.token(kid="k9", key=stranger),
            "of a kind": (forged + b"." + mac).decode(),
            "not a signed JWT": "abc",
        }
        none = ".".join([*jwt.encode({}, "", algorithm="none", headers={"kid": "k1"}).split(".")[:2], ""])
        for says, token in bad.items():
            status, message = await ask(client, token)
            assert (status, says in message) == (401, True), (says, message)
        assert (await ask(client, none))[0] == 401
        assert (await ask(client, issuer.token(key=weak)))[0] == 401
        tampered = issuer.token().split(".")
        tampered[1] = jwt.utils.base64url_encode(b'{"sub":"root"}').decode()
        assert (await ask(client, ".".join(tampered)))[0] == 401


async def test_the_claim_that_names_the_tenant_decides_the_tier() -> None:
    async with (
        issuing() as issuer,
        FakeUpstream() as local,
        running(config(local, auth=oidc(issuer, tenantClaim="org"), tiers=TIERS)) as client,
    ):
        token = issuer.token(org="etl", sub="somebody")
        for _ in range(2):  # judged, then remembered
            assert (await ask(client, token))[0] == 200
        assert [request["vllm_xargs"]["moestack_tier"] for request in local.requests] == ["batch", "batch"]
        assert issuer.asked == 1


async def test_keys_rotate_by_their_ids_and_strangers_cannot_hammer_the_issuer() -> None:
    async with issuing() as issuer, FakeUpstream() as local:
        clock = FakeClock(time.time())
        async with running(config(local, auth=oidc(issuer))) as client:
            judge = client.server.gateway.access._judge
            assert judge is not None
            judge._clock = clock
            judge._tried_s = judge._fetched_s = None
            old = issuer.token()
            assert (await ask(client, old))[0] == 200
            asked = issuer.asked
            issuer.rotate("k2")
            new = issuer.token(kid="k2")
            for _ in range(5):
                assert (await ask(client, new))[0] == 401, "the issuer was asked a moment ago"
            assert issuer.asked == asked
            await clock.advance(20)
            assert (await ask(client, new))[0] == 200
            assert issuer.asked == asked + 1
            assert (await ask(client, old))[0] == 401, "a token of a key that is gone is not remembered"


async def test_it_fails_closed_without_a_key_and_goes_on_with_the_last_ones() -> None:
    async with issuing() as issuer, FakeUpstream() as local:
        issuer.down = True
        async with running(config(local, auth=oidc(issuer))) as client:
            answer = await client.post(chat(), Authorization=f"Bearer {issuer.token()}")
            assert (answer.status, answer.error["code"]) == (503, "authentication_unavailable")
            assert answer.headers["Retry-After"] == "5"
            assert local.requests == []
            issuer.down = False
            judge = client.server.gateway.access._judge
            assert judge is not None
            judge._clock = clock = FakeClock(time.time())
            judge._tried_s = None
            assert (await ask(client, issuer.token()))[0] == 200
            issuer.down = True
            await clock.advance(3600)
            assert (await ask(client, issuer.token(exp=int(clock.time()) + 60)))[0] == 200, "known keys count"
            await clock.advance(24 * 3600)
            assert (await ask(client, issuer.token(exp=int(clock.time()) + 60)))[0] == 503


async def test_elliptic_keys_count_by_their_own_algorithm() -> None:
    async with issuing() as issuer, FakeUpstream() as local:
        issuer.keys = {"e": ec.generate_private_key(ec.SECP256R1())}
        async with running(config(local, auth=oidc(issuer))) as client:
            assert (await ask(client, issuer.token(kid="e", alg="ES256")))[0] == 200


@pytest.mark.parametrize(
    ("auth", "says"),
    [
        ({"mode": "APIKeys"}, "auth.keysDir: needed"),
        ({"mode": "APIKeys", "keysDir": "/nowhere"}, "keysDir"),
        ({"mode": "OIDC", "audience": "a"}, "auth.issuer: needed"),
        ({"mode": "OIDC", "issuer": "https://i"}, "auth.audience: needed"),
        ({"mode": "OIDC", "issuer": "http://i.example.com", "audience": "a"}, "auth.issuer: must begin with https"),
        ({"limits": {"concurrent": 1}}, "auth.limits"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_field(auth: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigRefused) as refused:
        GatewayServer(config(FakeUpstream(), auth=auth))
    assert says in str(refused.value)


def test_a_header_without_a_key_is_no_credential() -> None:
    with pytest.raises(Unauthenticated):
        credential({b"cookie": b"key=x"})
