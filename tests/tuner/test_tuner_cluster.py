"""The tuner on an API server in memory: what it follows, what it writes, who leads, and what a new leader believes."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path

import pytest

from moe_api.annotations import OPERATOR_MANAGER, PAUSE_REASON, PAUSED, PINS, TUNER_MANAGER
from moe_core.config import ConsoleConfig
from moe_core.http import session
from moe_core.moments import rfc3339
from moe_core.signing import Signer
from moe_kube.faults import answer
from moe_kube.managed import owned
from moe_kube.objects import EVENT, LEASE
from moe_tuner.settings import ConfigRefused
from tests.tuner.tuner_cluster import NAMESPACE, World, revision, until, world
from tests.tuner.tuner_fleet import burst
from tests.tuner.tuner_world import setting


async def moved(w: World, name: str = "a") -> dict[str, object]:
    """`status.tuning` once it tells of a change."""
    return await until("the record tells of the move", lambda: w.tuning(name).get("lastDecision") and w.tuning(name))


async def test_what_the_operator_made_ready_is_tuned_recorded_and_told(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one = await w.whole("a")
        tuner = await w.tuner()
        await until("it is recorded", lambda: w.tuning("a").get("safe"))
        assert w.tuning("a")["writtenBy"] == "one"
        assert w.tuning("a")["notExploringBecause"]
        burst(one.board, one.gateway)
        await until("knobs move", lambda: bool(one.board.applied))
        said = await moved(w)
        await until("it is in force", lambda: w.tuning("a").get("acknowledged") == one.board.version)
        said = w.tuning("a")
        assert said["knobs"]["version"] == one.board.version
        assert said["knobs"]["deployment"] == f"{NAMESPACE}/a"
        assert said["lastDecision"]["action"] == "Move"
        assert said["safe"]["experts"].get("capacityFactorPrefill") is None
        assert said["context"]["rps"] == "20"
        await until("an Event tells of it", lambda: "KnobsMoved" in w.reasons("a"))
        event = next(e for e in w.cluster.peek(EVENT) if e["reason"] == "KnobsMoved")
        assert (event["reportingController"], event["reportingInstance"]) == ("moestack.dev/tuner", "one")
        assert "γ" in event["note"]
        # Two writers, each its own part; a write of one leaves the other's alone.
        obj = w.cluster.get(w.ref("a"))
        assert set(owned(obj, TUNER_MANAGER, "status")["status"]) == {"tuning"}
        assert "tuning" not in owned(obj, OPERATOR_MANAGER, "status")["status"]
        w.ready("a", revision("a-0123456789"), address=one.address)
        assert w.tuning("a")["knobs"]
        assert tuner.fleet.names == (f"{NAMESPACE}/a",)


async def test_nothing_is_written_while_nothing_is_new(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one = await w.whole("a")
        await w.tuner()
        await until("it is recorded", lambda: w.tuning("a").get("safe"))
        await asyncio.sleep(1.5)
        before, seen = w.knob_writes(), one.board.seq
        await until("it ticks on", lambda: one.board.seq > seen + 40)
        assert w.knob_writes() - before <= 1
        before = w.knob_writes()
        seen = one.board.seq
        await until("it ticks on", lambda: one.board.seq > seen + 40)
        assert w.knob_writes() == before


async def test_records_are_written_no_more_often_than_told(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.whole("a")
        await w.tuner(record_every_s=4.0)
        await until("it is recorded", lambda: w.tuning("a").get("safe"))
        writes, began = w.knob_writes(), time.monotonic()
        for number in range(12):
            w.put("a", {PAUSED: "true", PAUSE_REASON: f"reason {number}"})
            await asyncio.sleep(0.2)
        await until("the newest is recorded", lambda: w.tuning("a").get("pauses", [{}])[0].get("reason") == "reason 11")
        assert w.knob_writes() - writes <= 1 + (time.monotonic() - began) / 4.0


async def test_a_pause_is_obeyed_at_once_until_it_ends(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one = await w.whole("a", {PAUSED: "true", PAUSE_REASON: "a launch"})
        tuner = await w.tuner()
        await until("the pause shows", lambda: w.tuning("a").get("pauses"))
        assert w.tuning("a")["pauses"] == [{"source": "Annotation", "reason": "a launch"}]
        burst(one.board, one.gateway)
        seen = one.board.seq
        await until("it ticks on", lambda: one.board.seq > seen + 40)
        assert not one.board.applied
        ends = time.time() + 3
        w.put("a", {PAUSED: rfc3339(ends)})
        await until(
            "it is known until when", lambda: w.tuning("a").get("pauses", [{}])[0].get("until") == rfc3339(ends)
        )
        await until("it ends by itself", lambda: bool(one.board.applied))
        assert time.time() >= int(ends)
        member = tuner.fleet.find(f"{NAMESPACE}/a")
        assert member is not None
        assert member.tuner is not None
        w.put("a", {}, tuning={"mode": "Auto", "paused": True})
        began = time.monotonic()
        await until("spec.tuning.paused too", lambda: member.tuner.live.config.paused)  # type: ignore[union-attr]
        assert time.monotonic() - began < 1.0
        await until("and says so", lambda: [p["source"] for p in w.tuning("a").get("pauses", ())] == ["Spec"])


async def test_pins_hold_knobs_at_their_values_and_what_cannot_be_read_pauses(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        pins = {"engine.maxActiveSeqs": 12, "experts.capacityFactor.prefill": "1.5", "fallback.missProbability": 0.25}
        tuning = {"mode": "Auto", "pins": {"maxActiveSeqs": 16}}
        one = await w.whole("a", {PINS: json.dumps(pins)}, tuning=tuning)
        await w.tuner()
        await until("it is put there", lambda: bool(one.board.applied))
        knobs = one.board.applied[-1]
        assert (knobs.engine.max_active_seqs, str(knobs.experts.capacity_factor_prefill)) == (12, "1.5")
        await until("it shows", lambda: len(w.tuning("a").get("pins", ())) == 3)
        row = next(pin for pin in w.tuning("a")["pins"] if pin["knob"] == "engine.maxActiveSeqs")
        assert row == {"knob": "engine.maxActiveSeqs", "value": "12", "source": "Annotation"}
        assert "KnobsPinned" in await until("an Event", lambda: w.reasons("a"))
        w.put("a", {PINS: '{"experts.capacityFactor.prefill": 9}'}, tuning={"mode": "Auto"})
        said = await until("it pauses", lambda: w.tuning("a").get("pauses"))
        assert "paused until that is mended" in said[0]["reason"]
        assert PINS in said[0]["reason"]
        w.put("a", {}, tuning=tuning)
        await until("the resource's own pin", lambda: one.board.applied[-1].engine.max_active_seqs == 16)
        assert not w.tuning("a").get("pauses") or await until("lifted", lambda: not w.tuning("a").get("pauses"))


async def test_one_that_goes_is_let_go_and_one_that_is_refused_stops_no_other(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one, two = await w.whole("a"), await w.whole("b")
        await w.whole("bad", tuning={"mode": "Auto", "bounds": {"maxActiveSeqs": {"min": 60_000}}})
        await w.whole("theirs", hardware=None, engine={"kind": "External", "url": "http://sglang:30000/v1"})
        w.put("starting")
        tuner = await w.tuner()
        await until("both are tuned", lambda: w.tuning("a").get("safe") and w.tuning("b").get("safe"))
        summaries = {row.deployment: row for row in tuner.fleet.summaries()}
        assert "activeSeqsMin" in str(summaries[f"{NAMESPACE}/bad"].problem)
        assert "External" in str(summaries[f"{NAMESPACE}/theirs"].problem)
        assert f"{NAMESPACE}/starting" not in summaries
        await until("it is said", lambda: "activeSeqsMin" in w.tuning("bad").get("notExploringBecause", ""))
        assert not w.tuning("starting")
        w.cluster.delete(w.ref("a"))
        await until("it is let go", lambda: f"{NAMESPACE}/a" not in tuner.fleet.names)
        seen = two.board.seq
        await until("the other goes on", lambda: two.board.seq > seen + 10)
        seen = one.board.seq
        await asyncio.sleep(0.3)
        assert one.board.seq == seen
        # One that was tuned and is broken by its next edit goes on as it was, and a pause holds it.
        w.put("b", {PAUSED: "true"}, tuning={"mode": "Auto", "bounds": {"maxActiveSeqs": {"min": 60_000}}})
        member = tuner.fleet.find(f"{NAMESPACE}/b")
        assert member is not None
        await until("it is paused", lambda: member.tuner is not None and member.tuner.live.config.paused)


async def test_another_revision_is_another_board_and_versions_go_on(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one = await w.whole("a")
        await w.tuner()
        burst(one.board, one.gateway)
        await moved(w)
        version, next_ = one.board.version, await w.serve("a", "a-9999999999")
        w.ready("a", revision("a-0123456789", 40), revision("a-9999999999", 60), address=one.address)
        burst(next_.board, one.gateway)
        await until("the new board is sent knobs", lambda: bool(next_.board.applied))
        assert next_.board.applied[0].version > version, "the gateway would refuse an older one"


async def test_a_second_tuner_stands_by_and_goes_on_where_the_first_was(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one = await w.whole("a")
        first = await w.tuner("one")
        burst(one.board, one.gateway)
        await moved(w)
        home = w.tuning("a")["safe"]
        second = await w.tuner("two")
        await until("one leads", lambda: first.election.leading)
        assert not second.election.leading
        assert second.fleet.names == ()
        lease = w.cluster.peek(LEASE)[0]["metadata"]["name"]
        assert lease == "moestack-tuner"
        version = w.tuning("a")["knobs"]["version"]
        await first.stop()
        await until("the second leads", lambda: second.election.leading)
        await until("it signs the record", lambda: w.tuning("a")["writtenBy"] == "two")
        # It began on a disk that knows nothing: the home is the record's, not the spike's setting that it found.
        assert w.tuning("a")["safe"]["experts"] == home["experts"]
        assert w.tuning("a")["knobs"]["version"] >= version
        assert "KnobsAdopted" not in [
            event["reason"] for event in w.cluster.peek(EVENT) if event["reportingInstance"] == "two"
        ]


async def test_without_the_lease_no_knobs_are_sent(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one = await w.whole("a")
        tuner = await w.tuner()
        await until("it is recorded", lambda: w.tuning("a").get("safe"))
        w.apis[0].add(answer(503), kinds=frozenset({LEASE}), times=None)
        await until("it no longer leads", lambda: not tuner.election.leading)
        posts = one.board.posts
        burst(one.board, one.gateway)
        await asyncio.sleep(1.0)
        assert one.board.posts == posts
        w.apis[0].calm()
        await until("it leads again, and answers", lambda: bool(one.board.applied))


@pytest.mark.parametrize("case", ["recorded trial", "unrecorded", "somebody else's"])
async def test_what_a_new_leader_believes_of_the_knobs_it_finds(tmp_path: Path, case: str) -> None:
    async with world(tmp_path) as w:
        one = await w.whole("a")
        safe, found = setting("2", seqs=16), setting("1.25", seqs=8)
        deployment = f"{NAMESPACE}/a"
        record = {
            "writtenBy": "gone",
            "mode": "Auto",
            "exploring": True,
            "safe": safe.knobs(deployment, 6).to_json(),
            "knobs": (found if case == "recorded trial" else safe).knobs(deployment, 6).to_json(),
            "onTrial": case == "recorded trial",
        }
        body = {"apiVersion": "moestack.dev/v1alpha1", "kind": "MoEDeployment", "status": {"tuning": record}}
        w.cluster.apply(w.ref("a"), body, manager=TUNER_MANAGER, subresource="status")
        if case == "somebody else's":
            one.board.envelope = Signer.generate().sign(found.knobs(deployment, 7))
            one.board.version = 7
        else:
            one.board.put(found.knobs(deployment, 6 if case == "recorded trial" else 7))
        await w.tuner("new")
        await until("it has taken over", lambda: w.tuning("a").get("writtenBy") == "new")
        if case == "somebody else's":
            assert not one.board.applied
            assert w.tuning("a")["safe"]["engine"] == {"maxActiveSeqs": 8}
            return
        await until("the candidate leaves", lambda: bool(one.board.applied))
        assert one.board.applied[0].engine.max_active_seqs == 16
        assert one.board.applied[0].version == one.board.version
        await until("it is told", lambda: "TrialRolledBack" in w.reasons("a"))
        assert w.tuning("a")["safe"]["engine"] == {"maxActiveSeqs": 16}


async def test_lost_files_are_no_loss_and_old_ones_are_not_believed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one = await w.whole("a")
        first = await w.tuner("one")
        await until("it is recorded", lambda: w.tuning("a").get("safe"))
        # Another one led meanwhile, and found a better setting.
        await first.stop()
        better = setting("2", seqs=24)
        deployment = f"{NAMESPACE}/a"
        document = better.knobs(deployment, 9).to_json()
        record = {"writtenBy": "two", "mode": "Auto", "safe": document, "knobs": document, "exploring": False}
        body = {"apiVersion": "moestack.dev/v1alpha1", "kind": "MoEDeployment", "status": {"tuning": record}}
        w.cluster.apply(w.ref("a"), body, manager=TUNER_MANAGER, subresource="status")
        one.board.put(better.knobs(deployment, 9))
        again = await w.tuner("one")
        await until("it has taken over", lambda: w.tuning("a").get("writtenBy") == "one")
        assert w.tuning("a")["safe"]["engine"] == {"maxActiveSeqs": 24}
        await again.stop()
        shutil.rmtree(tmp_path / "one")
        one.board.envelope, one.board.version = None, 0
        await w.tuner("one")
        await until("the last safe setting is sent again", lambda: bool(one.board.applied))
        assert one.board.applied[0].engine.max_active_seqs == 24
        assert one.board.applied[0].version > 9


async def test_the_console_of_a_cluster_refuses_strangers_and_takes_no_orders(tmp_path: Path) -> None:
    token = tmp_path / "read"
    token.write_text("r" * 40)
    console = ConsoleConfig(read_token_file=str(token))
    async with world(tmp_path) as w:
        await w.whole("a")
        tuner = await w.tuner(console=console)
        url = f"http://127.0.0.1:{tuner.port}"
        await until("it is recorded", lambda: w.tuning("a").get("safe"))
        shown = {"Authorization": f"Bearer {'r' * 40}"}
        async with session() as client:
            for path in ("/console/api/deployments", "/v1/status", "/v1/deployments"):
                assert (await client.get(url + path)).status == 401, path
                assert (await client.get(url + path, headers=shown)).status == 200, path
            for path in ("/metrics", "/healthz", "/readyz"):
                assert (await client.get(url + path)).status == 200, path
            mark = {**shown, "X-Moestack-Console": "1"}
            assert (await client.put(f"{url}/console/api/orders", headers=mark, data=b"{}")).status == 403


@pytest.mark.parametrize("text", [None, "short"])
async def test_a_console_without_tokens_does_not_start(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "read").write_text(text)
    async with world(tmp_path) as w:
        with pytest.raises(ConfigRefused, match="console"):
            await w.tuner(console=ConsoleConfig(read_token_file=str(tmp_path / "read")))
