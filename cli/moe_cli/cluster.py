"""MoEDeployments of a cluster, for commands: found by kubeconfig, and every failure a sentence with its remedy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_api.load import ResourceInvalid, load_object
from moe_api.v1alpha1 import MoEDeployment
from moe_cli.outcome import Exit, Problem, Refusal
from moe_kube.api import Api
from moe_kube.errors import ApiError, Forbidden, NotFound, Unreachable
from moe_kube.objects import MOE_DEPLOYMENT, Ref


@dataclass(frozen=True)
class Access:
    """Which cluster: options of the command line, as kubectl has them."""

    kubeconfig: Path | None = None
    context: str | None = None


@asynccontextmanager
async def connected(access: Access) -> AsyncIterator[Api]:
    """The API server of that kubeconfig and context. Raises Refusal."""
    try:
        from moe_kube.access import AccessError
        from moe_kube.connect import connect
    except ImportError:
        message = "the Kubernetes client is not installed"
        raise Refusal(
            Problem(message=message, remedy="install moestack[cli], or compare with a file: --against FILE")
        ) from None
    try:
        api = await connect(access.kubeconfig, access.context)
    except AccessError as error:
        remedy = "set --kubeconfig or --context, or compare with a file: --against FILE"
        raise Refusal(Problem(message=str(error), remedy=remedy)) from None
    async with api:
        yield api


async def deployment(api: Api, namespace: str, name: str) -> MoEDeployment | None:
    """The object as it is in the cluster; None where there is none. Raises Refusal."""
    ref = Ref(MOE_DEPLOYMENT, namespace, name)
    with explained(ref, "right to get", "install the chart, or apply `moectl crd`"):
        try:
            found = await api.get(ref)
        except NotFound as error:
            if error.kind_missing:
                raise
            return None
    try:
        return load_object(found, str(ref))
    except ResourceInvalid as error:
        remedy = "it was stored by another version of moestack: update moectl, or compare with --against FILE"
        raise Refusal(*(Problem(message=line, remedy=remedy) for line in str(error).splitlines())) from None


@contextmanager
def explained(ref: Ref, rights: str, without_kind: str) -> Iterator[None]:
    """Failures of calls about that object as sentences with their remedies. Raises Refusal.

    `rights`: what whoever is forbidden lacks; `without_kind`: what to do where the cluster knows no MoEDeployment.
    """
    try:
        yield
    except Forbidden as error:
        raise refused(f"{ref}: {error}", f"ask for the {rights} moedeployments there") from None
    except Unreachable as error:
        raise refused(f"the API server does not answer: {error}", "check --context and the network") from None
    except ApiError as error:
        if isinstance(error, NotFound) and error.kind_missing:
            raise refused("the cluster knows no MoEDeployment", without_kind) from None
        raise refused(f"{ref}: {error}", "try again") from None


def refused(message: str, remedy: str) -> Refusal:
    """A cluster that cannot be asked, or says no."""
    return Refusal(Problem(message=message, remedy=remedy), code=Exit.COULD_NOT_START)
