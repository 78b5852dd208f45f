"""Pure functions over one layer's parameters, and what comes before and after the layers.

Axes: B batch, T time, H query heads, K kv heads, N head width, D width, V vocabulary. Papers: rotary 2104.09864, relu
squared 2109.08668, QK-norm 2010.04245, value residual 2410.17897.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxchat.config import ModelConfig
from jaxchat.model.layout import SMEAR_CHANNELS, VE_GATE_CHANNELS

Params = dict[str, Any]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Dot = Callable[[jax.Array, jax.Array], jax.Array]


def block(
    config: ModelConfig,
    p: dict[str, jax.Array],
    x: jax.Array,
    x0: jax.Array,
    tokens: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Attend,
    dot: Dot = jnp.matmul,
) -> jax.Array:
    """One layer on x (B, T, D).

    `p` holds its own slices, `attend` maps q (B, T, H, N), k, v (B, T, K, N) to y, `dot` multiplies by a kernel.
    """
    B, T, _ = x.shape
    c, N, dtype = config, config.head_width, x.dtype
    if c.residual_scalars:
        x = (p["residual_scale"] * x.astype(jnp.float32) + p["x0_scale"] * x0.astype(jnp.float32)).astype(dtype)
    h = norm(x, c.norm_eps)
    q, k, v = (checkpoint_name(dot(h, p[name]), name).reshape(B, T, -1, N) for name in "qkv")
    if "value_embedding" in p:
        gate = 3 * jax.nn.sigmoid(h[..., :VE_GATE_CHANNELS] @ p["ve_gate"])  # (B, T, K), near 1.5 at the start
        v = v + gate[..., None] * lookup(p["value_embedding"], tokens).reshape(v.shape)
    q = norm(rotate(q, cos_sin), c.norm_eps) * c.qk_scale
    k = norm(rotate(k, cos_sin), c.norm_eps) * c.qk_scale
    y = checkpoint_name(attend(q, k, v), "attention").reshape(B, T, c.n_heads * N)
    x = checkpoint_name(x + dot(y, p["o"]), "middle")
    h = checkpoint_name(dot(norm(x, c.norm_eps), p["fc"]), "mlp")
    return x + dot(jnp.square(jax.nn.relu(h)), p["proj"])


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows (..., D) of table (V, D) at tokens (...); the gradient adds up in float32, whatever the table's dtype.

    A frequent token has thousands of rows to add, which bfloat16's 8 bits would swallow.
    """
    return _lookup(table.shape, table.dtype, table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(shape: tuple[int, int], dtype: jnp.dtype, table: jax.Array, tokens: jax.Array) -> jax.Array:
    return table[tokens]


def _lookup_backward(shape: tuple[int, int], dtype: jnp.dtype, tokens: jax.Array, g: jax.Array) -> tuple[Any, None]:
    return jnp.zeros(shape, jnp.float32).at[tokens].add(g.astype(jnp.float32)).astype(dtype), None


_lookup.defvjp(lambda shape, dtype, table, tokens: (table[tokens], tokens), _lookup_backward)


def unembedding(params: Params) -> jax.Array:
    """(V, D); the embedding itself where the two are tied."""
    return params["unembedding"] if "unembedding" in params else params["embedding"]


def embed(
    config: ModelConfig, params: Params, tokens: jax.Array, previous: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(x, e) both (B, T, D): the normed embedding with the token before smeared in, and without.

    `previous` (B, D) is the normed embedding before the first position (decoding); zeros or None at a start.
    """
    e = norm(lookup(params["embedding"], tokens), config.norm_eps)
    if not config.smear:
        return e, e
    first = jnp.zeros_like(e[:, :1]) if previous is None else previous[:, None].astype(e.dtype)
    before = jnp.concatenate([first, e[:, :-1]], axis=1)
    gate = params["smear_scale"] * jax.nn.sigmoid(e[..., :SMEAR_CHANNELS] @ params["smear_gate"]).astype(jnp.float32)
    return (e + gate * before).astype(e.dtype), e


def finish(config: ModelConfig, params: Params, x: jax.Array, middle: jax.Array) -> jax.Array:
    """Last steps of the trunk: subtract the middle layer's output, norm."""
    if config.backout:
        mixed = x.astype(jnp.float32) - params["backout_scale"] * middle.astype(jnp.float32)
        return norm(mixed, config.norm_eps).astype(x.dtype)
    return norm(x, config.norm_eps)


def logits(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """Softcapped float32 logits (..., V) of activations (..., D), cropped to the vocabulary."""
    w = unembedding(params)[: config.vocab_size].astype(x.dtype)
    z = jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)
    return config.softcap * jnp.tanh(z / config.softcap)


def norm(x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis without weights, computed in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rotary(config: ModelConfig, positions: jax.Array, dtype: jnp.dtype | type) -> tuple[jax.Array, jax.Array]:
    """cos and sin (B, T, 1, N/2) of positions (B, T)."""
    frequency = config.rotary_base ** (-jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn (B, T, heads, N) by minus theta, halves split: the convention of karpathy's and Hugging Face's weights."""
    cos, sin = cos_sin
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)
