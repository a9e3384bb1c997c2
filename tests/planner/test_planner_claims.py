"""docs/claims.md says what the code computes, and the claims are judged as others saw them end."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from moe_planner import claims
from moe_planner.catalog import packaged

ROOT = Path(__file__).parents[2]


@cache
def judged() -> dict[tuple[str, str, int, str], claims.Judged]:
    return {
        (claim.title, at.accelerator.name, at.gpus, at.precision.name): at
        for claim in claims.CLAIMS
        for at in claims.judge(claim, packaged())
    }


def test_the_document_says_what_the_code_computes() -> None:
    """`python -m moe_planner.claims --write docs/claims.md` writes it anew."""
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == claims.render()


PRO, R1 = "DeepSeek V4-Pro in FP8 on 8×H100 or 8×H200", "DeepSeek R1 on 8×H200"
QWEN, BIG, SMALL = "Qwen3-235B on 4×H100", "Mixtral 8x22B on 2×H100 or 1×H200", "Mixtral 8x7B in 24 GB"
# (claim, accelerator, GPUs, form) and the least and most GB that each GPU lacks; 0 where it fits.
VERDICTS: dict[str, tuple[tuple[str, str, int, str], tuple[float, float]]] = {
    "V4-Pro in FP8 does not fit 8×H100": ((PRO, "nvidia-h100", 8, "fp8"), (120, 140)),
    "nor 8×H200": ((PRO, "nvidia-h200", 8, "fp8"), (60, 80)),
    "its own checkpoint does not fit 8×H100 (recipes PR 779)": ((PRO, "nvidia-h100", 8, "mxfp4-fp8"), (30, 45)),
    "and fits 8×H200 (vllm-project/recipes)": ((PRO, "nvidia-h200", 8, "mxfp4-fp8"), (0, 0)),
    "R1 fits 8×H200 (docs.sglang.io)": ((R1, "nvidia-h200", 8, "fp8"), (0, 0)),
    "and not 8×H100 (docs.sglang.io)": ((R1, "nvidia-h100", 8, "fp8"), (1, 30)),
    "in NVFP4 it fits 4×B200 (docs.sglang.io)": ((R1, "nvidia-b200", 4, "nvfp4"), (0, 0)),
    "Qwen3-235B in FP8 fits 4×H100 (gpustack)": ((QWEN, "nvidia-h100", 4, "fp8"), (0, 0)),
    "in BF16, 470 GB, it does not": ((QWEN, "nvidia-h100", 4, "bf16"), (40, 60)),
    "Mixtral 8x22B in BF16 fits neither": ((BIG, "nvidia-h200", 1, "bf16"), (140, 180)),
    "in 4 bits it fits 2×H100": ((BIG, "nvidia-h100", 2, "awq"), (0, 0)),
    "and 1×H200": ((BIG, "nvidia-h200", 1, "awq"), (0, 0)),
    "Mixtral 8x7B in 4 bits does not fit 24 GB": ((SMALL, "nvidia-rtx-4090", 1, "awq"), (1, 10)),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str) -> None:
    which, (least, most) = VERDICTS[name]
    at = judged()[which]
    assert at.fits is (most == 0)
    assert least <= at.choice.missing / 1e9 <= most
    assert at.fits or at.would


def test_a_refusal_names_the_nearest_that_fits() -> None:
    assert judged()[(PRO, "nvidia-h100", 8, "fp8")].would[0] == "32 × nvidia-h100"
    assert judged()[(PRO, "nvidia-h200", 8, "fp8")].would[:2] == ("its own checkpoint (mxfp4-fp8)", "16 × nvidia-h200")


def test_the_command_writes_the_file(tmp_path: Path) -> None:
    assert claims.main(["--write", str(tmp_path / "claims.md")]) == 0
    assert (tmp_path / "claims.md").read_text(encoding="utf-8") == claims.render()
