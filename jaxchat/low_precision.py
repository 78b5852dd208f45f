"""Numbers of 8 and 16 bits: bfloat16 operands on CPUs, fp8 training, int8 weights for serving, float16's loss scale."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxchat.config import Config
from jaxchat.sharding import platform

# Products on a CPU. With units for it, products of bfloat16 operands with float32 sums take half the time of float32
# ones, in forms that XLA has a kernel for: the left side contracts its last axis, the right side its first or last.


@functools.cache
def native_bfloat16() -> bool:
    """Return whether this machine's CPU multiplies bfloat16 numbers itself."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def cpu_operands(config: Config, mesh: Mesh | None) -> DTypeLike | None:
    """Return the dtype of the operands of a training step's products where it is not that of its activations, or None.

    bfloat16 on a CPU that multiplies it itself, unless `train.compute_dtype` asks for float32.
    """
    chosen = config.train.compute_dtype != "auto"
    return None if chosen or mesh is None or platform(mesh) != "cpu" or not native_bfloat16() else jnp.bfloat16


def product(form: str, a: jax.Array, b: jax.Array, operands: DTypeLike) -> jax.Array:
    """Return einsum `form` of a and b as numbers of dtype `operands`, summed up in float32."""
    return jnp.einsum(form, a.astype(operands), b.astype(operands), preferred_element_type=jnp.float32)


@jax.custom_vjp
def bfloat16_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return x (B, T, in) times w (in, out), float32 of bfloat16 operands, as are both products of the gradient."""
    return _bfloat16_forward(x, w)[0]


def _bfloat16_forward(x, w):
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return product("bti,io->bto", x, w, jnp.bfloat16), (x, w)


def _bfloat16_backward(residuals, g):
    x, w = residuals
    # two contracted axes, B and T: XLA turns the left side itself, and the product has its kernel
    return product("bto,io->bti", g, w, jnp.bfloat16), product("bti,bto->io", x, g, jnp.bfloat16)


bfloat16_dot.defvjp(_bfloat16_forward, _bfloat16_backward)

# fp8 training (2209.05433): e4m3 forward, e5m2 gradients, one scale a tensor. The operands of the products are fp8
# themselves. Quantized and widened again, they silently ran in bfloat16 on Hopper.

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def quantize_fp8(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return (x / scale in an fp8 dtype, scale); the largest magnitude becomes the largest fp8 number."""
    top = float(jnp.finfo(dtype).max)
    scale = jnp.maximum(jnp.max(jnp.abs(x)).astype(jnp.float32), 1e-30) / top
    scale = checkpoint_name(scale, "scale")  # a number; computing it again would read the tensor, and ask all devices
    return jnp.clip(x.astype(jnp.float32) / scale, -top, top).astype(dtype), scale


@jax.custom_vjp
def fp8_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return x (..., in) times w (in, out) in the dtype of x; both products of the gradient are fp8 too."""
    return _forward(x, w)[0]


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    (x8, sx), (w8, sw) = quantize_fp8(x, E4M3), quantize_fp8(w, E4M3)
    return _product(x8, w8, ((x.ndim - 1,), (0,)), sx * sw, x.dtype), (x8, sx, w8, sw)


def _backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x8, sx, w8, sw = residuals
    g8, sg = quantize_fp8(g, E5M2)
    rows = tuple(range(g.ndim - 1))
    dx = _product(g8, w8, ((g.ndim - 1,), (1,)), sg * sw, g.dtype)
    return dx, _product(x8, g8, (rows, rows), sx * sg, g.dtype)


fp8_dot.defvjp(_forward, _backward)


def _product(a: jax.Array, b: jax.Array, contract: Any, scale: jax.Array, dtype: Any) -> jax.Array:
    wide = jnp.float32 if dtype == jnp.float16 else dtype  # sums of 448 * 448 would leave float16's range
    y = jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=wide)
    return (y * scale.astype(wide)).astype(dtype)


# int8 serving: half of bfloat16's bytes, and a decoding step reads all of them. Each output channel has its own scale,
# the "absmax" of LLM.int8 (2208.07339) without its treatment of outliers: QK-norm and the norms leave none.

KERNELS = ("q", "k", "v", "o", "fc", "proj")  # the parameters of a layer that are quantized


@jax.tree_util.register_dataclass
@dataclass
class Int8:
    """A kernel: values (in, out) int8 times scale (out,) float32. `x @ kernel` has the dtype of x."""

    values: jax.Array
    scale: jax.Array

    def product(self, x: jax.Array) -> jax.Array:
        """Return x (..., in) times the kernel, float32."""
        return jnp.matmul(x, self.values.astype(x.dtype), preferred_element_type=jnp.float32) * self.scale

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.product(x).astype(x.dtype)


def quantize_int8(weight: jax.Array) -> Int8:
    """Return the nearest `Int8` of weight (in, out)."""
    exact = weight.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(exact).max(axis=0), 1e-12) / 127
    return Int8(jnp.round(exact / scale).astype(jnp.int8), scale)


# Dynamic loss scale for float16 (1710.03740): as large as the gradients allow, halved where they overflow. It is an
# optax transformation without effect on the updates, so that its state is saved, restored and placed like a moment.
# Every optimizer carries it, so that a run can go on in another dtype.

START = 2.0**16  # with 2^19 tokens a step, 1/8 of the summed loss; too large a start only costs a few skipped steps
SMALLEST = 2.0**-8  # what still overflows here is no matter of scale
GROW_AFTER = 1000  # steps in a row without overflow


class LossScaleState(NamedTuple):
    scale: jax.Array  # () float32, multiplies the mean loss
    good: jax.Array  # () int32, steps since the last change
    skipped: jax.Array  # () int32, overflowed steps so far


def dynamic_loss_scale() -> optax.GradientTransformation:
    """Update `LossScaleState` from gradients that the caller has scaled back."""

    def init(params: Any) -> LossScaleState:
        return LossScaleState(jnp.float32(START), jnp.int32(0), jnp.int32(0))

    def update(updates: Any, state: LossScaleState, params: Any = None) -> tuple[Any, LossScaleState]:
        finite = jnp.isfinite(optax.global_norm(updates))
        good = jnp.where(finite, state.good + 1, 0)
        grow = good >= GROW_AFTER
        factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
        scale = jnp.maximum(state.scale * factor, SMALLEST)
        return updates, LossScaleState(scale, jnp.where(grow, 0, good), state.skipped + ~finite)

    return optax.GradientTransformation(init, update)
