"""Dynamic loss scaling for float16 (1710.03740): as large as the gradients allow, halved where they overflow.

Written as an optax transformation without effect on the updates: its state rides in the optimizer's, so that it is
saved, restored and placed like any moment. Every optimizer carries it, so that a run may go on in another dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

START = 2.0**16  # with 2^19 tokens a step, 1/8 of the summed loss; too large a start only costs a few skipped steps
SMALLEST = 2.0**-8  # what still overflows here is no matter of scale
GROW_AFTER = 1000  # steps in a row without overflow


class LossScaleState(NamedTuple):
    scale: jax.Array  # () float32, multiplies the mean loss
    good: jax.Array  # () int32, steps since the last change
    skipped: jax.Array  # () int32, overflowed steps so far


def dynamic_loss_scale() -> optax.GradientTransformation:
    """Keeps `LossScaleState` up to date from gradients that the caller has scaled back."""

    def init(params: Any) -> LossScaleState:
        del params
        return LossScaleState(jnp.float32(START), jnp.int32(0), jnp.int32(0))

    def update(updates: Any, state: LossScaleState, params: Any = None) -> tuple[Any, LossScaleState]:
        del params
        finite = jnp.isfinite(optax.global_norm(updates))
        good = jnp.where(finite, state.good + 1, 0)
        grow = good >= GROW_AFTER
        factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
        scale = jnp.maximum(state.scale * factor, SMALLEST)
        return updates, LossScaleState(scale, jnp.where(grow, 0, good), state.skipped + ~finite)

    return optax.GradientTransformation(init, update)


def find_scale(opt_state: Any) -> LossScaleState | None:
    """The loss scale in an optimizer's state, if it has one."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LossScaleState))
    return next((node for node in nodes if isinstance(node, LossScaleState)), None)
