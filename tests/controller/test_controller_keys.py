"""What an installation runs beside the operator: keys that are made once, and a look for what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_core.config import OperatorConfig
from moe_core.signing import Signer, Verifier
from moe_core.wire import Weights
from moe_kube import objects as k
from moe_kube.fake import FakeCluster
from moe_kube.objects import Kind, Ref
from moe_operator import chart, keys, prerequisites
from moe_operator.__main__ import ConfigRefused, load_config

ROOT = Path(__file__).parents[2]
EVERY = tuple(need.kind for need in prerequisites.needs(monitoring=True))


async def test_keys_are_made_once_and_sign_for_each_other(tmp_path: Path) -> None:
    cluster = FakeCluster(kinds=(k.SECRET,))
    assert await keys.ensure(cluster.client(), "moestack-system", "keys")
    first = cluster.get(Ref(k.SECRET, "moestack-system", "keys"))["stringData"]
    assert not await keys.ensure(cluster.client(), "moestack-system", "keys")
    assert cluster.get(Ref(k.SECRET, "moestack-system", "keys"))["stringData"] == first

    command = Weights.model_validate({"version": 1, "deployment": "a/b", "percent": {"r": 100}})
    for signer in keys.SIGNERS:
        (tmp_path / signer).write_text(first[f"{signer}.key"])
        Verifier([first[f"{signer}.pub"]]).open(Signer.load(tmp_path / signer).sign(command), Weights)
    assert first["operator.key"] != first["tuner.key"]


def test_a_key_of_the_cluster_is_trusted_like_one_that_is_written_down(tmp_path: Path) -> None:
    made, named = Signer.generate().public_pem(), Signer.generate().public_pem()
    (tmp_path / "made.pub").write_text(made)
    path = tmp_path / "operator.json"
    path.write_text(json.dumps({"trustedKeys": [named], "trustedKeyFiles": [str(tmp_path / "made.pub")]}))
    assert load_config(path).trusted_keys == (named, made)


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (lambda _: None, r"trustedKeyFiles\[0\] .*cannot be read"),
    "no key": (lambda path: path.write_text("SECRET text"), r"trustedKeyFiles\[0\] .*no Ed25519 public key"),
    "a private key": (lambda path: Signer.generate().save(path), r"trustedKeyFiles\[0\] .*no Ed25519 public key"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_trusted_key_that_is_none_is_refused_by_field(case: str, tmp_path: Path) -> None:
    make, says = UNFIT[case]
    make(tmp_path / "key")
    path = tmp_path / "operator.json"
    path.write_text(json.dumps({"trustedKeyFiles": [str(tmp_path / "key")]}))
    with pytest.raises(ConfigRefused, match=says) as refused:
        load_config(path)
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize(
    ("absent", "monitoring", "fatal"),
    [
        ((), True, ()),
        ((k.RAY_SERVICE,), False, (k.RAY_SERVICE,)),
        ((k.MOE_DEPLOYMENT,), False, (k.MOE_DEPLOYMENT,)),
        ((k.POD_MONITOR, k.PROMETHEUS_RULE, k.HTTP_ROUTE), False, ()),
        ((k.POD_MONITOR, k.HTTP_ROUTE), True, (k.POD_MONITOR,)),
    ],
)
async def test_what_is_missing_is_named_with_its_remedy(
    absent: tuple[Kind, ...], monitoring: bool, fatal: tuple[Kind, ...]
) -> None:
    api = FakeCluster(kinds=[kind for kind in EVERY if kind not in absent]).client()
    found = await prerequisites.look(api, OperatorConfig(namespaces=("a",)), prerequisites.needs(monitoring))
    assert tuple(one.need.kind for one in found if one.fatal) == fatal
    assert {one.need.kind for one in found if one.fault} == set(absent)
    for one in found:
        assert one.need.kind.api_version in str(one)
        assert not one.fault or one.need.brought_by in str(one)


TUNERS = {"tuner-rules.yaml", "tuner-lease-rules.yaml"}
"""Files of the chart that `moe_tuner.rbac` writes."""


def test_the_charts_files_are_what_the_code_gives(tmp_path: Path) -> None:
    folder = ROOT / "charts" / "moestack" / "files"
    assert chart.main(["--check", str(folder)]) == 0
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == set(chart.files()) | TUNERS
    chart.main(["--write", str(tmp_path)])
    (tmp_path / "rules.yaml").write_text("[]")
    assert chart.main(["--check", str(tmp_path)]) == 1
