"""The address of the tuner's web page: `moectl up` makes its tokens, `moectl console` prints it again."""

from __future__ import annotations

import secrets
from pathlib import Path

from moe_api.v1alpha1 import MoEDeployment
from moe_cli.documents import OPERATE, READ, StackState, read_state, read_token
from moe_cli.fit import Fit
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_core.config import ConsoleConfig, PlanRow

TOKEN_BYTES = 32


def new_tokens(folder: Path) -> dict[Path, str]:
    """Files of a stack's tokens, and what they hold: another one for each start."""
    return {folder / name: secrets.token_urlsafe(TOKEN_BYTES) for name in (READ, OPERATE)}


def config(folder: Path, resource: MoEDeployment, fitted: Fit) -> ConsoleConfig:
    """The console of a stack's tuner."""
    return ConsoleConfig(
        read_token_file=str(folder / READ),
        operate_token_file=str(folder / OPERATE),
        plan=tuple(plan_rows(resource, fitted)),
    )


def plan_rows(resource: MoEDeployment, fitted: Fit) -> list[PlanRow]:
    """What is served, and where it differs from what the file says."""
    spec, name = fitted.resource.spec, resource.key

    def row(what: str, value: object, why: str = "") -> PlanRow:
        return PlanRow(deployment=name, what=what, value=str(value), why=why)

    rows = [
        row("Model", resource.spec.model.id),
        row("EP ranks", fitted.ranks, "spec.hardware.gpusPerReplica"),
        row("Replicas", f"{spec.replicas.min} to {spec.replicas.max}", "spec.replicas"),
    ]
    if fitted.max_model_len is not None:
        rows.append(row("Longest context", f"{fitted.max_model_len:,} tokens"))
    rows += [
        row(f"Fallback {target.name}", f"{target.provider.value} {target.model}") for target in spec.fallback.targets
    ]
    rows += [row(change.field, f"{change.asked} → {change.used}", change.why) for change in fitted.changes]
    return rows


def address(state: StackState | None, folder: Path, *, operate: bool = False) -> str | None:
    """Where the page is, with the token in the fragment, which no browser sends; None where there is no console."""
    port = None if state is None or state.ended else state.fact("tuner", "port")
    token = read_token(folder, OPERATE if operate else READ)
    return None if port is None or token is None else f"http://127.0.0.1:{port}/console/#token={token}"


def show(folder: Path, say: Say, *, operate: bool) -> Exit:
    """Print it. Raises Refusal where no stack runs."""
    found = address(read_state(folder), folder, operate=operate)
    if found is None:
        message, remedy = f"no tuner with a console runs here ({folder})", "start one with moectl up"
        raise Refusal(Problem(field="console", message=message, remedy=remedy), code=Exit.COULD_NOT_START)
    say.line(found)
    return Exit.OK
