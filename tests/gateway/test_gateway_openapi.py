"""The OpenAPI document says what is served, and what is served keeps to the document: schemathesis over the process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from moe_core.config import GatewayConfig
from moe_gateway import app, openapi
from moe_gateway.openai_api import Endpoint
from tests.gateway.test_gateway_fuzz import STREAM, WHOLE, http
from tests.gateway.threaded import Bench, RawUpstream, threaded

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
DOCUMENT = json.loads(openapi.document("tiny"))
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    def made(upstream: RawUpstream) -> GatewayConfig:
        upstream.answer, upstream.stream = http(WHOLE), http(STREAM, "text/event-stream")
        return GatewayConfig.model_validate(
            {
                "deployment": "default/tiny",
                "model": "tiny",
                "revisions": [{"name": "r0", "url": f"http://127.0.0.1:{upstream.port}/v1"}],
                "weights": {"r0": 100},
                "slo": {"ttftP95S": 5.0, "itlP95S": 1.0},
            }
        )

    with threaded(made) as running:
        yield running
        assert running.crashes == []


def test_the_table_is_what_the_gateway_routes() -> None:
    posts = {route.path for route in openapi.ROUTES if route.method == "POST"}
    assert posts == set(app._POST)
    assert {route.path for route in openapi.ROUTES} - posts == {
        "/v1/models",
        "/v1/models/{model}",
        openapi.OPENAPI_PATH,
    }
    assert len(posts) == len(Endpoint)


def test_the_document_is_served_to_everybody(bench: Bench) -> None:
    reply = bench.ask(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (reply.status, json.loads(reply.body)) == (200, DOCUMENT)
    wrong = bench.ask(b"POST /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    assert (wrong.status, wrong.code) == (405, "method_not_allowed")


@pytest.mark.parametrize("cases", [20, pytest.param(10_000 // len(OPERATIONS) + 1, marks=pytest.mark.full)])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_one_that_the_document_names(bench: Bench, path: str, method: str, cases: int) -> None:
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method.upper()]

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        bench.heal()
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # past the first check: most of what is drawn names no model
        response = case.call(base_url=f"http://127.0.0.1:{bench.server.port}")
        case.validate_response(response, checks=CHECKS)

    check()
