"""Puts a setting in force: next version, signed, to the board and every gateway, until each rank has acknowledged it.

The board comes first: without it nothing is sent, so a change is never half applied. The same envelope is sent again
until it is answered; receivers take a version once, so a lost answer doubles nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import aiohttp
from pydantic import ValidationError

from moe_core.clock import Clock
from moe_core.http import HttpError, call_json
from moe_core.log import Log
from moe_core.passes import Passes
from moe_core.retry import Backoff, retry
from moe_core.setting import Setting
from moe_core.signing import Signer
from moe_core.wire import Ack, Knobs, Signed

POST_DEADLINE_S = 3.0
ACK_DEADLINE_S = 10.0
ACK_POLL_S = 0.1
CALL_S = 2.0


class ActuationFailed(Exception):
    """The board is not known to have taken the knobs.

    `doubtful` are knobs whose answer was lost: the board may have them all the same.
    """

    def __init__(self, message: str, doubtful: Knobs | None = None) -> None:
        self.doubtful = doubtful
        super().__init__(message)


class Overtaken(Exception):
    """Somebody else sent a newer version. `knobs` is what the board has now, where it says so."""

    def __init__(self, version: int, knobs: Knobs | None) -> None:
        self.version = version
        self.knobs = knobs
        super().__init__(f"the board already has version {version}: another writer changed the knobs")


class Lost(Exception):
    """No usable answer yet; worth another attempt."""


@dataclass(frozen=True)
class Sent:
    """Knobs that the board has taken."""

    knobs: Knobs
    envelope: Signed
    sent_at_s: float


@dataclass(frozen=True)
class AckReport:
    """Who has put a version in force so far."""

    version: int
    complete: bool
    seconds: float | None
    missing: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


class Actuator:
    """The one sender of knobs for one deployment."""

    def __init__(
        self,
        *,
        deployment: str,
        board_url: str,
        gateway_urls: Iterable[str],
        signer: Signer,
        client: aiohttp.ClientSession,
        clock: Clock,
        log: Log,
        may_send: Callable[[], bool] = lambda: True,
    ) -> None:
        """`may_send`: whether this process is the one that may change knobs now."""
        self._deployment = deployment
        self._board = board_url.rstrip("/")
        self._may_send = may_send
        self.gateways: tuple[str, ...] = ()
        """Admin addresses of every pod of the gateway."""
        self.found_key = ""
        """Id of the key that signed the knobs that the board hands out."""
        self._signer = signer
        self._passes = Passes(signer, clock)
        self._client = client
        self._clock = clock
        self._log = log
        self.version = 0
        self._last: Sent | None = None
        self._gateway_errors: dict[str, str] = {}
        self.reach(gateway_urls)

    def reach(self, gateway_urls: Iterable[str]) -> None:
        """The gateway's pods from now on. One that is new is behind, and is sent the knobs with the next reading."""
        self.gateways = tuple(url.rstrip("/") for url in gateway_urls)
        self._gateway_errors = {url: why for url, why in self._gateway_errors.items() if url in self.gateways}

    @property
    def shown(self) -> str:
        """The pass for what is read of this deployment."""
        return self._passes.token(self._deployment)

    @property
    def signed_by_us(self) -> bool:
        """Whether what the board hands out was signed by our key: by this process, or one like it."""
        return self.found_key == self._signer.key_id

    def heard(self, versions: Iterable[int]) -> None:
        """Note versions in force elsewhere: the next one must be above them, even after a board lost its memory."""
        self.version = max([self.version, *versions])

    async def current(self) -> Knobs | None:
        """The knobs that the board hands out now; None when it has none. Raises HttpError where it does not answer."""
        try:
            answer = await call_json(self._client, "GET", f"{self._board}/v1/knobs", total_s=CALL_S, token=self.shown)
        except HttpError as error:
            if error.status == 404:
                return None
            raise
        try:
            envelope = Signed.model_validate(answer)
            knobs = Knobs.model_validate_json(envelope.payload)
        except ValidationError:
            raise HttpError("GET", f"{self._board}/v1/knobs", 200, "the answer is no signed Knobs document") from None
        self.found_key = envelope.key_id
        self.heard([knobs.version])
        return knobs

    async def send(self, setting: Setting) -> Sent:
        """Give the board the next version, and the gateways after it. Raises ActuationFailed or Overtaken."""
        self._fence()
        try:
            await self.current()
        except HttpError as error:
            raise ActuationFailed(f"knobs were not sent: {error}") from None
        knobs = setting.knobs(self._deployment, self.version + 1)
        sent = Sent(knobs, self._signer.sign(knobs), self._clock.monotonic())
        await self._to_board(sent)
        self.version, self._last = knobs.version, sent
        await self._to_gateways(sent)
        return sent

    async def resend(self, in_force: Knobs | None, gateway_versions: dict[str, int]) -> None:
        """Repair what was lost: a board without our version, gateways behind it. Same version, same envelope."""
        last = self._last
        if last is None or last.knobs.version != self.version or not self._may_send():
            return
        if in_force is None or in_force.version < last.knobs.version:
            self._log.warning("the board lost the knobs: sending them again", version=last.knobs.version)
            await self._to_board(last)
        behind = [url for url in self.gateways if gateway_versions.get(url, self.version) < self.version]
        if behind:
            self._log.warning("gateways are behind: sending the knobs again", version=self.version, gateways=behind)
            await self._to_gateways(last, behind)

    def adopt(self, envelope_of: Knobs) -> None:
        """Make knobs that the board already has the ones to re-send; signed anew, since content and version agree."""
        self._last = Sent(envelope_of, self._signer.sign(envelope_of), self._clock.monotonic())
        self.version = max(self.version, envelope_of.version)

    async def acks(self, sent: Sent) -> AckReport:
        """Who has acknowledged by now."""
        version = sent.knobs.version
        try:
            url = f"{self._board}/v1/acks?version={version}"
            answer = await call_json(self._client, "GET", url, total_s=CALL_S, token=self.shown)
            acks = [Ack.model_validate(item) for item in answer["acks"]]
            expected = [(str(item["replica"]), int(item["ranks"])) for item in answer["expected"]]
            complete = bool(answer["complete"])
        except (HttpError, ValidationError, KeyError, TypeError, ValueError) as error:
            return AckReport(version, complete=False, seconds=None, missing=(f"board: {type(error).__name__}",))
        have = {(ack.replica, ack.rank) for ack in acks if ack.error is None}
        missing = [f"{name}/{rank}" for name, ranks in expected for rank in range(ranks) if (name, rank) not in have]
        missing += [f"gateway {url}" for url in self._gateway_errors]
        errors = tuple(f"{ack.replica}/{ack.rank}: {ack.error}" for ack in acks if ack.error is not None)
        done = complete and not missing and not errors
        seconds = self._clock.monotonic() - sent.sent_at_s if done else None
        return AckReport(version, complete=done, seconds=seconds, missing=tuple(missing), errors=errors)

    async def settle(self, sent: Sent) -> AckReport:
        """Wait until every rank and gateway has acknowledged, one has refused, or the deadline has passed."""
        deadline = sent.sent_at_s + ACK_DEADLINE_S
        while True:
            report = await self.acks(sent)
            if report.complete or report.errors or self._clock.monotonic() >= deadline:
                return report
            if self._gateway_errors:
                await self._to_gateways(sent, tuple(self._gateway_errors))
            await self._clock.sleep(ACK_POLL_S)

    def _fence(self) -> None:
        if not self._may_send():
            raise ActuationFailed("knobs were not sent: another process leads")

    async def _to_board(self, sent: Sent) -> None:
        url = f"{self._board}/v1/knobs"

        async def attempt() -> None:
            self._fence()
            try:
                await call_json(self._client, "POST", url, sent.envelope.to_json(), total_s=CALL_S)
            except HttpError as error:
                if error.status == 0 or error.status >= 500 or error.status == 429:
                    raise Lost(str(error)) from None
                if error.status == 409:
                    raise await self._overtaken(error) from None
                raise ActuationFailed(f"the board refused the knobs: {error}") from None

        backoff = Backoff(initial_s=0.1, max_s=1.0, attempts=8, deadline_s=POST_DEADLINE_S)
        try:
            await retry(attempt, retry_on=(Lost,), backoff=backoff, clock=self._clock)
        except Lost as error:
            why = f"the board took no knobs within {POST_DEADLINE_S:g} s: {error}"
            raise ActuationFailed(why, doubtful=sent.knobs) from None

    async def _overtaken(self, refusal: HttpError) -> Overtaken:
        try:
            version = int(json.loads(refusal.detail)["version"])
        except (ValueError, KeyError, TypeError):
            version = self.version + 1
        self.heard([version])
        try:
            knobs = await self.current()
        except HttpError:
            knobs = None
        return Overtaken(version, knobs)

    async def _to_gateways(self, sent: Sent, urls: Iterable[str] | None = None) -> None:
        targets = self.gateways if urls is None else tuple(url for url in urls if url in self.gateways)
        results = await asyncio.gather(*(self._to_gateway(url, sent) for url in targets))
        for url, problem in zip(targets, results, strict=True):
            if problem is None:
                self._gateway_errors.pop(url, None)
            else:
                self._gateway_errors[url] = problem
                self._log.warning(
                    "a gateway did not take the knobs; it will be sent them again", gateway=url, why=problem
                )

    async def _to_gateway(self, url: str, sent: Sent) -> str | None:
        try:
            answer = await call_json(self._client, "POST", f"{url}/v1/knobs", sent.envelope.to_json(), total_s=CALL_S)
            ack = Ack.model_validate(answer)
        except HttpError as error:
            return str(error)
        except ValidationError:
            return "its answer is no acknowledgement"
        return ack.error
