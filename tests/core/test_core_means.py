"""Clock, retry, log and signatures: the means that every process shares."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_core import metrics
from moe_core.clock import FakeClock
from moe_core.log import REDACTED, configure, get_log, redact
from moe_core.retry import Backoff, RetryAfter, retry
from moe_core.signing import CommandInvalid, SignatureRefused, Signer, Verifier
from moe_core.wire import Knobs, Signed, Weights


class Boom(Exception):
    pass


async def run_with_time(clock: FakeClock, coroutine: asyncio.Future[object] | object, seconds: float) -> object:
    task = asyncio.ensure_future(coroutine)  # type: ignore[arg-type]
    await clock.advance(seconds)
    return await task


async def test_fake_clock_wakes_sleepers_in_order() -> None:
    clock, seen = FakeClock(), []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        seen.append((name, clock.monotonic()))

    tasks = [asyncio.ensure_future(sleeper(n, s)) for n, s in (("late", 3.0), ("soon", 1.0))]
    await clock.advance(2.0)
    assert seen == [("soon", 1.0)]
    await clock.advance(2.0)
    assert seen == [("soon", 1.0), ("late", 3.0)]
    await asyncio.gather(*tasks)


async def test_a_jump_moves_wall_time_alone() -> None:
    clock = FakeClock(1000.0)
    clock.jump(-500)
    assert (clock.time(), clock.monotonic()) == (500.0, 0.0)


async def test_retry_returns_the_first_success() -> None:
    clock, calls = FakeClock(), []

    async def attempt() -> str:
        calls.append(clock.monotonic())
        if len(calls) < 3:
            raise Boom
        return "ok"

    result = await run_with_time(
        clock, retry(attempt, retry_on=(Boom,), backoff=Backoff(), clock=clock, rng=random.Random(1)), 60
    )
    assert result == "ok"
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("name", "backoff", "most_calls"),
    [
        ("attempts run out", Backoff(attempts=3), 3),
        ("time runs out", Backoff(initial_s=1, attempts=100, deadline_s=5), 30),
    ],
)
async def test_retry_gives_up(name: str, backoff: Backoff, most_calls: int) -> None:
    clock, calls = FakeClock(), []

    async def attempt() -> None:
        calls.append(clock.monotonic())
        raise Boom(name)

    with pytest.raises(Boom, match=name):
        await run_with_time(clock, retry(attempt, retry_on=(Boom,), backoff=backoff, clock=clock), 500)
    assert len(calls) <= most_calls
    assert backoff.deadline_s is None or calls[-1] <= backoff.deadline_s


async def test_retry_waits_as_long_as_it_was_told() -> None:
    clock, calls = FakeClock(), []

    async def attempt() -> None:
        calls.append(clock.monotonic())
        if len(calls) == 1:
            raise RetryAfter(30.0, Boom())

    await run_with_time(clock, retry(attempt, retry_on=(Boom,), backoff=Backoff(), clock=clock), 100)
    assert calls[1] >= 30.0


async def test_other_errors_pass_at_once() -> None:
    async def attempt() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await retry(attempt, retry_on=(Boom,), backoff=Backoff(), clock=FakeClock())


@given(st.integers(1, 500))
def test_backoff_never_exceeds_its_bound(failures: int) -> None:
    assert 0 < Backoff(initial_s=0.1, max_s=7).bound_s(failures) <= 7


@pytest.mark.parametrize(
    "secret",
    ["sk-abcdefghijklmnop", "Bearer abcdefghijkl", "AIzaSyA1234567890123456789012345678901", "hf_abcdefghijklmnopqrst"],
)
def test_log_lines_hold_no_secret(secret: str) -> None:
    stream = io.StringIO()
    configure("INFO", stream)
    get_log("test", deployment="a/b").info(f"calling with {secret}", detail={"nested": [secret]}, api_key=secret)
    line = json.loads(stream.getvalue())
    assert secret not in stream.getvalue()
    assert line["deployment"] == "a/b"
    assert line["api_key"] == REDACTED
    configure("INFO")


def test_log_lines_are_json_with_exceptions() -> None:
    stream = io.StringIO()
    configure("INFO", stream)
    try:
        raise ValueError("sk-abcdefghijklmnop")
    except ValueError:
        get_log("test").exception("failed", number=3)
    line = json.loads(stream.getvalue())
    assert (line["level"], line["number"], line["logger"]) == ("error", 3, "moestack.test")
    assert "sk-abc" not in line["exception"]
    configure("INFO")
    assert logging.getLogger("moestack").handlers


def test_redact_keeps_what_is_no_secret() -> None:
    assert redact({"tokens": 5, "max_tokens": 7, "note": "ok"}) == {"tokens": 5, "max_tokens": 7, "note": "ok"}


KNOBS = Knobs(deployment="a/b", version=7)


def test_a_signed_command_opens() -> None:
    signer = Signer.generate()
    assert Verifier([signer.public_pem()]).open(signer.sign(KNOBS), Knobs) == KNOBS


def forged(envelope: Signed, **changes: str) -> Signed:
    return envelope.model_copy(update=changes)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("payload", {"payload": KNOBS.model_copy(update={"version": 8}).model_dump_json(by_alias=True)}),
        ("kind", {"kind": "Weights"}),
        ("signature", {"signature": "AAAA"}),
        ("no base64", {"signature": "%%%"}),
        ("key", {"key_id": "0" * 16}),
    ],
)
def test_a_changed_command_is_refused(name: str, change: dict[str, str]) -> None:
    signer = Signer.generate()
    with pytest.raises(SignatureRefused):
        Verifier([signer.public_pem()]).open(forged(signer.sign(KNOBS), **change), Knobs)


def test_an_unknown_key_is_refused_and_no_keys_refuse_all() -> None:
    envelope = Signer.generate().sign(KNOBS)
    for keys in ([], [Signer.generate().public_pem()]):
        with pytest.raises(SignatureRefused):
            Verifier(keys).open(envelope, Knobs)


def test_weights_do_not_pass_for_knobs() -> None:
    signer = Signer.generate()
    envelope = signer.sign(Weights(deployment="a/b", version=1, percent={"r1": 100}))
    with pytest.raises(SignatureRefused, match="expected a signed Knobs"):
        Verifier([signer.public_pem()]).open(envelope, Knobs)


def test_a_well_signed_document_of_another_form_is_invalid() -> None:
    signer = Signer.generate()
    good = signer.sign(KNOBS)
    private = signer._private
    import base64

    payload = '{"deployment":"a/b","version":0}'
    signature = base64.b64encode(private.sign(f"Knobs\n{payload}".encode())).decode()
    with pytest.raises(CommandInvalid, match="version"):
        Verifier([signer.public_pem()]).open(forged(good, payload=payload, signature=signature), Knobs)


def test_a_key_file_is_private_and_loads_again(tmp_path: Path) -> None:
    signer, path = Signer.generate(), tmp_path / "key.pem"
    signer.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Signer.load(path).key_id == signer.key_id
    assert "PRIVATE" not in repr(signer)


def test_a_bad_key_file_is_named_and_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text("-----BEGIN PRIVATE KEY-----\nsecretsecret\n-----END PRIVATE KEY-----\n")
    with pytest.raises(ValueError, match=r"key\.pem") as raised:
        Signer.load(path)
    assert "secretsecret" not in str(raised.value)


def test_metric_names_follow_prometheus_conventions() -> None:
    names = [metric.name for metric in metrics.ALL]
    assert len(names) == len(set(names))
    for metric in metrics.ALL:
        assert metric.name.startswith(("moestack_", "gen_ai_"))
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help


@given(st.decimals(min_value="0.01", max_value="99", places=3), st.integers(1, 10**9))
def test_knobs_survive_the_wire(gamma: object, version: int) -> None:
    knobs = Knobs.model_validate(
        {"deployment": "a/b", "version": version, "experts": {"overflow": "Drop", "capacityFactorPrefill": str(gamma)}}
    )
    text = knobs.model_dump_json(by_alias=True, exclude_none=True)
    assert Knobs.model_validate_json(text) == knobs
    assert isinstance(json.loads(text)["experts"]["capacityFactorPrefill"], str)
