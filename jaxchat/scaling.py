"""Everything that follows from the depth: shapes, tokens, batch size, steps and learning rates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxchat.config import (
    KEYS,
    SIZED,
    Config,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    check_section,
    flatten,
    is_derived,
)
from jaxchat.errors import UsageError
from jaxchat.sizes import count_parameters

REFERENCE_BATCH = 2**19  # tokens a step: where nanochat tuned its rates, at depth 12
SMALL_BATCH_POWER = 0.125  # of the rate below that batch; see `rate_scale`
BYTES_PER_TOKEN = 5  # of text: 4.6 to 4.8 with 32,768 tokens on web text, less with fewer; the rest is reserve
DROPPED = 600  # tokens: rows of T keep T / (T + 600) of web text whose remainders are dropped (docs/data.md)
ADAMW = {"weight_decay": 0.1, "warmup_steps": 200, "warmdown_ratio": 1.0, "final_lr": 0.1, "grad_clip": 1.0}
# What a recipe sets when the tier does not. Sources: nanochat of October 2025 and of July 2026.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "classic": {
        "model": {
            "rotary_base": 10_000.0, "window_pattern": "L", "qk_scale": 1.0,
            "value_embeddings": False, "residual_scalars": False, "smear": False, "backout": False,
        },
        "train": {"token_ratio": 20.0},
        "optim": {
            "unembedding_lr": 0.004, "embedding_lr": 0.2, "weight_decay": 0.0,
            "warmup_steps": 0, "warmdown_ratio": 0.2, "final_lr": 0.0, "grad_clip": 1.0,
        },
    },
    "modern": {
        "model": {
            "rotary_base": 100_000.0, "window_pattern": "SSSL", "qk_scale": 1.2,
            "value_embeddings": True, "residual_scalars": True, "smear": True, "backout": True,
        },
        "train": {"token_ratio": 12.0},
        "optim": {
            "unembedding_lr": 0.008, "embedding_lr": 0.3, "weight_decay": 0.28,
            "warmup_steps": 40, "warmdown_ratio": 0.65, "final_lr": 0.05, "grad_clip": 0.0,
        },
    },
}  # fmt: skip


def fill(section: Any, values: dict[str, Any]) -> Any:
    """Return a copy of a dataclass in which the fields of `values` that are still derived are filled."""
    return dataclasses.replace(section, **{k: v for k, v in values.items() if is_derived(getattr(section, k))})


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Return the model with every shape: width 64 a layer, heads of 128, one kv head a head, short windows of T/4.

    The aspect ratio 64 and the head width 128 are nanochat's; a short window is T/4 rounded up to the 128 positions
    of an attention kernel's tile. `UsageError` for impossible shapes.
    """
    check_section("model", model)
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
                f"model.width: {width} is no multiple of the head width {head_width}; "
                f"set model.head_width or model.n_heads, or take {heads * head_width}"
            )
    model = fill(model, {"width": width, "head_width": head_width, "n_heads": heads, "n_kv_heads": heads})
    model = fill(model, RECIPES[model.recipe]["model"])
    model = fill(model, {"window_short": -(-model.seq_len // 4 // 128) * 128})
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
    recipe = RECIPES[model.recipe]
    train = fill(config.train, recipe["train"])
    tokens = train.token_ratio * _horizon_parameters(model)
    train = fill(train, {"batch_tokens": batch_tokens(model, tokens, train.token_ratio)})
    _check_batch("train.batch_tokens", train.batch_tokens, model.seq_len)
    train = fill(train, {"steps": max(1, round(tokens / train.batch_tokens))})
    optim = _resolve_optim(config, model, train)
    sft = fill(config.sft, {"batch_tokens": train.batch_tokens})
    _check_batch("sft.batch_tokens", sft.batch_tokens, model.seq_len)
    data = config.data
    if "hf:" in data.source:  # other sources are read whole
        kept = model.seq_len / (model.seq_len + DROPPED) if data.remainder in ("auto", "drop") else 1.0
        data = fill(data, {"text_bytes": round(train.steps * train.batch_tokens * BYTES_PER_TOKEN / kept)})
    return dataclasses.replace(config, model=model, data=data, train=train, optim=optim, sft=sft)


def _check_batch(key: str, tokens: int, seq_len: int) -> None:
    if tokens < seq_len or tokens % seq_len:
        nearest = max(1, round(tokens / seq_len)) * seq_len
        raise UsageError(f"{key}: {tokens} is no multiple of model.seq_len {seq_len}; take {nearest}")


def _resolve_optim(config: Config, model: ModelConfig, train: TrainConfig) -> OptimConfig:
    if config.optim.kind == "adamw":
        return fill(fill(config.optim, ADAMW), {"lr_scale": 1.0, "unembedding_lr": 0.0, "embedding_lr": 0.0})
    optim = config.optim
    defaults = dict(RECIPES[model.recipe]["optim"])
    optim = fill(optim, {"lr_scale": rate_scale(train.batch_tokens)})
    if is_derived(optim.weight_decay):
        # keeps rate x decay x steps constant (2405.13698); with the square-root rule this is nanochat's own formula,
        # whose reference is d12 at the same ratio of tokens to parameters
        reference = train.token_ratio * _horizon_parameters(_reference(model))
        tokens = train.steps * train.batch_tokens
        defaults["weight_decay"] *= (train.batch_tokens / REFERENCE_BATCH) * (reference / tokens) / optim.lr_scale
    return fill(optim, defaults)


def fine_tuning_optim(config: Config, ratio: float) -> OptimConfig:
    """Return the optimizer of SFT and RL: pretraining's rates times `ratio`, down to 0, without weight decay.

    As in nanochat, the rates are those for 2^19 tokens a step, without the factor that pretraining takes for larger
    batches. The factor below 1 for smaller batches stays.
    """
    optim = config.optim
    larger = 1.0 if optim.kind == "adamw" else max(1.0, rate_scale(config.train.batch_tokens))
    return dataclasses.replace(
        optim,
        lr_scale=optim.lr_scale / larger * ratio,
        mixing_lr=optim.mixing_lr * ratio,
        warmup_steps=0,
        final_lr=0.0,
        weight_decay=0.0,
    )


def rate_scale(batch: int) -> float:
    """Return the learning-rate multiplier of a batch of so many tokens.

    Above the reference the square-root rule of nanochat; below it the power 1/8, which meets the optimum known for 2^11
    tokens a step (8 times what the square root gives). Between the two it has not been tested.
    """
    ratio = batch / REFERENCE_BATCH
    return ratio**0.5 if ratio >= 1 else ratio**SMALL_BATCH_POWER


def batch_tokens(model: ModelConfig, tokens: float, token_ratio: float) -> int:
    """Return tokens per step: classic 2^19; modern 2^19 (D / D_d12)^0.383 (2505.13738), to a power of two."""
    if model.recipe == "classic":
        return REFERENCE_BATCH
    reference = token_ratio * _horizon_parameters(_reference(model))
    batch = 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference) ** 0.383))
    return max(batch, model.seq_len)


def _horizon_parameters(model: ModelConfig) -> int:
    """Return the parameters that `token_ratio` multiplies: trunk and unembedding (modern), all (classic)."""
    count = count_parameters(model)
    return count.scaling if model.recipe == "modern" else count.total


def _reference(model: ModelConfig) -> ModelConfig:
    """Return the d12 model with the same vocabulary, where the rates were tuned."""
    return resolve_model(ModelConfig(recipe=model.recipe, depth=12, seq_len=2048, vocab_size=model.vocab_size))


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
