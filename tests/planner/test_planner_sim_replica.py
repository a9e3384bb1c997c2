"""Continuous batching, step by step: what each step takes, and when it ends."""

from __future__ import annotations

import pytest

from moe_planner.sim.engine import Engine, EngineInvalid, from_speed
from moe_planner.sim.policy import PLAIN
from moe_planner.sim.replica import Replica
from moe_planner.sim.result import Outcome, Result
from moe_planner.sim.simulate import simulate
from moe_planner.sim.world import Outage, World
from tests.planner.sim_world import engine, rows, world

# engine(): 1 ms a prompt token, decode 8 ms and 2 ms a sequence, 64 tokens a step, 8 sequences, 64 blocks of 16.


def play(*requests: tuple[float, int, int], on: World | None = None) -> Result:
    return simulate(rows(*requests), on or world(), PLAIN)


def ends(result: Result) -> list[float]:
    return [round(float(at + e2e), 6) for at, e2e in zip(result.workload.at_s, result.e2e_s, strict=True)]


CASES = {
    "one token is its prompt": ([(0.0, 10, 1)], [0.010]),
    "tokens after the first take a decode step each": ([(0.0, 10, 4)], [0.010 + 3 * 0.010]),
    "a long prompt goes in chunks of the budget": ([(0.0, 150, 1)], [0.150]),
    "two that come together share a step": ([(0.0, 10, 2), (0.0, 20, 2)], [0.030 + 0.012, 0.030 + 0.012]),
    # The second waits for the decode step that is under way (0.010–0.020), then its prompt shares the next one.
    "one that comes in mid-step waits for its end": ([(0.0, 10, 3), (0.015, 5, 1)], [0.035, 0.035]),
    # Steps: 64 of 100 prompt tokens; then 36 and the 5 of the next, in order.
    "prompts are taken in order of arrival": ([(0.0, 100, 1), (0.001, 5, 1)], [0.105, 0.105]),
    # The first decodes at 10 ms a step; the prompt of 100 needs two steps beside it: 63 tokens, then 37.
    "decodes come before prompts in the budget": (
        [(0.0, 1, 3), (0.0005, 100, 1)],
        [0.001 + 0.073 + 0.047, 0.001 + 0.073 + 0.047],
    ),
    "an idle engine begins at once": ([(0.0, 10, 1), (5.0, 10, 1)], [0.010, 5.010]),
}


@pytest.mark.parametrize("name", CASES)
def test_steps(name: str) -> None:
    requests, wanted = CASES[name]
    assert ends(play(*requests)) == pytest.approx(wanted)


def test_a_jump_of_many_steps_is_those_steps() -> None:
    """One request of 1,000 tokens beside one that comes each second: as if every step had been played alone."""
    lone = play((0.0, 10, 101))
    assert lone.itl_s[0] == pytest.approx(0.010)
    joined = play((0.0, 10, 101), (0.5, 1, 1))
    assert joined.e2e_s[0] == pytest.approx(lone.e2e_s[0] + 0.001)  # one step carried one prompt token more


def test_no_more_sequences_than_the_limit_and_the_next_joins_when_one_ends() -> None:
    limited = world(engine=engine(max_active=1))
    assert ends(play((0.0, 10, 3), (0.0, 10, 1), on=limited)) == pytest.approx([0.030, 0.040])


def test_a_prompt_waits_until_the_cache_has_room_for_all_of_it() -> None:
    small = world(engine=engine(kv_tokens=4 * 16))
    result = play((0.0, 33, 10), (0.0, 20, 1), on=small)  # 3 blocks, then 2 more
    assert ends(result) == pytest.approx([0.033 + 9 * 0.010, 0.033 + 9 * 0.010 + 0.020])
    assert result.preemptions == 0


def test_a_full_cache_sends_the_last_one_back_and_it_is_computed_again() -> None:
    """Two of one block each in a cache of two: when both need a second block, the later one gives way."""
    small = world(engine=engine(kv_tokens=2 * 16))
    result = play((0.0, 16, 10), (0.0, 16, 10), on=small)
    assert result.preemptions == 1
    first = 0.032 + 9 * 0.010  # alone from its first decode on
    again = first + 0.017 + 8 * 0.010  # 16 prompt tokens and the one it had made
    assert ends(result) == pytest.approx([first, again])
    assert list(result.ttft_s) == pytest.approx([0.032, 0.032])


def test_blocks_are_counted_as_they_are_taken() -> None:
    replica = Replica(engine(), [16], [40], [0])
    replica.add(0, 0.0)
    replica.begin(0.0)
    replica.finish()
    assert replica.blocks - replica.free == 1
    replica.begin(0.016)
    assert replica.jump == 39
    replica.cut(0.016 + 0.0105)  # in the second decode step
    assert replica.jump == 2
    replica.finish()
    assert replica.blocks - replica.free == replica.blocks_held() == 2


def test_requests_go_to_the_replica_with_the_fewest() -> None:
    result = play((0.0, 10, 50), (0.0, 10, 50), (0.0, 10, 50), (0.01, 10, 1), on=world(replicas=4))
    assert sorted(result.where) == [0, 1, 2, 3]


def test_a_dead_replica_cuts_what_it_had_begun_and_the_rest_goes_on() -> None:
    two = world(replicas=1, outages=(Outage(0, 0.1, 1.0),))
    result = play((0.0, 10, 100), (0.5, 10, 1), (2.0, 10, 1), on=two)
    assert list(result.outcome) == [Outcome.CUT, Outcome.FAILED, Outcome.LOCAL]
    assert result.e2e_s[2] == pytest.approx(0.010)


REFUSED = {
    "a time below zero": ({"decode_s": -0.1}, "decode_s"),
    "no cache": ({"kv_tokens": 0}, "kv_tokens"),
    "a cache below one block": ({"kv_tokens": 8}, "kv_tokens"),
    "a budget below the batch": ({"max_batched_tokens": 4}, "max_batched_tokens"),
    "steps of no time": ({"prefill_token_s": 0.0}, "launch_s"),
    "no number": ({"active_s": float("nan")}, "active_s"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_engine_that_cannot_be_is_refused_by_name(name: str) -> None:
    changes, field = REFUSED[name]
    with pytest.raises(EngineInvalid, match=f"^{field}"):
        engine(**changes)


class _Speed:
    def __init__(self, prefill_tokens_per_s: float, step_s: float) -> None:
        self.prefill_tokens_per_s, self.step_s = prefill_tokens_per_s, step_s


def test_an_engine_from_predicted_speeds_meets_both_of_them() -> None:
    made: Engine = from_speed(_Speed(20_000, 0.009), _Speed(20_000, 0.036), kv_tokens=230_000, max_active=256)
    assert made.step_s(0, 1) == pytest.approx(0.009)
    assert made.step_s(0, 256) == pytest.approx(0.036)
    assert made.step_s(2000, 0) == pytest.approx(0.1)
