"""`moectl up` and `moectl down`: checks everything, hands the plan to a supervisor of its own, shows what that does."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import ValidationError
from rich.live import Live

from moe_cli import console, live, preflight, processes, status
from moe_cli.documents import (
    KEY,
    PLAN,
    STATE,
    Phase,
    StackPlan,
    StackState,
    read_state,
    wipe,
    write,
    write_state,
)
from moe_cli.files import read
from moe_cli.fit import Refused
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.ports import refuse_taken
from moe_cli.say import Say
from moe_cli.stack import Options, plan
from moe_cli.stream import OK, chat
from moe_core.clock import SystemClock
from moe_core.http import session
from moe_core.signing import Signer

FOLLOW_S = 0.2
FIGURES_S = 1.0
PLAIN_FIGURES_S = 10.0
LOCK = "lock"
SECRETS = "secrets"
STOP_MARGIN_S = 20.0
CHAT_S = 120.0
CHAT_PROMPT = "Which experts answer this?"


@dataclass(frozen=True)
class UpOptions:
    """`moectl up` as it was asked for."""

    file: Path
    state_dir: Path
    tiny: bool = False
    port: int = 0
    prometheus_port: int = 0
    chat: bool = False
    detach: bool = False
    plain: bool = False
    fallback_url: str | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)


def default_state_dir() -> Path:
    """Where a stack keeps its files unless told otherwise."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "moestack" / "local"


def up(options: UpOptions, say: Say) -> Exit:
    """Check everything, start the stack, show it; returns how it ended. Raises Refusal."""
    resource = read(options.file)
    folder = options.state_dir
    if options.fallback_url is not None and not options.fallback_url.startswith(("http://", "https://")):
        remedy = "name the base of an OpenAI-compatible API, such as http://127.0.0.1:9000/v1"
        raise Refusal(Problem(field="--fallback-url", message=f"{options.fallback_url!r} is no address", remedy=remedy))
    refuse_taken({"--port": options.port, "--prometheus-port": options.prometheus_port})
    found, to_write = preflight.find_secrets(resource, options.secrets, folder / SECRETS)
    signer = Signer.generate()
    wanted = plan(
        resource,
        preflight.look(resource, options.file.resolve().parent, found),
        Options(
            state_dir=folder,
            stack_id=secrets.token_hex(8),
            public_key=signer.public_pem(),
            tiny=options.tiny,
            port=options.port,
            prometheus_port=options.prometheus_port,
            fallback_url=options.fallback_url,
        ),
    )
    if isinstance(wanted, Refused):
        raise Refusal(*wanted.problems, code=wanted.code)
    with _folder(folder) as lock:
        _clear(folder, say)
        to_write = {**to_write, **console.new_tokens(folder)}
        for path, value in to_write.items():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write(path, value)
        wanted = wanted.model_copy(update={"wipe": tuple(str(path) for path in to_write)})
        signer.save(folder / KEY)
        write(folder / PLAN, wanted.model_dump_json(by_alias=True, exclude_none=True, indent=1))
        for change in wanted.changes:
            say.line(f"substituted: {change}")
        for note in wanted.notes:
            say.line(f"note: {note}")
        return asyncio.run(_follow(options, wanted, lock, say))


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[int]:
    """Lock the state folder; gives the lock's descriptor, which the supervisor inherits and holds to its end.

    Raises Refusal where a stack already lives there.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        problem = Problem(field="--state-dir", message=f"{folder}: {error.strerror}", remedy="name a writable folder")
        raise Refusal(problem) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            state = read_state(folder)
            who = (
                f"{state.deployment} (supervisor pid {state.supervisor.pid})" if state is not None else "another stack"
            )
            remedy = "run `moectl down` first, or choose another --state-dir"
            problem = Problem(field="--state-dir", message=f"{folder}: {who} is running here", remedy=remedy)
            raise Refusal(problem, code=Exit.COULD_NOT_START) from None
        yield lock.fileno()


def _clear(folder: Path, say: Say) -> None:
    """End what a crashed supervisor left behind, and remove its state, its secrets and Prometheus' old samples."""
    state = read_state(folder)
    if state is not None and not state.ended and (count := processes.end_marked(state.stack_id)):
        say.line(f"ended {count} processes that a crashed stack had left behind")
    before = read_plan(folder)
    wipe(before.wipe if before is not None else ())
    (folder / STATE).unlink(missing_ok=True)
    for name in ("prometheus", "logs", SECRETS):
        shutil.rmtree(folder / name, ignore_errors=True)


def _supervisor(folder: Path, lock: int, *, linked: bool) -> subprocess.Popen[bytes]:
    """Start the supervisor, in a session of its own. `linked`: it ends when this process does, however that ends."""
    (folder / "logs").mkdir(exist_ok=True)
    with (folder / "logs" / "supervisor.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "moe_cli.main", "supervise", str(folder)],
            # Keys lie in files for the gateway alone by now: no other process inherits them.
            env={name: value for name, value in os.environ.items() if not name.startswith("MOESTACK_SECRET_")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock,),
            preexec_fn=processes.die_with_parent if linked else None,  # noqa: PLW1509 - no thread runs yet
        )


async def _follow(options: UpOptions, wanted: StackPlan, lock: int, say: Say) -> Exit:
    """Start the stack and show it until it ends, is told to stop, or is left running."""
    folder = options.state_dir
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    # Only now: a signal in between would leave a supervisor that nobody ends.
    child = _supervisor(folder, lock, linked=not options.detach)
    leave = False
    try:
        with Screen(folder, wanted, say, fancy=not options.plain and not options.detach) as view:
            await view.follow(child, stop, until=lambda state: state.phase is not Phase.STARTING)
            state = view.state
            if state is not None and state.phase is Phase.UP and not stop.is_set():
                if options.chat:
                    await _unless(stop, _say_hello(state, say))
                for line in () if view.fancy else live.places(state, console.address(state, folder)):
                    say.line(line)
                say.line(f"{'try:':15}{live.example(state)}")
                leave = options.detach and not stop.is_set()
                if leave:
                    say.line(f"left running: see it with `moectl status`, end it with `moectl down` ({folder})")
                else:
                    await view.follow(child, stop, until=lambda _: False)
            if stop.is_set():
                say.line("stopping …")
    finally:
        if not leave:
            _end(child, wanted)
    return Exit.OK if leave else _outcome(read_state(folder), wanted, stop.is_set(), say)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do some work, or give it up when told to stop."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    for pending in (task, stopped):
        pending.cancel()
    await asyncio.gather(task, stopped, return_exceptions=True)


async def _say_hello(state: StackState, say: Say) -> None:
    """One chat through the gateway, with its answer and timings."""
    if state.gateway_url is None:
        return
    body = {"model": state.model, "messages": [{"role": "user", "content": CHAT_PROMPT}], "max_tokens": 16}
    async with session(read_s=CHAT_S) as client:
        outcome = await chat(client, state.gateway_url, body, SystemClock(), keep_text=True)
    if outcome.kind != OK:
        say.line(f"chat: failed: {outcome.kind}: {outcome.detail}")
        return
    ttft = outcome.ttft_s or 0.0
    where = f" from {outcome.target}" if outcome.target else ""
    say.line(f"chat: {CHAT_PROMPT}")
    say.line(f"answer{where}: {outcome.text!r}")
    say.line(f"TTFT {ttft:.3f} s, {outcome.output_tokens} tokens in {outcome.e2e_s:.3f} s")


def _end(child: subprocess.Popen[bytes], wanted: StackPlan) -> None:
    """End the supervisor, wait as long as its parts may take, and make sure that nothing is left."""
    if child.poll() is None:
        child.terminate()
    try:
        child.wait(sum(part.stop_s for part in wanted.parts) + STOP_MARGIN_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    processes.end_marked(wanted.stack_id)
    wipe(wanted.wipe)


def _outcome(state: StackState | None, wanted: StackPlan, stopped: bool, say: Say) -> Exit:
    if stopped and (state is None or state.stack_id != wanted.stack_id):
        # Told to stop before the supervisor had written anything.
        say.line("everything was stopped")
        return Exit.INTERRUPTED
    if state is None or state.stack_id != wanted.stack_id or not state.ended:
        say.problem(Problem(message="the supervisor ended early", remedy="see logs/supervisor.log in the state folder"))
        return Exit.CRASHED
    if state.problem is not None:
        say.problem(state.problem)
        if state.log_tail:
            say.aside("last lines of its log:")
            for line in state.log_tail:
                say.aside(f"  | {line}")
        say.aside("everything was stopped")
        return Exit(state.exit_code if state.exit_code is not None else Exit.CRASHED)
    say.line("everything was stopped")
    return Exit.INTERRUPTED if stopped else Exit.OK


class Screen:
    """The stack on a terminal as a live view, elsewhere as lines."""

    def __init__(self, folder: Path, wanted: StackPlan, say: Say, *, fancy: bool) -> None:
        self._folder, self._stack_id, self._say = folder, wanted.stack_id, say
        self.fancy = fancy and say.out.is_terminal
        self._live = Live(console=say.out, auto_refresh=False) if self.fancy else None
        self._figures: status.Figures | None = None
        self._asked_s = 0.0
        self.state: StackState | None = None

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    async def follow(
        self, child: subprocess.Popen[bytes], stop: asyncio.Event, *, until: Callable[[StackState], bool]
    ) -> None:
        """Show the stack as it changes until a state is reached, it ends, or `stop` is set."""
        async with session(connect_s=1.0, read_s=status.ASK_S) as client:
            while not stop.is_set():
                over = child.poll() is not None
                state = read_state(self._folder)
                if state is not None and state.stack_id == self._stack_id:
                    await self._show(client, state)
                    if until(state) or state.ended:
                        return
                if over:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), FOLLOW_S)

    async def _show(self, client: aiohttp.ClientSession, state: StackState) -> None:
        before, self.state = self.state, state
        every_s = FIGURES_S if self._live is not None else PLAIN_FIGURES_S
        due = state.phase is Phase.UP and time.monotonic() - self._asked_s >= every_s
        if due:
            self._asked_s = time.monotonic()
            self._figures, _ = await status.gather(client, state, self._folder)
        if self._live is not None:
            page = console.address(state, self._folder)
            self._live.update(live.screen(state, self._figures, time.time(), page), refresh=True)
            return
        for line in live.events(before, state):
            self._say.line(line)
        if due and before is not None and before.phase is Phase.UP and self._figures is not None:
            self._say.line(live.figures_line(self._figures))


# down


def down(folder: Path, say: Say) -> Exit:
    """End the stack of a state folder, also one whose supervisor is gone. Nothing running is no error."""
    state = read_state(folder)
    if state is None:
        say.line(f"nothing is running (state folder {folder})")
        return Exit.OK
    supervisor = state.supervisor
    had_supervisor = supervisor.alive()
    if had_supervisor:
        say.line(f"stopping {state.deployment} (supervisor pid {supervisor.pid}) …")
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor.pid, signal.SIGTERM)
        wanted = read_plan(folder)
        limit_s = STOP_MARGIN_S + sum(part.stop_s for part in wanted.parts) if wanted is not None else 120.0
        deadline = time.monotonic() + limit_s
        while supervisor.alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        if supervisor.alive():
            os.kill(supervisor.pid, signal.SIGKILL)
    count = processes.end_marked(state.stack_id)
    if not had_supervisor and count == 0:
        say.line(f"nothing is running (state folder {folder})")
    elif count:
        say.line(f"ended {count} processes that had lost their supervisor")
    wanted = read_plan(folder)
    wipe(wanted.wipe if wanted is not None else ())
    latest = read_state(folder)
    if latest is not None and not latest.ended:
        write_state(folder, latest.model_copy(update={"phase": Phase.STOPPED}))
    if had_supervisor:
        say.line("everything was stopped")
    return Exit.OK


def read_plan(folder: Path) -> StackPlan | None:
    """The plan in a state folder, or None."""
    try:
        return StackPlan.model_validate_json((folder / PLAN).read_bytes())
    except (OSError, ValidationError):
        return None
