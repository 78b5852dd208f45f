"""fp8 products near the exact ones and real fp8 in the program; the loss scale of float16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import low_precision
from jaxchat.config import MeshConfig, load_config
from jaxchat.low_precision import (
    E4M3,
    E5M2,
    GROW_AFTER,
    SMALLEST,
    START,
    LossScaleState,
    bfloat16_dot,
    cpu_operands,
    dynamic_loss_scale,
    fp8_dot,
    quantize_fp8,
)
from jaxchat.optimizer import make_optimizer
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from jaxchat.train_state import compute_dtype, init_state, make_train_step


def draw(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_quantization_uses_the_whole_range(dtype, scale):
    x = draw(64, 64, scale=scale)
    q, s = quantize_fp8(x, dtype)
    assert q.dtype == dtype and float(jnp.abs(q.astype(jnp.float32)).max()) == float(jnp.finfo(dtype).max)
    bits = jnp.finfo(dtype).nmant
    error = jnp.abs(q.astype(jnp.float32) * s - x)
    normal = float(jnp.finfo(dtype).smallest_normal) * s
    assert float((error / jnp.maximum(jnp.abs(x), normal)).max()) <= 2.0 ** -(bits + 1) * 1.01


def test_zeros_stay_zeros():
    q, s = quantize_fp8(jnp.zeros((3, 4)), E4M3)
    assert not np.any(q.astype(jnp.float32)) and np.isfinite(float(s))


@pytest.mark.parametrize("dot, operands", [(fp8_dot, 0.1), (bfloat16_dot, 0.01)])
def test_product_and_gradients_are_near_the_exact_ones(dot, operands):
    x, w = draw(4, 8, 64), draw(64, 32, seed=1)

    def energy(dot):
        return jax.value_and_grad(lambda x, w: jnp.square(dot(x, w)).sum(), (0, 1))(x, w)

    (got, grads), (want, exact) = energy(dot), energy(jnp.matmul)
    assert got == pytest.approx(float(want), rel=0.01)
    for g, e in zip(grads, exact, strict=True):
        assert g.dtype == jnp.float32 and float(jnp.linalg.norm(g - e) / jnp.linalg.norm(e)) < operands


def test_a_cpu_multiplies_in_bfloat16_where_it_can_and_may(monkeypatch):
    config, mesh = load_config("nano", ["train.steps=10"]), make_mesh(MeshConfig(), jax.devices()[:1])
    for native in (True, False):
        monkeypatch.setattr(low_precision, "native_bfloat16", lambda native=native: native)
        assert cpu_operands(config, mesh) == (jnp.bfloat16 if native else None)
        for dtype in ("float32", "bfloat16"):
            assert cpu_operands(load_config("nano", [f"train.compute_dtype={dtype}"]), mesh) is None


def test_all_three_products_of_the_lowered_program_have_fp8_operands():
    text = jax.jit(jax.grad(lambda x, w: fp8_dot(x, w).sum(), (0, 1))).lower(draw(8, 16), draw(16, 4)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    forward = jax.jit(fp8_dot).lower(draw(8, 16), draw(16, 4)).as_text()
    products += [line for line in forward.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all(line.count("f8E4M3FN") + line.count("f8E5M2") == 2 for line in products)
    assert sum("f8E5M2" in line for line in products) == 2  # the gradient's


def run(*sets, pieces=1):
    """Return the losses of 30 steps, accumulated over so many micro-batches, and the program of a step."""
    shape = ["model.depth=2", "model.width=64", "model.n_heads=2", "model.head_width=32", "model.vocab_size=128",
             "model.seq_len=32", "train.batch_tokens=512", "train.device_batch_rows=16", "train.steps=30"]  # fmt: skip
    config = resolve(load_config("nano", [*shape, "optim.lr_scale=0.4", *sets]))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config, compute_dtype(config, mesh), mesh)
    step, state = make_train_step(config, optimizer, mesh), init_state(config, optimizer, mesh)
    random, found, program = np.random.default_rng(0), [], ""
    for _ in range(30):
        tokens = (random.integers(0, 128, (1, 16, 1)) + random.integers(1, 4, (1, 16, 33)).cumsum(-1)) % 128
        tokens = tokens.astype(np.int32)
        weights = np.ones((1, 16, 32), np.float32)
        batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:], "weights": weights}
        batch = {name: array.reshape(pieces, 16 // pieces, 32) for name, array in batch.items()}
        program = program or step.lower(state, batch).as_text()
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return np.array(found), program


def test_losses_stay_within_one_percent_of_bfloat16():
    plain, fp8 = (run("train.compute_dtype=bfloat16", f"train.matmul={matmul}")[0] for matmul in ("plain", "fp8"))
    assert plain[-1] < 0.6 * plain[0] and not np.array_equal(plain, fp8)
    assert np.abs(fp8 / plain - 1).max() < 0.01


def test_losses_with_bfloat16_operands_follow_those_of_float32(monkeypatch):
    found = {}
    for native in (True, False):
        monkeypatch.setattr(low_precision, "native_bfloat16", lambda native=native: native)
        found[native], program = run()
        assert ("bf16" in program) == native
        again, _ = run(pieces=2)  # where XLA turned products into forms that it could not run
        np.testing.assert_allclose(again, found[native], rtol=0.01)
    assert not np.array_equal(found[True], found[False])
    assert np.abs(found[True] / found[False] - 1).max() < 0.01


def after(*gradients, start=None):
    scaling = dynamic_loss_scale()
    state = start or scaling.init({})
    for gradient in gradients:
        updates, state = scaling.update({"w": jnp.float32(gradient)}, state)
        np.testing.assert_array_equal(updates["w"], gradient)  # the updates pass
    return state


def test_an_overflow_halves_and_a_quiet_time_doubles():
    state = after(1.0, np.inf, np.nan, 1.0)
    assert float(state.scale) == START / 4 and int(state.skipped) == 2 and int(state.good) == 1
    state = after(1.0, start=LossScaleState(jnp.float32(8.0), jnp.int32(GROW_AFTER - 1), jnp.int32(0)))
    assert float(state.scale) == 16.0 and int(state.good) == 0
    smallest = LossScaleState(jnp.float32(SMALLEST), jnp.int32(0), jnp.int32(0))
    assert float(after(np.inf, start=smallest).scale) == SMALLEST  # it never vanishes
