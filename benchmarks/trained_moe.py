"""A small mixture of experts that is trained here, in minutes, so that a perplexity means something.

    python -m benchmarks.trained_moe [--quick]      train it if it is not there yet, print its folder and figures

The architecture is Qwen3-MoE and the checkpoint is one that vLLM loads, with the byte-level tokenizer of
`moe_serving.tiny`. Trained without a balance loss: what skew its routers have is their own.

Text: the help topics (`pydoc_data.topics`) and the modules of the standard library of the Python that runs this (PSF
licence). A document (a topic, a module) is held out whole where a hash of its name says so. The result lies in the
user's cache, under a hash of text, code and settings; one thread and fixed seeds, so that the same machine makes the
same weights.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_serving.tiny import cached_checkpoint

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """What is trained and for how long. One token is one byte."""

    hidden: int = 128
    layers: int = 4
    experts: int = 16
    k: int = 4
    intermediate: int = 128
    sequence: int = 256
    sequences: int = 8
    steps: int = 450
    learning_rate: float = 4e-3
    router_learning_rate: float = 2e-3
    spread: float = 0.06
    embedding_spread: float = 1.0
    warm_up: int = 40
    seed: int = 1
    held_out_one_in: int = 16
    held_out_sequences: int = 128


QUICK = Recipe(layers=2, intermediate=64, sequence=128, steps=60, warm_up=10, held_out_sequences=32)
"""Seconds of training: far from good, and far from guessing."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint's folder; and what training saw."""

    path: Path
    recipe: Recipe
    figures: dict[str, Any]


def documents() -> dict[str, bytes]:
    """Name → text: help topics and the standard library's modules."""
    from pydoc_data.topics import topics

    found = {f"topic {name}": text.encode() for name, text in topics.items()}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found[f"module {path.name}"] = path.read_bytes()
    return found


def split(texts: dict[str, bytes], one_in: int) -> tuple[bytes, bytes]:
    """Training and held-out text: a document goes whole to one side, by a hash of its name."""

    def held_out(name: str) -> bool:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % one_in == 0

    sides = {
        side: b"\n\n".join(texts[name] for name in sorted(texts) if held_out(name) is side) for side in (False, True)
    }
    return sides[False], sides[True]


def byte_ids(tokenizer: Any) -> list[int]:
    """Token of each byte. The tokenizer names bytes by the printable stand-ins of GPT-2's alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in printable}
    names.update({byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in names)})
    return [int(tokenizer.convert_tokens_to_ids(names[byte])) for byte in range(256)]


def trained(recipe: Recipe, say: Say = lambda text: None) -> Trained:
    """The trained checkpoint, from the user's cache where it is there."""
    train, held_out = split(documents(), recipe.held_out_one_in)
    code = [inspect.getsource(part) for part in (_train, _model, _learning_rate, _sequences, byte_ids)]
    what = [asdict(recipe), hashlib.sha256(train + held_out).hexdigest(), code]
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moestack" / "trained"
    path = root / f"qwen3_moe-{key}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, and finds it done
        if not (path / "training.json").is_file():
            _train(recipe, train, held_out, path, say)
    return Trained(path, recipe, json.loads((path / "training.json").read_text()))


def load(path: Path) -> Any:
    """The checkpoint as a transformers model in float32, ready to be asked."""
    import transformers

    # The plain loop over experts: the same order of sums whatever the batch.
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32", experts_implementation="eager")
    return model.eval()


def held_out_batch(path: Path, recipe: Recipe) -> Any:
    """Held-out sequences, int64 [n, sequence], evenly spread over the held-out text."""
    import transformers

    _, text = split(documents(), recipe.held_out_one_in)
    return _sequences(text, byte_ids(transformers.AutoTokenizer.from_pretrained(path)), recipe)


def _sequences(text: bytes, ids: list[int], recipe: Recipe) -> Any:
    import torch

    stream = torch.tensor(ids)[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]
    last = stream.numel() - recipe.sequence
    starts = [last * n // max(recipe.held_out_sequences - 1, 1) for n in range(recipe.held_out_sequences)]
    return torch.stack([stream[start : start + recipe.sequence] for start in starts])


def negative_log_likelihood(model: Any, batch: Any) -> Any:
    """Nats for each token but the first of each sequence, [n, sequence - 1]."""
    import torch

    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), batch[:, 1:], reduction="none")


def perplexity(model: Any, batch: Any, at_once: int) -> float:
    """exp of the mean over all tokens; `at_once` sequences make one step."""
    import torch

    with torch.no_grad():
        total = sum(
            float(negative_log_likelihood(model, batch[first : first + at_once]).sum())
            for first in range(0, len(batch), at_once)
        )
    return math.exp(total / batch[:, 1:].numel())


def expert_load(model: Any, batch: Any) -> list[list[int]]:
    """Slots of each expert of each layer."""
    import torch

    loads: list[list[int]] = []

    def count(router: Any, _: Any, output: Any) -> None:
        loads.append(torch.bincount(output[2].flatten(), minlength=router.num_experts).tolist())

    hooks = [layer.mlp.gate.register_forward_hook(count) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return loads


def _model(recipe: Recipe, tokenizer: Any) -> Any:
    import torch
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=recipe.hidden,
        intermediate_size=2 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.hidden // 4,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.k,
        moe_intermediate_size=recipe.intermediate,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype="float32", experts_implementation="eager")
    for name, parameter in model.named_parameters():
        # With the usual 0.02 everywhere, what layers add to all tokens alike soon outweighs the tokens themselves, and
        # routers send every token to the same k experts for good.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=recipe.embedding_spread if "embed" in name else recipe.spread)
    return model


def _learning_rate(recipe: Recipe, step: int) -> float:
    """Share of the full rate: linear warm-up, then a cosine to a tenth."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(recipe.steps - recipe.warm_up, 1)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def _train(recipe: Recipe, train: bytes, held_out: bytes, path: Path, say: Say) -> None:
    import torch
    import transformers

    before = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    began = time.process_time()
    try:
        # Any Qwen3-MoE checkpoint of ours has the tokenizer.
        tokenizer = transformers.AutoTokenizer.from_pretrained(cached_checkpoint("qwen3_moe"))
        ids = byte_ids(tokenizer)
        model = _model(recipe, tokenizer)
        asked = _sequences(held_out, ids, recipe)
        stream = torch.tensor(ids)[torch.frombuffer(bytearray(train), dtype=torch.uint8).long()]
        routers = [layer.mlp.gate.weight for layer in model.model.layers]
        rest = [parameter for parameter in model.parameters() if all(parameter is not router for router in routers)]
        groups = [
            {"params": rest, "full": recipe.learning_rate},
            {"params": routers, "full": recipe.router_learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05)
        curve = []
        model.train()
        for step in range(recipe.steps):
            starts = torch.randint(0, stream.numel() - recipe.sequence, (recipe.sequences,)).tolist()
            batch = torch.stack([stream[start : start + recipe.sequence] for start in starts])
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * _learning_rate(recipe, step)
            loss = negative_log_likelihood(model, batch).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % max(recipe.steps // 20, 1) == 0 or step == recipe.steps - 1:
                curve.append([step, round(math.exp(loss.item()), 3)])
                say(f"step {step} of {recipe.steps}: training perplexity {curve[-1][1]}")
        model.eval()
        loads = expert_load(model, asked)
        figures = {
            "held_out_perplexity": round(perplexity(model, asked, 8), 4),
            "uniform_perplexity": 256.0,
            "training_perplexity_by_step": curve,
            "max_over_mean_by_layer": [round(max(load) / (sum(load) / len(load)), 3) for load in loads],
            "min_over_mean_by_layer": [round(min(load) / (sum(load) / len(load)), 3) for load in loads],
            "train_bytes": len(train),
            "held_out_bytes": len(held_out),
            "trained_bytes": recipe.steps * recipe.sequences * recipe.sequence,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "cpu_s": round(time.process_time() - began, 1),
            "text": f"help topics and standard library of Python {sys.version.split()[0]} (PSF licence)",
            "recipe": asdict(recipe),
        }
    finally:
        torch.set_num_threads(before[0])
        torch.random.set_rng_state(before[1])
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    (staging / "training.json").write_text(json.dumps(figures, indent=1))
    shutil.rmtree(path, ignore_errors=True)
    staging.rename(path)


def main() -> None:
    """Train it if needed; the last line is what training saw, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds of training")
    parser.add_argument("--steps", type=int, help="another length")
    options = parser.parse_args()
    recipe = QUICK if options.quick else Recipe()
    if options.steps:
        recipe = replace(recipe, steps=options.steps)
    made = trained(recipe, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps({"path": str(made.path), **made.figures}))


if __name__ == "__main__":
    main()
