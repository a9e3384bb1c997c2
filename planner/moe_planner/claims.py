"""What articles claim of models and GPUs, judged by this planner's arithmetic: docs/claims.md is written from here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_api.enums import KvCacheDtype, Quantization
from moe_api.load import load_object
from moe_api.spec import MoEDeploymentSpec
from moe_planner import kv, memory, profiles, remedies, weights
from moe_planner.breakeven import output_share
from moe_planner.catalog import GB, Accelerator, Catalog, ModelFacts, Precision, packaged
from moe_planner.choice import Choice, choose
from moe_planner.cost import HOURS_PER_MONTH, MILLION, Tariff
from moe_planner.exchange import ACTIVATION_BYTES, DISPATCH_BYTES
from moe_planner.layouts import Impossible
from moe_planner.memory import Ask


@dataclass(frozen=True)
class Claim:
    """A claim that a model fits some GPUs: on `gpus` of `accelerator`, judged for each form of its weights."""

    title: str
    said: str
    model: str
    places: tuple[tuple[str, int], ...]
    forms: tuple[str, ...]


CLAIMS = (
    Claim(
        "DeepSeek V4-Pro in FP8 on 8×H100 or 8×H200",
        'V4-Pro in FP8, 1.6 TB with 200 GB of KV cache, runs on 8×H100 (640 GB) or on 8×H200 ("768 GB").',
        "deepseek-ai/DeepSeek-V4-Pro",
        (("nvidia-h100", 8), ("nvidia-h200", 8)),
        ("fp8", "mxfp4-fp8"),
    ),
    Claim(
        "DeepSeek R1 on 8×H200",
        "R1 takes about 800 GB in FP8 and runs on 8×H200.",
        "deepseek-ai/DeepSeek-R1",
        (("nvidia-h200", 8), ("nvidia-h100", 8), ("nvidia-b200", 4)),
        ("fp8", "nvfp4"),
    ),
    Claim(
        "Qwen3-235B on 4×H100",
        "Qwen3-235B-A22B runs on 4×H100.",
        "Qwen/Qwen3-235B-A22B-Instruct-2507",
        (("nvidia-h100", 4),),
        ("bf16", "fp8", "awq"),
    ),
    Claim(
        "Mixtral 8x22B on 2×H100 or 1×H200",
        "Mixtral 8x22B runs on 2×H100 or on 1×H200.",
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        (("nvidia-h100", 2), ("nvidia-h200", 1)),
        ("bf16", "fp8", "awq"),
    ),
    Claim(
        "Mixtral 8x7B in 24 GB",
        "Mixtral 8x7B in 4 bits runs on a GPU of 24 GB.",
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        (("nvidia-rtx-4090", 1), ("nvidia-rtx-4090", 2), ("nvidia-l40s", 1)),
        ("awq", "nf4"),
    ),
)
NOTES = {
    "Mixtral 8x7B in 24 GB": "Four bits a parameter alone are {four}; scales and what stays in 16 bits come on top.",
    "DeepSeek R1 on 8×H200": "The checkpoint is {whole}, with the layer that only speculates: 800 GB counts cache too.",
}
"""Words under a claim; `four`: the weights at four bits and nothing else; `whole`: the published checkpoint."""


@dataclass(frozen=True)
class Judged:
    """One form of weights on one set of GPUs."""

    accelerator: Accelerator
    gpus: int
    precision: Precision
    choice: Choice
    would: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.choice.missing == 0


def judge(claim: Claim, catalog: Catalog) -> Iterator[Judged]:
    """Each place and form of a claim. Refused ones carry what would do instead."""
    facts = _model(claim.model, catalog)
    for name, gpus in claim.places:
        for form in claim.forms:
            accelerator, precision = catalog.accelerators[name], catalog.precisions[form]
            ask = Ask(facts, precision, accelerator, fp8_cache=kv.is_fp8(facts, KvCacheDtype.AUTO))
            spec = _spec(claim.model, name, gpus)
            found = choose(spec, ask, catalog, gpus)
            if isinstance(found, Impossible):
                raise AssertionError(f"{claim.title}: {found.why}")
            would = remedies.what_would(spec, ask, catalog, found) if found.missing else []
            yield Judged(accelerator, gpus, precision, found, tuple(would))


def _model(name: str, catalog: Catalog) -> ModelFacts:
    known = catalog.model(name)
    if known is None:
        raise KeyError(name)
    return known[0]


def _spec(model: str, accelerator: str, gpus: int) -> MoEDeploymentSpec:
    return load_object(
        {
            "apiVersion": "moestack.dev/v1alpha1",
            "kind": "MoEDeployment",
            "metadata": {"name": "claim"},
            "spec": {
                "model": {"id": model, "quantization": Quantization.AUTO.value},
                "hardware": {"accelerator": accelerator, "gpusPerReplica": gpus},
            },
        }
    ).spec


def render(catalog: Catalog | None = None) -> str:
    """docs/claims.md as the code computes it now."""
    known = catalog or packaged()
    parts = [
        "# Claims, judged\n",
        "Public articles say which model fits which GPUs. Here is what arithmetic makes of it. This file is written by",
        "`python -m moe_planner.claims --write docs/claims.md`, and a test holds it to what the code computes.\n",
        "GB are 10^9 bytes. Of each GPU vLLM uses 92 % by default; weights, working memory (activations of a step,",
        "CUDA graphs, NCCL and the like) and the cache of one sequence at least must fit in that, on the fullest GPU.",
        "All experts are resident: that only a few are active for a token saves time, not memory.\n",
        *_units(known),
    ]
    for claim in CLAIMS:
        parts += _section(claim, known)
    parts += _contexts(known)
    parts += _experts(known)
    parts += _exchange(known)
    parts += _rent(known)
    parts += _break_evens()
    return "\n".join(parts).rstrip() + "\n"


def _units(catalog: Catalog) -> list[str]:
    rows = ["| GPUs | as articles have it | what the driver reports | usable |", "| --- | --- | --- | --- |"]
    said = {("nvidia-h100", 8): "640 GB", ("nvidia-h200", 8): "768 GB, or 1,128 GB"}
    for (name, gpus), words in said.items():
        total = catalog.accelerators[name].memory_bytes * gpus
        rows.append(f"| {gpus} × {name} | {words} | {_gb(total)} | {_gb(total * catalog.engine.utilization)} |")
    return ["## Units\n", *rows, "", 'An H200\'s "141 GB" are GiB: mixing the units costs 7 %.\n']


def _section(claim: Claim, catalog: Catalog) -> list[str]:
    facts = _model(claim.model, catalog)
    lines = [f"## {claim.title}\n", f"Said: {claim.said}\n"]
    if claim.title in NOTES:
        four = _gb(weights.total_params(facts) / 2)
        lines.append(NOTES[claim.title].format(four=four, whole=_gb((facts.checkpoint_gb or 0.0) * GB)) + "\n")
    lines += [
        "| GPUs | weights as | weights | fullest GPU: weights | working memory | left for cache | longest context |"
        " verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for at in judge(claim, catalog):
        room, own = at.choice.memory, at.precision.name == facts.native
        whole = weights.total_bytes(facts, at.precision)
        place = f"{at.gpus} × {at.accelerator.name}"
        longest = f"{at.choice.context:,}" + (" (capped)" if at.choice.capped else "") if at.fits else "none"
        lacks = f"no: {_gb(at.choice.missing)} a GPU too little"
        cells = [
            place,
            at.precision.name + (" (its checkpoint)" if own else ""),
            _gb(whole),
            f"{_gb(room.weights)} of {_gb(room.total)}",
            _gb(room.activations + room.overhead),
            _gb(max(0.0, room.cache)),
            longest,
            "**yes**" if at.fits else lacks,
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if at.would:
            notes.append(f"- {place}, {at.precision.name}: would do: {'; '.join(at.would)}.")
    return [*lines, "", *notes, *([""] if notes else [])]


def _contexts(catalog: Catalog) -> list[str]:
    """V4-Pro as published: what fits, by context; and what 200 GB of cache would be."""
    facts = _model("deepseek-ai/DeepSeek-V4-Pro", catalog)
    ask = Ask(facts, catalog.precisions[facts.native], catalog.accelerators["nvidia-h200"], fp8_cache=True)
    layout = weights.Layout(8, expert=8)
    rows = memory.contexts(ask, layout, catalog.engine.batched_tokens[-1], catalog.engine)
    one = kv.sequence_bytes(facts, facts.max_context, weights.Layout(1), fp8=True)
    lines = [
        "## V4-Pro as published on 8×H200, by context\n",
        f"Its checkpoint (FP4 experts, the rest FP8) with an FP8 cache, {layout}. Compressed attention keeps",
        f"one entry for 4 or 128 tokens: a sequence of {facts.max_context:,} tokens takes {_gb(one)}, so the claimed",
        f"200 GB would hold {200 * GB / one:.0f}. (vllm-project's recipe: 200,000 tokens, 16 at once.)\n",
        "| context | cache of a sequence, on each GPU | sequences at once |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {row.context:,} | {_gb(row.sequence_bytes)} | {row.sequences or 'none'} |" for row in rows]
    return [*lines, ""]


def _experts(catalog: Catalog) -> list[str]:
    """Shapes that articles have wrong."""
    qwen, pro = (_model(name, catalog) for name in ("Qwen/Qwen3-235B-A22B", "deepseek-ai/DeepSeek-V4-Pro"))
    with_shared = weights.total_params(qwen) + qwen.moe_layers * 3 * qwen.hidden * qwen.moe_intermediate
    return [
        "## Experts\n",
        f"- Qwen3-235B has {qwen.experts} experts, {qwen.topk} a token, none shared: that makes"
        f" {weights.total_params(qwen) / 1e9:.1f}B parameters, as published; a shared expert would make"
        f" {with_shared / 1e9:.1f}B.",
        f"- V4-Pro has {pro.experts} routed experts and {pro.shared_experts} shared, {pro.topk} a token:"
        f" {weights.total_params(pro) / 1e9:,.0f}B parameters, {weights.active_params(pro) / 1e9:.1f}B of them met by a"
        " token (published: 1.6T and 49B).",
        "",
    ]


def _exchange(catalog: Catalog) -> list[str]:
    """Bytes of dispatch and combine, of which articles say "30–40 GB/s per token"."""
    facts, h100 = _model("deepseek-ai/DeepSeek-V3", catalog), catalog.accelerators["nvidia-h100"]
    both = DISPATCH_BYTES + ACTIVATION_BYTES
    each = facts.moe_layers * facts.topk * facts.hidden * both
    rate = 2785
    flow = each * rate
    links = [("NVLink", h100.nvlink_bytes_s), ("its network card", h100.nic_bytes_s), ("PCIe Gen5", h100.pcie_bytes_s)]
    shares = [f"{flow / speed:.0%} of {name} ({speed / GB:.0f} GB/s)" for name, speed in links if speed is not None]
    return [
        "## All-to-all traffic\n",
        'Said: expert parallelism needs "30–40 GB/s per token". GB/s per token is no unit. DeepSeek-V3 sends the',
        f"{facts.hidden:,} values of a token to {facts.topk} experts in each of {facts.moe_layers} layers, in FP8",
        f"there and in BF16 back: {facts.moe_layers} × {facts.topk} × {facts.hidden:,} × {both} bytes ="
        f" {each / 1e6:.1f} MB a token at most, less where an expert",
        f"shares the token's GPU. At {rate:,} tokens/s on each GPU (SGLang's decode on 72 H100,",
        f"lmsys.org/blog/2025-05-05-large-scale-ep) that is {flow / GB:.0f} GB/s for each GPU: what the articles can",
        f"mean. Of an H100 it is {', '.join(shares)}.\n",
    ]


def _rent(catalog: Catalog) -> list[str]:
    """What the hardware of profile C costs a month at the catalog's rents."""
    lines = [
        "## Rent of what fits V4-Pro\n",
        f"Said: 8×H100 for V4-Pro cost about $25K a month, which is ${profiles.V4_RENT:.2f} a GPU-hour. They do not",
        f"hold it in any form; at the catalog's rents ({HOURS_PER_MONTH:.0f} hours a month):\n",
        "| GPUs | USD per GPU-hour | USD a month | holds V4-Pro |",
        "| --- | --- | --- | --- |",
    ]
    places = (("nvidia-h100", 8), ("nvidia-h100", 16), ("nvidia-h200", 8), ("nvidia-h200", 16), ("nvidia-b200", 8))
    claim = Claim("rent", "", "deepseek-ai/DeepSeek-V4-Pro", places, ("mxfp4-fp8", "fp8"))
    held: dict[tuple[str, int], list[str]] = {}
    for at in judge(claim, catalog):
        held.setdefault((at.accelerator.name, at.gpus), []).extend([at.precision.name] if at.fits else [])
    for (name, gpus), forms in held.items():
        rent = catalog.accelerators[name].rent_usd_per_hour
        if rent is not None:
            month = rent * gpus * HOURS_PER_MONTH
            lines.append(f"| {gpus} × {name} | {rent:.2f} | {month:,.0f} | {' and '.join(forms) or 'no'} |")
    return [*lines, ""]


def _break_evens() -> list[str]:
    """What the articles' break-evens take for granted: docs/planner.md has the profiles that follow from it."""
    lines = [
        "## Break-evens\n",
        "Said: 4×H100 with Qwen3 or Llama 4 beat a closed API from about 1.2 thousand million tokens a month of chat,",
        "and from 600 million of completion. A break-even is rent over price, so each says what a million tokens must",
        "have cost there. An H100-hour at $2 to $3, and the share of output among all tokens at which an API costs",
        "that much:\n",
        "| stated | rent a month | a million tokens, implied | output share, gpt-5.5 | claude-opus-4.7 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for stated in (profiles.STATED_CHAT, profiles.STATED_COMPLETION):
        rents = [hourly * stated.gpus * HOURS_PER_MONTH for hourly in profiles.ARTICLE_RENTS]
        implied = stated.implied()
        cells = [
            stated.name,
            " to ".join(f"${rent:,.0f}" for rent in rents),
            " to ".join(f"${price:.2f}" for price in implied),
            " to ".join(_share(profiles.GPT, price) for price in implied),
            " to ".join(_share(profiles.OPUS, price) for price in implied),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    blend = (profiles.OPEN_MODEL.input_usd_per_m, profiles.OPEN_MODEL.output_usd_per_m)
    rent = profiles.ARTICLE_RENTS[0] * 4 * HOURS_PER_MONTH
    volumes = [rent / price * MILLION / 1e9 for price in reversed(blend)]
    return [
        *lines,
        "",
        "Both hold only for workloads of that mix (none: below the price of input alone, which takes a cache), if the",
        f"GPUs serve the volume, and against those prices: against an open model at ${blend[0]:.2f}/${blend[1]:.2f}",
        f"the same GPUs at $2 break even from {volumes[0]:.1f} (all output) to {volumes[1]:.1f} (all input) thousand",
        "million tokens.\n",
    ]


def _share(tariff: Tariff, price: float) -> str:
    found = output_share(tariff, price)
    return "none" if found is None else f"{found:.0%}"


def _gb(size: float) -> str:
    amount = size / GB
    return f"{amount:,.0f} GB" if amount >= 100 else f"{amount:.1f} GB"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="moe_planner.claims", description=__doc__)
    made.add_argument("--write", type=Path, metavar="FILE", help="write it instead of printing it")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the file, or write it."""
    asked = parser().parse_args(arguments)
    if asked.write is None:
        sys.stdout.write(render())
    else:
        asked.write.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
