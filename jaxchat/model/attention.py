"""Causal attention with optional sliding windows: one function, several backends.

Axes: B batch, T time, H query heads, K kv heads (H a multiple of K), N head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxchat.model.splash import splash_attention

BLOCK = 128  # queries per block of the blocked backend
SAFE_SCORE = 40.0  # exp(-2 * 40) is still a normal float32


@jax.named_scope("attention")  # so that a profile can tell its products from others
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    backend: str = "xla",
    score_bound: float = math.inf,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Softmax attention of every position over itself and the `window` positions before it.

    Args:
      q: (B, T, H, N); k, v: (B, T, K, N). `window >= T - 1` is full causal attention.
      backend: "xla", "blocked", "cudnn" (16-bit inputs on an NVIDIA GPU) or "splash" (TPU).
      score_bound: no |q.k| / sqrt(N) is larger; where it is small the blocked backend needs no row maximum.
      mesh: where rows and heads are split, for the backend that XLA cannot split by itself (splash).

    Returns: (B, T, H, N) in the dtype of q.
    """
    if backend == "blocked":
        return _blocked(q, k, v, window, score_bound)
    if backend == "splash":
        return splash_attention(q, k, v, window, mesh)
    # is_causal must stay: a window alone would look into the future (jax issue 39576)
    local = (window, 0) if window < q.shape[1] - 1 else None
    implementation = "cudnn" if backend == "cudnn" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation=implementation)  # type: ignore[call-overload]


def _blocked(q: jax.Array, k: jax.Array, v: jax.Array, window: int, score_bound: float) -> jax.Array:
    """Blocks of queries over the keys they can see only: half the work of a masked square."""
    B, T, H, N = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, H // K, N).transpose(0, 2, 3, 1, 4) * N**-0.5  # (B, K, G, T, N)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # (B, K, T, N)
    blocks = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        first = max(0, start - window)
        scores = jnp.einsum("bkgqn,bksn->bkgqs", q[:, :, :, start:stop], k[:, :, first:stop])
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)
        visible = (distance >= 0) & (distance <= window)
        weights, total = _exp_weights(scores.astype(jnp.float32), visible, score_bound)
        out = jnp.einsum("bkgqs,bksn->bkgqn", weights.astype(v.dtype), v[:, :, first:stop])
        blocks.append((out / total).astype(q.dtype))
    y = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)


def _exp_weights(scores: jax.Array, visible: jax.Array, score_bound: float) -> tuple[jax.Array, jax.Array]:
    """Unnormalized softmax weights and their sum over the last axis.

    QK-norm bounds the scores, so a constant does the row maximum's work: the softmax does not change, one pass less.
    """
    if score_bound <= SAFE_SCORE:
        top = jnp.float32(score_bound)
    else:
        top = jax.lax.stop_gradient(jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1, keepdims=True))
    weights = jnp.exp(jnp.where(visible, scores - top, -jnp.inf))
    return weights, weights.sum(axis=-1, keepdims=True)


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """One query per row over a cache.

    Args:
      q: (R, H, N); k, v: (R, K, S, N); visible: (R, S) bool, at least one True per row.

    Returns: (R, H, N) in the dtype of q.
    """
    R, H, N = q.shape
    K = k.shape[1]
    q = q.reshape(R, K, H // K, N) * N**-0.5
    scores = jnp.einsum("rkgn,rksn->rkgs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkgs,rksn->rkgn", weights, v).reshape(R, H, N)


def piece_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Several queries per row over a cache.

    Args:
      q: (R, T, H, N); k, v: (R, K, S, N); visible: (R, T, S) bool, at least one True per query.

    Returns: (R, T, H, N) in the dtype of q.
    """
    R, T, H, N = q.shape
    K = k.shape[1]
    q = q.reshape(R, T, K, H // K, N) * N**-0.5
    scores = jnp.einsum("rtkgn,rksn->rkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkgts,rksn->rtkgn", weights, v).reshape(R, T, H, N)
