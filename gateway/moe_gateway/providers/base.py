"""What the gateway asks of a provider's adapter, and how one says what it cannot take.

An adapter is pure: bytes and documents in, bytes and documents out. Sending, time limits and money are the gateway's.
OpenAI's chat form is the one that all others are translated from and to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from moe_core.clock import Clock
from moe_core.config import TargetConfig
from moe_gateway.openai_api import ApiRequest
from moe_gateway.sse import SseScanner, StreamReader


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A field of a request that a target lacks, and what a client can do about it."""

    field: str
    remedy: str


class Refusal(Exception):
    """Raised inside a translation: this request cannot be said in the other form."""

    def __init__(self, field: str, remedy: str) -> None:
        super().__init__(f"{field}: {remedy}")
        self.unsupported = Unsupported(field, remedy)


class Adapter(ABC):
    """How to speak with one target."""

    URL: ClassVar[str | None] = None
    """Base address where the configuration names none."""

    def __init__(self, target: TargetConfig, clock: Clock) -> None:
        self.target = target
        self.clock = clock

    def lacks(self, request: ApiRequest) -> Unsupported | None:
        """`takes`, asked once for a request however often it is decided on."""
        if self not in request.verdicts:
            request.verdicts[self] = self.takes(request)
        verdict = request.verdicts[self]
        return verdict if isinstance(verdict, Unsupported) else None

    @abstractmethod
    def takes(self, request: ApiRequest) -> Unsupported | None:
        """What of the request this target lacks; None where it takes all of it. Nothing is ever silently dropped."""

    @abstractmethod
    def body(self, request: ApiRequest, output_cap: int | None) -> bytes:
        """The provider's request. `output_cap` bounds the output where the request has no limit of its own."""

    @abstractmethod
    def path(self, request: ApiRequest) -> str:
        """What follows the base URL."""

    def headers(self, key: str | None) -> dict[str, str]:
        """Headers that carry our key, and the provider's version where it wants one."""
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def native(self, request: ApiRequest) -> bool:
        """Whether `stream` and a whole answer's bytes are Anthropic's, for a client that asked in that form. All else
        that an adapter gives is OpenAI's."""
        return False

    def status(self, status: int, body: bytes) -> int:
        """The status that an error means: a provider may hide a bad key behind 400."""
        return status

    def answer(self, status: int, body: bytes) -> bytes:
        """A whole answer, or an error, in OpenAI's form. Raises ValueError for what is neither."""
        return body

    def stream(self, request: ApiRequest) -> StreamReader:
        """A reader for one streamed answer."""
        return SseScanner(strip_usage=not request.include_usage, keep_error=False)
