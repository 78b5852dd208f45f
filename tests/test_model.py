"""Laws of the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_model import lively

from jaxchat import model as gpt
from jaxchat.config import ModelConfig
from jaxchat.scaling import resolve_model
from jaxchat.sizes import padded_vocab, windows

SMALL = {"depth": 5, "width": 64, "n_heads": 4, "n_kv_heads": 2, "seq_len": 32, "vocab_size": 100, "window_short": 6}
MODERN = resolve_model(ModelConfig(**SMALL))
CLASSIC = resolve_model(ModelConfig(recipe="classic", **SMALL))


def tokens_of(config, rows=2, length=None, seed=3):
    return jax.random.randint(jax.random.key(seed), (rows, length or config.seq_len), 0, config.vocab_size)


@pytest.mark.parametrize("config", [MODERN, CLASSIC], ids=["modern", "classic"])
def test_causality_by_gradients(config):
    """No output depends on a later token: checked on the embedding a token puts in, with every extra at work."""
    params, tokens = lively(config), jnp.arange(20)[None, :]  # all tokens differ: one embedding row a position
    tables = ["embedding"] + (["value_embedding"] if config.value_embeddings else [])

    def output(free, position):
        return jnp.sin(gpt.hidden(config, params | free, tokens)[0, position]).sum()

    gradient = jax.jit(jax.grad(output))
    for position in (0, 7, 19):
        grads = gradient({name: params[name] for name in tables}, position)
        for table in tables:
            per_token = np.abs(np.asarray(grads[table])).sum(-1).reshape(-1, padded_vocab(config)).sum(0)
            assert per_token[: position + 1].min() > 0
            assert per_token[position + 1 :].max() == 0


def test_a_window_hides_what_lies_before_it():
    """With short windows in all but the last layer cut to one block: depth 2, window 6, position 20 sees 14..20."""
    config = resolve_model(
        ModelConfig(**(SMALL | {"depth": 2, "window_pattern": "S"}), smear=False, value_embeddings=False)
    )
    params, tokens = lively(config), jnp.arange(24)[None, :]
    assert windows(config) == [6, 32]
    one_layer = dataclasses.replace(config, depth=2, backout=False)

    def output(embedding):
        x = gpt.embed(one_layer, params | {"embedding": embedding}, tokens)
        layer = gpt.layer_params(one_layer, params, 0)
        attend = lambda q, k, v: gpt.attention(q, k, v, 6, "blocked", 10.0)  # noqa: E731
        return gpt.block(one_layer, layer, x, x, tokens, gpt.rotary(one_layer, jnp.arange(24)[None], x.dtype), attend)[
            0, 20
        ].sum()

    reach = np.abs(np.asarray(jax.jit(jax.grad(output))(params["embedding"]))).sum(-1)[:24]
    assert np.flatnonzero(reach).tolist() == list(range(14, 21))


@pytest.mark.parametrize("recipe", ["modern", "classic"])
@pytest.mark.parametrize("depth", [1, 6, 8])
def test_scan_equals_the_plain_loop(recipe, depth):
    config = resolve_model(ModelConfig(**(SMALL | {"depth": depth, "recipe": recipe, "width": 32, "n_heads": 4})))
    params, tokens = lively(config), tokens_of(config, length=16)
    scanned, plain = (
        jax.jit(functools.partial(gpt.hidden, config, options=gpt.LayerOptions(unroll=n))) for n in (1, depth)
    )
    np.testing.assert_allclose(scanned(params, tokens), plain(params, tokens), atol=1e-5)


@pytest.mark.parametrize("unroll", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_rematerialization_changes_memory_alone(unroll):
    """Gradients stay the same to the last bits, and every policy keeps less than the one before."""
    config = resolve_model(ModelConfig(**(SMALL | {"depth": 4, "width": 32, "n_heads": 4})))
    params, tokens = lively(config), tokens_of(config, length=128)
    found, kept = {}, {}
    for policy in gpt.REMAT:
        options = gpt.LayerOptions(unroll=unroll, remat=policy)
        step = jax.jit(jax.grad(lambda p, options=options: jnp.sin(gpt.hidden(config, p, tokens, options)).sum()))
        found[policy] = step(params)
        saved = jax.eval_shape(lambda p, t=options: jax.vjp(lambda p: gpt.hidden(config, p, tokens, t), p)[1], params)
        kept[policy] = sum(leaf.size for leaf in jax.tree.leaves(saved))
    for policy in gpt.REMAT[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max())),
            found[policy],
            found["none"],
        )
    assert kept["none"] > kept["names"] > kept["full"] and kept["none"] > kept["dots"] > kept["full"]


def test_extras_are_constructed_only_when_on():
    assert set(gpt.init_params(CLASSIC, 0)) == {"embedding", "unembedding", "blocks"}
    assert set(gpt.init_params(CLASSIC, 0)["blocks"]) == {"q", "k", "v", "o", "fc", "proj"}
    assert "smear_gate" not in gpt.init_params(dataclasses.replace(MODERN, smear=False), 0)
    tied = gpt.init_params(dataclasses.replace(MODERN, tie_embeddings=True), 0)
    assert "unembedding" not in tied


def test_init_statistics():
    config = resolve_model(ModelConfig(depth=4, vocab_size=512))
    p = gpt.init_params(config, 0)
    D = config.width
    assert np.std(p["embedding"]) == pytest.approx(0.8, rel=0.02)
    assert np.std(p["unembedding"]) == pytest.approx(0.001, rel=0.02)
    assert np.std(p["blocks"]["q"]) == pytest.approx(D**-0.5, rel=0.02)
    assert np.std(p["blocks"]["fc"]) == pytest.approx(0.4 * D**-0.5, rel=0.02)
    assert np.abs(p["blocks"]["q"]).max() <= 3**0.5 * D**-0.5
    assert not np.any(p["blocks"]["o"]) and not np.any(p["blocks"]["proj"])
    assert p["blocks"]["residual_scale"] == pytest.approx(np.linspace(1.15, 1.05, 4))
    assert p["blocks"]["x0_scale"] == pytest.approx(np.linspace(0.2, 0.05, 4))
    assert (float(p["smear_scale"]), float(p["backout_scale"])) == (0.0, pytest.approx(0.2))
    classic = gpt.init_params(resolve_model(ModelConfig(recipe="classic", depth=4, vocab_size=512)), 0)
    assert np.std(classic["embedding"]) == pytest.approx(1.0, rel=0.02) and not np.any(classic["unembedding"])
    assert np.std(classic["blocks"]["fc"]) == pytest.approx(D**-0.5, rel=0.02)


def test_module_and_functions_are_one_model():
    model = gpt.GPT(MODERN, nnx.Rngs(0))
    tokens = tokens_of(MODERN)
    params = gpt.init_params(MODERN, 0)
    direct = gpt.logits(MODERN, params, gpt.hidden(MODERN, params, tokens))
    np.testing.assert_array_equal(model(tokens), direct)
    graph, _ = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graph, params)(tokens), direct)


def test_logits_are_capped_and_cropped():
    params = jax.tree.map(lambda p: 30 * p, lively(MODERN))
    out = gpt.logits(MODERN, params, gpt.hidden(MODERN, params, tokens_of(MODERN)))
    assert out.shape == (2, 32, 100) and out.dtype == jnp.float32
    assert np.abs(out).max() <= 15.0


def test_rotary_turns_by_minus_theta_and_keeps_relative_scores():
    config = MODERN
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, config.head_width))

    def score(i, j):
        turn = lambda x, t: gpt.rotate(x, gpt.rotary(config, jnp.array([[t]]), jnp.float32))  # noqa: E731
        return float((turn(q, i) * turn(k, j)).sum())

    assert score(9, 4) == pytest.approx(score(15, 10), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)
    half = config.head_width // 2
    unit = jnp.zeros((1, 1, 1, config.head_width)).at[..., 0].set(1.0)
    turned = gpt.rotate(unit, gpt.rotary(config, jnp.array([[1]]), jnp.float32))[0, 0, 0]
    assert float(turned[0]) == pytest.approx(np.cos(1), rel=1e-5)
    assert float(turned[half]) == pytest.approx(-np.sin(1), rel=1e-5)


def test_bfloat16_stays_near_float32():
    params, tokens = lively(MODERN, scale=0.02), tokens_of(MODERN)
    exact = gpt.hidden(MODERN, params, tokens)
    rough = gpt.hidden(MODERN, gpt.cast_params(params, jnp.bfloat16), tokens)
    assert rough.dtype == jnp.bfloat16
    assert np.abs(exact - rough.astype(jnp.float32)).max() < 0.1


def compare_bfloat16(function, *inputs, tolerance):
    """Output and gradients in bfloat16 against float32, of the same rounded inputs and random cotangents."""
    narrow = [a.astype(jnp.bfloat16) for a in inputs]
    exact, pull_exact = jax.vjp(function, *(a.astype(jnp.float32) for a in narrow))
    found, pull = jax.vjp(function, *narrow)
    g = jax.random.normal(jax.random.key(9), exact.shape).astype(jnp.bfloat16)
    for a, b in zip((exact, *pull_exact(g.astype(jnp.float32))), (found, *pull(g)), strict=True):
        assert b.dtype == jnp.bfloat16
        assert float(jnp.linalg.norm(b.astype(jnp.float32) - a) / jnp.linalg.norm(a)) < tolerance


def test_bfloat16_forms_of_norm_rotary_and_activation_agree_with_float32():
    """They compute their gradients from their results; every rounding is worth 2^-9."""
    config = resolve_model(ModelConfig(**SMALL))
    x = 3 * jax.random.normal(jax.random.key(1), (2, 24, 4, config.head_width))
    turn = gpt.rotary(config, jnp.arange(24)[None], jnp.bfloat16)
    assert turn[0].dtype == jnp.float32
    compare_bfloat16(lambda x: gpt.norm(x, 1e-6), x, tolerance=0.01)
    compare_bfloat16(lambda x: gpt.norm(0.001 * x, 1e-5), x, tolerance=0.01)  # where eps counts
    compare_bfloat16(lambda x: gpt.relu_squared(x, "mlp"), x, tolerance=0.01)
    compare_bfloat16(lambda x: gpt.qk_norm(x, turn, 1e-6, 1.2, "q"), x, tolerance=0.01)


@pytest.mark.parametrize("remat", gpt.REMAT)
def test_a_bfloat16_model_has_the_gradients_of_a_float32_one(remat):
    config = resolve_model(ModelConfig(**(SMALL | {"depth": 4, "width": 32, "n_heads": 4})))
    params, tokens = lively(config), tokens_of(config, length=64)
    options = gpt.LayerOptions(unroll=4, remat=remat, merge=True)

    def loss(params, dtype):
        return jnp.sin(gpt.hidden(config, gpt.cast_params(params, dtype), tokens, options).astype(jnp.float32)).sum()

    exact, found = (jax.jit(jax.grad(loss), static_argnums=1)(params, d) for d in (jnp.float32, jnp.bfloat16))
    flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])  # noqa: E731
    a, b = flat(exact), flat(found)
    assert float(jnp.linalg.norm(b - a) / jnp.linalg.norm(a)) < 0.05
