"""The configuration of jaxchat's GPT for transformers, apart from the model: loading the tokenizer needs no torch."""

from __future__ import annotations

from transformers import PreTrainedConfig


class JaxchatConfig(PreTrainedConfig):
    """`layer_windows`: how many tokens before its own a layer sees; `value_embedding_layers`: which have a table.

    Before transformers made configurations dataclasses, these were class attributes like any other.
    """

    model_type = "jaxchat"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (as the base class has it)
    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    head_dim: int = 128
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1.1920929e-7
    final_logit_softcapping: float = 15.0
    qk_scale: float = 1.2
    residual_scalars: bool = True
    smear: bool = True
    bigram_rows: int = 0
    key_offset: bool = False
    backout: bool = True
    layer_windows: list[int] | None = None
    value_embedding_layers: list[int] | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
