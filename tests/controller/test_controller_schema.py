"""Schema suite: every leaf of the CRD is changed, to values that are valid and to ones that are not."""

from __future__ import annotations

import pytest

from tests.controller.leaves import leaves
from tests.controller.mutations import mutations
from tests.controller.schema_oracles import SILENT, UNHEEDED, faults_of

PATHS = [leaf.path for leaf in leaves()]
OPERATIONS = 400
"""Fewest changes of one run of the whole suite."""
SHORT = (
    *("engine.kind", "engine.extraArgs", "engine.maxBatchedTokens", "experts.redundant", "replicas.min"),
    *("fallback.targets[].region", "gateway.exposure.kind", "podTemplate.env[].name", "suspend"),
)
"""Leaves of each class and form, for every run of the tests."""


@pytest.mark.parametrize("path", SHORT)
def test_a_change_leads_where_a_fresh_start_does(path: str) -> None:
    assert list(faults_of(path)) == []


@pytest.mark.faults
@pytest.mark.parametrize("path", [path for path in PATHS if path not in SHORT])
def test_each_change_leads_where_a_fresh_start_does(path: str) -> None:
    assert list(faults_of(path)) == []


@pytest.mark.faults
def test_every_leaf_is_changed_twice_and_refused_once() -> None:
    tried = [mutations(leaf) for leaf in leaves()]
    # The way back to where it began is a change as well.
    assert [one.leaf.path for one in tried if len(one.good) + 1 < 2 or not one.bad] == []
    assert sum(len(one.good) + 1 + len(one.bad) for one in tried) >= OPERATIONS


def test_no_exception_is_stale() -> None:
    for listed in (*SILENT, *UNHEEDED):
        assert any(path.startswith(listed) for path in PATHS), f"{listed} is the beginning of no leaf"
