"""A request's tier at the gateway: read from its headers, and written into the body that our own engine gets.

The engine believes what stands in the body, so what a client puts there under our names is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from moe_api.spec import DEFAULT_TIER
from moe_core.config import GatewayConfig
from moe_core.tiers import RESERVED_ARGUMENTS, TIER_ARGUMENT, TierRefused, tier_of
from moe_gateway.openai_api import ApiError, ApiRequest, Endpoint

TENANT_HEADER, TIER_HEADER = "x-moestack-tenant", "x-moestack-tier"
_ARGUMENTS = "vllm_xargs"
_BEAM_SEARCH = "use_beam_search"


def tier_from(config: GatewayConfig, headers: Mapping[bytes, bytes], tenant: str | None) -> str:
    """The tier of a tenant's request with these headers. Raises ApiError 403 for a tier that it may not have."""
    raw = headers.get(TIER_HEADER.encode())
    claim = None if raw is None else raw.decode("latin-1").strip()
    try:
        return tier_of(config.tiers or (), tenant, claim)
    except TierRefused as refused:
        raise ApiError(403, str(refused), kind="permission_error", code="tier_refused", param=TIER_HEADER) from None


def check_arguments(request: ApiRequest, tier: str, *, ours: bool = True) -> None:
    """Refuse what a client set under names that are ours, and what would lose its tier in an engine of ours. Raises
    ApiError 400."""
    if ours and tier != DEFAULT_TIER and request.document.get(_BEAM_SEARCH):
        # vLLM runs each beam as requests that it makes itself, without the arguments of the one that asked.
        message = f"{_BEAM_SEARCH}: beams would lose tier {tier!r}; leave it out, or ask for several answers by n"
        raise ApiError(400, message, code="unsupported_parameter", param=_BEAM_SEARCH)
    arguments = request.document.get(_ARGUMENTS)
    if arguments is None:
        return
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{_ARGUMENTS}: must be an object", code="invalid_type", param=_ARGUMENTS)
    for name in arguments:
        if name.startswith(RESERVED_ARGUMENTS):
            message = f"{_ARGUMENTS}.{name[:100]}: is the gateway's to set; ask for a tier by the header {TIER_HEADER}"
            raise ApiError(400, message, code="reserved_parameter", param=_ARGUMENTS)


def engine_body(request: ApiRequest, tier: str) -> bytes:
    """The body for our own engine: the client's bytes as they are, or with the request's tier. The request's arguments
    have passed `check_arguments`."""
    told = tier != DEFAULT_TIER and request.endpoint is not Endpoint.EMBEDDINGS
    if not told and _ARGUMENTS not in request.document:
        return request.raw
    document = dict(request.document)
    if told:
        document[_ARGUMENTS] = {**(document.get(_ARGUMENTS) or {}), TIER_ARGUMENT: tier}
    # Written anew even where nothing was added: what was checked is what the engine reads, whatever its parser makes
    # of a name that is given twice.
    return orjson.dumps(document)
