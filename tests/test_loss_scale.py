"""Dynamic loss scaling, alone; `test_state.py` has it in a float16 step."""

import jax.numpy as jnp
import numpy as np

from jaxchat.low_precision import GROW_AFTER, SMALLEST, START, LossScaleState, dynamic_loss_scale


def after(*gradients, start=None):
    scaling = dynamic_loss_scale()
    state = start or scaling.init({})
    for gradient in gradients:
        updates, state = scaling.update({"w": jnp.float32(gradient)}, state)
        np.testing.assert_array_equal(updates["w"], gradient)  # the updates pass
    return state


def test_an_overflow_halves_and_is_counted():
    state = after(1.0, np.inf, np.nan, 1.0)
    assert float(state.scale) == START / 4 and int(state.skipped) == 2 and int(state.good) == 1


def test_a_quiet_time_doubles():
    state = after(1.0, start=LossScaleState(jnp.float32(8.0), jnp.int32(GROW_AFTER - 1), jnp.int32(0)))
    assert float(state.scale) == 16.0 and int(state.good) == 0


def test_it_never_vanishes():
    assert (
        float(after(np.inf, start=LossScaleState(jnp.float32(SMALLEST), jnp.int32(0), jnp.int32(0))).scale) == SMALLEST
    )
