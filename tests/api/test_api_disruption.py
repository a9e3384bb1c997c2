"""What a change costs: each changed field once, with the class that its declaration names."""

from __future__ import annotations

from typing import Any

import pytest

from moe_api.disruption import Change, Disruption, classify, worst
from moe_api.load import load_object
from moe_api.resource import MoEDeployment

HOT, ROLLING, REVISION = Disruption.HOT, Disruption.ROLLING, Disruption.REVISION
GPT = {"name": "gpt", "provider": "openai", "model": "gpt-5.5", "secretRef": {"name": "s", "key": "k"}}
CLAUDE = {**GPT, "name": "claude", "provider": "anthropic"}


def _resource(**spec: Any) -> MoEDeployment:
    base = {"model": {"id": "m"}, "hardware": {"accelerator": "cpu", "gpusPerReplica": 2}}
    return load_object(
        {
            "apiVersion": "moestack.dev/v1alpha1",
            "kind": "MoEDeployment",
            "metadata": {"name": "m"},
            "spec": {**base, **spec},
        }
    )


def _fallback(*targets: dict[str, Any]) -> dict[str, Any]:
    return {"fallback": {"targets": list(targets), "budget": {"usdPerDay": 5}}}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[str, Any, Any, Disruption]]]] = {
    "nothing": ({}, {}, []),
    "the same value in another form": ({"quality": {"maxLostGateMass": "0.020"}}, {}, []),
    "an SLO": ({}, {"slo": {"ttftP95": "1s"}}, [("spec.slo.ttftP95", "2s", "1s", HOT)]),
    "γ from unset": (
        {"experts": {"overflow": "Reroute"}},
        {"experts": {"overflow": "Reroute", "capacityFactor": {"prefill": "1.5"}}},
        [("spec.experts.capacityFactor.prefill", None, "1.5", HOT)],
    ),
    "redundant experts": ({}, {"experts": {"redundant": 4}}, [("spec.experts.redundant", 0, 4, ROLLING)]),
    "an engine argument": (
        {"engine": {"extraArgs": {"seed": "1"}}},
        {"engine": {"extraArgs": {"seed": "2"}}},
        [("spec.engine.extraArgs", {"seed": "1"}, {"seed": "2"}, ROLLING)],
    ),
    "the model": ({}, {"model": {"id": "other"}}, [("spec.model.id", "m", "other", REVISION)]),
    "a ceiling raised": (
        {"engine": {"maxActiveSeqs": 8}},
        {"engine": {"maxActiveSeqs": 9}},
        [("spec.engine.maxActiveSeqs", 8, 9, REVISION)],
    ),
    "a ceiling lowered": (
        {"engine": {"maxActiveSeqs": 9}},
        {"engine": {"maxActiveSeqs": 8}},
        [("spec.engine.maxActiveSeqs", 9, 8, HOT)],
    ),
    "a ceiling unset": (
        {"engine": {"maxActiveSeqs": 9}},
        {},
        [("spec.engine.maxActiveSeqs", 9, None, REVISION)],
    ),
    "a longer context": (
        {"engine": {"maxModelLen": 9}},
        {"engine": {"maxModelLen": 8}},
        [("spec.engine.maxModelLen", 9, 8, REVISION)],
    ),
    "a target added": (
        _fallback(GPT),
        _fallback(GPT, CLAUDE),
        [
            (
                "spec.fallback.targets[claude]",
                None,
                {**CLAUDE, "zeroRetention": False, "price": {}, "limits": {}},
                HOT,
            )
        ],
    ),
    "a field of one target": (
        _fallback(GPT, CLAUDE),
        _fallback(GPT, {**CLAUDE, "model": "opus"}),
        [("spec.fallback.targets[claude].model", "gpt-5.5", "opus", HOT)],
    ),
    "a key of the gateway's": (
        _fallback(GPT),
        _fallback({**GPT, "secretRef": {"name": "t", "key": "k"}}),
        [("spec.fallback.targets[gpt].secretRef.name", "s", "t", HOT)],
    ),
    "a key of the engine's": (
        {},
        {"model": {"id": "m", "tokenSecretRef": {"name": "s", "key": "k"}}},
        [("spec.model.tokenSecretRef", None, {"name": "s", "key": "k"}, REVISION)],
    ),
    "targets in another order": (
        _fallback(GPT, CLAUDE),
        _fallback(CLAUDE, GPT),
        [("spec.fallback.targets", ["gpt", "claude"], ["claude", "gpt"], HOT)],
    ),
    "a toleration": (
        {},
        {"podTemplate": {"tolerations": [{"operator": "Exists"}]}},
        [("spec.podTemplate.tolerations", [], [{"operator": "Exists"}], REVISION)],
    ),
    "a spread keyed in camel case": (
        {"podTemplate": {"topologySpread": [{"topologyKey": "zone"}]}},
        {"podTemplate": {"topologySpread": [{"topologyKey": "zone", "maxSkew": 2}]}},
        [("spec.podTemplate.topologySpread[zone].maxSkew", 1, 2, REVISION)],
    ),
    "a flag": ({}, {"tuning": {"paused": True}}, [("spec.tuning.paused", False, True, HOT)]),
    "two fields": (
        {},
        {"replicas": {"min": 2}, "hardware": {"accelerator": "nvidia-h100", "gpusPerReplica": 2}},
        [("spec.hardware.accelerator", "cpu", "nvidia-h100", REVISION), ("spec.replicas.min", 1, 2, HOT)],
    ),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_changes_and_their_class(case: str) -> None:
    old, new, wanted = CASES[case]
    assert classify(_resource(**old), _resource(**new)) == [Change(*change) for change in wanted]


def test_the_worst_of_several() -> None:
    changes = classify(_resource(), _resource(slo={"ttftP95": "1s"}, experts={"redundant": 2}))
    assert (worst(changes), worst([])) == (ROLLING, None)


def test_a_change_reads_as_one_line() -> None:
    (change,) = classify(_resource(engine={"maxActiveSeqs": 8}), _resource())
    assert str(change) == "spec.engine.maxActiveSeqs: 8 → unset (revision)"
