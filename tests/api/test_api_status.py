"""The status: what the processes say fits into it, and it always fits into 32 KiB."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from moe_api.status import (
    MAX_BYTES,
    Condition,
    ConditionType,
    Decision,
    KnobsInForce,
    MoEDeploymentStatus,
    RevisionPhase,
    RevisionStatus,
    TuningStatus,
    bounded,
    size_bytes,
)
from moe_core.wire import EngineKnobs, ExpertKnobs, FallbackKnobs, Knobs, Overflow

NOW = "2026-11-22T12:00:00Z"


def _condition(kind: ConditionType, message: str) -> Condition:
    values: dict[str, Any] = {"type": kind, "status": "True", "last_transition_time": NOW, "reason": "Ok"}
    return Condition(**values, message=message)


def _status(text: str, revisions: int = 8) -> MoEDeploymentStatus:
    decision = Decision(at=NOW, loop="Fast", action="raise", why=text)
    knobs = KnobsInForce(deployment="a/b", version=7)
    return MoEDeploymentStatus(
        conditions=tuple(_condition(kind, text) for kind in ConditionType),
        revisions=tuple(
            RevisionStatus(name=f"r{n}", weight=100 if n == 0 else 0, phase=RevisionPhase.DRAINING, message=text)
            for n in range(revisions)
        ),
        tuning=TuningStatus(knobs=knobs, last_decision=decision, not_exploring_because=text),
    )


def test_a_small_status_is_left_alone() -> None:
    status = _status("all is well")
    assert bounded(status) is status


def test_a_status_in_wide_characters_is_cut_to_32_kib() -> None:
    status = _status("𝛾" * 1024)
    assert size_bytes(status) > MAX_BYTES
    cut = bounded(status)
    assert size_bytes(cut) <= MAX_BYTES
    assert [c.type for c in cut.conditions] == list(ConditionType)
    assert all(c.message.endswith("…") for c in cut.conditions)
    assert cut.tuning is not None
    assert cut.tuning.knobs == KnobsInForce(deployment="a/b", version=7)
    assert cut.revisions[0].weight == 100


@given(st.text(max_size=1024), st.integers(0, 8))
def test_it_always_fits(text: str, revisions: int) -> None:
    assert size_bytes(bounded(_status(text, revisions))) <= MAX_BYTES


def test_knobs_pass_between_the_wire_and_the_status() -> None:
    sent = Knobs(
        deployment="a/b",
        version=3,
        experts=ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill="1.25", per_token={"gold": 8}),  # type: ignore[arg-type]
        engine=EngineKnobs(max_active_seqs=64),
        fallback=FallbackKnobs(miss_probability=0.4, share_cap=1 / 3),
    )
    recorded = KnobsInForce.model_validate(sent.to_json())
    assert recorded.to_json()["fallback"] == {"missProbability": "0.4", "shareCap": "0.333333"}
    read = Knobs.model_validate(recorded.to_json())
    assert read.experts == sent.experts
    assert (read.version, read.engine, read.fallback.miss_probability) == (3, sent.engine, 0.4)


def test_a_condition_is_found_by_its_type() -> None:
    status = _status("x")
    found = status.condition(ConditionType.SLO_MET)
    assert found is not None
    assert found.type == "SLOMet"
    assert MoEDeploymentStatus().condition(ConditionType.SLO_MET) is None


def test_json_round_trip() -> None:
    status = _status("x")
    assert MoEDeploymentStatus.model_validate(status.to_json()) == status
