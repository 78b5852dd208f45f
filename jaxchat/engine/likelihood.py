"""How likely the engine's model finds every token of given texts, with the likeliest alternatives.

The weights are the engine's own, as they are served. Texts of like length run together in a few shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.engine.decode import TOP, log_probabilities
from jaxchat.engine.request import Token
from jaxchat.engine.slots import NO_TOKEN, Params
from jaxchat.model.cache import activations
from jaxchat.model.quantized import logits

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
