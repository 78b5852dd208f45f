"""Kernels of 8-bit integers for serving: half of bfloat16's bytes, and a decoding step reads all of them.

Each output channel has a scale of its own, the channel's largest weight over 127 (the "absmax" of LLM.int8,
2208.07339, without its treatment of outliers: QK-norm and the norm before every kernel leave none).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxchat.config import ModelConfig
from jaxchat.model.layers import Params, unembedding

KERNELS = ("q", "k", "v", "o", "fc", "proj")


@jax.tree_util.register_dataclass
@dataclass
class Int8:
    """values (in, out) int8 times scale (out,) float32."""

    values: jax.Array
    scale: jax.Array


def quantize(weight: jax.Array) -> Int8:
    """The nearest `Int8` of weight (in, out)."""
    exact = weight.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(exact).max(axis=0), 1e-12) / 127
    return Int8(jnp.round(exact / scale).astype(jnp.int8), scale)


def dot(x: jax.Array, weight: jax.Array | Int8) -> jax.Array:
    """x (..., in) times a kernel, in the dtype of x."""
    if not isinstance(weight, Int8):
        return jnp.matmul(x, weight)
    y = jnp.matmul(x, weight.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * weight.scale).astype(x.dtype)


def logits(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """As `layers.logits`: softcapped float32 (..., V) of activations (..., D); `params` from `serving_params`."""
    if "output" in params:  # (D, V)
        quantized: Int8 = params["output"]
        z = jnp.matmul(x, quantized.values.astype(x.dtype), preferred_element_type=jnp.float32) * quantized.scale
    else:
        table = unembedding(params)
        table = table if len(table) == config.vocab_size else table[: config.vocab_size]
        z = jnp.einsum("...d,vd->...v", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
    return config.softcap * jnp.tanh(z / config.softcap)
