"""The whole process on the API server in memory: health, readiness, metrics, two of them, a lost lease."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_core import metrics
from moe_kube import objects as k
from moe_kube.faults import WRITES, Call, Rule, answer, before
from moe_kube.objects import Ref
from moe_operator import server as server_module
from moe_operator.server import STUCK_S, OperatorServer
from tests.controller.operators import APART, LEASE, LEASES, Bench, get, ours


async def values(server: OperatorServer) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples of /metrics: name → label values → value."""
    _, text = await get(server, "/metrics")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels[label] for label in sorted(sample.labels))] = (
                sample.value
            )
    return found


async def test_it_makes_what_a_moedeployment_asks_for_and_then_writes_nothing_more() -> None:
    bench = Bench()
    bench.put("moe")
    async with bench.operator():
        await bench.pass_time(5.0)
        live = bench.cluster.get(Ref(k.MOE_DEPLOYMENT, "serving", "moe"))
        assert {c["type"]: c["status"] for c in live["status"]["conditions"]}["Fits"] == "True"
        assert [ref.namespace for ref in bench.cluster.refs(k.RAY_SERVICE)] == ["serving"]
        bench.journal.clear()
        await bench.pass_time(700.0, step=5.0)
        assert bench.writes("one") == []
        assert bench.cluster.get(LEASE)["spec"]["holderIdentity"] == "one"
    assert not bench.cluster.get(LEASE)["spec"].get("holderIdentity")  # released


async def test_ready_names_what_is_missing_and_a_standby_is_ready() -> None:
    bench = Bench()
    bench.put("moe")
    no_right = Rule(answer(403), verbs=frozenset({"list"}), kinds=frozenset({k.INGRESS}), times=None)
    async with bench.operator("one", no_right) as one, bench.operator("two") as two:
        await bench.pass_time(5.0)
        status, text = await get(one, "/readyz")
        assert (status, "Ingress: injected 403" in text, "Service" in text) == (503, True, False)
        assert (await get(two, "/readyz"))[0] == 200
        assert (await get(one, "/healthz"))[0] == (await get(two, "/healthz"))[0] == 200
        bench.apis["one"].calm()
        await bench.pass_time(120.0)
        assert (await get(one, "/readyz"))[0] == 200


async def test_without_our_crd_it_is_not_ready_and_says_why() -> None:
    bench = Bench()
    bench.cluster.remove(k.MOE_DEPLOYMENT)
    async with bench.operator() as one:
        await bench.pass_time(2.0)
        status, text = await get(one, "/readyz")
        assert (status, "its CRD is not installed" in text) == (503, True)


async def test_metrics_tell_the_state_in_rows_of_the_table_and_name_no_object() -> None:
    bench = Bench()
    for name in ("alpha", "beta"):
        bench.put(name)
    async with bench.operator() as one:
        await bench.pass_time(5.0)
        found = await values(one)
        _, text = await get(one, "/metrics")
    rows = {metric.name for metric in metrics.ALL if metric.name.startswith("moestack_operator_")}
    told = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in found}
    # Calls are counted by the HTTP client, which this cluster has none of.
    assert told == rows - {"moestack_operator_api_calls_total", "moestack_operator_api_call_seconds"}
    assert found["moestack_operator_leader"] == {(): 1.0}
    assert found["moestack_operator_objects"] == {(): 2.0}
    assert found["moestack_operator_queue_depth"] == {(): 0.0}
    assert found["moestack_operator_conditions"][("True", "Fits")] == 2.0
    assert found["moestack_operator_reconcile_seconds_count"][("settled",)] >= 2.0
    assert found["moestack_operator_cache_objects"][("RayService",)] == 2.0
    assert found["moestack_operator_cache_behind"][("RayService",)] == 0.0
    assert "alpha" not in text
    assert "serving" not in text


async def test_a_standby_writes_nothing_and_goes_on_where_the_leader_stopped() -> None:
    bench = Bench()
    bench.put("moe")
    async with AsyncExitStack() as leader, bench.operator("two", Rule(answer(503), kinds=LEASES, times=None)) as two:
        await leader.enter_async_context(bench.operator("one"))
        await bench.pass_time(5.0)
        bench.apis["two"].calm()
        await bench.pass_time(60.0)
        assert (await values(two))["moestack_operator_leader"] == {(): 0.0}
        assert bench.writes("two") == []
        assert len(bench.writes("one")) > 10
        await leader.aclose()
        bench.put("next")
        await bench.pass_time(10.0)
        assert two.election.leading
        assert len(bench.cluster.refs(k.RAY_SERVICE)) == 2
        assert all("next" in write for write in bench.writes("two"))


async def test_a_leader_that_cannot_renew_stops_writing_in_time_and_leads_again_when_it_can() -> None:
    bench = Bench()
    bench.put("moe")
    async with bench.operator("one") as one:
        await bench.pass_time(5.0)
        assert one.election.leading
        bench.apis["one"].add(answer(503), kinds=LEASES, times=None)
        bench.journal.clear()
        await bench.pass_time(one.config.lease_s)
        assert not one.election.leading
        bench.put("late")
        await bench.pass_time(60.0)
        assert bench.writes("one") == []
        assert one.crashed == ""
        bench.apis["one"].calm()
        await bench.pass_time(20.0)
        assert one.election.leading
        assert len(bench.cluster.refs(k.RAY_SERVICE)) == 2


@pytest.mark.parametrize("lose_at", range(0, 13, 3))
async def test_a_lease_lost_in_the_middle_of_the_writes_is_never_two_writers(lose_at: int) -> None:
    """Each write of the leader takes two seconds, and from one of them on it cannot renew its lease."""
    bench = Bench()
    bench.put("moe")
    written = []

    async def slow(call: Call) -> None:
        written.append(call)
        await bench.clock.sleep(2.0)

    rules = (
        Rule(answer(500), kinds=LEASES, when=lambda _: len(written) > lose_at, times=None),
        Rule(before(slow), when=lambda call: call.verb in WRITES and call.kind not in APART, times=None),
    )
    async with bench.operator("one", *rules) as one, bench.operator("two") as two:
        await bench.pass_time(60.0)
        assert (one.election.leading, two.election.leading) == (False, True)
        assert len(bench.cluster.refs(k.RAY_SERVICE)) == 1
    turns = [call.client for call in bench.journal.calls if ours(call)]
    assert turns == sorted(turns)  # whatever "one" wrote, it wrote before "two" began
    assert turns[0] == "one"
    created = bench.journal.creates()
    assert created["RayService"] == created["Deployment"] == 1


async def test_health_fails_when_a_worker_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    async with bench.operator() as one:
        await bench.pass_time(3.0)
        monkeypatch.setattr(one.controller, "longest_work_s", lambda: STUCK_S + 1)
        status, text = await get(one, "/healthz")
        assert (status, "a reconcile has taken 601 s" in text) == (503, True)


async def test_health_fails_and_the_process_ends_when_a_part_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dies(_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(server_module.Recorder, "run", dies)
    bench = Bench()
    async with bench.operator() as one:
        await bench.pass_time(1.0)
        assert one.crashed == "events"
        assert (await get(one, "/healthz"))[0] == 503
