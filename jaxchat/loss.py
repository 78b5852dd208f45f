"""Cross entropy in chunks of tokens, without full logits: for every training stage and for bits per byte.

Axes: B batch, T time, D model width, V vocabulary (padded).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxchat.low_precision import product
from jaxchat.sharding import BATCH_AXES, batch_devices


class LossSpec(NamedTuple):
    """Static settings of the loss."""

    vocab_size: int  # rows of the unembedding beyond it are padding
    softcap: float
    chunk: int  # tokens per chunk on a device, at most
    operands: DTypeLike | None = None  # of the products, None: as x
    mesh: Mesh | None = None  # rows are split over its data and fsdp axes, the vocabulary over tensor


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_loss(
    x: jax.Array, unembedding: jax.Array, targets: jax.Array, weights: jax.Array, spec: LossSpec
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sum of negative log-likelihoods; the logits of one chunk of tokens are alive at a time.

    Logits are `softcap * tanh(x W^T / softcap)` in float32. Where gradients are taken of a bfloat16 x, the tanh is
    rounded to bfloat16 (0.03 of a logit at most): in this form it lies in memory. On a mesh every device runs its own
    rows and the gradient to W is reduced once.

    Args:
      x: (B, T, D) final activations; unembedding: (V, D) float32, cast to x's dtype for the products.
      targets: (B, T) int; weights: (B, T) float32.

    Returns:
      sum(weights * nll), a float32 scalar, and nll (B, T) float32 in nats. Gradients (to x and unembedding, the
      latter accumulated in float32) flow through the sum only: the forward pass forms them at once, so nothing is
      recomputed and only they are kept.
    """
    return _run(x, unembedding, targets, weights, spec, with_gradients=False)[:2]


def _forward(x, unembedding, targets, weights, spec):
    total, nll, dx, dw = _run(x, unembedding, targets, weights, spec, with_gradients=True)
    return (total, nll), (dx, dw, nll)


def _backward(spec, residuals, cotangents):
    dx, dw, nll = residuals
    scale = cotangents[0]
    return dx * scale.astype(dx.dtype), dw * scale, None, nll * scale


chunked_loss.defvjp(_forward, _backward)


def _run(x, unembedding, targets, weights, spec, with_gradients):
    """Return (sum, nll, gradient to x, gradient to the unembedding); None for gradients not asked for."""
    w, mesh = unembedding.astype(x.dtype), spec.mesh
    if mesh is None or mesh.size == 1:
        return _local(x, w, targets, weights, spec, with_gradients)
    scatter = w.shape[0] % (batch_devices(mesh) * mesh.shape["tensor"]) == 0

    def local(x, w, targets, weights):
        total, nll, dx, dw = _local(x, w, targets, weights, spec, with_gradients)
        if with_gradients:
            reduce = functools.partial(jax.lax.psum_scatter, tiled=True) if scatter else jax.lax.psum
            dw = reduce(dw, BATCH_AXES)
        return jax.lax.psum(total, BATCH_AXES), nll, dx, dw

    rows, of_dw = P(BATCH_AXES), P(("tensor", *BATCH_AXES)) if scatter else P("tensor")
    out_specs = (P(), rows, *((rows, of_dw) if with_gradients else (None, None)))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, P("tensor"), rows, rows), out_specs=out_specs, check_vma=False
    )
    return run(x, w, targets, weights)


def _local(x, w, targets, weights, spec, with_gradients):
    """Scan over chunks of one device's tokens; w (V, D) can be this device's part of the vocabulary."""
    (B, T, _), V = x.shape, w.shape[0]
    split_vocab = spec.mesh is not None and spec.mesh.shape["tensor"] > 1
    everywhere = functools.partial(jax.lax.psum, axis_name="tensor") if split_vocab else lambda a: a
    ids = jnp.arange(V) + (jax.lax.axis_index("tensor") * V if split_vocab else 0)
    padded = split_vocab or spec.vocab_size != V
    # capped logits of a training step in bfloat16: half of what the loss moves; evaluation keeps float32
    narrow = with_gradients and x.dtype == jnp.bfloat16
    chunks = -(-B * T // spec.chunk)
    operands, turned = spec.operands or x.dtype, spec.operands is not None
    length = -(-B * T // chunks)
    length += length % 2 if turned else 0  # the last chunk is filled with tokens of weight 0

    def split(a):
        flat = a.reshape(B * T, *a.shape[2:])
        filled = jnp.pad(flat, ((0, chunks * length - B * T), *((0, 0),) * (flat.ndim - 1)))
        return filled.reshape(chunks, length, *a.shape[2:])

    def join(a):
        return a.reshape(chunks * length, *a.shape[2:])[: B * T].reshape(B, T, *a.shape[2:])

    def halves(a):
        return a.reshape(2, length // 2, -1)

    def step(dw, chunk):
        xc, target, weight = chunk
        z = product("td,vd->tv", xc, w, operands)
        s = jnp.tanh(z / spec.softcap)
        if narrow:  # without the barrier XLA drops the rounding and keeps float32
            s = jax.lax.optimization_barrier(s.astype(x.dtype)).astype(jnp.float32)
        # the cap bounds the logits, so a constant replaces the row maximum of the softmax
        e = jnp.exp(spec.softcap * (s - 1.0))
        if padded:
            e = jnp.where(ids < spec.vocab_size, e, 0.0)
        total = everywhere(e.sum(axis=-1))
        if split_vocab:
            at_target = everywhere(jnp.where(target[:, None] == ids, s, 0.0).sum(axis=-1))
        else:
            at_target = jnp.take_along_axis(s, target[:, None], axis=-1)[:, 0]
        nll = jnp.log(total) + spec.softcap * (1.0 - at_target)
        if not with_gradients:
            return dw, (nll, None)
        p = e * (weight / total)[:, None]
        dz = ((p - jnp.where(target[:, None] == ids, weight[:, None], 0.0)) * (1.0 - s * s)).astype(operands)
        dx = everywhere(jnp.einsum("tv,vd->td", dz, w.astype(operands), preferred_element_type=x.dtype))
        if turned:  # two contracted axes: XLA turns the smaller side, and the product has its kernel (`low_precision`)
            dw = dw + product("htd,htv->dv", halves(xc), halves(dz), operands)
        else:
            dw = dw + product("tv,td->vd", dz, xc, operands)
        return dw, (nll, dx)

    dw = jnp.zeros(w.shape[::-1] if turned else w.shape, jnp.float32) if with_gradients else None
    dw, (nll, dx) = jax.lax.scan(step, dw, (split(x), split(targets), split(weights)))
    nll = join(nll)
    if turned and dw is not None:  # without the barrier XLA may turn the product itself, into a form that it cannot run
        dw = jax.lax.optimization_barrier(dw).T
    return jnp.sum(nll * weights), nll, None if dx is None else join(dx), dw
