"""Arithmetic of the layer benchmark: what its figures say of passes whose times are known."""

from __future__ import annotations

import pytest

from benchmarks import capacity_device
from benchmarks.capacity_layer import Pass, keys, popularity, prefill_row


def a_pass(experts_s: tuple[float, float], hook_s: float = 0.0, gemm: float = 1.0) -> Pass:
    """Two ranks; one second of router each."""
    gemms = [gemm * seconds for seconds in experts_s]
    return Pass([1.0, 1.0], [hook_s, hook_s], list(experts_s), gemms, [8, 8])


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    seen = a_pass((9.0, 3.0), hook_s=0.5)
    assert (seen.step_s, seen.bare_s) == (10.5, 10.0)
    assert seen.hook_share == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("name", "after_s", "gemm", "over"),
    [
        ("time follows the load", (4.5, 4.5), 1.0, 1.0),
        ("half of the saving is lost", (6.3, 6.3), 1.0, 5.5 / 7.3),
        ("nothing is saved", (9.0, 3.0), 1.0, 0.55),
        ("what is no GEMM is not expected to fall", (4.5, 4.5), 0.8, (10 / 5.5) * (1 - 0.72 + 0.36)),
    ],
)
def test_speedup_over_its_bound(name: str, after_s: tuple[float, float], gemm: float, over: float) -> None:
    passes = {"unlimited": [a_pass((9.0, 3.0), gemm=gemm)] * 3, "Reroute 1": [a_pass(after_s, gemm=gemm)] * 3}
    row = prefill_row("Reroute 1", passes, {"unlimited": [90, 30], "Reroute 1": [45, 45]})
    assert row["load_before_over_after"] == 2.0
    assert row["over_bound"] == pytest.approx(over, abs=1e-4), name


def test_keys_are_the_worst_and_leave_out_loads_that_hardly_fall() -> None:
    def row(over: float, counted: bool, hook: float) -> dict[str, object]:
        return {"over_bound": over, "counted": counted, "hook_share": hook, "gemm_share": 0.9}

    prefill = {
        "zipf_0.8": {"unlimited": {"hook_share": 0.001}, "Reroute 1": row(0.95, True, 0.01)},
        "4:1": {
            "unlimited": {"hook_share": 0.002},
            "Reroute 1": row(0.97, True, 0.02),
            "Reroute 2": row(0.1, False, 0),
        },
    }
    found = keys(prefill)
    assert found["layer_speedup_over_bound"] == 0.95
    assert (found["hook_overhead_count"], found["hook_overhead_reroute"]) == (0.002, 0.02)
    none = keys({"4:1": {"unlimited": {"hook_share": 0.0}, "Reroute 2": row(0.1, False, 0)}})
    assert none["layer_speedup_over_bound"] is None


@pytest.mark.parametrize(("skew", "first_half_over_second"), [("4:1", 4.0), ("zipf_0.8", 4.16)])
def test_skew_lands_on_the_first_of_two_ranks(skew: str, first_half_over_second: float) -> None:
    wanted = popularity(skew, 128)
    assert wanted[:64].sum() / wanted[64:].sum() == pytest.approx(first_half_over_second, rel=0.01)


def test_the_hook_alone_is_timed_under_every_setting() -> None:
    pytest.importorskip("torch")
    found = capacity_device.measure("cpu", (16,), 1, experts=8, k=2)
    assert found["device"] == "cpu"
    assert [row["setting"] for row in found["hook"]] == ["count", "Unlimited", "Reroute", "Drop", "ExpertChoice"]
    assert all(row["eager_us"] > 0 and "graph_us" not in row for row in found["hook"])
