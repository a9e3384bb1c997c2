"""How a table of published runs is read: its columns and notes, each as people write them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from moe_planner.catalog import Accelerator, Catalog, ModelFacts, Precision
from moe_planner.speed import YIELDED, Load
from moe_planner.weights import Layout
from moe_planner.work import in_blocks

COLUMNS = ("model", "precision", "engine", "hardware", "gpus", "input_tokens", "output_tokens", "metric", "value")
UNLIMITED = 1_000_000
"""Concurrency where everything is queued at once: memory alone is the limit."""
MAX_ROWS = 100_000


class TableInvalid(Exception):
    """The file is no table of published runs. Names the column or line and the remedy."""


class Unpredicted(Exception):
    """Why a row is not predicted."""


def read(text: str) -> list[dict[str, str]]:
    """Rows of a table; one without an `id` is named by its line. Raises TableInvalid."""
    try:
        reader = csv.DictReader(io.StringIO(text.lstrip("\ufeff")), strict=True)
        names = [(name or "").strip().lower() for name in reader.fieldnames or ()]
        _header(names)
        reader.fieldnames = names
        rows = []
        for line in reader:
            if None in line:
                raise TableInvalid(
                    f"line {reader.line_num}: has more cells than the header has columns: quote cells with commas"
                )
            row = {name: (value or "").strip() for name, value in line.items()}
            if any(row.values()):
                row["id"] = row.get("id") or f"line {reader.line_num}"
                rows.append(row)
            if len(rows) > MAX_ROWS:
                raise TableInvalid(f"more than {MAX_ROWS:,} rows: split the table")
    except csv.Error as error:
        raise TableInvalid(f"is no CSV: {error}") from None
    if not rows:
        raise TableInvalid("has a header and no rows")
    return rows


def _header(names: Sequence[str]) -> None:
    missing = [column for column in COLUMNS if column not in names]
    if missing and len(names) == 1 and re.search(r"[;\t]", names[0]):
        raise TableInvalid("columns are not parted by commas: save it as CSV with commas")
    if missing:
        raise TableInvalid(f"column {missing[0]} is missing: the table needs {', '.join(COLUMNS)}")
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise TableInvalid(f"column {twice[0]} is there twice: keep one")


METRICS: Mapping[str, tuple[str, str]] = {
    "output_tok_s_total": ("output", "total"),
    "output_tok_s_per_gpu": ("output", "per_gpu"),
    "total_tok_s_total": ("total", "total"),
    "total_tok_s_per_gpu": ("total", "per_gpu"),
    "input_tok_s_total": ("input", "total"),
    "input_tok_s_per_gpu": ("input", "per_gpu"),
    "fits(1=yes,0=no)": ("fits", "total"),
    "fits": ("fits", "total"),
}
LATENCIES = {"ttft_ms": ("ttft", "ms"), "tpot_ms": ("itl", "ms"), "itl_ms": ("itl", "ms")}


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def model(text: str, catalog: Catalog) -> tuple[ModelFacts, Precision]:
    """A model by the name of its repository, its key, or the start of either, as people shorten them."""
    if not text:
        raise Unpredicted("model: blank")
    names = {_plain(name): key for name, key in catalog.names.items()} | {_plain(key): key for key in catalog.models}
    tried = [text] if "/" not in text else [text.rpartition("/")[2], *text.split("/"), text.partition("/")[0]]
    for part in tried:
        known = catalog.model(part)
        if known is not None:
            return known
        wanted = _plain(part)
        if wanted in names:
            model = catalog.models[names[wanted]]
            return model, catalog.precisions[model.native]
        longer = sorted(name for name in names if name.startswith(f"{wanted}-"))
        shorter = sorted((name for name in names if wanted.startswith(f"{name}-")), key=len)
        for near in (*shorter[-1:], *longer[:1]):
            model = catalog.models[names[near]]
            return model, catalog.precisions[model.native]
    raise Unpredicted(f"model: {text} is not in the catalog")


_PRECISIONS = (
    (r"fp4 experts|mxfp4 experts|fp4 \+ fp8|w4a8", "mxfp4-fp8"),
    (r"nvfp4", "nvfp4"),
    (r"mxfp4", "mxfp4"),
    (r"\bfp4\b", "nvfp4"),
    (r"fp8|e4m3|w8a8-fp8", "fp8"),
    (r"awq", "awq"),
    (r"gptq|w4a16|int4", "gptq"),
    (r"int8|w8a8|w8a16", "int8"),
    (r"nf4|bnb", "nf4"),
    (r"bf16|fp16|float16|half", "bf16"),
)


def precision(text: str, named: Precision, catalog: Catalog) -> Precision:
    if not text.strip():
        return named
    for pattern, name in _PRECISIONS:
        if re.search(pattern, text.lower()):
            found = catalog.precisions[name]
            # A family whose experts come in FP4 and the rest in FP8 is meant where a table says only FP4 or FP8.
            return named if named.name == "mxfp4-fp8" and name in ("mxfp4", "nvfp4") else found
    raise Unpredicted(f"precision: {text} is not known: one of {', '.join(catalog.precisions)}")


def accelerator(text: str, catalog: Catalog) -> Accelerator:
    """An accelerator by its longest name that the text contains as a whole."""
    wanted = f"-{_plain(text)}-"
    names = [
        (_plain(name), accelerator)
        for key, accelerator in catalog.accelerators.items()
        for name in (key, key.partition("-")[2], *accelerator.aliases)
    ]
    found = [(len(name), accelerator) for name, accelerator in names if name and f"-{name}-" in wanted]
    if not found:
        raise Unpredicted(f"hardware: {text or 'blank'} is not in the catalog")
    return max(found, key=lambda pair: pair[0])[1]


def engine(text: str) -> str:
    lower = text.lower()
    for part, name in (("trt", "tensorrt-llm"), ("tensorrt", "tensorrt-llm"), ("sglang", "sglang"), ("vllm", "vllm")):
        if part in lower:
            return name
    return "other"


def fp8_cache(
    row: Mapping[str, str], engine: str, precision: Precision, model: ModelFacts, accelerator: Accelerator
) -> bool:
    """As the row says; else FP8 by TensorRT-LLM's quantised checkpoints, and the model's own by other engines."""
    said = f"{row['precision']} {row.get('note', '')}".lower()
    if re.search(r"bf16 kv|fp16 kv", said):
        return False
    if re.search(r"fp8 (kv|attn|attention)\b", row["precision"].lower()):
        return True
    if engine == "tensorrt-llm":
        # Its performance overview keeps gpt-oss's cache in FP8 on Blackwell, and as the model has it on Hopper.
        fp4 = 0.5 in accelerator.flops
        return precision.name in ("fp8", "nvfp4", "mxfp4-fp8") or (precision.name == "mxfp4" and fp4)
    return model.kv_dtype == "fp8"


def scaled(row: Mapping[str, str], engine: str, precision: Precision, model: ModelFacts) -> Precision:
    """The form with one scale for each tensor where TensorRT-LLM runs FP8 of a model that does not come in it.

    Such weights are ModelOpt's, as NVIDIA publishes them and its performance overview runs them
    (docs/source/developer-guide/perf-overview.md, read 2026-11-23). Who starts a server and sends it all at once takes
    the checkpoint of the model's maker, as other engines do.
    """
    modelopt = engine == "tensorrt-llm" and precision.name == "fp8" and model.native != "fp8" and not at_once(row)
    return replace(precision, block=1) if modelopt else precision


def active_seqs(engine: str, accelerator: Accelerator, catalog: Catalog) -> int | None:
    """vLLM's default of max_num_seqs (engine/arg_utils.py): 1024 on GPUs of 70 GiB and more but the A100, else 256."""
    if engine != "vllm":
        return None
    large = accelerator.memory_bytes >= catalog.engine.large_gpu_bytes and "a100" not in accelerator.name
    return 1024 if large else catalog.engine.active_seqs


def cold(row: Mapping[str, str], engine: str, model: ModelFacts, precision: Precision, gpu: Accelerator) -> bool:
    """Whether kernels are compiled while a first burst waits: a benchmark that sends all at once to a new server.

    DeepGEMM compiles for each shape that it meets (FP8 with block scales, on GPUs without FP4 units): SGLang's issue
    4773 has 224 s for a first run and 115 s for the next. vLLM compiles before it serves (its pull request 22215), and
    so does SGLang (its pull request 5580), but the kernels of a sparse indexer it met later (its pull request 15891).
    """
    if not at_once(row):
        return False
    compiled = in_blocks(precision) and 0.5 not in gpu.flops
    return compiled and (engine == "tensorrt-llm" or (engine == "sglang" and model.index_heads > 0))


def at_once(row: Mapping[str, str]) -> bool:
    """Whether all requests are sent together, and the figure covers the time until the last has ended."""
    return re.search(r"at once|burst", row.get("note", ""), re.IGNORECASE) is not None


def admission(row: Mapping[str, str], engine: str) -> tuple[float, float | None]:
    """Share of its output that a sequence is given room for, and share of the free memory that the cache takes.

    TensorRT-LLM admits what it need never evict (its scheduler's default, GUARANTEED_NO_EVICT), and takes 90 % of what
    weights leave (kv_cache_config.free_gpu_memory_fraction), or what the note says: of a range the upper end, which its
    performance overview sets wherever that runs.
    """
    if engine != "tensorrt-llm":
        return YIELDED, None
    said = re.search(r"KV fraction (?:0?\.\d+ ?[-–] ?)?(0?\.\d+)", row.get("note", ""), re.IGNORECASE)
    return 1.0, float(said.group(1)) if said else 0.9


GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 1024, 2048, 4096, 8192)


def graphs(row: Mapping[str, str]) -> tuple[int, ...]:
    """Batches of the CUDA graphs that decode steps are padded to, in runs of TensorRT-LLM's performance overview.

    Its options turn padding on and list these batches (docs/source/developer-guide/perf-overview.md @03e27c7, read
    2026-11-24); releases 0.x built engines, which have no such graphs. Nothing else is known to pad so coarsely.
    """
    overview = "perf-overview" in row.get("source", "") and not re.search(r"\b0\.", row.get("engine_version", ""))
    return GRAPHS if overview and engine(row["engine"]) == "tensorrt-llm" else ()


def count(text: str) -> int | None:
    digits = re.fullmatch(r"\s*(\d{1,6})(?:\.0*)?\s*", text)
    return int(digits.group(1)) if digits else None


def _tokens(text: str) -> float | None:
    """A length in tokens: the first number of the text, as in `ShareGPT ~216`; None where there is none above zero."""
    number = re.search(r"\d[\d,]*(?:\.\d+)?(?:e\d)?", text, re.IGNORECASE)
    if number is None or text.strip().startswith("-"):
        return None
    size = float(number.group().replace(",", ""))
    return size * 1024 if re.match(r"\s*k\b", text[number.end() :], re.IGNORECASE) else size


def load(row: Mapping[str, str], kind: str, gpus: int) -> tuple[Load, float | None, tuple[str, ...]]:
    given, yielded = _tokens(row["input_tokens"]), _tokens(row["output_tokens"])
    assumed: list[str] = []
    if not given:
        raise Unpredicted(_no_length("input_tokens", row))
    if not yielded:
        if kind not in ("input", "decode"):
            raise Unpredicted(_no_length("output_tokens", row))
        yielded = 1.0  # a pool that only reads prompts, or decodes at the length that is given
    text = row.get("concurrency_or_batch", row.get("concurrency", "")).lower()
    step = re.search(r"(\d[\d,]*) tokens ?/ ?gpu", text)
    each = re.search(r"(\d[\d,]*) ?/ ?(gpu|rank)|(\d+) ?\(.*batch size", text)
    queued = re.search(r"(\d[\d,]*) ?[-–] ?(\d[\d,]*) requests", text)
    number = re.search(r"\d[\d,]*", text)
    concurrency: float
    if step or kind == "input":
        concurrency = max(1.0, 16384.0 / given) * gpus
    elif each:
        concurrency = float((each.group(1) or each.group(3)).replace(",", "")) * gpus
    elif queued:
        low, high = (float(queued.group(at).replace(",", "")) for at in (1, 2))
        concurrency = _queued(low, high, given + yielded)
        assumed.append(f"{concurrency:.0f} requests queued")
    elif number:
        concurrency = float(number.group().replace(",", ""))
    elif re.search(r"max|offline|satur|server|peak|unlimited|inf", text):
        concurrency = UNLIMITED
    elif not text:
        raise Unpredicted("concurrency_or_batch: not given")
    else:
        raise Unpredicted(f"concurrency_or_batch: {text} is no number and no known word")
    if concurrency < 1 or text.startswith("-"):
        raise Unpredicted(f"concurrency_or_batch: {text} must be above zero")
    asked = Load(given, yielded, round(concurrency), cached_share=_cached(row))
    return asked, float(concurrency) if at_once(row) or queued else None, tuple(assumed)


def _no_length(column: str, row: Mapping[str, str]) -> str:
    return f"{column}: {row[column]} is no length above zero" if row[column] else f"{column}: not given"


def _queued(few: float, many: float, tokens: float) -> float:
    """Requests of a run that queues `few` of the longest to `many` of the shortest, all at once.

    Between them by the logarithm of a request's tokens: TensorRT-LLM's performance overview has 3000 for 1024 + 1024
    tokens, 1500 for 9216 and 1000 for 33,792 (docs/source/developer-guide/perf-overview.md, read 2026-11-23).
    """
    low, high = sorted((few, many))
    share = min(1.0, max(0.0, math.log(tokens / 2048) / math.log(33792 / 2048)))
    return float(round(high * (low / high) ** share))


def _cached(row: Mapping[str, str]) -> float:
    said = re.search(r"includes (\d+(?:\.\d+)?) ?% cache hits", row.get("note", ""), re.IGNORECASE)
    return min(1.0, float(said.group(1)) / 100) if said else 0.0


def itl_limit(row: Mapping[str, str], kind: str) -> float | None:
    """Seconds between tokens that a server run must keep, from its note. Raises Unpredicted where it is not told."""
    if kind not in ("output", "total") or row.get("concurrency_or_batch", "").strip().lower() != "server":
        return None
    note = row.get("note", "")
    rate = re.search(r">= ?(\d+(?:\.\d+)?) ?tok/s/user", note)
    limit = re.search(r"(?:TPOT|ITL) ?<= ?(\d+(?:\.\d+)?) ?ms", note)
    if rate:
        return 1.0 / float(rate.group(1))
    if limit:
        return float(limit.group(1)) * 1e-3
    raise Unpredicted("concurrency_or_batch: a server run whose latency limit is not given")


def attention_dp(row: Mapping[str, str]) -> str:
    """Whether the note of a tensor parallel row says that attention is data parallel: "all", "some" points, or "no"."""
    note = row.get("note", "")
    said = re.search(r"(\bno |without )?(DP.?attention|attention.?DP)( on )?", note, re.IGNORECASE)
    if said is None or said.group(1):
        return "no"
    return "some" if said.group(3) else "all"


def layout(row: Mapping[str, str], gpus: int) -> Layout | None:
    """The layout of a row; None where it gives neither tensor nor data ranks.

    Where tensor × data exceed the GPUs, attention is data parallel inside the tensor group, as SGLang's and
    TensorRT-LLM's attention DP has it: data ranks count.
    """
    tp, dp, ep, pp = (count(row.get(name, "")) for name in ("tp", "dp", "ep", "pp"))
    whole = re.fullmatch(r"dp-?attn|attn-?dp", row.get("dp", "").lower().strip())
    if whole:
        dp = gpus // (pp or 1)
    if tp is None and dp is None:
        return None
    pipeline = pp or 1
    tensor, data = tp or 1, dp or 1
    for name, size in (("tp", tensor * pipeline), ("dp", data * pipeline)):
        if size > gpus:
            stages = f" in {pipeline} stages" if pipeline > 1 else ""
            raise Unpredicted(f"{name}: {row[name]}{stages} needs more than {gpus} GPUs")
    if tensor * data * pipeline > gpus:
        data = min(data, gpus // pipeline) or 1
        tensor = max(1, gpus // (data * pipeline))
    replicas, over = divmod(gpus, tensor * data * pipeline)
    if over or not replicas:
        raise Unpredicted(f"tp, dp, pp: {tensor} × {data} × {pipeline} do not make {gpus} GPUs")
    if dp is None and row.get("dp", "") == "" and replicas > 1 and (ep or 1) > tensor:
        data = min(replicas, (ep or 1) // tensor)
    ranks = tensor * data
    expert = ranks if (ep or (1 if data == 1 else ranks)) > 1 and ranks > 1 else 1
    if whole and not ep:
        expert = 1
    return Layout(tensor, data, expert, pipeline)
