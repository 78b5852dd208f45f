"""The engine's compiled programs, on one device or on several that share the slots.

On several devices each one owns a part of the slots and runs the same program on it, with whole weights of its own, so
nothing ever moves between them. What a program is told then has one entry for each device; on one device, one.
Slots are numbered through, the first device's first.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.attention import with_attention
from jaxchat.config import ModelConfig
from jaxchat.engine.request import Token
from jaxchat.kv_cache import (
    Cache,
    activations,
    decode,
    extend,
    insert,
    layer_capacity,
    new_cache,
    prefill,
    serving_params,
)
from jaxchat.low_precision import logits
from jaxchat.model import embed
from jaxchat.sharding import BATCH_AXES, replicated

# Choosing the next token of every row at once, with settings that are data: no new value compiles anything.
#
# Axes: R rows, V vocabulary. Temperature 0 is greedy. Top-k and top-p (nucleus, 1904.09751) cut by a threshold that a
# bisection finds; sorting the vocabulary costs more. The draw inverts the cumulative distribution with one uniform
# number, which depends on the row's own seed and position alone.


_ONE = 0x3F800000  # float32 1.0 as bits; the bits of non-negative floats are ordered as the floats are
_STEPS = 30  # halvings of [0, _ONE] until one value is left
DIGIT = 3  # bits of the thirty below 1.0 that are settled in one pass
BLOCK = 64  # neighbouring ids that a draw looks at together


def sample(
    logits: jax.Array,
    seed: jax.Array,
    position: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
) -> jax.Array:
    """Next token (R,) int32 of each row.

    Args:
      logits: (R, V) float32.
      seed: (R,) uint32 of the request; position: (R,) int32 of the token in its sequence.
      temperature: (R,) float32, 0 or less is greedy; top_k: (R,) int32, 0 keeps all; top_p: (R,) float32, 1 keeps all.
      min_p: (R,) float32, tokens less likely than this share of the likeliest one go too.

    Tokens as likely as the last one kept are kept too.
    """
    highest = logits.max(axis=-1, keepdims=True)
    greedy = _first(logits == highest)

    def draw(cut: Callable[[jax.Array], jax.Array]) -> jax.Array:
        scale = 1.0 / jnp.maximum(temperature, 1e-4)
        p = jnp.exp((logits - highest) * scale[:, None])  # the largest is 1
        p = jnp.where(p >= jnp.maximum(cut(p), min_p)[:, None], p, 0.0)
        return jnp.where(temperature > 0, _draw(p, jax.vmap(_uniform)(seed, position), greedy), greedy)

    by_mass = jnp.any(top_p < 1.0)
    need = jnp.where(by_mass, 3, jnp.where(jnp.any(top_k > 0), 2, 1))  # one question: each costs a GPU a pause
    return jax.lax.switch(
        jnp.where(jnp.any(temperature > 0), need, 0),
        [
            lambda: greedy,
            lambda: draw(lambda p: jnp.zeros(len(p))),
            lambda: draw(lambda p: _by_count(p, top_k)),
            lambda: draw(lambda p: _threshold(p, top_k, top_p)),
        ],
    )


def _draw(p: jax.Array, uniform: jax.Array, otherwise: jax.Array) -> jax.Array:
    """(R,) int32 places in p (R, V) >= 0, each as likely as its value; inverts the cumulative sum, first of blocks of
    the vocabulary, then inside one: a fraction of the work of a sum over all."""
    R, V = p.shape
    blocks = jnp.pad(p, ((0, 0), (0, -V % BLOCK))).reshape(R, -1, BLOCK)
    until = jnp.cumsum(blocks.sum(axis=-1), axis=-1)
    goal = until[:, -1] * uniform
    over = until > goal[:, None]
    block = _first(over)
    own = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.where(block > 0, jnp.take_along_axis(until, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    inside = (jnp.cumsum(own, axis=-1) > (goal - before)[:, None]) & (own > 0)
    # rounding may leave nothing above the goal: it then lies at a block's very end
    last = jnp.max(jnp.where(own > 0, jnp.arange(BLOCK), 0), axis=-1)
    place = jnp.where(inside.any(axis=-1), _first(inside), last)
    return jnp.where(over[:, -1], block * BLOCK + place, otherwise)


def _first(found: jax.Array) -> jax.Array:
    """(R,) int32 place of the first True of (R, V); argmax does the same at seven times the cost on a CPU."""
    places = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
    return jnp.min(jnp.where(found, places, found.shape[-1] - 1), axis=-1)


def _uniform(seed: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))


def _by_count(p: jax.Array, top_k: jax.Array) -> jax.Array:
    """(R,) the smallest value that top-k leaves of p (R, V)."""
    k = jnp.where(top_k > 0, top_k, p.shape[-1]).astype(jnp.float32)
    return _largest(p, jnp.ones((), p.dtype), k)


def _threshold(p: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """(R,) the smallest value that stays, of p (R, V) in [0, 1] whose largest value is 1.

    Top-k comes first; top-p is a share of the mass that top-k leaves.
    """
    by_count = _by_count(p, top_k)
    kept = jnp.where(p >= by_count[:, None], p, 0.0)
    by_mass = _largest(kept, kept, top_p * kept.sum(axis=-1))
    return jnp.where(top_p < 1.0, jnp.maximum(by_count, by_mass), by_count)


def _largest(p: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """(R,) a number t in [0, 1] at which the weight of all values of p (R, V) of at least t is `wanted` (R,) or more,
    and above which it is less: the largest such number, or one that leaves the same values."""
    return jax.lax.platform_dependent(p, weight, wanted, cpu=_largest_by_guessing, default=_largest_by_digits)


def _amount(p: jax.Array, weight: jax.Array, bits: jax.Array) -> jax.Array:
    """(R,) weight of the values that are at least the float32 numbers of these bits (R,)."""
    at_least = p >= jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]
    return jnp.sum(jnp.where(at_least, weight, 0.0), axis=-1)


def _largest_by_digits(p: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """Some bits at a time: few passes over p and no loop, whose every turn would cost a GPU a pause."""
    low = jnp.zeros(len(p), jnp.int32)
    for shift in range(30 - DIGIT, -1, -DIGIT):
        amounts = [_amount(p, weight, low + (digit << shift)) for digit in range(1, 1 << DIGIT)]
        low += sum((a >= wanted).astype(jnp.int32) for a in amounts) << shift
    return jax.lax.bitcast_convert_type(jnp.minimum(low, _ONE), jnp.float32)


def _largest_by_guessing(p: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """Guesses between two bounds, until every row has what it wants: fewer passes where passes are what costs."""

    def going(state: Any) -> jax.Array:
        step, low, high, at_low, _ = state
        return (step < 2 * _STEPS) & jnp.any((high - low > 1) & (at_low != wanted))

    def narrow(state: Any) -> Any:
        step, low, high, at_low, at_high = state  # enough at low, not at high
        share = (at_low - wanted) / jnp.maximum(at_low - at_high, 1e-9)  # a straight line is a good guess
        share = jnp.where(step % 2 == 0, share, 0.5)  # but halving is sure to end
        width = high - low
        middle = low + jnp.clip((share * width).astype(jnp.int32), 1, jnp.maximum(width - 1, 1))
        there = _amount(p, weight, middle)
        settled = (at_low == wanted) | (width <= 1)
        up, down = (there >= wanted) & ~settled, (there < wanted) & ~settled
        return (
            step + 1,
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, there, at_low),
            jnp.where(down, there, at_high),
        )

    zero, one_more = jnp.zeros(len(p), jnp.int32), jnp.full(len(p), _ONE + 1, jnp.int32)
    start = jnp.int32(0), zero, one_more, _amount(p, weight, zero), jnp.zeros(len(p))
    return jax.lax.bitcast_convert_type(jax.lax.while_loop(going, narrow, start)[1], jnp.float32)


# State of the engine's slots on the device, and the small programs that put sequences into them and take them out.
#
# Every array has one entry per slot, or per sequence, on its first axis, so that several devices split them all alike;
# see `programs.py`. A slot number that is no slot changes nothing.
#
# Axes: R slots, P prompts, F forced tokens, V vocabulary; G sequences of one call, one on each device.


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


# A jitted chunk of decoding steps over the first slots.
#
# Everything that differs between requests is an array with one entry per slot, so a new value never compiles anything.
# What is compiled depends on (rows, bucket, steps) only. Only ids pass here; text is `turn.py`'s.
#
# Axes: R slots, r rows of one chunk (the first r slots), V vocabulary.


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


# How likely the engine's model finds every token of given texts, with the likeliest alternatives.
#
# The weights are the engine's own, as they are served. Texts of like length run together in a few shapes.


SHORTEST = 128  # tokens; each length is four times the one before
BATCH_TOKENS = 4096  # of one call on an accelerator; on a CPU one text, which keeps it as busy
CHUNK = 128  # positions whose logits are alive at once


@functools.partial(jax.jit, static_argnames="config")
def score_tokens(config: ModelConfig, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every token's successor in tokens (B, T): log-probability (B, T) float32, and after each position the
    likeliest ids (B, T, TOP) with theirs. The last position's successor is taken to be 0."""
    x = activations(config, params, tokens)
    B, T, D = x.shape
    chunk = next(c for c in range(min(CHUNK, B * T), 0, -1) if B * T % c == 0)
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        return log_probabilities(logits(config, params, part[0]), part[1])

    found = jax.lax.map(one, (x.reshape(-1, chunk, D), following.reshape(-1, chunk)))
    return tuple(a.reshape(B, T, *a.shape[2:]) for a in found)  # type: ignore[return-value]


def lengths(capacity: int) -> list[int]:
    sizes = [min(SHORTEST, capacity)]
    while sizes[-1] < capacity:
        sizes.append(min(sizes[-1] * 4, capacity))
    return sizes


def rows_of(length: int) -> int:
    """Texts of that length in one call."""
    return 1 if jax.default_backend() == "cpu" else max(1, BATCH_TOKENS // length)


def score(run: Callable[[np.ndarray], Any], batch: Sequence[Sequence[int]], capacity: int) -> list[list[Token | None]]:
    """A `Token` for each id of each text (at most `capacity` ids), None for the first; `run` is `score_tokens`."""
    found: list[list[Token | None]] = [[None] * min(1, len(ids)) for ids in batch]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(batch):
        by_length.setdefault(next(n for n in lengths(capacity) if n >= len(ids)), []).append(index)
    for length, members in by_length.items():
        for at in range(0, len(members), rows_of(length)):
            part = members[at : at + rows_of(length)]
            tokens = np.zeros((rows_of(length), length), np.int32)
            for i, index in enumerate(part):
                tokens[i, : len(batch[index])] = batch[index]
            outputs = [np.asarray(a) for a in run(tokens)]
            for i, index in enumerate(part):
                own = [a[i] for a in outputs]
                found[index] += [report(token, TOP, n, own) for n, token in enumerate(list(batch[index])[1:])]
    return found


def report(token: int, count: int, i: int, outputs: Sequence[np.ndarray]) -> Token:
    """Entry i of a row's (logprob, top, top_logprob), with so many alternatives."""
    logprob, top, values = (a[i] for a in outputs)
    pairs = zip(top[:count].tolist(), values[:count].tolist(), strict=True)
    return Token(int(token), float(logprob), tuple(pair for pair in pairs if pair[0] != NO_TOKEN))


MIN_PROMPT_BUCKET = 32  # tokens
MIN_CACHE_BUCKET = 512  # positions; cutting out fewer costs more than reading them
PIECE = 512  # tokens of a prompt that run at once while others wait for their next ones
# Short prompts prefilled at once. One keeps a CPU as busy, and there every prompt runs as a long one's pieces do, so
# that half as many programs have to compile.
PREFILL_GROUP = {"cpu": 0}
ACCELERATOR_GROUP = 8
# Rows of the smallest chunk. For a single one XLA's GPU compiler multiplies and sums instead of calling a product, and
# writes products as large as the weights to memory: in d20 compiled for an H100, 1.46 GB and 450 kernels a step against
# 0.98 GB and 333 for two rows.
LEAST_ROWS = {"cpu": 1}
ACCELERATOR_ROWS = 2
COMPILERS = 4  # programs that compile at once
ROWS = P(BATCH_AXES)
_Call = tuple[Any, dict[str, Any], dict[str, Any]]  # function, static arguments, others


class Programs:
    """Runs programs over the state of all slots, which it holds.

    Args:
      params: from `load`; slots: of all devices together; capacity: tokens of a slot; chunk: decoding steps of a call.
      mesh: devices that share the slots; None: the default device alone.
    """

    def __init__(self, config: ModelConfig, slots: int, capacity: int, chunk: int, dtype: Any, mesh: Mesh | None):
        self.config, self.capacity, self.chunk, self.dtype = with_attention(config, dtype), capacity, chunk, dtype
        self.mesh = mesh if mesh is not None and mesh.size > 1 else None
        self.devices = self.mesh.size if self.mesh else 1
        self.slots = slots // self.devices  # of one device
        self.group = min(PREFILL_GROUP.get(jax.default_backend(), ACCELERATOR_GROUP), self.slots)
        self.least_rows = min(least_rows(), self.slots)
        self.piece = min(PIECE, capacity)
        self.prompt_buckets = buckets(MIN_PROMPT_BUCKET, self.piece)
        self.cache_buckets = buckets(MIN_CACHE_BUCKET, capacity)
        self.params: Any = None
        shape = self.config, slots, capacity, dtype
        self._coming: dict[Any, Future[None]] = {}  # programs that a background warm-up compiles
        self.state: Slots = _new_slots(NamedSharding(self.mesh, ROWS))(*shape) if self.mesh else new_slots(*shape)

    def load(self, params: Any, weights: str) -> None:
        """Take weights, in the training layout or as `serving_params` made them."""
        place = replicated(self.mesh) if self.mesh else None
        if "layers" in params:
            self.params = jax.device_put(params, place) if place else params
        else:
            self.params = _serve(place)(self.config, params, self.dtype, weights)

    # Each argument below is a NumPy array with `devices` entries (or as many times `group`) on its first axis

    def admit(self, tokens: Any, length: Any, target: Any, remaining: Any, settings: Any) -> None:
        prompts = {"tokens": tokens, "length": length}
        self._change(admit, params=self.params, **prompts, **_starts(target, remaining, settings))

    def take(self, slot: Any, length: Any, last: Any) -> Cache:
        return self._run(take, params=self.params, slots=self.state, slot=slot, length=length, last=last)

    def prolong(self, rows: Cache, tokens: Any, count: Any) -> Cache:
        return self._run(prolong, params=self.params, rows=rows, tokens=tokens, count=count)

    def start(self, rows: Cache, target: Any, remaining: Any, settings: Any) -> None:
        self._change(start, rows=rows, **_starts(target, remaining, settings))

    def decode(self, rows: int, bucket: int) -> Made:
        """A chunk of the first `rows` slots of every device; the outputs have the first device's rows first."""
        static = {"bucket": bucket, "steps": self.chunk, "capacity": self.capacity}
        self.state, made = self._run(decode_chunk, static | {"rows": rows}, params=self.params, slots=self.state)
        return made

    def mark(self, slot: int, seen: Any) -> None:
        self._change(mark, slot=self.only(slot), seen=np.broadcast_to(seen, (self.devices, len(seen))))

    def resume(self, slot: int, ids: Sequence[int]) -> None:
        forced = np.zeros((self.devices, FORCED), np.int32)
        forced[:, : len(ids)] = ids
        count = np.full(self.devices, len(ids), np.int32)
        self._change(resume, slot=self.only(slot), forced=forced, count=count)

    def swap(self, a: int, b: int) -> None:
        """Two slots of one device."""
        self._change(swap, pair=np.stack([self.only(a), self.only(b)], axis=1))

    def release(self, slot: int) -> None:
        self._change(release, slot=self.only(slot))

    def only(self, slot: int) -> np.ndarray:
        """Number of a slot on its device, and on the others one that is no slot; (devices,) int32."""
        numbers = np.full(self.devices, self.slots, np.int32)
        if slot < self.slots * self.devices:
            numbers[slot // self.slots] = slot % self.slots
        return numbers

    def warm_up(self, background: bool = False) -> Iterator[int]:
        """Compile everything that any request can need, several programs at once, without running any of it; yields
        how many are still to come.

        With `background` it ends once a short request of a single client can be answered. The other programs go on
        compiling in threads of their own; whoever needs one that is not there yet waits for that one alone.
        """
        assert not self._coming
        calls = list(self._calls())
        first = [call for call in calls if self._is_first(*call)] if background else calls
        yield len(calls)
        threads = min(COMPILERS, os.cpu_count() or 1)
        left = len(calls)
        with ThreadPoolExecutor(threads) as pool:
            compiling = [pool.submit(self._compile, *call) for call in first]
            try:
                for done in as_completed(compiling):
                    done.result()
                    left -= 1
                    yield left
            finally:  # whoever stops listening need not wait for all of them
                pool.shutdown(wait=True, cancel_futures=True)
        if background:
            self._compile_behind([call for call in calls if not self._is_first(*call)], max(1, threads // 2))

    @property
    def compiling(self) -> int:
        """Programs that are still to come from `warm_up`."""
        return sum(not future.done() for future in list(self._coming.values()))

    def stop_compiling(self) -> None:
        """Drop what a background warm-up has not begun; a needed program compiles when it is used."""
        for future in list(self._coming.values()):
            future.cancel()

    def _is_first(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> bool:
        """Whether a short request of a single client needs this program."""
        if function is decode_chunk:
            return static["rows"] == self.least_rows and static["bucket"] == self.cache_buckets[0]
        if function in (admit, prolong):
            size, bucket = arguments["tokens"].shape
            return size == self.devices and bucket == self.prompt_buckets[0]
        return function is start

    def _compile_behind(self, calls: Sequence[_Call], threads: int) -> None:
        """Compile in threads; `_coming` has a future for every program."""

        def compile_one(call: _Call) -> None:
            if threading.main_thread().is_alive():  # else the process is about to end
                self._compile(*call)

        pool = ThreadPoolExecutor(threads, thread_name_prefix="compiler")
        self._coming = {_key(*call): pool.submit(compile_one, call) for call in calls}
        pool.shutdown(wait=False)

    def _await(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> None:
        """Wait for a program that is compiling just now. One that still waits its turn is left to its caller."""
        future = self._coming.pop(_key(function, static, arguments), None)
        if future and not future.cancel():
            future.result()

    def _calls(self) -> Iterator[_Call]:
        """(function, static arguments, others) of every program, the slowest to compile first.

        State and weights are given as shapes: the arrays may be gone when a thread comes to compile.
        """
        D, params, slots = self.devices, _shapes(self.params), _shapes(self.state)
        slot, zeros = self.only(self.slots * D), np.zeros(D, np.int32)
        rows = _shapes(self.take(zeros, zeros, zeros))  # also the first program

        def nothing_starts(count: int) -> dict[str, Any]:
            target = np.full((count * D, 2), self.slots, np.int32)
            return _starts(target, np.ones(count * D, np.int32), blank_settings(count * D))

        for count in reversed(buckets(self.least_rows, self.slots)):
            for bucket in self.cache_buckets:
                static = {"rows": count, "bucket": bucket, "steps": self.chunk, "capacity": self.capacity}
                yield decode_chunk, static, {"params": params, "slots": slots}
        for bucket in reversed(self.prompt_buckets):
            for size in {1, self.group} if self.group else ():
                prompts = {"tokens": np.zeros((size * D, bucket), np.int32), "length": np.ones(size * D, np.int32)}
                yield admit, {}, {"slots": slots, "params": params, **prompts, **nothing_starts(size)}
            piece = {"tokens": np.zeros((D, bucket), np.int32), "count": zeros}
            yield prolong, {}, {"params": params, "rows": rows, **piece}
        for length in lengths(self.capacity):
            yield score_tokens, {}, {"params": params, "tokens": np.zeros((rows_of(length), length), np.int32)}
        seen = np.broadcast_to(np.zeros(self.config.vocab_size, bool), (D, self.config.vocab_size))
        forced = np.zeros((D, FORCED), np.int32)
        yield start, {}, {"slots": slots, "rows": rows, **nothing_starts(1)}
        yield mark, {}, {"slots": slots, "slot": slot, "seen": seen}
        yield resume, {}, {"slots": slots, "slot": slot, "forced": forced, "count": zeros}
        yield swap, {}, {"slots": slots, "pair": np.stack([slot, slot], axis=1)}
        yield release, {}, {"slots": slots, "slot": slot}

    def _compile(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> None:
        run, args, kwargs = self._ready(function, static, arguments)
        run.lower(*args, **kwargs).compile()

    def score(self, tokens: Any) -> Any:
        """`likelihood.score_tokens`, by every device alike."""
        return self._run(score_tokens, params=self.params, tokens=tokens)

    def _change(self, function: Any, **arguments: Any) -> None:
        self.state = self._run(function, slots=self.state, **arguments)

    def _run(self, function: Any, static: dict[str, Any] | None = None, **arguments: Any) -> Any:
        if self._coming:
            self._await(function, static or {}, arguments)
        run, args, kwargs = self._ready(function, static or {}, arguments)
        return run(*args, **kwargs)

    def _ready(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
        """A jitted function, and its positional and named arguments."""
        if function in WITH_CONFIG:
            static = static | {"config": self.config}
        if self.mesh is None or function is score_tokens:
            return function, (), static | arguments
        kept = ("params", "slots", "rows")  # lie where they should
        placed = jax.device_put({k: v for k, v in arguments.items() if k not in kept}, NamedSharding(self.mesh, ROWS))
        run = _spread(function, self.mesh, tuple(sorted(static.items())), tuple(arguments))
        return run, tuple((arguments | placed).values()), {}


WITH_CONFIG = (admit, take, prolong, decode_chunk, score_tokens)


def _shapes(tree: Any) -> Any:
    """What `lower` must know of arrays."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if a.committed else None), tree
    )


def _key(function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """What tells a program from the others: the shapes of what comes from the host differ."""
    shapes = tuple((name, a.shape) for name, a in sorted(arguments.items()) if isinstance(a, np.ndarray))
    return function, tuple(sorted(static.items())), shapes


def _starts(target: Any, remaining: Any, settings: Any) -> dict[str, Any]:
    return {"target": target, "remaining": remaining, "settings": settings}


@functools.cache
def _serve(place: NamedSharding | None) -> Any:
    return jax.jit(serving_params, static_argnums=(0, 2, 3), out_shardings=place)


@functools.cache
def _new_slots(place: NamedSharding) -> Any:
    return jax.jit(new_slots, static_argnums=(0, 1, 2, 3), out_shardings=place)


@functools.cache
def _spread(function: Any, mesh: Mesh, static: tuple[tuple[str, Any], ...], names: tuple[str, ...]) -> Any:
    """`function` on every device's own part of its arguments, weights alone being whole everywhere."""

    def local(*arguments: Any) -> Any:
        return function.__wrapped__(**dict(static), **dict(zip(names, arguments, strict=True)))

    donated = {take: (), prolong: ("rows",)}.get(function, ("slots",))
    spread = jax.shard_map(
        local, mesh=mesh, in_specs=tuple(P() if n == "params" else ROWS for n in names), out_specs=ROWS, check_vma=False
    )
    return jax.jit(spread, donate_argnums=tuple(names.index(name) for name in donated))


def least_rows() -> int:
    """Rows that the smallest chunk has on this machine: slots for a single person."""
    return LEAST_ROWS.get(jax.default_backend(), ACCELERATOR_ROWS)


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def buckets(smallest: int, largest: int) -> list[int]:
    """Powers of two from the smallest, and the largest itself."""
    sizes = [min(smallest, largest)]
    while sizes[-1] < largest:
        sizes.append(min(power_of_two(sizes[-1] + 1), largest))
    return sizes
