"""A small mixture of experts that is trained here, in minutes, so that a perplexity means something.

    python -m benchmarks.trained_moe [--quick] [--seed N]      train it if need be, print its folder and figures

The architecture is Qwen3-MoE and the checkpoint is one that vLLM loads. Trained without a balance loss: what skew its
routers have is their own. Two things keep that skew from being an accident of a small model:

- Tokens are pieces of words (BPE, made here from the training text), as served models have them. Of the bytes of this
  text 28 % are spaces, so with one token per byte the experts of a space hold 28 % of all tokens whatever is learned.
- It starts as a dense model whose feed-forward weights every expert begins with (sparse upcycling, Komatsuzaki et al.
  2022), so that an expert that few tokens ask for is one that has learned less of its own, not one that knows nothing.

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

Say = Callable[[str], None]

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


@dataclass(frozen=True)
class Recipe:
    """What is trained and for how long: `dense_steps` with one expert for all, then `steps` with all of them."""

    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    experts: int = 16
    k: int = 4
    intermediate: int = 128
    sequence: int = 256
    sequences: int = 8
    dense_steps: int = 200
    steps: int = 240
    learning_rate: float = 4e-3
    router_learning_rate: float = 2e-3
    spread: float = 0.06
    embedding_spread: float = 1.0
    warm_up: int = 40
    seed: int = 1
    held_out_one_in: int = 16
    held_out_sequences: int = 128


QUICK = Recipe(
    vocabulary=512, layers=2, intermediate=64, sequence=128, dense_steps=50, steps=40, warm_up=10, held_out_sequences=32
)
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


def make_tokenizer(text: bytes, vocabulary: int) -> Any:
    """Byte-pair tokenizer of so many tokens, learned from `text`; the same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(text.decode().splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def tokens_of(tokenizer: Any, text: bytes) -> Any:
    """int64 [n], no marks added."""
    import torch

    return torch.tensor(tokenizer.backend_tokenizer.encode(text.decode(), add_special_tokens=False).ids)


def trained(recipe: Recipe, say: Say = lambda text: None) -> Trained:
    """The trained checkpoint, from the user's cache where it is there."""
    train, held_out = split(documents(), recipe.held_out_one_in)
    code = [
        inspect.getsource(part)
        for part in (_train, _fit, _model, _upcycled, _learning_rate, _sequences, make_tokenizer)
    ]
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
    return _sequences(tokens_of(transformers.AutoTokenizer.from_pretrained(path), text), recipe)


def _sequences(stream: Any, recipe: Recipe) -> Any:
    import torch

    last = stream.numel() - recipe.sequence
    starts = [last * n // max(recipe.held_out_sequences - 1, 1) for n in range(recipe.held_out_sequences)]
    return torch.stack([stream[start : start + recipe.sequence] for start in starts])


def negative_log_likelihood(model: Any, batch: Any) -> Any:
    """Nats for each token but the first of each sequence, [n, sequence - 1]."""
    import torch

    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), batch[:, 1:], reduction="none")


def nats_by_sequence(model: Any, batch: Any, at_once: int) -> Any:
    """Mean negative log-likelihood of each sequence, float64 [n]; `at_once` sequences make one step."""
    import torch

    with torch.no_grad():
        steps = [batch[first : first + at_once] for first in range(0, len(batch), at_once)]
        return torch.cat([negative_log_likelihood(model, step).double().mean(1) for step in steps])


def perplexity(model: Any, batch: Any, at_once: int) -> float:
    """exp of the mean over all tokens; `at_once` sequences make one step."""
    return math.exp(nats_by_sequence(model, batch, at_once).mean())


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


def _over_mean(load: int, loads: list[int]) -> float:
    return round(load * len(loads) / sum(loads), 3)


def _model(recipe: Recipe, tokenizer: Any, experts: int, k: int) -> Any:
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
        num_experts=experts,
        num_experts_per_tok=k,
        moe_intermediate_size=recipe.intermediate,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype="float32", experts_implementation="eager")
    for name, parameter in model.named_parameters():
        # With the usual 0.02 everywhere, what layers add to all tokens alike soon outweighs the tokens themselves.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=recipe.embedding_spread if "embed" in name else recipe.spread)
    return model


def _upcycled(recipe: Recipe, tokenizer: Any, dense: Any) -> Any:
    """The mixture in which every expert is the dense model's feed-forward part, and routers are random.

    Weights of a token's experts sum to one, so that it answers as the dense model does, whatever the routers say.
    """
    import torch

    model = _model(recipe, tokenizer, recipe.experts, recipe.k)
    theirs = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("mlp.gate.weight"):
                parameter.copy_(theirs[name].expand_as(parameter))
    return model


def _learning_rate(step: int, steps: int, warm_up: int, last: float) -> float:
    """Share of the full rate: linear warm-up, then a cosine down to `last`."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(steps - warm_up, 1)
    return (1 + last) / 2 + (1 - last) / 2 * math.cos(math.pi * done)


def _fit(model: Any, stream: Any, recipe: Recipe, steps: int, last: float, say: Say) -> list[list[float]]:
    """Train; returns [step, training perplexity] some twenty times. The learning rate ends at `last` of the full one.

    The loss is that of the next token and nothing else: none for balance.
    """
    import torch

    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    rest = [parameter for parameter in model.parameters() if all(parameter is not router for router in routers)]
    groups = [
        {"params": rest, "full": recipe.learning_rate},
        {"params": routers, "full": recipe.router_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05)
    curve = []
    model.train()
    for step in range(steps):
        starts = torch.randint(0, stream.numel() - recipe.sequence, (recipe.sequences,)).tolist()
        batch = torch.stack([stream[start : start + recipe.sequence] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * _learning_rate(step, steps, recipe.warm_up, last)
        loss = negative_log_likelihood(model, batch).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(steps // 20, 1) == 0 or step == steps - 1:
            curve.append([step, round(math.exp(loss.item()), 3)])
            say(f"step {step} of {steps}: training perplexity {curve[-1][1]}")
    model.eval()
    return curve


def _train(recipe: Recipe, train: bytes, held_out: bytes, path: Path, say: Say) -> None:
    import torch

    before = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    began = time.process_time()
    try:
        tokenizer = make_tokenizer(train, recipe.vocabulary)
        stream = tokens_of(tokenizer, train)
        asked_tokens = tokens_of(tokenizer, held_out)
        asked = _sequences(asked_tokens, recipe)
        dense = _model(recipe, tokenizer, 1, 1)
        dense_curve = _fit(dense, stream, recipe, recipe.dense_steps, 0.5, say)
        model = _upcycled(recipe, tokenizer, dense)
        before_routing = expert_load(model, asked)
        curve = _fit(model, stream, recipe, recipe.steps, 0.1, say)
        loads = expert_load(model, asked)
        steps = recipe.dense_steps + recipe.steps
        figures = {
            "dense_held_out_perplexity": round(perplexity(dense, asked, 8), 4),
            "held_out_perplexity": round(perplexity(model, asked, 8), 4),
            "uniform_perplexity": float(len(tokenizer)),
            "training_perplexity_by_step": dense_curve + [[step + recipe.dense_steps, seen] for step, seen in curve],
            "max_over_mean_at_first": [_over_mean(max(load), load) for load in before_routing],
            "max_over_mean_by_layer": [_over_mean(max(load), load) for load in loads],
            "min_over_mean_by_layer": [_over_mean(min(load), load) for load in loads],
            "train_bytes": len(train),
            "held_out_bytes": len(held_out),
            "bytes_per_token": round(len(held_out) / asked_tokens.numel(), 3),
            "trained_tokens": steps * recipe.sequences * recipe.sequence,
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
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    recipe = QUICK if options.quick else Recipe()
    made = trained(replace(recipe, seed=options.seed), lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps({"path": str(made.path), **made.figures}))


if __name__ == "__main__":
    main()
