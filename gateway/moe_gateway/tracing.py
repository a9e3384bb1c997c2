"""Traces: a span for each request and a child for each attempt, by OpenTelemetry's names, sent by OTLP over HTTP.

Off unless the configuration names an endpoint: then nothing of OpenTelemetry is even imported, and a client's
traceparent passes on to our own engine untouched. No span holds a prompt, an answer or a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_core.config import TargetConfig, TracingConfig
from moe_core.log import get_log
from moe_gateway.call import Call, Outcome
from moe_gateway.openai_api import Endpoint

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

TRACEPARENT = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""https://www.w3.org/TR/trace-context/#traceparent-header, version 00."""
QUEUE_MAX = 2048
SHUTDOWN_S = 3.0
OPERATIONS = {
    Endpoint.CHAT.value: "chat",
    Endpoint.RESPONSES.value: "chat",
    Endpoint.COMPLETIONS.value: "text_completion",
    Endpoint.EMBEDDINGS.value: "embeddings",
}
"""gen_ai.operation.name by call; another call is a chat."""
PROVIDERS = {"azure-openai": "azure.ai.openai", "bedrock": "aws.bedrock", "gemini": "gcp.gemini"}
"""gen_ai.provider.name where it is not our own word for it."""
LOCAL_PROVIDER = "moestack"
ATTRIBUTES: Mapping[str, str] = {
    "gen_ai.operation.name": "chat, text_completion or embeddings",
    "gen_ai.provider.name": "who answered; of an attempt: who was asked",
    "gen_ai.request.model": "the model that the client named; of an attempt: the target's own name for it",
    "gen_ai.request.stream": "whether a stream was asked for",
    "gen_ai.usage.input_tokens": "prompt tokens",
    "gen_ai.usage.output_tokens": "output tokens",
    "gen_ai.response.time_to_first_chunk": "seconds from arrival to the first content token",
    "http.response.status_code": "status of the answer",
    "error.type": "why it went wrong",
    "moestack.request_id": "x-request-id",
    "moestack.tenant": "who asked",
    "moestack.tier": "its tier",
    "moestack.target": "revision or target that answered; of an attempt: that was asked",
    "moestack.reason": "why it went there",
    "moestack.blocked": "what kept it from spilling",
    "moestack.outcome": "ok, client_error, error, cut, cancelled or shed",
    "moestack.attempts": "how many upstreams were asked",
    "moestack.takeover": "continue or splice: how the last attempt, or this one, went on with a stream that broke",
    "moestack.p_miss": "forecast: probability that the first token comes too late",
    "moestack.ttft_predicted_s": "forecast of the time to the first token",
    "moestack.itl_s": "mean seconds between output tokens",
    "moestack.usd": "dollars owed to a closed API",
}
"""Every attribute of a span, and what it says."""


class Tracing:
    """Makes and sends spans. Sending happens in a thread of the library's; what is too much is dropped there."""

    def __init__(self, config: TracingConfig, deployment: str, exporter: SpanExporter | None = None) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        _say_it_in_our_log()
        self.config = config
        self._propagator = TraceContextTextMapPropagator()
        resource = Resource.create({"service.name": "moestack-gateway", "moestack.deployment": deployment})
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(config.sample), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=config.endpoint, timeout=2), max_queue_size=QUEUE_MAX)
            if exporter is None
            else SimpleSpanProcessor(exporter)
        )
        self._tracer = self._provider.get_tracer("moestack.gateway")

    def begin(self, call: Call, operation: str, headers: Mapping[bytes, bytes]) -> Span:
        """The span of a request, below the client's where it names one."""
        from opentelemetry.trace import SpanKind  # noqa: PLC0415

        given = headers.get(b"traceparent", b"")
        carrier = {}
        if TRACEPARENT.fullmatch(given):
            carrier = {"traceparent": given.decode(), "tracestate": headers.get(b"tracestate", b"").decode("latin-1")}
        context = self._propagator.extract(carrier)
        return self._tracer.start_span(operation, context, kind=SpanKind.SERVER)

    def end(self, span: Span, call: Call) -> None:
        if span.is_recording():
            operation = OPERATIONS.get(call.endpoint, "chat")
            span.update_name(f"{operation} {call.model}" if call.model else operation)
            _fill(span, _request_attributes(call, operation))
            _judge(span, call)
        span.end()

    def attempt(self, span: Span, call: Call, upstream: str, target: TargetConfig | None) -> Span:
        """The span of one attempt, below its request's."""
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415

        operation = OPERATIONS.get(call.endpoint, "chat")
        model = call.model if target is None else target.model
        child = self._tracer.start_span(f"{operation} {model}", set_span_in_context(span), kind=SpanKind.CLIENT)
        _fill(
            child,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": provider_of(target),
                "gen_ai.request.model": model,
                "moestack.target": upstream,
                "moestack.reason": None if call.reason is None else call.reason.value,
                "moestack.takeover": call.takeover,
            },
        )
        return child

    @staticmethod
    def attempt_ended(span: Span, error: str | None) -> None:
        if error is not None:
            _failed(span, error)
        span.end()

    def traceparent(self, span: Span) -> str | None:
        """What names a span to an upstream."""
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier.get("traceparent")

    async def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        # A thread of its own: the loop's pool would be waited for, however long a collector takes to answer.
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop may be gone by now
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=shut_down, daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(sent.wait(), SHUTDOWN_S)


def provider_of(target: TargetConfig | None) -> str:
    """gen_ai.provider.name of a target, or of our own engine."""
    return LOCAL_PROVIDER if target is None else PROVIDERS.get(target.provider, target.provider)


def onward(headers: Mapping[bytes, bytes]) -> str | None:
    """A client's traceparent, to be passed on as it is; None for what is none."""
    given = headers.get(b"traceparent")
    return given.decode() if given is not None and TRACEPARENT.fullmatch(given) else None


def _request_attributes(call: Call, operation: str) -> dict[str, Any]:
    forecast = call.forecast
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": call.provider,
        "gen_ai.request.model": call.model or None,
        "gen_ai.request.stream": call.stream,
        "gen_ai.usage.input_tokens": call.prompt_tokens,
        "gen_ai.usage.output_tokens": call.output_tokens,
        "gen_ai.response.time_to_first_chunk": call.ttft_s,
        "http.response.status_code": call.status or None,
        "moestack.request_id": call.request_id,
        "moestack.tenant": call.tenant,
        "moestack.tier": call.tier,
        "moestack.target": call.upstream,
        "moestack.reason": None if call.reason is None else call.reason.value,
        "moestack.blocked": None if call.blocked is None else call.blocked.value,
        "moestack.outcome": None if call.outcome is None else call.outcome.value,
        "moestack.attempts": call.attempts,
        "moestack.takeover": call.takeover,
        "moestack.p_miss": None if forecast is None else forecast.p_miss,
        "moestack.ttft_predicted_s": None if forecast is None else forecast.ttft_s,
        "moestack.itl_s": call.itl_s,
        "moestack.usd": str(call.usd) if call.usd else None,
    }


def _judge(span: Span, call: Call) -> None:
    if call.outcome in {Outcome.ERROR, Outcome.CUT, Outcome.SHED}:
        _failed(span, call.outcome.value if call.error is None else call.error[:200])
    elif call.error is not None:
        span.set_attribute("error.type", call.error[:200])


def _failed(span: Span, error: str) -> None:
    from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415

    span.set_attribute("error.type", error)
    span.set_status(Status(StatusCode.ERROR))


def _fill(span: Span, attributes: Mapping[str, Any]) -> None:
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})


class _Forward(logging.Handler):
    """What the library has to say about its sending, as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        get_log("gateway.tracing").warning("traces are not delivered", error=record.getMessage()[:300])


def _say_it_in_our_log() -> None:
    logger = logging.getLogger("opentelemetry")
    if not any(isinstance(handler, _Forward) for handler in logger.handlers):
        logger.addHandler(_Forward(logging.WARNING))
        logger.propagate = False
