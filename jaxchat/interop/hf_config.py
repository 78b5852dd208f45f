"""`config.json` of Hugging Face's NanoChat, and of our own architecture for what that one cannot hold."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from jaxchat.config import ModelConfig
from jaxchat.errors import DataError, UsageError
from jaxchat.model.layout import mlp_width, value_layers, windows
from jaxchat.recipes import resolve_model
from jaxchat.text.tokenizer import ASSISTANT_END, Tokenizer

ARCHITECTURES = {"nanochat": "NanoChatForCausalLM", "jaxchat": "JaxchatForCausalLM"}
FORMAT = 1  # of our own architecture's config.json
MODULE = "modeling_jaxchat"
# ours -> theirs, where the meaning is the same
SHARED = {
    "depth": "num_hidden_layers", "seq_len": "max_position_embeddings", "vocab_size": "vocab_size",
    "width": "hidden_size", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "head_width": "head_dim", "tie_embeddings": "tie_word_embeddings", "softcap": "final_logit_softcapping",
    "norm_eps": "rms_norm_eps",
}  # fmt: skip
# of our own architecture only, under our names
OWN = (
    "recipe", "mlp_factor", "window_pattern", "window_short", "qk_scale", "value_embeddings", "residual_scalars",
    "smear", "backout",
)  # fmt: skip
# what the stock architecture always is
STOCK = {"hidden_act": "relu2", "attention_bias": False, "attention_dropout": 0.0}


def extras(config: ModelConfig) -> list[str]:
    """What a model has that Hugging Face's NanoChat cannot hold."""
    found = [n for n in ("value_embeddings", "residual_scalars", "smear", "backout") if getattr(config, n)]
    if config.qk_scale != 1:
        found.append(f"qk_scale {config.qk_scale:g}")
    if any(size < config.seq_len for size in windows(config)):
        found.append(f"short windows ({config.window_pattern})")
    return found


def architecture_of(config: ModelConfig, wanted: str = "auto") -> str:
    """The stock "nanochat" where it can hold the model, else "jaxchat"; `UsageError` if it is wanted and cannot."""
    more = extras(config)
    if wanted == "nanochat" and more:
        raise UsageError(
            f"Hugging Face's NanoChat has no {', '.join(more)}, and the model would be another without; "
            "export it with --architecture jaxchat, which brings its own code"
        )
    return ("jaxchat" if more else "nanochat") if wanted == "auto" else wanted


def token_ids(tokenizer: Tokenizer, chats: bool) -> dict[str, Any]:
    """What begins a text, ends an answer (of a base model: a document), and fills a batch."""
    end = tokenizer.special[ASSISTANT_END] if chats else tokenizer.bos
    return {"bos_token_id": tokenizer.bos, "eos_token_id": end, "pad_token_id": end}


def to_hf(config: ModelConfig, architecture: str, dtype: str, ids: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of a resolved model."""
    shared = {theirs: getattr(config, ours) for ours, theirs in SHARED.items()}
    found = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "dtype": dtype,
        **shared,
        "intermediate_size": mlp_width(config),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "use_cache": True,
        **ids,
    }
    if architecture == "nanochat":
        return found | STOCK | {"initializer_range": 0.02}
    own = {name: getattr(config, name) for name in OWN}
    layers = {"layer_windows": windows(config), "value_embedding_layers": value_layers(config)}
    classes = {"AutoConfig": f"{MODULE}.JaxchatConfig", "AutoModelForCausalLM": f"{MODULE}.JaxchatForCausalLM"}
    return found | {"jaxchat_format": FORMAT, "auto_map": classes} | own | layers


def from_hf(found: Any, source: object) -> ModelConfig:
    """The resolved model of a `config.json`; `DataError` names `source` and what it says that cannot be run here."""
    try:
        return _from_hf(found, source)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{source}: holds values that cannot be ({error})") from None


def _from_hf(found: Any, source: object) -> ModelConfig:
    if not isinstance(found, dict) or str(found.get("model_type")) not in ARCHITECTURES:
        kind = found.get("model_type", found.get("architectures")) if isinstance(found, dict) else None
        raise DataError(f"{source}: is of the architecture {kind!r}; only nanochat and jaxchat can be read")
    stock = found["model_type"] == "nanochat"
    if not stock and found.get("jaxchat_format") != FORMAT:
        raise DataError(f"{source}: jaxchat_format {found.get('jaxchat_format')!r}; this version reads {FORMAT}")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    for key, value in (STOCK if stock else {}).items():
        if found.get(key, value) != value:
            raise DataError(f"{source}: {key} is {found[key]!r}; only {value!r} can be run here")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise DataError(f"{source}: rope_type {rope.get('rope_type')!r}; only 'default' can be run here")
    values: dict[str, Any] = {ours: found[theirs] for ours, theirs in SHARED.items() if found.get(theirs) is not None}
    values["rotary_base"] = rope.get("rope_theta", found.get("rope_theta", 10_000.0))
    if found.get("final_logit_softcapping", 15.0) is None:
        raise DataError(f"{source}: final_logit_softcapping is null; logits are always capped here")
    if stock:
        values |= {"recipe": "classic", "norm_eps": found.get("rms_norm_eps", 1e-6)}
    else:
        values |= {name: found[name] for name in OWN if name in found}
    _check_types(values, source)
    if stock and isinstance(inner := found.get("intermediate_size", 4 * values["width"]), int):
        values["mlp_factor"] = inner / values["width"]
    try:
        config = resolve_model(ModelConfig(**values))
    except UsageError as error:
        raise DataError(f"{source}: {error}") from None
    for key, own in (("layer_windows", windows(config)), ("value_embedding_layers", value_layers(config))):
        if not stock and found.get(key) != own:
            raise DataError(f"{source}: {key} is {found.get(key)!r}, where its other settings make it {own}")
    if mlp_width(config) != found.get("intermediate_size", mlp_width(config)) or mlp_width(config) < 1:
        raise DataError(f"{source}: intermediate_size is {found.get('intermediate_size')!r}, not {mlp_width(config)}")
    return config


def _check_types(values: dict[str, Any], source: object) -> None:
    kinds = typing.get_type_hints(ModelConfig)
    for field in dataclasses.fields(ModelConfig):
        if field.name not in values:
            continue
        kind, value = kinds[field.name], values[field.name]
        wrong = not isinstance(value, (int, float) if kind is float else kind)
        if wrong or (kind in (int, float) and (isinstance(value, bool) or value <= 0)):
            raise DataError(f"{source}: {SHARED.get(field.name, field.name)} is {value!r}, which cannot be")
        if kind is float:
            values[field.name] = float(value)
    needed = {"depth", "vocab_size", "width", "n_heads"} - values.keys()
    if needed:
        raise DataError(f"{source}: lacks {', '.join(sorted(SHARED[n] for n in needed))}")
