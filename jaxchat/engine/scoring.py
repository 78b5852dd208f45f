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
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.attention import (
    attention,
    choose_backend,
    join_halves,
    masked_attention,
    offset_keys,
    trusted_backend,
    with_attention,
)
from jaxchat.config import ModelConfig
from jaxchat.model import LayerOptions, Params, cast_params, embed, forward, logits, scan_layers
from jaxchat.sharding import BATCH_AXES, batch_devices, replicated
from jaxchat.sizes import exam_rows, scan_groups, score_bound, windows

LENGTHS = 6  # prefix lengths at most
SMALLEST = 64  # tokens
TAILS = (32, 128)  # smallest and largest room for continuations, a quarter of the prefix in between
ROW_TOKENS = 512  # a batch of n rows has about n times this many tokens, whatever the rows' length
CPU_ROWS = 32  # of exams at once; more leave a CPU's caches
CPU_TOKENS = 2048  # of a batch on a CPU at most: more leave its caches and run slower
FEW = 8  # batches of rows without continuations that are not worth a program of their own
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


@dataclass
class Row:
    """A prefix with continuations side by side behind it, and the tokens whose likelihood is asked."""

    prefix: list[int]
    # (number of the text, places in the row of the positions that predict its tokens, tokens)
    asks: list[tuple[int, list[int], list[int]]]
    tail: list[int] = field(default_factory=list)  # all continuations
    begins: list[int] = field(default_factory=list)  # of each token in `tail`: where its continuation begins there


def rows_at_once(config: ModelConfig, rows: int, mesh: Mesh | None = None) -> int:
    """Return `eval.batch_rows`; for -1, 32 on a CPU or where the memory is unknown, else `sizes.exam_rows`."""
    if rows >= 0:
        return rows
    stats = jax.local_devices()[0].memory_stats() or {}
    if jax.default_backend() == "cpu" or "bytes_limit" not in stats:
        return CPU_ROWS
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    scores = trusted_backend(config, jnp.bfloat16)[0] == "xla"
    return exam_rows(config, free, mesh.size if mesh else 1, 2, scores)


def lengths(seq_len: int) -> list[int]:
    """Return the prefix lengths: powers of two from 64 on, and the context rounded up to 128; six at most."""
    longest = seq_len if seq_len <= SMALLEST else -(-seq_len // 128) * 128
    powers = [1 << n for n in range(SMALLEST.bit_length() - 1, 31) if 1 << n < longest]
    return [*powers, longest][-LENGTHS:]


def tails(T: int) -> int:
    """Return the room for continuations beside a prefix of T positions."""
    return min(max(TAILS[0], T // 4), TAILS[1])


def common_prefix(sequences: Sequence[list[Any]]) -> int:
    """Return how many first tokens all share."""
    first, last = min(sequences), max(sequences)  # in the order of a dictionary, so what these two share all do
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


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


def scoring_params(params: Params, dtype: jnp.dtype | type) -> Params:
    """Return all weights in the compute dtype, the unembedding too; scalars stay float32."""
    cast = cast_params(params, dtype)
    return cast | {"unembedding": cast["unembedding"].astype(dtype)}


@functools.partial(jax.jit, static_argnames="config")
def score_targets(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    length: jax.Array,
    begins: jax.Array,
    where: jax.Array,
    target: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Score given tokens at given positions.

    Args:
      params: from `scoring_params`.
      tokens: (B, T + Q) int32, the prefix right-padded to T, and its continuations; length: (B,) int32, tokens of the
        prefix, at least 1; begins: (B, Q) int32, where each token's continuation begins behind the prefix, -1: padding.
      where: (M,) int32, for each question the flat index into (B, T + Q) of the position that predicts its token;
        target: (M,) int32, the token; count: (1,) int32, how many of the questions are meant, the first ones.

    Returns: nll (M,) float32 in nats and best (M,) bool, whether the token is the likeliest one (the first of equal
    logits wins); 0 and False beyond `count`.
    """
    (B, Q), M = begins.shape, len(where)
    T = tokens.shape[1] - Q
    backend, _ = choose_backend(config, params["embedding"].dtype, jax.devices()[0], T)
    groups, period = scan_groups(config)
    x = embed(config, params, tokens[:, :T])
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    at = length[:, None] + jnp.arange(Q) - begins
    if Q:  # every token of a continuation is a text of its own to the embedding
        last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)
        before = jnp.where(begins == jnp.arange(Q), last, tokens[:, T - 1 : -1])
        x_tails = embed(config, params, tokens[:, T:].reshape(B * Q, 1), before.reshape(B * Q))
        x = jnp.concatenate([x, x_tails.reshape(B, Q, -1)], axis=1)
        positions = jnp.concatenate([positions, at], axis=1)
    before_tails = jnp.where(begins == jnp.arange(Q), length[:, None] - 1, T + jnp.arange(Q) - 1)
    distance, own = at[:, :, None] - at[:, None, :], begins[:, :, None] == begins[:, None, :]

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        window = windows(config)[i]
        if config.key_offset:
            k_tails = join_halves(k[:, T:], jnp.take_along_axis(k, before_tails[..., None, None], axis=1))
            k = jnp.concatenate([offset_keys(config, k[:, :T]), k_tails], axis=1)
        y = attention(q[:, :T], k[:, :T], v[:, :T], window, backend, score_bound(config))
        if not Q:
            return y
        # a token of a continuation sees the prefix, and its own continuation up to itself
        of_prefix = (jnp.arange(T) < length[:, None, None]) & (at[:, :, None] - jnp.arange(T) <= window)
        mask = jnp.concatenate([of_prefix, own & (distance >= 0) & (distance <= window)], axis=2)
        tails = masked_attention(q[:, T:], k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        return jnp.concatenate([y, tails], axis=1)

    options = LayerOptions(unroll=groups if groups * period <= UNROLLED else 1, backend=backend)
    x = forward(config, params, x, tokens, positions, attend, functools.partial(scan_layers, options))
    x = x.reshape(-1, x.shape[-1])
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


@functools.cache  # so that a new scorer of the same model compiles nothing
def _cast(place: NamedSharding | None) -> Any:
    return jax.jit(scoring_params, static_argnums=1, out_shardings=place)


@functools.cache
def _sharded(config: ModelConfig, mesh: Mesh) -> Any:
    """Return `score_targets` on every device's own rows; weights are whole everywhere."""
    rows = P(BATCH_AXES)
    local = functools.partial(score_targets, config)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), *[rows] * 6), out_specs=rows, check_vma=False))


class Scorer:
    """Scores texts with one model.

    Args:
      config: resolved; params: nested dict of arrays, the training layout.
      mesh: rows are split over its data and fsdp axes, weights lie whole on every device; None: one device.
      batch_rows: rows of `ROW_TOKENS` tokens run at once; 0: one row, whatever its length; -1: by the device, see
        `rows_at_once`.
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
        self._batch_tokens = rows_at_once(config, batch_rows, mesh) * min(config.seq_len, ROW_TOKENS)
        if on_cpu:
            self._batch_tokens = min(self._batch_tokens, CPU_TOKENS)
        self._lengths = lengths(config.seq_len)
        dtype = dtype or (jnp.float32 if on_cpu else jnp.bfloat16)
        self.config = with_attention(config, dtype)
        self._params = _cast(replicated(mesh) if mesh else None)(params, dtype)
        self._sharding: NamedSharding | None = None
        self._run: Any = functools.partial(score_targets, self.config)
        if mesh and self._devices > 1:
            self._sharding, self._run = NamedSharding(mesh, P(BATCH_AXES)), _sharded(self.config, mesh)
        self.shapes: set[tuple[int, int, int]] = set()  # rows, prefix, room for continuations

    def spans(
        self, groups: Sequence[Sequence[Span]], on_done: Callable[[int], None] | None = None
    ) -> list[list[SpanScore]]:
        """Return a score for every span; those of one group may share a prefix.

        `on_done` receives the number of spans of every row that is done.
        """
        cropped = [crop(group, self.context) for group in groups]
        return self._scores([short for short, _ in cropped], [lost for _, lost in cropped], on_done)

    def letters(
        self,
        prompts: Sequence[list[int]],
        letters: Sequence[Sequence[int]],
        on_done: Callable[[int], None] | None = None,
    ) -> tuple[list[list[float]], int]:
        """Return log-probabilities of each prompt's letters (ids) as the next token, and how many prompts were
        cropped. `on_done` receives 1 for every prompt that is done."""
        limit = self.context or max(map(len, prompts), default=1)
        groups: list[list[Span]] = []
        for prompt, ids in zip(prompts, letters, strict=True):
            n = min(len(prompt), limit)
            groups.append([Span([*prompt[-limit:], letter], n, n + 1) for letter in ids])
        scores = self._scores(groups, [0] * len(groups), (lambda _: on_done(1)) if on_done else None)
        return [[-score.loss for score in own] for own in scores], sum(len(prompt) > limit for prompt in prompts)

    def _scores(
        self, groups: Sequence[list[Span]], cropped: Sequence[int], on_done: Callable[[int], None] | None
    ) -> list[list[SpanScore]]:
        rows: list[tuple[int, Row]] = []  # with the group
        numbers: list[list[int]] = []  # of each group's texts; equal options get the same score, to the last bit
        for g, group in enumerate(groups):
            keys = [(tuple(x.tokens), x.start, x.end) for x in group]
            different = dict(zip(keys, group, strict=True))
            numbers.append([list(different).index(key) for key in keys])
            rows += [(g, row) for row in self._rows(list(different.values()))]
        scores: dict[tuple[int, int], SpanScore] = {}  # by group and number
        for index, answers in self._answers([row for _, row in rows]):
            g, row = rows[index]
            for (number, _, targets), (loss, best) in zip(row.asks, answers, strict=True):
                scores[g, number] = SpanScore(loss, len(targets), best, cropped[g])
            if on_done:
                on_done(len(answers))
        return [[scores[g, number] for number in own] for g, own in enumerate(numbers)]

    def _rows(self, spans: list[Span]) -> list[Row]:
        """Return one group's rows: its common prefix with the continuations behind it, or each sequence by itself,
        whichever runs fewer tokens. A span's last token predicts nothing that is asked, so it is left out."""
        inputs = [x.tokens[: max(1, x.end - 1)] for x in spans]
        targets = [x.tokens[x.start : x.end] for x in spans]
        alone = [Row(inputs[n], [(n, list(range(x.start - 1, x.end - 1)), targets[n])]) for n, x in enumerate(spans)]
        if len(spans) < 2:
            return alone
        # of the prefix nothing but its last position is asked, or a row would be asked more than it has positions
        common = min(common_prefix(inputs), *(x.start for x in spans))
        T, room = self._length(common), tails(self._length(common))
        if common < 1 or max(map(len, inputs)) - common > room:
            return alone
        shared: list[Row] = []
        for n, x in enumerate(spans):
            tail = inputs[n][common:]
            if not shared or len(shared[-1].tail) + len(tail) > room:
                shared.append(Row(inputs[n][:common], []))
            row, begin = shared[-1], len(shared[-1].tail)
            places = [i if i < common else T + begin + i - common for i in range(x.start - 1, x.end - 1)]
            row.asks.append((n, places, targets[n]))
            row.tail += tail
            row.begins += [begin] * len(tail)
        cost = sum(T + (room if row.tail else 0) for row in shared)
        return shared if cost < sum(self._length(len(ids)) for ids in inputs) else alone

    def _length(self, n: int) -> int:
        return next((T for T in self._lengths if n <= T), -(-n // self._lengths[-1]) * self._lengths[-1])

    def _at_once(self, T: int) -> int:
        """Return the rows of a batch whose prefixes have T positions."""
        return max(1, self._batch_tokens // T // self._devices) * self._devices

    def _answers(self, rows: list[Row]) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
        """Yield (index of a row, (loss, best) of each of its asks); while one batch is read, the next ones run."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(rows):
            T = self._length(len(row.prefix))
            by_shape.setdefault((T, tails(T) if row.tail else 0), []).append(index)
        for T in [T for T, Q in by_shape if not Q and (T, tails(T)) in by_shape]:
            if len(by_shape[T, 0]) <= FEW * self._at_once(T):
                by_shape[T, tails(T)] += by_shape.pop((T, 0))
        flying: deque[tuple[Any, list[int], list[list[slice]]]] = deque()

        def read() -> Iterator[tuple[int, list[tuple[float, bool]]]]:
            outputs, batch, places = flying.popleft()
            nll, best = (np.asarray(a) for a in outputs)
            for index, parts in zip(batch, places, strict=True):
                yield index, [(float(nll[part].sum(dtype=np.float64)), bool(best[part].all())) for part in parts]

        # the longest first: what does not fit in memory fails at once
        for (T, Q), members in sorted(by_shape.items(), reverse=True):
            B = self._at_once(T)
            self.shapes.add((B, T, Q))
            for i in range(0, len(members), B):
                batch = members[i : i + B]
                arguments, places = self._lay_out([rows[index] for index in batch], B, T, Q)
                if self._sharding:
                    arguments = jax.device_put(arguments, self._sharding)
                flying.append((self._run(self._params, *arguments), batch, places))
                if len(flying) > IN_FLIGHT:
                    yield from read()
        while flying:
            yield from read()

    def _lay_out(self, rows: list[Row], B: int, T: int, Q: int) -> tuple[Any, list[list[slice]]]:
        """Return the arguments of `score_targets` as host arrays, and where the answers of each row will be.

        Each device has its own part of the rows, and of the questions about them.
        """
        tokens, length, begins = np.zeros((B, T + Q), np.int32), np.ones(B, np.int32), np.full((B, Q), -1, np.int32)
        where, target = np.zeros(B * (T + Q), np.int32), np.zeros(B * (T + Q), np.int32)
        count, places = np.zeros(self._devices, np.int32), list[list[slice]]()
        per_device = B // self._devices
        for i, row in enumerate(rows):
            length[i] = len(row.prefix)
            tokens[i, : length[i]], tokens[i, T : T + len(row.tail)] = row.prefix, row.tail
            begins[i, : len(row.begins)] = row.begins
            places.append([])
            device, local = divmod(i, per_device)
            for _, where_asked, targets in row.asks:
                at = device * per_device * (T + Q) + int(count[device])
                part = slice(at, at + len(targets))
                where[part] = local * (T + Q) + np.array(where_asked, np.int32)
                target[part] = targets
                count[device] += len(targets)
                places[-1].append(part)
        return (tokens, length, begins, where, target, count), places
