"""Carries out a stack plan: starts its parts as they become possible, watches them, and leaves no process behind.

One process for one stack (`moectl supervise STATE`). Its children die with it; what they detach, it adopts. It writes
what it knows to state.json and talks to nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import psutil

from moe_cli import announce, processes
from moe_cli.bind import Unbound, bind
from moe_cli.documents import (
    PLAN,
    TARGETS,
    Part,
    PartState,
    Phase,
    StackPlan,
    StackState,
    Stage,
    wipe,
    write,
    write_state,
)
from moe_cli.outcome import Exit, Problem
from moe_cli.ports import listening
from moe_cli.processes import MARK, Proc
from moe_core.clock import Clock, SystemClock
from moe_core.http import session
from moe_core.log import configure, get_log

MAX_LINE_BYTES = 1 << 20
PROBE_S = 0.1
REAP_S = 2.0
SWEEP_GRACE_S = 5.0
CONFIG_REFUSED = (2, 3)
"""Exit codes by which our processes say that they cannot serve what they were given."""

log = get_log("supervisor")


class Failed(Exception):
    """A part ended, or did not become ready. Ends the stack."""

    def __init__(self, part: str, problem: Problem, code: Exit) -> None:
        self.part, self.problem, self.code = part, problem, code
        super().__init__(str(problem))


class Supervisor:
    """State and children of one stack."""

    def __init__(self, folder: Path, plan: StackPlan, clock: Clock) -> None:
        me = Proc.of(os.getpid())
        if me is None:
            raise RuntimeError("this process cannot see itself")
        self._folder, self._plan, self._clock = folder, plan, clock
        self._logs = folder / "logs"
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._ready = {part.name: asyncio.Event() for part in plan.parts}
        self._faults: dict[str, Problem] = {}
        self._stop = asyncio.Event()
        self.state = StackState(
            stack_id=plan.stack_id,
            deployment=plan.deployment,
            model=plan.model,
            ranks=plan.ranks,
            context=plan.context,
            supervisor=me,
            started_s=clock.time(),
            parts=tuple(
                PartState(name=part.name, title=part.title, log=str(self._logs / f"{part.name}.log"))
                for part in plan.parts
            ),
            changes=plan.changes,
            notes=plan.notes,
        )

    async def run(self) -> Exit:
        """Start everything, stay until told to stop or until a part fails, then end everything. Returns why."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        processes.adopt_orphans()
        self._logs.mkdir(exist_ok=True)
        self._save()
        stop = asyncio.create_task(self._stop.wait())
        tasks: set[asyncio.Task[Any]] = {asyncio.create_task(self._live(part)) for part in self._plan.parts}
        reaper = asyncio.create_task(self._reap())
        failure: Failed | None = None
        try:
            while failure is None and not stop.done():
                done, tasks = await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                tasks.discard(stop)
                failure = next((_failure(e) for task in done if (e := task.exception()) is not None), None)
        finally:
            for task in {stop, reaper, *tasks}:
                task.cancel()
            await asyncio.gather(stop, reaper, *tasks, return_exceptions=True)
            await self._end(failure)
        return Exit.OK if failure is None else failure.code

    # Starting

    async def _live(self, part: Part) -> None:
        """One part from start to end. Returns only for a step that is done; raises Failed for anything else."""
        for need in part.needs:
            await self._ready[need].wait()
        child = await self._spawn(part)
        exited = asyncio.create_task(child.wait())
        ready = asyncio.create_task(self._until_ready(part, child))
        try:
            await asyncio.wait({exited, ready}, timeout=part.start_s, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done() and not exited.done():
                message = f"{part.title} was not ready after {part.start_s:.0f} s"
                raise Failed(part.name, Problem(message=message, remedy="see its log"), Exit.COULD_NOT_START)
            code = await exited if part.once or exited.done() else None
            await self._drain(part)
            if code is not None and not (part.once and code == 0 and self._announced(part)):
                raise self._death(part, code)
            await ready
        finally:
            exited.cancel()
            ready.cancel()
        phase = Phase.DONE if part.once else Phase.UP
        self._update(part.name, phase=phase, ready_s=self._clock.time(), exit_code=code)
        self._write_scrape_targets()
        self._ready[part.name].set()
        if all(event.is_set() for event in self._ready.values()):
            self._save(phase=Phase.UP)
        if not part.once:
            code = await child.wait()
            await self._drain(part)
            raise self._death(part, code)

    async def _spawn(self, part: Part) -> asyncio.subprocess.Process:
        facts = {row.name: row.facts for row in self.state.parts}
        try:
            command = [bind(word, facts) for word in part.command]
            for name, document in part.documents.items():
                bound = bind(document, facts)
                text = bound if isinstance(bound, str) else orjson.dumps(bound, option=orjson.OPT_INDENT_2).decode()
                write(self._folder / name, text)
        except Unbound as error:
            raise Failed(part.name, Problem(message=f"{part.title}: {error}"), Exit.COULD_NOT_START) from None
        # SPT_NOENV: renaming a process must not overwrite the environment that carries the mark.
        env = {**os.environ, **part.env, MARK: self._plan.stack_id, "PYTHONUNBUFFERED": "1", "SPT_NOENV": "1"}
        sink = (self._logs / f"{part.name}.log").open("wb", buffering=0)
        try:
            child = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=sink,
                env=env,
                start_new_session=True,
                preexec_fn=processes.die_with_parent,
                limit=MAX_LINE_BYTES,
            )
        except OSError as error:
            sink.close()
            message = f"{part.title}: {command[0]} cannot be run: {error.strerror}"
            raise Failed(part.name, Problem(message=message, remedy="run make setup"), Exit.COULD_NOT_START) from None
        self._children[part.name] = child
        reader = asyncio.create_task(self._read(part, child, sink), name=part.name)
        self._readers.append(reader)
        self._update(part.name, phase=Phase.STARTING, since_s=self._clock.time(), proc=Proc.of(child.pid))
        log.info("part started", part=part.name, pid=child.pid)
        return child

    async def _read(self, part: Part, child: asyncio.subprocess.Process, sink: Any) -> None:
        """Copy the part's output into its log, and take what it announces."""
        stream = child.stdout
        if stream is None:
            raise RuntimeError("a part is started with a pipe")
        with sink:
            while True:
                try:
                    line = await stream.readline()
                except ValueError:  # longer than the limit: no announcement
                    continue
                if not line:
                    return
                sink.write(line)
                match announce.parse(line):
                    case announce.Ready(facts):
                        self._update(part.name, facts=facts)
                    case announce.Step(name, state, detail):
                        self._stage(part.name, name, state == "done", detail)
                    case announce.Fault(problem):
                        self._faults[part.name] = problem

    async def _drain(self, part: Part) -> None:
        """Let the last lines of a part that ended be read; a grandchild may hold its output open for ever."""
        readers = [reader for reader in self._readers if reader.get_name() == part.name]
        if readers and self._children[part.name].returncode is not None:
            await asyncio.wait(readers, timeout=1.0)

    def _announced(self, part: Part) -> bool:
        row = self.state.part(part.name)
        return row is not None and bool(row.facts)

    async def _until_ready(self, part: Part, child: asyncio.subprocess.Process) -> None:
        if part.probe is None:
            while not self._announced(part):
                await self._clock.sleep(PROBE_S)
            return
        async with session(connect_s=1.0, read_s=1.0) as client:
            while True:
                port = listening(child.pid)
                if port is not None and await _answers(client, f"http://127.0.0.1:{port}{part.probe}"):
                    self._update(part.name, facts={"port": str(port), "url": f"http://127.0.0.1:{port}"})
                    return
                await self._clock.sleep(PROBE_S)

    def _death(self, part: Part, code: int) -> Failed:
        """Why a part that ended ended: its own words where it has any."""
        self._update(part.name, exit_code=code)
        log_path = self._logs / f"{part.name}.log"
        fault = self._faults.get(part.name)
        if fault is not None and not self._ready[part.name].is_set():
            return Failed(part.name, fault, Exit.COULD_NOT_START)
        if code in CONFIG_REFUSED and not self._ready[part.name].is_set():
            words = processes.tail(log_path, lines=1)
            said = f"{part.title} did not start: {words[0] if words else f'exit code {code}'}"
            return Failed(part.name, Problem(message=said, remedy=f"its log: {log_path}"), Exit.COULD_NOT_START)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        when = "" if self._ready[part.name].is_set() else " while it started"
        message = f"{part.title} (part {part.name}) {how}{when}"
        return Failed(part.name, Problem(message=message, remedy=f"its log: {log_path}"), Exit.CRASHED)

    def _write_scrape_targets(self) -> None:
        """Tell Prometheus (file_sd) about every part that is there by now."""
        facts = {row.name: row.facts for row in self.state.parts}
        rows = []
        for job, reference in self._plan.scrape.items():
            with contextlib.suppress(Unbound):
                rows.append({"targets": [urlsplit(bind(reference, facts)).netloc], "labels": {"job": job}})
        write(self._folder / TARGETS, orjson.dumps(rows).decode())

    # Ending

    async def _end(self, failure: Failed | None) -> None:
        """End every part, later ones first, and whatever is left of them; then say so in the state."""
        if failure is None:
            self._save(phase=Phase.STOPPING)
        else:
            in_words = failure.problem == self._faults.get(failure.part)
            log_tail = () if in_words else processes.tail(self._logs / f"{failure.part}.log")
            self._update(failure.part, phase=Phase.FAILED)
            self._save(phase=Phase.STOPPING, problem=failure.problem, log_tail=log_tail)
            log.error("part failed", part=failure.part, problem=str(failure.problem))
        for wave in reversed(waves(self._plan.parts)):
            await asyncio.gather(*(self._end_part(part) for part in wave))
        await self._sweep()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        wipe(self._plan.wipe)
        code = Exit.OK if failure is None else failure.code
        self._save(phase=Phase.STOPPED if failure is None else Phase.FAILED, exit_code=int(code))
        log.info("stack ended", exit_code=int(code))

    async def _end_part(self, part: Part) -> None:
        child = self._children.get(part.name)
        if child is None:
            return
        if child.returncode is None:
            self._update(part.name, phase=Phase.STOPPING)
            # Its leader alone: it ends its own children in order. The engine's needs Ray, which would go at once.
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            try:
                await asyncio.wait_for(child.wait(), part.stop_s)
            except TimeoutError:
                log.warning("part does not end on SIGTERM: killed", part=part.name, after_s=part.stop_s)
        processes.kill_group(child.pid)  # also what is left of a group whose leader is gone
        code = await child.wait()
        row = self.state.part(part.name)
        if row is not None and row.phase is not Phase.FAILED:
            self._update(part.name, phase=Phase.STOPPED, exit_code=code)

    async def _sweep(self) -> None:
        """End what the parts left behind: adopted orphans, and whatever carries the mark."""
        kill = False
        deadline = self._clock.monotonic() + 2 * SWEEP_GRACE_S
        told: set[int] = set()
        while self._clock.monotonic() < deadline:
            processes.reap_orphans(())
            left = {p.pid: p for p in (*processes.descendants(), *self._marked())}
            if not left:
                return
            kill = kill or self._clock.monotonic() > deadline - SWEEP_GRACE_S
            fresh = [p for p in left.values() if kill or p.pid not in told]
            processes.end(fresh, signal.SIGKILL if kill else signal.SIGTERM)
            told |= left.keys()
            await self._clock.sleep(PROBE_S)
        log.error("processes are left that could not be ended", pids=sorted(p.pid for p in self._marked()))

    def _marked(self) -> list[psutil.Process]:
        return processes.marked(self._plan.stack_id, besides={os.getpid()})

    async def _reap(self) -> None:
        while True:
            await self._clock.sleep(REAP_S)
            processes.reap_orphans({child.pid for child in self._children.values()})

    # State

    def _update(self, name: str, **changes: Any) -> None:
        rows = tuple(row.model_copy(update=changes) if row.name == name else row for row in self.state.parts)
        self._save(parts=rows)

    def _stage(self, part: str, name: str, done: bool, detail: str) -> None:
        row = self.state.part(part)
        if row is None:
            return
        now = self._clock.time()
        old = next((stage for stage in row.stages if stage.name == name), None)
        stage = Stage(
            name=name,
            state="done" if done else "start",
            detail=detail or (old.detail if old else ""),
            since_s=old.since_s if old else now,
            done_s=now if done else None,
        )
        kept = tuple(s for s in row.stages if s.name != name)
        self._update(part, stages=(*kept, stage))

    def _save(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)
        write_state(self._folder, self.state)


def waves(parts: tuple[Part, ...]) -> list[list[Part]]:
    """Parts in groups that may start together: each group needs only parts of groups before it."""
    known = {part.name for part in parts}
    placed: set[str] = set()
    groups: list[list[Part]] = []
    left = list(parts)
    while left:
        group = [part for part in left if set(part.needs) & known <= placed]
        if not group:
            raise ValueError(f"parts need one another in a circle: {', '.join(part.name for part in left)}")
        groups.append(group)
        placed |= {part.name for part in group}
        left = [part for part in left if part.name not in placed]
    return groups


def _failure(error: BaseException) -> Failed:
    """What ended a part's task: its failure, or a fault of this program."""
    if isinstance(error, Failed):
        return error
    log.error("the supervisor failed", error=repr(error))
    problem = Problem(message=f"the supervisor failed: {error!r}", remedy="see logs/supervisor.log")
    return Failed("supervisor", problem, Exit.CRASHED)


async def _answers(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with client.get(url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def supervise(folder: Path) -> Exit:
    """The whole life of a stack, from the plan in its state folder."""
    configure()
    plan = StackPlan.model_validate_json((folder / PLAN).read_bytes())
    try:
        return asyncio.run(Supervisor(folder, plan, SystemClock()).run())
    except Exception:
        log.exception("the supervisor failed")
        return Exit.CRASHED
