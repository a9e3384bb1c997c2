"""Looks at running streams: the length of a step from the gaps of the last second, and nothing from too few."""

from __future__ import annotations

import pytest

from moe_core.latency import Look
from moe_gateway.ledger import Ledger
from moe_gateway.looks import Counted, look


def counted(at_s: float, gaps: int = 0, prompts: float = 0.0, streams: int = 8, running: float = 8.0) -> Counted:
    return Counted(at_s, gaps, prompts, streams, running)


def test_eight_streams_with_forty_tokens_a_second_each_take_steps_of_25_ms() -> None:
    seen = look(counted(10.0, gaps=100), counted(11.0, gaps=420, prompts=4000.0), replicas=1)
    assert seen == Look(itl_s=0.025, running=8.0, prompt_tokens=pytest.approx(100.0))


def test_of_several_replicas_each_has_its_share() -> None:
    seen = look(counted(10.0), counted(11.0, gaps=320, prompts=4000.0), replicas=2)
    assert seen == Look(itl_s=0.025, running=4.0, prompt_tokens=pytest.approx(50.0))


@pytest.mark.parametrize(
    ("why", "now"),
    [
        ("too few tokens", counted(11.0, gaps=3)),
        ("no time has passed", counted(10.0, gaps=100)),
    ],
)
def test_too_little_tells_nothing(why: str, now: Counted) -> None:
    assert look(counted(10.0), now, replicas=1) is None, why


def test_a_request_that_does_not_stream_is_no_stream_in_the_ledger() -> None:
    ledger = Ledger()
    ledger.sent(1, 100.0, now_s=0.0)
    ledger.sent(2, 100.0, first_token_due_s=1.0, now_s=0.0)
    ledger.first_token(1, 1.0)
    assert ledger.counts(2.0) == (0, 0.0, 2)
    assert ledger.streams == 1
    ledger.ended(2)
    ledger.ended(1)
    assert (ledger.streams, ledger.in_flight) == (0, 0)
