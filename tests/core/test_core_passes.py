"""Passes: who is let in by one, and for how long."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest

from moe_core.clock import FakeClock
from moe_core.passes import LONGEST_S, MAX_CHARS, PASS_S, REMEMBERED, Door, Passes
from moe_core.signing import Signer, Verifier
from moe_core.wire import Knobs, ReadPass, Signed

NAME = "team/moe"
SIGNER, OTHER = Signer.generate(), Signer.generate()
KNOBS = Knobs(deployment=NAME, version=1)


def door(clock: FakeClock, *signers: Signer) -> Door:
    verifier = Verifier([signer.public_pem() for signer in signers])
    return Door(NAME, lambda: verifier, clock)


def sealed(envelope: Signed) -> str:
    return base64.urlsafe_b64encode(envelope.model_dump_json(by_alias=True).encode()).decode()


def passing(until_s: float, deployment: str = NAME, signer: Signer = SIGNER) -> str:
    return sealed(signer.sign(ReadPass(deployment=deployment, until_s=until_s)))


def bent(now_s: float) -> str:
    """The signature of one pass under the text of another."""
    good = SIGNER.sign(ReadPass(deployment=NAME, until_s=now_s + 1))
    return sealed(good.model_copy(update={"payload": good.payload.replace(NAME, "team/two")}))


CASES: list[tuple[str, Callable[[float], str], bool]] = [
    ("a pass that holds", lambda now: f"Bearer {passing(now + 60)}", True),
    ("the scheme in small letters", lambda now: f"bearer {passing(now + 60)}", True),
    ("one that ends as late as may be", lambda now: f"Bearer {passing(now + LONGEST_S)}", True),
    ("one that ends later", lambda now: f"Bearer {passing(now + LONGEST_S + 1)}", False),
    ("one that has ended", lambda now: f"Bearer {passing(now)}", False),
    ("one for another deployment", lambda now: f"Bearer {passing(now + 60, 'team/two')}", False),
    ("one by a key that is not trusted", lambda now: f"Bearer {passing(now + 60, signer=OTHER)}", False),
    ("a text that was changed", lambda now: f"Bearer {bent(now)}", False),
    ("a command in place of a pass", lambda _: f"Bearer {sealed(SIGNER.sign(KNOBS))}", False),
    ("another scheme", lambda now: f"Basic {passing(now + 60)}", False),
    ("no scheme", lambda now: passing(now + 60), False),
    ("nothing", lambda _: "", False),
    ("an empty token", lambda _: "Bearer ", False),
    ("no base64", lambda _: "Bearer {}", False),
    ("letters beyond ASCII", lambda _: "Bearer é", False),
    ("base64 of no JSON", lambda _: "Bearer " + base64.urlsafe_b64encode(b"hello").decode(), False),
    ("more than fits", lambda _: "Bearer " + "A" * (MAX_CHARS + 1), False),
]  # fmt: skip


@pytest.mark.parametrize(("shown", "wanted"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_who_is_let_in(shown: Callable[[float], str], wanted: bool) -> None:
    clock = FakeClock()
    it = door(clock, SIGNER)
    header = shown(clock.time())
    assert it.admits(header) is wanted
    assert it.admits(header) is wanted, "and the second time alike"


def test_without_trusted_keys_nobody_is_let_in() -> None:
    clock = FakeClock()
    assert not door(clock).admits(f"Bearer {passing(clock.time() + 60)}")


async def test_a_pass_ends_though_it_was_good_before() -> None:
    clock = FakeClock()
    it, token = door(clock, SIGNER), passing(clock.time() + 60)
    assert it.admits(f"Bearer {token}")
    await clock.advance(60)
    assert not it.admits(f"Bearer {token}")


def test_a_key_that_is_trusted_no_longer_opens_nothing() -> None:
    clock, trusted = FakeClock(), [Verifier([SIGNER.public_pem()])]
    it = Door(NAME, lambda: trusted[-1], clock)
    header = f"Bearer {passing(clock.time() + 60)}"
    assert it.admits(header)
    trusted.append(Verifier([OTHER.public_pem()]))
    assert not it.admits(header)


def test_many_passes_are_not_all_remembered() -> None:
    clock = FakeClock()
    it = door(clock, SIGNER)
    for second in range(1, 3 * REMEMBERED):
        assert it.admits(f"Bearer {passing(clock.time() + second)}")
    assert len(it._known) == REMEMBERED


async def test_a_pass_is_signed_anew_before_it_ends_and_not_for_each_question() -> None:
    clock = FakeClock()
    passes, it = Passes(SIGNER, clock), door(clock, SIGNER)
    first = passes.token(NAME)
    assert passes.token(NAME) == first
    assert passes.token("team/two") != first
    seen = {first}
    for _ in range(20):
        await clock.advance(PASS_S / 5)
        seen.add(passes.token(NAME))
        assert it.admits(f"Bearer {passes.token(NAME)}")
    assert 5 <= len(seen) <= 10


def test_a_clock_that_is_set_back_gives_no_pass_that_ends_too_late() -> None:
    clock = FakeClock()
    passes = Passes(SIGNER, clock)
    passes.token(NAME)
    clock.jump(-86_400)
    assert door(clock, SIGNER).admits(f"Bearer {passes.token(NAME)}")
