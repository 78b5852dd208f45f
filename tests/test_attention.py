"""Attention backends against a plain reference, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.attention import attention, cached_attention, splash_attention


def reference(q, k, v, window):
    """The definition, in float64 loops over nothing: masks as matrices."""
    _, T, H, N = q.shape
    k, v = (np.repeat(np.asarray(a, np.float64), H // k.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("bqhn,bshn->bhqs", np.asarray(q, np.float64), k) / np.sqrt(N)
    i, j = np.indices((T, T))
    scores = np.where((j <= i) & (i - j <= window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqs,bshn->bqhn", weights / weights.sum(-1, keepdims=True), v)


def draw(T, H=4, K=2, N=8):
    keys = jax.random.split(jax.random.key(T), 3)
    return [jax.random.normal(key, (2, T, heads, N)) for key, heads in zip(keys, (H, K, K), strict=True)]


@pytest.mark.parametrize("backend", ["xla", "blocked"])
@pytest.mark.parametrize("T", [1, 100, 300])
@pytest.mark.parametrize("window", [0, 5, 130, 1000])
@pytest.mark.parametrize("bound", [30.0, float("inf")])
def test_backends_equal_the_reference(backend, T, window, bound):
    q, k, v = draw(T)
    run = jax.jit(attention, static_argnums=(3, 4, 5))
    np.testing.assert_allclose(run(q, k, v, window, backend, bound), reference(q, k, v, window), atol=2e-5)


@pytest.mark.parametrize("window", [5, 1000])
def test_gradients_agree(window):
    q, k, v = draw(200)

    def scalar(backend, bound):
        return lambda *args: jnp.sin(attention(*args, window, backend, bound)).sum()

    exact = jax.jit(jax.grad(scalar("xla", float("inf")), (0, 1, 2)))(q, k, v)
    for bound in (30.0, float("inf")):
        for a, b in zip(exact, jax.jit(jax.grad(scalar("blocked", bound), (0, 1, 2)))(q, k, v), strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("backend", ["xla", "blocked"])
def test_large_scores_give_no_nan(backend):
    """A key that must not be seen may score far above all that may."""
    q, k, v = (20.0 * a for a in draw(150))
    gradients = jax.jit(jax.grad(lambda *a: jnp.sin(attention(*a, 5, backend)).sum(), (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)


def test_cached_attention_is_the_last_row():
    q, k, v = draw(20)
    visible = jnp.ones((2, 20), bool)
    last = cached_attention(q[:, -1], k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), visible)
    np.testing.assert_allclose(last, reference(q, k, v, 99)[:, -1], atol=1e-5)


@pytest.mark.parametrize("window", [100, 1000])
def test_splash_equals_the_reference(window):
    """The TPU kernel's own program, interpreted: grouped heads, short and full windows, values and gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 256, heads, 128)) for key, heads in zip(keys, (2, 1, 1), strict=True))

    def scalar(run):
        def loss(*args):
            y = run(*args)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    (_, y), grads = scalar(lambda *qkv: splash_attention(*qkv, window, interpret=True))(q, k, v)
    np.testing.assert_allclose(y, reference(q, k, v, window), atol=2e-5)
    _, exact = scalar(lambda *qkv: attention(*qkv, window, "xla"))(q, k, v)
    for a, b in zip(grads, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
