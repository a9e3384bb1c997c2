"""Data-parallel attention through Ray's gang: one Serve replica a rank, started by `moectl up` as a person would.

Two ranks, each with its own engine, requests and knobs, and half of the experts of both. One stack serves the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import requests

from moe_core.wire import ExpertKnobs, Knobs, Overflow
from tests.engine.stack import Stack, until

pytestmark = [pytest.mark.engine, pytest.mark.full]

TOP_K, RANKS, LAYERS = 4, 2, 2
SHAPE = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": LAYERS}
RESOURCE = """
apiVersion: moestack.dev/v1alpha1
kind: MoEDeployment
metadata: {{name: gang}}
spec:
  model: {{id: tiny-gang, source: "{source}"}}
  hardware: {{accelerator: cpu, gpusPerReplica: 2}}
  parallelism: {{data: 2}}
  engine:
    maxModelLen: 512
    maxActiveSeqs: 8
    maxBatchedTokens: 512
    extraArgs: {{enforce-eager: "true"}}
  slo: {{ttftP95: 20s, itlP95: 5s}}
  tuning: {{mode: "Off"}}
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    from moe_serving.tiny import Skew, cached_checkpoint

    folder = tmp_path_factory.mktemp("gang")
    resource = folder / "gang.yaml"
    source = cached_checkpoint("qwen3_moe", skew=Skew((0, 1, 2), 3.0), **SHAPE)
    resource.write_text(RESOURCE.format(source=source))
    it = Stack(folder / "state")
    done = it.moectl("up", str(resource), "--detach", "--plain", timeout=900)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        yield it
    finally:
        it.moectl("down", timeout=180)


def digests(stack: Stack) -> list[dict[str, Any]]:
    """Of both ranks, by name."""

    def both() -> list[dict[str, Any]]:
        found = sorted(stack.get(f"{stack.board}/v1/digests"), key=lambda one: one["replica"])
        return found if len(found) == RANKS else []

    return until(both, 30, "both ranks report")


def complete(stack: Stack, prompt: str, tokens: int = 6) -> requests.Response:
    body = {"model": "tiny-gang", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return requests.post(f"{stack.url}/completions", json=body, timeout=120)


def test_each_rank_is_a_replica_and_tells_the_load_of_the_whole_gang(stack: Stack) -> None:
    for digest in digests(stack):
        assert digest["ranks"] == 1
        assert [layer["hooked"] for layer in digest["layers"]] == [True] * LAYERS
        assert [len(layer["rankSlots"]) for layer in digest["layers"]] == [RANKS] * LAYERS


def test_both_ranks_answer_and_count_together_what_was_routed(stack: Stack) -> None:
    before = digests(stack)
    answers = [complete(stack, f"{i} sheep and {i * i} wolves") for i in range(16)]
    assert [answer.status_code for answer in answers] == [200] * 16
    usage = [answer.json()["usage"] for answer in answers]
    routed = sum(u["prompt_tokens"] + u["completion_tokens"] - 1 for u in usage)

    def counted() -> list[int]:
        grown = [
            [b["slotsTotal"] - a["slotsTotal"] for a, b in zip(old["layers"], new["layers"], strict=True)]
            for old, new in zip(before, digests(stack), strict=True)
        ]
        each = [sum(row) for row in zip(*grown, strict=True)]
        return [sum(row) for row in grown] if each == [routed * TOP_K] * LAYERS else []

    by_rank = until(counted, 15, f"{routed * TOP_K} slots a layer, over both ranks")
    assert all(by_rank), "one rank got no request"


def test_knobs_reach_both_ranks(stack: Stack) -> None:
    experts = ExpertKnobs(overflow=Overflow.REROUTE, capacity_factor_prefill=Decimal(1))
    knobs = Knobs(
        deployment="default/gang", version=stack.get(f"{stack.board}/v1/acks")["version"] + 1, experts=experts
    )
    assert stack.send(knobs).status_code == 202
    acks = until(
        lambda: (found := stack.get(f"{stack.board}/v1/acks?version={knobs.version}"))["complete"] and found, 15, "acks"
    )
    assert len({ack["replica"] for ack in acks["acks"]}) == RANKS
    for i in range(12):
        assert complete(stack, f"{i} wolves and some more sheep than that").status_code == 200

    def rerouted() -> bool:
        return all(sum(layer["reroutedTotal"] for layer in digest["layers"]) for digest in digests(stack))

    until(rerouted, 15, "each rank holds its capacity")


def test_a_rank_that_dies_takes_its_gang_with_it_and_both_come_back(stack: Stack) -> None:
    before = {digest["replica"] for digest in digests(stack)}
    stack.processes("VLLM::EngineCore")[0].kill()

    def anew() -> bool:
        found = stack.get(f"{stack.board}/v1/digests")
        return len(found) == RANKS and not before & {digest["replica"] for digest in found}

    until(anew, 400, "a new gang")
    until(lambda: complete(stack, "and again").status_code == 200, 60, "an answer")


def test_down_leaves_nothing(stack: Stack) -> None:
    engines = stack.processes("VLLM::")
    done = stack.moectl("down", timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any(process.is_running() for process in engines)
    assert not Path(f"/proc/{engines[0].pid}").exists()
