"""Takes logged decisions again: the policies are pure, so the same inputs must give the same decision."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from moe_api.base import Model
from moe_cli.outcome import Problem, Refusal
from moe_core import retune
from moe_core.retune_state import RetuneContext, RetuneState
from moe_core.setting import Setting
from moe_tuner import explore
from moe_tuner.explore import Do, ExploreContext, ExploreState
from moe_tuner.report import DecisionRecord


class Again(Model):
    """One decision, then and now. `same` is None where the log does not hold its inputs."""

    time: float
    loop: str
    action: str
    then: Setting | None = None
    now: Setting | None = None
    same: bool | None = None
    why: str = ""


def read(log: Path, limit: int) -> tuple[DecisionRecord, ...]:
    """The last decisions of a log, newest first. Lines that cannot be read are left out. Raises Refusal."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        message = f"cannot be read ({error.strerror})"
        raise Refusal(Problem(field=str(log), message=message, remedy="give a decisions.jsonl")) from None
    records = []
    for line in lines[-limit:]:
        try:
            records.append(DecisionRecord.model_validate_json(line))
        except ValidationError:
            continue
    return tuple(reversed(records))


def replay(records: tuple[DecisionRecord, ...]) -> tuple[Again, ...]:
    """Each decision again, on what was logged of its inputs."""
    return tuple(_again(record) for record in records)


def _again(record: DecisionRecord) -> Again:
    base = Again(time=record.time, loop=record.loop, action=record.action, then=record.after)
    inputs = record.inputs or {}
    try:
        if inputs.get("policy") == "retune":
            decision, _ = retune.decide(
                RetuneContext.model_validate(inputs["context"]), RetuneState.model_validate(inputs["state"])
            )
            same = decision.setting == record.after
            return base.model_copy(update={"now": decision.setting, "same": same, "why": decision.reason})
        if inputs.get("policy") == "explore":
            context = ExploreContext.model_validate(inputs["context"])
            taken, _ = explore.step(context, ExploreState.model_validate(inputs["state"]))
            now = taken.setting if taken.do is not Do.NOTHING else None
            same = taken.reason == record.reason and (now == record.after or record.after is None)
            return base.model_copy(update={"now": now, "same": same, "why": taken.reason})
    except (ValidationError, KeyError):
        return base.model_copy(update={"why": "its inputs are of another release"})
    return base.model_copy(update={"why": "its inputs are not in the log"})
