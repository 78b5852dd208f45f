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
