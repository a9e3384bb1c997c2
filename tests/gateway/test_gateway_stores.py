"""Every store of a budget does the same thing: one suite for the fake and the real ones."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest

from moe_core.clock import FakeClock
from moe_core.config import BudgetStoreConfig, GatewayConfig
from moe_gateway import money_stores
from moe_gateway.budget import Budget, BudgetUnavailable
from moe_gateway.money import MAX_BYTES, Book, Entry, Limits, total
from moe_gateway.money_object import ObjectStore
from moe_gateway.money_remote import PostgresStore, ValkeyStore
from moe_gateway.money_store import MemoryStore, SqliteStore, Store, StoreGone
from moe_gateway.settings import ConfigRefused, check
from moe_kube.fake import FakeCluster
from tests.gateway.fake_upstream import FakeUpstream
from tests.gateway.harness import config

Open = Callable[[], Store]
"""Another connection to the same document."""
VALKEY = next((path for name in ("valkey-server", "redis-server") if (path := shutil.which(name))), None)
POSTGRES = shutil.which("postgres") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/postgres")), None)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A private server, as a user who is not root: PostgreSQL will not run as root."""
    if POSTGRES is None:
        pytest.skip("postgres is not installed: tools/system-packages names what is")
    # Not below pytest's own folder, which nobody else may enter.
    folder, uid = Path(tempfile.mkdtemp(prefix="moestack-postgres-")), os.getuid()
    if uid == 0:
        entry = pwd.getpwnam("nobody")
        uid = entry.pw_uid
        os.chown(folder, uid, entry.pw_gid)
    programs = Path(POSTGRES).resolve().parent
    port, data = _free_port(), folder / "data"
    run = {"user": uid, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    make = [programs / "initdb", "-D", data, "-U", "budget", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8"]
    subprocess.run(make, check=True, **run)  # type: ignore[call-overload]
    flags = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "shared_buffers=1MB"]
    server = subprocess.Popen([programs / "postgres", "-D", data, "-p", str(port), *flags], **run)  # type: ignore[call-overload]
    try:
        _wait_for(lambda: PostgresStore(f"postgresql://budget@127.0.0.1:{port}/postgres", "probe"))
        yield f"postgresql://budget@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if VALKEY is None:
        pytest.skip("neither valkey-server nor redis-server is installed: tools/system-packages names what is")
    folder, port = tmp_path_factory.mktemp("valkey"), _free_port()
    flags = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes", "--save", ""]
    server = subprocess.Popen([VALKEY, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: ValkeyStore(f"valkey://127.0.0.1:{port}/0", "probe"))
        yield f"valkey://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(20)


def _wait_for(open_store: Open) -> None:
    """Wait until a server that was just started can be used; the test's own event loop may be running."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(_answers(open_store))).result()


async def _answers(open_store: Open) -> None:
    store = open_store()
    async with asyncio.timeout(30):
        while True:
            try:
                await store.read()
                break
            except StoreGone:
                await asyncio.sleep(0.05)
    await store.close()


KINDS = ("memory", "sqlite", "object", "postgres", "valkey")


@pytest.fixture(params=KINDS)
async def opener(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Open]:
    opened: list[Store] = []
    memory, api, name = MemoryStore(), FakeCluster().client(), f"default/{tmp_path.name}"

    def open_store() -> Store:
        match request.param:
            case "memory":
                return memory
            case "sqlite":
                store: Store = SqliteStore(tmp_path / "budget.sqlite", name)
            case "object":
                store = ObjectStore("default", "tiny-gateway-budget", api)
            case "postgres":
                store = PostgresStore(request.getfixturevalue("postgres"), name)
            case _:
                store = ValkeyStore(request.getfixturevalue("valkey"), name)
        opened.append(store)
        return store

    yield open_store
    for store in opened:
        await store.close()


async def test_there_is_nothing_before_the_first_write(opener: Open) -> None:
    store = opener()
    assert await store.read() is None
    assert not await store.swap("1", b"{}")
    assert await store.read() is None


async def test_what_is_written_is_read_by_all(opener: Open) -> None:
    one, other = opener(), opener()
    assert await one.swap(None, b'{"a":1}')
    seen = await other.read()
    assert seen is not None
    assert seen.document == b'{"a":1}'
    assert await other.swap(seen.version, b'{"a":2}')
    again = await one.read()
    assert again is not None
    assert (again.document, again.version != seen.version) == (b'{"a":2}', True)


async def test_only_the_newest_version_is_replaced(opener: Open) -> None:
    one, other = opener(), opener()
    assert await one.swap(None, b'"first"')
    assert not await other.swap(None, b'"second"')
    seen = await one.read()
    assert seen is not None
    assert await other.swap(seen.version, b'"third"')
    assert not await one.swap(seen.version, b'"fourth"')
    newest = await one.read()
    assert newest is not None
    assert newest.document == b'"third"'


async def test_of_many_at_once_one_wins_each_time(opener: Open) -> None:
    async def add(store: Store) -> None:
        for _ in range(5):
            while True:
                seen = await store.read()
                count = 0 if seen is None else int(seen.document)
                if await store.swap(None if seen is None else seen.version, str(count + 1).encode()):
                    break

    await asyncio.gather(*(add(opener()) for _ in range(4)))
    seen = await opener().read()
    assert seen is not None
    assert int(seen.document) == 20


async def test_the_largest_books_fit(opener: Open) -> None:
    store = opener()
    assert await store.swap(None, b'"' + b"x" * (MAX_BYTES - 2) + b'"')
    seen = await store.read()
    assert seen is not None
    assert len(seen.document) == MAX_BYTES


async def test_pods_keep_one_budget_together(opener: Open) -> None:
    clock = FakeClock()
    budgets = [Budget(opener(), Limits(Decimal(1)), clock) for _ in range(3)]
    for budget in budgets:
        await budget.open()
    spent = 0

    async def spend(number: int, budget: Budget) -> int:
        done = 0
        for call in range(20):
            if await budget.reserve(f"{number}/{call}", "t", Decimal("0.05")):
                budget.settle(f"{number}/{call}", Decimal("0.04"))
                done += 1
            await budget.tick()
        return done

    spent = sum(await asyncio.gather(*(spend(number, budget) for number, budget in enumerate(budgets))))
    book = await budgets[0].books()
    for budget in budgets:
        await budget.tick()
        await budget.tick()
    book = await budgets[0].books()
    (day,) = book.days.values()
    assert total(day.known()) == spent * 4 * 10**10 <= 10**12
    assert spent >= 22


Broken = dict[str, Callable[[Path], Store]]
BROKEN: Broken = {
    "a folder that is a file": lambda tmp: SqliteStore(_file(tmp) / "b.sqlite", "d"),
    "no PostgreSQL there": lambda tmp: PostgresStore(f"postgresql://u:secret@127.0.0.1:{_free_port()}/d", "d"),
    "no address of PostgreSQL": lambda tmp: PostgresStore("nonsense:secret", "d"),
    "no Valkey there": lambda tmp: ValkeyStore(f"valkey://:secret@127.0.0.1:{_free_port()}/0", "d"),
}


def _file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
async def test_a_store_that_is_not_there_says_so_without_its_password(
    make: Callable[[Path], Store], tmp_path: Path
) -> None:
    store = make(tmp_path)
    calls: list[Callable[[], Awaitable[object]]] = [store.read, lambda: store.swap(None, b"{}")]
    for call in calls:
        with pytest.raises(StoreGone) as gone:
            await call()
        assert "secret" not in str(gone.value)
    budget = Budget(store, Limits(Decimal(1)), FakeClock())
    with pytest.raises(BudgetUnavailable):
        await budget.open()
    with pytest.raises(BudgetUnavailable):
        await budget.reserve("a", "t", Decimal("0.1"))
    await budget.close()


async def test_books_of_another_kind_allow_no_spending() -> None:
    store = MemoryStore()
    await store.swap(None, b'{"version": 2}')
    budget = Budget(store, Limits(Decimal(1)), FakeClock())
    with pytest.raises(BudgetUnavailable, match="version 2"):
        await budget.open()
    assert budget.left_usd() == 0


def _settings(**store: object) -> GatewayConfig:
    made = config(FakeUpstream(), FakeUpstream(), price=("1", "1"), spill={"usdPerDay": "1"}, stateDir="/tmp/x")
    return made.model_copy(update={"budget_store": BudgetStoreConfig.model_validate(store)})


REFUSED = {
    "SQLite for several pods": ({"kind": "SQLite", "pods": 2}, r"budgetStore\.kind: SQLite serves one host"),
    "PostgreSQL without an address": ({"kind": "PostgreSQL", "pods": 2}, r"budgetStore\.urlFile"),
    "Valkey without an address": ({"kind": "Valkey"}, r"budgetStore\.urlFile"),
    "Object without a name": ({"kind": "Object", "object": "name"}, r"budgetStore\.object"),
}


@pytest.mark.parametrize(("store", "says"), REFUSED.values(), ids=REFUSED)
def test_a_store_that_cannot_serve_is_refused_by_its_field(store: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigRefused, match=says):
        check(_settings(**store))


async def test_each_kind_has_its_store(tmp_path: Path) -> None:
    url = tmp_path / "url"
    url.write_text("valkey://127.0.0.1:1/0\n")
    kinds = {
        "SQLite": {},
        "PostgreSQL": {"urlFile": str(url)},
        "Valkey": {"urlFile": str(url)},
        "Object": {"object": "a/b"},
    }
    made = [money_stores.store_of(_settings(kind=kind, **more)) for kind, more in kinds.items()]
    assert [type(store) for store in made] == [SqliteStore, PostgresStore, ValkeyStore, ObjectStore]
    gone = money_stores.store_of(_settings(kind="Valkey", urlFile=str(tmp_path / "none")))
    assert gone is not None
    with pytest.raises(StoreGone, match="urlFile"):
        await gone.read()
    for store in made:
        assert store is not None
        await store.close()


def test_a_day_is_folded_by_number_and_what_was_never_reported_is_lost() -> None:
    book, limits = Book(), Limits(Decimal(10), Decimal(100))
    for day in range(1, 6):
        name = f"2026-11-{day:02d}"
        granted = book.lend("h", name, book.entry(name, "h"), {"": 10**12}, limits)
        assert granted == {"": 10**12}
        if day != 2:
            book.fold("h", name, {"a": {"t": day}})
    used = book.used_in_month("2026-11")
    book.tidy()
    assert sorted(book.days) == ["2026-11-03", "2026-11-04", "2026-11-05"]
    assert book.used_in_month("2026-11") == used == 1 + 3 + 4 + 5 + 10**12
    assert book.spent_in_month("2026-11") == {"a": {"t": 13}, "": {"lost": 10**12}}
    assert book.left("2026-11-02", "", limits) == 0, "the books of a folded day are closed"
    assert Book.read(book.write()) == book


def test_a_day_that_whoever_tidies_still_holds_is_not_folded() -> None:
    book, limits = Book(), Limits(Decimal(10), Decimal(100))
    for day in range(1, 6):
        book.lend("h", f"2026-11-{day:02d}", Entry(), {"": 10**12}, limits)
    book.tidy("h")
    assert (len(book.days), book.folded) == (5, "")
    book.fold("h", "2026-11-01", {"a": {"t": 7}})
    book.tidy("h")
    assert (len(book.days), book.folded, book.months) == (4, "2026-11-01", {"2026-11": {"a": {"t": 7}}})
