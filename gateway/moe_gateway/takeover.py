"""A stream broke after text had reached its client: who goes on with it, if anybody. A pure function.

An own revision continues the very text: vLLM takes a half-written message as the beginning of its answer. A closed API
does not, so there a user turn asks it to go on, and what it says twice is removed. Where the join cannot be right (a
tool call half written, reasoning, several choices, a grammar) the stream ends with its one honest error.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moe_api.enums import MidStream


class How(StrEnum):
    """What becomes of the stream; a metric label."""

    CONTINUE = "continue"
    SPLICE = "splice"
    STOP = "stop"


class Break(StrEnum):
    """Why it broke; a metric label."""

    LOST = "lost"
    ENDED_EARLY = "ended_early"
    SILENT = "silent"
    MALFORMED = "malformed"
    ERROR = "error"
    """The model said an error of its own."""
    REFUSED = "refused"
    """The model's error was about the request: another one would say the same."""
    STOPPING = "stopping"
    """The gateway's own end."""


class Why(StrEnum):
    """Why a stream is not gone on with; a metric label."""

    OFF = "off"
    CLIENT_GONE = "client_gone"
    DRAINING = "draining"
    COMPLETE = "complete"
    REFUSED = "refused"
    SPENT = "takeovers_spent"
    LATE = "deadline"
    REQUEST = "request"
    ANSWER = "answer"
    NOTHING_LEFT = "output_limit"
    NOBODY = "no_upstream"


@dataclass(frozen=True, slots=True)
class Broke:
    """How a stream broke after its first token. `error_event`: the upstream's own words, not sent on yet; with `told`
    they were."""

    why: Break
    detail: str
    finished: bool = False
    told: bool = False
    error_event: bytes = b""


@dataclass(frozen=True, slots=True)
class Sent:
    """What the client has of the answer. `bar`: the first thing in it that no other upstream can go on from. `blank`:
    those tokens at its end that are white space."""

    text: str
    tokens: int
    bar: str | None = None
    blank: int = 0

    def kept_tokens(self, how: How) -> int:
        """Tokens that the next attempt does not write again: white space at the end is written again by a revision."""
        return self.tokens - self.blank if how is How.CONTINUE else self.tokens


@dataclass(frozen=True, slots=True)
class Broken:
    """All that the decision may look at."""

    mode: MidStream
    why: Break
    sent: Sent
    finished: bool
    """A finish reason has been passed on."""
    at_revision: bool
    """It broke at an own revision, not at a target."""
    output_limit: int | None = None
    continue_bar: str | None = None
    """The field of the request that a continuation could not keep."""
    splice_bar: str | None = None
    client_gone: bool = False
    draining: bool = False
    takeovers_left: int = 1
    elapsed_s: float = 0.0
    deadline_s: float = 600.0
    revision: str | None = None
    """Where a continuation would go, by weights, breakers and load; None for nowhere."""
    target: str | None = None
    """Where a splice would go, by egress, rights, price, budget and share cap; None for nowhere."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`to` goes on by `how`; or nobody does, by `why`, with `detail` naming the field."""

    how: How
    to: str | None = None
    why: Why | None = None
    detail: str | None = None


def decide(broken: Broken) -> Verdict:
    """The verdict on a stream that broke. Own revisions first: they have the same model, and cost nothing more."""
    if (why := _never(broken)) is not None:
        return Verdict(How.STOP, why=why)
    if broken.sent.bar is not None:
        return Verdict(How.STOP, why=Why.ANSWER, detail=broken.sent.bar)
    if broken.output_limit is not None and broken.sent.tokens >= broken.output_limit:
        return Verdict(How.STOP, why=Why.NOTHING_LEFT)
    if broken.continue_bar is None and broken.revision is not None:
        return Verdict(How.CONTINUE, broken.revision)
    bar = broken.continue_bar
    if broken.mode is MidStream.SPLICE and broken.at_revision:
        if broken.splice_bar is None and broken.target is not None:
            return Verdict(How.SPLICE, broken.target)
        bar = bar or broken.splice_bar
    if bar is not None:
        return Verdict(How.STOP, why=Why.REQUEST, detail=bar)
    return Verdict(How.STOP, why=Why.NOBODY)


def _never(broken: Broken) -> Why | None:
    """What forbids every takeover, whoever could make it."""
    if broken.mode is MidStream.OFF:
        return Why.OFF
    if broken.client_gone:
        return Why.CLIENT_GONE
    if broken.draining or broken.why is Break.STOPPING:
        return Why.DRAINING
    if broken.finished:
        return Why.COMPLETE
    if broken.why is Break.REFUSED:
        return Why.REFUSED
    if broken.takeovers_left <= 0:
        return Why.SPENT
    return Why.LATE if broken.elapsed_s >= broken.deadline_s else None


def about_request(error: object) -> bool:
    """Whether an error in band says that the request itself cannot be answered, so that no other upstream would."""
    if not isinstance(error, dict):
        return False
    code = error.get("code")
    if isinstance(code, int) and not isinstance(code, bool):
        return 400 <= code < 500 and code not in {401, 402, 403, 404, 408, 429}
    return error.get("type") == "invalid_request_error"
