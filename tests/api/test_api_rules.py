"""Every rule over one resource: a file that breaks it, and the path, value and remedy that are told for it.

Each case makes one mistake and expects one message. The CEL in the CRD says the same; see test_api_crd.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_api.fields import Rule, SpecModel
from moe_api.load import load_text
from tests.api.documents import file_with as _file
from tests.api.documents import problems_of as _problems

TARGET = "{name: gpt, provider: openai, model: gpt-5.5, secretRef: {name: openai, key: k}}"

BAD = {
    "no model": (_file(drop="model"), "spec.model", None, "is missing: add it (the checkpoint)"),
    "unknown field": (_file("replica: {min: 1}"), "spec.replica", None, "did you mean replicas?"),
    "unknown field in another case": (_file("slo: {ttft_p95: 1s}"), "spec.slo.ttft_p95", "1s", "did you mean ttftP95?"),
    "unknown field without a neighbour": (_file("slo: {zzz: 1}"), "spec.slo.zzz", "1", "use one of ttftP95, itlP95"),
    "an SLO without a unit": (_file("slo: {ttftP95: 800}"), "spec.slo.ttftP95", "800", "write 800ms or 1.5s"),
    "an SLO of zero": (_file("slo: {itlP95: 0s}"), "spec.slo.itlP95", "0s", "must be from 1ms to 1h"),
    "an SLO in days": (_file("slo: {itlP95: 1d}"), "spec.slo.itlP95", "1d", "not a duration"),
    "replicas crossed": (_file("replicas: {min: 3, max: 2}"), "spec.replicas.max", "2", "at least replicas.min"),
    "nobody to answer": (_file("replicas: {min: 0}"), "spec.replicas.min", "0", "add a fallback target"),
    "bounds crossed": (
        _file("tuning: {bounds: {capacityFactor: {min: 3, max: 2}}}"),
        "spec.tuning.bounds.capacityFactor.max",
        "2",
        "must be at least min",
    ),
    "bounds above the ceiling": (
        _file("engine: {maxActiveSeqs: 64}", "tuning: {bounds: {maxActiveSeqs: {max: 65}}}"),
        "spec.tuning.bounds.maxActiveSeqs.max",
        "65",
        "must be at most engine.maxActiveSeqs",
    ),
    "a pin outside its bounds": (
        _file('tuning: {pins: {capacityFactorPrefill: "4.5"}}'),
        "spec.tuning.pins.capacityFactorPrefill",
        "4.5",
        "must lie within tuning.bounds.capacityFactor",
    ),
    "a pinned policy that is not allowed": (
        _file("tuning: {pins: {overflow: Drop}}"),
        "spec.tuning.pins.overflow",
        "Drop",
        "must be one of tuning.bounds.overflow",
    ),
    "γ as a float": (
        _file("experts: {overflow: Drop, capacityFactor: {prefill: 1.25}}"),
        "spec.experts.capacityFactor.prefill",
        "1.25",
        'write it in quotes, "1.25"',
    ),
    "γ of zero": (
        _file('experts: {overflow: Drop, capacityFactor: {prefill: "0"}}'),
        "spec.experts.capacityFactor.prefill",
        "0",
        "must be above 0",
    ),
    "γ with nothing to hold it": (
        _file('experts: {capacityFactor: {prefill: "1.5"}}'),
        "spec.experts.overflow",
        None,
        "set Reroute, Drop or ExpertChoice",
    ),
    "k below the quality of its tier": (
        _file(
            "tiers: [{name: gold, expertsPerToken: 4}]",
            "quality: {minExpertsPerToken: 2, tiers: [{name: gold, minExpertsPerToken: 6}]}",
        ),
        "spec.tiers",
        None,
        "at least minExpertsPerToken",
    ),
    "k below quality": (
        _file("experts: {perToken: 2}", "quality: {minExpertsPerToken: 4}"),
        "spec.experts.perToken",
        "2",
        "must be at least quality.minExpertsPerToken",
    ),
    "quality of a tier that is not there": (
        _file("quality: {tiers: [{name: gold}]}"),
        "spec.quality.tiers",
        None,
        "must each be a tier of spec.tiers",
    ),
    "a share above one": (_file('quality: {maxLostGateMass: "1.5"}'), "spec.quality.maxLostGateMass", "1.5", "to 1"),
    "a tenant in two tiers": (
        _file("tiers: [{name: a, tenants: [x]}, {name: b, tenants: [x]}]"),
        "spec.tiers",
        None,
        "one tenant in two tiers",
    ),
    "a tier twice": (_file("tiers: [{name: a}, {name: a}]"), "spec.tiers", None, "name a is there twice"),
    "no hardware": (_file(drop="hardware"), "spec.hardware", None, "name the accelerator"),
    "a wrong product": (
        _file("parallelism: {tensor: 2, data: 2, pipeline: 1}"),
        "spec.parallelism",
        None,
        "tensor × data × pipeline must be hardware.gpusPerReplica",
    ),
    "a size that divides nothing": (_file("parallelism: {tensor: 3}"), "spec.parallelism", None, "chosen to fit"),
    "a wrong expert size": (
        _file("parallelism: {tensor: 2, data: 1, expert: 4}"),
        "spec.parallelism.expert",
        "4",
        "must be tensor × data, or 1",
    ),
    "external without url": (_file("engine: {kind: External}", drop="hardware"), "spec.engine.url", None, "is needed"),
    "external with hardware": (
        _file("engine: {kind: External, url: http://e:1/v1}"),
        "spec.hardware",
        None,
        "has no effect on an external engine",
    ),
    "a url on our own engine": (_file("engine: {url: http://e:1/v1}"), "spec.engine.url", "http://e:1/v1", "External"),
    "credentials in a url": (
        _file("engine: {kind: External, url: 'http://user:pw@e/v1'}", drop="hardware"),
        "spec.engine.url",
        None,
        "without credentials",
    ),
    "foreign code": (
        _file('engine: {extraArgs: {trust-remote-code: "true"}}'),
        "spec.engine.extraArgs.trust-remote-code",
        "true",
        "can run code from outside the image",
    ),
    "an argument with a field of its own": (
        _file('engine: {extraArgs: {max-num-seqs: "3"}}'),
        "spec.engine.extraArgs.max-num-seqs",
        "3",
        "set spec.engine.maxActiveSeqs",
    ),
    "an argument in the wrong form": (
        _file('engine: {extraArgs: {enforce-eager: "yes"}}'),
        "spec.engine.extraArgs.enforce-eager",
        "yes",
        '"true" or "false"',
    ),
    "a starved step": (
        _file("engine: {maxActiveSeqs: 64, maxBatchedTokens: 32}"),
        "spec.engine.maxBatchedTokens",
        "32",
        "must be at least maxActiveSeqs",
    ),
    "targets without a budget": (
        _file(f"fallback: {{targets: [{TARGET}]}}"),
        "spec.fallback.budget.usdPerDay",
        None,
        "set a bound on what they may cost",
    ),
    "money as a float": (
        _file("fallback: {budget: {usdPerDay: 12.5}}"),
        "spec.fallback.budget.usdPerDay",
        "12.5",
        'write it in quotes, "12.5"',
    ),
    "no target may be used": (
        _file(
            f"fallback: {{targets: [{TARGET}], budget: {{usdPerDay: 1}}, dataPolicy: {{egress: ZeroRetentionOnly}}}}"
        ),
        "spec.fallback.dataPolicy.egress",
        "ZeroRetentionOnly",
        "leaves no target",
    ),
    "a target without a key": (
        _file("fallback: {targets: [{name: a, provider: anthropic, model: m}], budget: {usdPerDay: 1}}"),
        "spec.fallback.targets[0].secretRef",
        None,
        "name and key of the Secret",
    ),
    "a bridge to nowhere": (_file("upgrade: {strategy: Bridge}"), "spec.upgrade.strategy", "Bridge", "fallback target"),
    "steps that fall": (_file("upgrade: {steps: [50, 25, 100]}"), "spec.upgrade.steps", None, "must rise"),
    "Off without quotes": (_file("tuning: {mode: Off}"), "spec.tuning.mode", "false", 'write "Off"'),
    "a word in another case": (_file("tuning: {mode: auto}"), "spec.tuning.mode", "auto", "did you mean Auto?"),
    "a count as text": (_file('replicas: {min: "2"}'), "spec.replicas.min", "2", "write it without quotes"),
    "a count with a fraction": (_file("replicas: {min: 1.5}"), "spec.replicas.min", "1.5", "whole number"),
    "text as a number": (_file("model: {id: 5}", drop="model"), "spec.model.id", "5", 'in quotes, "5"'),
    "a flag as text": (_file('suspend: "yes"'), "spec.suspend", "yes", "must be true or false"),
    "a list for a group": (_file("slo: [1]"), "spec.slo", None, "must be a mapping with ttftP95, itlP95"),
    "a group for a list": (_file("tiers: {name: a}"), "spec.tiers", None, "must be a list"),
    "a secret in the open": (
        _file("podTemplate: {env: [{name: HF_TOKEN, value: abc}]}"),
        "spec.podTemplate.env[0].name",
        "HF_TOKEN",
        "use secretRef",
    ),
    "a variable that runs code": (
        _file("podTemplate: {env: [{name: LD_PRELOAD, value: /x}]}"),
        "spec.podTemplate.env[0].name",
        "LD_PRELOAD",
        "runs code",
    ),
    "a gateway open to the world": (
        _file("gateway: {exposure: {kind: LoadBalancer}}"),
        "spec.gateway.auth.mode",
        None,
        "must be APIKeys or OIDC",
    ),
    "a store for one host": (
        _file("gateway: {budgetStore: {kind: SQLite}}"),
        "spec.gateway.budgetStore.kind",
        "SQLite",
        "serves one host",
    ),
    "a name too long": (_file().replace("name: m}", f"name: {'m' * 37}}}"), "metadata.name", "m" * 37, "at most 36"),
    "a name with capitals": (_file().replace("name: m}", "name: M}"), "metadata.name", "M", "lower-case letters"),
    "another kind": (_file().replace("MoEDeployment", "Deployment"), "kind", "Deployment", "must be MoEDeployment"),
    "another version": (_file().replace("v1alpha1", "v1"), "apiVersion", "moestack.dev/v1", "v1alpha1"),
    "no kind": (_file(drop="kind"), "kind", None, "write kind: MoEDeployment"),
    "a pin of a count outside its bounds": (
        _file("tuning: {bounds: {maxBatchedTokens: {min: 64, max: 128}}, pins: {maxBatchedTokens: 32}}"),
        "spec.tuning.pins.maxBatchedTokens",
        "32",
        "must lie within tuning.bounds.maxBatchedTokens",
    ),
    "a pin of the batch outside its bounds": (
        _file("tuning: {bounds: {maxActiveSeqs: {max: 128}}, pins: {maxActiveSeqs: 129}}"),
        "spec.tuning.pins.maxActiveSeqs",
        "129",
        "must lie within tuning.bounds.maxActiveSeqs",
    ),
    "a pin of γ for decode outside its bounds": (
        _file('tuning: {pins: {capacityFactorDecode: "0.9"}}'),
        "spec.tuning.pins.capacityFactorDecode",
        "0.9",
        "must lie within tuning.bounds.capacityFactor",
    ),
    "a pin of the spill threshold outside its bounds": (
        _file('tuning: {bounds: {missProbability: {max: "0.5"}}, pins: {missProbability: "0.6"}}'),
        "spec.tuning.pins.missProbability",
        "0.6",
        "must lie within tuning.bounds.missProbability",
    ),
    "a pin of the share cap outside its bounds": (
        _file('tuning: {bounds: {shareCap: {min: "0.5"}}, pins: {shareCap: "0.4"}}'),
        "spec.tuning.pins.shareCap",
        "0.4",
        "must lie within tuning.bounds.shareCap",
    ),
    "count bounds crossed": (
        _file("tuning: {bounds: {maxActiveSeqs: {min: 9, max: 8}}}"),
        "spec.tuning.bounds.maxActiveSeqs.max",
        "8",
        "must be at least min",
    ),
    "token bounds above the ceiling": (
        _file("engine: {maxBatchedTokens: 64}", "tuning: {bounds: {maxBatchedTokens: {max: 65}}}"),
        "spec.tuning.bounds.maxBatchedTokens.max",
        "65",
        "must be at most engine.maxBatchedTokens",
    ),
    "no policy to choose": (
        _file("tuning: {bounds: {overflow: []}}"),
        "spec.tuning.bounds.overflow",
        None,
        "must name at least one policy",
    ),
    "a region policy without regions": (
        _file("fallback: {dataPolicy: {egress: Region}}"),
        "spec.fallback.dataPolicy.regions",
        None,
        "name at least one region",
    ),
    "no target in the region": (
        _file(
            f"fallback: {{targets: [{TARGET}], budget: {{usdPerDay: 1}},"
            " dataPolicy: {egress: Region, regions: [eu]}}"
        ),
        "spec.fallback.dataPolicy.regions",
        None,
        "leaves no target",
    ),
    "a month below a day": (
        _file("fallback: {budget: {usdPerDay: 5, usdPerMonth: 4}}"),
        "spec.fallback.budget.usdPerMonth",
        "4",
        "must be at least usdPerDay",
    ),
    "a compatible server without its address": (
        _file("fallback: {targets: [{name: a, provider: openai-compatible, model: m}], budget: {usdPerDay: 1}}"),
        "spec.fallback.targets[0].baseUrl",
        None,
        "is needed for openai-compatible",
    ),
    "a cache without its claim": (
        _file("model: {id: m, cache: {kind: Claim}}", drop="model"),
        "spec.model.cache.claimName",
        None,
        "name a PersistentVolumeClaim",
    ),
    "a cache without its folder": (
        _file("model: {id: m, cache: {kind: NodePath}}", drop="model"),
        "spec.model.cache.path",
        None,
        "name a folder of the node",
    ),
    "an external engine with an image": (
        _file("engine: {kind: External, url: 'http://e:1/v1', image: a/b}", drop="hardware"),
        "spec.engine.image",
        "a/b",
        "has no effect with kind External",
    ),
    "an external engine with arguments": (
        _file("engine: {kind: External, url: 'http://e:1/v1', extraArgs: {seed: '1'}}", drop="hardware"),
        "spec.engine.extraArgs",
        None,
        "has no effect with kind External",
    ),
    "an external engine with capacity": (
        _file("engine: {kind: External, url: 'http://e:1/v1'}", "experts: {overflow: Drop}", drop="hardware"),
        "spec.experts.overflow",
        "Drop",
        "cannot be held on an external engine",
    ),
    "a key on our own engine": (
        _file("engine: {apiKeySecretRef: {name: s, key: k}}"),
        "spec.engine.apiKeySecretRef",
        None,
        "belongs to kind External",
    ),
    "custom metrics without names": (
        _file("engine: {metrics: {dialect: Custom}}"),
        "spec.engine.metrics.names",
        None,
        "map at least one signal",
    ),
    "an ingress without a host": (
        _file("gateway: {auth: {mode: APIKeys, secretName: k}, exposure: {kind: Ingress}}"),
        "spec.gateway.exposure.host",
        None,
        "the host name that clients use",
    ),
    "keys without a Secret": (
        _file("gateway: {auth: {mode: APIKeys}}"),
        "spec.gateway.auth.secretName",
        None,
        "name the Secret",
    ),
    "tokens without an issuer": (
        _file("gateway: {auth: {mode: OIDC, audience: a}}"),
        "spec.gateway.auth.issuer",
        None,
        "the address of the issuer",
    ),
    "tokens without an audience": (
        _file("gateway: {auth: {mode: OIDC, issuer: 'https://i.dev'}}"),
        "spec.gateway.auth.audience",
        None,
        "the audience that a token must carry",
    ),
    "gateway replicas crossed": (
        _file("gateway: {replicas: {min: 3, max: 2}}"),
        "spec.gateway.replicas.max",
        "2",
        "must be at least gateway.replicas.min",
    ),
    "a store without its address": (
        _file("gateway: {budgetStore: {kind: Valkey}}"),
        "spec.gateway.budgetStore.urlSecretRef",
        None,
        "the Secret with its address",
    ),
    "steps that end early": (_file("upgrade: {steps: [50]}"), "spec.upgrade.steps", None, "must end at 100"),
    "a variable with two values": (
        _file("podTemplate: {env: [{name: A, value: b, secretRef: {name: s, key: k}}]}"),
        "spec.podTemplate.env[0].name",
        "A",
        "needs either value or secretRef",
    ),
    "a toleration of nothing": (
        _file("podTemplate: {tolerations: [{value: x}]}"),
        "spec.podTemplate.tolerations[0].key",
        None,
        "is needed with operator Equal",
    ),
    "a toleration with a useless value": (
        _file("podTemplate: {tolerations: [{operator: Exists, value: x}]}"),
        "spec.podTemplate.tolerations[0].value",
        "x",
        "belongs to operator Equal",
    ),
    "a store of Ray's without an address": (
        _file("cluster: {gcsFaultTolerance: {kind: Redis}}"),
        "spec.cluster.gcsFaultTolerance.address",
        None,
        "host:port of the server",
    ),
    "a quantity in words": (
        _file("podTemplate: {sharedMemory: lots}"),
        "spec.podTemplate.sharedMemory",
        "lots",
        "80Gi",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_a_bad_file_names_path_value_and_remedy(case: str) -> None:
    text, path, value, remedy = BAD[case]
    problems = _problems(text)
    assert path in problems, problems
    assert value is None or problems[path][0] == value
    assert remedy in problems[path][1]
    assert len(problems) == 1, f"one mistake, one message: {problems}"


GAMMAS = {
    "experts.capacityFactor.prefill": ('overflow: Drop, capacityFactor: {prefill: "0.2"}', ""),
    "experts.capacityFactor.decode": ('overflow: Drop, capacityFactor: {decode: "0.2"}', ""),
    "tuning.bounds.capacityFactor.min": ("overflow: Drop", 'tuning: {bounds: {capacityFactor: {min: "0.2"}}}'),
}
COUNTS = {
    "experts.perToken": ", perToken: {k}}}",
    "quality.minExpertsPerToken": "}}\n  quality: {{minExpertsPerToken: {k}}}",
    "tiers[].expertsPerToken": "}}\n  tiers: [{{name: a, expertsPerToken: {k}}}]",
    "quality.tiers[].minExpertsPerToken": (
        "}}\n  tiers: [{{name: a}}]\n  quality: {{tiers: [{{name: a, minExpertsPerToken: {k}}}]}}"
    ),
}


def gamma_file(gamma: str, count: str, k: int) -> str:
    """A file with γ = 0.2 in one place and k in another."""
    experts, tuning = GAMMAS[gamma]
    return _file(f"experts: {{{experts}{COUNTS[count].format(k=k)}", *([tuning] if tuning else []))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gamma_times_k_is_at_least_one(gamma: str, count: str) -> None:
    problems = _problems(gamma_file(gamma, count, 4))
    assert list(problems) == [f"spec.{gamma}"]
    assert f"times {count} must be at least 1" in problems[f"spec.{gamma}"][1]
    assert load_text(gamma_file(gamma, count, 5)).metadata.name == "m"


def _rules(kind: type[SpecModel] = SpecModel) -> Iterator[Rule]:
    for model in kind.__subclasses__():
        yield from model.RULES
        yield from _rules(model)


def test_every_rule_of_the_types_is_broken_by_a_case() -> None:
    files = [text for text, *_ in BAD.values()]
    files += [gamma_file(gamma, count, 4) for gamma in GAMMAS for count in COUNTS]
    told = {(f".{path}", remedy) for text in files for path, (_, remedy) in _problems(text).items()}
    untried = [
        rule.cel
        for rule in _rules()
        if not any(path.endswith(rule.field) and remedy == rule.message for path, remedy in told)
    ]
    assert untried == []
