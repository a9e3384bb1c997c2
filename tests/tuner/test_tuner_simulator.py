"""The simulator on live windows: it refuses what would break a promise, and knows what it does not know."""

from __future__ import annotations

import pytest

from moe_tuner.measure import Measurement
from moe_tuner.simulator import predict, step_slope
from tests.tuner.tuner_world import SLO, measured, setting, signals

SIGNALS = signals(active_limit=32, active_ceiling=64, kv_usage=0.3, running=12)


def window(**changes: object) -> Measurement:
    base: dict[str, object] = {
        "requests_per_s": 8.0,
        "prompt_tokens": 300.0,
        "output_tokens": 60.0,
        "decode_step_s": 0.02,
        "decode_batch": 10.0,
        "prefill_s_per_token": 0.0001,
        "imbalance": 1.8,
    }
    return measured(**{**base, **changes})


def test_too_few_sequences_are_foreseen_to_queue_and_refused() -> None:
    found = predict(setting(seqs=32), setting(seqs=4), windows=[window()], signals=SIGNALS, slo=SLO)
    assert found is not None
    assert found.refused is not None
    assert "TTFT p95 would be" in found.refused
    assert found.constraints["ttft"] > 0


def test_capacity_is_foreseen_to_relieve_a_skewed_prefill_by_its_share() -> None:
    prompts = {"requests_per_s": 1.0, "prompt_tokens": 3000.0, "output_tokens": 2.0}
    home, capped = setting(seqs=32), setting("1.2", seqs=32)
    found = predict(home, capped, windows=[window(**prompts)], signals=SIGNALS, slo=SLO)
    assert found is not None
    assert found.refused is None
    assert 0.75 < found.effect.ratio < 0.9
    even = predict(home, capped, windows=[window(imbalance=1.0, **prompts)], signals=SIGNALS, slo=SLO)
    assert even is not None
    assert even.effect.ratio == 1.0


def test_the_same_windows_foresee_the_same() -> None:
    made = [predict(setting(), setting("1.5"), windows=[window()], signals=SIGNALS, slo=SLO) for _ in range(2)]
    assert made[0] == made[1]


UNKNOWN = [
    pytest.param([], id="no window"),
    pytest.param([window(decode_step_s=None)], id="no passes counted"),
    pytest.param([window(prompt_tokens=None)], id="no lengths"),
    pytest.param([window(requests_per_s=0.0)], id="no traffic"),
    pytest.param([window(spill_share=1.0)], id="all of it spilled"),
]


@pytest.mark.parametrize("windows", UNKNOWN)
def test_what_cannot_be_simulated_is_not_foreseen(windows: list[Measurement]) -> None:
    assert predict(setting(), setting("1.5"), windows=windows, signals=SIGNALS, slo=SLO) is None


def test_a_steps_slope_is_learned_where_batches_differed() -> None:
    apart = [window(decode_batch=size, decode_step_s=0.01 + 0.0005 * size) for size in (4.0, 8.0, 16.0)]
    assert step_slope(apart) == pytest.approx(0.0005)
    assert step_slope([window()] * 5) == 0.0
    falling = [window(decode_batch=size, decode_step_s=0.02 - 0.0005 * size) for size in (4.0, 8.0, 16.0)]
    assert step_slope(falling) == 0.0
