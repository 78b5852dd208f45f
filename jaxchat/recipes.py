"""The two recipes, and every shape that follows from the depth."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxchat.config import ModelConfig
from jaxchat.errors import UsageError

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
