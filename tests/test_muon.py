"""Muon: near-orthogonal updates, the plain variant against optax's, and the arithmetic of each piece."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.muon import (
    POLAR_EXPRESS,
    add_cautious_decay,
    muon,
    nesterov_momentum,
    orthogonalize,
)

SHAPES = [(2, 16, 48), (2, 48, 16), (1, 32, 32)]


def polar_express_coefficients(
    steps: int = 5, lower: float = 1e-3, safety: float = 2e-2, cushion: float = 2e-2
) -> tuple[tuple[float, float, float], ...]:
    """The paper's algorithm 1: optimal odd quintics (a, b, c) of each Polar Express iteration, to float64 precision.

    Each step is the best minimax approximation of 1 by `a x + b x^3 + c x^5` on [l, u], the range the singular values
    have reached; `cushion` keeps l / u from being so small that the polynomial overshoots, `safety` divides the
    argument for rounding in bfloat16 (in every step but the last). The defaults are those behind nanochat's table.
    """
    low, high, result = lower, 1.0, []
    for step in range(steps):
        a, b, c = optimal_quintic(max(low, cushion * high), high)
        if low < cushion * high:  # recentre: the true range is wider than the cushioned one
            at_low, at_high = (a * x + b * x**3 + c * x**5 for x in (low, high))
            rescale = 2.0 / (at_low + at_high)
            a, b, c = a * rescale, b * rescale, c * rescale
        scale = 1.0 + safety if step < steps - 1 else 1.0
        a, b, c = a / scale, b / scale**3, c / scale**5
        result.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2.0 - low
    return tuple(result)


def optimal_quintic(low: float, high: float) -> tuple[float, float, float]:
    """Remez iteration for the odd quintic nearest to 1 on [low, high]."""
    if 1 - 5e-6 <= low / high:
        return (15 / 8) / high, (-10 / 8) / high**3, (3 / 8) / high**5
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    error, previous = np.inf, None
    while previous is None or abs(previous - error) > 1e-15:
        previous = error
        x = np.array([low, q, r, high])
        system = np.stack([x, x**3, x**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        q, r = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return float(a), float(b), float(c)


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
    np.testing.assert_allclose(POLAR_EXPRESS, polar_express_coefficients(5), rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_against_a_float64_svd(shape):
    x = draw(shape)
    many = bare(x, polar_express_coefficients(12))
    np.testing.assert_allclose(many, polar(x), atol=0.03)
    five = orthogonalize(POLAR_EXPRESS).update(x, optax.EmptyState())[0]
    assert cosine(five, polar(x)) > 0.985
    values = np.linalg.svd(np.asarray(five, np.float64), compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.3
    norms = np.linalg.norm(np.asarray(five), axis=(-2, -1))
    np.testing.assert_allclose(norms, min(shape[-2:]) ** 0.5, rtol=1e-4)


def test_matrices_of_one_shape_share_a_stack_and_come_back_in_their_places():
    tree = {"a": draw((3, 16, 48)), "b": draw((48, 16), 1), "c": draw((2, 16, 48), 2), "d": draw((16, 48), 3)}
    together = bare(tree, POLAR_EXPRESS)
    for name, x in tree.items():
        np.testing.assert_allclose(together[name], bare(x, POLAR_EXPRESS), atol=1e-5, err_msg=name)


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


@pytest.mark.parametrize("shape", [(2, 16, 48), (48, 16)])
def test_bfloat16_operands_give_nearly_the_same_matrix(shape):
    x = draw(shape)
    both = (orthogonalize(POLAR_EXPRESS, operands=dtype) for dtype in (None, jnp.bfloat16))
    exact, near = (transform.update(x, optax.EmptyState())[0] for transform in both)
    assert near.dtype == jnp.float32 and 0.998 < cosine(near, exact) < 1 - 1e-7


def test_nesterov_momentum_by_hand():
    t = nesterov_momentum(lambda count: 0.5 + 0.25 * count)
    state = t.init(jnp.zeros(()))
    u, state = t.update(jnp.float32(4.0), state)  # m = 2, u = 0.5 * 2 + 0.5 * 4
    assert float(u) == 3.0
    u, state = t.update(jnp.float32(8.0), state)  # mu = 0.75: m = 0.75 * 2 + 0.25 * 8 = 3.5, u = 0.75 * 3.5 + 0.25 * 8
    assert float(u) == pytest.approx(4.625)


def test_cautious_decay_only_where_signs_agree():
    t = add_cautious_decay(0.1)
    params, updates = jnp.array([2.0, 2.0, -2.0]), jnp.array([1.0, -1.0, -1.0])
    got, _ = t.update(updates, t.init(params), params)
    np.testing.assert_allclose(got, [1.2, -1.0, -1.2], rtol=1e-6)


def torch_order_reference(g, p, mu=0.9, beta2=0.9, decay=0.1):
    """The whole update for an (out, in) matrix in float64, written from the papers."""
    rows, cols = g.shape
    m = (1 - mu) * g
    u = mu * m + (1 - mu) * g
    u = u * (np.linalg.norm(u) / rows**0.5 / np.linalg.norm(u, axis=1, keepdims=True))
    x = u / (1.01 * np.linalg.norm(u))
    for a, b, c in POLAR_EXPRESS:
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
    want = torch_order_reference(g, p).T
    assert cosine(got, want) > 0.99999
    np.testing.assert_allclose(got, want, atol=2e-3)
