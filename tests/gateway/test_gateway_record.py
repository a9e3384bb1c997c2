"""The policy in the simulator is that in the process: what a gateway decided, decided again from what it wrote."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cli.outcome import Exit, Refusal
from moe_cli.replay import show
from moe_cli.say import Say
from moe_core import recorded
from moe_core.clock import SystemClock
from moe_core.config import RecordConfig
from moe_core.forecast import EngineReport, Failure, RevisionView, SpillContext, TargetView, Thresholds
from moe_core.latency import LatencyEstimate, observe_ttft
from moe_core.log import get_log
from moe_core.recorded import Noted, RecordInvalid, decode, encode, replay
from moe_core.spill import Action, SpillState, decide
from moe_gateway.recorder import Recorder
from moe_planner.sim.policy import Policy
from tests.gateway.fake_upstream import Behaviour, FakeUpstream
from tests.gateway.harness import KEY, chat, config, knobs, running, send, weights
from tests.gateway.harness import KEYS as TRUSTED
from tests.gateway.test_gateway_shadow import QUICK

IN_THE_SIMULATOR = Policy().decide

seconds = st.floats(0, 1e4)


def learned(seen: list[tuple[float, float]]) -> LatencyEstimate:
    """An estimate that has seen these: prompt tokens ahead, TTFT."""
    known = LatencyEstimate()
    for work, ttft_s in seen:
        known = observe_ttft(known, 5.0, work_tokens=work, prompt_tokens=9, slot_wait_s=0, ttft_s=ttft_s)
    return known


estimates = st.lists(st.tuples(st.floats(1, 1e4), st.floats(0.01, 9)), max_size=3).map(learned)
revisions = st.builds(
    RevisionView,
    name=st.sampled_from(["a", "b", "c"]),
    weight=st.integers(0, 100),
    available=st.booleans(),
    waiting_requests=st.integers(0, 300),
    waiting_tokens=st.floats(0, 1e6),
    report=st.none() | st.builds(EngineReport, st.just(1), st.just(2), st.floats(0, 1), st.just(64), seconds),
    estimate=estimates,
)
targets = st.builds(
    TargetView,
    name=st.sampled_from(["x", "y"]),
    available=st.booleans(),
    cost_usd=st.decimals(0, 1, places=6),
    estimate=estimates,
)
contexts = st.builds(
    SpillContext,
    now_s=seconds,
    prompt_tokens=seconds,
    ttft_slo_s=st.floats(0.01, 60),
    thresholds=st.builds(Thresholds, st.floats(0, 1), st.floats(0, 1)),
    revisions=st.lists(revisions, max_size=3, unique_by=lambda r: r.name).map(tuple),
    targets=st.lists(targets, max_size=2, unique_by=lambda t: t.name).map(tuple),
    budget_left_usd=st.none() | st.decimals(0, 1, places=6),
    elapsed_s=seconds,
    tried=st.frozensets(st.sampled_from(["a", "x"])),
    local_failure=st.none() | st.sampled_from(Failure),
    itl_slo_s=st.just(float("inf")) | st.floats(0.01, 1),
    session=st.none() | st.text(max_size=8),
)


def lines_of(given_contexts: list[SpillContext]) -> list[bytes]:
    """A file as a gateway writes it."""
    lines, state = [recorded.head()], SpillState()
    for number, context in enumerate(given_contexts):
        decision, after = decide(context, state)
        lines.append(recorded.line(Noted("live", number, context, decision, state, number > 0), whole=False))
        state = after
    return lines


@given(contexts)
def test_a_context_comes_back_bit_for_bit(context: SpillContext) -> None:
    assert decode(SpillContext, json.loads(json.dumps(encode(context)))) == context


@settings(max_examples=40)
@given(st.lists(contexts, max_size=4))
def test_what_was_decided_is_decided_again(given_contexts: list[SpillContext]) -> None:
    found = replay(lines_of(given_contexts), IN_THE_SIMULATOR)
    assert (found.decisions, found.differing) == (len(given_contexts), ())


BUSY = SpillContext(
    10.0,
    500.0,
    0.5,
    Thresholds(0.5, 1.0),
    (RevisionView("r", 100, waiting_requests=9, waiting_tokens=9e4, running=1),),
    (TargetView("api"),),
    Decimal(1),
)


def test_another_policy_is_told_by_line() -> None:
    def stubborn(context: SpillContext, state: SpillState) -> Any:
        return decide(replace(context, targets=()), state)

    found = replay(lines_of([BUSY, replace(BUSY, thresholds=Thresholds(1.0, 1.0)), BUSY]), stubborn)
    assert [differing.line for differing in found.differing] == [2, 4]
    assert (found.differing[0].was["action"], found.differing[0].now["action"]) == ("spill", "shed")


@pytest.mark.parametrize(
    ("name", "lines", "says"),
    [
        ("no file of ours", [b'{"a": 1}\n'], "line 1: a file of decisions begins with"),
        ("no JSON", [b"nonsense\n"], "line 1: it is no JSON"),
        ("another version", [b'{"recorded": "moestack decisions", "version": 2}\n'], "line 1: a file"),
        ("no context", [recorded.head(), b'{"chain": "live"}\n'], "line 2: it is no decision"),
        ("a beginning that is gone", [recorded.head(), lines_of([BUSY, BUSY])[2]], "line 2: it is no decision"),
        ("an unknown field", [recorded.head(), lines_of([BUSY])[1].replace(b'"now_s"', b'"when"')], "line 2"),
        ("a list", [recorded.head(), b"[]\n"], "line 2"),
    ],
)
def test_what_cannot_be_read_is_told_by_line(name: str, lines: list[bytes], says: str) -> None:
    with pytest.raises(RecordInvalid, match=f"^{says}"):
        replay(lines)


def test_a_line_that_was_cut_off_ends_the_file() -> None:
    lines = lines_of([BUSY, BUSY])
    assert replay([*lines[:-1], lines[-1][:40]]).decisions == 1


async def test_files_are_bounded_and_each_can_be_read_alone(tmp_path: Path) -> None:
    made = RecordConfig(dir=str(tmp_path / "d"), file_bytes=4096, files=3)
    recorder, state = Recorder(made, SystemClock(), get_log("test")), SpillState()
    for _ in range(100):
        decision, after = decide(BUSY, state)
        recorder.note("live", BUSY, state, decision, after)
        state = after
        await recorder.flush()
    await recorder.close()
    files = sorted((tmp_path / "d").iterdir())
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) < 3 * (4096 + 2048)
    assert all(not replay(file.read_bytes().splitlines(keepends=True)).differing for file in files)
    assert show(files, Say()) is Exit.OK


async def test_a_folder_that_cannot_be_written_stops_no_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    record = {"dir": str(tmp_path / "file" / "d")}
    async with FakeUpstream() as local, running(config(local, record=record)) as client:
        assert (await client.post(chat())).status == 200
        assert client.server.gateway.recorder is not None
        await client.server.gateway.recorder.flush()
        assert (await client.post(chat())).status == 200


SECRET = "the moon is made of regolith"


@pytest.mark.parametrize("mode", ["Active", "Shadow"])
async def test_a_gateway_under_a_bursty_trace_decides_as_the_simulator_would(mode: str, tmp_path: Path) -> None:
    """Two revisions, one that fails at times, tiers and sessions; weights and thresholds change on the way."""
    draw, key = random.Random(7), tmp_path / "key"
    key.write_text(KEY)
    folder = tmp_path / "decisions"
    async with FakeUpstream() as first, FakeUpstream() as second, FakeUpstream(Behaviour(first_s=0.01)) as api:
        first.default = second.default = Behaviour(tokens=4, gap_s=0.01, first_s=0.02)
        first.behaviours = [
            Behaviour(first_s=draw.choice((0.01, 0.1)), status=draw.choice((200,) * 6 + (503, 500))) for _ in range(80)
        ]
        made = config(
            [first, second],
            api,
            key_file=key,
            price=("1", "2"),
            stateDir=str(tmp_path),
            spill={"usdPerDay": "1", "missProbability": 0.3, "mode": mode},
            slo={"ttftP95S": 0.06, "itlP95S": 0.05},
            tiers=[{"name": "gold", "tenants": ["acme"], "slo": {"ttftP95S": 0.03, "itlP95S": 0.02}}],
            sessions=["Header"],
            record={"dir": str(folder), "fileBytes": 1 << 22},
            weights={"r0": 50, "r1": 50},
            trustedKeys=list(TRUSTED),
        )
        async with running(made) as client:
            client.server.gateway.upstreams["t0"].estimate = QUICK
            for burst in range(8):
                if burst == 3:
                    assert (await send(client, weights(1, r0=90, r1=10))).status == 200
                if burst == 5:
                    assert (await send(client, knobs(1, miss_probability=0.1))).status == 200
                asked = [
                    client.post(
                        chat(draw.random() < 0.7, note=SECRET, pad="x" * draw.randrange(2000)),
                        x_moestack_tenant=draw.choice(("acme", "initech")),
                        x_moestack_session=f"s{draw.randrange(4)}",
                    )
                    for _ in range(draw.choice((3, 25)))
                ]
                await asyncio.gather(*asked)
                await asyncio.sleep(draw.expovariate(20))
            served = len(client.server.gateway.calls)
    raw = b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
    lines = raw.splitlines(keepends=True)
    found = replay(lines, IN_THE_SIMULATOR)
    assert served == 0
    assert found.differing == ()
    rows = [json.loads(line) for line in lines[1:]]
    live = [row for row in rows if row["chain"] == "live"]
    actions = Counter(row["decision"]["action"] for row in live)
    assert found.decisions == len(rows) >= 80
    assert sum("state" not in row for row in live) > 0.8 * len(live), "states follow one another"
    assert actions[Action.LOCAL] > 0
    if mode == "Active":
        assert actions[Action.SPILL] >= len(api.requests) > 0, "some find no budget of retries left"
    else:
        assert api.requests == []
        assert any(row["decision"]["action"] == "spill" for row in rows if row["chain"] == "shadow")
    assert {row["context"]["ttft_slo_s"] for row in rows} == {0.06, 0.03}
    for secret in (SECRET, KEY, "acme", "initech", 's1"'):
        assert secret.encode() not in raw
    assert [n for n, _ in groupby(row["number"] for row in live)] == list(range(len(live)))


def test_the_command_says_what_differs_and_what_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    lines = lines_of([BUSY])
    good.write_bytes(b"".join(lines))
    bad.write_bytes(b"".join(lines).replace(b'"spill"', b'"local"'))
    assert show([good], Say()) is Exit.OK
    assert "1 decisions made again: all fall as they did" in capsys.readouterr().out
    assert show([good, bad], Say()) is Exit.CHANGED
    told = capsys.readouterr().out
    assert f"{bad}, line 2: was" in told
    assert "2 decisions made again: 1 fall otherwise now" in told
    for file in (tmp_path / "none", tmp_path / "empty.py"):
        if file.suffix:
            file.write_text("import os\n")
        with pytest.raises(Refusal, match=str(file)):
            show([file], Say())
