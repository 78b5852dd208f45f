"""Scoring given texts, batched: how likely spans of them are, and which of some letters comes next.

Sequences of one group (the options of a question) share their common prefix, see `branching.py`. Rows of like length
run together in a few shapes: at most six prefix lengths, each without and with room for continuations, and one number
of rows for each; so at most twelve programs are compiled for spans, and six for letters, whatever is asked.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.attention import attention, choose_backend, piece_attention, with_attention
from jaxchat.config import ModelConfig
from jaxchat.engine import loading
from jaxchat.model import Params, Trunk, cast_params, embed, logits, rotary, through_layers
from jaxchat.sharding import BATCH_AXES, batch_devices, replicated
from jaxchat.sizes import scan_groups, score_bound

# What is asked of a scorer: spans of texts, and the rows of few lengths that they are laid into. No JAX.


LENGTHS = 6  # prefix lengths at most
SMALLEST = 64  # tokens
TAILS = (32, 128)  # smallest and largest room for continuations, a quarter of the prefix in between


@dataclass(frozen=True)
class Span:
    """`tokens[start:end]` are scored, given what stands before them; start is at least 1."""

    tokens: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class SpanScore:
    """`loss`: nats of the whole span; `best`: every token was the likeliest one; `cropped`: tokens left out before."""

    loss: float
    count: int
    best: bool
    cropped: int = 0

    @property
    def mean(self) -> float:
        """NaN for an empty span."""
        return self.loss / self.count if self.count else math.nan


@dataclass
class Row:
    """A prefix, its continuations, and (index of the sequence, span) asked of each; -1 is the prefix itself."""

    prefix: list[int]
    tails: list[list[int]]
    spans: list[tuple[int, int, int]]  # of each continuation (or of the prefix alone): sequence, start, end


def lengths(seq_len: int) -> list[int]:
    """Prefix lengths: powers of two from 64 on, and the context rounded up to whole tiles of 128; six at most."""
    longest = seq_len if seq_len <= SMALLEST else -(-seq_len // 128) * 128
    powers = [1 << n for n in range(SMALLEST.bit_length() - 1, 31) if 1 << n < longest]
    return [*powers, longest][-LENGTHS:]


def tails(T: int) -> int:
    """Room for continuations beside a prefix of T positions."""
    return min(max(TAILS[0], T // 4), TAILS[1])


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many first tokens all share."""
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
    """The group with at most `context` tokens each (0: any number), and how many were taken off its left.

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


# Forward pass for scoring: rows that hold a prefix and several continuations of it, and logits only where asked for.
#
# The options of a multiple-choice question share nearly all of their tokens, so the prefix runs through the model once
# and every continuation attends to it. A row without continuations is an ordinary row.
#
# Axes: B rows, T prefix positions, Q positions for continuations, M questions asked of a batch, V vocabulary, C
# letters.


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


ROW_TOKENS = 512  # a batch of n rows has about n times this many tokens, whatever the rows' length
CPU_TOKENS = 2048  # of a batch on a CPU at most: more leave its caches and run slower
LETTERS = 8  # slots for the letters of a question
IN_FLIGHT = 2  # batches dispatched before the first one is read


class Scorer:
    """Scores texts with one model.

    Args:
      config: resolved; params: nested dict of arrays, the training layout.
      mesh: rows are spread over its data and fsdp axes, weights lie whole on every device; None: one device.
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
        self._targets: Any = functools.partial(score_targets, self.config)
        self._letters: Any = functools.partial(score_letters, self.config)
        self._sharding: Any = None
        if mesh and self._devices > 1:
            self._sharding = NamedSharding(mesh, P(BATCH_AXES))
            self._targets, self._letters = (_spread(f, self.config, mesh) for f in (score_targets, score_letters))
        self.shapes: set[tuple[str, int, int, int]] = set()  # kind, rows, prefix, room for continuations

    def spans(
        self, groups: Sequence[Sequence[Span]], on_done: Callable[[int], None] | None = None
    ) -> list[list[SpanScore]]:
        """A score for every span; those of one group may share a prefix. `on_done` hears of rows as they finish."""
        scores: list[list[SpanScore | None]] = [[None] * len(group) for group in groups]
        owners: list[int] = []
        rows: list[Row] = []
        twins: list[tuple[int, int, int]] = []  # group, sequence, the equal sequence before it
        cropped = [0] * len(groups)
        for g, group in enumerate(groups):
            short, cropped[g] = crop(group, self.context)
            kept: dict[tuple[Any, int, int], int] = {}
            for s, span in enumerate(short):  # equal options get the same score, to the last bit
                first = kept.setdefault((tuple(span.tokens), span.start, span.end), s)
                if first != s:
                    twins.append((g, s, first))
            found = self._rows({s: short[s] for s in kept.values()})
            rows += found
            owners += [g] * len(found)
        for index, answers in self._run_targets(rows):
            g = owners[index]
            for (s, start, end), (loss, best) in zip(rows[index].spans, answers, strict=True):
                scores[g][s] = SpanScore(loss, end - start, best, cropped[g])
            if on_done:
                on_done(len(answers))
        for g, s, first in twins:
            scores[g][s] = scores[g][first]
        return scores  # type: ignore[return-value]

    def letters(
        self,
        prompts: Sequence[list[int]],
        letters: Sequence[Sequence[int]],
        on_done: Callable[[int], None] | None = None,
    ) -> tuple[list[list[float]], int]:
        """Logits of each prompt's letters (ids) as the next token, and how many prompts were cropped."""
        limit = self.context or max(map(len, prompts), default=1)
        prompts, cropped = [p[-limit:] for p in prompts], sum(len(p) > limit for p in prompts)
        width = max(LETTERS, *map(len, letters)) if letters else LETTERS
        rows = [Row(prompt, [], []) for prompt in prompts]
        found: list[list[float]] = [[] for _ in prompts]
        for T, _, batch in self._batches(rows, lambda row: (self._length(len(row.prefix)), 0)):
            where, ids = np.zeros(self._count(T), np.int32), np.zeros((self._count(T), width), np.int32)
            for i, index in enumerate(batch):
                where[i] = len(prompts[index]) - 1
                ids[i, : len(letters[index])] = letters[index]
            self.shapes.add(("letters", self._count(T), T, 0))
            z = np.asarray(self._letters(self._params, *self._place(self._fill(rows, batch, T, 0), where, ids)))
            for i, index in enumerate(batch):
                found[index] = z[i, : len(letters[index])].tolist()
            if on_done:
                on_done(len(batch))
        return found, cropped

    # From groups to rows

    def _rows(self, spans: dict[int, Span]) -> list[Row]:
        """One group's rows: its common prefix with the continuations behind it, or each sequence by itself, whichever
        runs fewer tokens."""
        alone = [Row(span.tokens, [], [(s, span.start, span.end)]) for s, span in spans.items()]
        # what predicts a span's first token stands in the sequence's own part, or the prefix would be asked as well
        if len(spans) < 2:
            return alone
        common = min(common_prefix([span.tokens for span in spans.values()]), *(x.start - 1 for x in spans.values()))
        if common < 1:
            return alone
        prefix = next(iter(spans.values())).tokens[:common]
        T = self._length(common)
        room = tails(T)
        shared: list[Row] = []
        for s, span in spans.items():
            tail = span.tokens[common : span.end]
            if len(tail) > room:
                return alone
            if not shared or sum(len(t) for t in shared[-1].tails) + len(tail) > room:
                shared.append(Row(prefix, [], []))
            shared[-1].tails.append(tail)
            shared[-1].spans.append((s, span.start, span.end))
        cost = sum(self._length(len(row.prefix)) for row in alone)
        return shared if len(shared) * (T + room) < cost else alone

    def _length(self, n: int) -> int:
        return next((T for T in self._lengths if n <= T), -(-n // self._lengths[-1]) * self._lengths[-1])

    def _count(self, T: int) -> int:
        """Rows of a batch, the same number on every device."""
        return max(1, self._batch_tokens // T // self._devices) * self._devices

    # Batches

    def _batches(
        self, rows: list[Row], shape: Callable[[Row], tuple[int, int]]
    ) -> Iterator[tuple[int, int, list[int]]]:
        """(prefix, room, indices of rows), the longest first: what does not fit in memory fails at once."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            by_shape.setdefault(shape(row), []).append(index)
        for (T, Q), members in sorted(by_shape.items(), reverse=True):
            for i in range(0, len(members), self._count(T)):
                yield T, Q, members[i : i + self._count(T)]

    def _run_targets(self, rows: list[Row]) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
        """(index of a row, (loss, best) of each of its spans); while one batch is read, the next ones run."""
        flying: deque[tuple[Any, list[tuple[int, list[slice]]]]] = deque()

        def read() -> Iterator[tuple[int, list[tuple[float, bool]]]]:
            outputs, places = flying.popleft()
            nll, best = (np.asarray(a) for a in outputs)
            for index, parts in places:
                yield index, [(float(nll[part].sum(dtype=np.float64)), bool(best[part].all())) for part in parts]

        def shape(row: Row) -> tuple[int, int]:
            T = self._length(len(row.prefix))
            return T, tails(T) if row.tails else 0

        for T, Q, batch in self._batches(rows, shape):
            where, target, count, places = self._questions(rows, batch, T, Q)
            self.shapes.add(("spans", self._count(T), T, Q))
            filled = self._fill(rows, batch, T, Q)
            flying.append((self._targets(self._params, *self._place(filled, where, target, count)), places))
            if len(flying) > IN_FLIGHT:
                yield from read()
        while flying:
            yield from read()

    def _questions(self, rows: list[Row], batch: list[int], T: int, Q: int) -> tuple[Any, ...]:
        """where, target, count of `score_targets` for every device, and where each row's answers will be."""
        per_device = self._count(T) // self._devices
        slots = per_device * (T + Q)
        where, target = (np.zeros(self._devices * slots, np.int32) for _ in range(2))
        count, places = np.zeros(self._devices, np.int32), []
        for i, index in enumerate(batch):
            row, (device, local) = rows[index], divmod(i, per_device)
            parts, at = [], T
            for n, (_, start, end) in enumerate(row.spans):
                if row.tails:  # positions in the text -> places in the row
                    ids, first = row.tails[n], at + start - len(row.prefix)
                    wanted = ids[start - len(row.prefix) : end - len(row.prefix)]
                    at += len(ids)
                else:
                    wanted, first = row.prefix[start:end], start
                begin = device * slots + count[device]
                parts.append(slice(begin, begin + end - start))
                where[parts[-1]] = local * (T + Q) + first - 1 + np.arange(end - start)
                target[parts[-1]] = wanted
                count[device] += end - start
            places.append((index, parts))
        return where, target, count, places

    def _fill(self, rows: list[Row], batch: list[int], T: int, Q: int) -> Rows:
        B = self._count(T)
        tokens, length = np.zeros((B, T + Q), np.int32), np.ones(B, np.int32)
        branch, position, before = np.full((B, Q), -1, np.int32), np.zeros((B, Q), np.int32), np.zeros((B, Q), np.int32)
        for i, index in enumerate(batch):
            row = rows[index]
            n = length[i] = len(row.prefix)
            tokens[i, :n] = row.prefix
            at = 0
            for b, tail in enumerate(row.tails):
                part = slice(at, at + len(tail))
                tokens[i, T + at : T + at + len(tail)] = tail
                branch[i, part], position[i, part] = b, n + np.arange(len(tail))
                before[i, part] = [row.prefix[-1], *tail[:-1]]
                at += len(tail)
        return Rows(tokens, length, branch, position, before)

    def _place(self, *arrays: Any) -> Any:
        return jax.device_put(arrays, self._sharding) if self._sharding else arrays


@functools.cache  # a spot check makes a new scorer every time, and compiles nothing
def _cast(place: NamedSharding | None) -> Any:
    return jax.jit(scoring_params, static_argnums=1, out_shardings=place)


@functools.cache
def _spread(function: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """`score_targets` or `score_letters` on every device's own rows, weights being whole everywhere."""

    def local(params: Any, arguments: tuple[Any, ...]) -> Any:
        return function(config, params, *arguments)

    rows = P(BATCH_AXES)
    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(), rows), out_specs=rows, check_vma=False)
    return jax.jit(lambda params, *arguments: spread(params, arguments))
