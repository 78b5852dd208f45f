"""Schedules over optimizer steps: functions of the step count (traced or plain) to a float."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]


def trapezoid(steps: int, warmup: int, warmdown_ratio: float, final: float) -> Schedule:
    """Linear from 1/warmup to 1, flat, and linear over the last `warmdown_ratio` of the steps down to `final`.

    The multiplier never leaves [min(final, 0), 1], also for steps past the end.
    """
    warmdown = max(1, round(warmdown_ratio * steps))

    def multiplier(step):
        rise = (step + 1) / max(warmup, 1)
        left = jnp.clip((steps - step) / warmdown, 0.0, 1.0)
        return jnp.minimum(jnp.minimum(rise, 1.0), left + (1 - left) * final)

    return multiplier


def cosine(steps: int, warmup: int, final: float) -> Schedule:
    """Linear warm-up, then half a cosine from 1 to `final`: the usual schedule of AdamW."""

    def multiplier(step):
        rise = (step + 1) / max(warmup, 1)
        done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return jnp.minimum(rise, final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done)))

    return multiplier


def muon_momentum(
    steps: int, warmup: int, warmdown_ratio: float, values: tuple[float, ...] = (0.85, 0.97, 0.90)
) -> Schedule:
    """From the first of three `values` to the second over `warmup` steps, then flat, and to the third while the rate
    falls (nanochat)."""
    warmdown = max(1, round(warmdown_ratio * steps))
    first, peak, last = values

    def momentum(step):
        rising = first + (peak - first) * jnp.clip(step / max(warmup, 1), 0.0, 1.0)
        falling = peak - (peak - last) * jnp.clip((step - (steps - warmdown)) / warmdown, 0.0, 1.0)
        return jnp.minimum(rising, falling)

    return momentum


def cosine_to_zero(steps: int, start: float) -> Schedule:
    """Half a cosine from `start` to 0 over the steps: Muon's weight decay."""
    return lambda step: start * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / max(steps, 1), 0.0, 1.0)))
