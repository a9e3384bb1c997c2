"""moectl: serve a MoEDeployment on this machine, look at it, load it, plan, check and compare files.

Exit codes: 0 ok, 1 a diff with changes, 2 bad input, 3 could not start, 4 a part crashed, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from moe_cli.completion import PROGRAM, VARIABLE, Shell, ask_for, prepare, script
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_cli.tune_commands import app as tune

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(tune, name="tune")

StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="Where the stack keeps its files.", show_default="user's state folder"),
]
PassKey = Annotated[
    Path | None,
    typer.Option("--key", help="Private key that --url trusts (operator.key or tuner.key).", show_default="none"),
]
PassFor = Annotated[str | None, typer.Option("--deployment", help="NAMESPACE/NAME behind --url.", show_default="none")]
File = Annotated[Path, typer.Argument(help="MoEDeployment (YAML).", show_default=False)]


@app.command()
def up(
    file: File,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Put a tiny checkpoint, cpu and fewer ranks in the rest's place.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the OpenAI API; 0: any free one.")] = 0,
    prometheus_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of Prometheus; 0: any free one.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Send one chat once everything is up.")] = False,
    detach: Annotated[
        bool | None,
        typer.Option(
            "--detach/--foreground",
            help="Leave the stack running, or stay with it until Ctrl-C.",
            show_default="foreground on a terminal, else detach",
        ),
    ] = None,
    state_dir: StateDir = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live view.")] = False,
    fallback_url: Annotated[
        str | None, typer.Option(help="Send every fallback target to this OpenAI-compatible server (…/v1).")
    ] = None,
    secret: Annotated[list[str] | None, typer.Option(help="NAME/KEY=FILE: a secret that the file refers to.")] = None,
) -> None:
    """Serve a MoEDeployment on this machine, from the file that a cluster takes: engine, gateway, Prometheus, tuner."""
    from moe_cli.launch import UpOptions, default_state_dir
    from moe_cli.launch import up as start

    options = UpOptions(
        file=file,
        state_dir=(state_dir or default_state_dir()).resolve(),
        tiny=tiny,
        port=port,
        prometheus_port=prometheus_port,
        chat=chat,
        detach=detach if detach is not None else not sys.stdout.isatty(),
        plain=plain,
        fallback_url=fallback_url.rstrip("/") if fallback_url else None,
        secrets=tuple(secret or ()),
    )
    _end(start(options, Say()))


@app.command()
def console(
    state_dir: StateDir = None,
    operate: Annotated[
        bool, typer.Option("--operate", help="With the token that may pause and pin, for 15 minutes.")
    ] = False,
) -> None:
    """Print the address of the web page: deployments, load of experts, decisions, cost. Its token is a secret."""
    from moe_cli.console import show
    from moe_cli.launch import default_state_dir

    _end(show((state_dir or default_state_dir()).resolve(), Say(), operate=operate))


@app.command()
def down(state_dir: StateDir = None) -> None:
    """End the stack that `up` left running. Nothing running is no error."""
    from moe_cli.launch import default_state_dir
    from moe_cli.launch import down as stop

    _end(stop((state_dir or default_state_dir()).resolve(), Say()))


@app.command()
def status(
    state_dir: StateDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again each second, until Ctrl-C.")] = False,
) -> None:
    """What runs, where, with which knobs, and what the tuner decided and why."""
    from moe_cli.launch import default_state_dir
    from moe_cli.watch import show_status

    _end(asyncio.run(show_status((state_dir or default_state_dir()).resolve(), Say(), as_json=as_json, watch=watch)))


@app.command()
def replay(
    files: Annotated[list[Path], typer.Argument(help="Files of decisions that a gateway wrote.", show_default=False)],
) -> None:
    """Make a gateway's decisions again from what it wrote down; exit code 1 where any falls otherwise now."""
    from moe_cli.replay import show

    _end(show(files, Say()))


@app.command()
def costs(
    state_dir: StateDir = None,
    url: Annotated[str | None, typer.Option(help="A gateway's admin port.", show_default="the local stack's")] = None,
    rent: Annotated[
        float | None, typer.Option(min=0, help="USD per GPU-hour: splits own GPUs by prefill, decode and idle.")
    ] = None,
    key: PassKey = None,
    deployment: PassFor = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """What closed APIs and own GPUs have cost: by tenant, model and target, today and this month, with a forecast."""
    from moe_cli.costs import show
    from moe_cli.launch import default_state_dir
    from moe_cli.showing import Key

    folder = (state_dir or default_state_dir()).resolve()
    by = Key(key, deployment)
    _end(asyncio.run(show(folder, Say(), url=url, usd_per_gpu_hour=rent, as_json=as_json, key=by)))


@app.command()
def experts(
    of: Annotated[
        str, typer.Option("--of", help="demand, assigned (by expert), rank-demand or rank (by EP rank).")
    ] = "demand",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a picture instead: FILE.svg or FILE.png.")
    ] = None,
    replica: Annotated[str | None, typer.Option(help="Only this one.", show_default="all")] = None,
    window: Annotated[
        float | None, typer.Option(min=0.1, help="Count for so many seconds.", show_default="since the replica started")
    ] = None,
    url: Annotated[str | None, typer.Option(help="The board.", show_default="the local stack's")] = None,
    key: PassKey = None,
    deployment: PassFor = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Load of every expert in every layer, asked from the replicas now: a heat map of what is hot."""
    from moe_cli.experts import ExpertsOptions, run
    from moe_cli.launch import default_state_dir
    from moe_cli.showing import Key
    from moe_core.clock import SystemClock
    from moe_core.expert_load import Of

    if of not in list(Of):
        raise Refusal(Problem(field="--of", message=f"{of} is not known", remedy=f"one of {', '.join(Of)}"))
    folder, by = (state_dir or default_state_dir()).resolve(), Key(key, deployment)
    options = ExpertsOptions(folder, url, replica, Of(of), window, as_json, output, by)
    _end(asyncio.run(run(options, Say(), SystemClock())))


@app.command()
def load(
    trace: Annotated[Path | None, typer.Option(help="CSV with TIMESTAMP,ContextTokens,GeneratedTokens.")] = None,
    rps: Annotated[float | None, typer.Option(help="Mean requests a second, without a trace.")] = None,
    burstiness: Annotated[
        float, typer.Option(help="Shape of the Gamma gaps: 1 is Poisson, 0.25 comes in bursts.")
    ] = 1.0,
    seconds: Annotated[float | None, typer.Option(help="How long; with a trace, at most that long.")] = None,
    url: Annotated[str | None, typer.Option(help="OpenAI API (…/v1).", show_default="the local stack's")] = None,
    model: Annotated[str | None, typer.Option(help="Model name.", show_default="the first one there")] = None,
    input_tokens: Annotated[str, typer.Option(help="MEDIAN or MEDIAN,P99 of prompts (log-normal).")] = "128,512",
    output_tokens: Annotated[str, typer.Option(help="MEDIAN or MEDIAN,P99 of answers (log-normal).")] = "32,64",
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and prompts.")] = 0,
    concurrency_limit: Annotated[
        int | None, typer.Option(min=1, help="Most requests in flight.", show_default="none")
    ] = None,
    speed: Annotated[float, typer.Option(help="Replay a trace this many times as fast.")] = 1.0,
    chars_per_token: Annotated[
        float, typer.Option(help="Characters a token; 1 for byte-level tokenizers, about 4 for others.")
    ] = 1.0,
    context: Annotated[
        int | None, typer.Option(min=2, help="Cut requests to this many tokens.", show_default="the local stack's")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of exactly the length asked for (vLLM).")
    ] = False,
    ttft: Annotated[float | None, typer.Option(help="TTFT objective in ms, for SLO attainment.")] = None,
    itl: Annotated[float | None, typer.Option(help="ITL objective in ms, for SLO attainment.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON document.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Send real streaming requests in an open loop, from a trace or in generated bursts, and say how they fared."""
    from moe_cli.launch import default_state_dir
    from moe_cli.load_run import LoadOptions, run

    options = LoadOptions(
        trace=trace,
        rps=rps,
        burstiness=burstiness,
        seconds=seconds,
        url=url,
        model=model,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        seed=seed,
        concurrency_limit=concurrency_limit,
        speed=speed,
        chars_per_token=chars_per_token,
        context=context,
        ignore_eos=ignore_eos,
        ttft_ms=ttft,
        itl_ms=itl,
        as_json=as_json,
        state_dir=(state_dir or default_state_dir()).resolve(),
    )
    _end(asyncio.run(run(options, Say())))


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(help="MoEDeployments (YAML).", show_default=False)],
    show: Annotated[bool, typer.Option("--show", help="Print each with its defaults filled in.")] = False,
) -> None:
    """Check files; every problem at once, with its field, value and what is allowed."""
    from moe_cli.files import check

    _end(check(files, Say(), show=show))


@app.command()
def diff(
    file: File,
    against: Annotated[
        Path | None, typer.Option(help="Compare with this file.", show_default="the object in the cluster")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Namespace.", show_default="the file's, or default")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Context of the kubeconfig.", show_default="its current one")
    ] = None,
    kubeconfig: Annotated[
        Path | None, typer.Option(help="Path of the kubeconfig.", show_default="$KUBECONFIG, or ~/.kube/config")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as one JSON document.")] = False,
) -> None:
    """What applying a file would change: disruption class, traffic, GPUs that must be free, and whether it fits.

    Ends with 0 where nothing would change, 1 where something would, above 1 on an error.
    """
    from moe_cli.cluster import Access
    from moe_cli.diff_run import DiffOptions
    from moe_cli.diff_run import run as compare

    options = DiffOptions(file, against, namespace, Access(kubeconfig, context), as_json)
    _end(asyncio.run(compare(options, Say())))


@app.command()
def simulate(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="MoEDeployment (YAML), or scenarios (JSON, docs/simulator.md).", show_default="packaged examples"
        ),
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="Only this one; again for more.", show_default="all")
    ] = None,
    traces: Annotated[
        Path | None, typer.Option(help="Folder of the traces that scenarios name.", show_default="that of the file")
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiply the rate of requests.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the file's.", show_default="the file's")] = None,
    policy: Annotated[str, typer.Option(help="production (the gateway's own) or local (never spill).")] = "production",
    rps: Annotated[float | None, typer.Option(help="Mean requests a second to a MoEDeployment.")] = None,
    input_tokens: Annotated[
        str | None, typer.Option(help="MEDIAN or MEDIAN,P99 of prompts (log-normal).", show_default="2000")
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(help="MEDIAN or MEDIAN,P99 of answers (log-normal).", show_default="200")
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(help="Shape of the Gamma gaps: 1 is Poisson, 0.25 comes in bursts.", show_default="1"),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="How long; with a trace, at most that long.", show_default="600")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="CSV with TIMESTAMP,ContextTokens,GeneratedTokens, in place of --rps.")
    ] = None,
    tier: Annotated[
        list[str] | None, typer.Option(help="NAME=SHARE of requests; again for more.", show_default="all default")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=0, max=1000, help="So many replicas.", show_default="the file's min")
    ] = None,
    api_ttft_ms: Annotated[
        str | None, typer.Option(help="MEDIAN,P95 TTFT of the fallback targets.", show_default="600,1600, assumed")
    ] = None,
    api_itl_ms: Annotated[
        float | None, typer.Option(min=0, help="ITL of the fallback targets.", show_default="20, assumed")
    ] = None,
    catalog: Annotated[list[Path] | None, typer.Option(help="File that adds to the catalog, or overrides it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Try traffic, outages and expert drift on simulated replicas and closed APIs, with the gateway's own policy.

    A MoEDeployment is simulated as `moectl plan` would launch it, under traffic from --rps or --trace.
    """
    from moe_cli.simulate import SimulateOptions
    from moe_cli.simulate import run as play
    from moe_cli.simulate_file import FileOptions

    of_file = FileOptions(
        rps=rps,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        burstiness=burstiness,
        seconds=seconds,
        trace=trace,
        tiers=tuple(tier or ()),
        replicas=replicas,
        api_ttft_ms=api_ttft_ms,
        api_itl_ms=api_itl_ms,
        catalog=tuple(catalog or ()),
    )
    options = SimulateOptions(file, tuple(scenario or ()), traces, scale, seed, policy, as_json, of_file)
    _end(play(options, Say()))


@app.command()
def plan(
    file: Annotated[Path | None, typer.Argument(help="MoEDeployment (YAML).", show_default="the options")] = None,
    model: Annotated[str | None, typer.Option(help="Repository of the model, instead of a file.")] = None,
    accelerator: Annotated[
        list[str] | None, typer.Option(help="Accelerator; several may be named.", show_default="the file's, or all")
    ] = None,
    gpus: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1024, help="GPUs of one replica.", show_default="the file's, or 1 to 16"),
    ] = None,
    input_tokens: Annotated[
        float | None, typer.Option(help="Mean prompt.", show_default="the trace's, or 2000")
    ] = None,
    output_tokens: Annotated[
        float | None, typer.Option(help="Mean answer.", show_default="the trace's, or 200")
    ] = None,
    cached_share: Annotated[float, typer.Option(help="Share of the prompt read from the prefix cache.")] = 0.0,
    skew: Annotated[float, typer.Option(help="Zipf exponent of expert popularity; 0: even.")] = 0.0,
    capacity: Annotated[
        bool, typer.Option("--capacity", help="Try capacity factors too, where load is skewed: they cost quality.")
    ] = False,
    rps: Annotated[float | None, typer.Option(help="Mean requests a second to serve.")] = None,
    tokens_per_month: Annotated[float | None, typer.Option(help="Input and output to serve a month.")] = None,
    ttft_ms: Annotated[
        float | None, typer.Option(min=0.001, help="TTFT to keep.", show_default="the file's, or 2000")
    ] = None,
    itl_ms: Annotated[
        float | None, typer.Option(min=0.001, help="ITL to keep.", show_default="the file's, or 100")
    ] = None,
    api: Annotated[
        list[str] | None,
        typer.Option(help="API to compare with.", show_default="the file's targets, or the usual ones"),
    ] = None,
    rent: Annotated[float | None, typer.Option(help="USD per GPU-hour.", show_default="the catalog's")] = None,
    utilisation: Annotated[float, typer.Option(help="Mean load that GPUs may have, of their capacity.")] = 1.0,
    accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Accuracy that you measured, for the radar.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="CSV with TIMESTAMP,ContextTokens,GeneratedTokens.")] = None,
    catalog: Annotated[list[Path] | None, typer.Option(help="File that adds to the catalog, or overrides it.")] = None,
    config: Annotated[Path | None, typer.Option(help="config.json of a model that is not in the catalog.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Why this one, and what each other lacks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a report: FILE.html or FILE.svg.")
    ] = None,
    profiles: Annotated[bool, typer.Option("--profiles", help="Profiles A to D, and nothing else.")] = False,
    check: Annotated[
        Path | None, typer.Option(help="Hold predicted speeds against a CSV of published runs, and nothing else.")
    ] = None,
) -> None:
    """What fits, how fast, at what cost, and from what volume it beats an API. Starts nothing, asks nobody."""
    if check is not None:
        from moe_cli.plan_check import check as held_against

        _end(held_against(check, as_json))
        return
    from moe_cli.plan import PlanOptions
    from moe_cli.plan import run as answer
    from moe_core.clock import SystemClock

    if profiles:
        from moe_cli.plan_text import profile_lines, profiles_json

        say = Say()
        if as_json:
            say.line(profiles_json())
            return
        for line in profile_lines():
            say.line(line)
        return
    options = PlanOptions(
        file=file,
        model=model,
        accelerators=tuple(accelerator or ()),
        gpus=tuple(gpus or ()),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_share=cached_share,
        skew=skew,
        capacity=capacity,
        rps=rps,
        tokens_per_month=tokens_per_month,
        ttft_ms=ttft_ms,
        itl_ms=itl_ms,
        apis=tuple(api or ()),
        rent=rent,
        utilisation=utilisation,
        accuracy=accuracy,
        trace=trace,
        catalog=tuple(catalog or ()),
        config=config,
        explain=explain,
        as_json=as_json,
        output=output,
    )
    _end(answer(options, Say(), SystemClock()))


@app.command()
def crd(
    write: Annotated[Path | None, typer.Option(help="Write it there.")] = None,
    check: Annotated[Path | None, typer.Option(help="Fail where that file is not what the types give.")] = None,
) -> None:
    """The CustomResourceDefinition, from the types."""
    from moe_cli.files import custom_resource

    _end(custom_resource(Say(), write=write, check=check))


@app.command()
def completion(
    shell: Annotated[Shell, typer.Argument(help="The shell that is to complete.", show_default=False)],
) -> None:
    """Shell code that completes commands and options: `source <(moectl completion bash)` in a shell's start file.

    For zsh likewise, after `compinit`; for fish: `moectl completion fish | source`. As a plugin, `kubectl moe` is
    completed by kubectl's own completion.
    """
    Say().line(script(shell))


@app.command(name="version")
def show_version() -> None:
    """Version of moectl."""
    try:
        Say().line(version("moestack"))
    except PackageNotFoundError:
        Say().line("unknown: not installed")


@app.command(hidden=True)
def supervise(state_dir: Path) -> None:
    """Hold the stack whose plan lies in a state folder. Started by `up`."""
    from moe_cli.supervisor import supervise as hold

    _end(hold(state_dir))


def _end(code: Exit) -> None:
    raise typer.Exit(int(code))


def main(program: str = PROGRAM) -> None:
    """Entry point: problems become sentences and exit codes, never tracebacks. `program`: as a person called it."""
    prepare()
    try:
        app(prog_name=program, complete_var=VARIABLE)
    except Refusal as refusal:
        for problem in refusal.problems:
            Say().problem(problem)
        sys.exit(int(refusal.code))
    except KeyboardInterrupt:
        Say().problem(Problem(message="interrupted"))
        sys.exit(int(Exit.INTERRUPTED))


def plugin() -> None:
    """Entry point `kubectl-moe`: what kubectl runs for `kubectl moe`."""
    main("kubectl moe")


def plugin_completion() -> None:
    """Entry point `kubectl_complete-moe`: what kubectl runs to complete `kubectl moe …`."""
    ask_for(sys.argv[1:])
    plugin()


if __name__ == "__main__":
    main()
