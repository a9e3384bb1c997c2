"""What each example renders to, to the byte; and that clusters of an earlier renderer are left as they are."""

from __future__ import annotations

import pytest

from moe_operator.record import RevisionRecord
from moe_operator.render.objects import NotRenderable
from tests.render.cases import CASES, GOLDEN, Case, Released, golden, released

REMEDY = "if that is meant, run `make golden`, read the difference, and raise RENDERER_VERSION where a revision changed"


@pytest.mark.parametrize("name", CASES)
def test_a_case_renders_to_its_golden_file(name: str) -> None:
    assert golden(CASES[name]) == (GOLDEN / f"{name}.yaml").read_text(), REMEDY


def test_there_is_a_golden_file_for_each_case_and_no_other() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize("kept", released(), ids=lambda kept: "-".join(kept.folder.parts[-2:]))
def test_a_released_record_still_renders_to_the_same_bytes(kept: Released) -> None:
    assert kept.rendered() == kept.expected, "a running cluster would be changed: render it as it was born"


@pytest.mark.parametrize("kept", released(), ids=lambda kept: "-".join(kept.folder.parts[-2:]))
def test_a_released_record_is_read_and_written_without_a_loss(kept: Released) -> None:
    record = kept.record
    assert RevisionRecord.model_validate(record.to_json()) == record


def pinned() -> list[Case]:
    found = []
    for case in CASES.values():
        try:
            found.append(case if case.runs and case.record() else None)
        except (NotRenderable, AssertionError):
            continue
    return [case for case in found if case is not None]


def test_a_record_fits_into_an_object() -> None:
    """The API server takes 1.5 MiB; a record must stay far below, or a long spec could not be pinned."""
    assert pinned()
    assert all(len(case.record().model_dump_json()) < 64 * 1024 for case in pinned())
