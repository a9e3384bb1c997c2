"""The table of rights against what the tuner calls: no call without a right, no right without a call."""

from __future__ import annotations

import asyncio
from pathlib import Path

from moe_api.annotations import PAUSED
from moe_kube.objects import LEASE
from moe_tuner import rbac
from moe_tuner.cluster import LEASE_NAME
from tests.tuner.tuner_cluster import until, world
from tests.tuner.tuner_fleet import burst

ROOT = Path(__file__).parents[2]
VERBS = {"apply": "patch", "json_patch": "patch", "replace": "update"}


async def test_every_call_of_a_life_has_a_right_and_every_right_a_call(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one = await w.whole("a")
        tuner = await w.tuner()
        burst(one.board, one.gateway)
        await until("it is told", lambda: "KnobsMoved" in w.reasons("a"))
        w.put("a", {PAUSED: "true"})
        await until("it is recorded", lambda: w.tuning("a").get("pauses"))
        # A repeat of an Event is a patch of it.
        wanted = tuner.follower.wanted["serving", "a"]
        for _ in range(2):
            tuner._events.record(w.ref("a"), wanted.uid, reason="Again", note="it is")
        series = next(iter(tuner._events._series.values()))
        await until("it is written", lambda: all(s.written for s in tuner._events._series.values()))
        tuner._events.record(w.ref("a"), wanted.uid, reason="Again", note="it is")
        for series in tuner._events._series.values():
            series.due_s = 0.0
        await tuner._events.flush()
        await asyncio.sleep(1.0)
        await tuner.stop()
        calls = w.journal.calls
    used = {
        (call.kind.group, f"{call.kind.plural}/{call.subresource}" if call.subresource else call.kind.plural,
         VERBS.get(call.verb, call.verb))
        for call in calls
    }  # fmt: skip
    rights = (*rbac.OBJECTS, *rbac.OWN)
    assert used == {(right.kind.group, right.resource, verb) for right in rights for verb in right.verbs}
    assert {call.ref.name for call in calls if call.kind == LEASE and call.ref is not None} == {LEASE_NAME}
    assert all(right.names == (LEASE_NAME,) for right in rbac.OWN if right.verbs != {"create"})


def test_no_secret_no_wildcard_and_nothing_of_others() -> None:
    for right in (*rbac.OBJECTS, *rbac.OWN):
        assert right.kind.plural in {"moedeployments", "endpointslices", "events", "leases"}
        assert "delete" not in right.verbs


def test_the_charts_files_are_those_of_the_table(tmp_path: Path) -> None:
    assert rbac.main(["--check", str(ROOT / "charts" / "moestack" / "files")]) == 0
    assert rbac.main(["--check", str(tmp_path)]) == 1
