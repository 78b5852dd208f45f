"""Muon: near-orthogonal updates, the plain variant against optax's, and the arithmetic of each piece."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.muon import (
    add_cautious_decay,
    equilibrate_rows,
    muon,
    nesterov_momentum,
    normalize_neurons,
    orthogonalize,
    polar_express_coefficients,
    scale_by_shape,
)

SHAPES = [(2, 16, 48), (2, 48, 16), (1, 32, 32)]
NANOCHAT = (  # printed in its optim.py, computed there with the same settings
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def draw(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def polar(x):
    """The exact nearest semi-orthogonal matrix, by a float64 singular value decomposition."""
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vt


def cosine(a, b):
    a, b = np.ravel(a), np.ravel(b)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def bare(x, coefficients):
    """The iteration alone, without the last norm."""
    return orthogonalize(coefficients, renormalize=False).update(x, optax.EmptyState())[0]


def test_coefficients_to_full_precision():
    np.testing.assert_allclose(polar_express_coefficients(5), NANOCHAT, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_against_a_float64_svd(shape):
    x = draw(shape)
    many = bare(x, polar_express_coefficients(12))
    np.testing.assert_allclose(many, polar(x), atol=0.03)
    five = orthogonalize(polar_express_coefficients(5)).update(x, optax.EmptyState())[0]
    assert cosine(five, polar(x)) > 0.985
    values = np.linalg.svd(np.asarray(five, np.float64), compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.3
    norms = np.linalg.norm(np.asarray(five), axis=(-2, -1))
    np.testing.assert_allclose(norms, min(shape[-2:]) ** 0.5, rtol=1e-4)


def test_stacked_matrices_are_treated_one_by_one():
    x = draw((3, 16, 48))
    alone = jnp.stack([bare(m, polar_express_coefficients()) for m in x])
    np.testing.assert_allclose(bare(x, polar_express_coefficients()), alone, atol=1e-5)


def test_matrices_of_one_shape_share_a_stack_and_come_back_in_their_places():
    tree = {"a": draw((3, 16, 48)), "b": draw((48, 16), 1), "c": draw((2, 16, 48), 2), "d": draw((16, 48), 3)}
    together = bare(tree, polar_express_coefficients())
    for name, x in tree.items():
        np.testing.assert_allclose(together[name], bare(x, polar_express_coefficients()), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_plain_variant_equals_optax(shape):
    """Momentum without Nesterov, Newton-Schulz: the two agree (optax's bias correction is a scale, which cancels)."""
    coefficients = (3.4445, -4.7750, 2.0315)
    momentum = nesterov_momentum(0.95)
    plain = orthogonalize([coefficients] * 5, safety=1.0, renormalize=False)
    theirs = optax.contrib.scale_by_muon(ns_coeffs=coefficients, ns_steps=5, beta=0.95, eps=1e-7, nesterov=False)
    params = jnp.zeros(shape)
    a, b = momentum.init(params), theirs.init(params)
    for seed in range(3):
        _, a = momentum.update(draw(shape, seed), a, params)
        ub, b = theirs.update(draw(shape, seed), b, params)
        ours, _ = plain.update(a.momentum, optax.EmptyState())
        np.testing.assert_allclose(ours, ub, atol=2e-5)


def test_nesterov_momentum_by_hand():
    t = nesterov_momentum(lambda count: 0.5 + 0.25 * count)
    state = t.init(jnp.zeros(()))
    u, state = t.update(jnp.float32(4.0), state)  # m = 2, u = 0.5 * 2 + 0.5 * 4
    assert float(u) == 3.0
    u, state = t.update(jnp.float32(8.0), state)  # mu = 0.75: m = 0.75 * 2 + 0.25 * 8 = 3.5, u = 0.75 * 3.5 + 0.25 * 8
    assert float(u) == pytest.approx(4.625)


def test_rows_are_outputs_of_in_out_kernels():
    x = draw((2, 16, 48)) * jnp.arange(1, 49)
    y = equilibrate_rows().update(x, optax.EmptyState())[0]
    columns = np.linalg.norm(np.asarray(y), axis=-2)
    np.testing.assert_allclose(columns, np.broadcast_to(columns.mean(-1, keepdims=True), columns.shape), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(y, axis=(-2, -1)), np.linalg.norm(x, axis=(-2, -1)), rtol=1e-4)


@pytest.mark.parametrize(("shape", "moments"), [((2, 16, 48), (2, 1, 48)), ((2, 48, 16), (2, 48, 1)), ((4, 4), (1, 4))])
def test_second_moment_is_per_output_or_per_input(shape, moments):
    t = normalize_neurons(0.9)
    state = t.init(jnp.zeros(shape))
    assert state.second_moment.shape == moments
    x = draw(shape)
    y, state = t.update(x, state)
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=0.02)
    axis = -2 if moments[-2] == 1 else -1
    spread = np.sqrt(np.mean(np.square(y), axis=axis))
    np.testing.assert_allclose(spread, spread.mean(-1, keepdims=True) * np.ones_like(spread), rtol=1e-3)


def test_cautious_decay_only_where_signs_agree():
    t = add_cautious_decay(0.1)
    params, updates = jnp.array([2.0, 2.0, -2.0]), jnp.array([1.0, -1.0, -1.0])
    got, _ = t.update(updates, t.init(params), params)
    np.testing.assert_allclose(got, [1.2, -1.0, -1.2], rtol=1e-6)


def test_scale_by_shape():
    wide, tall = jnp.ones((4, 16)), jnp.ones((16, 4))
    t = scale_by_shape()
    assert float(t.update(wide, t.init(wide))[0][0, 0]) == 2.0
    assert float(t.update(tall, t.init(tall))[0][0, 0]) == 1.0


def torch_order_reference(g, p, steps, mu=0.9, beta2=0.9, decay=0.1):
    """The whole update for an (out, in) matrix in float64, written from the papers."""
    rows, cols = g.shape
    m = (1 - mu) * g
    u = mu * m + (1 - mu) * g
    u = u * (np.linalg.norm(u) / rows**0.5 / np.linalg.norm(u, axis=1, keepdims=True))
    x = u / (1.01 * np.linalg.norm(u))
    for a, b, c in polar_express_coefficients(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x *= min(rows, cols) ** 0.5 / np.linalg.norm(x)
    v = (1 - beta2) * np.mean(x**2, axis=1 if rows >= cols else 0, keepdims=True)
    y = x / np.sqrt(v)
    y *= np.linalg.norm(x) / np.linalg.norm(y)
    y += decay * p * (y * p >= 0)
    return y * max(1.0, rows / cols) ** 0.5


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24)])  # (out, in)
def test_whole_update_equals_a_float64_reference_in_torch_order(shape):
    """Ours holds the transpose: same update, roles of the axes exchanged."""
    rng = np.random.default_rng(0)
    g, p = rng.normal(size=shape), rng.normal(size=shape)
    t = muon(momentum=0.9, weight_decay=0.1)
    kernel = jnp.asarray(p.T, jnp.float32)
    got, _ = t.update(jnp.asarray(g.T, jnp.float32), t.init(kernel), kernel)
    want = torch_order_reference(g, p, 5).T
    assert cosine(got, want) > 0.99999
    np.testing.assert_allclose(got, want, atol=2e-3)
