"""Workers that tell one another their ledgers: what is counted, what is refused, and that it crosses real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from moe_core.clock import SystemClock
from moe_core.config import GatewayConfig, SiblingsConfig
from moe_core.latency import Ended, First
from moe_gateway.siblings import Counts, Siblings, Telling
from moe_gateway.state import Gateway

KEY = b"shared"
NONE = (float("inf"), 0.0)


class _Clock(SystemClock):
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


def counts(**more: Any) -> dict[str, Counts]:
    return {"r0": Counts(**{"waiting": 2, "tokens": 300.0, "running": 4, **more})}


def test_a_view_sums_own_and_others_and_forgets_the_silent() -> None:
    clock = _Clock()
    one, other = Siblings("ns/d", clock), Siblings("ns/d", clock)
    head = counts(head_tokens=200.0, head_age_s=0.4, progress_age_s=0.1)
    assert list(one.hear(other.datagram("b", head, KEY), "a", KEY)) == []
    view = one.view("r0", (1, 50.0, 1), (clock.now_s - 0.2, 50.0), 0.0)
    assert (view.waiting, view.tokens, view.running, view.head_tokens) == (3, 350.0, 5, 200.0)
    assert view.head_s == pytest.approx(0.1), "a prompt was done since the oldest was sent: work on it began then"
    clock.now_s += 2.0
    assert one.view("r0", (1, 50.0, 1), NONE, 0.0).waiting == 1


@pytest.mark.parametrize(
    ("deployment", "worker", "key", "spoil"),
    [
        pytest.param("ns/other", "b", KEY, False, id="another deployment"),
        pytest.param("ns/d", "a", KEY, False, id="its own"),
        pytest.param("ns/d", "b", b"other", False, id="another key"),
        pytest.param("ns/d", "b", KEY, True, id="malformed"),
    ],
)
def test_what_is_not_ours_counts_for_nothing(deployment: str, worker: str, key: bytes, spoil: bool) -> None:
    one, other = Siblings("ns/d", _Clock()), Siblings(deployment, _Clock())
    data = other.datagram(worker, counts(), key)
    assert not list(one.hear(data[:-3] if spoil else data, "a", KEY))
    assert one.view("r0", (0, 0.0, 0), NONE, 0.0).waiting == 0


def test_an_older_datagram_does_not_undo_a_newer_one() -> None:
    one, other = Siblings("ns/d", _Clock()), Siblings("ns/d", _Clock())
    older, newer = other.datagram("b", counts(waiting=9), KEY), other.datagram("b", counts(waiting=1), KEY)
    for data in (newer, older):
        list(one.hear(data, "a", KEY))
    assert one.view("r0", (0, 0.0, 0), NONE, 0.0).waiting == 1


def test_what_one_measures_all_learn() -> None:
    one, other = Siblings("ns/d", _Clock()), Siblings("ns/d", _Clock())
    other.listening = True
    seen = [("r0", First(100.0, 50.0, 0.0, 0.2, 3.0)), ("api", Ended(0.02, 40))]
    for name, each in seen:
        other.note(name, each)
    assert list(one.hear(other.datagram("b", {}, KEY), "a", KEY)) == seen


def free_ports() -> int:
    """A port whose successor is free too."""
    for _ in range(50):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as first, socket.socket(type=socket.SOCK_DGRAM) as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    raise AssertionError("no two free ports side by side")


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not holds():  # noqa: ASYNC110  # what it waits for comes over a socket and wakes nobody here
            await asyncio.sleep(0.01)


CONFIG = GatewayConfig.model_validate(
    {
        "deployment": "ns/d",
        "model": "m",
        "revisions": [{"name": "r0", "url": "http://127.0.0.1:1/v1"}],
        "weights": {"r0": 100},
        "slo": {"ttftP95S": 1.0, "itlP95S": 0.1},
    }
)


async def test_two_workers_of_a_pod_know_each_others_requests() -> None:
    told = SiblingsConfig(host="127.0.0.1", port=free_ports(), workers=2)
    workers = [Gateway(CONFIG, SystemClock(), name=f"w{n}") for n in range(2)]
    tasks = [asyncio.create_task(Telling(worker, told).run()) for worker in workers]
    try:
        one, other = workers
        other.upstreams["r0"].ledger.sent(1, 700.0, now_s=other.clock.monotonic())
        await eventually(lambda: one.load(one.upstreams["r0"], one.clock.monotonic()).tokens == 700.0)
        other.learn(other.upstreams["r0"], First(700.0, 700.0, 0.0, 0.3))
        other.upstreams["r0"].ledger.ended(1)
        await eventually(lambda: one.upstreams["r0"].estimate.weight > 0)
        await eventually(lambda: not one.load(one.upstreams["r0"], one.clock.monotonic()).waiting)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in workers:
            await worker.close()


async def test_pods_that_come_and_go_are_found_without_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is looked up again; what cannot be looked up keeps the addresses that it had."""
    answers: list[list[str] | None] = [["10.0.0.1"], ["10.0.0.1", "10.0.0.2"], None, ["10.0.0.2"]]
    loop = asyncio.get_running_loop()

    async def lookup(*_: object, **__: object) -> list[Any]:
        found = answers.pop(0)
        if found is None:
            raise socket.gaierror("no answer")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (address, 0)) for address in found]

    monkeypatch.setattr(loop, "getaddrinfo", lookup)
    settings = SiblingsConfig(port=9000, workers=2, peers=("pods.ns.svc",))
    telling = Telling(Gateway(CONFIG, SystemClock()), settings)
    seen = [{address for address, _ in await telling._resolve(loop, 9000)} - {"127.0.0.1"} for _ in range(4)]
    assert seen == [{"10.0.0.1"}, {"10.0.0.1", "10.0.0.2"}, {"10.0.0.1", "10.0.0.2"}, {"10.0.0.2"}]
