"""What a MoEDeployment asks of the tuner, and where its parts answer: settings of a tuner from the resource. Pure.

What a person wrote to hold the tuner back and that cannot be read holds it back altogether.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import ValidationError

from moe_api.annotations import PAUSE_REASON, PAUSED, PINS
from moe_api.enums import EngineKind
from moe_api.load import ResourceInvalid, load_object
from moe_api.spec_tuning import PIN_KNOBS
from moe_api.status import PauseStatus, PinStatus, TuningStatus
from moe_api.v1alpha1 import MoEDeployment
from moe_core import process_config
from moe_core.addresses import GATEWAY_ADMIN_PORT, board_url
from moe_core.config import ClusterTunerConfig, KnobBounds, TunerConfig
from moe_core.moments import rfc3339, unix_s
from moe_core.setting import KNOBS, unknown_pins
from moe_kube.endpoints import EndpointFacts, at_port
from moe_kube.objects import Obj
from moe_tuner.settings import ConfigRefused, verify

AS_IT_IS = "as it is"
"""Value of a pin that names none."""
_FIELDS = {knob: field for field, knob in PIN_KNOBS.items()}
REASON_MAX = 1024
_NO_BOUNDS = KnobBounds(
    capacity_factor_min=Decimal(1), capacity_factor_max=Decimal(1), active_seqs_min=1, active_seqs_max=1
)


@dataclass(frozen=True)
class Wanted:
    """What should be tuned of one MoEDeployment, and how. Without `config` nothing is."""

    uid: str
    config: TunerConfig | None = None
    problem: str = ""
    """Why it cannot be tuned, or not as it is written now."""
    pauses: tuple[PauseStatus, ...] = ()
    pins: tuple[PinStatus, ...] = ()
    changes_at_s: float | None = None
    """Unix seconds at which this changes by itself: a pause ends."""


class Unreadable(ValueError):
    """An annotation that cannot be read; the message names it and the remedy."""


def read(
    obj: Obj,
    slices: Iterable[EndpointFacts],
    process: ClusterTunerConfig,
    before: TunerConfig | None,
    now_s: float,
) -> Wanted:
    """Settings from a MoEDeployment as the API server has it.

    `slices` are those of the gateway's admin Service. `before` is what is in force: where no board serves now, or the
    resource cannot be read, its tuner goes on with that, and a pause holds it all the same.
    """
    uid = str(obj["metadata"].get("uid", ""))
    annotations: Mapping[str, str] = obj["metadata"].get("annotations") or {}
    pauses = [pause] if (pause := _pause(annotations, now_s)) is not None else []
    try:
        resource = _parsed(obj, {})
    except ResourceInvalid as error:
        return Wanted(uid, _held(before, pauses), str(error).splitlines()[0], tuple(pauses), changes_at_s=_ends(pauses))
    try:
        pins = pins_of(annotations)
        resource = _pinned(obj, pins)
    except (Unreadable, ResourceInvalid) as error:
        pins = {}
        why = str(error).splitlines()[0].removeprefix("object: ").replace("spec.tuning.pins", PINS)
        pauses = [_annotated(f"{why}; paused until that is mended")]
    if resource.spec.tuning.paused:
        pauses.insert(0, PauseStatus(source="Spec", until=None, reason="spec.tuning.paused"))
    fields = _fields(resource, pins, paused=bool(pauses))
    shown = tuple(_pin_status(pins, fields["pins"], knob) for knob in sorted({*fields["pins"], *pins}))
    said = Wanted(uid, pauses=tuple(pauses), pins=shown, changes_at_s=_ends(pauses))
    if resource.spec.engine.kind is EngineKind.EXTERNAL:
        return replace(said, problem="spec.engine.kind is External: there is no board that hands out knobs")
    board = serving_board(obj) or (None if before is None else before.board_url)
    urls = tuple(f"http://{pod}" for pod in at_port(slices, GATEWAY_ADMIN_PORT))
    gateways = urls or (() if before is None else before.gateway_admin_urls)
    if board is None or not gateways:
        return said
    config = _config(fields, process, uid, board, gateways)
    try:
        verify(config)
    except ConfigRefused as refusal:
        return replace(said, config=_held(before, pauses), problem=str(refusal))
    return replace(said, config=config)


def serving_board(obj: Obj) -> str | None:
    """Address of the board of the revision that carries most of the traffic, of two the younger; None where none does.

    The other revision of an upgrade keeps what it booted with until it carries more.
    """
    revisions = [one for one in (obj.get("status") or {}).get("revisions") or () if int(one.get("weight") or 0) > 0]
    if not revisions:
        return None
    best = max(revisions, key=lambda one: (int(one["weight"]), str(one.get("createdAt", "")), str(one["name"])))
    return board_url(obj["metadata"]["namespace"], str(best["name"]))


def tuning_of(obj: Obj) -> TuningStatus | None:
    """`status.tuning`; None where there is none that can be read."""
    try:
        document = (obj.get("status") or {}).get("tuning")
        return None if document is None else TuningStatus.model_validate(document)
    except ValidationError:
        return None


def _parsed(obj: Obj, pins: Mapping[str, str | int]) -> MoEDeployment:
    """The resource, with pins on top of its own. Raises ResourceInvalid."""
    meta = {name: obj["metadata"][name] for name in ("name", "namespace", "uid") if name in obj["metadata"]}
    spec = dict(obj.get("spec") or {})
    if pins:
        tuning = dict(spec.get("tuning") or {})
        added = {_camel(_FIELDS[knob]): value for knob, value in pins.items()}
        spec["tuning"] = {**tuning, "pins": {**(tuning.get("pins") or {}), **added}}
    return load_object({"apiVersion": obj["apiVersion"], "kind": obj["kind"], "metadata": meta, "spec": spec})


def _camel(field: str) -> str:
    first, *rest = field.split("_")
    return first + "".join(word.title() for word in rest)


def _pause(annotations: Mapping[str, str], now_s: float) -> PauseStatus | None:
    """The pause of the annotation, if it is in force."""
    text = annotations.get(PAUSED, "").strip()
    if text.lower() in ("", "false"):
        return None
    reason = annotations.get(PAUSE_REASON, "")[:REASON_MAX] or None
    if text.lower() == "true":
        return PauseStatus(source="Annotation", until=None, reason=reason)
    until_s = unix_s(text)
    if until_s is None:
        return _annotated(f"{PAUSED}: {text[:64]!r} is neither true, false nor a time such as {rfc3339(now_s)}")
    if until_s <= now_s:
        return None
    return PauseStatus(source="Annotation", until=rfc3339(until_s), reason=reason)


def _annotated(reason: str) -> PauseStatus:
    return PauseStatus(source="Annotation", until=None, reason=reason[:REASON_MAX])


def _held(before: TunerConfig | None, pauses: Iterable[PauseStatus]) -> TunerConfig | None:
    """What was in force, and paused where that is said now."""
    return None if before is None else before.model_copy(update={"paused": before.paused or any(pauses)})


def _ends(pauses: Iterable[PauseStatus]) -> float | None:
    return min((float(at) for pause in pauses if (at := unix_s(pause.until)) is not None), default=None)


def _pins(text: str) -> dict[str, str | int | None]:
    """Pins of the annotation: knob → value, None where it is held as it is. Raises Unreadable."""
    if not text.strip():
        return {}
    try:
        found = json.loads(text, parse_float=str)
    except ValueError:
        raise Unreadable(f"{PINS}: is not JSON; write an object of knob and value") from None
    if not isinstance(found, dict):
        raise Unreadable(f"{PINS}: is no object; write knob and value")
    for knob, value in found.items():
        if value is not None and knob not in _FIELDS:
            raise Unreadable(f"{PINS}: {knob[:64]!r} takes no value; knobs that do are {', '.join(_FIELDS)}")
        if unknown_pins(_NO_BOUNDS.model_copy(update={"pinned": (knob,)})):
            raise Unreadable(f"{PINS}: {knob[:64]!r} names no knob; knobs are {', '.join(KNOBS)}")
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise Unreadable(f"{PINS}: the value of {knob[:64]!r} is no number and no word")
    return found


def pins_of(annotations: Mapping[str, str]) -> dict[str, str | int | None]:
    """Pins of the annotation: knob → value, None where it is held as it is. Raises ValueError for an unreadable one."""
    return _pins(annotations.get(PINS, ""))


def pins_refused(obj: Obj, text: str) -> str:
    """Why the tuner of this MoEDeployment would not take such an annotation of pins; "" where it would."""
    try:
        _pinned(obj, _pins(text))
    except (Unreadable, ResourceInvalid) as error:
        return str(error).splitlines()[0]
    return ""


def _pinned(obj: Obj, pins: Mapping[str, str | int | None]) -> MoEDeployment:
    """The resource as if the pins that have a value were its own. Raises ResourceInvalid."""
    return _parsed(obj, {knob: value for knob, value in pins.items() if value is not None})


def _fields(resource: MoEDeployment, pins: Mapping[str, Any], *, paused: bool) -> dict[str, Any]:
    """Fields of a TunerConfig that the resource and its annotations decide. Raises nothing."""
    fields = process_config.tuning(resource)
    held = tuple(dict.fromkeys((*fields["bounds"].pinned, *pins)))
    fields["bounds"] = fields["bounds"].model_copy(update={"pinned": held})
    return {**fields, "paused": paused}


def _pin_status(pins: Mapping[str, Any], values: Mapping[str, Any], knob: str) -> PinStatus:
    value = values.get(knob)
    annotated = pins.get(knob) is not None or knob not in values
    source: Literal["Spec", "Annotation"] = "Annotation" if annotated else "Spec"
    return PinStatus(knob=knob, value=AS_IT_IS if value is None else str(value), source=source)


def _config(
    fields: Mapping[str, Any], process: ClusterTunerConfig, uid: str, board: str, gateways: tuple[str, ...]
) -> TunerConfig:
    # By uid: one that was deleted and made again under its name begins anew.
    folder = PurePosixPath(process.state_dir) / uid
    return TunerConfig(
        **fields,
        board_url=board,
        gateway_admin_urls=gateways,
        prometheus_url=process.prometheus_url,
        signing_key_file=process.signing_key_file,
        storage_url=process.storage_url or f"sqlite:///{folder / 'study.db'}",
        storage_password_file=process.storage_password_file if process.storage_url else None,
        decision_log=str(folder / "decisions.jsonl"),
        tick_s=process.tick_s,
        window_s=process.window_s,
        simulator_only_s=process.simulator_only_s,
    )
