"""What a person orders of the tuner of a cluster: annotations of the MoEDeployment, which the tuner obeys."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_api.annotations import PAUSE_REASON, PAUSED, PINS
from moe_cli.cluster import Access, connected, explained, refused
from moe_cli.outcome import Exit, Problem, Refusal
from moe_cli.say import Say
from moe_cli.tune_text import OrderChange
from moe_kube.api import Api
from moe_kube.errors import Conflict, Invalid, NotFound
from moe_kube.objects import MOE_DEPLOYMENT, Obj, Ref
from moe_tuner.resource import pins_of, pins_refused

ATTEMPTS = 5
"""Writes of others that may come between our reading and our writing."""


@dataclass(frozen=True)
class Named:
    """A MoEDeployment of a cluster."""

    name: str
    namespace: str = "default"
    access: Access = Access()  # noqa: RUF009  frozen
    as_json: bool = False

    @property
    def ref(self) -> Ref:
        return Ref(MOE_DEPLOYMENT, self.namespace, self.name)


async def order(named: Named, say: Say, change: OrderChange, reason: str | None = None) -> Exit:
    """Change the annotations, and say what the tuner will hold. Raises Refusal."""
    async with connected(named.access) as api:
        after = await _written(api, named.ref, change, reason)
    found = after["metadata"].get("annotations") or {}
    paused, pins = found.get(PAUSED), _readable(found)
    if named.as_json:
        say.line(json.dumps({"deployment": f"{named.namespace}/{named.name}", "paused": paused, "pins": pins}))
    for line in [] if named.as_json else lines(after, paused, pins):
        say.line(line)
    return Exit.OK


def _readable(annotations: Mapping[str, str]) -> Mapping[str, Any]:
    """Pins; none where somebody else's cannot be read, which the tuner itself says in the status."""
    try:
        return pins_of(annotations)
    except ValueError:
        return {}


def lines(obj: Obj, paused: str | None, pins: Mapping[str, Any]) -> list[str]:
    """What holds now, for people: the annotations, and what of the resource holds beside them."""
    tuning = (obj.get("spec") or {}).get("tuning") or {}
    name = f"{obj['metadata']['namespace']}/{obj['metadata']['name']}"
    out = [f"{name}: {'not paused' if paused is None else 'paused' if paused == 'true' else f'paused: {paused}'}"]
    if paused is None and tuning.get("paused"):
        out.append("  spec.tuning.paused holds every knob all the same")
    if tuning.get("mode") == "Off":
        out.append("  spec.tuning.mode is Off: nothing is tuned")
    out += [f"  pinned: {knob} {'where it is' if value is None else f'at {value}'}" for knob, value in pins.items()]
    return out


def changed(annotations: Mapping[str, str], change: OrderChange, reason: str | None) -> dict[str, str | None]:
    """Annotations to set, None for those to take away. Raises ValueError where the pins that are there are not ours
    to change, because they cannot be read."""
    out: dict[str, str | None] = {}
    if change.paused is not None:
        out[PAUSED] = "true" if change.paused else None
        out[PAUSE_REASON] = reason if change.paused else None
    if change.pins or change.unpin:
        pins = {knob: value for knob, value in pins_of(annotations).items() if knob not in change.unpin}
        for knob, value in change.pins.items():
            whole = value is not None and value == value.to_integral_value()
            pins[knob] = None if value is None else int(value) if whole else str(value)
        out[PINS] = json.dumps(pins, sort_keys=True) if pins else None
    return out


def operations(obj: Obj, wanted: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """The change as a JSON patch (RFC 6902) that holds for this version of the object alone; none where it is so."""
    there = obj["metadata"].get("annotations")
    made: list[dict[str, Any]] = []
    for name, value in wanted.items():
        path = f"/metadata/annotations/{name.replace('~', '~0').replace('/', '~1')}"
        if value is None and name in (there or {}):
            made.append({"op": "remove", "path": path})
        elif value is not None and value != (there or {}).get(name):
            made.append({"op": "add", "path": path, "value": value})
    if not made:
        return []
    empty = [] if there is not None else [{"op": "add", "path": "/metadata/annotations", "value": {}}]
    version = {"op": "test", "path": "/metadata/resourceVersion", "value": obj["metadata"]["resourceVersion"]}
    return [version, *empty, *made]


async def _written(api: Api, ref: Ref, change: OrderChange, reason: str | None) -> Obj:
    with explained(ref, "rights to get and patch", "install the chart"):
        for _ in range(ATTEMPTS):
            try:
                found = await api.get(ref)
                patch = operations(found, _wanted(found, change, reason))
                return await api.json_patch(ref, patch) if patch else found
            except (Conflict, Invalid) as error:  # another writer was faster: look again
                last = error
            except NotFound as error:
                if error.kind_missing:
                    raise
                remedy = "name it, and its namespace with -n; kubectl get moed -A"
                raise refused(f"{ref}: there is none", remedy) from None
    raise refused(f"{ref}: not written, {ATTEMPTS} times: {last}", "try again")


def _wanted(found: Obj, change: OrderChange, reason: str | None) -> dict[str, str | None]:
    there = found["metadata"].get("annotations") or {}
    try:
        wanted = changed(there, change, reason)
    except ValueError as error:
        remedy = f"mend or remove that annotation first: kubectl annotate moed … {PINS}-"
        raise Refusal(Problem(field=PINS, message=str(error), remedy=remedy)) from None
    # What the tuner cannot read would pause it.
    problem = pins_refused(found, wanted.get(PINS) or "") if change.pins else ""
    if problem:
        raise Refusal(Problem(field="KNOB=VALUE", message=problem, remedy="choose a value that the resource allows"))
    return wanted


def split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The name of a MoEDeployment before KNOBS, if there is one: every knob has a dot, and no name has."""
    first, *rest = words
    return (None, list(words)) if "." in first or "=" in first else (first, rest)
