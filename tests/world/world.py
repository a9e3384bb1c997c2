"""A cluster with everything around the operator: KubeRay, Kubernetes' controllers, the garbage collector, and time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from moe_core.clock import FakeClock
from moe_kube.fake import FakeCluster
from moe_kube.fake_kinds import ALL
from moe_kube.objects import Kind
from tests.world.controllers import Deployments
from tests.world.kuberay import KubeRay

MAX_STEPS = 100


class World:
    """All simulators on one cluster; nothing moves but by `settle` and `run`."""

    def __init__(
        self,
        *,
        kinds: Iterable[Kind] = ALL,
        ray_ready_after_s: float = 30.0,
        pods_ready_after_s: float = 5.0,
    ) -> None:
        self.clock = FakeClock()
        self.cluster = FakeCluster(clock=self.clock, kinds=kinds)
        self.kuberay = KubeRay(self.cluster, ready_after_s=ray_ready_after_s)
        self.deployments = Deployments(self.cluster, ready_after_s=pods_ready_after_s)

    def step(self) -> int:
        """Each controller once. Returns how many writes they made."""
        return self.kuberay.step() + self.deployments.step() + self.cluster.collect_garbage()

    def settle(self) -> int:
        """Until no controller has anything to do at this time. AssertionError where they never rest."""
        total = 0
        for _ in range(MAX_STEPS):
            made = self.step()
            total += made
            if not made:
                return total
        raise AssertionError(f"the controllers did not rest within {MAX_STEPS} steps")

    async def run(
        self, seconds: float, act: Callable[[], Awaitable[object]] | None = None, tick_s: float = 1.0
    ) -> None:
        """Let time pass in ticks; after each, `act` (a reconcile) and the controllers have their turn."""
        end_s = self.clock.monotonic() + seconds
        while self.clock.monotonic() < end_s:
            await self.clock.advance(min(tick_s, end_s - self.clock.monotonic()))
            if act is not None:
                await act()
            self.settle()
