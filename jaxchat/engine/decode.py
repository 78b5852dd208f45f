"""A jitted chunk of decoding steps over the first slots.

Everything that differs between requests is an array with one entry per slot, so a new value never compiles anything.
What is compiled depends on (rows, bucket, steps) only. Only ids pass here; text is `turn.py`'s.

Axes: R slots, r rows of one chunk (the first r slots), V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxchat.config import ModelConfig
from jaxchat.engine.sampling import sample
from jaxchat.engine.slots import FORCED, FULL, NO_TOKEN, PAUSED, RUNNING, STOPPED, Params, Slots
from jaxchat.model.cache import decode, layer_capacity

TOP = 20  # alternatives that are reported


@jax.tree_util.register_dataclass
@dataclass
class Made:
    """What a chunk made. tokens (r, steps) int32, NO_TOKEN where a row made none; status (r,) int32.

    Of rows that report, else 0: logprob (r, steps) float32, and the likeliest ids top (r, steps, TOP) int32 with
    theirs, top_logprob float32; NO_TOKEN where the vocabulary has fewer.
    """

    tokens: jax.Array
    status: jax.Array
    logprob: jax.Array
    top: jax.Array
    top_logprob: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "rows", "bucket", "steps", "capacity"), donate_argnames="slots")
def decode_chunk(
    config: ModelConfig, params: Params, slots: Slots, rows: int, bucket: int, steps: int, capacity: int
) -> tuple[Slots, Made]:
    """`steps` decoding steps of the first `rows` slots, on a CPU fewer where none runs any more.

    A row that stops, pauses or is full makes no more tokens and writes nothing. The rows' part of the cache is cut
    out once per chunk, so every step reads only the live bucket.

    Args:
      bucket: cache positions to keep at hand, at least every running row's length after the chunk (or `capacity`).
      capacity: tokens a cache row can hold; the token that would not fit any more is still made.
    """

    def going(state: Any) -> jax.Array:
        i, part, _ = state
        # to ask costs a GPU a pause at every step
        any_runs = jax.lax.platform_dependent(
            part.status, cpu=lambda status: jnp.any(status == RUNNING), default=lambda status: jnp.bool_(True)
        )
        return (i < steps) & any_runs

    def step(state: Any) -> Any:
        i, part, made = state
        part, new = _step(config, params, part, capacity)
        put = jax.lax.dynamic_update_index_in_dim
        return i + 1, part, tuple(put(all_, one, i, 0) for all_, one in zip(made, new, strict=True))

    part = _cut(config, slots, rows, bucket, capacity)
    nothing = (
        jnp.full((steps, rows), NO_TOKEN, jnp.int32),
        jnp.zeros((steps, rows), jnp.float32),
        jnp.zeros((steps, rows, TOP), jnp.int32),
        jnp.zeros((steps, rows, TOP), jnp.float32),
    )
    _, part, made = jax.lax.while_loop(going, step, (jnp.int32(0), part, nothing))
    tokens, *reported = (a.swapaxes(0, 1) for a in made)
    return _paste(slots, part), Made(tokens, part.status, *reported)


def _step(
    config: ModelConfig, params: Params, slots: Slots, capacity: int
) -> tuple[Slots, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    s, running = slots.settings, slots.status == RUNNING
    logits, cache = decode(config, params, slots.token, slots.cache, running, capacity)
    penalized, seen = _penalize(logits, slots, running)
    sampled = sample(penalized, s.seed, cache.length, s.temperature, s.top_k, s.top_p, s.min_p)
    forcing = running & (slots.forced_next < slots.forced_count)
    queued = jnp.take_along_axis(slots.forced, jnp.minimum(slots.forced_next, FORCED - 1)[:, None], axis=1)[:, 0]
    token = jnp.where(forcing, queued, sampled)
    remaining = slots.remaining - running
    status = jnp.where(~forcing & (token == s.pause), PAUSED, RUNNING)
    status = jnp.where((remaining <= 0) | (cache.length >= capacity), FULL, status)
    status = jnp.where(~forcing & (token[:, None] == s.stop).any(axis=1), STOPPED, status)
    after = Slots(
        cache=cache,
        token=jnp.where(running, token, slots.token),
        status=jnp.where(running, status, slots.status),
        remaining=remaining,
        forced=slots.forced,
        forced_next=slots.forced_next + forcing,
        forced_count=slots.forced_count,
        seen=seen,
        settings=s,
    )
    return after, (jnp.where(running, token, NO_TOKEN), *_report(logits, token, running & s.report))


def _penalize(logits: jax.Array, slots: Slots, running: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(logits that repetitions have lost, seen with the rows' newest tokens); of rows without penalty as they were."""
    penalty = slots.settings.penalty[:, None]
    wanted = running & (penalty[:, 0] != 1)
    rows = jnp.where(wanted, jnp.arange(len(wanted)), len(wanted))
    seen = slots.seen.at[rows, slots.token].set(True, mode="drop")
    lower = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen & wanted[:, None], lower, logits), seen


def _report(logits: jax.Array, token: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logprob, top and top_logprob of one step, as in `Made`."""
    r = len(logits)

    def look() -> tuple[jax.Array, jax.Array, jax.Array]:
        return log_probabilities(logits, token)

    def nothing() -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.zeros(r, jnp.float32), jnp.zeros((r, TOP), jnp.int32), jnp.zeros((r, TOP), jnp.float32)

    return jax.lax.cond(jnp.any(wanted), look, nothing)


def log_probabilities(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of logits (r, V): the token's (r,), the likeliest ids (r, TOP) and theirs."""
    z = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    best, ids = jax.lax.top_k(z, min(TOP, z.shape[-1]))
    spare = ((0, 0), (0, TOP - best.shape[-1]))
    chosen = jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0]
    return chosen, jnp.pad(ids, spare, constant_values=NO_TOKEN), jnp.pad(best, spare)


def _cut(config: ModelConfig, slots: Slots, rows: int, bucket: int, capacity: int) -> Slots:
    """The first rows, and of the caches the first `bucket` positions. A ring that is longer than the bucket has not
    come round yet (no row is longer than the bucket), so its first positions are all it holds."""
    part = jax.tree.map(lambda a: a[:rows], slots)
    sizes = [min(size, bucket) for size in layer_capacity(config, capacity)]
    part.cache.k = tuple(k[:, :, :size] for k, size in zip(part.cache.k, sizes, strict=True))
    part.cache.v = tuple(v[:, :, :size] for v, size in zip(part.cache.v, sizes, strict=True))
    return part


def _paste(slots: Slots, part: Slots) -> Slots:
    def put(into: jax.Array, new: jax.Array) -> jax.Array:
        return new if into.shape == new.shape else jax.lax.dynamic_update_slice(into, new, (0,) * into.ndim)

    return jax.tree.map(put, slots, part)
