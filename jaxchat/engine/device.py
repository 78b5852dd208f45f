"""The engine's compiled programs and the state of its slots, on one device or on several that share the slots.

On several devices each one owns a part of the slots and runs the same program on it, with whole weights of its own, so
nothing moves between them. Slots are numbered through, the first device's first. Every array of the state has one entry
for each slot on its first axis, and every argument from the host one for each device (or a multiple). A slot number
that is no slot changes nothing.

What differs between requests is data: no new setting compiles anything. Only ids pass here; text is `turn.py`'s.

Axes: R slots or rows (the first slots), P prompts, T time, V vocabulary, F forced tokens, G sequences of one call, one
on each device.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.attention import choose_backend, with_attention
from jaxchat.config import ModelConfig
from jaxchat.engine.request import Token
from jaxchat.kv_cache import Cache, append, new_cache, serving_params
from jaxchat.model import LayerOptions, Params, embed, hidden, logits
from jaxchat.sharding import BATCH_AXES, replicated

# Sampling. Top-k and top-p (nucleus, 1904.09751) cut by a threshold, found without sorting the vocabulary. The draw
# inverts the cumulative distribution with one uniform number, which depends on the row's own seed and position alone.

_ONE = 0x3F800000  # float32 1.0 as bits; the bits of non-negative floats are ordered as the floats are
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
    """Return the next token (R,) int32 of each row. Tokens as likely as the last one kept are kept too.

    Args:
      logits: (R, V) float32.
      seed: (R,) uint32 of the request; position: (R,) int32 of the token in its sequence.
      temperature: (R,) float32, 0 or less is greedy; top_k: (R,) int32, 0 keeps all; top_p: (R,) float32, 1 keeps all.
      min_p: (R,) float32, tokens less likely than this share of the likeliest one go too.
    """
    highest = logits.max(axis=-1, keepdims=True)
    greedy = _first(logits == highest)

    def draw(cut: Callable[[jax.Array], jax.Array]) -> jax.Array:
        scale = 1.0 / jnp.maximum(temperature, 1e-4)
        p = jnp.exp((logits - highest) * scale[:, None])  # the largest is 1
        p = jnp.where(p >= jnp.maximum(cut(p), min_p)[:, None], p, 0.0)
        uniform = jax.vmap(lambda s, i: jax.random.uniform(jax.random.fold_in(jax.random.key(s), i)))(seed, position)
        return jnp.where(temperature > 0, _draw(p, uniform, greedy), greedy)

    need = jnp.where(jnp.any(top_p < 1.0), 3, jnp.where(jnp.any(top_k > 0), 2, 1))
    return jax.lax.switch(  # one question: each costs a GPU a pause
        jnp.where(jnp.any(temperature > 0), need, 0),
        [
            lambda: greedy,
            lambda: draw(lambda p: jnp.zeros(len(p))),
            lambda: draw(lambda p: _top_k_threshold(p, top_k)),
            lambda: draw(lambda p: _threshold(p, top_k, top_p)),
        ],
    )


def _draw(p: jax.Array, uniform: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Draw a place (R,) int32 from p (R, V) >= 0, each as likely as its value.

    Inverts the cumulative sum of blocks of the vocabulary, then that inside one: a fraction of the work of one sum.
    """
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


def _first(mask: jax.Array) -> jax.Array:
    """Return the place (R,) int32 of the first True of (R, V); argmax costs seven times as much on a CPU."""
    places = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1)
    return jnp.min(jnp.where(mask, places, mask.shape[-1] - 1), axis=-1)


def _top_k_threshold(p: jax.Array, top_k: jax.Array) -> jax.Array:
    k = jnp.where(top_k > 0, top_k, p.shape[-1]).astype(jnp.float32)
    return _largest(p, jnp.ones((), p.dtype), k)


def _threshold(p: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return the smallest value (R,) that stays of p (R, V), whose largest value is 1.

    Top-k comes first; top-p is a share of the mass that top-k leaves.
    """
    by_count = _top_k_threshold(p, top_k)
    kept = jnp.where(p >= by_count[:, None], p, 0.0)
    by_mass = _largest(kept, kept, top_p * kept.sum(axis=-1))
    return jnp.where(top_p < 1.0, jnp.maximum(by_count, by_mass), by_count)


def _largest(p: jax.Array, weight: jax.Array, goal: jax.Array) -> jax.Array:
    """Return the largest t (R,) in [0, 1] for which the weight of the values p >= t reaches `goal` (R,).

    Or another number that leaves the same values of p (R, V). Fewer passes count on a CPU; a GPU pauses at every turn
    of a loop.
    """
    return jax.lax.platform_dependent(p, weight, goal, cpu=_largest_by_guessing, default=_largest_by_digits)


def _amount(p: jax.Array, weight: jax.Array, bits: jax.Array) -> jax.Array:
    """Return the weight (R,) of the values that are at least the float32 numbers of these bits (R,)."""
    at_least = p >= jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]
    return jnp.sum(jnp.where(at_least, weight, 0.0), axis=-1)


def _largest_by_digits(p: jax.Array, weight: jax.Array, goal: jax.Array) -> jax.Array:
    """Settle some bits at a time, without a loop."""
    low = jnp.zeros(len(p), jnp.int32)
    for shift in range(30 - DIGIT, -1, -DIGIT):
        amounts = [_amount(p, weight, low + (digit << shift)) for digit in range(1, 1 << DIGIT)]
        low += sum((a >= goal).astype(jnp.int32) for a in amounts) << shift
    return jax.lax.bitcast_convert_type(jnp.minimum(low, _ONE), jnp.float32)


def _largest_by_guessing(p: jax.Array, weight: jax.Array, goal: jax.Array) -> jax.Array:
    """Guess between two bounds until every row has reached its goal."""

    def going(state: Any) -> jax.Array:
        step, low, high, at_low, _ = state
        return (step < 60) & jnp.any((high - low > 1) & (at_low != goal))

    def narrow(state: Any) -> Any:
        step, low, high, at_low, at_high = state  # enough at low, not at high
        share = (at_low - goal) / jnp.maximum(at_low - at_high, 1e-9)  # a straight line is a good guess
        share = jnp.where(step % 2 == 0, share, 0.5)  # but halving is sure to end
        width = high - low
        middle = low + jnp.clip((share * width).astype(jnp.int32), 1, jnp.maximum(width - 1, 1))
        there = _amount(p, weight, middle)
        settled = (at_low == goal) | (width <= 1)
        up, down = (there >= goal) & ~settled, (there < goal) & ~settled
        low, at_low = jnp.where(up, middle, low), jnp.where(up, there, at_low)
        high, at_high = jnp.where(down, middle, high), jnp.where(down, there, at_high)
        return step + 1, low, high, at_low, at_high

    zero, one_more = jnp.zeros(len(p), jnp.int32), jnp.full(len(p), _ONE + 1, jnp.int32)
    start = jnp.int32(0), zero, one_more, _amount(p, weight, zero), jnp.zeros(len(p))
    return jax.lax.bitcast_convert_type(jax.lax.while_loop(going, narrow, start)[1], jnp.float32)


# Slots

IDLE, RUNNING, PAUSED, STOPPED, FULL = range(5)  # status of a slot; STOPPED by a stop id, FULL by a limit
MAX_STOP_IDS = 4
FORCED = 64  # tokens that a tool's result may have, its two marks included
TOP = 20  # alternatives that are reported
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclass
class Settings:
    """Sampling and stopping settings of R slots."""

    seed: Any  # uint32
    temperature: Any  # float32, 0: greedy
    top_k: Any  # int32, 0: off
    top_p: Any  # float32, 1: off
    min_p: Any  # float32, 0: off
    penalty: Any  # float32, of ids in `Slots.seen`; 1: off
    report: Any  # bool, whether log-probabilities are wanted
    stop: Any  # (R, MAX_STOP_IDS) int32, NO_TOKEN where unused
    pause: Any  # int32 id at which a row waits for the host, NO_TOKEN: never


@jax.tree_util.register_dataclass
@dataclass
class Starts:
    """Prompts that start in slots, P entries each."""

    slot: Any  # int32
    token: Any  # int32, the last one of the prompt; the first decoding step feeds it
    remaining: Any  # int32 tokens to make
    seen: Any  # (P, V) bool, ids of the prompt; needed for the repetition penalty only
    settings: Settings


@jax.tree_util.register_dataclass
@dataclass
class Slots:
    """State of R sequences on the device."""

    cache: Cache
    token: jax.Array  # int32 newest token, not yet in the cache
    status: jax.Array  # int32
    remaining: jax.Array  # int32 tokens that may still be made
    seen: jax.Array  # (R, V) bool ids of the sequence; kept where the repetition penalty needs it
    settings: Settings
    forced: jax.Array  # (R, F + 1) int32 tokens that replace sampled ones, NO_TOKEN at the end
    forced_next: jax.Array  # int32 place of the next one


def blank_settings(count: int) -> Settings:
    """Return host arrays to fill in: greedy, without stop or pause."""
    zeros, ones = np.zeros(count, np.float32), np.ones(count, np.float32)
    return Settings(
        seed=np.zeros(count, np.uint32),
        temperature=zeros,
        top_k=np.zeros(count, np.int32),
        top_p=ones,
        min_p=zeros.copy(),
        penalty=ones.copy(),
        report=np.zeros(count, bool),
        stop=np.full((count, MAX_STOP_IDS), NO_TOKEN, np.int32),
        pause=np.full(count, NO_TOKEN, np.int32),
    )


def blank_starts(count: int, slots: int, vocab_size: int) -> Starts:
    """Return host arrays to fill in, for nobody: slot number `slots` is none."""
    slot, zeros = np.full(count, slots, np.int32), np.zeros(count, np.int32)
    return Starts(slot, zeros, zeros + 1, np.zeros((count, vocab_size), bool), blank_settings(count))


def new_slots(config: ModelConfig, slots: int, capacity: int, dtype: jnp.dtype | type) -> Slots:
    """Return idle slots of `capacity` tokens."""
    return Slots(
        cache=new_cache(config, slots, capacity, dtype),
        token=jnp.zeros(slots, jnp.int32),
        status=jnp.full(slots, IDLE, jnp.int32),
        remaining=jnp.zeros(slots, jnp.int32),
        seen=jnp.zeros((slots, config.vocab_size), bool),
        settings=jax.tree.map(jnp.asarray, blank_settings(slots)),
        forced=jnp.full((slots, FORCED + 1), NO_TOKEN, jnp.int32),
        forced_next=jnp.zeros(slots, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="slots")
def admit(
    config: ModelConfig, params: Params, slots: Slots, tokens: jax.Array, length: jax.Array, starts: Starts
) -> Slots:
    """Prefill prompts at once and start them in slots.

    Args:
      params: from `serving_params`.
      tokens: (P, T) int32, right-padded; length: (P,) int32 of each whole prompt, at least 1, at most T + 1. All but
        the last token are prefilled, so that sampling happens in one place, the decoding step.
    """
    rows, capacity = tokens.shape
    empty = new_cache(config, rows, capacity, slots.cache.previous.dtype)
    return _started(slots, append(config, params, tokens, length - 1, empty, empty=True)[1], starts)


@functools.partial(jax.jit, static_argnames="config")
def copy_prefix(
    config: ModelConfig, params: Params, slots: Slots, slot: jax.Array, length: jax.Array, last: jax.Array
) -> Cache:
    """Copy the first `length` (G,) positions of slots (G,), to go on from; `last` (G,) is the token at their end.

    Length 0 begins a sequence, whatever the slot holds. A windowed layer must not have lost what its window still
    needs there.
    """
    cache: Cache = jax.tree.map(lambda a: a[slot], slots.cache)
    _, e = embed(config, params, last[:, None])
    previous = jnp.where(length[:, None] > 0, e[:, 0], 0).astype(cache.previous.dtype)
    return Cache(cache.k, cache.v, length, previous)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="rows")
def prefill_chunk(config: ModelConfig, params: Params, rows: Cache, tokens: jax.Array, count: jax.Array) -> Cache:
    """Append `count` (G,) of the tokens (G, T) to rows from `copy_prefix`."""
    return append(config, params, tokens, count, rows)[1]


@functools.partial(jax.jit, donate_argnames="slots")
def start(slots: Slots, rows: Cache, starts: Starts) -> Slots:
    """Start slots from rows (G) that hold all of their prompts but the last token."""
    return _started(slots, rows, starts)


def _started(slots: Slots, rows: Cache, starts: Starts) -> Slots:
    def put(into: jax.Array, new: Any) -> jax.Array:
        # rows may hold fewer positions; a ring of theirs that is shorter has not come round
        part = tuple(slice(size) for size in jnp.shape(new)[1:])
        return into.at[(starts.slot, *part)].set(new, mode="drop")

    return Slots(
        cache=jax.tree.map(put, slots.cache, rows),
        token=put(slots.token, starts.token),
        status=put(slots.status, RUNNING),
        remaining=put(slots.remaining, starts.remaining),
        seen=put(slots.seen, starts.seen),
        settings=jax.tree.map(put, slots.settings, starts.settings),
        forced=slots.forced,
        forced_next=put(slots.forced_next, FORCED),
    )


@functools.partial(jax.jit, donate_argnames="slots")
def resume(slots: Slots, slot: jax.Array, forced: jax.Array) -> Slots:
    """Let paused slots (G,) go on with the `forced` tokens (G, F + 1) first."""
    return replace(
        slots,
        status=slots.status.at[slot].set(RUNNING, mode="drop"),
        forced=slots.forced.at[slot].set(forced, mode="drop"),
        forced_next=slots.forced_next.at[slot].set(0, mode="drop"),
    )


@functools.partial(jax.jit, donate_argnames="slots")
def swap(slots: Slots, pair: jax.Array) -> Slots:
    """Exchange all that two slots hold, pair (G, 2): keeps the busy rows together."""
    for one in pair:
        slots = jax.tree.map(lambda a, one=one: a.at[one].set(a[one[::-1]], mode="drop"), slots)
    return slots


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, slot: jax.Array) -> Slots:
    """Stop slots (G,) whose requests are gone; their caches stay."""
    return replace(slots, status=slots.status.at[slot].set(IDLE, mode="drop"))


# Decoding


@jax.tree_util.register_dataclass
@dataclass
class ChunkOutput:
    """Output of a decoding chunk of R rows."""

    tokens: jax.Array  # (R, steps) int32, NO_TOKEN where a row made none
    status: jax.Array  # (R,) int32
    logprob: jax.Array  # (R, steps) float32, of rows that report, else 0
    top: jax.Array  # (R, steps, TOP) int32 likeliest ids; NO_TOKEN where the vocabulary has fewer
    top_logprob: jax.Array  # (R, steps, TOP) float32


@functools.partial(jax.jit, static_argnames=("config", "rows", "bucket", "steps", "capacity"), donate_argnames="slots")
def decode_chunk(
    config: ModelConfig, params: Params, slots: Slots, rows: int, bucket: int, steps: int, capacity: int
) -> tuple[Slots, ChunkOutput]:
    """Run `steps` decoding steps of the first `rows` slots, on a CPU fewer where none runs any more.

    A row that stops, pauses or is full makes no more tokens and writes nothing. The rows' part of the cache is cut
    out once per chunk, so every step reads only the live bucket.

    Args:
      bucket: cache positions to keep at hand, at least every running row's length after the chunk (or `capacity`).
        A ring that is longer has not come round yet, so its first positions are all it holds.
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

    part = jax.tree.map(lambda a: a[:rows], slots)
    part.cache.k, part.cache.v = (tuple(a[:, :, :bucket] for a in side) for side in (part.cache.k, part.cache.v))
    nothing = (
        jnp.full((steps, rows), NO_TOKEN, jnp.int32),
        jnp.zeros((steps, rows), jnp.float32),
        jnp.zeros((steps, rows, TOP), jnp.int32),
        jnp.zeros((steps, rows, TOP), jnp.float32),
    )
    _, part, made = jax.lax.while_loop(going, step, (jnp.int32(0), part, nothing))
    tokens, *reported = (a.swapaxes(0, 1) for a in made)

    def paste(into: jax.Array, new: jax.Array) -> jax.Array:
        return new if into.shape == new.shape else jax.lax.dynamic_update_slice(into, new, (0,) * into.ndim)

    return jax.tree.map(paste, slots, part), ChunkOutput(tokens, part.status, *reported)


def _step(config: ModelConfig, params: Params, slots: Slots, capacity: int) -> tuple[Slots, tuple[jax.Array, ...]]:
    """Return the slots after one token, and (tokens, logprob, top, top_logprob) as in `ChunkOutput`."""
    s, running = slots.settings, slots.status == RUNNING
    x, cache = append(config, params, slots.token[:, None], running.astype(jnp.int32), slots.cache)
    z = logits(config, params, x[:, 0])
    seen, penalized = _penalize(z, slots, running)
    sampled = sample(penalized, s.seed, cache.length, s.temperature, s.top_k, s.top_p, s.min_p)
    queued = jnp.take_along_axis(slots.forced, slots.forced_next[:, None], axis=1)[:, 0]
    forcing = running & (queued != NO_TOKEN)
    token = jnp.where(forcing, queued, sampled)
    remaining = slots.remaining - running
    status = jnp.where(~forcing & (token == s.pause), PAUSED, RUNNING)
    status = jnp.where((remaining <= 0) | (cache.length >= capacity), FULL, status)
    status = jnp.where(~forcing & (token[:, None] == s.stop).any(axis=1), STOPPED, status)
    after = replace(
        slots,
        cache=cache,
        token=jnp.where(running, token, slots.token),
        status=jnp.where(running, status, slots.status),
        remaining=remaining,
        seen=seen,
        forced_next=slots.forced_next + forcing,
    )
    R = len(token)
    report = jax.lax.cond(
        jnp.any(running & s.report),
        lambda: log_probabilities(z, token),
        lambda: (jnp.zeros(R, jnp.float32), jnp.zeros((R, TOP), jnp.int32), jnp.zeros((R, TOP), jnp.float32)),
    )
    return after, (jnp.where(running, token, NO_TOKEN), *report)


def _penalize(z: jax.Array, slots: Slots, running: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (`seen` with the rows' newest tokens, logits lowered for repetitions); rows without penalty stay."""
    penalty = slots.settings.penalty[:, None]
    wanted = running & (penalty[:, 0] != 1)
    rows = jnp.where(wanted, jnp.arange(len(wanted)), len(wanted))
    seen = slots.seen.at[rows, slots.token].set(True, mode="drop")
    lower = jnp.where(z > 0, z / penalty, z * penalty)
    return seen, jnp.where(seen & wanted[:, None], lower, z)


def log_probabilities(z: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return of logits z (R, V): the token's log-probability (R,), the likeliest ids (R, TOP) and theirs."""
    z = z - jax.nn.logsumexp(z, axis=-1, keepdims=True)
    best, ids = jax.lax.top_k(z, min(TOP, z.shape[-1]))
    spare = ((0, 0), (0, TOP - best.shape[-1]))
    chosen = jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0]
    return chosen, jnp.pad(ids, spare, constant_values=NO_TOKEN), jnp.pad(best, spare)


# Log-probabilities of given texts, by the engine's own weights. Texts of like length run together in a few shapes.

SHORTEST = 128  # tokens; each length is four times the one before
BATCH_TOKENS = 4096  # of one call on an accelerator; on a CPU one text, which keeps it as busy
CHUNK = 128  # positions whose logits are alive at once


@functools.partial(jax.jit, static_argnames="config")
def score_tokens(config: ModelConfig, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the log-probability (B, T) of every token's successor in tokens (B, T), and after each position the
    likeliest ids (B, T, TOP) with theirs. The last position's successor is taken to be 0."""
    B, T = tokens.shape
    backend, _ = choose_backend(config, params["embedding"].dtype, jax.devices()[0], T)
    x = hidden(config, params, tokens, LayerOptions(backend=backend))
    chunk = next(c for c in range(min(CHUNK, B * T), 0, -1) if B * T % c == 0)
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    parts = x.reshape(-1, chunk, x.shape[-1]), following.reshape(-1, chunk)
    scores = jax.lax.map(lambda part: log_probabilities(logits(config, params, part[0]), part[1]), parts)
    return tuple(a.reshape(B, T, *a.shape[2:]) for a in scores)  # type: ignore[return-value]


def rows_of(length: int) -> int:
    """Return how many texts of that length run in one call."""
    return 1 if jax.default_backend() == "cpu" else max(1, BATCH_TOKENS // length)


def report(token: int, count: int, i: int, outputs: Sequence[np.ndarray]) -> Token:
    """Return entry i of a row's (logprob, top, top_logprob), with `count` alternatives."""
    logprob, top, values = (a[i] for a in outputs)
    pairs = zip(top[:count].tolist(), values[:count].tolist(), strict=True)
    return Token(int(token), float(logprob), tuple(pair for pair in pairs if pair[0] != NO_TOKEN))


# Programs

MIN_PROMPT_BUCKET = 32  # tokens
MIN_CACHE_BUCKET = 512  # positions; cutting out fewer costs more than reading them
PROMPT_CHUNK = 512  # tokens of a prompt that run at once while others wait for their next ones
# Short prompts prefilled at once. One keeps a CPU as busy, and there every prompt runs in chunks as a long one does, so
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
WITH_CONFIG = (admit, copy_prefix, prefill_chunk, decode_chunk, score_tokens)


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
        self.prompt_chunk = min(PROMPT_CHUNK, capacity)
        self.prompt_buckets = buckets(MIN_PROMPT_BUCKET, self.prompt_chunk)
        self.cache_buckets = buckets(MIN_CACHE_BUCKET, capacity)
        self.params: Any = None
        self._compiling: dict[Any, Future[None]] = {}  # programs of a background warm-up
        shape = self.config, slots, capacity, dtype
        self.state: Slots = _new_slots(NamedSharding(self.mesh, ROWS))(*shape) if self.mesh else new_slots(*shape)

    def load(self, params: Any, weights: str) -> None:
        """Take weights, in the training layout or as `serving_params` made them."""
        place = replicated(self.mesh) if self.mesh else None
        if "layers" in params:
            self.params = jax.device_put(params, place) if place else params
        else:
            self.params = _serve(place)(self.config, params, self.dtype, weights)

    # Each argument below is a NumPy array with `devices` entries (or as many times `group`) on its first axis

    def admit(self, tokens: Any, length: Any, starts: Starts) -> None:
        self._change(admit, params=self.params, tokens=tokens, length=length, starts=starts)

    def copy_prefix(self, slot: Any, length: Any, last: Any) -> Cache:
        return self._run(copy_prefix, params=self.params, slots=self.state, slot=slot, length=length, last=last)

    def prefill_chunk(self, rows: Cache, tokens: Any, count: Any) -> Cache:
        return self._run(prefill_chunk, params=self.params, rows=rows, tokens=tokens, count=count)

    def start(self, rows: Cache, starts: Starts) -> None:
        self._change(start, rows=rows, starts=starts)

    def decode(self, rows: int, bucket: int) -> ChunkOutput:
        """Run a chunk of the first `rows` slots of every device; the outputs have the first device's rows first."""
        static = {"rows": rows, "bucket": bucket, "steps": self.chunk, "capacity": self.capacity}
        self.state, made = self._run(decode_chunk, static, params=self.params, slots=self.state)
        return made

    def resume(self, slot: int, ids: Sequence[int]) -> None:
        forced = np.full((self.devices, FORCED + 1), NO_TOKEN, np.int32)
        forced[:, : len(ids)] = ids
        self._change(resume, slot=self.only(slot), forced=forced)

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots of one device."""
        self._change(swap, pair=np.stack([self.only(a), self.only(b)], axis=1))

    def release(self, slot: int) -> None:
        self._change(release, slot=self.only(slot))

    def only(self, slot: int) -> np.ndarray:
        """Return the number of a slot on its device, and on the others one that is no slot; (devices,) int32."""
        numbers = np.full(self.devices, self.slots, np.int32)
        if slot < self.slots * self.devices:
            numbers[slot // self.slots] = slot % self.slots
        return numbers

    def blank_starts(self, count: int) -> Starts:
        return blank_starts(count, self.slots, self.config.vocab_size)

    def score(self, batch: Sequence[Sequence[int]]) -> list[list[Token | None]]:
        """Return a `Token` for each id of each text (at most `capacity` ids), None for the first."""
        scores: list[list[Token | None]] = [[None] * min(1, len(ids)) for ids in batch]
        by_length: dict[int, list[int]] = {}
        for index, ids in enumerate(batch):
            length = next(n for n in buckets(SHORTEST, self.capacity, 4) if n >= len(ids))
            by_length.setdefault(length, []).append(index)
        for length, members in by_length.items():
            for at in range(0, len(members), rows_of(length)):
                part = members[at : at + rows_of(length)]
                tokens = np.zeros((rows_of(length), length), np.int32)
                for i, index in enumerate(part):
                    tokens[i, : len(batch[index])] = batch[index]
                outputs = [np.asarray(a) for a in self._run(score_tokens, params=self.params, tokens=tokens)]
                for i, index in enumerate(part):
                    own = [a[i] for a in outputs]
                    scores[index] += [report(token, TOP, n, own) for n, token in enumerate(list(batch[index])[1:])]
        return scores

    def warm_up(self, background: bool = False) -> Iterator[int]:
        """Compile every program that a request can need, several at once; yields how many are still to come.

        Nothing runs. With `background` it ends once a short request of a single client can be answered. The other
        programs go on compiling in threads; whoever needs one that is not there yet waits for that one alone.
        """
        calls = list(self._calls())
        first = [call for call in calls if self._is_first(*call)] if background else calls
        yield len(calls)
        threads = min(COMPILERS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            compiling = [pool.submit(self._compile, *call) for call in first]
            try:
                for left, done in enumerate(as_completed(compiling), 1):
                    done.result()
                    yield len(calls) - left
            finally:  # whoever stops listening need not wait for all of them
                pool.shutdown(wait=True, cancel_futures=True)
        if background:

            def compile_one(call: _Call) -> None:
                if threading.main_thread().is_alive():  # else the process is about to end
                    self._compile(*call)

            pool = ThreadPoolExecutor(max(1, threads // 2), thread_name_prefix="compiler")
            rest = [call for call in calls if not self._is_first(*call)]
            self._compiling = {_key(*call): pool.submit(compile_one, call) for call in rest}
            pool.shutdown(wait=False)

    @property
    def compiling(self) -> int:
        """Number of programs that `warm_up` has still to compile."""
        return sum(not future.done() for future in list(self._compiling.values()))

    def stop_compiling(self) -> None:
        """Drop what a background warm-up has not begun; a needed program compiles when it is used."""
        for future in list(self._compiling.values()):
            future.cancel()

    def _is_first(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> bool:
        """Whether a short request of a single client needs this program."""
        if function is decode_chunk:
            return static["rows"] == self.least_rows and static["bucket"] == self.cache_buckets[0]
        if function in (admit, prefill_chunk):
            return arguments["tokens"].shape == (self.devices, self.prompt_buckets[0])
        return function is start

    def _calls(self) -> Iterator[_Call]:
        """Yield (function, static arguments, others) of every program, the slowest to compile first.

        State and weights are given as shapes: the arrays may be gone when a thread comes to compile.
        """
        D, params, slots = self.devices, _shapes(self.params), _shapes(self.state)
        slot, zeros = self.only(self.slots * D), np.zeros(D, np.int32)
        rows = _shapes(self.copy_prefix(zeros, zeros, zeros))  # also the first program
        for count in reversed(buckets(self.least_rows, self.slots)):
            for bucket in self.cache_buckets:
                static = {"rows": count, "bucket": bucket, "steps": self.chunk, "capacity": self.capacity}
                yield decode_chunk, static, {"params": params, "slots": slots}
        for bucket in reversed(self.prompt_buckets):
            for size in {1, self.group} if self.group else ():
                prompts = {"tokens": np.zeros((size * D, bucket), np.int32), "length": np.ones(size * D, np.int32)}
                yield admit, {}, {"slots": slots, "params": params, **prompts, "starts": self.blank_starts(size * D)}
            tokens = np.zeros((D, bucket), np.int32)
            yield prefill_chunk, {}, {"params": params, "rows": rows, "tokens": tokens, "count": zeros}
        for length in buckets(SHORTEST, self.capacity, 4):
            yield score_tokens, {}, {"params": params, "tokens": np.zeros((rows_of(length), length), np.int32)}
        yield start, {}, {"slots": slots, "rows": rows, "starts": self.blank_starts(D)}
        yield resume, {}, {"slots": slots, "slot": slot, "forced": np.zeros((D, FORCED + 1), np.int32)}
        yield swap, {}, {"slots": slots, "pair": np.stack([slot, slot], axis=1)}
        yield release, {}, {"slots": slots, "slot": slot}

    def _compile(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> None:
        run, args, kwargs = self._ready(function, static, arguments)
        run.lower(*args, **kwargs).compile()

    def _change(self, function: Any, **arguments: Any) -> None:
        self.state = self._run(function, slots=self.state, **arguments)

    def _run(self, function: Any, static: dict[str, Any] | None = None, **arguments: Any) -> Any:
        if self._compiling:
            future = self._compiling.pop(_key(function, static or {}, arguments), None)
            if future and not future.cancel():  # it compiles just now; one that waits its turn is left to this call
                future.result()
        run, args, kwargs = self._ready(function, static or {}, arguments)
        return run(*args, **kwargs)

    def _ready(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Return a jitted function, and its positional and named arguments."""
        if function in WITH_CONFIG:
            static = static | {"config": self.config}
        if self.mesh is None or function is score_tokens:
            return function, (), static | arguments
        kept = ("params", "slots", "rows")  # lie where they should
        placed = jax.device_put({k: v for k, v in arguments.items() if k not in kept}, NamedSharding(self.mesh, ROWS))
        run = _sharded(function, self.mesh, tuple(sorted(static.items())), tuple(arguments))
        return run, tuple((arguments | placed).values()), {}


def _shapes(tree: Any) -> Any:
    """Return what `lower` must know of arrays."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if a.committed else None), tree
    )


def _key(function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """Return what tells a program from the others: the shapes of what comes from the host differ."""
    shapes = [(name, a.shape) for name, a in sorted(arguments.items()) if isinstance(a, np.ndarray)]
    if "starts" in arguments:
        shapes.append(("starts", arguments["starts"].slot.shape))
    return function, tuple(sorted(static.items())), tuple(shapes)


@functools.cache
def _serve(place: NamedSharding | None) -> Any:
    return jax.jit(serving_params, static_argnums=(0, 2, 3), out_shardings=place)


@functools.cache
def _new_slots(place: NamedSharding) -> Any:
    return jax.jit(new_slots, static_argnums=(0, 1, 2, 3), out_shardings=place)


@functools.cache
def _sharded(function: Any, mesh: Mesh, static: tuple[tuple[str, Any], ...], names: tuple[str, ...]) -> Any:
    """Return `function` on every device's own part of its arguments; weights alone are whole everywhere."""

    def local(*arguments: Any) -> Any:
        return function.__wrapped__(**dict(static), **dict(zip(names, arguments, strict=True)))

    donated = {copy_prefix: (), prefill_chunk: ("rows",)}.get(function, ("slots",))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=tuple(P() if n == "params" else ROWS for n in names), out_specs=ROWS, check_vma=False
    )
    return jax.jit(run, donate_argnums=tuple(names.index(name) for name in donated))


def least_rows() -> int:
    """Return how many rows the smallest chunk has on this machine: slots for a single person."""
    return LEAST_ROWS.get(jax.default_backend(), ACCELERATOR_ROWS)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def buckets(smallest: int, largest: int, factor: int = 2) -> list[int]:
    """Return sizes from the smallest on, each `factor` times the one before, and the largest itself."""
    sizes = [min(smallest, largest)]
    while sizes[-1] < largest:
        sizes.append(min(sizes[-1] * factor, largest))
    return sizes
