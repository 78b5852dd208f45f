"""Score given texts in batches: the log-likelihood of spans of them, and which of some letters comes next.

The options of a multiple-choice question share nearly all of their tokens. So the common prefix runs through the model
once, and every continuation attends to it. Rows of like length run together in a few shapes: at most six prefix
lengths, each without and with room for continuations, and one number of rows for each; at most twelve programs.

Axes: B rows, T prefix positions, Q positions for continuations, M questions asked of a batch, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.attention import attention, choose_backend, masked_attention, with_attention
from jaxchat.config import ModelConfig
from jaxchat.engine import loading
from jaxchat.model import LayerOptions, Params, cast_params, embed, forward, logits
from jaxchat.sharding import BATCH_AXES, batch_devices, replicated
from jaxchat.sizes import scan_groups, score_bound, windows

LENGTHS = 6  # prefix lengths at most
SMALLEST = 64  # tokens
TAILS = (32, 128)  # smallest and largest room for continuations, a quarter of the prefix in between
ROW_TOKENS = 512  # a batch of n rows has about n times this many tokens, whatever the rows' length
CPU_TOKENS = 2048  # of a batch on a CPU at most: more leave its caches and run slower
IN_FLIGHT = 2  # batches dispatched before the first one is read
QUESTION_CHUNK = {"cpu": 256}  # questions whose logits are alive at once
ACCELERATOR_CHUNK = 2048
UNROLLED = 8  # layers; a deeper model is a scan, which compiles faster


@dataclass(frozen=True)
class Span:
    """`tokens[start:end]` are scored, given what stands before them; start is at least 1."""

    tokens: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class SpanScore:
    """The score of one span."""

    loss: float  # nats of the whole span
    count: int  # tokens
    best: bool  # every token was the likeliest one
    cropped: int = 0  # tokens left out before the text

    @property
    def mean(self) -> float:
        """NaN for an empty span."""
        return self.loss / self.count if self.count else math.nan


class Ask(NamedTuple):
    """Tokens whose likelihood is asked."""

    sequence: int  # index in its group
    tail: int  # which continuation of the row, -1: the prefix
    start: int  # place in the text of the first token
    targets: list[int]


@dataclass
class Row:
    """A prefix, its continuations, and what is asked of them."""

    prefix: list[int]
    tails: list[list[int]]
    asks: list[Ask]


@jax.tree_util.register_dataclass
@dataclass
class Rows:
    """Rows as the model takes them. Q is 0 for rows without continuations."""

    tokens: Any  # (B, T + Q) int32, the prefix right-padded to T
    length: Any  # (B,) int32, tokens of the prefix, at least 1
    branch: Any  # (B, Q) int32, which continuation a token belongs to
    position: Any  # (B, Q) int32, where the token stands in its text
    before: Any  # (B, Q) int32, id of the token before it


def lengths(seq_len: int) -> list[int]:
    """Return the prefix lengths: powers of two from 64 on, and the context rounded up to 128; six at most."""
    longest = seq_len if seq_len <= SMALLEST else -(-seq_len // 128) * 128
    powers = [1 << n for n in range(SMALLEST.bit_length() - 1, 31) if 1 << n < longest]
    return [*powers, longest][-LENGTHS:]


def tails(T: int) -> int:
    """Return the room for continuations beside a prefix of T positions."""
    return min(max(TAILS[0], T // 4), TAILS[1])


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Return how many first tokens all share."""
    first, last = min(sequences), max(sequences)  # in the order of a dictionary, so what these two share all do
    low, high = 0, min(len(first), len(last))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == last[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def crop(group: Sequence[Span], context: int) -> tuple[list[Span], int]:
    """Return the group with at most `context` tokens each (0: any number), and how many were cut off its left.

    All sequences lose as many, so that the options of a question keep the same context; one that is still too long
    then loses more by itself. A span that began in what is lost begins at its second kept token.
    """
    over = max((len(span.tokens) for span in group), default=0) - context
    if not context or over <= 0:
        return list(group), 0
    shared = min(over, common_prefix([span.tokens for span in group]), *(max(0, x.start - 1) for x in group))
    short = []
    for span in group:
        cut = max(shared, len(span.tokens) - context)
        short.append(Span(span.tokens[cut:], max(1, span.start - cut), max(1, span.end - cut)))
    return short, over


# On the device


def scoring_params(params: Params, dtype: jnp.dtype | type) -> Params:
    """Return all weights in the compute dtype, the unembedding too; scalars stay float32."""
    cast = cast_params(params, dtype)
    return cast | {"unembedding": cast["unembedding"].astype(dtype)}


def final_activations(config: ModelConfig, params: Params, rows: Rows) -> jax.Array:
    """Return activations (B, T + Q, D) after the last norm; `params` from `scoring_params`."""
    B, Q = rows.branch.shape
    T = rows.tokens.shape[1] - Q
    backend, _ = choose_backend(config, params["embedding"].dtype, jax.devices()[0], T)
    groups, period = scan_groups(config)
    x, _ = embed(config, params, rows.tokens[:, :T])
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    if Q:  # every token of a continuation is a text of its own to the smear
        _, previous = embed(config, params, rows.before.reshape(B * Q, 1))
        x_tails, _ = embed(config, params, rows.tokens[:, T:].reshape(B * Q, 1), previous[:, 0])
        x = jnp.concatenate([x, x_tails.reshape(B, Q, -1)], axis=1)
        positions = jnp.concatenate([positions, rows.position], axis=1)
    at, place = rows.position[:, :, None], jnp.arange(T)[None, None, :]
    distance, own = at - rows.position[:, None, :], rows.branch[:, :, None] == rows.branch[:, None, :]

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        window = windows(config)[i]
        y = attention(q[:, :T], k[:, :T], v[:, :T], window, backend, score_bound(config))
        if not Q:
            return y
        # a token of a continuation sees the prefix, and its own continuation up to itself
        of_prefix = (place < rows.length[:, None, None]) & (at - place <= window)
        mask = jnp.concatenate([of_prefix, own & (distance >= 0) & (distance <= window)], axis=2)
        tails = masked_attention(q[:, T:], k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        return jnp.concatenate([y, tails], axis=1)

    options = LayerOptions(unroll=groups if groups * period <= UNROLLED else 1, backend=backend)
    return forward(config, params, x, rows.tokens, positions, attend, options)


@functools.partial(jax.jit, static_argnames="config")
def score_targets(
    config: ModelConfig, params: Params, rows: Rows, where: jax.Array, target: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Score given tokens at given positions.

    Args:
      where: (M,) int32, for each question the flat index into (B, T + Q) of the position that predicts its token;
      target: (M,) int32, the token; count: (1,) int32, how many of the questions are meant, the first ones.

    Returns: nll (M,) float32 in nats and best (M,) bool, whether the token is the likeliest one (the first of equal
    logits wins); 0 and False beyond `count`.
    """
    x = final_activations(config, params, rows)
    x = x.reshape(-1, x.shape[-1])
    M = where.shape[0]
    chunk = min(M, QUESTION_CHUNK.get(jax.default_backend(), ACCELERATOR_CHUNK))
    spare = -M % chunk
    where, target = (jnp.pad(a, (0, spare)) for a in (where, target))

    def one(i: jax.Array, scores: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        at, to = (jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk) for a in (where, target))
        z = logits(config, params, x[at])
        nll = jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, to[:, None], axis=-1)[:, 0]
        put = jax.lax.dynamic_update_slice_in_dim
        return tuple(put(a, b, i * chunk, 0) for a, b in zip(scores, (nll, jnp.argmax(z, axis=-1) == to), strict=True))

    nothing = jnp.zeros(M + spare, jnp.float32), jnp.zeros(M + spare, bool)
    nll, best = jax.lax.fori_loop(0, -(-count[0] // chunk), one, nothing)
    meant = jnp.arange(M) < count[0]
    return jnp.where(meant, nll[:M], 0.0), best[:M] & meant


@functools.cache  # a spot check makes a new scorer every time, and compiles nothing
def _cast(place: NamedSharding | None) -> Any:
    return jax.jit(scoring_params, static_argnums=1, out_shardings=place)


@functools.cache
def _sharded(config: ModelConfig, mesh: Mesh) -> Any:
    """Return `score_targets` on every device's own rows; weights are whole everywhere."""

    def local(params: Any, arguments: tuple[Any, ...]) -> Any:
        return score_targets(config, params, *arguments)

    rows = P(BATCH_AXES)
    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), rows), out_specs=rows, check_vma=False)
    return jax.jit(lambda params, *arguments: run(params, arguments))


class Scorer:
    """Scores texts with one model.

    Args:
      config: resolved; params: nested dict of arrays, the training layout.
      mesh: rows are split over its data and fsdp axes, weights lie whole on every device; None: one device.
      batch_rows: rows of `ROW_TOKENS` tokens run at once; 0: one row, whatever its length; -1: by the device, see
        `loading.batch_rows`.
      context: longer texts are cropped on the left; by default the model's. 0: never crop.
      dtype: of weights and activations; float32 on a CPU and bfloat16 elsewhere by default.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        mesh: Mesh | None = None,
        batch_rows: int = -1,
        context: int | None = None,
        dtype: Any = None,
    ):
        self.context = config.seq_len if context is None else context
        self._devices = batch_devices(mesh) if mesh else 1
        on_cpu = jax.default_backend() == "cpu"
        self._batch_tokens = loading.batch_rows(config, batch_rows, mesh) * min(config.seq_len, ROW_TOKENS)
        if on_cpu:
            self._batch_tokens = min(self._batch_tokens, CPU_TOKENS)
        self._lengths = lengths(config.seq_len)
        dtype = dtype or (jnp.float32 if on_cpu else jnp.bfloat16)
        self.config = with_attention(config, dtype)
        self._params = _cast(replicated(mesh) if mesh else None)(params, dtype)
        self._sharding = NamedSharding(mesh, P(BATCH_AXES)) if mesh and self._devices > 1 else None
        sharded = self._sharding is not None
        self._run: Any = _sharded(self.config, mesh) if sharded else functools.partial(score_targets, self.config)
        self.shapes: set[tuple[int, int, int]] = set()  # rows, prefix, room for continuations

    def spans(
        self, groups: Sequence[Sequence[Span]], on_done: Callable[[int], None] | None = None
    ) -> list[list[SpanScore]]:
        """Return a score for every span; those of one group may share a prefix.

        `on_done` receives the number of spans of every row that is done.
        """
        scores: list[list[Any]] = [[None] * len(group) for group in groups]
        rows: list[tuple[int, Row]] = []  # with the group
        twins: list[tuple[int, int, int]] = []  # group, sequence, the equal sequence before it
        cropped = [0] * len(groups)
        for g, group in enumerate(groups):
            short, cropped[g] = crop(group, self.context)
            kept: dict[tuple[Any, int, int], int] = {}
            for s, span in enumerate(short):  # equal options get the same score, to the last bit
                first = kept.setdefault((tuple(span.tokens), span.start, span.end), s)
                if first != s:
                    twins.append((g, s, first))
            rows += [(g, row) for row in self._rows({s: short[s] for s in kept.values()})]
        for index, answers in self._answers([row for _, row in rows]):
            g, row = rows[index]
            for ask, (loss, best) in zip(row.asks, answers, strict=True):
                scores[g][ask.sequence] = SpanScore(loss, len(ask.targets), best, cropped[g])
            if on_done:
                on_done(len(answers))
        for g, s, first in twins:
            scores[g][s] = scores[g][first]
        return scores

    def letters(
        self,
        prompts: Sequence[list[int]],
        letters: Sequence[Sequence[int]],
        on_done: Callable[[int], None] | None = None,
    ) -> tuple[list[list[float]], int]:
        """Return log-probabilities of each prompt's letters (ids) as the next token, and how many prompts were
        cropped."""
        limit = self.context or max(map(len, prompts), default=1)
        rows = [
            Row(prompt[-limit:], [], [Ask(0, -1, min(len(prompt), limit), [letter]) for letter in ids])
            for prompt, ids in zip(prompts, letters, strict=True)
        ]
        scores: list[list[float]] = [[] for _ in prompts]
        for index, answers in self._answers(rows):
            scores[index] = [-loss for loss, _ in answers]
            if on_done:
                on_done(1)
        return scores, sum(len(prompt) > limit for prompt in prompts)

    def _rows(self, spans: dict[int, Span]) -> list[Row]:
        """Return one group's rows: its common prefix with the continuations behind it, or each sequence by itself,
        whichever runs fewer tokens."""
        alone = [Row(x.tokens, [], [Ask(s, -1, x.start, x.tokens[x.start : x.end])]) for s, x in spans.items()]
        if len(spans) < 2:
            return alone
        # what predicts a span's first token stands in the sequence's own part, or the prefix would be asked as well
        common = min(common_prefix([span.tokens for span in spans.values()]), *(x.start - 1 for x in spans.values()))
        if common < 1:
            return alone
        T = self._length(common)
        room, free = tails(T), 0
        shared: list[Row] = []
        for s, span in spans.items():
            tail = span.tokens[common : span.end]
            if len(tail) > room:
                return alone
            if len(tail) > free or not shared:
                shared.append(Row(span.tokens[:common], [], []))
                free = room
            free -= len(tail)
            shared[-1].asks.append(Ask(s, len(shared[-1].tails), span.start, span.tokens[span.start : span.end]))
            shared[-1].tails.append(tail)
        return shared if len(shared) * (T + room) < sum(self._length(len(row.prefix)) for row in alone) else alone

    def _length(self, n: int) -> int:
        return next((T for T in self._lengths if n <= T), -(-n // self._lengths[-1]) * self._lengths[-1])

    def _count(self, T: int) -> int:
        """Return the rows of a batch, the same number on every device."""
        return max(1, self._batch_tokens // T // self._devices) * self._devices

    def _answers(self, rows: list[Row]) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
        """Yield (index of a row, (loss, best) of each of its asks); while one batch is read, the next ones run."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            T = self._length(len(row.prefix))
            by_shape.setdefault((T, tails(T) if row.tails else 0), []).append(index)
        flying: deque[tuple[Any, list[int], list[list[slice]]]] = deque()

        def read() -> Iterator[tuple[int, list[tuple[float, bool]]]]:
            outputs, batch, places = flying.popleft()
            nll, best = (np.asarray(a) for a in outputs)
            for index, parts in zip(batch, places, strict=True):
                yield index, [(float(nll[part].sum(dtype=np.float64)), bool(best[part].all())) for part in parts]

        # the longest first: what does not fit in memory fails at once
        for (T, Q), members in sorted(by_shape.items(), reverse=True):
            for i in range(0, len(members), self._count(T)):
                batch = members[i : i + self._count(T)]
                self.shapes.add((self._count(T), T, Q))
                arguments, places = self._lay_out([rows[index] for index in batch], T, Q)
                if self._sharding:
                    arguments = jax.device_put(arguments, self._sharding)
                flying.append((self._run(self._params, *arguments), batch, places))
                if len(flying) > IN_FLIGHT:
                    yield from read()
        while flying:
            yield from read()

    def _lay_out(self, rows: list[Row], T: int, Q: int) -> tuple[Any, list[list[slice]]]:
        """Return the arguments of `score_targets` as host arrays, and where the answers of each row will be.

        Each device has its own part of the rows, and of the questions about them.
        """
        B = self._count(T)
        tokens, length = np.zeros((B, T + Q), np.int32), np.ones(B, np.int32)
        branch, position, before = np.full((B, Q), -1, np.int32), np.zeros((B, Q), np.int32), np.zeros((B, Q), np.int32)
        per_device = B // self._devices
        slots = per_device * (T + Q)
        where, target = (np.zeros(self._devices * slots, np.int32) for _ in range(2))
        count, places = np.zeros(self._devices, np.int32), []
        for i, row in enumerate(rows):
            n = length[i] = len(row.prefix)
            tokens[i, :n] = row.prefix
            offsets, at = [], 0
            for b, tail in enumerate(row.tails):
                part = slice(at, at + len(tail))
                tokens[i, T + at : T + at + len(tail)] = tail
                branch[i, part], position[i, part] = b, n + np.arange(len(tail))
                before[i, part] = [row.prefix[-1], *tail[:-1]]
                offsets.append(T + at - n)  # from a place in the text to a place in the row
                at += len(tail)
            (device, local), parts = divmod(i, per_device), []
            for ask in row.asks:
                first = ask.start - 1 + (offsets[ask.tail] if ask.tail >= 0 else 0)
                begin = device * slots + int(count[device])
                part = slice(begin, begin + len(ask.targets))
                where[part] = local * (T + Q) + first + np.arange(len(ask.targets))
                target[part] = ask.targets
                count[device] += len(ask.targets)
                parts.append(part)
            places.append(parts)
        return (Rows(tokens, length, branch, position, before), where, target, count), places
