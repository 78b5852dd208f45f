"""Device side of the engine: fixed slots, bucketed prefill, insert, and a jitted chunk of decoding steps.

Everything that differs between requests is an array with one entry per slot, so a new value never compiles anything.
What is compiled depends on (rows, bucket, steps) for decoding and (prompts, bucket) for prefill only, each a power
of two. Only ids pass here; text is `turn.py`'s.

Axes: R slots, r rows of one chunk (the first r slots), P prompts of one prefill, T prompt bucket, F forced tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.engine.sampling import sample
from jaxchat.model.cache import Cache, Prefix, decode, insert, layer_capacity, new_cache, prefill

IDLE, RUNNING, PAUSED, STOPPED, FULL = range(5)  # status of a slot; STOPPED by a stop id, FULL by a limit
MAX_STOP_IDS = 4
FORCED = 64  # tokens that a tool's result may have, its two marks included
NO_TOKEN = -1

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass
class Settings:
    """Per slot (or per prompt of a prefill)."""

    seed: jax.Array  # uint32
    temperature: jax.Array  # float32
    top_k: jax.Array  # int32, 0: off
    top_p: jax.Array  # float32, 1: off
    stop: jax.Array  # (R, MAX_STOP_IDS) int32, NO_TOKEN where unused
    pause: jax.Array  # int32 id at which a row waits for the host, NO_TOKEN: never


def blank_settings(count: int) -> Settings:
    """Host arrays to fill in: greedy, without stop or pause."""

    def full(value: float, dtype: Any, *shape: int) -> Any:
        return np.full((count, *shape), value, dtype)

    return Settings(
        seed=full(0, np.uint32),
        temperature=full(0, np.float32),
        top_k=full(0, np.int32),
        top_p=full(1, np.float32),
        stop=full(NO_TOKEN, np.int32, MAX_STOP_IDS),
        pause=full(NO_TOKEN, np.int32),
    )


@jax.tree_util.register_dataclass
@dataclass
class Slots:
    """State of R sequences on the device."""

    cache: Cache
    token: jax.Array  # (R,) int32 newest token, not yet in the cache
    status: jax.Array  # (R,) int32
    remaining: jax.Array  # (R,) int32 tokens that may still be made
    forced: jax.Array  # (R, F) int32 queue of tokens that replace sampled ones
    forced_next: jax.Array  # (R,) int32 place in the queue
    forced_count: jax.Array  # (R,) int32
    settings: Settings


def new_slots(config: ModelConfig, slots: int, capacity: int, dtype: jnp.dtype | type) -> Slots:
    def full(value: float, dtype: Any, *shape: int) -> jax.Array:
        return jnp.full((slots, *shape), value, dtype)

    return Slots(
        cache=new_cache(config, slots, capacity, dtype),
        token=full(0, jnp.int32),
        status=full(IDLE, jnp.int32),
        remaining=full(0, jnp.int32),
        forced=full(0, jnp.int32, FORCED),
        forced_next=full(0, jnp.int32),
        forced_count=full(0, jnp.int32),
        settings=jax.tree.map(jnp.asarray, blank_settings(slots)),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="slots")
def admit(
    config: ModelConfig,
    params: Params,
    slots: Slots,
    tokens: jax.Array,
    length: jax.Array,
    target: jax.Array,
    remaining: jax.Array,
    settings: Settings,
) -> Slots:
    """Prefill prompts and start them in slots.

    All but the last token of a prompt are prefilled; the first decoding step feeds the last one, so that sampling
    happens in one place.

    Args:
      params: from `serving_params`.
      tokens: (P, T) int32, right-padded; length: (P,) int32 of each whole prompt, at least 1, at most T + 1; `tokens`
        holds the last token of a prompt only where it fits.
      target: (P, 2) int32: slot (an entry beyond the slots is dropped: padding) and last token of each prompt.
      remaining: (P,) int32 tokens to make; settings: with P entries.
    """
    prefix = _prefill_prompts(config, params, tokens, length)
    return _place(slots, prefix, jnp.arange(tokens.shape[0]), target, remaining, settings)


@functools.partial(jax.jit, static_argnames="config")
def prefill_prompts(config: ModelConfig, params: Params, tokens: jax.Array, length: jax.Array) -> Prefix:
    """The first half of `admit`, for prompts of which each starts several slots."""
    return _prefill_prompts(config, params, tokens, length)


@functools.partial(jax.jit, donate_argnames="slots")
def start(
    slots: Slots, prefix: Prefix, source: jax.Array, target: jax.Array, remaining: jax.Array, settings: Settings
) -> Slots:
    """The second half: slots that go on from prompt `source` (G,) of `prefix`; target (G, 2), the others with G."""
    return _place(slots, prefix, source, target, remaining, settings)


def _prefill_prompts(config: ModelConfig, params: Params, tokens: jax.Array, length: jax.Array) -> Prefix:
    before = length - 1
    _, prefix = prefill(config, params, tokens, jnp.maximum(before, 1))
    prefix.length = before
    prefix.previous = jnp.where(before[:, None] > 0, prefix.previous, 0)
    return prefix


def _place(
    slots: Slots, prefix: Prefix, source: jax.Array, target: jax.Array, remaining: jax.Array, settings: Settings
) -> Slots:
    where = target[:, 0]

    def place(into: jax.Array, new: Any) -> jax.Array:
        return into.at[where].set(new, mode="drop")

    cache = jax.lax.fori_loop(0, len(source), lambda i, c: insert(c, prefix, source[i], where[i]), slots.cache)
    return Slots(
        cache=cache,
        token=place(slots.token, target[:, 1]),
        status=place(slots.status, RUNNING),
        remaining=place(slots.remaining, remaining),
        forced=slots.forced,
        forced_next=place(slots.forced_next, 0),
        forced_count=place(slots.forced_count, 0),
        settings=jax.tree.map(place, slots.settings, settings),
    )


@functools.partial(jax.jit, static_argnames=("config", "rows", "bucket", "steps", "capacity"), donate_argnames="slots")
def decode_chunk(
    config: ModelConfig, params: Params, slots: Slots, rows: int, bucket: int, steps: int, capacity: int
) -> tuple[Slots, jax.Array, jax.Array]:
    """`steps` decoding steps of the first `rows` slots.

    A row that stops, pauses or is full makes no more tokens and writes nothing. The rows' part of the cache is cut
    out once per chunk, so every step reads only the live bucket.

    Args:
      bucket: cache positions to keep at hand, at least every running row's length after the chunk (or `capacity`).
      capacity: tokens a cache row can hold; the token that would not fit any more is still made.

    Returns: the slots, tokens (steps, rows) int32 with NO_TOKEN where a row made none, and status (rows,).
    """
    part = _cut(config, slots, rows, bucket, capacity)

    def step(part: Slots, _: None) -> tuple[Slots, jax.Array]:
        return _step(config, params, part, capacity)

    part, tokens = jax.lax.scan(step, part, None, length=steps)
    return _paste(slots, part), tokens, part.status


def _step(config: ModelConfig, params: Params, slots: Slots, capacity: int) -> tuple[Slots, jax.Array]:
    s, running = slots.settings, slots.status == RUNNING
    logits, cache = decode(config, params, slots.token, slots.cache, running, capacity)
    sampled = sample(logits, s.seed, cache.length, s.temperature, s.top_k, s.top_p)
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
        settings=s,
    )
    return after, jnp.where(running, token, NO_TOKEN)


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


@functools.partial(jax.jit, donate_argnames="slots")
def resume(slots: Slots, slot: jax.Array, forced: jax.Array, count: jax.Array) -> Slots:
    """Let a paused slot go on with `count` of the `forced` tokens (F,) first. All arguments are data."""
    return Slots(
        cache=slots.cache,
        token=slots.token,
        status=slots.status.at[slot].set(RUNNING),
        remaining=slots.remaining,
        forced=slots.forced.at[slot].set(forced),
        forced_next=slots.forced_next.at[slot].set(0),
        forced_count=slots.forced_count.at[slot].set(count),
        settings=slots.settings,
    )


@functools.partial(jax.jit, donate_argnames="slots")
def move(slots: Slots, source: jax.Array, target: jax.Array) -> Slots:
    """Copy a slot over another one and leave the first idle: keeps the busy rows together."""
    moved = jax.tree.map(lambda a: a.at[target].set(a[source]), slots)
    moved.status = moved.status.at[source].set(IDLE)
    return moved


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, slot: jax.Array) -> Slots:
    """Stop a slot whose request is gone."""
    slots.status = slots.status.at[slot].set(IDLE)
    return slots
