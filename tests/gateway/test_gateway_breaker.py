"""The circuit breaker as a table of what happens to an upstream, with a fake clock."""

from __future__ import annotations

import pytest

from moe_core.breaker import PROBE_LEASE_S, Breaker, allows, on_abandoned, on_failure, on_send, on_success


def after(history: str) -> tuple[Breaker, float]:
    """Play events: s(end), f(ailure), o(k), a(bandoned); a digit waits so many seconds, + waits a minute."""
    breaker, now_s = Breaker(), 1000.0
    for event in history:
        if event == "s":
            assert allows(breaker, now_s), f"{history}: nothing may be sent"
            breaker = on_send(breaker, now_s)
        elif event == "f":
            breaker = on_failure(breaker, now_s)
        elif event == "o":
            breaker = on_success(breaker)
        elif event == "a":
            breaker = on_abandoned(breaker, now_s)
        else:
            now_s += PROBE_LEASE_S if event == "+" else float(event)
    return breaker, now_s


@pytest.mark.parametrize(
    ("history", "mode", "may_send"),
    [
        pytest.param("", "closed", True, id="new"),
        pytest.param("sfsf", "closed", True, id="two failures"),
        pytest.param("sfsfsosfsf", "closed", True, id="a success between starts the count again"),
        pytest.param("sfsfsf", "open", False, id="three in a row open it"),
        pytest.param("sssfff", "open", False, id="three at once open it"),
        pytest.param("ssssffff", "open", False, id="a late failure of an old request changes nothing"),
        pytest.param("sfsfsf1", "open", True, id="after a second a probe may go"),
        pytest.param("sfsfsf1s", "half-open", False, id="one probe at a time"),
        pytest.param("sfsfsf1so", "closed", True, id="a good probe closes it"),
        pytest.param("sfsfsf1sf", "open", False, id="a bad probe opens it again"),
        pytest.param("sfsfsf1sf1", "open", False, id="for longer"),
        pytest.param("sfsfsf1sf2", "open", True, id="for twice as long"),
        pytest.param("sfsfsf1sf2sf4sf8sf9", "open", False, id="and twice again"),
        pytest.param("sfsfsf1sa", "half-open", True, id="a probe whose client left frees the place"),
        pytest.param("sfsfsf1s+", "half-open", True, id="a lost probe's place is free after its lease"),
        pytest.param("sfsfsf1sf2sosfsf", "closed", True, id="closed again it is as new"),
    ],
)
def test_breaker(history: str, mode: str, may_send: bool) -> None:
    breaker, now_s = after(history)
    assert (breaker.mode, allows(breaker, now_s)) == (mode, may_send)


def test_the_open_time_is_bounded() -> None:
    breaker, now_s = Breaker(), 0.0
    for _ in range(50):
        now_s = max(now_s, breaker.until_s)
        breaker = on_failure(on_send(breaker, now_s), now_s)
    assert breaker.until_s - now_s == 10.0
