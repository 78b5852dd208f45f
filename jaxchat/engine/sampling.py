"""Choosing the next token of every row at once, with settings that are data: no new value compiles anything.

Axes: R rows, V vocabulary. Temperature 0 is greedy. Top-k and top-p (nucleus, 1904.09751) cut by a threshold that a
bisection finds; sorting the vocabulary costs more. The draw inverts the cumulative distribution with one uniform
number, which depends on the row's own seed and position alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_ONE = 0x3F800000  # float32 1.0 as bits; the bits of non-negative floats are ordered as the floats are
_STEPS = 30  # halvings of [0, _ONE] until one value is left
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

    def draw() -> jax.Array:
        scale = 1.0 / jnp.maximum(temperature, 1e-4)
        p = jnp.exp((logits - highest) * scale[:, None])  # the largest is 1
        cuts = jnp.any((top_k > 0) | (top_p < 1.0))
        p = jax.lax.cond(cuts, lambda: jnp.where(p >= _threshold(p, top_k, top_p)[:, None], p, 0.0), lambda: p)
        p = jnp.where(p >= min_p[:, None], p, 0.0)
        return jnp.where(temperature > 0, _draw(p, jax.vmap(_uniform)(seed, position), greedy), greedy)

    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)


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


def _threshold(p: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """(R,) the smallest value that stays, of p (R, V) in [0, 1] whose largest value is 1.

    Top-k comes first; top-p is a share of the mass that top-k leaves.
    """
    k = jnp.where(top_k > 0, top_k, p.shape[-1]).astype(jnp.float32)

    def tokens(t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(p >= t[:, None], 1.0, 0.0), axis=-1)

    by_count = _largest(tokens, k, p.shape[0])
    kept = jnp.where(p >= by_count[:, None], p, 0.0)
    goal = top_p * kept.sum(axis=-1)

    def mass(t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(kept >= t[:, None], kept, 0.0), axis=-1)

    def by_mass() -> jax.Array:
        return jnp.where(top_p < 1.0, jnp.maximum(by_count, _largest(mass, goal, p.shape[0])), by_count)

    return jax.lax.cond(jnp.any(top_p < 1.0), by_mass, lambda: by_count)


def _largest(amount: Callable[[jax.Array], jax.Array], wanted: jax.Array, rows: int) -> jax.Array:
    """(rows,) a float32 in [0, 1] at which the falling `amount` is at least `wanted`, and above which it is less: the
    largest such number, or one with the same amount as that (0 where the amount never suffices)."""

    def going(state: Any) -> jax.Array:
        step, low, high, at_low, _ = state
        return (step < 2 * _STEPS) & jnp.any((high - low > 1) & (at_low != wanted))

    def narrow(state: Any) -> Any:
        step, low, high, at_low, at_high = state  # enough at low, not at high
        share = (at_low - wanted) / jnp.maximum(at_low - at_high, 1e-9)  # a straight line is a good guess
        share = jnp.where(step % 2 == 0, share, 0.5)  # but halving is sure to end
        width = high - low
        middle = low + jnp.clip((share * width).astype(jnp.int32), 1, jnp.maximum(width - 1, 1))
        there = amount(jax.lax.bitcast_convert_type(middle, jnp.float32))
        settled = (at_low == wanted) | (width <= 1)
        up, down = (there >= wanted) & ~settled, (there < wanted) & ~settled
        return (
            step + 1,
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, there, at_low),
            jnp.where(down, there, at_high),
        )

    zero = jnp.zeros(rows, jnp.int32)
    start = jnp.int32(0), zero, jnp.full(rows, _ONE + 1, jnp.int32), amount(jnp.zeros(rows)), jnp.zeros(rows)
    return jax.lax.bitcast_convert_type(jax.lax.while_loop(going, narrow, start)[1], jnp.float32)
