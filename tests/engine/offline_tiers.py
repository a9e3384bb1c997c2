"""One prompt asked again and again across tiers, γ and client salts, with the prefix cache on; for offline.py."""

from __future__ import annotations

import itertools
import random
from typing import Any

PROMPT_TOKENS, BLOCK, STEP_TOKENS = 400, 128, 256
WHOLE = PROMPT_TOKENS // BLOCK * BLOCK
TIERS = {"gold": 2, "batch": 1}
UNLIMITED = {"overflow": "Unlimited", "perToken": TIERS}
TIGHT = {"overflow": "Reroute", "capacityFactorPrefill": "1", "perToken": TIERS}
WIDE = {**TIGHT, "capacityFactorPrefill": "2"}
MORE = {**UNLIMITED, "perToken": {"gold": 3, "batch": 1}}

ASKED: list[tuple[str, dict[str, Any], str | None, str | None, int]] = [
    ("first", UNLIMITED, None, None, 0),
    ("again", UNLIMITED, None, None, WHOLE),
    ("another tier", UNLIMITED, "gold", None, 0),
    ("that tier again", UNLIMITED, "gold", None, WHOLE),
    ("a third tier", UNLIMITED, "batch", None, 0),
    ("capped", TIGHT, None, None, 0),
    ("capped again", TIGHT, None, None, WHOLE),
    ("capped, a tier", TIGHT, "gold", None, 0),
    ("another γ", WIDE, None, None, 0),
    ("the γ of before", TIGHT, None, None, WHOLE),
    ("and its tier", TIGHT, "gold", None, WHOLE),
    ("unlimited once more", UNLIMITED, None, None, WHOLE),
    ("and its tier gold", UNLIMITED, "gold", None, WHOLE),
    ("another k of the tier", MORE, "gold", None, 0),
    ("a k that is not its own changed", MORE, "batch", None, WHOLE),
    ("a client's salt", UNLIMITED, None, "of-a-client", 0),
    ("that salt again", UNLIMITED, None, "of-a-client", WHOLE),
    ("that salt, capped", TIGHT, None, "of-a-client", 0),
]
"""(name, knobs in force, tier, the client's salt, prompt tokens that the cache must give)."""

STRADDLED: list[tuple[str, dict[str, Any], int]] = [
    ("under the knobs that it began with", UNLIMITED, STEP_TOKENS),
    ("under those that it ended with", TIGHT, 0),
]
"""What the cache gives of a prompt whose prefill straddled a switch: (name, knobs, prompt tokens)."""

RESUMED_TOKENS = 40
"""Prompt tokens of the request that is interrupted."""

MIXED = ("gold", None, "batch", "unheard-of")
"""Tiers of the requests that run in one batch."""


def play(llm: Any, version: int, record_path: str) -> dict[str, Any]:
    """Ask everything, on an engine in this process whose newest knobs are of an older version."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    versions = itertools.count(version)
    rng = random.Random(7)
    prompts = [[rng.randrange(16, 240) for _ in range(PROMPT_TOKENS)] for _ in range(2)]

    def put(knobs: dict[str, Any]) -> None:
        from moe_core.wire import ExpertKnobs

        payload = ExpertKnobs.model_validate(knobs).model_dump_json(by_alias=True)
        answers = llm.collective_rpc("moestack_apply", args=(payload, next(versions)))
        assert [answer["error"] for answer in answers] == [None] * len(answers), answers

    def params(tier: str | None) -> Any:
        arguments = None if tier is None else {"moestack_tier": tier}
        return SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1, extra_args=arguments)

    def ask(prompt: list[int], tier: str | None = None, salt: str | None = None) -> dict[str, Any]:
        given = TokensPrompt(prompt_token_ids=prompt)
        if salt is not None:
            given["cache_salt"] = salt
        output = llm.generate([given], params(tier), use_tqdm=False)[0]
        text = output.outputs[0]
        return {
            "cached": output.num_cached_tokens,
            "tokens": list(text.token_ids),
            "logprob": text.cumulative_logprob,
        }

    result: dict[str, Any] = {"asked": {}, "straddled": {}}
    for name, knobs, tier, salt, _ in ASKED:
        put(knobs)
        result["asked"][name] = ask(prompts[0], tier, salt)

    put(UNLIMITED)
    engine = llm.llm_engine
    engine.add_request("straddles", TokensPrompt(prompt_token_ids=prompts[1]), params(None))
    engine.step()
    put(TIGHT)
    while engine.has_unfinished_requests():
        engine.step()
    for name, knobs, _ in STRADDLED:
        put(knobs)
        result["straddled"][name] = ask(prompts[1])

    put(UNLIMITED)
    llm.collective_rpc("moestack_record", args=(100_000,))
    short = [TokensPrompt(prompt_token_ids=prompts[1][at : at + 5 + at]) for at in range(len(MIXED))]
    llm.generate(short, [params(tier) for tier in MIXED], use_tqdm=False)
    llm.collective_rpc("moestack_record", args=(0, record_path))

    def routed() -> tuple[int, int]:
        layer = llm.collective_rpc("moestack_read", args=(False,))[0]["layers"][0]
        return layer["tokens"], sum(layer["demand"])

    def interrupted(after_steps: int | None) -> dict[str, Any]:
        """A request of a tier that is pushed out of the KV cache once, and resumed."""
        before = routed()
        engine.add_request(
            f"until {after_steps}", TokensPrompt(prompt_token_ids=prompts[1][:RESUMED_TOKENS]), params("gold")
        )
        for step in itertools.count(1):
            outputs = engine.step()
            if step == after_steps:
                engine.reset_prefix_cache(reset_running_requests=True)
            if not engine.has_unfinished_requests():
                break
        tokens, slots = (now - was for now, was in zip(routed(), before, strict=True))
        (text,) = outputs[-1].outputs
        return {
            "tokens": list(text.token_ids),
            "logprob": text.cumulative_logprob,
            "routed": tokens,
            "slots": slots,
        }

    result["resumed"] = [interrupted(None), interrupted(3)]
    return result
