"""From a MoEDeployment to a tuner's settings and back to its record: tables of cases, without I/O."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from moe_api.annotations import PAUSE_REASON, PAUSED, PINS
from moe_api.load import load_object
from moe_api.status import MoEDeploymentStatus, TuningStatus, size_bytes
from moe_cli import plan_local
from moe_core.config import ClusterTunerConfig, TunerConfig
from moe_core.moments import rfc3339
from moe_core.setting import Signals
from moe_core.wire import ExpertKnobs, LayerFactors, Overflow
from moe_kube.endpoints import EndpointFacts, at_port
from moe_kube.objects import Obj
from moe_tuner.follow import slice_part
from moe_tuner.live import AT_START
from moe_tuner.record import document, kept_of, status_of, worth_writing
from moe_tuner.report import Budget, DecisionRecord, TuningReport
from moe_tuner.resource import AS_IT_IS, Wanted, read, serving_board
from moe_tuner.told import event_of
from tests.tuner.tuner_cluster import SPEC, revision
from tests.tuner.tuner_world import setting, signals

NOW_S = 1_700_000_000.0
PROCESS = ClusterTunerConfig(prometheus_url="http://prometheus:9090", signing_key_file="/keys/tuner.key")
SLICES = (EndpointFacts(("10.0.0.7", "10.0.0.8", "not an address"), 8001), EndpointFacts(("10.0.0.9",), 9999))
DEPLOYMENT = "serving/a"


def resource(annotations: dict[str, str] | None = None, revisions: Any = None, **spec: Any) -> Obj:
    made = [revision("a-0123456789")] if revisions is None else revisions
    return {
        "apiVersion": "moestack.dev/v1alpha1",
        "kind": "MoEDeployment",
        "metadata": {"name": "a", "namespace": "serving", "uid": "u-1", "annotations": annotations or {}},
        "spec": {key: value for key, value in {**SPEC, **spec}.items() if value},
        "status": {"revisions": made},
    }


def wanted(obj: Obj, before: TunerConfig | None = None, slices: Any = SLICES) -> Wanted:
    return read(obj, slices, PROCESS, before, NOW_S)


def config(obj: Obj, before: TunerConfig | None = None) -> TunerConfig:
    made = wanted(obj, before).config
    assert made is not None
    return made


def test_addresses_are_those_of_the_operators_services_and_files_those_of_this_life() -> None:
    made = config(resource())
    assert made.board_url == "http://a-0123456789-board.serving.svc:8100"
    assert made.gateway_admin_urls == ("http://10.0.0.7:8001", "http://10.0.0.8:8001")
    assert made.decision_log == "/var/lib/moestack/u-1/decisions.jsonl"
    assert made.storage_url == "sqlite:////var/lib/moestack/u-1/study.db"
    shared = PROCESS.model_copy(update={"storage_url": "postgresql://u@h/d", "storage_password_file": "/p"})
    studies = read(resource(), SLICES, shared, None, NOW_S).config
    assert studies is not None
    assert (studies.storage_url, studies.storage_password_file) == ("postgresql://u@h/d", "/p")


def test_on_one_machine_and_in_a_cluster_a_resource_says_the_same() -> None:
    tuning = {"mode": "Auto", "pins": {"maxActiveSeqs": 16}, "changeBudget": {"changesPerHour": 7, "trialsPerDay": 3}}
    obj = resource(tuning=tuning, slo={"ttftP95": "700ms", "itlP95": "40ms"})
    from pathlib import Path

    local = plan_local.tuner_config(
        load_object({key: obj[key] for key in ("apiVersion", "kind", "metadata", "spec")}),
        board_url="http://b",
        gateway_admin_url="http://g",
        prometheus_url="http://p",
        signing_key=Path("/k"),
        state_dir=Path("/s"),
        console=None,  # type: ignore[arg-type]
    )
    places = {*AT_START, "gateway_admin_urls"}
    assert config(obj).model_dump(exclude=places) == local.model_dump(exclude=places)
    assert local.pins == {"engine.maxActiveSeqs": Decimal(16)}


BOARDS = {
    "none": ([], None),
    "none carries traffic": ([revision("a-1", 0)], None),
    "the heavier": ([revision("a-1", 60), revision("a-2", 40)], "a-1"),
    "of two alike the younger": (
        [{**revision("a-1", 50), "createdAt": rfc3339(1)}, {**revision("a-2", 50), "createdAt": rfc3339(9)}],
        "a-2",
    ),
}


@pytest.mark.parametrize("case", BOARDS)
def test_the_board_is_of_the_revision_that_carries_most(case: str) -> None:
    revisions, name = BOARDS[case]
    url = None if name is None else f"http://{name}-board.serving.svc:8100"
    assert serving_board(resource(revisions=revisions)) == url


def test_what_is_not_ready_is_not_tuned_and_what_was_goes_on_as_it_was() -> None:
    for obj, slices in ((resource(revisions=[]), SLICES), (resource(), ())):
        assert wanted(obj, slices=slices) == Wanted("u-1")
    before = config(resource())
    gone = wanted(resource({PAUSED: "true"}, revisions=[]), before, slices=()).config
    assert gone is not None
    assert (gone.board_url, gone.gateway_admin_urls) == (before.board_url, before.gateway_admin_urls)
    assert gone.paused


PAUSES: dict[str, tuple[dict[str, str], dict[str, Any], list[dict[str, str]]]] = {
    "none": ({}, {}, []),
    "false": ({PAUSED: "false"}, {}, []),
    "true": ({PAUSED: "true", PAUSE_REASON: "x"}, {}, [{"source": "Annotation", "reason": "x"}]),
    "until": ({PAUSED: rfc3339(NOW_S + 60)}, {}, [{"source": "Annotation", "until": rfc3339(NOW_S + 60)}]),
    "over": ({PAUSED: rfc3339(NOW_S - 1)}, {}, []),
    "spec": ({}, {"paused": True}, [{"source": "Spec", "reason": "spec.tuning.paused"}]),
}


@pytest.mark.parametrize("case", PAUSES)
def test_pauses(case: str) -> None:
    annotations, tuning, said = PAUSES[case]
    made = wanted(resource(annotations, tuning={"mode": "Auto", **tuning}))
    assert [pause.to_json() for pause in made.pauses] == said
    assert made.config is not None
    assert made.config.paused == bool(said)
    assert made.changes_at_s == (NOW_S + 60 if case == "until" else None)


UNREADABLE = {
    "a pause that is no time": ({PAUSED: "tomorrow"}, "'tomorrow' is neither true, false nor a time"),
    "no JSON": ({PINS: "{"}, "is not JSON"),
    "no object": ({PINS: "[1]"}, "is no object"),
    "no knob": ({PINS: '{"gamma": 1}'}, "'gamma' takes no value"),
    "no knob to hold": ({PINS: '{"gamma": null}'}, "'gamma' names no knob"),
    "a group takes no value": ({PINS: '{"experts": 1}'}, "'experts' takes no value"),
    "no number": ({PINS: '{"engine.maxActiveSeqs": true}'}, "is no number"),
    "no whole number": ({PINS: '{"engine.maxActiveSeqs": 1.5}'}, "moestack.dev/pins.maxActiveSeqs"),
    "outside": ({PINS: '{"experts.capacityFactor.prefill": 9}'}, "bounds"),
    "no policy": ({PINS: '{"experts.overflow": "Spill"}'}, "moestack.dev/pins.overflow"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_should_hold_it_and_cannot_be_read_holds_it_altogether(case: str) -> None:
    annotations, words = UNREADABLE[case]
    made = wanted(resource(annotations))
    assert made.config is not None
    assert made.config.paused
    assert made.config.pins == {}
    assert words in str(made.pauses[0].reason)


def test_pins_of_the_annotation_win_and_those_of_the_resource_stay() -> None:
    pins = {"engine.maxActiveSeqs": 12, "experts.overflow": "Reroute", "fallback": None, "fallback.shareCap": None}
    tuning = {"mode": "Auto", "pins": {"maxActiveSeqs": 16, "shareCap": "0.5"}}
    made = wanted(resource({PINS: json.dumps(pins)}, tuning=tuning))
    assert made.config is not None
    assert made.config.pins == {
        "engine.maxActiveSeqs": Decimal(12),
        "experts.overflow": Overflow.REROUTE,
        "fallback.shareCap": Decimal("0.5"),
    }
    assert set(made.config.bounds.pinned) == {*made.config.pins, "fallback"}
    assert [(pin.knob, pin.value, pin.source) for pin in made.pins] == [
        ("engine.maxActiveSeqs", "12", "Annotation"),
        ("experts.overflow", "Reroute", "Annotation"),
        ("fallback", AS_IT_IS, "Annotation"),
        ("fallback.shareCap", "0.5", "Spec"),
    ]


REFUSED = {
    "external": ({"hardware": None, "engine": {"kind": "External", "url": "http://s:1/v1"}}, "External"),
    "invalid": ({"slo": {"ttftP95": "never"}}, "spec.slo.ttftP95"),
    "bounds": ({"tuning": {"bounds": {"maxActiveSeqs": {"min": 60_000}}}}, "bounds.activeSeqsMin"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case: str) -> None:
    spec, words = REFUSED[case]
    made = wanted(resource(**spec))
    assert made.config is None
    assert words in made.problem


def test_endpoints_are_addresses_of_ip_at_the_admin_port() -> None:
    assert at_port([EndpointFacts(("::1", "10.0.0.1"), 8001)], 8001) == ("10.0.0.1:8001", "[::1]:8001")
    labels = {"moestack.dev/deployment": "a"}
    owner = {"kind": "Service", "name": "a-gateway-admin", "controller": True}
    meta = {"namespace": "serving", "labels": labels, "ownerReferences": [owner]}
    assert slice_part({"metadata": meta}).deployment == "a"
    for other in ({"ownerReferences": []}, {"ownerReferences": [{**owner, "name": "mine"}]}, {"labels": {}}):
        assert slice_part({"metadata": {**meta, **other}}).deployment == ""


# The record


def report(**changes: Any) -> TuningReport:
    base = TuningReport(
        deployment=DEPLOYMENT,
        mode="Auto",
        paused=False,
        started_at_s=0.0,
        version=4,
        knobs=setting("1.25", seqs=8, miss=0.25),
        home=setting("2", seqs=16),
        exploring=False,
        exploring_reason=f"12{WHY}",
        fast_reason="",
        signals=signals(),
        budget=Budget(used=0, per_hour=60),
        acknowledged=4,
        auto_since_s=NOW_S,
        crashed=(setting("1", seqs=64),),
    )
    return base.model_copy(update=changes)


def record(**changes: Any) -> DecisionRecord:
    base = DecisionRecord(
        time=NOW_S,
        loop="fast",
        action="Move",
        reason="TTFT p95 2.0 s",
        mode="Auto",
        sent=True,
        signals=Signals(),
        before=setting("2"),
        after=setting("1.25"),
        version=4,
    )
    return base.model_copy(update=changes)


def written(made: TuningReport | None, before: TuningStatus | None = None, writer: str = "one") -> TuningStatus:
    status = status_of(wanted(resource()), made, before, writer=writer, problem=None)
    assert status is not None
    return status


def test_a_record_goes_there_and_back_exactly() -> None:
    status = TuningStatus.model_validate(document(written(report(decisions=(record(),)))))
    kept = kept_of(status, writer="two", now_s=NOW_S, now_monotonic_s=5.0)
    assert kept is not None
    assert kept.newer
    assert kept.saved.state.home == setting("2", seqs=16)
    assert kept.saved.ours == (setting("1.25", seqs=8, miss=0.25),)
    assert kept.saved.crashed == (setting("1", seqs=64),)
    assert (kept.saved.version, kept.saved.trial, kept.saved.auto_since_s) == (4, None, NOW_S)
    own = kept_of(status, writer="one", now_s=NOW_S, now_monotonic_s=5.0)
    assert own is not None
    assert not own.newer
    trial = kept_of(written(report(on_trial=True)), writer="two", now_s=NOW_S, now_monotonic_s=5.0)
    assert trial is not None
    assert trial.saved.trial == setting("1.25", seqs=8, miss=0.25)


def test_a_setting_that_the_record_cannot_hold_is_not_called_safe() -> None:
    layers = ExpertKnobs(capacity_factor_by_layer={3: LayerFactors(prefill=Decimal(2))})
    status = written(report(home=setting().model_copy(update={"experts": layers})))
    assert status.safe is None
    assert kept_of(status, writer="two", now_s=NOW_S, now_monotonic_s=0.0) is None


WHY = " of 60 changes are left this hour, kept for spikes: exploring nothing"
WORTH = {
    "nothing": ({}, False),
    "traffic": ({"signals": signals(arrivals_per_s=80.0)}, False),
    "a figure in the reason": ({"exploring_reason": f"9{WHY}"}, False),
    "another reason": ({"exploring_reason": "paused: exploring nothing"}, True),
    "another version": ({"version": 5}, True),
    "acknowledged": ({"acknowledged": 3}, True),
    "a trial": ({"on_trial": True}, True),
    "a decision": ({"decisions": (record(action="Undo"),)}, True),
}


@pytest.mark.parametrize("case", WORTH)
def test_what_is_worth_a_write(case: str) -> None:
    changes, worth = WORTH[case]
    before = written(report(decisions=(record(),)))
    after = written(report(**{"decisions": (record(),), **changes}), before)
    assert worth_writing(before, after) == worth
    assert worth_writing(before, written(report(decisions=(record(),)), before, writer="two"))


def test_until_its_tuner_knows_what_is_in_force_what_was_recorded_stays() -> None:
    before = written(report())
    for made in (None, report(home=None), report(knobs=None)):
        after = written(made, before, writer="two")
        assert (after.safe, after.knobs, after.written_by) == (before.safe, before.knobs, "one")
    assert status_of(Wanted("u"), None, None, writer="one", problem=None) is None
    refused = status_of(Wanted("u", problem="no"), None, None, writer="one", problem=None)
    assert refused is not None
    assert refused.not_exploring_because == "no"


def test_the_record_is_small() -> None:
    long = record(reason="x" * 4000)
    crashed = tuple(setting("1", seqs=seqs) for seqs in range(1, 60))
    status = written(report(decisions=(long,), exploring_reason="y" * 4000, crashed=crashed))
    assert [one.engine.max_active_seqs for one in status.crashed] == [*range(52, 60)]
    assert size_bytes(MoEDeploymentStatus(tuning=status)) < 8192


TOLD = {
    "a move": (record(), ("Normal", "KnobsMoved")),
    "recommended": (record(mode="Recommend", sent=False), ("Normal", "KnobsRecommended")),
    "not sent": (record(sent=False, note="the board is gone"), ("Warning", "KnobsNotSent")),
    "a trial that lost": (record(loop="slow", action="RollBack"), ("Warning", "TrialRolledBack")),
    "a trial that won": (record(loop="slow", action="Promote", sent=False), ("Normal", "TrialPromoted")),
    "what the simulator says": (record(loop="slow", action="Simulate", sent=False), None),
    "a block's end": (record(loop="slow", action="Return"), None),
}


@pytest.mark.parametrize("case", TOLD)
def test_events(case: str) -> None:
    decision, said = TOLD[case]
    told = event_of(decision)
    assert (None if told is None else (told.type, told.reason)) == said
