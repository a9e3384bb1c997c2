"""A stand-in for an API server on a real socket: notes each request, answers as the test says; and keys for TLS."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class StandIn:
    """`answers` are used in order, then an empty object is answered."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    answers: list[Handler] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        query = dict(request.query)
        self.asked.append(
            Asked(request.method, request.path, query, dict(request.headers), orjson.loads(raw) if raw else None)
        )
        certificate = request.transport.get_extra_info("peercert") if request.transport else None
        self.peers.append(str(certificate["subject"][0][0][1]) if certificate else "")
        return await (self.answers.pop(0) if self.answers else answer({}))(request)


def answer(body: Any, status: int = 200, **headers: str) -> Handler:
    """A JSON body, or text where it is a string."""

    async def handle(request: web.Request) -> web.StreamResponse:
        raw = body.encode() if isinstance(body, str) else orjson.dumps(body)
        return web.Response(body=raw, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return handle


def status(code: int, message: str, *, reason: str = "", **details: Any) -> Handler:
    """A refusal in the API server's own form."""
    return answer({"kind": "Status", "message": message, "reason": reason, "code": code, "details": details}, code)


@asynccontextmanager
async def stand_in(context: ssl.SSLContext | None = None) -> AsyncIterator[StandIn]:
    server = StandIn()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    port = runner.addresses[0][1]
    server.url = f"{'https' if context else 'http'}://127.0.0.1:{port}"
    try:
        yield server
    finally:
        await runner.cleanup()


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in files."""

    cert: Path
    key: Path


def authority(folder: Path, name: str = "ca") -> tuple[Pair, Callable[[str], Pair]]:
    """A certificate authority and a function that makes certificates of it."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)

    def sign(subject: x509.Name, public: Any, *, ca: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        )
        return builder.sign(ca_key, hashes.SHA256())

    def save(name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
        pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
        pair.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair

    def issue(who: str) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)])
        return save(who, sign(subject, key.public_key(), ca=False), key)

    return save(name, sign(ca_name, ca_key.public_key(), ca=True), ca_key), issue


def server_context(ca: Pair, server: Pair, *, client_required: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(server.cert, server.key)
    context.load_verify_locations(ca.cert)
    context.verify_mode = ssl.CERT_REQUIRED if client_required else ssl.CERT_OPTIONAL
    return context
