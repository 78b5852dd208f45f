"""The engine's compiled programs and the state of its slots, on one device or on several that share the slots.

On several devices each one owns a part of the slots and runs the same program on it, with whole weights of its own, so
nothing moves between them. Slots are numbered across devices, the first device's slots first. Every array of the state
has one entry for each slot on its first axis, every argument from the host one for each device (or a multiple). An
update of a slot number out of range is dropped.

What differs between requests is data: no new setting compiles anything. Only ids pass here; text is `request.py`'s.

Axes: R slots or rows (the first slots), P prompts, T time, V vocabulary, F forced tokens, G sequences of one call, one
on each device.
"""

from __future__ import annotations

import functools
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
from jaxchat.data.shards import cores
from jaxchat.engine.request import EVERY_TOKEN, FORCED, MAX_STOP_IDS, NO_TOKEN, Token
from jaxchat.kv_cache import Cache, append, new_cache, serving_params
from jaxchat.model import LayerOptions, Params, hidden, logits
from jaxchat.sharding import BATCH_AXES, replicated

# The state of the slots

IDLE, RUNNING, PAUSED, STOPPED, FULL = range(5)  # status of a slot; STOPPED by a stop id, FULL by a limit
TOP = 20  # alternatives that are reported
VOCABULARY = -1  # stands for an axis of the vocabulary's size
VOCABULARY_BITS = -2  # and this for one of `words` with a bit for each id
ALL = 2**32 - 1  # a word of 32 allowed ids
BANNED = -1e9  # logit of a token that comes only where a grammar allows no other; finite, so that sums stay numbers
# What a slot holds beside keys and values, and what a request brings to it: (dtype, further axes, blank value). A new
# setting is an entry here, its value in `Scheduler._start_rows`, and its use in `adjust_logits`, `sample` or `_step`.
ROW: dict[str, tuple[Any, tuple[int, ...], float]] = {
    "status": (np.int32, (), IDLE),
    "token": (np.int32, (), 0),  # the newest, not yet in the cache
    "remaining": (np.int32, (), 1),  # tokens that may still be made
    "seed": (np.uint32, (), 0),
    "temperature": (np.float32, (), 0.0),  # 0: greedy
    "top_k": (np.int32, (), 0),  # 0: off
    "top_p": (np.float32, (), 1.0),  # 1: off
    "min_p": (np.float32, (), 0.0),  # 0: off
    "adjusts": (np.bool_, (), False),  # whether any of the settings down to `allowed` changes logits
    "repetition_penalty": (np.float32, (), 1.0),  # of ids in prompt and answer; 1: off
    "frequency_penalty": (np.float32, (), 0.0),  # of ids in the answer, each time; 0: off
    "presence_penalty": (np.float32, (), 0.0),  # of ids in the answer, once; 0: off
    "uses": (np.int32, (VOCABULARY,), 0),  # twice an id's number in the answer, plus 1 where the prompt has it
    "bias": (np.float32, (VOCABULARY,), 0.0),
    "least": (np.int32, (), 0),  # tokens that must still be made before a stop id
    "allowed": (np.uint32, (VOCABULARY_BITS,), ALL),  # one bit for each id
    "report": (np.bool_, (), False),  # whether log-probabilities are wanted
    "stop": (np.int32, (MAX_STOP_IDS,), NO_TOKEN),
    "pause": (np.int32, (), NO_TOKEN),  # id at which the row waits for the host, or EVERY_TOKEN
    "forced": (np.int32, (FORCED + 1,), NO_TOKEN),  # tokens that replace sampled ones, NO_TOKEN at the end
    "forced_next": (np.int32, (), 0),  # place of the next one
}
Rows = dict[str, Any]  # an array (R, ...) for each entry of `ROW`


@jax.tree_util.register_dataclass
@dataclass
class Slots:
    """State of R sequences on the device."""

    cache: Cache
    rows: Rows


def words(vocab_size: int) -> int:
    """Return how many words of 32 bits have one bit for each id."""
    return -(-vocab_size // 32)


def blank_rows(count: int, vocab_size: int, full: Callable[..., Any] = np.full) -> Rows:
    """Return idle rows: greedy, without stop or pause. Host arrays to fill in, or what `full` makes."""
    sizes = {VOCABULARY: vocab_size, VOCABULARY_BITS: words(vocab_size)}
    return {
        name: full((count, *(sizes.get(n, n) for n in axes)), value, dtype)
        for name, (dtype, axes, value) in ROW.items()
    }


def new_slots(config: ModelConfig, slots: int, capacity: int, dtype: jnp.dtype | type) -> Slots:
    """Return idle slots of `capacity` tokens."""
    return Slots(new_cache(config, slots, capacity, dtype), blank_rows(slots, config.vocab_size, jnp.full))


@jax.jit
def copy_prefix(slots: Slots, slot: jax.Array, length: jax.Array, last: jax.Array) -> Cache:
    """Copy the first `length` (G,) positions of slots (G,), to go on from; `last` (G,) is the token at their end.

    Length 0 begins a sequence, whatever the slot holds. A windowed layer must not have lost what its window still
    needs there.
    """
    cache: Cache = jax.tree.map(lambda a: a[slot], slots.cache)
    return Cache(cache.k, cache.v, length, jnp.where(length > 0, last, -1))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill_chunk(config: ModelConfig, params: Params, cache: Cache, tokens: jax.Array, count: jax.Array) -> Cache:
    """Append `count` (G,) of the tokens (G, T) to a cache from `copy_prefix`."""
    return append(config, params, tokens, count, cache)[1]


@functools.partial(jax.jit, donate_argnames="slots")
def start(slots: Slots, cache: Cache, slot: jax.Array, rows: Rows) -> Slots:
    """Start slots (P,) with the keys and values of all of their prompts but the last token, and with `rows`."""

    def put(into: jax.Array, new: jax.Array) -> jax.Array:
        # the cache may have fewer positions than a slot; a shorter ring has not wrapped around yet
        return into.at[(slot, *(slice(size) for size in new.shape[1:]))].set(new, mode="drop")

    return jax.tree.map(put, slots, Slots(cache, rows))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="slots")
def admit(
    config: ModelConfig,
    params: Params,
    slots: Slots,
    tokens: jax.Array,
    length: jax.Array,
    slot: jax.Array,
    rows: Rows,
) -> Slots:
    """Prefill prompts at once and start them in slots (P,).

    Args:
      params: from `serving_params`.
      tokens: (P, T) int32, right-padded; length: (P,) int32 of each whole prompt, at least 1, at most T + 1. All but
        the last token are prefilled, so that sampling happens in one place, the decoding step.
      rows: settings of the prompts' answers.
    """
    empty = new_cache(config, tokens.shape[0], tokens.shape[1], slots.cache.k[0].dtype)
    return start(slots, append(config, params, tokens, length - 1, empty, empty=True)[1], slot, rows)


@functools.partial(jax.jit, donate_argnames="slots")
def set_status(slots: Slots, slot: jax.Array, status: jax.Array, forced: jax.Array, allowed: jax.Array) -> Slots:
    """Set the status (G,) of slots (G,), the tokens (G, F + 1) that are forced next and the bits of those that are
    allowed. Their caches stay."""
    new = {"status": status, "forced": forced, "forced_next": jnp.zeros_like(status), "allowed": allowed}
    rows = {name: slots.rows[name].at[slot].set(value, mode="drop") for name, value in new.items()}
    return replace(slots, rows=slots.rows | rows)


@functools.partial(jax.jit, donate_argnames="slots")
def swap(slots: Slots, pair: jax.Array) -> Slots:
    """Exchange all that two slots hold, pair (G, 2): keeps the busy rows together."""
    for one in pair:
        slots = jax.tree.map(lambda a, one=one: a.at[one].set(a[one[::-1]], mode="drop"), slots)
    return slots


# Decoding


@functools.partial(jax.jit, static_argnames=("config", "rows", "bucket", "steps", "capacity"), donate_argnames="slots")
def decode_chunk(
    config: ModelConfig,
    params: Params,
    slots: Slots,
    most: jax.Array,
    rows: int,
    bucket: int,
    steps: int,
    capacity: int,
) -> tuple[Slots, tuple[jax.Array, ...]]:
    """Run `steps` decoding steps of the first `rows` slots, on a CPU `most` (G,) and fewer where none runs any more.

    A row that stops, pauses or is full makes no more tokens and writes nothing. The rows' part of the cache is cut
    out once per chunk, so every step reads only the live bucket.

    Args:
      bucket: cache positions to keep at hand, at least every running row's length after the chunk (or `capacity`).
        A longer ring has not wrapped around yet, so its first positions are all that it holds.
      capacity: tokens a cache row can hold; the token that would not fit any more is still made.

    Returns: the slots, and for each row its tokens (R, steps), NO_TOKEN where it made none; its status (R,); and where
    it reports them the tokens' log-probabilities (R, steps), the likeliest ids (R, steps, TOP), NO_TOKEN where the
    vocabulary has fewer, and theirs (R, steps, TOP).
    """

    def going(state: Any) -> jax.Array:
        i, part, _ = state
        # this condition would stall a GPU at every step
        goes_on = jax.lax.platform_dependent(
            part.rows["status"],
            cpu=lambda status: jnp.any(status == RUNNING) & (i < most[0]),
            default=lambda status: jnp.bool_(True),
        )
        return (i < steps) & goes_on

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

    return jax.tree.map(paste, slots, part), (tokens, part.rows["status"], *reported)


def _step(config: ModelConfig, params: Params, slots: Slots, capacity: int) -> tuple[Slots, tuple[jax.Array, ...]]:
    """Return the slots after one token, and (tokens, logprob, top, top_logprob) of `decode_chunk`."""
    r, running = slots.rows, slots.rows["status"] == RUNNING
    x, cache = append(config, params, r["token"][:, None], running.astype(jnp.int32), slots.cache)
    z = logits(config, params, x[:, 0])
    adjusts = running & r["adjusts"]
    adjusted = jax.lax.platform_dependent(  # a condition would stall a GPU
        cpu=lambda: jax.lax.cond(jnp.any(adjusts), lambda: adjust_logits(z, r), lambda: z),
        default=lambda: adjust_logits(z, r),
    )
    sampled = sample(adjusted, r, cache.length)
    queued = jnp.take_along_axis(r["forced"], r["forced_next"][:, None], axis=1)[:, 0]
    forcing = running & (queued != NO_TOKEN)
    token = jnp.where(forcing, queued, sampled)
    remaining = r["remaining"] - running
    pausing = (token == r["pause"]) | (r["pause"] == EVERY_TOKEN)
    status = jnp.where(~forcing & pausing, PAUSED, RUNNING)
    status = jnp.where((remaining <= 0) | (cache.length >= capacity), FULL, status)
    status = jnp.where(~forcing & (token[:, None] == r["stop"]).any(axis=1), STOPPED, status)
    R = len(token)
    rows = r | {
        "token": jnp.where(running, token, r["token"]),
        "status": jnp.where(running, status, r["status"]),
        "remaining": remaining,
        "uses": r["uses"].at[jnp.where(adjusts, jnp.arange(R), R), token].add(2, mode="drop"),
        "least": r["least"] - running,
        "forced_next": r["forced_next"] + forcing,
    }
    report = jax.lax.cond(
        jnp.any(running & r["report"]),
        lambda: log_probabilities(z, token),
        lambda: (jnp.zeros(R, jnp.float32), jnp.zeros((R, TOP), jnp.int32), jnp.zeros((R, TOP), jnp.float32)),
    )
    return Slots(cache, rows), (jnp.where(running, token, NO_TOKEN), *report)


def adjust_logits(z: jax.Array, rows: Rows) -> jax.Array:
    """Return logits z (R, V) with penalties, then bias, then without stop ids that come too early and ids that a
    grammar does not allow."""
    settings = {name: rows[name][:, None] for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")}
    uses, repetition = rows["uses"], settings["repetition_penalty"]
    z = jnp.where(uses > 0, jnp.where(z > 0, z / repetition, z * repetition), z)
    z -= settings["frequency_penalty"] * (uses >> 1) + settings["presence_penalty"] * (uses > 1)
    z += rows["bias"]
    R, V = z.shape
    early = jnp.where((rows["stop"] != NO_TOKEN) & (rows["least"][:, None] > 0), rows["stop"], V)
    z = z.at[jnp.arange(R)[:, None], early].set(BANNED, mode="drop")
    bits = rows["allowed"][:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return jnp.where(bits.reshape(R, -1)[:, :V] > 0, z, -jnp.inf)


def log_probabilities(z: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return of logits z (R, V): the token's log-probability (R,), the likeliest ids (R, TOP) and theirs."""
    z = z - jax.nn.logsumexp(z, axis=-1, keepdims=True)
    best, ids = jax.lax.top_k(z, min(TOP, z.shape[-1]))
    spare = ((0, 0), (0, TOP - best.shape[-1]))
    chosen = jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0]
    return chosen, jnp.pad(ids, spare, constant_values=NO_TOKEN), jnp.pad(best, spare)


def report(token: int, count: int, i: int, outputs: Sequence[np.ndarray]) -> Token:
    """Return entry i of a row's (logprob, top, top_logprob), with `count` alternatives."""
    logprob, top, values = (a[i] for a in outputs)
    pairs = zip(top[:count].tolist(), values[:count].tolist(), strict=True)
    return Token(int(token), float(logprob), tuple(pair for pair in pairs if pair[0] != NO_TOKEN))


# Sampling. Top-k and top-p (nucleus, 1904.09751) cut by a threshold, found without sorting the vocabulary. The draw
# inverts the cumulative distribution with one uniform number, which depends on the row's own seed and position alone.

BITS = 30  # of a float32 from 0 to 1; the bits of non-negative floats are ordered as the floats are
DIGIT = 3  # bits that an accelerator settles in one pass
BLOCK = 64  # neighbouring ids that a draw looks at together


def sample(logits: jax.Array, rows: Rows, position: jax.Array) -> jax.Array:
    """Return the next token (R,) int32 of each row. Tokens as likely as the last one kept are kept too.

    Args:
      logits: (R, V) float32; position: (R,) int32 of the token in its sequence.
      rows: `seed`, `temperature` (0 or less is greedy), `top_k`, `top_p` and `min_p` of each row.
    """
    temperature, top_k, top_p = rows["temperature"], rows["top_k"], rows["top_p"]
    highest = logits.max(axis=-1, keepdims=True)
    greedy = _first(logits == highest)

    def by_count(p: jax.Array) -> jax.Array:
        k = jnp.where(top_k > 0, top_k, p.shape[-1]).astype(jnp.float32)
        return _threshold(p, jnp.ones((), p.dtype), k)

    def by_mass(p: jax.Array) -> jax.Array:
        """Top-p is a share of the mass that top-k leaves."""
        least = by_count(p)
        kept = jnp.where(p >= least[:, None], p, 0.0)
        nucleus = _threshold(kept, kept, top_p * kept.sum(axis=-1))
        return jnp.where(top_p < 1.0, jnp.maximum(least, nucleus), least)

    def draw(cut: Callable[[jax.Array], jax.Array]) -> jax.Array:
        scale = 1.0 / jnp.maximum(temperature, 1e-4)
        p = jnp.exp((logits - highest) * scale[:, None])  # the largest is 1
        p = jnp.where(p >= jnp.maximum(cut(p), rows["min_p"])[:, None], p, 0.0)
        keys = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(rows["seed"], position)
        return jnp.where(temperature > 0, _draw(p, jax.vmap(jax.random.uniform)(keys), greedy), greedy)

    need = jnp.where(jnp.any(top_p < 1.0), 3, jnp.where(jnp.any(top_k > 0), 2, 1))
    return jax.lax.switch(  # one branch for all rows, since every branch stalls a GPU
        jnp.where(jnp.any(temperature > 0), need, 0),
        [
            lambda: greedy,
            lambda: draw(lambda p: jnp.zeros(len(p))),
            lambda: draw(by_count),
            lambda: draw(by_mass),
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


def _threshold(p: jax.Array, weight: jax.Array, goal: jax.Array) -> jax.Array:
    """Return the largest t (R,) in [0, 1] for which the weight of the values p >= t reaches `goal` (R,).

    Or another number that leaves the same values of p (R, V). Its bits are settled from the highest one on.
    """
    zero = jnp.zeros(len(p), jnp.int32)

    def amount(bits: jax.Array) -> jax.Array:
        at_least = p >= jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]
        return jnp.sum(jnp.where(at_least, weight, 0.0), axis=-1)

    def until_exact() -> jax.Array:
        def going(state: Any) -> jax.Array:
            bit, _, reached = state
            return (bit > 0) & jnp.any(reached != goal)

        def settle(state: Any) -> Any:
            bit, low, reached = state
            there = amount(low + bit)
            enough = there >= goal
            return bit >> 1, jnp.where(enough, low + bit, low), jnp.where(enough, there, reached)

        return jax.lax.while_loop(going, settle, (jnp.int32(1 << BITS - 1), zero, amount(zero)))[1]

    def all_bits() -> jax.Array:
        low = zero
        for shift in range(BITS - DIGIT, -1, -DIGIT):
            amounts = [amount(low + (digit << shift)) for digit in range(1, 1 << DIGIT)]
            low += sum((a >= goal).astype(jnp.int32) for a in amounts) << shift
        return low

    # ending early pays on a CPU; a GPU stalls at every iteration of a loop
    bits = jax.lax.platform_dependent(cpu=until_exact, default=all_bits)
    return jnp.minimum(jax.lax.bitcast_convert_type(bits, jnp.float32), 1.0)


# Log-probabilities of given texts, by the engine's own weights

SCORED = 128  # positions whose logits are alive at once; each length of texts is a multiple of it


@functools.partial(jax.jit, static_argnames="config")
def score_tokens(config: ModelConfig, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the log-probability (T,) of every token's successor in tokens (1, T), and after each position the
    likeliest ids (T, TOP) with theirs. The last position's successor is taken to be 0."""
    T = tokens.shape[1]
    backend, _ = choose_backend(config, params["embedding"].dtype, jax.devices()[0], T)
    x = hidden(config, params, tokens, LayerOptions(backend=backend))
    parts = x.reshape(-1, SCORED, x.shape[-1]), jnp.append(tokens[0, 1:], 0).reshape(-1, SCORED)
    scores = jax.lax.map(lambda part: log_probabilities(logits(config, params, part[0]), part[1]), parts)
    return tuple(a.reshape(T, *a.shape[2:]) for a in scores)  # type: ignore[return-value]


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
WITH_MODEL = (admit, prefill_chunk, decode_chunk, score_tokens)  # take `config` and `params` first
_Call = tuple[Any, tuple[Any, ...], dict[str, int]]  # function, arguments behind the model, static arguments


class Programs:
    """Runs programs over the state of all slots, which it holds.

    Args:
      slots: of all devices together; capacity: tokens of a slot; chunk: decoding steps of a call.
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
        self.text_buckets = buckets(SCORED, -(-capacity // SCORED) * SCORED, 4)
        self.short_chunks = jax.default_backend() == "cpu"  # whether a chunk may end early
        self.params: Any = None  # from `load`
        self._compiling: dict[Any, Future[None]] = {}  # programs of a background warm-up
        self._place = NamedSharding(self.mesh, ROWS) if self.mesh else None  # of rows
        self.state: Slots = _placed(new_slots, (0, 1, 2, 3), self._place)(self.config, slots, capacity, dtype)

    def load(self, params: Any, weights: str) -> None:
        """Take weights, in the training layout or as `serving_params` made them."""
        place = replicated(self.mesh) if self.mesh else None
        if "layers" in params:
            self.params = jax.device_put(params, place) if place else params
        else:
            self.params = _placed(serving_params, (0, 2, 3), place)(self.config, params, self.dtype, weights)

    def run(self, function: Any, *arguments: Any, **static: int) -> Any:
        """Run one of the programs above; the model is added to those that take it.

        Arguments from the host are NumPy arrays with `devices` entries (or as many times `group`) on their first axis.
        """
        if self._compiling:
            future = self._compiling.pop(_key(function, arguments, static), None)
            if future and not future.cancel():  # it is compiling; one that was still queued compiles in this call
                future.result()
        run, arguments, static = self._ready(function, arguments, static)
        return run(*arguments, **static)

    def update(self, function: Any, *arguments: Any) -> None:
        """Replace the state by what the program makes of it."""
        self.state = self.run(function, self.state, *arguments)

    def decode(self, rows: int, bucket: int, most: int) -> tuple[jax.Array, ...]:
        """Run a chunk of the first `rows` slots of every device; the outputs have the first device's rows first."""
        static = {"rows": rows, "bucket": bucket, "steps": self.chunk, "capacity": self.capacity}
        self.state, made = self.run(decode_chunk, self.state, np.full(self.devices, most, np.int32), **static)
        return made

    def set_status(self, slot: int, status: int, forced: Sequence[int] = (), allowed: np.ndarray | None = None) -> None:
        """Set a slot's status, the tokens that are forced next, and the bits of those that are allowed (None: all)."""
        queue = np.full((self.devices, FORCED + 1), NO_TOKEN, np.int32)
        queue[:, : len(forced)] = forced
        bits = np.full((self.devices, words(self.config.vocab_size)), ALL if allowed is None else allowed, np.uint32)
        self.update(set_status, self.only(slot), np.full(self.devices, status, np.int32), queue, bits)

    def only(self, slot: int) -> np.ndarray:
        """Return the number of a slot on its device, and on the others one that is no slot; (devices,) int32."""
        numbers = np.full(self.devices, self.slots, np.int32)
        if slot < self.slots * self.devices:
            numbers[slot // self.slots] = slot % self.slots
        return numbers

    def warm_up(self, progress: Callable[[int, int], None] | None = None, background: bool = False) -> None:
        """Compile every program that a request can need, several at once; nothing runs.

        `progress` gets (programs ready, programs in all). With `background` this returns as soon as a short request of
        a single client can be answered. The other programs go on compiling in threads; a call that needs one of
        them waits for that one alone.
        """
        calls, threads = list(self._calls()), min(COMPILERS, cores())
        later = [call for call in calls if background and not self._is_first(*call)]
        first = self._compile([call for call in calls if not background or self._is_first(*call)], threads)
        try:
            for ready, done in enumerate(as_completed(first.values()), 1):
                done.result()
                if progress:
                    progress(ready, len(calls))
        finally:  # where one failed, the others need not follow
            for future in first.values():
                future.cancel()
        self._compiling = self._compile(later, max(1, threads // 2))

    @property
    def compiling(self) -> int:
        """Number of programs that `warm_up` has still to compile."""
        return sum(not future.done() for future in list(self._compiling.values()))

    def stop_compiling(self) -> None:
        """Drop what a background warm-up has not begun; a needed program compiles when it is used."""
        for future in list(self._compiling.values()):
            future.cancel()

    def _calls(self) -> Iterator[_Call]:
        """Yield (function, arguments, static arguments) of every program, the slowest to compile first.

        The state is given as shapes: its arrays may be gone when a thread comes to compile.
        """
        D, zeros, slot = self.devices, np.zeros(self.devices, np.int32), self.only(self.slots * self.devices)
        slots, cache = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if a.committed else None),
            (self.state, self.run(copy_prefix, self.state, zeros, zeros, zeros)),  # which is the first program
        )
        for count in reversed(buckets(self.least_rows, self.slots)):
            for bucket in self.cache_buckets:
                static = {"rows": count, "bucket": bucket, "steps": self.chunk, "capacity": self.capacity}
                yield decode_chunk, (slots, zeros), static
        for bucket in reversed(self.prompt_buckets):
            for size in {D, D * self.group} if self.group else ():
                numbers, rows = np.zeros(size, np.int32), blank_rows(size, self.config.vocab_size)
                yield admit, (slots, np.zeros((size, bucket), np.int32), numbers, numbers, rows), {}
            yield prefill_chunk, (cache, np.zeros((D, bucket), np.int32), zeros), {}
        for length in self.text_buckets:
            yield score_tokens, (np.zeros((1, length), np.int32),), {}
        yield start, (slots, cache, slot, blank_rows(D, self.config.vocab_size)), {}
        queue, bits = np.zeros((D, FORCED + 1), np.int32), np.zeros((D, words(self.config.vocab_size)), np.uint32)
        yield set_status, (slots, slot, zeros, queue, bits), {}
        yield swap, (slots, np.stack([slot, slot], axis=1)), {}

    def _is_first(self, function: Any, arguments: tuple[Any, ...], static: dict[str, int]) -> bool:
        """Return whether a short request of a single client needs this program."""
        if function is decode_chunk:
            return static["rows"] == self.least_rows and static["bucket"] == self.cache_buckets[0]
        return function is start or (
            function in (admit, prefill_chunk) and arguments[1].shape == (self.devices, self.prompt_buckets[0])
        )

    def _compile(self, calls: Sequence[_Call], threads: int) -> dict[Any, Future[None]]:
        """Begin to compile programs in threads; return a future for each, by its key."""

        def compile_one(call: _Call) -> None:
            if threading.main_thread().is_alive():  # else the process is about to end
                run, arguments, static = self._ready(*call)
                run.lower(*arguments, **static).compile()

        pool = ThreadPoolExecutor(threads, thread_name_prefix="compiler")
        futures = {_key(*call): pool.submit(compile_one, call) for call in calls}
        pool.shutdown(wait=False)
        return futures

    def _ready(self, function: Any, arguments: tuple[Any, ...], static: dict[str, int]) -> _Call:
        """Return a jitted function with all of its arguments; on several devices they lie where they should."""
        model = (self.config, self.params) if function in WITH_MODEL else ()
        if self.mesh is None or function is score_tokens:
            return function, (*model, *arguments), static
        placed = tuple(
            jax.device_put(a, self._place) if isinstance(jax.tree.leaves(a)[0], np.ndarray) else a for a in arguments
        )
        run = _sharded(function, self.mesh, len(arguments), tuple(static.items()), *model[:1])
        return run, (*model[1:], *placed), {}


def _key(function: Any, arguments: tuple[Any, ...], static: dict[str, int]) -> Any:
    """Return a key of a program: its function, static arguments and the shapes of its host arrays."""
    shapes = [a.shape for a in jax.tree.leaves(arguments) if isinstance(a, np.ndarray)]
    return function, tuple(static.items()), tuple(shapes)


@functools.cache
def _placed(function: Any, static: tuple[int, ...], place: NamedSharding | None) -> Any:
    return jax.jit(function, static_argnums=static, out_shardings=place)


@functools.cache
def _sharded(
    function: Any, mesh: Mesh, count: int, static: tuple[tuple[str, int], ...], config: ModelConfig | None = None
) -> Any:
    """Return `function` on every device's own part of `count` arguments; the weights before them are whole there."""
    local = functools.partial(function.__wrapped__, *([config] if config else ()), **dict(static))
    before = 1 if config else 0
    run = jax.shard_map(local, mesh=mesh, in_specs=(*[P()] * before, *[ROWS] * count), out_specs=ROWS, check_vma=False)
    return jax.jit(run, donate_argnums=() if function is copy_prefix else before)  # the state comes first


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
