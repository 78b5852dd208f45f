"""Choosing the next token of every row at once, with settings that are data: no new value compiles anything.

Axes: R rows, V vocabulary. Temperature 0 is greedy. Top-k and top-p (nucleus, 1904.09751) cut by a threshold that a
bisection finds; sorting the vocabulary costs more. The draw inverts the cumulative distribution with one uniform
number, which depends on the row's own seed and position alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_ONE = 0x3F800000  # float32 1.0 as bits; the bits of non-negative floats are ordered as the floats are
_STEPS = 30  # halvings of [0, _ONE] until one value is left


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
        cumulative = jnp.cumsum(p, axis=-1)
        goal = cumulative[:, -1] * jax.vmap(_uniform)(seed, position)
        above = cumulative > goal[:, None]
        # rounding may leave nothing above the goal; then it lies at the very end, where greedy is as good
        drawn = jnp.where(above[:, -1], _first(above), greedy)
        return jnp.where(temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)


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
    k = jnp.where(top_k > 0, top_k, p.shape[-1])

    def enough_tokens(t: jax.Array) -> jax.Array:
        return jnp.sum(p >= t[:, None], axis=-1) >= k

    by_count = _largest(enough_tokens, p.shape[0])
    kept = jnp.where(p >= by_count[:, None], p, 0.0)
    goal = top_p * kept.sum(axis=-1)

    def enough_mass(t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(kept >= t[:, None], kept, 0.0), axis=-1) >= goal

    def by_mass() -> jax.Array:
        return jnp.where(top_p < 1.0, jnp.maximum(by_count, _largest(enough_mass, p.shape[0])), by_count)

    return jax.lax.cond(jnp.any(top_p < 1.0), by_mass, lambda: by_count)


def _largest(holds, rows: int) -> jax.Array:
    """(rows,) the largest float32 in [0, 1] for which the falling condition `holds` is true (0 where it never is)."""

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # holds(low); not holds(high)
        middle = (low + high) // 2
        true = holds(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(true, middle, low), jnp.where(true, high, middle)

    start = jnp.zeros(rows, jnp.int32), jnp.full(rows, _ONE + 1, jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, _STEPS, halve, start)[0], jnp.float32)
