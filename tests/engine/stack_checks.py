"""What the stack's tests look at in detail: the k that each request's tokens took, whose blocks they shared, and
whether Prometheus holds what the ranks counted.

Tokens are told by the ranks' own counters: a token that the prefix cache gave was routed by nobody, so the counters
say both how many experts a request's tokens took and how many tokens it found computed.
"""

from __future__ import annotations

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import requests

from moe_core import metrics
from moe_core.wire import ExpertKnobs, FallbackKnobs, Knobs, LayerFactors, Overflow
from tests.engine.stack import ROOT, Stack, acknowledged, complete, until

Headers = dict[str, str]
LOCAL_ONLY = FallbackKnobs(share_cap=0.0)
ALL_LAYERS = 3
MODEL_K = 4
BLOCK = 128
"""Tokens of a block of this engine's KV cache."""

TIERS = {"gold": MODEL_K, "thrift": 2, "draft": 1}
"""Experts per token of the resource's tiers. `gold` has the model's own; `draft` names no tenant, so it is open."""
NONE: Headers = {}
GOLD, THRIFT = {"x-moestack-tenant": "acme"}, {"x-moestack-tenant": "etl"}
DRAFT = {"x-moestack-tier": "draft"}
K = ((NONE, MODEL_K), (GOLD, MODEL_K), (THRIFT, 2), (DRAFT, 1))

UNCAPPED = ExpertKnobs(per_token=TIERS)
TIGHT = UNCAPPED.model_copy(update={"overflow": Overflow.REROUTE, "capacity_factor_prefill": Decimal(1)})
BY_LAYER = TIGHT.model_copy(update={"capacity_factor_by_layer": {1: LayerFactors(prefill=Decimal(2))}})
NO_LAYER = TIGHT.model_copy(update={"capacity_factor_by_layer": {9: LayerFactors(prefill=Decimal(2))}})


def put(stack: Stack, experts: ExpertKnobs) -> int:
    """Put expert knobs in force on every rank; returns their version. The tuner must be paused. Nothing spills then:
    what these checks count, the ranks must have computed."""
    version = stack.newest() + 1
    knobs = Knobs(deployment=stack.deployment, version=version, experts=experts, fallback=LOCAL_ONLY)
    assert stack.send(knobs).status_code == 202
    acknowledged(stack, version)
    return version


def answer(stack: Stack, prompt: str, max_tokens: int, headers: Headers, **more: Any) -> dict[str, Any]:
    """The answer, of a stream its last event."""
    got = complete(stack, prompt, max_tokens, headers, **{"temperature": 0, **more})
    assert got.ok, got.text
    assert got.headers["x-moestack-target"] == "local", dict(got.headers)
    if not more.get("stream"):
        document: dict[str, Any] = got.json()
        return document
    events = [line[6:] for line in got.text.splitlines() if line.startswith("data: {")]
    last: dict[str, Any] = json.loads(events[-1])
    return last


def routed(usage: dict[str, int], choices: int = 1) -> int:
    """Tokens that pass each layer: of each choice its prompt, and every token but the last."""
    return choices * usage["prompt_tokens"] + usage["completion_tokens"] - choices


def counted(stack: Stack) -> list[tuple[int, int]]:
    """(tokens, slots) of each layer since the replica started."""
    return [(layer["tokens"], sum(layer["demand"])) for layer in stack.matrix()]


def settles(stack: Stack, before: list[tuple[int, int]], tokens: int, slots: int | None, what: str) -> None:
    """Each layer has counted just so much more since `before`."""

    def more() -> list[tuple[int, int]]:
        return [(now[0] - was[0], now[1] - was[1]) for now, was in zip(counted(stack), before, strict=True)]

    def exactly() -> bool:
        return all(t == tokens and slots in (None, s) for t, s in more())

    try:
        until(exactly, 5, what)
    except AssertionError:
        raise AssertionError(f"{what}: (tokens, slots) {more()}, not ({tokens}, {slots})") from None


def requests_take_the_k_of_their_tier(stack: Stack) -> None:
    """One request at a time, by the k that the replica booted with: in one piece, streamed, with two choices."""
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    for number, (headers, k) in enumerate((*K, *K)):
        choices = 2 if number % 2 else 1
        more: dict[str, Any] = {"n": choices, "temperature": 1} | (streamed if number >= len(K) else {})
        before = counted(stack)
        usage = answer(stack, f"Request {number} counts its experts", 8, headers, **more)["usage"]
        tokens = routed(usage, choices)
        settles(stack, before, tokens, tokens * k, f"{headers}, {more}")


def tiers_mix_under_load(stack: Stack) -> None:
    """Requests of every tier at once: the slots are the sum of tokens × k, whatever step each token ran in."""
    mixed = K * 4
    put(stack, UNCAPPED)
    seen = stack.digest()["seq"]
    until(lambda: stack.digest()["seq"] > seen + 1, 5, "a digest of now")
    before, steps = counted(stack), stack.digest()["engine"]

    def one(number: int) -> int:
        prompt = f"{number} of many, {'very ' * number}mixed"
        return routed(answer(stack, prompt, 24, mixed[number][0])["usage"])

    with ThreadPoolExecutor(len(mixed)) as pool:
        tokens = list(pool.map(one, range(len(mixed))))
    slots = sum(count * k for count, (_, k) in zip(tokens, mixed, strict=True))
    settles(stack, before, sum(tokens), slots, "mixed tiers")
    generated = 24 * len(mixed)

    def done() -> int:
        now: dict[str, int] = stack.digest()["engine"]
        whole = now["generationTokensTotal"] - steps["generationTokensTotal"] == generated
        return now["stepsTotal"] - steps["stepsTotal"] if whole else 0

    ran = until(done, 5, "the digest has them all")
    assert ran < generated / 3, f"{ran} steps for {generated} tokens: requests did not run together"


def a_request_without_a_tier_is_left_alone(stack: Stack) -> None:
    """Bit for bit: text and log probabilities of before there were tiers, and of a tier with the model's own k."""

    def told(headers: Headers) -> tuple[object, ...]:
        choice = answer(stack, "Bit for bit the same, or is it?", 16, headers, logprobs=3)["choices"][0]
        return choice["text"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]

    with_tiers, own_k, fewer = told(NONE), told(GOLD), told(THRIFT)
    put(stack, ExpertKnobs())
    without = told(NONE)
    put(stack, UNCAPPED)
    assert with_tiers == without, f"tiers changed what a request without one gets: {with_tiers} != {without}"
    assert own_k == without, f"the model's own k changed what a request gets: {own_k} != {without}"
    assert fewer != without, "fewer experts change nothing: the comparison shows nothing"


ASKED = (
    ("first", UNCAPPED, NONE, False),
    ("again", UNCAPPED, NONE, True),
    ("a tier, of the same k", UNCAPPED, GOLD, False),
    ("that tier again", UNCAPPED, GOLD, True),
    ("another tier", UNCAPPED, THRIFT, False),
    ("capped", TIGHT, NONE, False),
    ("capped, a tier", TIGHT, THRIFT, False),
    ("capped again", TIGHT, NONE, True),
    ("a layer with γ of its own", BY_LAYER, NONE, False),
    ("that again", BY_LAYER, NONE, True),
    ("the γ of before", TIGHT, NONE, True),
    ("uncapped as at first", UNCAPPED, NONE, True),
    ("and its other tier", UNCAPPED, THRIFT, True),
)
"""(name, knobs in force, the asker, whether the prefix cache has the prompt's whole blocks)."""


def cached_blocks_stay_apart(stack: Stack) -> None:
    """One long prompt asked across tiers, γ and γ by layer."""
    prompt = "".join(random.Random(11).choices("abcdefghijklmnop ", k=300))
    in_force = UNCAPPED
    for name, knobs, headers, found in ASKED:
        if knobs != in_force:
            put(stack, knobs)
            in_force = knobs
        before = counted(stack)
        usage = answer(stack, prompt, 2, headers)["usage"]
        assert usage["prompt_tokens"] > 2 * BLOCK, usage
        cached = usage["prompt_tokens"] // BLOCK * BLOCK if found else 0
        settles(stack, before, routed(usage) - cached, None, f"{name}: {cached} cached tokens")
    put(stack, UNCAPPED)


def capacity_by_layer_is_acknowledged_or_refused(stack: Stack) -> None:
    """By every rank: what is in force is told by the digest and by Prometheus."""
    version = put(stack, BY_LAYER.model_copy(update={"capacity_factor_prefill": Decimal("1.5")}))
    digest = until(lambda: (d := stack.digest())["knobsVersion"] == version and d, 5, "in the digest")
    assert digest["knobs"]["capacityFactorByLayer"] == {"1": {"prefill": "2"}}, digest["knobs"]
    gamma = 'moestack_expert_capacity_factor{phase="prefill"}'
    until(lambda: [row["value"][1] for row in stack.prometheus(gamma)] == ["1.5"], 5, f"{gamma} = 1.5")
    stack.send(Knobs(deployment=stack.deployment, version=version + 1, experts=NO_LAYER))
    acks = until(lambda: stack.get(f"{stack.board}/v1/acks?version={version + 1}")["acks"], 5, "an answer")
    assert [ack["version"] for ack in acks] == [version] * 2, acks
    assert all("experts.capacityFactorByLayer: no MoE layer 9" in ack["error"] for ack in acks), acks
    put(stack, UNCAPPED)


def responses_take_the_k_of_their_tier(stack: Stack) -> None:
    """The Responses API, in one piece and streamed."""
    for stream in (False, True):
        for headers, k in ((NONE, MODEL_K), (THRIFT, 2)):
            before = counted(stack)
            body = {"model": "tiny-skewed", "input": "Hello", "max_output_tokens": 8, "stream": stream}
            got = requests.post(f"{stack.url}/responses", json=body, headers=headers, timeout=60)
            assert got.ok, got.text
            if stream:
                events = [json.loads(line[6:]) for line in got.text.splitlines() if line.startswith("data: ")]
                assert events[-1]["type"] in {"response.completed", "response.incomplete"}, events[-1]
                usage = events[-1]["response"]["usage"]
            else:
                usage = got.json()["usage"]
            tokens = usage["input_tokens"] + usage["output_tokens"] - 1
            settles(stack, before, tokens, k * tokens, f"a response, stream {stream}, {headers}")


OF_REPLICAS = re.compile("moestack_(expert|engine|rank|replica)_")
EXTERNAL_ALONE = {metrics.ENGINE_TTFT.name, metrics.ENGINE_ITL.name}
PEAKS_UNKNOWN = {metrics.ENGINE_SMBU.name, metrics.ENGINE_SMFU.name}
"""Shares of a peak: nobody knows a CPU's, so bytes and operations are there and their share is not."""


def prometheus_holds_what_ranks_counted(stack: Stack) -> None:
    """Every family of docs/telemetry.md, with the numbers that `moectl experts` shows; and no counter went back."""
    want = {row.name for row in metrics.ALL if OF_REPLICAS.match(row.name)} - EXTERNAL_ALONE - PEAKS_UNKNOWN
    named = set(re.findall(r"`(moestack_[a-z_]+)", (ROOT / "docs" / "telemetry.md").read_text()))
    names = stack.get(f"{stack.fact('prometheus', 'url')}/api/v1/label/__name__/values")["data"]
    present = {name for name in names if OF_REPLICAS.match(name)}
    assert present == want, present ^ want
    documented = {name for name in named if OF_REPLICAS.match(name)}
    assert documented <= present | EXTERNAL_ALONE | PEAKS_UNKNOWN, documented - present

    def rows(metric: metrics.Metric) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for row in stack.prometheus(metric.name):
            found.setdefault(int(row["metric"]["layer"]), []).append(float(row["value"][1]))
        return found

    def told() -> list[dict[str, Any]]:
        shown = stack.moectl("experts", "--json")
        assert shown.returncode == 0, shown.stderr
        layers: list[dict[str, Any]] = json.loads(shown.stdout)[0]["layers"]
        return layers

    def differences() -> list[str]:
        layers = told()
        pairs: list[tuple[metrics.Metric, dict[int, list[float]]]] = [
            (metrics.EXPERT_SLOTS, {layer["layer"]: [sum(layer["demand"])] for layer in layers}),
            (metrics.EXPERT_TOKENS, {layer["layer"]: [layer["tokens"]] for layer in layers}),
            (metrics.EXPERT_DROPPED, {layer["layer"]: [layer["dropped"]] for layer in layers}),
            (metrics.EXPERT_REROUTED, {layer["layer"]: [layer["rerouted"]] for layer in layers}),
            (metrics.EXPERT_OVERFLOW_KEPT, {layer["layer"]: [layer["overflowKept"]] for layer in layers}),
            (metrics.EXPERT_HOT, {layer["layer"]: sorted(layer["demand"])[-3:] for layer in layers}),
            (
                metrics.EXPERT_LOST_GATE_MASS,
                {layer["layer"]: [layer["lostGateMassTotal"]] for layer in stack.digest()["layers"]},
            ),
        ]
        found = []
        for metric, wanted in pairs:
            seen = {layer: sorted(values) for layer, values in rows(metric).items()}
            if seen != wanted:
                found.append(f"{metric.name}: {seen}, not {wanted}")
        return found

    try:
        until(lambda: not differences(), 15, "Prometheus has what moectl experts shows")
    except AssertionError:
        raise AssertionError("; ".join(differences())) from None
    layers = told()
    assert len(layers) == ALL_LAYERS
    for what in ("dropped", "rerouted"):
        assert sum(layer[what] for layer in layers) > 0, f"nothing was {what}: the comparison shows nothing"
    hooked = stack.prometheus('moestack_expert_layers{state="hooked"}')
    assert [row["value"][1] for row in hooked] == [str(ALL_LAYERS)], hooked
    no_counter_went_back(stack)


GAUGES = {
    'moestack_expert_imbalance_ratio{by="expert"}': "expertMaxOverMean",
    'moestack_expert_imbalance_ratio{by="rank"}': "rankMaxOverMean",
    'moestack_expert_imbalance_ratio{by="rank_demand"}': "demandRankMaxOverMean",
    "moestack_expert_load_cv_ratio": "expertCv",
}
"""Gauges of a layer's last window, and the fields of its digest."""


def gauges_are_those_of_the_digests(stack: Stack) -> None:
    """Under load, what Prometheus holds of each second's windows was said by a digest of that second."""
    put(stack, UNCAPPED)
    told: dict[tuple[str, int], set[float | None]] = {}
    started = time.time()
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(lambda: [answer(stack, f"{n} gauges are read", 24, NONE) for n in range(12)])
        while time.time() < started + 5 or not load.done():
            for layer in stack.digest()["layers"]:
                for query, name in GAUGES.items():
                    told.setdefault((query, layer["layer"]), set()).add(layer.get(name))
            time.sleep(0.05)
        load.result()
    first, last = started + 1.2, time.time() - 0.2  # what was scraped then was asked for here too, within its second
    for query in GAUGES:
        rows = stack.prometheus(f"{query}[15s]")
        assert len(rows) == ALL_LAYERS, (query, rows)
        for row in rows:
            held = {float(value) for at_s, value in row["values"] if first <= at_s <= last}
            said = told[query, int(row["metric"]["layer"])]
            assert held, f"{query}: nothing was scraped under load"
            assert held <= said, f"{query} of layer {row['metric']['layer']}: {held - said} were in no digest"


def no_counter_went_back(stack: Stack) -> None:
    """Each replica's counters have only grown; a new replica has series of its own."""
    counters = [row.name for row in metrics.ALL if row.kind == "counter" and OF_REPLICAS.match(row.name)]
    back = {name: rows for name in counters if (rows := stack.prometheus(f"resets({name}[1h]) > 0"))}
    assert back == {}
