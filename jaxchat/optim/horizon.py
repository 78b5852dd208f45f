"""Everything about a run that follows from its model: tokens, batch, steps and rates, each with its reason."""

from __future__ import annotations

import dataclasses
import math

from jaxchat.config import Config, ModelConfig, flatten
from jaxchat.errors import UsageError
from jaxchat.model.sizes import count_parameters
from jaxchat.recipes import RECIPES, fill, is_derived, resolve_model

REFERENCE_BATCH = 2**19  # tokens a step: where nanochat tuned its rates, at depth 12
SMALL_BATCH_POWER = 0.125  # of the rate below that batch; see `rate_scale`
ADAMW = {"weight_decay": 0.1, "warmup_steps": 200, "warmdown_ratio": 1.0, "final_lr": 0.1, "grad_clip": 1.0}


def resolve(config: Config) -> Config:
    """The configuration with nothing left to derive (but what the device decides). Raises `UsageError`."""
    model = resolve_model(config.model)
    recipe = RECIPES[model.recipe]
    if config.optim.kind not in ("muon", "adamw"):
        raise UsageError(f"optim.kind: {config.optim.kind!r} is unknown; choose from muon, adamw")
    train = fill(config.train, recipe["train"])
    tokens = train.token_ratio * _horizon_parameters(model)
    train = fill(train, {"batch_tokens": batch_tokens(model, tokens, train.token_ratio)})
    if train.batch_tokens < model.seq_len or train.batch_tokens % model.seq_len:
        nearest = max(1, round(train.batch_tokens / model.seq_len)) * model.seq_len
        raise UsageError(
            f"train.batch_tokens: {train.batch_tokens} is no multiple of model.seq_len {model.seq_len}; take {nearest}"
        )
    train = fill(train, {"steps": max(1, round(tokens / train.batch_tokens))})
    if train.steps < 1 or train.device_batch_rows < 1:
        raise UsageError("train.steps and train.device_batch_rows must be at least 1")
    optim = _resolve_optim(config, model, train.batch_tokens, train.steps * train.batch_tokens)
    sft = fill(config.sft, {"batch_tokens": train.batch_tokens})
    return dataclasses.replace(config, model=model, train=train, optim=optim, sft=sft)


def _resolve_optim(config: Config, model: ModelConfig, batch: int, tokens: int):
    if config.optim.kind == "adamw":
        return fill(fill(config.optim, ADAMW), {"lr_scale": 1.0, "unembedding_lr": 0.0, "embedding_lr": 0.0})
    optim = config.optim
    defaults = dict(RECIPES[model.recipe]["optim"])
    optim = fill(optim, {"lr_scale": rate_scale(batch)})
    if is_derived(optim.weight_decay):
        # keeps rate x decay x steps constant (2405.13698); with the square-root rule this is nanochat's own formula
        reference = RECIPES[model.recipe]["train"]["token_ratio"] * _horizon_parameters(_reference(model))
        defaults["weight_decay"] *= (batch / REFERENCE_BATCH) * (reference / tokens) / optim.lr_scale
    return fill(optim, defaults)


def rate_scale(batch: int) -> float:
    """Learning-rate multiplier of a batch of so many tokens.

    Above the reference the square-root rule of nanochat; below it the power 1/8, which meets the optimum known for 2^11
    tokens a step (8 times what the square root gives). Between the two it has not been tested.
    """
    ratio = batch / REFERENCE_BATCH
    return ratio**0.5 if ratio >= 1 else ratio**SMALL_BATCH_POWER


def batch_tokens(model: ModelConfig, tokens: float, token_ratio: float) -> int:
    """Tokens per step: 2^19 for classic; for modern 2^19 (D / D_d12)^0.383 (2505.13738), rounded to a power of two."""
    if model.recipe == "classic":
        return REFERENCE_BATCH
    reference = token_ratio * _horizon_parameters(_reference(model))
    batch = 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference) ** 0.383))
    return max(batch, model.seq_len)


def _horizon_parameters(model: ModelConfig) -> int:
    """Modern counts trunk and unembedding, classic everything (20 tokens each, Chinchilla's rule)."""
    count = count_parameters(model)
    return count.scaling if model.recipe == "modern" else count.total


def _reference(model: ModelConfig) -> ModelConfig:
    """The d12 model with the same vocabulary and context, where the rates were tuned."""
    return resolve_model(ModelConfig(recipe=model.recipe, depth=12, seq_len=2048, vocab_size=model.vocab_size))


def derivations(given: Config, resolved: Config) -> dict[str, str]:
    """For every key that was derived, why it has its value: the comments of the saved configuration."""
    before, after = flatten(given), flatten(resolved)
    recipe = f"{resolved.model.recipe} recipe"
    reasons = {
        "model.width": "64 x depth, a multiple of the head width",
        "model.head_width": "128 as nanochat, or width / heads",
        "model.n_heads": "width / head width",
        "model.n_kv_heads": "as many as query heads",
        "model.window_short": "a quarter of the context, up to a multiple of 128",
        "train.batch_tokens": "2^19 (tokens / tokens of d12)^0.383, a power of two; 2^19 for classic",
        "train.steps": "token_ratio x scaling parameters / batch_tokens",
        "optim.lr_scale": "(batch / 2^19)^(1/2), below 2^19 tokens ^(1/8)",
        "optim.weight_decay": f"{recipe}; rate x decay x steps as at d12",
        "sft.batch_tokens": "as in pretraining",
    }
    changed = [key for key in after if before[key] != after[key]]
    return {key: "derived: " + reasons.get(key, recipe) for key in changed}
