"""Everything about a run that follows from its model: tokens, batch, steps and rates, each with its reason."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxchat.config import Config, ModelConfig, OptimConfig, TrainConfig, flatten
from jaxchat.errors import UsageError
from jaxchat.sizes import count_parameters

# The two recipes, and every shape that follows from the depth.


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


def is_derived(value: Any) -> bool:
    """True where a field still says "derive me"."""
    return value is None or value == "auto" or (type(value) in (int, float) and value == -1)


def fill(section: Any, values: dict[str, Any]) -> Any:
    """Copy of a dataclass with its still derived fields among `values` filled."""
    return dataclasses.replace(section, **{k: v for k, v in values.items() if is_derived(getattr(section, k))})


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Every shape from the depth: width 64 a layer, heads of 128, no sharing of kv heads, short windows of T/4.

    The aspect ratio 64 and the head width 128 are nanochat's; a short window is T/4 rounded up to the 128 positions
    of an attention kernel's tile. Raises `UsageError` for shapes that cannot be.
    """
    if model.recipe not in RECIPES:
        raise UsageError(f"model.recipe: {model.recipe!r} is unknown; choose from {', '.join(RECIPES)}")
    for name in ("depth", "seq_len", "vocab_size", "width", "n_heads", "n_kv_heads", "head_width"):
        value = getattr(model, name)
        if value < 1 and not (value == -1 and name not in ("depth", "seq_len", "vocab_size")):
            raise UsageError(f"model.{name}: must be at least 1, not {value}")
    given_width, given_heads, given_head = model.width, model.n_heads, model.head_width
    if given_width == -1:
        given_width = given_heads * given_head if given_heads > 0 and given_head > 0 else 64 * model.depth
    head_width = given_head if given_head > 0 else (given_width // given_heads if given_heads > 0 else 128)
    if given_head == -1 and given_heads == -1:
        if model.width == -1:
            given_width = -(-given_width // head_width) * head_width  # the width is a multiple of the head width
        elif given_width % head_width:
            raise UsageError(
                f"model.width: {given_width} is no multiple of the head width {head_width}; "
                f"set model.head_width or model.n_heads, or take {-(-given_width // head_width) * head_width}"
            )
    n_heads = given_heads if given_heads > 0 else -(-given_width // head_width)
    model = fill(model, {"width": given_width, "head_width": head_width, "n_heads": n_heads, "n_kv_heads": n_heads})
    model = fill(model, RECIPES[model.recipe]["model"])
    model = fill(model, {"window_short": -(-model.seq_len // 4 // 128) * 128})
    _check_model(model)
    return model


def _check_model(model: ModelConfig) -> None:
    if model.n_heads % model.n_kv_heads:
        raise UsageError(f"model.n_kv_heads: {model.n_kv_heads} does not divide the {model.n_heads} heads")
    if model.head_width % 2:
        raise UsageError(f"model.head_width: {model.head_width} is odd; rotary embeddings turn pairs")
    if not model.window_pattern or set(model.window_pattern) - set("SL"):
        raise UsageError(f"model.window_pattern: {model.window_pattern!r} may only hold S and L")
    if model.width < 24 and (model.smear or model.value_embeddings):
        raise UsageError(f"model.width: {model.width} is below the 24 channels that gate smear and value embeddings")
    if model.attention not in ("auto", "cudnn", "splash", "blocked", "xla"):
        raise UsageError(
            f"model.attention: {model.attention!r} is unknown; choose from auto, cudnn, splash, blocked, xla"
        )


REFERENCE_BATCH = 2**19  # tokens a step: where nanochat tuned its rates, at depth 12
SMALL_BATCH_POWER = 0.125  # of the rate below that batch; see `rate_scale`
SIZED = "fitted to the amount of text"
BYTES_PER_TOKEN = 5  # of text: 4.6 to 4.8 with 32,768 tokens on web text, less with fewer; the rest is reserve
DROPPED = 600  # tokens: rows of T keep T / (T + 600) of web text whose rests are dropped (docs/data.md)
ADAMW = {"weight_decay": 0.1, "warmup_steps": 200, "warmdown_ratio": 1.0, "final_lr": 0.1, "grad_clip": 1.0}


# Smallest and largest value of a key, where not every number makes sense (-1 stays where it means "derived").
INFINITE = float("inf")
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "model.depth": (1, 10_000),
    "model.seq_len": (1, 2**24),
    "model.vocab_size": (1, 2**31),
    "model.width": (1, 2**20),
    "model.n_heads": (1, 2**16),
    "model.n_kv_heads": (1, 2**16),
    "model.head_width": (1, 2**16),
    "model.window_short": (0, 2**24),
    "model.mlp_factor": (0.01, 1000),
    "model.softcap": (0.01, 40),  # the loss subtracts the cap, not the maximum, and exp(-2 * 40) is not yet zero
    "model.norm_eps": (0, 1),
    "model.rotary_base": (1, INFINITE),
    "model.qk_scale": (0, INFINITE),
    "data.val_fraction": (0, 0.9),
    "data.text_bytes": (0, INFINITE),
    "data.workers": (1, INFINITE),
    "train.steps": (1, INFINITE),
    "train.token_ratio": (1e-6, INFINITE),
    "train.batch_tokens": (1, INFINITE),
    "train.device_batch_rows": (1, INFINITE),
    "train.checkpoint_every": (1, INFINITE),
    "train.keep_last": (1, INFINITE),
    "train.keep_every": (0, INFINITE),
    "train.eval_every": (0, INFINITE),
    "train.eval_rows": (1, INFINITE),
    "train.sample_every": (0, INFINITE),
    "train.loss_chunk": (1, INFINITE),
    "train.scan_unroll": (1, INFINITE),
    "train.max_bad_steps": (1, INFINITE),
    "optim.lr_scale": (1e-9, INFINITE),
    "optim.matrix_lr": (0, INFINITE),
    "optim.unembedding_lr": (0, INFINITE),
    "optim.embedding_lr": (0, INFINITE),
    "optim.scalar_lr": (0, INFINITE),
    "optim.mixing_lr": (0, INFINITE),
    "optim.adamw_lr": (0, INFINITE),
    "optim.weight_decay": (0, INFINITE),
    "optim.warmup_steps": (0, INFINITE),
    "optim.warmdown_ratio": (0, 1),
    "optim.final_lr": (0, 1),
    "optim.grad_clip": (0, INFINITE),
    "optim.momentum": (0, 1),
    "optim.momentum_warmup_steps": (0, INFINITE),
    "optim.ns_steps": (1, 20),
    "sft.epochs": (1e-6, INFINITE),
    "sft.lr_ratio": (0, INFINITE),
    "sft.warmdown_ratio": (0, 1),
    "sft.batch_tokens": (1, INFINITE),
    "sft.eval_every": (0, INFINITE),
    "sft.exam_cases": (0, INFINITE),
    "rl.steps": (1, INFINITE),
    "rl.epochs": (1e-6, INFINITE),
    "rl.prompts": (1, INFINITE),
    "rl.samples": (2, INFINITE),  # one alone has nothing to be compared with
    "rl.max_tokens": (1, INFINITE),
    "rl.temperature": (1e-3, 10),  # greedy answers of a group are all the same
    "rl.top_k": (0, INFINITE),
    "rl.format_bonus": (0, 1),
    "rl.lr_ratio": (0, INFINITE),
    "rl.eval_every": (0, INFINITE),
    "rl.eval_prompts": (1, INFINITE),
    "rl.eval_samples": (1, INFINITE),
    "rl.checkpoint_every": (1, INFINITE),
    "rl.slots": (1, 4096),
    "eval.max_per_task": (0, INFINITE),
    "eval.rows": (1, INFINITE),
    "eval.batch_rows": (1, INFINITE),
    "eval.sample_tokens": (1, INFINITE),
    "eval.sample_prompts": (0, INFINITE),
    "eval.sample_temperatures": (0, 10),
    "eval.samples": (0, 1024),
    "eval.temperature": (1e-3, 10),
    "eval.overlap_documents": (-1, INFINITE),
    "serve.port": (0, 65_535),
    "serve.slots": (1, 4096),
    "serve.max_tokens": (1, INFINITE),
    "serve.temperature": (0, 10),
    "serve.top_k": (0, INFINITE),
    "serve.queue_length": (0, INFINITE),
    "serve.requests_per_minute": (0, INFINITE),
    "serve.max_messages": (1, INFINITE),
    "serve.message_chars": (1, INFINITE),
    "serve.total_chars": (1, INFINITE),
    "serve.body_bytes": (1_000, 2**31),
    "serve.drain_seconds": (0, 86_400),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "tokenizer.normalize": ("none", "nfc"),
    "data.engine": ("local", "ray"),
    "data.remainder": ("auto", "keep", "continue", "drop"),
    "train.compute_dtype": ("auto", "float32", "bfloat16", "float16"),
    "train.matmul": ("plain", "fp8"),
    "train.remat": ("none", "names", "dots", "full"),
    "optim.kind": ("muon", "adamw"),
    "tasks.sandbox": ("auto", "strict"),
    "serve.language": ("auto", "en", "ko"),
}
MAY_BE_DERIVED = {key for key, value in flatten(Config()).items() if is_derived(value)}


def check_ranges(config: Config) -> None:
    """`UsageError` names the first key whose value makes no sense."""
    for key, value in flatten(config).items():
        low, high = RANGES.get(key, (-INFINITE, INFINITE))
        derived = key in MAY_BE_DERIVED and is_derived(value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not derived and not low <= number <= high:
                bound = f"at least {low:g}" if number < low else f"at most {high:g}"
                raise UsageError(f"{key}: must be {bound}, not {number}")
    if not config.eval.sample_temperatures:
        raise UsageError("eval.sample_temperatures: needs at least one number")
    if len(config.optim.momentum) != 3:
        raise UsageError("optim.momentum: needs three numbers: at the first step, after the warm-up, at the last step")
    for key, choices in CHOICES.items():
        if flatten(config)[key] not in choices:
            raise UsageError(f"{key}: {flatten(config)[key]!r} is unknown; choose from {', '.join(choices)}")


def resolve(config: Config) -> Config:
    """The configuration with nothing left to derive (but what the device decides). Raises `UsageError`."""
    check_ranges(config)
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
    if "hf:" in data.source:  # of files at hand everything is read
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
    """Optimizer of SFT and RL: every rate of pretraining times `ratio`, down to 0, without weight decay.

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
        "model.depth": SIZED,
        "model.vocab_size": SIZED,
        "model.seq_len": SIZED,
        "data.text_bytes": f"tokens of the horizon x {BYTES_PER_TOKEN}, and what dropped rests take",
        "train.batch_tokens": "2^19 (tokens / tokens of d12)^0.383, a power of two; 2^19 for classic",
        "train.steps": SIZED if given.data.size_model else "token_ratio x scaling parameters / batch_tokens",
        "optim.lr_scale": "(batch / 2^19)^(1/2), below 2^19 tokens ^(1/8)",
        "optim.weight_decay": f"{recipe}; rate x decay x steps as at d12",
        "sft.batch_tokens": "as in pretraining",
    }
    changed = [key for key in after if before[key] != after[key]]
    return {key: "derived: " + reasons.get(key, recipe) for key in changed}
