"""What a reconcile asks for. It performs nothing itself: a shell answers, or raises the error of the answer into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moe_core.wire import GatewayDigest, Weights
from moe_kube.objects import Kind, Obj, Ref
from moe_operator.children import Child, Key
from moe_operator.render.objects import Rendered


@dataclass(frozen=True, slots=True)
class Look:
    """Everything that the caches hold for one key. Answer: `Observed`."""

    key: Key


@dataclass(frozen=True, slots=True)
class Observed:
    """Answer to `Look`."""

    resource: Obj | None
    children: tuple[Child, ...]
    absent: frozenset[Kind]
    """Kinds whose CRDs are not installed."""
    now: float


@dataclass(frozen=True, slots=True)
class Get:
    """The newest state of one object. Answer: the object, or None where there is none."""

    ref: Ref


@dataclass(frozen=True, slots=True)
class Apply:
    """Server-side apply of our part. `uid`: of the object that it must be; without one, it must not be another's.

    Answer: the object.
    """

    rendered: Rendered
    uid: str = ""


@dataclass(frozen=True, slots=True)
class Remove:
    """Delete one object, if it is still the one of that uid. Gone already is fine. Answer: None."""

    ref: Ref
    uid: str


@dataclass(frozen=True, slots=True)
class Patch:
    """JSON patch (RFC 6902) of an object of another controller. Answer: the object."""

    ref: Ref
    operations: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class WriteStatus:
    """Apply our part of the status, if the resource is still at that version. Answer: the object."""

    ref: Ref
    status: Mapping[str, Any]
    resource_version: str


@dataclass(frozen=True, slots=True)
class AskGateways:
    """The digests of a deployment's gateways, and the imbalance that its boards report. Answer: `Gateways`."""

    key: Key
    pods: tuple[str, ...]
    """host:port of each admin port."""
    boards: tuple[str, ...]
    window_s: float


@dataclass(frozen=True, slots=True)
class Gateways:
    """Answer to `AskGateways`: a digest for each pod that spoke."""

    digests: tuple[GatewayDigest, ...] = ()
    silent: int = 0
    imbalance: float | None = None


@dataclass(frozen=True, slots=True)
class SendWeights:
    """Sign weights and put them on gateways. Answer: how many took them; one that did not gets them again."""

    pods: tuple[str, ...]
    weights: Weights


@dataclass(frozen=True, slots=True)
class Tell:
    """An Event on the MoEDeployment. Answer: None, always."""

    resource: Ref
    uid: str
    type: Literal["Normal", "Warning"]
    reason: str
    note: str


Request = Look | Get | Apply | Remove | Patch | WriteStatus | AskGateways | SendWeights | Tell


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a reconcile ended: when to look again without being told to; None waits for a change."""

    requeue_s: float | None = None
    settled: bool = True
    error: str = ""
    """Not empty: something failed and is tried again with back-off."""
