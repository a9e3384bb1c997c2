"""The form of weights that a config.json says: its quantization_config, else its type of numbers."""

from __future__ import annotations

import re

from moe_planner.config_keys import Keys

PLAIN = {"bfloat16": "bf16", "float16": "bf16", "float32": "fp32"}


def native_form(keys: Keys, inner: Keys) -> str:
    """Name of the precision of a checkpoint. Raises CatalogInvalid where it is none that the planner can count."""
    quantized = keys.optional("quantization_config") or inner.optional("quantization_config")
    if quantized is None:
        for at in (inner, keys):
            for name in ("dtype", "torch_dtype"):
                if kind := at.text(name, default=""):
                    if kind not in PLAIN:
                        raise at.wrong(name, f"{kind} is not known: one of {', '.join(PLAIN)}")
                    return PLAIN[kind]
        return "bf16"
    form = _form(quantized, inner)
    _as_counted(quantized, form, inner.whole("num_hidden_layers", "n_layers", "num_layers", default=1))
    return form


EXPERTS_ALONE = ("mxfp4", "nvfp4", "int4-experts")
"""Forms that leave attention in 16 bits; the others make every linear layer smaller."""
SMALL = re.compile(r"norm|conv1d|in_proj_(a|b)|A_log|dt_bias|indexer|rotary|sink|gate_proj$|[kv]_scale")
"""Parts of attention that are too small to be made smaller: they stay wide in every form."""
KEPT = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")


def _as_counted(quantized: Keys, form: str, layers: int) -> None:
    """Raises CatalogInvalid where a checkpoint leaves attention wide, or not, otherwise than its form is counted."""
    for name in KEPT:
        if not (kept := quantized.words(name)):
            continue
        attention = [module for module in kept if "attn" in module and not SMALL.search(module)]
        wide = any("*" in module or module.startswith("re:") or "layers" not in module for module in attention)
        wide = wide or len(attention) >= layers
        if attention and not wide:
            raise quantized.wrong(name, "leaves attention of some layers wide: write the model's entry by hand")
        if wide and form not in EXPERTS_ALONE:
            raise quantized.wrong(
                name, f"leaves attention wide, which {form} is not counted with: write its entry by hand"
            )
        if not wide and form in EXPERTS_ALONE:
            raise quantized.wrong(name, f"leaves attention out, which {form} is counted with: write its entry by hand")


def _form(quantized: Keys, inner: Keys) -> str:
    method = quantized.text("quant_method", default="")
    match method:
        case "fp8" | "fbgemm_fp8":
            return "mxfp4-fp8" if inner.text("expert_dtype", default="") == "fp4" else "fp8"
        case "mxfp4":
            return "mxfp4"
        case "awq" | "gptq":
            return _grouped(quantized, method, quantized.whole("bits"))
        case "bitsandbytes":
            return "nf4" if quantized.flag("load_in_4bit") else "int8"
        case "modelopt" | "modelopt_fp4":
            return _modelopt(quantized)
        case "compressed-tensors":
            return _compressed(quantized)
    raise quantized.wrong("quant_method", f"{method or 'nothing'} is not known: write the model's entry by hand")


def _grouped(quantized: Keys, method: str, bits: int) -> str:
    size = quantized.whole("group_size", default=128)
    if (bits, size) == (4, 128):
        return method
    if bits == 8:
        return "int8"
    raise quantized.wrong("bits", f"{bits} bits in groups of {size} are not counted: 4 bits in groups of 128, or 8")


def _modelopt(quantized: Keys) -> str:
    algorithm = quantized.text("quant_algo")
    known = {"FP8": "fp8", "NVFP4": "nvfp4", "FP4": "nvfp4"}
    if algorithm not in known:
        raise quantized.wrong("quant_algo", f"{algorithm} is not known: one of {', '.join(known)}")
    return known[algorithm]


def _compressed(quantized: Keys) -> str:
    form = quantized.text("format")
    if form == "float-quantized":
        return "fp8"
    if form == "nvfp4-pack-quantized":
        return "nvfp4"
    if form == "int-quantized":
        return "int8"
    if len(named := quantized.nested("config_groups").names()) != 1:
        raise quantized.wrong("config_groups", f"has {len(named)} groups: write the model's entry by hand")
    groups = quantized.nested("config_groups").nested(*named).nested("weights")
    bits, size = groups.whole("num_bits"), groups.whole("group_size", default=128)
    if form == "pack-quantized" and (bits, size) == (4, 32):
        return "int4-experts"
    if form == "pack-quantized":
        return _grouped(groups, "gptq", bits) if size == 128 else _unknown(groups, bits, size)
    raise quantized.wrong("format", f"{form} is not known: write the model's entry by hand")


def _unknown(groups: Keys, bits: int, size: int) -> str:
    raise groups.wrong(
        "group_size", f"{bits} bits in groups of {size} are not counted: write the model's entry by hand"
    )
