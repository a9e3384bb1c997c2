"""What serveConfigV2 names is what the builder makes: import path, arguments, and the name of its deployment."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType
from typing import Any

import pytest

from moe_core import process_config
from moe_core.addresses import BOARD_PORT
from moe_core.config import ServingConfig
from moe_kube import objects as k
from moe_serving import board, builder
from tests.render.cases import CASES, Case, example, put


class FakeRay:
    """Modules in the place of Ray's, which remember how the application was built."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.llm_config: dict[str, Any] = {}
        self.built: dict[str, Any] = {}
        self.boards: list[ServingConfig] = []
        serve, llm, server = ModuleType("ray.serve"), ModuleType("ray.serve.llm"), ModuleType("moe_serving.server")
        ray = ModuleType("ray")
        vars(ray)["serve"] = serve
        vars(serve)["ingress"] = lambda: lambda cls: cls
        vars(llm)["LLMConfig"] = self._config
        vars(llm)["build_llm_deployment"] = self._build
        for name in ("MoEServer", "MoEGangServer"):
            vars(server)[name] = type(name, (), {})
        for name, module in {"ray": ray, "ray.serve": serve, "ray.serve.llm": llm}.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "moe_serving.server", server)
        monkeypatch.setattr(board, "ensure", self.boards.append)

    def _config(self, **given: Any) -> str:
        self.llm_config = given
        return "llm-config"

    def _build(self, llm_config: str, **given: Any) -> str:
        self.built = {"llm_config": llm_config, **given}
        return "application"


def application(case: Case) -> dict[str, Any]:
    (service,) = (made for made in case.render() if made.ref.kind == k.RAY_SERVICE)
    (found,) = json.loads(service.body["spec"]["serveConfigV2"])["applications"]
    assert isinstance(found, dict)
    return found


SERVED = ["laptop", "full-servable", "two-nodes", "cpu", "scale-from-zero", "data-parallel", "data-parallel-nodes"]


@pytest.mark.parametrize("name", SERVED)
def test_the_application_is_built_from_what_is_rendered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, rendered = FakeRay(monkeypatch), application(CASES[name])
    module, _, function = rendered["import_path"].partition(":")
    build = getattr(importlib.import_module(module), function)
    assert build is builder.build_app
    assert build(rendered["args"]) == "application"
    (options,) = rendered["deployments"]
    assert ray.built["override_serve_options"] == {"name": options["name"]}, "bounds must reach the deployment"
    bounds = ray.llm_config["deployment_config"]["autoscaling_config"]
    assert bounds.keys() == options["autoscaling_config"].keys(), "what serveConfigV2 says replaces all of it"
    gang = rendered["args"]["dataParallel"]
    assert ray.built["deployment_cls"].__name__ == ("MoEServer" if gang == 1 else "MoEGangServer")
    # Ray's gang server multiplies the builder's bounds by itself, and takes those of serveConfigV2 as they are.
    asked = options["autoscaling_config"]
    wanted = CASES[name].bounds
    assert (asked["min_replicas"], asked["max_replicas"]) == (wanted.min * gang, wanted.max * gang)
    (at_board,) = ray.boards
    assert (at_board.board_host, at_board.board_port) == ("0.0.0.0", BOARD_PORT)
    assert at_board.revision == CASES[name].revision


def test_no_board_is_made_where_it_has_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(monkeypatch)
    builder.build_app({"deployment": "default/m", "model": "m", "source": "m"})
    assert ray.boards == []


@pytest.mark.parametrize(
    ("accelerator", "kind"), [("cpu", "cpu"), ("nvidia-rtx-4090", "gpu"), ("amd-mi300x", "gpu"), ("tpu-v6e", "tpu")]
)
def test_ray_is_told_the_kind_of_accelerator(accelerator: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(monkeypatch)
    builder.build_app({"deployment": "d/m", "model": "m", "source": "m", "accelerator": accelerator})
    assert ray.llm_config["accelerator_config"] == {"kind": kind}
    assert "accelerator_type" not in ray.llm_config, "Ray knows few types by name, and all workers are alike"


SOURCES = {
    None: "Qwen/Qwen3-235B-A22B-FP8",
    "hf://org/m": "org/m",
    "/models/m": "/models/m",
    "file:///models/m": "/models/m",
    "pvc://claim/a/b": "/var/lib/moestack/claims/claim/a/b",
    "s3://bucket/m": {"bucket_uri": "s3://bucket/m"},
    "gs://bucket/m": {"bucket_uri": "gs://bucket/m"},
}


@pytest.mark.parametrize(("source", "expected"), SOURCES.items())
def test_a_checkpoint_is_named_as_its_loader_takes_it(
    source: str | None, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(monkeypatch)
    builder.build_app(application(example("laptop", *([put("model.source", source)] if source else [])))["args"])
    assert ray.llm_config["model_loading_config"]["model_source"] == expected


def test_a_commit_of_a_repository_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(monkeypatch)
    for source, expected in {"org/m": "3f1a9c0", "s3://bucket/m": None}.items():
        case = example("laptop", put("model.source", source), put("model.revision", "3f1a9c0"))
        builder.build_app(application(case)["args"])
        kwargs = ray.llm_config["engine_kwargs"]
        assert (kwargs.get("revision"), kwargs.get("tokenizer_revision")) == (expected, expected)


@pytest.mark.parametrize(
    "asked", [{"pipeline_parallel": 2}, {"data_parallel": 2, "expert_parallel": False}], ids=["pipeline", "slices"]
)
def test_operator_and_builder_refuse_the_same(asked: dict[str, Any]) -> None:
    config = ServingConfig.model_validate({"deployment": "d/m", "model": "m", "source": "m", **asked})
    (problem,) = process_config.unserved(config)
    with pytest.raises(builder.NotServable) as refused:
        builder.engine_kwargs(config)
    assert str(refused.value) == str(problem)
