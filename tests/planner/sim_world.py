"""Small worlds and workloads for tests of the simulator."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from moe_planner.sim.engine import Engine
from moe_planner.sim.workload import Workload
from moe_planner.sim.world import Api, Outage, Slo, World


def engine(**changes: Any) -> Engine:
    """A replica whose steps take round numbers of milliseconds."""
    figures: dict[str, Any] = {
        "prefill_token_s": 0.001,
        "decode_s": 0.008,
        "active_s": 0.002,
        "kv_tokens": 64 * 16,
        "max_active": 8,
        "max_batched_tokens": 64,
    }
    return Engine(**{**figures, **changes})


def api(**changes: Any) -> Api:
    figures: dict[str, Any] = {
        "name": "gpt",
        "ttft_median_s": 0.05,
        "ttft_p95_s": 0.1,
        "itl_s": 0.01,
        "usd_per_m_input": 5.0,
        "usd_per_m_output": 30.0,
    }
    return Api(**{**figures, **changes})


def world(**changes: Any) -> World:
    return World(**{"engine": engine(), "slo": Slo(0.5, 0.05), **changes})


def rows(*requests: tuple[float, int, int]) -> Workload:
    """A workload of (seconds, input tokens, output tokens)."""
    return Workload.of(list(requests))


@st.composite
def workloads(draw: st.DrawFn, most: int = 40) -> Workload:
    """Up to `most` requests, many of them at the same moment; some never fit a small cache."""
    gaps = st.sampled_from([0.0, 0.0, 0.001, 0.02, 0.1, 1.0, 3.7])
    request = st.tuples(gaps, st.integers(1, 300), st.integers(1, 200))
    drawn = draw(st.lists(request, min_size=1, max_size=most))
    at, out = 0.0, []
    for gap, inputs, outputs in drawn:
        at += gap
        out.append((at, inputs, outputs))
    return Workload.of(out)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Tight caches, small batches, APIs that refuse, replicas that die."""
    replicas = draw(st.integers(1, 3))
    outages = draw(
        st.lists(
            st.tuples(st.integers(0, replicas - 1), st.floats(0.0, 5.0), st.floats(0.01, 5.0)).map(
                lambda o: Outage(o[0], o[1], o[1] + o[2])
            ),
            max_size=2,
        )
    )
    apis = draw(
        st.lists(
            st.builds(
                api,
                name=st.sampled_from(["gpt", "claude"]),
                requests_per_minute=st.sampled_from([3.0, 30.0, 1e9]),
                p_429_in_burst=st.sampled_from([0.0, 0.5]),
                outages=st.sampled_from([(), ((0.5, 2.0),)]),
            ),
            max_size=2,
            unique_by=lambda a: a.name,
        )
    )
    return world(
        engine=engine(
            kv_tokens=draw(st.sampled_from([20, 32, 33, 64])) * 16,
            max_active=draw(st.sampled_from([1, 3, 8])),
            max_batched_tokens=draw(st.sampled_from([8, 17, 64])),
            launch_s=draw(st.sampled_from([0.0, 0.001])),
        ),
        replicas=replicas,
        outages=tuple(outages),
        apis=tuple(apis),
        gateways=draw(st.integers(1, 2)),
        budget_usd=draw(st.sampled_from([0.0, 0.2, float("inf")])),
    )
