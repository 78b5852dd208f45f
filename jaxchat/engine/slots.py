"""State of the engine's slots on the device, and the small programs that put sequences into them and take them out.

Every array has one entry per slot, or per sequence, on its first axis, so that several devices split them all alike;
see `programs.py`. A slot number that is no slot changes nothing.

Axes: R slots, P prompts, F forced tokens, V vocabulary; G sequences of one call, one on each device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.model.cache import Cache, extend, insert, new_cache, prefill
from jaxchat.model.layers import embed

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
    min_p: jax.Array  # float32, 0: off
    penalty: jax.Array  # float32, of ids in `Slots.seen`; 1: off
    report: jax.Array  # bool, whether log-probabilities are wanted
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
        min_p=full(0, np.float32),
        penalty=full(1, np.float32),
        report=full(False, bool),
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
    seen: jax.Array  # (R, V) bool ids of the sequence; kept where the repetition penalty needs it
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
        seen=full(False, bool, config.vocab_size),
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
      target: (P, 2) int32: slot (one beyond the slots: padding) and last token of each prompt.
      remaining: (P,) int32 tokens to make; settings: with P entries.
    """
    before = length - 1
    _, prefix = prefill(config, params, tokens, jnp.maximum(before, 1))
    prefix.length = before
    prefix.previous = jnp.where(before[:, None] > 0, prefix.previous, 0)
    where = target[:, 0]
    cache = jax.lax.fori_loop(0, len(where), lambda i, c: insert(c, prefix, i, where[i]), slots.cache)
    return _started(slots, cache, target, remaining, settings)


@functools.partial(jax.jit, static_argnames="config")
def take(
    config: ModelConfig, params: Params, slots: Slots, slot: jax.Array, length: jax.Array, last: jax.Array
) -> Cache:
    """Copies of the first `length` (G,) positions of slots (G,), to go on from; `last` (G,) is the token at the end.

    Length 0 begins a sequence, whatever the slot holds. A windowed layer must not have lost what its window still
    needs there.
    """
    cache: Cache = jax.tree.map(lambda a: a[slot], slots.cache)
    _, e = embed(config, params, last[:, None])
    previous = jnp.where(length[:, None] > 0, e[:, 0], 0).astype(cache.previous.dtype)
    return Cache(cache.k, cache.v, length, previous)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="rows")
def prolong(config: ModelConfig, params: Params, rows: Cache, tokens: jax.Array, count: jax.Array) -> Cache:
    """Append `count` (G,) of the tokens (G, T) to what `take` took."""
    return extend(config, params, tokens, count, rows)


@functools.partial(jax.jit, donate_argnames="slots")
def start(slots: Slots, rows: Cache, target: jax.Array, remaining: jax.Array, settings: Settings) -> Slots:
    """Start slots from rows (G) that hold all of their prompts but the last token; arguments as of `admit`."""
    cache = jax.tree.map(lambda into, new: into.at[target[:, 0]].set(new, mode="drop"), slots.cache, rows)
    return _started(slots, cache, target, remaining, settings)


def _started(slots: Slots, cache: Cache, target: jax.Array, remaining: jax.Array, settings: Settings) -> Slots:
    def place(into: jax.Array, new: Any) -> jax.Array:
        return into.at[target[:, 0]].set(new, mode="drop")

    return Slots(
        cache=cache,
        token=place(slots.token, target[:, 1]),
        status=place(slots.status, RUNNING),
        remaining=place(slots.remaining, remaining),
        forced=slots.forced,
        forced_next=place(slots.forced_next, 0),
        forced_count=place(slots.forced_count, 0),
        seen=slots.seen,
        settings=jax.tree.map(place, slots.settings, settings),
    )


@functools.partial(jax.jit, donate_argnames="slots")
def mark(slots: Slots, slot: jax.Array, seen: jax.Array) -> Slots:
    """Tell slots (G,) which ids seen (G, V) bool their prompts hold, for the repetition penalty."""
    slots.seen = slots.seen.at[slot].set(seen, mode="drop")
    return slots


@functools.partial(jax.jit, donate_argnames="slots")
def resume(slots: Slots, slot: jax.Array, forced: jax.Array, count: jax.Array) -> Slots:
    """Let paused slots (G,) go on with `count` (G,) of the `forced` tokens (G, F) first."""
    slots.status = slots.status.at[slot].set(RUNNING, mode="drop")
    slots.forced = slots.forced.at[slot].set(forced, mode="drop")
    slots.forced_next = slots.forced_next.at[slot].set(0, mode="drop")
    slots.forced_count = slots.forced_count.at[slot].set(count, mode="drop")
    return slots


@functools.partial(jax.jit, donate_argnames="slots")
def swap(slots: Slots, pair: jax.Array) -> Slots:
    """Exchange all that two slots hold, pair (G, 2): keeps the busy rows together."""
    for one in pair:
        slots = jax.tree.map(lambda a, one=one: a.at[one].set(a[one[::-1]], mode="drop"), slots)
    return slots


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, slot: jax.Array) -> Slots:
    """Stop slots (G,) whose requests are gone; what their caches hold stays."""
    slots.status = slots.status.at[slot].set(IDLE, mode="drop")
    return slots
