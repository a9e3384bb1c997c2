"""The reflector against every fault of a watch: its store ends up as the server's, and it never hammers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_core.clock import FakeClock
from moe_kube.errors import Forbidden, Gone, NotFound, ServerError, Unreachable
from moe_kube.objects import Ref
from moe_kube.reflector import RESTORED_S, Reflector
from tests.kube.scripted import KIND, Hang, ScriptedApi, added, bookmark, deleted, modified, page, thing

MISSING = NotFound("404 page not found", kind_missing=True)


def ref(name: str) -> Ref:
    return Ref(KIND, "default", name)


class Watched:
    """A reflector on a script, with what it told its handler."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.api = ScriptedApi(self.clock)
        self.changes: list[tuple[str, str | None, str | None]] = []
        self.absences: list[bool] = []
        self.reflector: Reflector[str] = Reflector(
            self.api,
            KIND,
            project=lambda obj: obj["data"]["value"],
            clock=self.clock,
            on_change=lambda on, old, new: self.changes.append((on.name, old, new)),
            on_absent=self.absences.append,
            rng=random.Random(7),
            **options,
        )

    def store(self) -> dict[str, str]:
        return {on.name: value for on, value in self.reflector.items()}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.reflector.run())
        try:
            await self.clock.advance(0)
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert self.api.open_watches == 0


@pytest.fixture
def make() -> Callable[..., Watched]:
    return Watched


async def test_lists_all_pages_then_follows_the_watch(make):
    it = make()
    it.api.lists = [page(thing("a", 3), at=10, token="next"), page(thing("b", 4), at=10)]
    it.api.watches = [[added("c", 11), modified("a", 12), deleted("b", 13), bookmark(20)]]
    assert not it.reflector.synced
    async with it.running():
        assert it.reflector.synced
        assert it.store() == {"a": "v12", "c": "v11"}
        assert it.api.listed == [(0.0, ""), (0.0, "next")]
        assert it.api.watched[0] == (0.0, "10")
        assert it.reflector.resource_version == "20"
        assert it.changes == [
            ("a", None, "v3"),
            ("b", None, "v4"),
            ("c", None, "v11"),
            ("a", "v3", "v12"),
            ("b", "v4", None),
        ]


@pytest.mark.parametrize(
    "end",
    [[], [Unreachable("reset")], [Hang(90), Unreachable("nothing heard")], [ServerError("500", status=500)]],
    ids=["ended by the server", "connection dropped", "silent half-open connection", "error in the stream"],
)
async def test_watches_on_from_the_last_version_without_a_new_list(make, end):
    it = make()
    it.api.lists = [page(thing("a", 3), at=10)]
    it.api.watches = [[modified("a", 11), bookmark(15), *end], [modified("a", 16)]]
    async with it.running():
        await it.clock.advance(95)
        assert [version for _, version in it.api.watched[:2]] == ["10", "15"]
        assert it.store() == {"a": "v16"}
        assert it.reflector.lists_total == 1
        assert it.reflector.trouble is None


async def test_lists_again_when_its_version_is_too_old(make):
    it = make()
    it.api.lists = [page(thing("a", 3), thing("b", 4), at=10), page(thing("a", 30), thing("c", 31), at=40)]
    it.api.watches = [[Gone("too old resource version", status=410)], []]
    async with it.running():
        await it.clock.advance(5)
        assert it.store() == {"a": "v30", "c": "v31"}
        assert it.changes[2:] == [("b", "v4", None), ("a", "v3", "v30"), ("c", None, "v31")]


async def test_a_continue_token_that_expired_starts_the_list_again(make):
    it = make()
    it.api.lists = [
        page(thing("a", 3), at=10, token="next"),
        Gone("the continue token is too old", status=410),
        page(thing("a", 3), thing("b", 4), at=20),
    ]
    async with it.running():
        await it.clock.advance(5)
        assert it.store() == {"a": "v3", "b": "v4"}


async def test_duplicates_are_harmless_even_of_what_was_deleted(make):
    it = make()
    it.api.lists = [page(thing("a", 3), at=10)]
    again = modified("a", 11)
    it.api.watches = [[again, again, deleted("a", 12), again, deleted("a", 12), added("b", 13), added("b", 13)]]
    async with it.running():
        assert it.store() == {"b": "v13"}
        assert it.changes == [("a", None, "v3"), ("a", "v3", "v11"), ("a", "v11", None), ("b", None, "v13")]


async def test_a_delete_of_the_former_object_leaves_the_new_one(make):
    it = make()
    it.api.lists = [page(thing("a", 9, uid="new"), at=10)]
    it.api.watches = [[deleted("a", 8, uid="old")]]
    async with it.running():
        assert it.store() == {"a": "v9"}


async def test_a_missed_delete_is_found_by_the_safety_list(make):
    it = make(relist_every_s=600.0)
    it.api.lists = [page(thing("a", 3), thing("b", 4), at=10), page(thing("a", 3), at=12)]
    it.api.watches = [[Hang(1000)] for _ in range(9)]
    async with it.running():
        await it.clock.advance(450)
        assert it.reflector.lists_total == 1
        it.api.watches = []
        await it.clock.advance(1500)
        assert it.store() == {"a": "v3"}
        assert it.changes[2:] == [("b", "v4", None)]


async def test_a_busy_watch_does_not_put_the_safety_list_off(make):
    it = make(relist_every_s=100.0)
    it.api.lists = [page(thing("a", 3), thing("b", 4), at=10), page(thing("a", 50), at=60)]
    it.api.watches = [[step for n in range(11, 50) for step in (Hang(10), modified("a", n))]]
    async with it.running():
        await it.clock.advance(140)
        assert it.store() == {"a": "v50"}


async def test_a_list_older_than_what_was_seen_is_refused(make):
    it = make()
    it.api.lists = [page(thing("a", 9), at=10), page(thing("a", 2), at=5), page(thing("a", 20), at=30)]
    it.api.watches = [[modified("a", 20), Gone("too old", status=410)], []]
    async with it.running():
        await it.clock.advance(30)
        assert it.store() == {"a": "v20"}
        assert ("a", "v20", "v2") not in it.changes


async def test_a_server_restored_from_a_backup_is_believed_in_the_end(make):
    it = make()
    it.api.lists = [page(thing("a", 900), thing("b", 901), at=1000)]
    it.api.lists += [page(thing("a", 20), at=30) for _ in range(400)]
    it.api.watches = [[ServerError("Too large resource version", status=504)], []]
    async with it.running():
        await it.clock.advance(RESTORED_S - 40)
        assert it.store() == {"a": "v900", "b": "v901"}
        assert it.reflector.trouble is not None
        await it.clock.advance(120)
        assert it.store() == {"a": "v20"}
        assert it.api.watched[-1][1] == "30"


async def test_a_kind_that_is_not_served_is_absent_and_starts_by_itself(make):
    it = make(absent_s=30.0)
    it.api.lists = [MISSING, MISSING, page(thing("a", 3), at=10)]
    async with it.running():
        assert it.reflector.absent
        assert it.reflector.synced
        assert it.absences == [True]
        await it.clock.advance(14)
        assert len(it.api.listed) == 1
        await it.clock.advance(90)
        assert not it.reflector.absent
        assert it.store() == {"a": "v3"}
        assert it.absences == [True, False]


async def test_a_removed_crd_empties_the_cache(make):
    it = make(index=lambda value: [value])
    it.api.lists = [page(thing("a", 3), at=10), page(thing("a", 50), at=60)]
    it.api.watches = [[], [MISSING], []]
    async with it.running():
        await it.clock.advance(5)
        assert it.reflector.absent
        assert it.store() == {}
        assert it.reflector.by("v3") == []
        assert it.changes == [("a", None, "v3"), ("a", "v3", None)]
        await it.clock.advance(60)
        assert it.store() == {"a": "v50"}
        assert it.absences == [True, False]


async def test_a_404_that_is_not_about_the_kind_keeps_the_cache(make):
    it = make()
    it.api.lists = [page(thing("a", 3), at=10)]
    it.api.watches = [[NotFound("<html>not here</html>")]]
    async with it.running():
        await it.clock.advance(5)
        assert it.store() == {"a": "v3"}
        assert not it.reflector.absent


@pytest.mark.parametrize("error", [ServerError("503", status=503), Unreachable("refused"), Forbidden("no right")])
async def test_errors_are_answered_by_waiting_longer_and_longer(make, error):
    it = make()
    it.api.lists = [error for _ in range(1000)]
    async with it.running():
        await it.clock.advance(600)
        assert not it.reflector.synced
        assert it.reflector.trouble is error
        # Full jitter below 30 s: one attempt each 15 s or so.
        assert 20 <= len(it.api.listed) <= 80


async def test_a_watch_that_always_ends_at_once_does_not_hammer(make):
    it = make()
    it.api.lists = [page(at=10)]
    it.api.watches = [[] for _ in range(1000)]
    async with it.running():
        await it.clock.advance(600)
        assert len(it.api.watched) <= 80


async def test_gone_again_and_again_does_not_hammer(make):
    it = make()
    it.api.lists = [page(at=10) for _ in range(1000)]
    it.api.watches = [[Gone("too old", status=410)] for _ in range(1000)]
    async with it.running():
        await it.clock.advance(600)
        assert len(it.api.listed) <= 80


async def test_waits_as_long_as_the_server_says(make):
    it = make()
    it.api.lists = [ServerError("503", status=503, retry_after_s=40.0), page(at=10)]
    async with it.running():
        await it.clock.advance(39)
        assert len(it.api.listed) == 1
        await it.clock.advance(2)
        assert it.reflector.synced


async def test_the_index_follows_every_change(make):
    it = make(index=lambda value: value.split("+"))
    it.api.lists = [page(thing("a", 3, value="x+y"), thing("b", 4, value="x"), at=10)]
    it.api.watches = [[modified("a", 11, value="y+z"), deleted("b", 12)]]
    async with it.running():
        assert it.reflector.by("x") == []
        assert it.reflector.by("y") == [(ref("a"), "y+z")]
        assert it.reflector.by("z") == [(ref("a"), "y+z")]
        assert it.reflector.get(ref("a")) == "y+z"
        assert it.reflector.get(ref("b")) is None


class Server:
    """A server with a history, from which lists and watches are answered with faults drawn by hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.version = 10
        self.live: dict[str, Any] = {}
        self.history: list[Any] = []

    def change(self) -> None:
        name = self.data.draw(st.sampled_from("abc"))
        self.version += 1
        if name in self.live and self.data.draw(st.booleans()):
            del self.live[name]
            self.history.append(deleted(name, self.version))
        else:
            event = (modified if name in self.live else added)(name, self.version)
            self.live[name] = event.object
            self.history.append(event)

    def list(self) -> Any:
        return page(*self.live.values(), at=self.version)

    def watch(self, since: int) -> list[Any]:
        """The events after a version: with duplicates, cut anywhere, some deletes missing."""
        steps: list[Any] = []
        for event in self.history:
            if int(event.object["metadata"]["resourceVersion"]) <= since:
                continue
            if event.type == "DELETED" and self.data.draw(st.integers(0, 5)) == 0:
                continue
            steps += [event] * self.data.draw(st.integers(1, 2))
        ends = [Unreachable("cut"), Gone("old", status=410), ServerError("500", status=500), Hang(400)]
        return [*steps[: self.data.draw(st.integers(0, len(steps)))], self.data.draw(st.sampled_from(ends))]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_converges_on_any_history_with_any_faults(data):
    async def scenario() -> None:
        it = Watched(relist_every_s=300.0)
        server = Server(data)
        seen: dict[str, int] = {}

        def never_back(on: Ref, old: str | None, new: str | None) -> None:
            if new is not None:
                version = int(new[1:])
                assert version > seen.get(on.name, 0)
                seen[on.name] = version

        it.reflector._on_change = never_back
        async with it.running():
            for _ in range(data.draw(st.integers(1, 6))):
                for _ in range(data.draw(st.integers(0, 4))):
                    server.change()
                stale = page(thing("a", 1), at=2)
                it.api.lists = [stale] * data.draw(st.integers(0, 1)) if it.reflector.synced else []
                it.api.lists += [ServerError("503", status=503)] * data.draw(st.integers(0, 1)) + [server.list()] * 2
                since = int(it.reflector.resource_version or server.version)
                it.api.watches = [server.watch(since), [Hang(50)]]
                await it.clock.advance(data.draw(st.integers(1, 200)))
            it.api.lists = [server.list() for _ in range(50)]
            it.api.watches = [[Hang(100)] for _ in range(200)]
            await it.clock.advance(2000)
            assert it.store() == {name: obj["data"]["value"] for name, obj in server.live.items()}

    asyncio.run(scenario())
