"""`moectl diff`: reads both sides and prints the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moe_api.load import ResourceInvalid, load_object
from moe_api.v1alpha1 import MoEDeployment
from moe_cli.cluster import Access, connected, deployment
from moe_cli.diff import lines, report
from moe_cli.files import read
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say


@dataclass(frozen=True)
class DiffOptions:
    """`against`: a file that stands for what is there; None asks the cluster."""

    file: Path
    against: Path | None
    namespace: str | None
    access: Access
    as_json: bool


async def run(options: DiffOptions, say: Say) -> Exit:
    """Say what applying the file would change. Raises Refusal."""
    new = _placed(read(options.file), options)
    if options.against is not None:
        if options.access != Access():
            message = "--against compares two files: no cluster is asked"
            raise Refusal(Problem(message=message, remedy="leave out --kubeconfig and --context, or --against"))
        old: MoEDeployment | None = read(options.against)
    else:
        async with connected(options.access) as api:
            old = await deployment(api, new.metadata.namespace, new.metadata.name)
    diff = report(old, new)
    if options.as_json:
        say.line(json.dumps(diff.to_json(), ensure_ascii=False, indent=2))
    else:
        for line in lines(diff):
            say.line(line)
    return Exit.CHANGED if diff.changed else Exit.OK


def _placed(new: MoEDeployment, options: DiffOptions) -> MoEDeployment:
    """The resource in the namespace that is asked for, as `kubectl apply --namespace` places it."""
    wanted = options.namespace
    if wanted is None or wanted == new.metadata.namespace:
        return new
    if "namespace" in new.metadata.model_fields_set:
        message = f"{wanted} is not the namespace of {options.file}, {new.metadata.namespace}"
        raise Refusal(Problem(field="--namespace", message=message, remedy="leave it out of one of the two"))
    document = new.to_json()
    document["metadata"]["namespace"] = wanted
    try:
        return load_object(document)
    except ResourceInvalid as error:
        problems = (Problem(field="--namespace", message=p.remedy, remedy="name a namespace") for p in error.problems)
        raise Refusal(*problems) from None
