"""Products with 8-bit floating-point operands (2209.05433): e4m3 forward, e5m2 gradients, one scale a tensor.

The operands themselves are fp8, not quantized and widened again: that pattern silently ran in bfloat16 on Hopper.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def quantize(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(x / scale in an fp8 dtype, scale): the largest magnitude lands on the largest fp8 number. No state is kept."""
    top = float(jnp.finfo(dtype).max)
    scale = jnp.maximum(jnp.max(jnp.abs(x)).astype(jnp.float32), 1e-30) / top
    scale = checkpoint_name(scale, "scale")  # a number; computing it again would read the tensor, and ask all devices
    return jnp.clip(x.astype(jnp.float32) / scale, -top, top).astype(dtype), scale


@jax.custom_vjp
def fp8_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x (..., in) times w (in, out) in x's dtype; both products of the gradient have fp8 operands too."""
    return _forward(x, w)[0]


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    (x8, sx), (w8, sw) = quantize(x, E4M3), quantize(w, E4M3)
    axis = x.ndim - 1
    return _product(x8, w8, ((axis,), (0,)), sx * sw, x.dtype), (x8, sx, w8, sw)


def _backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x8, sx, w8, sw = residuals
    g8, sg = quantize(g, E5M2)
    rows = tuple(range(g.ndim - 1))
    dx = _product(g8, w8, ((g.ndim - 1,), (1,)), sg * sw, g.dtype)
    return dx, _product(x8, g8, (rows, rows), sx * sg, g.dtype)


fp8_dot.defvjp(_forward, _backward)


def _product(a: jax.Array, b: jax.Array, contract: Any, scale: jax.Array, dtype: Any) -> jax.Array:
    wide = jnp.float32 if dtype == jnp.float16 else dtype  # sums of 448 * 448 would leave float16's range
    y = jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=wide)
    return (y * scale.astype(wide)).astype(dtype)
