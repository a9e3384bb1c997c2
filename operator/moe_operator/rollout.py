"""How traffic moves between revisions: from what is remembered and what is seen to what should run, and with which
weight.

Pure: the same context gives the same answer. What must outlive a crash (weights, deadlines, failures) is in the
answer and is written to status before anything is done about it. All times are whole seconds of Unix time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_api.enums import UpgradeStrategy
from moe_api.status import RevisionPhase as Phase

SLO_SHARE = 0.95
"""Share of requests that must keep the SLO: the objective is a 95th percentile."""
SLO_SLACK = 0.02
"""A new revision may be this much worse than the old one at the same time, before it is blamed for a bad share."""
SLO_MIN_REQUESTS = 20
"""Fewer finished requests than this say nothing."""
SLO_FEW = 0.25
"""Below this share of the requests that its weight should have brought, a revision is being spilled past."""
UNREADY_GRACE_S = 30
"""A revision that takes traffic may be unready for this long before the traffic is taken from it."""
POLL_S = 5
"""How often gateways are asked while traffic moves."""


@dataclass(frozen=True, slots=True)
class Revision:
    """What is remembered of a revision, in status."""

    name: str
    phase: Phase = Phase.PENDING
    weight: int = 0
    step_started_at: int | None = None
    drain_deadline: int | None = None
    failed_generation: int | None = None
    failed_for: str | None = None
    """`Context.asked` when it failed."""
    served: bool = False
    """It has carried all the traffic: it has proven itself, and is what a failed upgrade returns to."""
    message: str | None = None
    slo_percent: int | None = None
    """Share of its requests within the SLO when the last step away from it began: what the next one is held to."""
    unready_since: int | None = None
    """Since when it takes traffic and is not ready."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of a revision."""

    exists: bool = False
    """Its RayService is there, even if it is on its way out."""
    deleting: bool = False
    ready: bool = False
    in_flight: int | None = None
    """Requests at it over all gateways; None where a gateway did not say."""
    met: int = 0
    missed: int = 0
    """Finished requests of the last window within and without the SLO; failures count as missed."""


NOTHING = Sight()


@dataclass(frozen=True, slots=True)
class Context:
    """Everything that the decision rests on."""

    now: int
    generation: int
    target: str | None
    """Revision that the spec asks for; None while suspended."""
    revisions: tuple[Revision, ...]
    sights: dict[str, Sight]
    strategy: UpgradeStrategy
    steps: tuple[int, ...]
    step_s: int
    progress_s: int
    drain_s: int
    rollback_on_slo_miss: bool
    weights_version: int
    gateways_version: int | None
    """Lowest version of the weights in force on any gateway; None where one did not say; no gateways: the newest."""
    highest_version: int = 0
    """Highest version that any gateway has seen."""
    arrivals: int = 0
    """Requests that came to all gateways in the last window."""
    asked: str = ""
    """Digest of what the spec asks for, hot fields left out: a failed revision is tried again when that changes."""

    def sight(self, name: str) -> Sight:
        return self.sights.get(name, NOTHING)

    @property
    def acknowledged(self) -> bool:
        return self.gateways_version is not None and self.gateways_version >= self.weights_version


@dataclass(frozen=True, slots=True)
class Rollout:
    """The answer: what to remember, what should run, and when to look again."""

    revisions: tuple[Revision, ...]
    wanted: frozenset[str]
    """Revisions whose RayService should exist; every other one goes."""
    weights_version: int
    rolled_back: str = ""
    """Why the revision that the spec asks for does not serve, where it has failed."""
    waits_for: str = ""
    late: str = ""
    """What has taken too long, and nothing can be done about it but by a person."""
    requeue_s: float | None = None

    @property
    def weights(self) -> dict[str, int]:
        return {revision.name: revision.weight for revision in self.revisions}


def advance(context: Context) -> Rollout:
    """One step of the rollout; calling it again with what it remembered and nothing new seen changes nothing."""
    return _Turn(context).run()


class _Turn:
    """One call of `advance`: revisions by name while they are being decided on."""

    def __init__(self, context: Context) -> None:
        self.c = context
        self.revisions = {revision.name: self._watched(revision) for revision in context.revisions}
        self.wanted: set[str] = set()
        self.times: list[int] = []
        self.polls = False
        self.rolled_back = ""
        self.waits_for = ""
        self.late = ""

    def run(self) -> Rollout:
        c = self.c
        if c.target is None:
            for name in list(self.revisions):
                self._drain(name)
                self._forget_when_gone(name)
        else:
            self._toward(c.target)
        return self._answer()

    def _watched(self, revision: Revision) -> Revision:
        """KubeRay does not say since when an application is not well, so it is remembered here."""
        well = revision.weight == 0 or self.c.sight(revision.name).ready
        since = None if well else revision.unready_since if revision.unready_since is not None else self.c.now
        return replace(revision, unready_since=since)

    # What is wanted

    def _toward(self, target: str) -> None:
        c = self.c
        own = self.revisions.get(target, Revision(target))
        if own.phase == Phase.FAILED and not self._failed_for_this(own):
            own = Revision(target)  # something else is asked for since: it gets another chance
        self.revisions[target] = own
        if own.phase == Phase.FAILED:
            self._return_home(target)
            return
        home = self._home(target)
        if home is None:
            self._alone(target)
        elif self._leads_at_once(target, home):
            self._serve(target)
            self._drain_others({target})
        elif c.strategy == UpgradeStrategy.SURGE:
            self._surge(target, home)
        else:
            self._replace(target)

    def _failed_for_this(self, own: Revision) -> bool:
        if own.failed_generation is None:
            return False
        return own.failed_for == self.c.asked if own.failed_for else own.failed_generation == self.c.generation

    def _home(self, target: str) -> str | None:
        """The revision that serves now, if another than the target does."""
        running = [
            revision
            for revision in self.revisions.values()
            if revision.name != target
            and revision.phase != Phase.FAILED
            and self.c.sight(revision.name).exists
            and not self.c.sight(revision.name).deleting
        ]
        if not running:
            return None
        best = max(running, key=lambda r: (r.weight, r.phase == Phase.SERVING, r.served, r.drain_deadline or 0, r.name))
        return best.name

    def _leads_at_once(self, target: str, home: str) -> bool:
        """A revision that has proven itself, or faces one that does not answer, needs no steps."""
        sight = self.c.sight(target)
        own = self.revisions[target]
        proven = own.phase == Phase.SERVING or (own.phase == Phase.DRAINING and own.served)
        return sight.ready and not sight.deleting and (proven or not self.c.sight(home).ready)

    # Ways to go

    def _alone(self, target: str) -> None:
        """Nothing else runs: the first start, or the second half of Bridge and Recreate."""
        own, sight = self.revisions[target], self.c.sight(target)
        if sight.ready and not sight.deleting:
            self._serve(target)
            self._drain_others({target})
            return
        if own.phase == Phase.SERVING and sight.exists:
            self.wanted.add(target)  # it will be back: gateways bridge a revision that is not ready by themselves
            self._drain_others({target})
            self._complain(own)
            return
        kept = [r.name for r in self.revisions.values() if r.name != target and r.phase != Phase.FAILED]
        gone = [name for name in kept if not self.c.sight(name).exists]
        for name in kept:
            self._drain(name)
            if name in gone and not self.revisions[name].served:
                del self.revisions[name]  # nothing that anybody would return to
        gone = [name for name in gone if name in self.revisions]
        if any(self.c.sight(name).exists for name in self.revisions if name != target):
            self._wait(target, "waits until the revision before is gone")
            return
        started = self._start(target)
        if not self._overdue(started):
            return
        if gone:
            self._fail(target, "did not become ready in time")
        else:
            self._late(target)

    def _surge(self, target: str, home: str) -> None:
        c, own, sight = self.c, self.revisions[target], self.c.sight(target)
        self._keep(home)
        self._drain_others({target, home})
        extras = [n for n in self.revisions if n not in (target, home) and c.sight(n).exists]
        if not sight.exists and extras:
            self._wait(target, f"waits until {extras[0]} is gone")
            self._share(target, home, 0)
            return
        if own.phase in (Phase.PENDING, Phase.STARTING, Phase.DRAINING):
            started = self._start(target)
            self._share(target, home, 0)
            if sight.ready and not sight.deleting:
                self._step(target, home, c.steps[0])
            elif self._overdue(started):
                self._fail(target, "did not become ready in time")
            return
        self.wanted.add(target)
        self._promote(target, home)

    def _promote(self, target: str, home: str) -> None:
        c, own = self.c, self.revisions[target]
        self.polls = True
        started = own.step_started_at if own.step_started_at is not None else c.now
        self._share(target, home, own.weight)
        failed, waits = self._objection(target, home, started)
        following = [step for step in c.steps if step > own.weight]
        if failed:
            self._fail(target, failed)
        elif waits:
            self.waits_for = waits
        elif c.now < started + c.step_s:
            self.times.append(started + c.step_s)
        elif following:
            self._step(target, home, following[0])
        else:
            self._serve(target)
            self._drain_others({target})

    def _objection(self, target: str, home: str, started: int) -> tuple[str, str]:
        """Why the target has failed, and why its next step must wait; empty where nothing speaks against it."""
        c, own, sight = self.c, self.revisions[target], self.c.sight(target)
        if not sight.exists or sight.deleting:
            return "was deleted while traffic moved to it", ""
        if not sight.ready:
            since = own.unready_since if own.unready_since is not None else c.now
            self.times.append(since + UNREADY_GRACE_S)
            late = c.now - since >= UNREADY_GRACE_S
            words = f"was not ready for {UNREADY_GRACE_S} s at {own.weight} % of the traffic"
            return (words, "") if late else ("", f"waits until {target} is ready again")
        if self._spilled_past(own, sight):
            # Gateways foresee that it would be late, and so it has little to be judged by.
            words = f"gets few of its {own.weight} % of the requests: gateways expect it to be late"
            self.times.append(started + c.progress_s)
            return (words, "") if c.now >= started + c.progress_s else ("", f"{target} {words}")
        broken = self._slo_broken(target, home)
        if broken:
            held = f"{target} {broken}; rollbackOnSloMiss is off, so the step waits"
            return (broken, "") if c.rollback_on_slo_miss else ("", held)
        return "", "" if c.acknowledged else "waits until every gateway uses the new weights"

    def _spilled_past(self, own: Revision, sight: Sight) -> bool:
        expected = self.c.arrivals * own.weight / 100
        return expected >= SLO_MIN_REQUESTS and sight.met + sight.missed + (sight.in_flight or 0) < SLO_FEW * expected

    def _slo_broken(self, target: str, home: str) -> str:
        new, old = self.c.sight(target), self.c.sight(home)
        count = new.met + new.missed
        if count < SLO_MIN_REQUESTS:
            return ""
        share = new.met / count
        if share >= SLO_SHARE:
            return ""
        before = self._percent(old)
        if before is None:
            before = self.revisions[home].slo_percent  # it takes no traffic at the last step
        if before is not None and share >= before / 100 - SLO_SLACK:
            return ""  # the load is to blame, not the revision
        return f"kept the SLO for {share:.1%} of {count} requests"

    def _replace(self, target: str) -> None:
        """Bridge and Recreate: the old one goes first; no request goes to a local revision meanwhile."""
        sight = self.c.sight(target)
        if sight.ready and not sight.deleting:  # left from another strategy, and up: nobody needs to go without
            self._serve(target)
            self._drain_others({target})
            return
        self._drain_others({target})
        if sight.exists:  # left from another strategy: it may come up while the old one drains
            started = self._start(target)
            if self._overdue(started):
                self.waits_for = f"{target} is not ready"
        else:
            self._wait(target, "waits until the revision before has drained")

    def _return_home(self, target: str) -> None:
        """The target has failed: the revision before serves again, made anew where it is gone."""
        own = self.revisions[target]
        self.rolled_back = own.message or f"{target} failed"
        candidates = [r for r in self.revisions.values() if r.name != target and r.phase != Phase.FAILED]
        home = self._home(target) or (max(candidates, key=lambda r: (r.served, r.name)).name if candidates else None)
        self._drain(target)
        if home is None:
            return
        self._drain_others({target, home})
        sight = self.c.sight(home)
        if sight.exists and not sight.deleting:
            if sight.ready or self.revisions[home].phase == Phase.SERVING:
                self._complain(self.revisions[home])
                self._serve(home)
            elif self._overdue(self._start(home)):
                self._late(home)
        elif self.c.sight(target).exists:
            self._wait(home, f"waits until {target} is gone")
        elif self._overdue(self._start(home)):
            self._late(home)

    @staticmethod
    def _percent(sight: Sight) -> int | None:
        count = sight.met + sight.missed
        return round(100 * sight.met / count) if count >= SLO_MIN_REQUESTS else None

    # Pieces

    def _set(self, name: str, **changes: object) -> Revision:
        found = replace(self.revisions[name], **changes)  # type: ignore[arg-type]
        if found.weight == 0 and found.unready_since is not None:
            found = replace(found, unready_since=None)
        self.revisions[name] = found
        return found

    def _wait(self, name: str, why: str) -> None:
        self._set(name, phase=Phase.PENDING, weight=0, step_started_at=None, drain_deadline=None, message=why)
        self.waits_for = f"{name} {why}"

    def _start(self, name: str) -> Revision:
        own = self.revisions[name]
        self.wanted.add(name)
        if own.phase != Phase.STARTING or own.step_started_at is None:
            own = self._set(name, phase=Phase.STARTING, weight=0, step_started_at=self.c.now, drain_deadline=None)
        own = self._set(name, message=None)
        if own.step_started_at is not None and self.c.now < own.step_started_at + self.c.progress_s:
            self.times.append(own.step_started_at + self.c.progress_s)
        return own

    def _overdue(self, started: Revision) -> bool:
        return started.step_started_at is not None and self.c.now >= started.step_started_at + self.c.progress_s

    def _late(self, name: str) -> None:
        self.late = f"{name} has not become ready in {self.c.progress_s} s"

    def _complain(self, serving: Revision) -> None:
        """The revision that has the traffic does not answer, and no other could."""
        if serving.unready_since is None:
            return
        at = serving.unready_since + UNREADY_GRACE_S
        self.times.append(at)
        if self.c.now >= at:
            self.late = f"{serving.name} has all the traffic and has not been ready for {UNREADY_GRACE_S} s or more"

    def _step(self, target: str, home: str, weight: int) -> None:
        self._set(target, phase=Phase.PROMOTING, step_started_at=self.c.now, drain_deadline=None, message=None)
        percent = self._percent(self.c.sight(home))
        if percent is not None:
            self._set(home, slo_percent=percent)
        self._share(target, home, weight)
        self.polls = True
        self.times.append(self.c.now + self.c.step_s)

    def _share(self, target: str, home: str, weight: int) -> None:
        self._set(target, weight=weight)
        self._set(home, weight=100 - weight)

    def _keep(self, home: str) -> None:
        self.wanted.add(home)
        self._set(home, phase=Phase.SERVING, drain_deadline=None, message=None)

    def _serve(self, name: str) -> None:
        self.wanted.add(name)
        own = self.revisions[name]
        at = own.step_started_at if own.phase == Phase.SERVING and own.weight == 100 else self.c.now
        self._set(
            name,
            phase=Phase.SERVING,
            weight=100,
            step_started_at=at,
            drain_deadline=None,
            message=None,
            slo_percent=None,
            served=own.served or self.c.sight(name).ready,
        )

    def _drain_others(self, kept: set[str]) -> None:
        for name in list(self.revisions):
            if name in kept:
                continue
            self._drain(name)
            if self._settled(kept):
                self._forget_when_gone(name)

    def _settled(self, kept: set[str]) -> bool:
        """Nothing may have to return any more: what is gone can be forgotten."""
        return any(self.revisions[name].phase == Phase.SERVING for name in kept if name in self.revisions)

    def _drain(self, name: str) -> None:
        """It gets no new request, and goes when those it has have ended. One that failed stays Failed."""
        own, sight = self.revisions[name], self.c.sight(name)
        if own.phase != Phase.FAILED:
            own = self._set(name, phase=Phase.DRAINING, step_started_at=None)
        deadline = own.drain_deadline if own.drain_deadline is not None else self.c.now + self.c.drain_s
        self._hold_until_drained(self._set(name, weight=0, drain_deadline=deadline), sight)

    def _hold_until_drained(self, own: Revision, sight: Sight) -> None:
        if not sight.exists or sight.deleting:
            return
        before = next((r for r in self.c.revisions if r.name == own.name), None)
        told = before is not None and before.drain_deadline is not None and self.c.acknowledged
        empty = told and sight.in_flight == 0
        if empty or self.c.now >= (own.drain_deadline or 0):
            return
        self.wanted.add(own.name)
        self.times.append(own.drain_deadline or self.c.now)
        self.polls = True

    def _forget_when_gone(self, name: str) -> None:
        own = self.revisions[name]
        if not self.c.sight(name).exists and own.phase in (Phase.DRAINING, Phase.FAILED) and name != self.c.target:
            del self.revisions[name]

    def _fail(self, name: str, why: str) -> None:
        self._set(
            name,
            phase=Phase.FAILED,
            weight=0,
            step_started_at=None,
            drain_deadline=self.c.now + self.c.drain_s,
            failed_generation=self.c.generation,
            failed_for=self.c.asked or None,
            served=False,
            message=f"{name} {why}",
        )
        self.wanted.discard(name)
        self._return_home(name)

    def _answer(self) -> Rollout:
        c = self.c
        revisions = tuple(self.revisions.values())
        before = {revision.name: revision.weight for revision in c.revisions}
        after = {revision.name: revision.weight for revision in revisions}
        version = c.weights_version
        if version == 0 or _spread(before) != _spread(after):
            version = max(version, c.highest_version) + 1
        elif c.highest_version > version:
            version = c.highest_version + 1  # a status that was lost: gateways keep to the highest that they know
        polls = self.polls or (c.gateways_version is not None and c.gateways_version < version)
        waits = [moment - c.now for moment in self.times if moment > c.now]
        if polls:
            waits.append(POLL_S)
        return Rollout(
            revisions=revisions,
            wanted=frozenset(self.wanted),
            weights_version=version,
            rolled_back=self.rolled_back,
            waits_for=self.waits_for,
            late=self.late,
            requeue_s=float(min(waits)) if waits else None,
        )


def _spread(weights: dict[str, int]) -> dict[str, int]:
    return {name: weight for name, weight in weights.items() if weight}
