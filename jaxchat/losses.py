"""Cross entropy without full logits: one chunked function for pretraining, SFT and bits per byte.

Axes: B rows, T positions, D width, V vocabulary (padded).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

DEFAULT_CHUNK = {"cpu": 512}  # tokens; fits the caches of a CPU
ACCELERATOR_CHUNK = 8192


class LossSpec(NamedTuple):
    """Static settings of the loss."""

    vocab_size: int  # rows of the unembedding beyond it are padding
    softcap: float
    chunk: int  # tokens per chunk, about


def default_chunk() -> int:
    return DEFAULT_CHUNK.get(jax.default_backend(), ACCELERATOR_CHUNK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_loss(
    x: jax.Array, unembedding: jax.Array, targets: jax.Array, weights: jax.Array, spec: LossSpec
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of negative log-likelihoods, with the logits of one chunk of tokens alive at a time.

    Logits are `softcap * tanh(x W^T / softcap)` in float32.

    Args:
      x: (B, T, D) final activations; unembedding: (V, D) float32, cast to x's dtype for the products.
      targets: (B, T) int; weights: (B, T) float32.

    Returns:
      sum(weights * nll), a float32 scalar, and nll (B, T) float32 in nats. Gradients (to x and unembedding, the
      latter accumulated in float32) flow through the sum only: the forward pass forms them at once, so nothing is
      recomputed and only they are kept.
    """
    total, nll, _, _ = _run(x, unembedding, targets, weights, spec, with_gradients=False)
    return total, nll


def _forward(x, unembedding, targets, weights, spec):
    total, nll, dx, dw = _run(x, unembedding, targets, weights, spec, with_gradients=True)
    return (total, nll), (dx, dw, nll)


def _backward(spec, residuals, cotangents):
    dx, dw, nll = residuals
    scale = cotangents[0]
    return (dx * scale.astype(dx.dtype), (dw * scale), None, nll * scale)


chunked_loss.defvjp(_forward, _backward)


def _run(x, unembedding, targets, weights, spec, with_gradients):
    """Scan over chunks of positions, so that rows keep their sharding."""
    B, T, D = x.shape
    length = _chunk_length(B, T, spec.chunk)
    w = unembedding.astype(x.dtype)
    padding = jnp.arange(w.shape[0]) >= spec.vocab_size if w.shape[0] != spec.vocab_size else None

    def split(a):
        return a.reshape(B, T // length, length, *a.shape[2:]).swapaxes(0, 1)

    def step(dw, chunk):
        xc, target, weight = chunk
        z = jnp.einsum("btd,vd->btv", xc, w, preferred_element_type=jnp.float32)
        s = jnp.tanh(z / spec.softcap)
        # the cap bounds the logits, so a constant replaces the row maximum of the softmax
        e = jnp.exp(spec.softcap * (s - 1.0))
        if padding is not None:
            e = jnp.where(padding, 0.0, e)
        total = e.sum(axis=-1)
        at_target = jnp.take_along_axis(s, target[..., None], axis=-1)[..., 0]
        nll = jnp.log(total) + spec.softcap * (1.0 - at_target)
        if not with_gradients:
            return dw, (nll, None)
        onehot = target[..., None] == jnp.arange(w.shape[0])
        p = e * (weight / total)[..., None]
        dz = ((p - jnp.where(onehot, weight[..., None], 0.0)) * (1.0 - s * s)).astype(x.dtype)
        dx = jnp.einsum("btv,vd->btd", dz, w)
        dw = dw + jnp.einsum("btv,btd->vd", dz, xc, preferred_element_type=jnp.float32)
        return dw, (nll, dx)

    dw = jnp.zeros(w.shape, jnp.float32) if with_gradients else None
    dw, (nll, dx) = jax.lax.scan(step, dw, (split(x), split(targets), split(weights)))
    nll = nll.swapaxes(0, 1).reshape(B, T)
    if with_gradients:
        dx = dx.swapaxes(0, 1).reshape(B, T, D)
    return jnp.sum(nll * weights), nll, dx, dw


def _chunk_length(B: int, T: int, chunk: int) -> int:
    """Positions per chunk: the largest divisor of T that keeps B times it within the chunk."""
    wanted = max(1, chunk // B)
    return max(d for d in range(1, T + 1) if T % d == 0 and d <= max(wanted, 1))
