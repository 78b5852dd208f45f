"""Cached logits equal uncached ones at every position, for both recipes, with windows shorter than the prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import kv_cache as cache_module
from jaxchat import model as gpt
from jaxchat.config import ModelConfig
from jaxchat.kv_cache import insert, layer_capacity, new_cache, prefill, serving_params
from jaxchat.scaling import resolve_model

SHAPE = {"depth": 5, "width": 64, "n_heads": 4, "n_kv_heads": 2, "seq_len": 48, "vocab_size": 100, "window_short": 6}
T = 40


def lively(config):
    params = gpt.init_params(config, 0)
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)


@pytest.mark.parametrize("recipe", ["modern", "classic"])
def test_cached_equals_uncached_at_every_position(recipe):
    config = resolve_model(ModelConfig(recipe=recipe, **SHAPE))
    params = lively(config)
    serving = serving_params(config, params, jnp.float32)
    tokens = jax.random.randint(jax.random.key(1), (2, T), 0, config.vocab_size)
    full = jax.jit(lambda p, t: gpt.logits(config, p, gpt.hidden(config, p, t)))(params, tokens)
    step = jax.jit(lambda p, t, c, a: cache_module.decode(config, p, t, c, a, 48))
    # two prompts of different lengths, padded, one shorter than the window, put into slots 2 and 0 of three
    length = jnp.array([3, 20])
    first, prefix = jax.jit(lambda p, t, n: prefill(config, p, t, n))(serving, tokens[:, :32], length)
    np.testing.assert_allclose(first, full[jnp.arange(2), length - 1], atol=1e-4)
    cache = new_cache(config, 3, 48)
    cache = insert(insert(cache, prefix, jnp.int32(0), jnp.int32(2)), prefix, jnp.int32(1), jnp.int32(0))
    for i in range(T - 20):
        fed = jnp.array([tokens[1, 20 + i], 7, tokens[0, 3 + i]])
        got, cache = step(serving, fed, cache, jnp.array([True, False, True]))
        np.testing.assert_allclose(got[0], full[1, 20 + i], atol=1e-4)
        np.testing.assert_allclose(got[2], full[0, 3 + i], atol=1e-4)
    assert cache.length.tolist() == [40, 0, 23]
    assert not np.any(cache.k[0][1]) and not np.any(cache.previous[1])  # the inactive row wrote nothing


def test_windowed_layers_keep_only_their_window():
    config = resolve_model(ModelConfig(**SHAPE))
    assert layer_capacity(config, 48) == [7, 7, 7, 48, 48]
    assert layer_capacity(config, 5) == [5] * 5
