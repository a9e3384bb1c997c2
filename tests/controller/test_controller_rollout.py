"""How traffic moves: each strategy to its end, back on failure, and rules that hold at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_api.enums import UpgradeStrategy
from moe_api.status import RevisionPhase as Phase
from moe_operator.rollout import SLO_MIN_REQUESTS, UNREADY_GRACE_S, Context, Revision, Rollout, Sight, advance

READY_S = 60
OLD, NEW, THIRD = "moe-aaaa", "moe-bbbb", "moe-cccc"


@dataclass
class World:
    """Revisions that become ready some time after they are made, and gateways that take weights at once."""

    target: str | None = OLD
    strategy: UpgradeStrategy = UpgradeStrategy.SURGE
    now: int = 1_000
    generation: int = 1
    born: dict[str, int] = field(default_factory=dict)
    never_ready: set[str] = field(default_factory=set)
    unready_since: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)
    gateways: int | None = 0
    deaf: bool = False
    rollback: bool = True
    arrivals: int = 0
    starved: set[str] = field(default_factory=set)
    remembered: tuple[Revision, ...] = ()
    version: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def sight(self, name: str) -> Sight:
        unready = self.unready_since.get(name)
        ready = name not in self.never_ready and self.now - self.born[name] >= READY_S and unready is None
        share = self.shares.get(name, 1.0)
        weight = next((r.weight for r in self.remembered if r.name == name), 0)
        count = (2 if name in self.starved else 100) if weight else 0
        met = round(count * share)
        return Sight(
            exists=True,
            ready=ready,
            in_flight=self.in_flight.get(name, 0),
            met=met,
            missed=count - met,
        )

    def context(self) -> Context:
        return Context(
            now=self.now,
            generation=self.generation,
            target=self.target,
            revisions=self.remembered,
            sights={name: self.sight(name) for name in self.born},
            strategy=self.strategy,
            steps=(10, 50, 100),
            step_s=120,
            progress_s=1800,
            drain_s=600,
            rollback_on_slo_miss=self.rollback,
            weights_version=self.version,
            gateways_version=self.gateways,
            arrivals=self.arrivals,
            asked=f"asked {self.generation}",
        )

    def turn(self) -> Rollout:
        """One reconcile: decide, remember, make and delete."""
        rollout = advance(self.context())
        check(self, rollout)
        self.remembered, self.version = rollout.revisions, rollout.weights_version
        again = advance(self.context())
        assert again.revisions == rollout.revisions or self.gateways != self.version, "a second look changed it"
        for name in sorted(rollout.wanted - self.born.keys()):
            self.born[name] = self.now
            self.log.append(f"make {name}")
        for name in sorted(self.born.keys() - rollout.wanted):
            del self.born[name]
            self.log.append(f"delete {name}")
        if not self.deaf:
            self.gateways = self.version
        weights = {r.name: r.weight for r in rollout.revisions if r.weight}
        if weights != self.weights:
            self.weights = weights
            self.log.append(f"weights {weights}")
        return rollout

    def run(self, seconds: int, every: int = 10) -> Rollout:
        end = self.now + seconds
        rollout = self.turn()
        while self.now < end:
            self.now += every
            rollout = self.turn()
        return rollout

    def weight(self, name: str) -> int:
        return next((r.weight for r in self.remembered if r.name == name), 0)

    def phase(self, name: str) -> Phase | None:
        return next((r.phase for r in self.remembered if r.name == name), None)


def check(world: World, rollout: Rollout) -> None:
    """What holds at every step."""
    weights = rollout.weights
    assert sum(weights.values()) in (0, 100), weights
    assert len(rollout.revisions) == len({r.name for r in rollout.revisions})
    if world.target is not None and world.strategy == UpgradeStrategy.SURGE:
        served = [name for name, weight in weights.items() if weight]
        assert all(name in rollout.wanted for name in served), "traffic goes to what is deleted"
    for revision in rollout.revisions:
        if revision.phase == Phase.DRAINING:
            assert revision.drain_deadline is not None
            assert revision.weight == 0
    fresh = rollout.wanted - world.born.keys()
    assert len(rollout.wanted | world.born.keys()) <= 2 or not fresh, "a third cluster"


def running(**changes: object) -> World:
    """A world in which the old revision serves and the spec asks for the new one."""
    world = World()
    world.run(200)
    assert world.log == [f"make {OLD}", f"weights {{'{OLD}': 100}}"]
    world.log.clear()
    world.target = NEW
    world.generation = 2
    for name, value in changes.items():
        setattr(world, name, value)
    return world


def test_the_first_revision_takes_no_traffic_before_it_is_ready() -> None:
    world = World()
    world.run(READY_S - 10)
    assert world.weight(OLD) == 0
    world.run(20)
    assert (world.weight(OLD), world.phase(OLD)) == (100, Phase.SERVING)


def test_surge_moves_traffic_in_steps_and_then_drains_the_old_one() -> None:
    world = running()
    world.in_flight = {OLD: 3}
    world.run(60 + 3 * 120 + 60)
    assert world.log == [
        f"make {NEW}",
        f"weights {{'{OLD}': 90, '{NEW}': 10}}",
        f"weights {{'{OLD}': 50, '{NEW}': 50}}",
        f"weights {{'{NEW}': 100}}",
    ]
    assert world.phase(OLD) == Phase.DRAINING
    world.in_flight = {}
    world.run(20)
    assert world.log[-1] == f"delete {OLD}"
    assert [r.name for r in world.remembered] == [NEW]


def test_a_drain_ends_at_its_deadline_whatever_is_in_flight() -> None:
    world = running(in_flight={OLD: 1})
    world.run(2000)
    assert world.log[-1] == f"delete {OLD}"


@pytest.mark.parametrize("strategy", [UpgradeStrategy.BRIDGE, UpgradeStrategy.RECREATE])
def test_bridge_and_recreate_drain_first_and_take_no_local_request_meanwhile(strategy: UpgradeStrategy) -> None:
    world = running(strategy=strategy)
    world.run(300)
    assert world.log == ["weights {}", f"delete {OLD}", f"make {NEW}", f"weights {{'{NEW}': 100}}"]
    assert [r.name for r in world.remembered] == [NEW]


BACK: dict[str, tuple[Callable[[World], None], list[str]]] = {
    "surge, never ready": (
        lambda world: world.never_ready.add(NEW),
        [f"make {NEW}", f"delete {NEW}"],
    ),
    "surge, breaks the SLO": (
        lambda world: world.shares.update({NEW: 0.5}),
        [f"make {NEW}", f"weights {{'{OLD}': 90, '{NEW}': 10}}", f"weights {{'{OLD}': 100}}", f"delete {NEW}"],
    ),
    "bridge, never ready": (
        lambda world: (world.never_ready.add(NEW), setattr(world, "strategy", UpgradeStrategy.BRIDGE))[0],
        [
            *("weights {}", f"delete {OLD}", f"make {NEW}", f"delete {NEW}", f"make {OLD}"),
            f"weights {{'{OLD}': 100}}",
        ],
    ),
    "recreate, never ready": (
        lambda world: (world.never_ready.add(NEW), setattr(world, "strategy", UpgradeStrategy.RECREATE))[0],
        [
            *("weights {}", f"delete {OLD}", f"make {NEW}", f"delete {NEW}", f"make {OLD}"),
            f"weights {{'{OLD}': 100}}",
        ],
    ),
}


@pytest.mark.parametrize("case", BACK, ids=list(BACK))
def test_back_on_failure(case: str) -> None:
    spoil, log = BACK[case]
    world = running()
    spoil(world)
    rollout = world.run(2700)
    assert world.log == log
    assert rollout.rolled_back
    assert (world.weight(OLD), world.phase(OLD), world.phase(NEW)) == (100, Phase.SERVING, Phase.FAILED)
    world.run(600)
    assert world.log == log, "it is not tried again for the same spec"


def test_a_changed_spec_tries_a_failed_revision_again() -> None:
    world = running(shares={NEW: 0.5})
    world.run(600)
    world.shares, world.generation = {}, 3
    world.run(1000)
    assert [r.name for r in world.remembered] == [NEW]
    assert world.weight(NEW) == 100


def test_a_revision_that_is_as_slow_as_the_old_one_is_not_blamed() -> None:
    world = running(shares={NEW: 0.7, OLD: 0.7})
    world.run(1000)
    assert world.weight(NEW) == 100


def test_a_step_waits_where_rollback_is_off() -> None:
    world = running(shares={NEW: 0.5}, rollback=False)
    rollout = world.run(1000)
    assert world.weight(NEW) == 10
    assert "the step waits" in rollout.waits_for


def test_a_revision_that_gateways_spill_past_is_not_promoted_and_goes_at_the_deadline() -> None:
    world = running(arrivals=1000, starved={NEW})
    rollout = world.run(1000)
    assert world.weight(NEW) == 10
    assert "expect it to be late" in rollout.waits_for
    rollout = world.run(1000)
    assert (world.weight(OLD), world.phase(NEW)) == (100, Phase.FAILED)


def test_a_step_waits_for_every_gateway() -> None:
    world = running()
    world.run(60)
    world.deaf = True
    world.run(1000)
    assert world.weight(NEW) == 50, "the step that no gateway knows of is not left"
    world.deaf = False
    world.run(1000)
    assert world.weight(NEW) == 100


def test_a_silent_gateway_holds_the_steps_and_the_drain() -> None:
    world = running(deaf=True, gateways=None)
    world.run(1000)
    assert world.weight(NEW) == 10


def test_unready_for_a_moment_is_forgiven_and_for_longer_is_not() -> None:
    world = running()
    world.run(100)
    world.unready_since[NEW] = world.now
    world.run(UNREADY_GRACE_S - 10)
    assert world.weight(NEW) == 10
    world.run(20)
    assert (world.weight(NEW), world.phase(NEW)) == (0, Phase.FAILED)
    assert world.weight(OLD) == 100


def test_going_back_to_the_old_spec_in_mid_upgrade_is_at_once() -> None:
    world = running()
    world.run(250)
    assert world.weight(NEW) == 50
    world.target, world.generation = OLD, 3
    world.run(20)
    assert world.weight(OLD) == 100
    assert world.log[-1] == f"delete {NEW}"


def test_a_third_spec_in_mid_upgrade_never_runs_three_clusters() -> None:
    world = running(in_flight={NEW: 1})
    world.run(100)
    world.target, world.generation = THIRD, 3
    world.run(3000)
    assert world.weight(THIRD) == 100
    assert world.log.index(f"delete {NEW}") < world.log.index(f"make {THIRD}")


def test_a_new_revision_replaces_one_that_does_not_answer_without_steps() -> None:
    world = running()
    world.unready_since[OLD] = world.now
    world.run(READY_S + 10)
    assert world.weight(NEW) == 100


def test_suspend_drains_and_gives_the_cluster_back_and_resume_makes_it_again() -> None:
    world = running(target=None, in_flight={OLD: 1})
    world.run(60)
    assert world.log == ["weights {}"]
    world.in_flight = {}
    world.run(20)
    assert world.log == ["weights {}", f"delete {OLD}"]
    assert world.remembered == ()
    world.target = OLD
    world.run(100)
    assert world.weight(OLD) == 100


def test_a_lost_status_takes_over_what_runs() -> None:
    world = running(target=OLD)
    before = world.version
    world.remembered, world.version = (Revision(OLD),), 0
    rollout = advance(replace(world.context(), highest_version=before, gateways_version=before))
    assert rollout.weights == {OLD: 100}
    assert rollout.weights_version > before, "gateways take no version that is not higher"


def test_few_requests_say_nothing() -> None:
    assert SLO_MIN_REQUESTS >= 20


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["target", "strategy", "spoil", "heal", "busy", "idle", "deaf", "hears", "vanish", "nothing"]),
        st.sampled_from([OLD, NEW, THIRD]),
        st.sampled_from(list(UpgradeStrategy)),
        st.integers(1, 900),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_whatever_happens_it_converges(events: list[tuple[str, str, UpgradeStrategy, int]]) -> None:
    world = World()
    for kind, name, strategy, seconds in events:
        match kind:
            case "target":
                world.target, world.generation = name, world.generation + 1
            case "strategy":
                world.strategy = strategy
            case "spoil":
                world.shares[name] = 0.3
                world.never_ready.add(name)
            case "heal":
                world.shares.pop(name, None)
                world.never_ready.discard(name)
                world.unready_since.pop(name, None)
            case "busy":
                world.in_flight[name] = 5
            case "idle":
                world.in_flight.pop(name, None)
            case "deaf":
                world.deaf = True
            case "hears":
                world.deaf = False
            case "vanish":
                world.born.pop(name, None)
        world.run(seconds, every=37)
    world.never_ready, world.shares, world.in_flight, world.unready_since = set(), {}, {}, {}
    world.deaf = False
    world.generation += 1
    world.run(8000, every=50)
    assert [r.name for r in world.remembered] == [world.target]
    assert set(world.born) == {world.target}
    assert world.weight(world.target or "") == 100
    before = list(world.log)
    world.run(1000, every=50)
    assert world.log == before
