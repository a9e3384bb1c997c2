"""The log line of a request: what is known of it when it has ended, and nothing that is not."""

from __future__ import annotations

from moe_gateway.call import Call


def line_of_request(call: Call, target: str, outcome: str, duration_s: float) -> dict[str, object]:
    """Its fields. Dollars are exact, as text."""
    forecast = call.forecast
    fields: dict[str, object] = {
        "request_id": call.request_id,
        "endpoint": call.endpoint,
        "stream": call.stream,
        "tier": call.tier,
        "target": target,
        "spilled": call.spilled,
        "outcome": outcome,
        "status": call.status,
        "attempts": call.attempts,
        "duration_s": round(duration_s, 5),
        "prompt_tokens": call.prompt_tokens,
        "output_tokens": call.output_tokens,
    }
    if call.key_id is not None:
        fields["key_id"] = call.key_id
    if call.tenant is not None:
        fields["tenant"] = call.tenant
    if call.model:
        fields["model"] = call.model
    if call.reason is not None:
        fields["reason"] = call.reason
    if forecast is not None:
        fields["p_miss"], fields["ttft_predicted_s"] = round(forecast.p_miss, 4), round(forecast.ttft_s, 4)
    if call.ttft_s is not None:
        fields["ttft_s"] = round(call.ttft_s, 5)
    if call.itl_s is not None:
        fields["itl_s"] = round(call.itl_s, 5)
    if not plain(call) or call.error is not None or call.prompt is not None or call.blocked is not None:
        fields |= {name: value for name, value in _rare(call).items() if value is not None}
    return fields


def plain(call: Call) -> bool:
    """Whether nothing left for a closed API, or would have, and nothing broke."""
    return not (call.spilled or call.usd or call.would is not None or call.takeover is not None or call.broke_at)


def _rare(call: Call) -> dict[str, object]:
    would = call.would
    return {
        "prompt": call.prompt,
        "blocked": call.blocked,
        "error": call.error,
        "takeover": call.takeover,
        "broke_at": call.broke_at or None,
        "tokens_before": call.carried_tokens or None,
        "usd": str(call.usd) if call.usd else None,
        "shadow_target": None if would is None else would.target,
        "shadow_reason": None if would is None else would.reason,
        "shadow_usd": None if would is None else str(would.usd),
    }
