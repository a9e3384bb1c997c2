"""`moectl validate` and `moectl crd`: what concerns files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from moe_api.load import ResourceInvalid, load_file
from moe_api.v1alpha1 import MoEDeployment
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say


def read(file: Path) -> MoEDeployment:
    """The resource in a file. Raises Refusal with every problem, a line each."""
    try:
        return load_file(file)
    except ResourceInvalid as error:
        raise Refusal(*(Problem(message=line) for line in str(error).splitlines())) from None


def check(files: Sequence[Path], say: Say, *, show: bool) -> Exit:
    """Check each file; one that is wrong does not keep the others from being checked."""
    code = Exit.OK
    for file in files:
        try:
            resource = read(file)
        except Refusal as refusal:
            for problem in refusal.problems:
                say.problem(problem)
            code = refusal.code
            continue
        if show:
            say.line("---\n" + yaml.safe_dump(resource.to_json(), sort_keys=False, allow_unicode=True).rstrip())
        else:
            say.line(f"{file}: ok ({resource.key}, {resource.spec.model.id})")
    return code


def custom_resource(say: Say, *, write: Path | None, check: Path | None) -> Exit:
    """Print, write or compare the CustomResourceDefinition."""
    from moe_api import crd

    if write is not None:
        crd.write(write)
        say.line(f"wrote {write}")
    elif check is not None:
        problems = crd.check(check)
        for problem in problems:
            say.problem(problem)
        return Exit.BAD_INPUT if problems else Exit.OK
    else:
        say.line(crd.dump().rstrip())
    return Exit.OK
