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
import numpy as np
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
    merge: bool = False,
) -> jax.Array:
    """One layer on x (B, T, D).

    `p` holds its own slices, `attend` maps q (B, T, H, N), k, v (B, T, K, N) to y, `dot` multiplies by a kernel.
    `merge`: the gradients of the products for q, k and v are made together.
    """
    B, T, _ = x.shape
    c, N, dtype = config, config.head_width, x.dtype
    if c.residual_scalars:
        x = (p["residual_scale"] * x.astype(jnp.float32) + p["x0_scale"] * x0.astype(jnp.float32)).astype(dtype)
    h = norm(x, c.norm_eps, "attention_in")
    kernels = tuple(p[name] for name in "qkv")
    products = _merged(h, kernels) if merge else [dot(h, kernel) for kernel in kernels]
    q, k, v = (y.reshape(B, T, -1, N) for y in products)
    if "value_embedding" in p:
        gate = 3 * jax.nn.sigmoid(h[..., :VE_GATE_CHANNELS] @ p["ve_gate"])  # (B, T, K), near 1.5 at the start
        v = v + gate[..., None] * lookup(p["value_embedding"], tokens).reshape(v.shape)
    v = checkpoint_name(v, "v")
    q = turned_and_normed(q, cos_sin, c.norm_eps, c.qk_scale, "q")
    k = turned_and_normed(k, cos_sin, c.norm_eps, c.qk_scale, "k")
    y = checkpoint_name(attend(q, k, v), "attention").reshape(B, T, c.n_heads * N)
    x = x + dot(y, p["o"])
    if dtype != jnp.bfloat16:  # there the norm's result is kept instead
        x = checkpoint_name(x, "middle")
    h = dot(norm(x, c.norm_eps, "mlp_in"), p["fc"])
    return x + dot(relu_squared(h, "mlp"), p["proj"])


@jax.custom_vjp
def _merged(h: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """h (B, T, D) times several kernels (D, ...). Their gradients side by side make one product to h, not a sum of
    several, and one to the kernels: h and its gradient are read and written once."""
    return tuple(h @ kernel for kernel in kernels)


def _merged_backward(residuals: Any, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    h, kernels = residuals
    g, kernel = (jnp.concatenate(parts, axis=-1) for parts in (gradients, kernels))
    g = jax.lax.optimization_barrier(g)  # or XLA also writes the parts, for the second product
    of_kernel = jnp.einsum("btd,btf->df", h, g)
    splits = np.cumsum([part.shape[-1] for part in kernels])[:-1]
    return jnp.einsum("btf,df->btd", g, kernel), tuple(jnp.split(of_kernel, splits, axis=-1))


_merged.defvjp(lambda h, kernels: (_merged(h, kernels), (h, kernels)), _merged_backward)


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
    x = (e + gate * before).astype(e.dtype)
    # without the barrier XLA drops the rounding, and every layer reads float32
    return jax.lax.optimization_barrier(x) if x.dtype == jnp.bfloat16 else x, e


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


def norm(x: jax.Array, eps: float, name: str = "normed") -> jax.Array:
    """RMSNorm over the last axis without weights, computed in float32; `name` for rematerialization."""
    if x.dtype != jnp.bfloat16:
        return _norm(x, eps)[0]
    return _lean_norm(eps, name, x)


def _norm(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(x / rms(x), 1 / rms(x) in float32)"""
    y = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lean_norm(eps: float, name: str, x: jax.Array) -> jax.Array:
    return _norm(x, eps)[0]


def _lean_norm_forward(eps: float, name: str, x: jax.Array) -> tuple[jax.Array, Any]:
    h, scale = _norm(x, eps)
    h, scale = checkpoint_name(h, name), checkpoint_name(scale, "scale")
    return h, (h, scale)


def _lean_norm_backward(eps: float, name: str, residuals: Any, g: jax.Array) -> tuple[jax.Array]:
    h, scale = (a.astype(jnp.float32) for a in residuals)
    wide = g.astype(jnp.float32)
    return ((scale * (wide - h * jnp.mean(h * wide, axis=-1, keepdims=True))).astype(g.dtype),)


_lean_norm.defvjp(_lean_norm_forward, _lean_norm_backward)


def relu_squared(x: jax.Array, name: str) -> jax.Array:
    """max(x, 0)^2; `name` for rematerialization."""
    if x.dtype != jnp.bfloat16:
        return jnp.square(jax.nn.relu(checkpoint_name(x, name)))
    return _lean_relu_squared(name, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lean_relu_squared(name: str, x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


def _lean_relu_squared_forward(name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = checkpoint_name(jnp.square(jax.nn.relu(x)), name)
    return y, y


def _lean_relu_squared_backward(name: str, y: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return ((2 * jnp.sqrt(y.astype(jnp.float32)) * g.astype(jnp.float32)).astype(g.dtype),)


_lean_relu_squared.defvjp(_lean_relu_squared_forward, _lean_relu_squared_backward)


def turned_and_normed(
    x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], eps: float, scale: float, name: str
) -> jax.Array:
    """QK-norm after rotary positions, times `scale`, of x (B, T, heads, N); `name` for rematerialization."""
    if x.dtype != jnp.bfloat16:
        return norm(rotate(checkpoint_name(x, name), cos_sin), eps) * scale
    return _lean_turn(eps, scale, name, x, *cos_sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _lean_turn(eps: float, scale: float, name: str, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return _turn(eps, scale, x, cos, sin)[0]


def _turn(eps: float, scale: float, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A turn keeps the length, so the norm needs only x: one pass reads it, the next turns and scales it."""
    wide = x.astype(jnp.float32)
    length = scale * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (rotate(wide, (cos, sin)) * length).astype(x.dtype), length


def _lean_turn_forward(
    eps: float, scale: float, name: str, x: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, Any]:
    y, length = _turn(eps, scale, x, cos, sin)
    y, length = checkpoint_name(y, name), checkpoint_name(length, "scale")
    return y, (y, length, cos, sin)


def _lean_turn_backward(
    eps: float, scale: float, name: str, residuals: Any, g: jax.Array
) -> tuple[jax.Array, None, None]:
    y, length, cos, sin = (a.astype(jnp.float32) for a in residuals)
    wide = g.astype(jnp.float32)
    inner = jnp.mean(y * wide, axis=-1, keepdims=True) / scale**2
    return (rotate(length * (wide - y * inner), (cos, -sin)).astype(g.dtype), None, None)


_lean_turn.defvjp(_lean_turn_forward, _lean_turn_backward)


def rotary(config: ModelConfig, positions: jax.Array, dtype: jnp.dtype | type) -> tuple[jax.Array, jax.Array]:
    """cos and sin (B, T, 1, N/2) of positions (B, T); float32 for bfloat16, whose rounding would change lengths."""
    dtype = jnp.float32 if dtype == jnp.bfloat16 else dtype
    frequency = config.rotary_base ** (-jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn (B, T, heads, N) by minus theta, halves split: the convention of karpathy's and Hugging Face's weights."""
    cos, sin = cos_sin
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)
