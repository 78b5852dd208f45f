"""The chunked loss equals the plain one, in value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.loss import LossSpec, chunked_loss

B, T, D, V, REAL = 3, 24, 16, 64, 50


def plain(x, w, targets, weights):
    z = jnp.einsum("btd,vd->btv", x, w)[..., :REAL]
    logp = jax.nn.log_softmax(15 * jnp.tanh(z / 15))
    return -(weights * jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]).sum()


def draw(scale=1.0):
    keys = jax.random.split(jax.random.key(0), 4)
    x = scale * jax.random.normal(keys[0], (B, T, D))
    w = jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, T), 0, REAL)
    return x, w, targets, jax.random.uniform(keys[3], (B, T)) - 0.3  # signed weights, as RL has


@pytest.mark.parametrize("chunk", [1, 7, 24, 36, 10_000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_value_and_gradients_equal_the_plain_loss(chunk, scale):
    x, w, targets, weights = draw(scale)
    spec = LossSpec(REAL, 15.0, chunk)
    want, grads = jax.value_and_grad(plain, (0, 1))(x, w, targets, weights)
    got, ours = jax.value_and_grad(lambda x, w: 3.0 * chunked_loss(x, w, targets, weights, spec)[0], (0, 1))(x, w)
    assert got == pytest.approx(3 * float(want), rel=1e-5)
    for a, b in zip(grads, ours, strict=True):
        np.testing.assert_allclose(b, 3 * a, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()) * 3)


def test_evaluation_alone_gives_the_same_values():
    x, w, targets, weights = draw()
    total, nll = chunked_loss(x, w, targets, weights, LossSpec(REAL, 15.0, 24))
    assert float(total) == pytest.approx(float(plain(x, w, targets, weights)), rel=1e-5)
    assert float((nll * weights).sum()) == pytest.approx(float(total), rel=1e-5)
    assert nll.shape == (B, T)


def test_bfloat16_keeps_the_weight_gradient_in_float32():
    x, w, targets, weights = draw()
    spec = LossSpec(REAL, 15.0, 24)
    dw = jax.grad(lambda w: chunked_loss(x.astype(jnp.bfloat16), w, targets, weights, spec)[0])(w)
    assert dw.dtype == jnp.float32
    exact = jax.grad(plain, 1)(x, w, targets, weights)
    assert float(jnp.abs(dw - exact).max()) < 0.05 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("chunk", [7, 24])  # chunks of an odd length are filled
def test_bfloat16_operands_cost_no_more_than_their_rounding(chunk):
    x, w, targets, weights = draw()
    spec = LossSpec(REAL, 15.0, chunk, jnp.bfloat16)
    want, grads = jax.value_and_grad(plain, (0, 1))(x, w, targets, weights)
    got, ours = jax.value_and_grad(lambda x, w: chunked_loss(x, w, targets, weights, spec)[0], (0, 1))(x, w)
    assert got == pytest.approx(float(want), rel=0.01)
    for a, b in zip(grads, ours, strict=True):
        assert b.dtype == jnp.float32 and float(jnp.linalg.norm(b - a)) < 0.01 * float(jnp.linalg.norm(a))


def test_no_full_logits_in_the_compiled_program():
    """The largest array holds one chunk of logits, not all of them."""
    b, t, v = 4, 256, 1024
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (
        ((b, t, D), jnp.float32), ((v, D), jnp.float32), ((b, t), jnp.int32), ((b, t), jnp.float32))]  # fmt: skip
    step = jax.jit(jax.grad(lambda *a: chunked_loss(*a, LossSpec(v, 15.0, 128))[0], (0, 1)))
    memory = step.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * b * t * v


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_bfloat16_logits_of_a_training_step_agree_with_float32(scale):
    """What is rounded is the capped logit: 15 x 2^-9 at most. Evaluation keeps float32."""
    x, w, targets, weights = draw(scale)
    x, w = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w))  # the inputs' own rounding is not the question
    spec, narrow = LossSpec(REAL, 15.0, 24), x.astype(jnp.bfloat16)
    loss = lambda x, w: chunked_loss(x, w, targets, jnp.abs(weights), spec)[0]  # noqa: E731
    exact, grads = jax.value_and_grad(loss, (0, 1))(x, w)
    total, ours = jax.value_and_grad(loss, (0, 1))(narrow, w)
    assert float(total) == pytest.approx(float(exact), rel=2e-3)
    assert float(loss(narrow, w)) == pytest.approx(float(exact), rel=1e-5)
    for a, b in zip(grads, ours, strict=True):
        assert float(jnp.linalg.norm(b.astype(jnp.float32) - a)) < 0.01 * float(jnp.linalg.norm(a))
