"""Attention backends against a plain reference; the choice of the backend by the device, and its self-check."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, tokenizer

from jaxchat import attention as module
from jaxchat import model as gpt
from jaxchat.attention import (
    attention,
    choose_backend,
    cuda_capability,
    disagreement,
    masked_attention,
    offset_keys,
    slow_half,
    splash_attention,
    trusted_backend,
)
from jaxchat.config import MeshConfig, ModelConfig, load_config
from jaxchat.engine import Engine, Request
from jaxchat.engine.scoring import Scorer, Span
from jaxchat.errors import UsageError
from jaxchat.scaling import resolve, resolve_model
from jaxchat.sharding import make_mesh
from jaxchat.sizes import score_bound
from jaxchat.train_state import check_attention, check_kernels, compute_dtype, decided


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
@pytest.mark.parametrize(
    ("T", "window", "bound"),
    [(1, 5, 30.0), (100, 0, 30.0), (300, 130, 30.0), (300, 5, math.inf), (300, 1000, math.inf)],
)
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


@pytest.mark.parametrize("bound", [30.0, float("inf")])
def test_bfloat16_operands_cost_no_more_than_their_rounding(bound):
    q, k, v = draw(200)

    def run(operands):
        y, pull = jax.vjp(lambda *args: attention(*args, 150, "blocked", bound, operands=operands), q, k, v)
        return y, *pull(q)

    run = jax.jit(run, static_argnums=0)
    for exact, near in zip(run(None), run(jnp.bfloat16), strict=True):
        assert near.dtype == jnp.float32
        assert 1e-5 < float(jnp.linalg.norm(near - exact) / jnp.linalg.norm(exact)) < 0.01


def test_no_score_exceeds_the_bound():
    """Those of offset keys neither, whose halves may both be the longer one of their key."""
    one = resolve_model(ModelConfig(recipe="jaxchat", depth=2, width=64, n_heads=2, head_width=32, vocab_size=64))
    q = one.qk_scale * jnp.ones((1, 2, 2, 32))
    slow = jnp.asarray(slow_half(32))
    k = math.sqrt(2) * jnp.where(jnp.stack([slow, ~slow])[None, :, None], q, 0)  # as long as q
    highest = (q * offset_keys(one, k)).sum(-1).max() / math.sqrt(32)
    assert float(highest) == pytest.approx(score_bound(one), rel=0.02) and highest <= score_bound(one)
    assert score_bound(dataclasses.replace(one, key_offset=False)) < highest


@pytest.mark.parametrize("backend", ["xla", "blocked"])
def test_large_scores_give_no_nan(backend):
    """A key that must not be seen may score far above all that may."""
    q, k, v = (20.0 * a for a in draw(150))
    gradients = jax.jit(jax.grad(lambda *a: jnp.sin(attention(*a, 5, backend)).sum(), (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("first", [0, 19])
def test_masked_attention_is_the_last_rows(first):
    q, k, v = draw(20)
    distance = jnp.arange(first, 20)[:, None] - jnp.arange(20)
    mask = jnp.broadcast_to((distance >= 0) & (distance <= 7), (2, 20 - first, 20))
    y = masked_attention(q[:, first:], k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    np.testing.assert_allclose(y, reference(q, k, v, 7)[:, first:], atol=1e-5)


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


D20 = resolve_model(ModelConfig(depth=20))
GROUPED = resolve_model(ModelConfig(depth=2, width=64, n_heads=4, n_kv_heads=2, head_width=16, vocab_size=64))


def device(platform, **more):
    return types.SimpleNamespace(platform=platform, **more)


H100, V100 = device("gpu", compute_capability="9.0"), device("gpu", compute_capability="7.0")
AMD, TPU = device("gpu", compute_capability="gfx942"), device("tpu")


@pytest.mark.parametrize(
    ("where", "dtype", "shape", "backend", "why"),
    [
        (device("cpu"), jnp.float32, {}, "blocked", ""),
        (H100, jnp.bfloat16, {}, "cudnn", ""),
        (H100, jnp.float32, {}, "xla", "16-bit"),
        (H100, jnp.bfloat16, {"head_width": 20}, "xla", "multiple of 8"),
        (device("gpu", compute_capability="8.0"), jnp.bfloat16, {"head_width": 256}, "xla", "up to 128"),
        (V100, jnp.float16, {}, "xla", "8.0 or newer"),
        (AMD, jnp.bfloat16, {}, "xla", "NVIDIA"),
        (TPU, jnp.bfloat16, {}, "splash", ""),
        (TPU, jnp.bfloat16, {"head_width": 64}, "xla", "multiple of 128"),
        (TPU, jnp.bfloat16, {"seq_len": 200}, "xla", "multiple of 128"),
        (TPU, jnp.bfloat16, {"seq_len": 200, "attention": "splash"}, "xla", "multiple of 128"),
        (H100, jnp.bfloat16, {"attention": "xla"}, "xla", ""),
    ],
)
def test_choice_and_its_reason(where, dtype, shape, backend, why):
    config = resolve_model(ModelConfig(**({"depth": 20} | shape)))
    found, reason = choose_backend(config, dtype, where)
    assert found == backend and (why in reason if why else reason == "")


def test_cards_without_bfloat16_get_float16():
    """And AMD's, whose capability is no number, do not."""
    config = resolve(load_config("nano"))
    for card, dtype in ((H100, "bfloat16"), (V100, "float16"), (AMD, "bfloat16"), (TPU, "bfloat16")):
        devices = types.SimpleNamespace(flat=[card])
        assert compute_dtype(config, types.SimpleNamespace(devices=devices)) == jnp.dtype(dtype)
    assert cuda_capability(H100) == 9.0 and cuda_capability(AMD) is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_this_machines_backend_is_trusted(dtype):
    assert disagreement("blocked", GROUPED, dtype) < (1e-5 if dtype == jnp.float32 else 0.02)
    assert trusted_backend(GROUPED, dtype)[0] == choose_backend(GROUPED, dtype, jax.devices()[0])[0]


def test_a_wrong_kernel_is_caught_once(monkeypatch, capsys):
    """A window that is one too wide: training goes on with XLA's attention after one line."""
    calls = []

    def wrong(q, k, v, window, mesh=None):
        calls.append(window)
        return module.attention(q, k, v, window + 1, "blocked")

    monkeypatch.setattr(module, "splash_attention", wrong)
    monkeypatch.setattr(module, "_faults", {})
    config = resolve(load_config("nano", ["model.attention='splash'", "model.width=256", "model.head_width=128"]))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert check_kernels(config, mesh).model.attention == "xla"
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("differs from XLA's by") == 1
    before = len(calls)
    shorter = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=128))
    assert decided(shorter, mesh).model.attention == "xla" and len(calls) == before  # heads and dtype are the same


def test_a_backend_that_cannot_run_is_replaced():
    backend, why = trusted_backend(resolve_model(ModelConfig(depth=2, attention="cudnn")), jnp.bfloat16)
    assert backend == "xla" and "cudnn attention cannot run here" in why


def test_engine_and_scorer_fall_back_as_training_does():
    """cuDNN cannot run on a CPU: what it would have crashed gives what XLA's attention gives."""
    params = gpt.init_params(CONFIG, seed=0)
    params["unembedding"] = jax.random.normal(jax.random.key(1), params["unembedding"].shape)  # nothing is likely yet
    request = Request(list(range(40, 90)), max_tokens=8)
    text = Span(list(range(40, 90)), 3, 50)
    found = {}
    for backend in ("cudnn", "xla", "auto"):
        config = dataclasses.replace(CONFIG, attention=backend)
        engine = Engine(config, params, tokenizer(), slots=1)
        assert engine.programs.config.attention == ("blocked" if backend == "auto" else "xla")
        (tokens,) = engine.score([request.tokens])
        ((score,),) = Scorer(config, params, batch_rows=1).spans([[text]])
        found[backend] = engine.generate([request])[0].tokens, [t.logprob for t in tokens[1:]], score.loss
    assert found["cudnn"] == found["xla"]
    assert found["auto"][0] == found["xla"][0] and found["auto"][2] == pytest.approx(found["xla"][2], rel=1e-4)


@pytest.mark.parametrize(
    ("where", "depth", "why", "sets", "stops"),
    [
        (H100, 20, "it cannot run", [], True),
        (TPU, 12, "it cannot run", [], True),
        (H100, 12, "it cannot run", ["train.allow_slow=true"], False),
        (H100, 8, "it cannot run", [], False),
        (device("cpu"), 20, "it cannot run", [], False),
        (H100, 20, "", ["model.attention=xla"], False),  # chosen
    ],
)
def test_a_large_model_does_not_train_slowly_unasked(where, depth, why, sets, stops, monkeypatch):
    config = load_config("d20", [f"model.depth={depth}", *sets])
    mesh = types.SimpleNamespace(devices=types.SimpleNamespace(flat=[where]))
    monkeypatch.setattr("jaxchat.train_state.trusted_backend", lambda *_: ("xla", why))
    if not stops:
        assert check_attention(config, mesh) == why
        return
    with pytest.raises(UsageError, match="it cannot run.*train.allow_slow=true"):
        check_attention(config, mesh)
