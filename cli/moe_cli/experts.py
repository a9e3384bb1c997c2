"""`moectl experts`: the full expert matrix, asked from the board now, as a heat map, as JSON or as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson
from pydantic import TypeAdapter, ValidationError

from moe_cli import heat_picture, heat_text
from moe_cli.documents import read_state
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_cli.showing import NO_KEY, Key, of_stack, wanted
from moe_core.clock import Clock
from moe_core.expert_load import Of, grid, since
from moe_core.http import HttpError, call_json, session
from moe_core.wire import ExpertMatrix

ASK_S = 10.0
"""The board itself waits for its replicas for a few seconds."""

PICTURES = (".svg", ".png")
_MATRICES = TypeAdapter(list[ExpertMatrix])


@dataclass(frozen=True)
class ExpertsOptions:
    """What was asked for. `window_s` None: since the replica started."""

    state_dir: Path
    url: str | None = None
    replica: str | None = None
    of: Of = Of.DEMAND
    window_s: float | None = None
    as_json: bool = False
    output: Path | None = None
    key: Key = NO_KEY


async def run(options: ExpertsOptions, say: Say, clock: Clock) -> Exit:
    """Show every replica's matrix, or the one named. Raises Refusal."""
    if options.output is not None and options.output.suffix.lower() not in PICTURES:
        problem = Problem(field="--output", message=f"{options.output.name} is no {' or '.join(PICTURES)} file")
        raise Refusal(problem.model_copy(update={"remedy": "name it with one of these endings"}))
    url, shown = board_url(options), _pass(options)
    async with session(connect_s=2.0, read_s=ASK_S) as client:
        found = await _ask(client, url, shown)
        if options.window_s is not None:
            before = {matrix.replica: matrix for matrix in found}
            await clock.sleep(options.window_s)
            found = [since(before.get(after.replica, after), after) for after in await _ask(client, url, shown)]
    found = chosen(found, options.replica)
    if options.output is not None:
        _draw(found, options.output, say)
        return Exit.OK
    if options.as_json:
        say.line(orjson.dumps([matrix.to_json() for matrix in found]).decode())
        return Exit.OK
    unicode = (say.out.encoding or "").lower().startswith("utf")
    for matrix in found:
        say.out.print(
            heat_text.render(matrix, grid(matrix, options.of), say.out.width, unicode=unicode), soft_wrap=True
        )
    return Exit.OK


def board_url(options: ExpertsOptions) -> str:
    """The board named, or that of the stack on this machine. Raises Refusal where there is neither."""
    if options.url is not None:
        return options.url.rstrip("/")
    state = read_state(options.state_dir)
    url = None if state is None or state.ended else state.fact("serving", "boardUrl")
    if url is None:
        message = "no stack runs on this machine"
        remedy = "start one with moectl up, or name a board: --url http://HOST:PORT (in a cluster, port-forward it)"
        raise Refusal(Problem(field="--url", message=message, remedy=remedy))
    return url


def chosen(matrices: list[ExpertMatrix], replica: str | None) -> list[ExpertMatrix]:
    """The matrices to show. Raises Refusal where there are none."""
    if not matrices:
        message = "no replica answered the board in time"
        raise Refusal(Problem(message=message, remedy="moectl status says what runs"), code=Exit.COULD_NOT_START)
    if replica is None:
        return matrices
    named = [matrix for matrix in matrices if matrix.replica == replica]
    if not named:
        there = ", ".join(matrix.replica for matrix in matrices)
        raise Refusal(Problem(field="--replica", message=f"{replica} did not answer", remedy=f"there are: {there}"))
    return named


def numbered(output: Path, matrices: list[ExpertMatrix]) -> list[Path]:
    """A file for each replica; one alone keeps the name that was asked for."""
    if len(matrices) == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{matrix.replica}") for matrix in matrices]


def _draw(matrices: list[ExpertMatrix], output: Path, say: Say) -> None:
    for path, matrix in zip(numbered(output, matrices), matrices, strict=True):
        made = heat_picture.scene(matrix)
        try:
            data = heat_picture.svg(made) if path.suffix.lower() == ".svg" else heat_picture.png(made)
        except ImportError:
            remedy = "install moestack[cli], or ask for a .svg file"
            raise Refusal(Problem(field="--output", message="PNG needs Pillow", remedy=remedy)) from None
        try:
            path.write_bytes(data)
        except OSError as error:
            problem = Problem(field="--output", message=f"{path}: {error.strerror}", remedy="name a writable file")
            raise Refusal(problem) from None
        say.line(f"{path}: {len(data) / 1024:.0f} KiB, replica {matrix.replica}")


def _pass(options: ExpertsOptions) -> str | None:
    if options.url is not None:
        return options.key.token()
    state = read_state(options.state_dir)
    return None if state is None else of_stack(options.state_dir, state.deployment)


async def _ask(client: aiohttp.ClientSession, url: str, shown: str | None) -> list[ExpertMatrix]:
    try:
        raw = await call_json(client, "GET", f"{url}/v1/experts", total_s=ASK_S, token=shown)
        return _MATRICES.validate_python(raw)
    except HttpError as error:
        remedy = wanted(error, "moectl status says whether the board answers")
        problem = Problem(field="--url", message=str(error), remedy=remedy)
        raise Refusal(problem, code=Exit.COULD_NOT_START) from None
    except ValidationError:
        message = f"{url} does not answer as a board of this version does"
        raise Refusal(Problem(field="--url", message=message, remedy="use moectl of the same version")) from None
