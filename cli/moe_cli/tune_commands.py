"""`moectl tune …`: what the tuner does and why, its past, and what a person orders of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say

if TYPE_CHECKING:
    from moe_cli.tune import Target
    from moe_cli.tune_cluster import Named

app = typer.Typer(
    help="What the tuner does and why, its past, and what you order of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="Where the stack keeps its files.", show_default="user's state folder"),
]
Url = Annotated[str | None, typer.Option(help="The tuner.", show_default="the local stack's")]
Name = Annotated[
    str | None,
    typer.Option("--deployment", help="NAMESPACE/NAME, where one tuner has several.", show_default="the one"),
]
Json = Annotated[bool, typer.Option("--json", help="JSON.")]
Moed = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="MoEDeployment of a cluster.", show_default="the local stack's")
]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Of NAME.", show_default="default")]
Context = Annotated[str | None, typer.Option(help="Of the kubeconfig, for NAME.", show_default="its current one")]
Kubeconfig = Annotated[Path | None, typer.Option(help="For NAME.", show_default="$KUBECONFIG, or ~/.kube/config")]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="So many decisions.")]


def _target(state_dir: Path | None, url: str | None, deployment: str | None, as_json: bool) -> Target:
    from moe_cli.launch import default_state_dir
    from moe_cli.tune import Target

    return Target((state_dir or default_state_dir()).resolve(), url, deployment, as_json)


@app.command()
def status(state_dir: StateDir = None, url: Url = None, deployment: Name = None, as_json: Json = False) -> None:
    """Knobs in force, their home, what both loops do now and why; a row for each deployment where there are several."""
    from moe_cli import tune

    _end(asyncio.run(tune.status(_target(state_dir, url, deployment, as_json), Say())))


@app.command()
def history(
    limit: Limit = 50, state_dir: StateDir = None, url: Url = None, deployment: Name = None, as_json: Json = False
) -> None:
    """The last decisions, oldest first; with --json one record a line, inputs of the policies too."""
    from moe_cli import tune

    _end(asyncio.run(tune.history(_target(state_dir, url, deployment, as_json), Say(), limit)))


@app.command()
def why(
    version: Annotated[int | None, typer.Argument(help="Of the knobs.", show_default="the last decision")] = None,
    state_dir: StateDir = None,
    url: Url = None,
    deployment: Name = None,
    as_json: Json = False,
) -> None:
    """One decision in full: what was seen, what was chosen, what was foreseen and what was measured."""
    from moe_cli import tune

    _end(asyncio.run(tune.why(_target(state_dir, url, deployment, as_json), Say(), version)))


@app.command()
def replay(
    limit: Limit = 1000,
    log: Annotated[Path | None, typer.Option(help="A decisions.jsonl, instead of asking a tuner.")] = None,
    state_dir: StateDir = None,
    url: Url = None,
    deployment: Name = None,
    as_json: Json = False,
) -> None:
    """Take logged decisions again on their logged inputs; exit code 1 where this release decides differently."""
    from moe_cli import tune

    _end(asyncio.run(tune.replay(_target(state_dir, url, deployment, as_json), Say(), limit=limit, log=log)))


@app.command()
def pause(
    name: Moed = None,
    reason: Annotated[str | None, typer.Option(help="Why; shown in NAME's status.", show_default="none")] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state_dir: StateDir = None,
    url: Url = None,
    deployment: Name = None,
    as_json: Json = False,
) -> None:
    """Hold every knob where it is, at once; a candidate under trial is taken out first. It outlives a restart.

    With NAME it is the annotation of a MoEDeployment in a cluster, which GitOps does not undo.
    """
    where = _named(name, namespace, context, kubeconfig, as_json)
    if reason is not None and where is None:
        problem = Problem(field="--reason", message="is shown in a resource's status", remedy="name a MoEDeployment")
        raise Refusal(problem)
    _order(where or _target(state_dir, url, deployment, as_json), reason, paused=True)


@app.command()
def resume(
    name: Moed = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state_dir: StateDir = None,
    url: Url = None,
    deployment: Name = None,
    as_json: Json = False,
) -> None:
    """Take back `pause`. What spec.tuning.paused says stays."""
    where = _named(name, namespace, context, kubeconfig, as_json)
    _order(where or _target(state_dir, url, deployment, as_json), paused=False)


@app.command()
def pin(
    knob: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME] KNOB...",
            help="KNOB holds it where it is; KNOB=VALUE puts it there and holds it. NAME: MoEDeployment of a cluster.",
        ),
    ],
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state_dir: StateDir = None,
    url: Url = None,
    deployment: Name = None,
    as_json: Json = False,
) -> None:
    """Hold knobs (experts.capacityFactor.prefill, engine.maxActiveSeqs, fallback.missProbability, …)."""
    from moe_cli.tune import parse_pin

    name, knobs = _words(knob)
    where = _named(name, namespace, context, kubeconfig, as_json)
    pins = dict(parse_pin(text) for text in knobs)
    _order(where or _target(state_dir, url, deployment, as_json), pins=pins)


@app.command()
def unpin(
    knob: Annotated[
        list[str],
        typer.Argument(metavar="[NAME] KNOB...", help="As it was pinned. NAME: MoEDeployment of a cluster."),
    ],
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    state_dir: StateDir = None,
    url: Url = None,
    deployment: Name = None,
    as_json: Json = False,
) -> None:
    """Take back `pin`. Pins of the resource stay."""
    from moe_cli.tune import parse_pin

    name, knobs = _words(knob)
    where = _named(name, namespace, context, kubeconfig, as_json)
    unpinned = tuple(parse_pin(text)[0] for text in knobs)
    _order(where or _target(state_dir, url, deployment, as_json), unpin=unpinned)


@app.command()
def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("tuning.html"),
    hours: Annotated[float, typer.Option(min=0.1, max=720, help="Of Prometheus' memory.")] = 6.0,
    state_dir: StateDir = None,
    url: Url = None,
    deployment: Name = None,
) -> None:
    """A page with plots: SLO, latency, spend, knobs over time, and what trials won and cost. Nothing from elsewhere."""
    from moe_cli import tune

    _end(asyncio.run(tune.report_page(_target(state_dir, url, deployment, False), Say(), output, hours)))


def _words(words: list[str]) -> tuple[str | None, list[str]]:
    """NAME, if there is one, and the knobs. Raises Refusal without a knob."""
    from moe_cli.tune_cluster import split

    name, knobs = split(words)
    if not knobs:
        raise Refusal(Problem(field="KNOB", message=f"none is named for {name}", remedy="such as engine.maxActiveSeqs"))
    return name, knobs


def _named(
    name: str | None, namespace: str | None, context: str | None, kubeconfig: Path | None, as_json: bool
) -> Named | None:
    """The MoEDeployment that is meant; None for the local stack's. Raises Refusal."""
    from moe_cli.cluster import Access
    from moe_cli.tune_cluster import Named

    if name is not None:
        return Named(name, namespace or "default", Access(kubeconfig, context), as_json)
    if (namespace, context, kubeconfig) != (None, None, None):
        message = "a cluster is named, and no MoEDeployment of it"
        raise Refusal(Problem(field="NAME", message=message, remedy="name one: kubectl get moed -A lists them"))
    return None


def _order(target: Target | Named, reason: str | None = None, **change: Any) -> None:
    from moe_cli import tune, tune_cluster
    from moe_cli.tune_text import OrderChange

    if isinstance(target, tune.Target):
        _end(asyncio.run(tune.order(target, Say(), OrderChange(**change))))
    else:
        _end(asyncio.run(tune_cluster.order(target, Say(), OrderChange(**change), reason)))


def _end(code: Exit) -> None:
    raise typer.Exit(int(code))
