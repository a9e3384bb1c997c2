"""The hop to an upstream over real sockets: however its bytes are cut, one answer or one honest error."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_gateway import wire
from moe_gateway.wire import ConnectFailed, ConnectionLost, Wire

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"
WHOLE = OK + b"content-length: 5\r\n\r\nhello"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=1\r\nllo\r\n0\r\ntrailer: 1\r\n\r\n"
UNTIL_CLOSE = OK + b"\r\nhello"


async def _request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """(head, body) of one request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return head, await reader.readexactly(length)


@asynccontextmanager
async def upstream(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}/v1/chat"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answers(*pieces: bytes, close: bool = False, times: int = 1) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(times):
            await _request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        if not close:
            await reader.read()

    return handler


async def body_of(client: Wire, url: str) -> bytes:
    async with asyncio.timeout(5):
        response = await client.post(url, b"{}", {"content-type": "application/json"})
        assert response.status == 200
        parts = []
        while part := await response.readany():
            parts.append(part)
        response.close()
        return b"".join(parts)


@pytest.mark.parametrize(
    ("data", "close"),
    [
        pytest.param(WHOLE, False, id="content-length"),
        pytest.param(CHUNKED, False, id="chunked, with an extension and a trailer"),
        pytest.param(UNTIL_CLOSE, True, id="until the connection closes"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE, False, id="100 Continue comes first"),
        pytest.param(b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello", True, id="HTTP/1.0"),
    ],
)
async def test_a_body_is_read_whole_by_any_framing(data: bytes, close: bool) -> None:
    async with upstream(answers(data, close=close)) as url:
        client = Wire()
        assert await body_of(client, url) == b"hello"
        client.close()


@pytest.mark.parametrize("data", [WHOLE, CHUNKED], ids=["content-length", "chunked"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 110), max_size=8))
def test_where_the_bytes_are_cut_does_not_matter(data: bytes, cuts: list[int]) -> None:
    edges = sorted({cut for cut in cuts if cut < len(data)})
    pieces = [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True)]

    async def run() -> bytes:
        async with upstream(answers(*pieces)) as url:
            client = Wire()
            try:
                return await body_of(client, url)
            finally:
                client.close()

    assert asyncio.run(run()) == b"hello"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-le", id="in the head"),
        pytest.param(OK + b"content-length: 50\r\n\r\nhello", id="in a body of known length"),
        pytest.param(OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhel", id="in a chunk"),
        pytest.param(OK + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", id="before the last chunk"),
        pytest.param(b"SSH-2.0-OpenSSH_9\r\n\r\n", id="no HTTP at all"),
        pytest.param(OK + b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n", id="a chunk size that is no number"),
        pytest.param(OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!", id="two lengths"),
        pytest.param(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", id="upgrade"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20000, id="a head without an end"),
    ],
)
async def test_what_breaks_off_or_is_no_http_is_one_error(data: bytes) -> None:
    async with upstream(answers(data, close=True)) as url:
        client = Wire()
        with pytest.raises(ConnectionLost):
            await body_of(client, url)
        client.close()


async def test_connections_are_kept_and_one_that_is_unfinished_is_not() -> None:
    opened = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        await answers(WHOLE, times=50)(reader, writer)

    async with upstream(handler) as url:
        client = Wire()
        for _ in range(10):
            assert await body_of(client, url) == b"hello"
        assert opened == 1
        response = await client.post(url, b"{}", {})
        response.close()  # the whole answer may be there or not: it was not read to its end
        assert await body_of(client, url) == b"hello"
        client.close()


async def test_two_requests_at_once_have_two_connections_and_their_own_answers() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await _request(reader)
            await asyncio.sleep(0.01)
            writer.write(OK + b"content-length: %d\r\n\r\n" % len(body) + body)

    async with upstream(echo) as url:
        client = Wire()

        async def ask(number: int) -> None:
            for turn in range(5):
                response = await client.post(url, b"%d-%d" % (number, turn), {})
                assert await response.read(100) == b"%d-%d" % (number, turn)
                assert await response.readany() == b""
                response.close()

        await asyncio.gather(*(ask(number) for number in range(20)))
        client.close()


async def test_what_comes_after_an_answer_is_never_taken_for_the_next_one() -> None:
    async with upstream(answers(WHOLE + WHOLE, times=5)) as url:
        client = Wire()
        assert await body_of(client, url) == b"hello"
        response = await client.post(url, b"{}", {})
        assert (await response.read(100)) == b"hello"
        client.close()


async def test_nobody_there_and_a_connection_that_does_not_come_are_told_apart_from_what_was_sent() -> None:
    async with upstream(answers(WHOLE)) as url:
        pass
    client = Wire(connect_s=0.5)
    with pytest.raises(ConnectFailed):
        await client.post(url, b"{}", {})
    with pytest.raises(ConnectFailed):
        await client.post("http://no-such-host.invalid/v1", b"{}", {})


async def test_a_slow_reader_holds_the_upstream_back() -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await _request(reader)
        writer.write(OK + b"content-length: %d\r\n\r\n" % (64 << 20))
        for _ in range(1024):
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16

    async with upstream(flood) as url:
        client = Wire()
        response = await client.post(url, b"{}", {})
        await asyncio.sleep(0.3)
        assert sent < 32 << 20  # the kernel's buffers and HIGH_WATER, far from all of it
        size = 0
        while part := await response.readany():
            size += len(part)
        assert size == 64 << 20
        client.close()


async def test_a_call_that_is_cancelled_closes_its_connection() -> None:
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _request(reader)
        await reader.read()
        gone.set()

    async with upstream(silent) as url:
        client = Wire()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.post(url, b"{}", {})
        async with asyncio.timeout(2):
            await gone.wait()


@pytest.mark.parametrize(
    ("url", "headers", "says"),
    [
        ("http://127.0.0.1:1/v1", {"x": "a\r\nhost: evil"}, "header x"),
        ("http://127.0.0.1:1/v1", {"x y": "a"}, "header 'x y'"),
        ("ftp://127.0.0.1/v1", {}, "http or https"),
        ("http://127.0.0.1:1/a b", {}, "blanks"),
    ],
)
async def test_what_could_smuggle_a_request_is_refused(url: str, headers: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        await Wire().post(url, b"{}", headers)


async def test_idle_connections_are_not_used_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        await answers(WHOLE, times=50)(reader, writer)

    monkeypatch.setattr(wire, "IDLE_S", 0.0)
    async with upstream(handler) as url:
        client = Wire()
        for _ in range(3):
            assert await body_of(client, url) == b"hello"
        assert opened == 3
        client.close()


async def test_tls_is_verified(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    import ipaddress

    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, key_pem = tmp_path / "cert.pem", tmp_path / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem, key_pem)
    async with upstream(answers(CHUNKED), tls=server) as url:
        trusting = Wire(tls=ssl.create_default_context(cafile=str(pem)))
        assert await body_of(trusting, url) == b"hello"
        trusting.close()
        with pytest.raises(ConnectFailed):
            await Wire().post(url, b"{}", {})
