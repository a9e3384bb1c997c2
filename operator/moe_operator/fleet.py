"""Gateways and boards over HTTP: asks them for digests, puts signed weights on them. What they say is not trusted."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Annotated, Any

import aiohttp
from pydantic import Field, TypeAdapter, ValidationError

from moe_core.clock import Clock, SystemClock
from moe_core.http import HttpError, call_json, session
from moe_core.log import get_log
from moe_core.passes import Passes
from moe_core.signing import Signer
from moe_core.wire import GatewayDigest, ReplicaDigest
from moe_operator.requests import AskGateways, Gateways, SendWeights

ANSWER_S = 2.0
"""A gateway that takes longer is silent; it is asked again with the next reconcile."""
MAX_DIGEST_BYTES = 256 * 1024
MAX_BOARD_BYTES = 8 * 1024 * 1024
"""Sixty layers on two hundred replicas take about 5 MiB."""
MAX_COUNT = 2**53
"""No honest counter is larger, and no larger one survives JSON."""
MAX_VERSION = 2**31
"""Of weights: they count up by one, a step at a time."""
LONGEST_WINDOW_S = 3600.0

_REPLICAS: TypeAdapter[list[ReplicaDigest]] = TypeAdapter(Annotated[list[ReplicaDigest], Field(max_length=4096)])


class HttpFleet:
    """The deployments' own processes. Close it in the end."""

    def __init__(
        self,
        signing_key_file: str | None,
        client: aiohttp.ClientSession | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._client = client or session(connect_s=1.0, read_s=ANSWER_S, limit=128)
        self._key = Path(signing_key_file) if signing_key_file else None
        self._signer: Signer | None = None
        self._passes: Passes | None = None
        self._read_at: tuple[int, int] | None = None
        self._said = ""
        self._log = get_log("operator.fleet")

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, request: AskGateways) -> Gateways:
        """Every pod and board at once, within 2 s."""
        window = f"{request.window_s:g}"
        shown = self._pass("/".join(request.key))
        pods = [self._digest(f"http://{pod}/v1/digest?window={window}", shown) for pod in request.pods]
        boards = [self._imbalance(f"{board}/v1/digests", shown) for board in request.boards]
        digests, by_board = await asyncio.gather(asyncio.gather(*pods), asyncio.gather(*boards))
        imbalances = [value for values in by_board for value in values]
        return Gateways(
            digests=tuple(digest for digest in digests if digest is not None),
            silent=sum(digest is None for digest in digests),
            imbalance=sum(imbalances) / len(imbalances) if imbalances else None,
        )

    async def send(self, request: SendWeights) -> int:
        """How many pods took the weights; 0 without a key, which is said once."""
        signer = self._signed_by()
        if signer is None:
            return 0
        envelope = signer.sign(request.weights).to_json()
        took = await asyncio.gather(*(self._put(f"http://{pod}/v1/weights", envelope) for pod in request.pods))
        return sum(took)

    async def _digest(self, url: str, shown: str | None) -> GatewayDigest | None:
        try:
            answer = await self._get(url, shown, MAX_DIGEST_BYTES)
            digest = GatewayDigest.model_validate(answer)
        except (HttpError, ValidationError) as error:
            self._log.debug("a gateway is silent", url=url, reason=_short(error))
            return None
        if not plausible(digest):
            self._log.warning("a gateway's digest is not plausible", url=url)
            return None
        return digest

    async def _imbalance(self, url: str, shown: str | None) -> list[float]:
        """The largest layer's max/mean over EP ranks of each replica that had traffic."""
        try:
            answer = await self._get(url, shown, MAX_BOARD_BYTES)
            replicas = _REPLICAS.validate_python(answer)
        except (HttpError, ValidationError) as error:
            self._log.debug("a board is silent", url=url, reason=_short(error))
            return []
        found = []
        for replica in replicas:
            ratios = [layer.rank_max_over_mean for layer in replica.layers if layer.rank_max_over_mean is not None]
            # Of n ranks the largest is between 1 and n times the mean (give or take rounding); else it is no ratio.
            honest = [ratio for ratio in ratios if 0.999 <= ratio <= replica.ranks + 0.001]
            if honest:
                found.append(max(honest))
        return found

    async def _get(self, url: str, shown: str | None, max_bytes: int) -> Any:
        return await call_json(self._client, "GET", url, total_s=ANSWER_S, max_bytes=max_bytes, token=shown)

    async def _put(self, url: str, envelope: object) -> bool:
        try:
            await call_json(self._client, "PUT", url, envelope, total_s=ANSWER_S, max_bytes=MAX_DIGEST_BYTES)
        except HttpError as error:
            self._log.info("a gateway did not take the weights", url=url, reason=_short(error))
            return False
        return True

    def _pass(self, deployment: str) -> str | None:
        """None without a key: then no gateway of this release says anything."""
        signer = self._signed_by()
        if signer is None:
            return None
        if self._passes is None or self._passes.signer is not signer:
            self._passes = Passes(signer, self._clock)
        return self._passes.token(deployment)

    def _signed_by(self) -> Signer | None:
        """The signer, read again when its file has changed."""
        if self._key is None:
            self._without("signingKeyFile is not set: weights reach gateways by their configuration alone")
            return None
        try:
            stat = self._key.stat()
            at = (stat.st_mtime_ns, stat.st_size)
            if self._signer is None or at != self._read_at:
                self._signer, self._read_at = Signer.load(self._key), at
        except OSError as error:
            self._without(f"signingKeyFile {self._key}: cannot be read ({error.strerror})")
        except ValueError as error:
            self._without(f"signingKeyFile: {error}")
        else:
            self._said = ""
        return self._signer

    def _without(self, why: str) -> None:
        self._signer = None
        if why != self._said:
            self._said = why
            self._log.warning("weights are not sent", reason=why)


def plausible(digest: GatewayDigest) -> bool:
    """Whether a digest can be true: counts are counts, times are times, and none is beyond what one can be."""
    counts = [digest.knobs_version, digest.arrivals, digest.completed, digest.failed]
    counts += [digest.spilled, digest.shed, digest.held, digest.in_flight, digest.prompt_tokens, digest.output_tokens]
    for target in digest.targets:
        counts += [target.requests, target.failures, target.met, target.missed, target.in_flight]
    times = [value for value in (digest.ttft_p50_s, digest.ttft_p95_s, digest.itl_p95_s) if value is not None]
    return (
        0 <= digest.weights_version <= MAX_VERSION  # a status must be able to hold one more
        and all(0 <= count <= MAX_COUNT for count in counts)
        and all(0 <= value <= LONGEST_WINDOW_S * 24 for value in times)
        and math.isfinite(digest.window_s)
        and 0 < digest.window_s <= LONGEST_WINDOW_S
    )


def _short(error: Exception) -> str:
    """A log line of bounded length: part of it is what somebody else answered."""
    return str(error)[:300]
