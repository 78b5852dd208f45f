"""Forward pass for scoring: rows that hold a prefix and several continuations of it, and logits only where asked for.

The options of a multiple-choice question share nearly all of their tokens, so the prefix runs through the model once
and every continuation attends to it. A row without continuations is an ordinary row.

Axes: B rows, T prefix positions, Q positions for continuations, M questions asked of a batch, V vocabulary, C letters.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxchat.config import ModelConfig
from jaxchat.model.attention import attention, piece_attention
from jaxchat.model.backends import choose_backend
from jaxchat.model.gpt import Trunk, cast_params, through_layers
from jaxchat.model.layers import Params, embed, logits, rotary
from jaxchat.model.layout import scan_groups, score_bound

QUESTION_CHUNK = {"cpu": 256}  # questions whose logits are alive at once
ACCELERATOR_CHUNK = 2048
UNROLLED = 8  # layers; a deeper trunk is a scan, which compiles faster


@jax.tree_util.register_dataclass
@dataclass
class Rows:
    """tokens (B, T + Q) int32, the prefix right-padded to T; length (B,) int32, tokens of the prefix, at least 1.

    Of the continuations: branch (B, Q) int32 says which one a token belongs to, position (B, Q) int32 where it stands
    in its text, before (B, Q) int32 the id of the token before it. Q is 0 for rows without any.
    """

    tokens: Any
    length: Any
    branch: Any
    position: Any
    before: Any


def scoring_params(params: Params, dtype: jnp.dtype | type) -> Params:
    """All weights in the compute dtype, the unembedding too; scalars stay float32."""
    cast = cast_params(params, dtype)
    return cast | {"unembedding": cast["unembedding"].astype(dtype)}


def final_activations(config: ModelConfig, params: Params, rows: Rows) -> jax.Array:
    """(B, T + Q, D) after the last norm; `params` from `scoring_params`."""
    B, Q = rows.branch.shape
    T = rows.tokens.shape[1] - Q
    prefix, tails, dtype = rows.tokens[:, :T], rows.tokens[:, T:], params["embedding"].dtype
    backend, _ = choose_backend(config, dtype, jax.devices()[0], T)
    groups, period = scan_groups(config)
    trunk = Trunk(unroll=groups if groups * period <= UNROLLED else 1, backend=backend)
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    x, _ = embed(config, params, prefix)
    if Q:
        positions = jnp.concatenate([positions, rows.position], axis=1)
        _, previous = embed(config, params, rows.before.reshape(B * Q, 1))
        x_tails, _ = embed(config, params, tails.reshape(B * Q, 1), previous[:, 0])
        x = jnp.concatenate([x, x_tails.reshape(B, Q, -1)], axis=1)

    def attend(window: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        y = attention(q[:, :T], k[:, :T], v[:, :T], window, backend, score_bound(config))
        if not Q:
            return y
        keys, values = (a.swapaxes(1, 2) for a in (k, v))
        tails = piece_attention(q[:, T:], keys, values, _visible(rows, T, window))
        return jnp.concatenate([y, tails], axis=1)

    return through_layers(config, params, x, rows.tokens, rotary(config, positions, dtype), attend, trunk)


def _visible(rows: Rows, T: int, window: int) -> jax.Array:
    """(B, Q, T + Q): what a token of a continuation sees, the prefix and its own continuation up to itself."""
    place = jnp.arange(T)[None, None, :]
    at = rows.position[:, :, None]
    of_prefix = (place < rows.length[:, None, None]) & (at - place <= window)
    distance = at - rows.position[:, None, :]
    own = (rows.branch[:, :, None] == rows.branch[:, None, :]) & (distance >= 0) & (distance <= window)
    return jnp.concatenate([of_prefix, own], axis=2)


@functools.partial(jax.jit, static_argnames="config")
def score_targets(
    config: ModelConfig, params: Params, rows: Rows, where: jax.Array, target: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How likely given tokens are, and whether they are the likeliest.

    Args:
      where: (M,) int32, for each question the flat index into (B, T + Q) of the position that predicts its token;
      target: (M,) int32, the token; count: (1,) int32, how many of the questions are meant, the first ones.

    Returns: nll (M,) float32 in nats and best (M,) bool (the first of equal logits wins); 0 and False beyond `count`.
    """
    x = final_activations(config, params, rows)
    x = x.reshape(-1, x.shape[-1])
    M = where.shape[0]
    chunk = min(M, QUESTION_CHUNK.get(jax.default_backend(), ACCELERATOR_CHUNK))
    spare = -M % chunk
    where, target = (jnp.pad(a, (0, spare)) for a in (where, target))

    def one(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at = jax.lax.dynamic_slice_in_dim(where, i * chunk, chunk)
        to = jax.lax.dynamic_slice_in_dim(target, i * chunk, chunk)
        z = logits(config, params, x[at])
        nll = jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, to[:, None], axis=-1)[:, 0]
        best = jnp.argmax(z, axis=-1) == to
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_, new, i * chunk, 0)
            for all_, new in zip(found, (nll, best), strict=True)
        )  # type: ignore[return-value]

    nothing = jnp.zeros(M + spare, jnp.float32), jnp.zeros(M + spare, bool)
    nll, best = jax.lax.fori_loop(0, -(-count[0] // chunk), one, nothing)
    meant = jnp.arange(M) < count[0]
    return jnp.where(meant, nll[:M], 0.0), best[:M] & meant


@functools.partial(jax.jit, static_argnames="config")
def score_letters(config: ModelConfig, params: Params, rows: Rows, where: jax.Array, letters: jax.Array) -> jax.Array:
    """Float32 logits (B, C) of the ids letters (B, C) after position where (B,) of each row."""
    x = final_activations(config, params, rows)
    last = jnp.take_along_axis(x, where[:, None, None], axis=1)[:, 0]
    z = jnp.einsum("bd,bcd->bc", last, params["unembedding"][letters], preferred_element_type=jnp.float32)
    return config.softcap * jnp.tanh(z / config.softcap)
