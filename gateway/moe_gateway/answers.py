"""Reading an upstream's answer off its connection."""

from __future__ import annotations

import asyncio

from moe_gateway.upstream import Fault, UpstreamFailed
from moe_gateway.wire import Response

MAX_ANSWER_BYTES = 64 << 20
LOST = OSError
"""A connection that broke; a TimeoutError is one."""


async def read_all(response: Response) -> bytes:
    parts, size = [], 0
    while chunk := await response.readany():
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise UpstreamFailed(Fault.MALFORMED, "the answer is too large", maybe_billed=True)
    return b"".join(parts)


async def to_the_end(response: Response) -> None:
    """Read what follows [DONE], the end of the body, so that the connection can be used again."""
    try:
        async with asyncio.timeout(1.0):
            while await response.readany():
                pass
    except LOST:
        return


def content_type(response: Response, otherwise: bytes) -> bytes:
    value = response.headers.get("content-type")
    return otherwise if value is None else value.encode("latin-1", "replace")
