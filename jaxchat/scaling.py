"""Everything that follows from the depth: shapes, tokens, batch size, steps and learning rates."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

from jaxchat.config import KEYS, SIZED, Config, ModelConfig, OptimConfig, build, flatten, is_derived
from jaxchat.errors import UsageError
from jaxchat.sizes import count_parameters, value_layers

REFERENCE_BATCH = 2**19  # tokens a step: where nanochat tuned its rates, at depth 12
BYTES_PER_TOKEN = 5  # of text: 4.6 to 4.8 with 32,768 tokens on web text, less with fewer; the rest is reserve
DROPPED = 600  # tokens: rows of T keep T / (T + 600) of web text whose remainders are dropped (docs/data.md)
RECIPES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("recipes.toml").read_text(encoding="utf-8"))
RECIPES["jaxchat"] = RECIPES["modern"] | {"model": RECIPES["modern"]["model"] | RECIPES["jaxchat"]["model"]}


def fill(section: Any, values: dict[str, Any]) -> Any:
    """Return a copy of a dataclass in which the fields of `values` that are still derived are filled."""
    return dataclasses.replace(section, **{k: v for k, v in values.items() if is_derived(getattr(section, k))})


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Return the model with every shape: width 64 a layer, heads of 128, one kv head a head, short windows of T/4.

    The aspect ratio 64 and the head width 128 are nanochat's; a short window is T/4 rounded up to the 128 positions
    of an attention kernel's tile. `UsageError` for impossible shapes.
    """
    build({"model": vars(model)})  # raises for a bad value
    for name in SIZED:
        if getattr(model, name.removeprefix("model.")) == -1:
            raise UsageError(f"{name}: must be at least 1; -1 is for data.size_model=true")
    width, heads, head_width = model.width, model.n_heads, model.head_width
    if width == -1:
        width = heads * head_width if heads > 0 and head_width > 0 else 64 * model.depth
    if head_width == -1:
        head_width = width // heads if heads > 0 else 128
    if heads == -1:
        heads = -(-width // head_width)
        if model.width == -1 and model.head_width == -1:
            width = heads * head_width
        elif model.head_width == -1 and width % head_width:
            raise UsageError(
                f"model.width: {width} is no multiple of {head_width}; set model.head_width or n_heads too"
            )
    model = fill(model, {"width": width, "head_width": head_width, "n_heads": heads, "n_kv_heads": heads})
    model = fill(model, RECIPES[model.recipe]["model"] | {"window_short": -(-model.seq_len // 4 // 128) * 128})
    # at most as many parameters as the tables that a token reads already
    tables = min(3, 1 + len(value_layers(model))) if model.recipe == "jaxchat" else 0
    model = fill(model, {"bigram_rows": tables * model.vocab_size})
    if model.n_heads % model.n_kv_heads:
        raise UsageError(f"model.n_kv_heads: {model.n_kv_heads} does not divide the {model.n_heads} heads")
    if model.head_width % 2:
        raise UsageError(f"model.head_width: {model.head_width} is odd; rotary embeddings turn pairs")
    if not model.window_pattern or set(model.window_pattern) - set("SL"):
        raise UsageError(f"model.window_pattern: {model.window_pattern!r} may only hold S and L")
    if model.width < 24 and (model.smear or model.value_embeddings):
        raise UsageError(f"model.width: {model.width} is below the 24 channels that gate smear and value embeddings")
    return model


def resolve(config: Config) -> Config:
    """Return the configuration with nothing left to derive but what the device decides. Raises `UsageError`."""
    model = resolve_model(config.model)
    recipe, kind = RECIPES[model.recipe], config.optim.kind
    train = fill(config.train, recipe["train"])
    if train.steps == 0 and not train.init:
        raise UsageError("train.steps: 0 is for a run that takes the weights of train.init as they are; set 1 or more")
    # d12 with the same vocabulary and ratio of tokens to parameters: where the rates were tuned
    d12 = resolve_model(ModelConfig(recipe=model.recipe, depth=12, seq_len=2048, vocab_size=model.vocab_size))
    reference, tokens = (train.token_ratio * horizon_parameters(m) for m in (d12, model))
    batch = REFERENCE_BATCH
    if model.recipe != "classic":  # 2505.13738, to a power of two
        batch = max(model.seq_len, 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference) ** 0.383)))
    train = fill(train, {"batch_tokens": batch})
    train = fill(train, {"steps": max(1, round(tokens / train.batch_tokens))})
    sft = fill(config.sft, {"batch_tokens": train.batch_tokens})
    for key, size in (("train.batch_tokens", train.batch_tokens), ("sft.batch_tokens", sft.batch_tokens)):
        if size < model.seq_len or size % model.seq_len:
            raise UsageError(f"{key}: {size} is no multiple of model.seq_len {model.seq_len}")

    defaults = dict(RECIPES["adamw" if kind == "adamw" else model.recipe]["optim"])
    optim = fill(config.optim, {"lr_scale": defaults.get("lr_scale", rate_scale(train.batch_tokens))})
    if kind == "muon":
        # keeps rate x decay x steps constant (2405.13698); with the square-root rule this is nanochat's own formula
        horizon = max(1, train.steps) * train.batch_tokens
        defaults["weight_decay"] *= (train.batch_tokens / REFERENCE_BATCH) * (reference / horizon) / optim.lr_scale
    optim = fill(optim, defaults)

    data = config.data
    if "hf:" in data.source:  # other sources are read whole
        kept = model.seq_len / (model.seq_len + DROPPED) if data.remainder in ("auto", "drop") else 1.0
        data = fill(data, {"text_bytes": round(train.steps * train.batch_tokens * BYTES_PER_TOKEN / kept)})
    return dataclasses.replace(config, model=model, data=data, train=train, optim=optim, sft=sft)


def horizon_parameters(model: ModelConfig) -> int:
    """Return the parameters that `token_ratio` multiplies: trunk and unembedding, or all (classic)."""
    count = count_parameters(model)
    return count.scaling if model.recipe != "classic" else count.total


def fine_tuning_optim(config: Config, ratio: float) -> OptimConfig:
    """Return the optimizer of SFT and RL: pretraining's rates times `ratio`, down to 0, without weight decay.

    As in nanochat, the rates are those for 2^19 tokens a step, without the factor that pretraining takes for larger
    batches.
    """
    optim = config.optim
    larger = 1.0 if optim.kind == "adamw" else rate_scale(config.train.batch_tokens)
    rates = {"lr_scale": optim.lr_scale / larger * ratio, "mixing_lr": optim.mixing_lr * ratio}
    changes: dict[str, Any] = rates | {"warmup_steps": 0, "final_lr": 0.0, "weight_decay": 0.0}
    return dataclasses.replace(optim, **changes)


def rate_scale(batch: int) -> float:
    """Return the learning-rate multiplier of a batch of so many tokens.

    Above the reference the square-root rule of nanochat. Smaller batches keep the reference's rates, which were best
    among five at 2^12 tokens a step (docs/learning.md); the square root would give 2^11 a sixteenth of them.
    """
    return max(1.0, batch / REFERENCE_BATCH) ** 0.5


def derivations(given: Config, resolved: Config) -> dict[str, str]:
    """Return, for every derived key, why it has its value: the comments of the saved configuration."""
    before, after = flatten(given), flatten(resolved)
    recipe = f"{resolved.model.recipe} recipe"
    reasons = {}
    for key in after:
        if before[key] != after[key]:
            _, derived, rule = KEYS[key].meaning.rpartition("-1: ")
            rule = rule.partition(";")[0].replace("by recipe", recipe) if derived else recipe
            if given.data.size_model and key in (*SIZED, "train.steps"):
                rule = "fitted to the amount of text"
            reasons[key] = f"derived: {rule}"
    return reasons
