"""What applying a file would change: each field with its class, what the costliest means, and whether it fits. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from moe_api.base import Model
from moe_api.disruption import Change, classify, worst
from moe_api.enums import Egress, UpgradeStrategy
from moe_api.fields import Disruption
from moe_api.redact import redact
from moe_api.status import PlanStatus
from moe_api.v1alpha1 import MoEDeployment
from moe_planner.fit import check

FitStatus = Literal["True", "False", "Unknown"]
_FIT_STATUS: dict[bool | None, FitStatus] = {True: "True", False: "False", None: "Unknown"}
_FIT_WORDS = {"True": "fits", "False": "does not fit: no pods would be made for it", "Unknown": "fit unknown"}


class FieldChange(Model):
    """One changed field."""

    path: str
    old: Any = Field(default=None, description="JSON value; absent where it was unset")
    new: Any = Field(default=None, description="JSON value; absent where it is unset")
    disruption: Disruption
    text: str = Field(exclude=True)


class FitReport(Model):
    """Whether the new spec fits its GPUs, as the condition `Fits` will say it."""

    status: FitStatus
    reason: str
    message: str
    plan: PlanStatus | None = None


class DiffReport(Model):
    """What applying a file would do."""

    deployment: str = Field(description="namespace/name")
    against: str = Field(description="namespace/name of what is there; empty where nothing is")
    changes: tuple[FieldChange, ...] = ()
    worst: Disruption | None = Field(default=None, description="costliest class; absent where the spec stays")
    meaning: str = Field(description="what happens to traffic, and which GPUs it takes")
    outage: bool = Field(default=False, description="requests find no local replica for a time")
    replicas: int = Field(default=0, description="replicas now")
    gpus_needed_free: int = Field(default=0, description="GPUs that must be free beyond those that run it now")
    fit: FitReport

    @property
    def creates(self) -> bool:
        """There is no such object yet."""
        return not self.against

    @property
    def changed(self) -> bool:
        return self.creates or bool(self.changes)


def report(old: MoEDeployment | None, new: MoEDeployment) -> DiffReport:
    """Compare what is there (None: nothing) with what would be applied."""
    found = [] if old is None else [*_metadata(old, new), *classify(old, new)]
    meant = _meaning(old, new, worst(found))
    verdict = check(new.spec)
    return DiffReport(
        deployment=new.key,
        against="" if old is None else old.key,
        changes=tuple(_told(change) for change in found),
        worst=worst(found),
        meaning=meant.text,
        outage=meant.outage,
        replicas=_running(old),
        gpus_needed_free=meant.gpus,
        fit=FitReport(
            status=_FIT_STATUS[verdict.fits],
            reason=verdict.reason,
            message=verdict.message,
            plan=verdict.plan and verdict.plan.to_status(),
        ),
    )


def lines(diff: DiffReport) -> list[str]:
    """The report for people."""
    count = len(diff.changes)
    head = (
        "would be created" if diff.creates else f"{count} change{'' if count == 1 else 's'}" if count else "no change"
    )
    other = f" (against another object, {diff.against})" if diff.against not in ("", diff.deployment) else ""
    said = [f"{diff.deployment}: {head}{other}", *(f"  {change.text}" for change in diff.changes)]
    if diff.changed:
        said.append(f"{diff.worst or 'new'}: {diff.meaning}")
    said.append(f"{_FIT_WORDS[diff.fit.status]} ({diff.fit.reason}): {diff.fit.message}")
    return said


def _told(change: Change) -> FieldChange:
    # The name of the field decides too whether its value is a secret.
    last = change.path.rpartition(".")[2]
    old, new = (redact({last: value})[last] for value in (change.old, change.new))
    return FieldChange(path=change.path, old=old, new=new, disruption=change.disruption, text=str(change))


def _metadata(old: MoEDeployment, new: MoEDeployment) -> list[Change]:
    """Labels and annotations that the file sets. What it does not name stays, so it is no change."""
    return [
        Change(f"metadata.{group}[{name}]", before.get(name), value, Disruption.HOT)
        for group, before, after in (
            ("labels", old.metadata.labels, new.metadata.labels),
            ("annotations", old.metadata.annotations, new.metadata.annotations),
        )
        for name, value in after.items()
        if before.get(name) != value
    ]


@dataclass(frozen=True)
class _Meaning:
    """What a change does to traffic, and the GPUs that must be free for it."""

    text: str
    gpus: int = 0
    outage: bool = False


def _meaning(old: MoEDeployment | None, new: MoEDeployment, cost: Disruption | None) -> _Meaning:
    """What the costliest class means for traffic and GPUs, under the file's own upgrade strategy."""
    if old is None:
        return _creation(new)
    if cost is None:
        return _Meaning("nothing happens.")
    if old.spec.suspend and new.spec.suspend:
        return _Meaning("suspended: nothing runs, and the change is in force when it resumes.")
    more = max(0, new.spec.replicas.min - _running(old)) if _gpus(new) and not old.spec.suspend else 0
    match cost:
        case Disruption.HOT:
            text = "no request notices."
            if more:
                text += f" {_amount(new, more)} more must be free: replicas.min asks for {more} more."
            return _Meaning(text, more * _gpus(new))
        case Disruption.ROLLING:
            return _rolling(old, new, more)
        case Disruption.REVISION:
            return _revision(old, new)


def _creation(new: MoEDeployment) -> _Meaning:
    if new.spec.suspend:
        return _Meaning(f"suspended: nothing starts. {_without_local(new)}")
    if not _gpus(new):
        return _Meaning("a gateway in front of an engine that runs elsewhere: no GPU is taken.")
    count = new.spec.replicas.min
    return _Meaning(f"a Ray cluster starts: {_amount(new, count)} must be free.", count * _gpus(new))


def _rolling(old: MoEDeployment, new: MoEDeployment, more: int) -> _Meaning:
    running = _running(old)
    gpus = more * _gpus(new)
    if running > 1:
        at_once = max(1, running // 5)
        whole = f"{at_once} of {running} replicas at a time {'is' if at_once == 1 else 'are'} replaced"
        return _Meaning(f"{whole}; the others answer meanwhile.", gpus)
    if running == 1:
        why = "an outage: the only replica stops before its successor starts."
        return _Meaning(f"{why} {_without_local(new)}", gpus, outage=True)
    return _Meaning("no replica runs, so nothing is interrupted.", gpus)


def _revision(old: MoEDeployment, new: MoEDeployment) -> _Meaning:
    running = _running(old)
    given = running * _gpus(old)
    if new.spec.suspend:
        text = f"the Ray cluster is deleted and {_amount(old, running)} given back. {_without_local(new)}"
        return _Meaning(text, outage=not _may_spill(new))
    if not _gpus(new):
        freed = f"; then {_amount(old, running)} given back" if given else ""
        return _Meaning(f"the gateway turns to the external engine{freed}.")
    count = min(max(running, new.spec.replicas.min), new.spec.replicas.ceiling)
    wanted = count * _gpus(new)
    if not given:
        return _Meaning(f"a Ray cluster starts: {_amount(new, count)} must be free. Nothing local runs now.", wanted)
    upgrade = new.spec.upgrade
    beyond = max(0, wanted - given)
    place = f"{_amount(old, running)} are given back first, {_amount(new, count)} taken"
    place += f": {beyond} more must be free." if beyond else "."
    match upgrade.strategy:
        case UpgradeStrategy.SURGE:
            steps = ", ".join(str(step) for step in upgrade.steps)
            return _Meaning(
                f"Surge: a second Ray cluster starts beside the one that runs: {_amount(new, count)} must be free."
                f" Traffic moves to it in steps of {steps} %, each for {upgrade.step_duration} while the SLO holds;"
                f" then the old one is drained and deleted.",
                wanted,
            )
        case UpgradeStrategy.BRIDGE:
            return _Meaning(
                f"Bridge: the old Ray cluster goes before the new one starts, and the closed API carries the traffic"
                f" until then, within its budget and data policy (at most {upgrade.progress_deadline}). {place}",
                beyond,
            )
        case UpgradeStrategy.RECREATE:
            return _Meaning(
                f"Recreate: an outage, from the end of the old Ray cluster until the new one answers (at most"
                f" {upgrade.progress_deadline}). {place}",
                beyond,
                outage=True,
            )


def _running(resource: MoEDeployment | None) -> int:
    """Replicas now: what the operator asked for last, else the least that the spec wants."""
    if resource is None or resource.spec.suspend or not _gpus(resource):
        return 0
    return (resource.status.replicas if resource.status else 0) or resource.spec.replicas.min


def _gpus(resource: MoEDeployment) -> int:
    """GPUs of a replica; 0 where the engine runs elsewhere."""
    return resource.spec.hardware.gpus_per_replica if resource.spec.hardware else 0


def _amount(resource: MoEDeployment, replicas: int) -> str:
    hardware = resource.spec.hardware
    kind = hardware.accelerator if hardware else ""
    unit = "CPU ranks" if kind == "cpu" else f"{kind} GPUs"
    return f"{replicas * _gpus(resource)} {unit} ({replicas} × {_gpus(resource)})"


def _may_spill(resource: MoEDeployment) -> bool:
    fallback = resource.spec.fallback
    return bool(fallback.targets) and fallback.data_policy.egress is not Egress.NEVER


def _without_local(resource: MoEDeployment) -> str:
    if _may_spill(resource):
        return "Meanwhile the gateway answers from the closed API, within its budget and data policy."
    return "Meanwhile the gateway answers 503: no closed API may be used."
