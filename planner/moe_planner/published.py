"""Published runs: a table's rows as cases that can be predicted, each with what was assumed, or why it cannot be."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from moe_planner import layouts, memory, speed
from moe_planner.calibration import Factors
from moe_planner.catalog import Accelerator, Catalog, ModelFacts, Precision
from moe_planner.memory import Ask
from moe_planner.speed import Load, Prepared, SpeedUnknown
from moe_planner.weights import Layout

COLUMNS = ("model", "precision", "engine", "hardware", "gpus", "input_tokens", "output_tokens", "metric", "value")
WIDE = 32
UNLIMITED = 1_000_000
"""Concurrency where everything is queued at once: memory alone is the limit."""
MAX_ROWS = 100_000


class TableInvalid(Exception):
    """The file is no table of published runs. Names the column or line and the remedy."""


@dataclass(frozen=True)
class Skipped:
    """A row that is not predicted, and why."""

    row: Mapping[str, str]
    why: str


@dataclass(frozen=True)
class Case:
    """A row that can be predicted. `options`: its layout, or those to choose the fastest from where none is given."""

    row: Mapping[str, str]
    value: float
    metric: str  # "output", "total", "input": tokens/s of all GPUs; "decode": of a decode pool; "ttft", "itl": seconds
    model: ModelFacts
    precision: Precision
    accelerator: Accelerator
    engine: str
    gpus: int
    options: tuple[Prepared, ...]
    requests: float | None = None  # sent at once; None: a steady load
    spread: bool = False  # output lengths as in recorded conversations
    itl_limit_s: float | None = None  # the load is the largest that keeps this
    assumed: tuple[str, ...] = ()

    @property
    def throughput(self) -> bool:
        return self.metric not in ("ttft", "itl")

    @property
    def source(self) -> str:
        return self.row.get("source", "") or "not named"


@dataclass(frozen=True)
class FitCase:
    """A row that tells whether a model fits, with the planner's own answer."""

    row: Mapping[str, str]
    seen: bool
    told: bool

    @property
    def right(self) -> bool:
        return self.seen == self.told


def read(text: str) -> list[dict[str, str]]:
    """Rows of a table. Raises TableInvalid."""
    try:
        reader = csv.DictReader(io.StringIO(text.lstrip("\ufeff")), strict=True)
        names = [(name or "").strip() for name in reader.fieldnames or ()]
        missing = [column for column in COLUMNS if column not in names]
        if missing:
            raise TableInvalid(f"column {missing[0]} is missing: the table needs {', '.join(COLUMNS)}")
        reader.fieldnames = names
        rows = []
        for line in reader:
            rows.append({name: (value or "").strip() for name, value in line.items() if isinstance(name, str)})
            if len(rows) > MAX_ROWS:
                raise TableInvalid(f"more than {MAX_ROWS:,} rows: split the table")
    except csv.Error as error:
        raise TableInvalid(f"is no CSV: {error}") from None
    return rows


def cases(rows: Iterable[Mapping[str, str]], catalog: Catalog) -> list[Case | FitCase | Skipped]:
    """Each row as a case, a judged fit, or skipped."""
    found: list[Case | FitCase | Skipped] = []
    for row in rows:
        try:
            found.append(_case(row, catalog))
        except _No as reason:
            found.append(Skipped(row, str(reason)))
        except SpeedUnknown as reason:
            found.append(Skipped(row, str(reason)))
    return found


class _No(Exception):
    """Why a row is not predicted."""


def _case(row: Mapping[str, str], catalog: Catalog) -> Case | FitCase:
    metric = row["metric"].lower()
    what = _METRICS.get(metric) or next((kind for head, kind in _LATENCIES.items() if metric.startswith(head)), None)
    if what is None:
        raise _No(f"metric: {row['metric'] or 'blank'} is not known: one of {', '.join(_METRICS)}, ttft_ms, tpot_ms")
    kind, scale = what
    try:
        value = float(row["value"].replace(",", ""))
    except ValueError:
        raise _No(f"value: {row['value'] or 'blank'} is no number") from None
    model, named = _model(row["model"], catalog)
    precision = _precision(row["precision"], named, catalog)
    accelerator = _accelerator(row["hardware"], catalog)
    gpus = _count(row["gpus"])
    if gpus is None or not 1 <= gpus <= 4096:
        raise _No(f"gpus: {row['gpus'] or 'blank'} is no count of GPUs")
    engine = _engine(row["engine"])
    ep = _count(row.get("ep", "")) or 1
    ask = Ask(
        model,
        precision,
        accelerator,
        fp8_cache=_fp8_cache(row, engine, precision, model),
        active_seqs=_active_seqs(engine, accelerator, catalog),
        # Wide expert parallelism runs with spare experts, and where experts do not divide it needs them.
        redundant=ep if ep >= WIDE else -model.experts % ep,
    )
    if kind == "fits":
        return FitCase(row, value >= 0.5, _fits(row, ask, gpus, catalog))
    if value <= 0:
        raise _No(f"value: {row['value']} must be above zero")
    note = row.get("note", "")
    if re.search(r"\bMTP\b|EAGLE|speculative", note, re.IGNORECASE) and not re.search(r"no (MTP|spec)", note, re.I):
        raise _No("note: speculative decoding, whose acceptance is not known")
    pooled = row.get("disaggregated(yes/no)", row.get("disaggregated", "")).lower() == "yes"
    if pooled and kind not in ("output", "input"):
        raise _No("disaggregated: how the GPUs are shared between prefill and decode is not given")
    if kind == "output" and (pooled or re.search(r"decode.only", note, re.IGNORECASE)):
        kind = "decode"
    load, requests, assumed = _load(row, kind, gpus)
    itl = _itl_limit(row, kind)
    options, more = _options(row, ask, gpus, load, catalog)
    return Case(
        row=row,
        value=value * (gpus if scale == "per_gpu" else 1.0) * (1e-3 if scale == "ms" else 1.0),
        metric=kind,
        model=model,
        precision=precision,
        accelerator=accelerator,
        engine=engine,
        gpus=gpus,
        options=options,
        requests=requests,
        spread="sharegpt" in f"{row['input_tokens']} {row['output_tokens']} {note}".lower()
        and "sharegpt" in row["input_tokens"].lower(),
        itl_limit_s=itl,
        assumed=assumed + more,
    )


_METRICS: Mapping[str, tuple[str, str]] = {
    "output_tok_s_total": ("output", "total"),
    "output_tok_s_per_gpu": ("output", "per_gpu"),
    "total_tok_s_total": ("total", "total"),
    "total_tok_s_per_gpu": ("total", "per_gpu"),
    "input_tok_s_total": ("input", "total"),
    "input_tok_s_per_gpu": ("input", "per_gpu"),
    "fits(1=yes,0=no)": ("fits", "total"),
    "fits": ("fits", "total"),
}
_LATENCIES = {"ttft_ms": ("ttft", "ms"), "tpot_ms": ("itl", "ms"), "itl_ms": ("itl", "ms")}


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _model(text: str, catalog: Catalog) -> tuple[ModelFacts, Precision]:
    """A model by the name of its repository, its key, or the start of either, as people shorten them."""
    if not text:
        raise _No("model: blank")
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
    raise _No(f"model: {text} is not in the catalog")


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


def _precision(text: str, named: Precision, catalog: Catalog) -> Precision:
    if not text.strip():
        return named
    for pattern, name in _PRECISIONS:
        if re.search(pattern, text.lower()):
            found = catalog.precisions[name]
            # A family whose experts come in FP4 and the rest in FP8 is meant where a table says only FP4 or FP8.
            return named if named.name == "mxfp4-fp8" and name in ("mxfp4", "nvfp4") else found
    raise _No(f"precision: {text} is not known: one of {', '.join(catalog.precisions)}")


def _accelerator(text: str, catalog: Catalog) -> Accelerator:
    """An accelerator by its longest name that the text contains as a whole."""
    wanted = f"-{_plain(text)}-"
    names = [
        (_plain(name), accelerator)
        for key, accelerator in catalog.accelerators.items()
        for name in (key, key.partition("-")[2], *accelerator.aliases)
    ]
    found = [(len(name), accelerator) for name, accelerator in names if name and f"-{name}-" in wanted]
    if not found:
        raise _No(f"hardware: {text or 'blank'} is not in the catalog")
    return max(found, key=lambda pair: pair[0])[1]


def _engine(text: str) -> str:
    lower = text.lower()
    for part, name in (("trt", "tensorrt-llm"), ("tensorrt", "tensorrt-llm"), ("sglang", "sglang"), ("vllm", "vllm")):
        if part in lower:
            return name
    return "other"


def _fp8_cache(row: Mapping[str, str], engine: str, precision: Precision, model: ModelFacts) -> bool:
    """As the row says; else FP8 by TensorRT-LLM's quantised checkpoints, and the model's own by other engines."""
    said = f"{row['precision']} {row.get('note', '')}".lower()
    if re.search(r"bf16 kv|fp16 kv", said):
        return False
    if re.search(r"fp8 kv", row["precision"].lower()):
        return True
    if engine == "tensorrt-llm":
        return precision.name in ("fp8", "nvfp4", "mxfp4-fp8")
    return model.kv_dtype == "fp8"


def _active_seqs(engine: str, accelerator: Accelerator, catalog: Catalog) -> int | None:
    """vLLM's default of max_num_seqs (engine/arg_utils.py): 1024 on GPUs of 70 GiB and more but the A100, else 256."""
    if engine != "vllm":
        return None
    large = accelerator.memory_bytes >= catalog.engine.large_gpu_bytes and "a100" not in accelerator.name
    return 1024 if large else catalog.engine.active_seqs


def _count(text: str) -> int | None:
    digits = re.fullmatch(r"\s*(\d{1,6})(?:\.0*)?\s*", text)
    return int(digits.group(1)) if digits else None


def _tokens(text: str) -> float | None:
    """A length in tokens: the first number of the text, as in `ShareGPT ~216`."""
    number = re.search(r"\d[\d,]*(?:\.\d+)?", text)
    if number is None:
        return None
    size = float(number.group().replace(",", ""))
    return size * 1024 if re.match(r"\s*k\b", text[number.end() :], re.IGNORECASE) else size


def _load(row: Mapping[str, str], kind: str, gpus: int) -> tuple[Load, float | None, tuple[str, ...]]:
    given, yielded = _tokens(row["input_tokens"]), _tokens(row["output_tokens"])
    assumed: list[str] = []
    if not given:
        raise _No("input_tokens: not given")
    if not yielded:
        if kind not in ("input", "decode"):
            raise _No("output_tokens: not given")
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
        concurrency = math.sqrt(low * high)
        assumed.append(f"{concurrency:.0f} requests queued")
    elif number:
        concurrency = float(number.group().replace(",", ""))
    elif re.search(r"max|offline|satur|server|peak|unlimited|inf", text):
        concurrency = UNLIMITED
    elif not text:
        raise _No("concurrency_or_batch: not given")
    else:
        raise _No(f"concurrency_or_batch: {text} is no number and no known word")
    if concurrency < 1:
        raise _No(f"concurrency_or_batch: {text} must be above zero")
    load = Load(given, yielded, round(concurrency), cached_share=_cached(row))
    at_once = re.search(r"at once|burst", row.get("note", ""), re.IGNORECASE)
    return load, float(concurrency) if at_once else None, tuple(assumed)


def _cached(row: Mapping[str, str]) -> float:
    said = re.search(r"includes (\d+(?:\.\d+)?) ?% cache hits", row.get("note", ""), re.IGNORECASE)
    return min(1.0, float(said.group(1)) / 100) if said else 0.0


def _itl_limit(row: Mapping[str, str], kind: str) -> float | None:
    """Seconds between tokens that a server run must keep, from its note. Raises _No where it is not told."""
    if kind not in ("output", "total") or row.get("concurrency_or_batch", "").strip().lower() != "server":
        return None
    note = row.get("note", "")
    rate = re.search(r">= ?(\d+(?:\.\d+)?) ?tok/s/user", note)
    limit = re.search(r"(?:TPOT|ITL) ?<= ?(\d+(?:\.\d+)?) ?ms", note)
    if rate:
        return 1.0 / float(rate.group(1))
    if limit:
        return float(limit.group(1)) * 1e-3
    raise _No("concurrency_or_batch: a server run whose latency limit is not given")


def _options(
    row: Mapping[str, str], ask: Ask, gpus: int, load: Load, catalog: Catalog
) -> tuple[tuple[Prepared, ...], tuple[str, ...]]:
    given = _layout(row, gpus)
    found: list[Prepared] = []
    why: SpeedUnknown | None = None
    tried = (given,) if given else _every_layout(ask, gpus)
    if given and given.data == 1 and given.tensor > 1:
        spread = Layout(1, given.tensor, given.tensor, given.pipeline)
        tried = {"all": (spread,), "some": (given, spread)}.get(_attention_dp(row), tried)
    for layout in tried:
        replicas = gpus // layout.gpus
        share = Load(load.input_tokens, load.output_tokens, max(1, load.concurrency // replicas), load.cached_share)
        try:
            found.append(speed.prepare(ask, layout, share, catalog))
        except SpeedUnknown as error:
            why = error
    if not found:
        raise why or _No(f"gpus: no layout of {ask.model.key} for {gpus}")
    return tuple(found), () if len(tried) == 1 else ("the fastest layout",)


def _attention_dp(row: Mapping[str, str]) -> str:
    """Whether the note of a tensor parallel row says that attention is data parallel: "all", "some" points, or "no"."""
    note = row.get("note", "")
    said = re.search(r"(\bno |without )?(DP.?attention|attention.?DP)( on )?", note, re.IGNORECASE)
    if said is None or said.group(1):
        return "no"
    return "some" if said.group(3) else "all"


def _layout(row: Mapping[str, str], gpus: int) -> Layout | None:
    """The layout of a row; None where it gives neither tensor nor data ranks.

    Where tensor × data exceed the GPUs, attention is data parallel inside the tensor group, as SGLang's and
    TensorRT-LLM's attention DP has it: data ranks count.
    """
    tp, dp, ep, pp = (_count(row.get(name, "")) for name in ("tp", "dp", "ep", "pp"))
    whole = re.fullmatch(r"dp-?attn|attn-?dp", row.get("dp", "").lower().strip())
    if whole:
        dp = gpus // (pp or 1)
    if tp is None and dp is None:
        return None
    pipeline = pp or 1
    tensor, data = tp or 1, dp or 1
    if tensor * data * pipeline > gpus:
        data = min(data, gpus // pipeline) or 1
        tensor = max(1, gpus // (data * pipeline))
    replicas, over = divmod(gpus, tensor * data * pipeline)
    if over or not replicas:
        raise _No(f"tp, dp, pp: {tensor} × {data} × {pipeline} do not make {gpus} GPUs")
    if dp is None and row.get("dp", "") == "" and replicas > 1 and (ep or 1) > tensor:
        data = min(replicas, (ep or 1) // tensor)
    ranks = tensor * data
    expert = ranks if (ep or (1 if data == 1 else ranks)) > 1 and ranks > 1 else 1
    if whole and not ep:
        expert = 1
    return Layout(tensor, data, expert, pipeline)


def _every_layout(ask: Ask, gpus: int) -> tuple[Layout, ...]:
    """Layouts of replicas that share the GPUs evenly, inside one NVLink domain and without pipeline stages."""
    found = []
    for size in layouts.divisors(gpus):
        if size > min(72, ask.accelerator.domain_gpus):
            continue
        for tensor in layouts.divisors(size):
            for expert in sorted({1, size}):
                at = Layout(tensor, size // tensor, expert)
                if layouts.problem(at, ask.model, ask.precision, 0) is None:
                    found.append(at)
    return tuple(found)


def _fits(row: Mapping[str, str], ask: Ask, gpus: int, catalog: Catalog) -> bool:
    """Whether some layout of the GPUs, or the row's own, holds one sequence of the context that its note names."""
    note = row.get("note", "")
    said = re.search(r"full (\d{4,7}) context|caps max-model-len (\d{4,7})|^max-model-len (\d{4,7})", note)
    context = int(next(filter(None, said.groups()))) if said else catalog.engine.shortest_context
    seqs = re.search(r"max-num-seqs (\d+)", note)
    given = _layout(row, gpus)
    tried = [given] if given else [Layout(gpus), Layout(gpus, expert=gpus), Layout(1, gpus, gpus)]
    step = min(catalog.engine.batched_tokens)
    wanted = Ask(
        ask.model, ask.precision, ask.accelerator, ask.fp8_cache, active_seqs=int(seqs.group(1)) if seqs else None
    )
    return any(
        memory.place(wanted, layout, step, catalog.engine).cache >= memory.sequence_bytes(wanted, layout, context, step)
        for layout in tried
    )


def predict(case: Case, factors: Factors) -> float:
    """What the row's metric would be: tokens/s of all its GPUs, or seconds. Of several options the fastest."""
    known = factors.of_engine(case.engine)
    told = [_predict(case, option, known) for option in case.options]
    return max(told) if case.throughput else min(told)


def _predict(case: Case, at: Prepared, factors: Factors) -> float:
    replicas = case.gpus / at.layout.gpus
    load = at.load
    per_request = {"output": load.output_tokens, "total": load.input_tokens + load.output_tokens}
    if case.requests is not None:
        return _burst(case, at, factors, case.requests / replicas, per_request, replicas)
    if case.itl_limit_s is not None:
        at = _within(at, factors, case.itl_limit_s)
    found = speed.finish(at, factors)
    match case.metric:
        case "output":
            return found.output_tokens_per_s * replicas
        case "total":
            return found.total_tokens_per_s * replicas
        case "input":
            return found.prefill_tokens_per_s * replicas / max(1e-3, 1.0 - load.cached_share)
        case "decode":
            return found.running / found.step_s * replicas
        case "ttft":
            return found.ttft_s
    return found.itl_s


def _burst(
    case: Case, at: Prepared, factors: Factors, requests: float, per_request: Mapping[str, float], replicas: float
) -> float:
    total_s = speed.burst_s(at, factors, requests, spread=case.spread)
    if case.metric in per_request:
        return requests * per_request[case.metric] / total_s * replicas
    found = speed.finish(at, factors)
    if case.metric == "ttft":  # the median waits for half of the prompts, and for half of the waves before it
        before = requests / 2.0
        return before / at.layout.data * at.load.new_tokens / found.prefill_tokens_per_s * at.layout.data + max(
            0.0, total_s * (1.0 - at.running / requests) / 2.0
        )
    return found.itl_s


def _within(at: Prepared, factors: Factors, itl_s: float) -> Prepared:
    """The same with as many sequences as keep the time between tokens; its largest share of the room by bisection."""
    if speed.finish(at, factors).itl_s <= itl_s:
        return at
    low, high = 1.0, at.running
    for _ in range(24):
        middle = (low + high) / 2.0
        if speed.finish(replace(at, running=middle), factors).itl_s <= itl_s:
            low = middle
        else:
            high = middle
    return replace(at, running=low)
