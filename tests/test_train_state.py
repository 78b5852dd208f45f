"""The training step: same losses on any mesh, bad steps skipped, moments placed with their parameters."""

import collections
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_run import on_devices

from jaxchat import model as gpt
from jaxchat.config import MeshConfig, load_config
from jaxchat.optimizer import make_optimizer
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from jaxchat.train_state import compute_dtype, init_state, make_eval_step, make_train_step, scan_unroll

TINY = ["model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16", "model.vocab_size=64",
        "model.seq_len=16", "train.batch_tokens=64", "train.steps=10"]  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    config = resolve(load_config("nano", TINY))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config, jnp.float32)
    return config, mesh, optimizer, make_train_step(config, optimizer, mesh)


def batch_of(config, weight=1.0, seed=0):
    tokens = np.random.default_rng(seed).integers(0, config.model.vocab_size, (1, 4, config.model.seq_len + 1))
    tokens = tokens.astype(np.int32)
    weights = np.full(tokens[..., 1:].shape, weight, np.float32)
    return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:], "weights": weights}


@pytest.fixture(scope="module")
def eight_devices():
    return on_devices(8, "simulated_devices.py")


def test_every_mesh_gives_the_same_losses(eight_devices):
    found = eight_devices["losses"]
    assert len(found) == 6 and found["one"][-1] < found["one"][0] - 0.3
    for name, losses in found.items():
        np.testing.assert_allclose(losses, found["one"], rtol=1e-5, err_msg=name)
    split = eight_devices["split"]  # moments lie with their masters
    assert len(split) >= 8 and all(split.values()), split


def test_other_models_give_the_same_losses_on_meshes_too(eight_devices):
    for name, (one, many) in eight_devices["others"].items():
        rtol = 5e-3 if name == "bfloat16" else 1e-5
        assert len(one) == 6 and one[-1] < one[0]
        np.testing.assert_allclose(many, one, rtol=rtol, err_msg=name)


def test_evaluation_gives_the_same_sums_on_meshes(eight_devices):
    one, *others = eight_devices["sums"]
    assert one["targets"] == 512 and one["nats"] > 512
    for sums in others:
        assert sums == pytest.approx(one, rel=1e-6)


def test_orthogonalization_has_no_collective_inside(eight_devices):
    """Whole matrices come to a device by one all-to-all for each of the 3 shapes and leave by another.

    Beside them only norms are summed, and the loops of the three iterations hold products alone.
    """
    text = eight_devices["muon"]
    collective = r"= (.*?) (all-\w+(?:-\w+)?|reduce-scatter|collective-permute)\("
    found = re.findall(collective, text)
    kinds = collections.Counter(kind for _, kind in found)
    assert set(kinds) == {"all-to-all", "all-reduce"} and kinds["all-to-all"] == 6
    sums = [shape for result, kind in found if kind == "all-reduce" for shape in re.findall(r"\[([\d,]*)\]", result)]
    assert max(math.prod(map(int, shape.split(","))) for shape in sums) <= 4 * 256  # a value a neuron, no matrices
    computations = dict(re.findall(r"^%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    bodies = [computations[name] for name in re.findall(r"while\(.*body=%([\w.-]+)", text)]
    assert len(bodies) == 3 and not any(re.search(collective, body) for body in bodies)


def test_a_step_learns_and_counts(tiny):
    config, mesh, optimizer, step = tiny
    state, losses = init_state(config, optimizer, mesh), []
    for _ in range(10):
        state, metrics = step(state, batch_of(config))
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 10
    assert losses[0] == pytest.approx(np.log(64), rel=0.01)
    assert losses[-1] < losses[0] - 0.3
    assert float(metrics["ok"]) == 1


def test_a_blank_state_differs_in_its_weights_alone(tiny):
    """What replaces them begins with the same optimizer as after random ones."""
    config, mesh, optimizer, _ = tiny
    random, blank = (jax.device_get(init_state(config, optimizer, mesh, blank=blank)) for blank in (False, True))
    jax.tree.map(np.testing.assert_array_equal, (random.opt_state, random.step), (blank.opt_state, blank.step))
    assert not any(leaf.any() for leaf in jax.tree.leaves(blank.params)) and random.params["embedding"].any()
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), random, blank)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(tiny):
    config, mesh, optimizer, step = tiny
    before = jax.device_get(init_state(config, optimizer, mesh))
    state, metrics = step(init_state(config, optimizer, mesh), batch_of(config, weight=np.nan))
    assert float(metrics["ok"]) == 0 and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before.params, jax.device_get(state.params))
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, jax.device_get(state.opt_state))


def test_a_batch_without_targets_gives_no_nan(tiny):
    config, mesh, optimizer, step = tiny
    state, metrics = step(init_state(config, optimizer, mesh), batch_of(config, weight=0.0))
    assert float(metrics["loss"]) == 0.0 and float(metrics["ok"]) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def test_state_is_donated(tiny):
    config, mesh, optimizer, step = tiny
    state = init_state(config, optimizer, mesh)
    step(state, batch_of(config))
    assert state.params["embedding"].is_deleted()


def test_fixed_kernels_are_taken_by_the_compiler_and_change_nothing_here(tiny):
    """XLA refuses an option that it does not know; on a CPU this one means nothing."""
    config, mesh, optimizer, step = tiny
    fixed = dataclasses.replace(config, train=dataclasses.replace(config.train, deterministic=True))
    states = [
        one(init_state(config, optimizer, mesh), batch_of(config))[0]
        for one in (step, make_train_step(fixed, optimizer, mesh))
    ]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *(state.params for state in states))))


def test_evaluation_sums(tiny):
    config, mesh, optimizer, _ = tiny
    state = init_state(config, optimizer, mesh)
    byte_lengths = np.full(64, 2, np.int32)
    byte_lengths[:32] = 0
    batch = batch_of(config)
    found = {k: float(v.sum()) for k, v in make_eval_step(config, mesh)(state.params, batch, byte_lengths).items()}
    counted = int((batch["targets"] >= 32).sum())
    assert found["targets"] == 64 and found["bytes"] == 2 * counted
    assert found["all_nats"] == pytest.approx(64 * np.log(64), rel=0.01)
    assert found["nats"] == pytest.approx(counted * np.log(64), rel=0.02)


def test_unroll_follows_the_size():
    assert scan_unroll(resolve(load_config("nano"))) == 1
    assert scan_unroll(resolve(load_config("d32"))) == 1
    assert scan_unroll(resolve(load_config("d32", ["train.scan_unroll=4"])), "gpu") == 4
    assert [scan_unroll(resolve(load_config(tier)), "gpu") for tier in ("d12", "d20", "d26", "d32")] == [3, 5, 6, 8]


@pytest.mark.parametrize("extra", [[], ["model.recipe=classic", "model.tie_embeddings=true"]])
def test_bfloat16_compute_keeps_float32_masters(extra):
    config = resolve(load_config("nano", [*TINY, "train.compute_dtype=bfloat16", *extra]))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config, compute_dtype(config, mesh), mesh)
    step, state, losses = make_train_step(config, optimizer, mesh), init_state(config, optimizer, mesh), []
    for _ in range(10):
        batch = {k: v.reshape(2, 2, -1) for k, v in batch_of(config).items()}
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.2 and float(metrics["ok"]) == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def float16_run(scale=None, steps=10):
    config = resolve(load_config("nano", [*TINY, "train.compute_dtype='float16'"]))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config, compute_dtype(config, mesh), mesh)
    step, state = make_train_step(config, optimizer, mesh), init_state(config, optimizer, mesh)
    if scale is not None:
        first, *rest = state.opt_state
        state = dataclasses.replace(state, opt_state=(first._replace(scale=jnp.float32(scale)), *rest))
    records = []
    for _ in range(steps):
        state, metrics = step(state, batch_of(config))
        records.append({name: float(value) for name, value in metrics.items()})
    return state, records


def test_float16_learns_like_float32(tiny):
    config, mesh, optimizer, step = tiny
    _, records = float16_run()
    state = init_state(config, optimizer, mesh)
    for record in records:
        state, metrics = step(state, batch_of(config))
        assert record["loss"] == pytest.approx(float(metrics["loss"]), rel=5e-3)
        assert record["ok"] == 1 and record["overflowed"] == 0


def test_float16_skips_what_overflows_and_goes_on():
    """The largest scale overflows: those steps change no parameter, are counted, and the scale falls until it fits."""
    state, records = float16_run(scale=2.0**40, steps=40)
    overflowed = [record["overflowed"] for record in records]
    count = int(sum(overflowed))
    assert overflowed[:10] == [1.0] * 10 and count < 30
    assert records[10]["loss"] == records[0]["loss"]
    assert all(record["ok"] == 1 for record in records)
    scaling = state.opt_state[0]
    assert int(scaling.skipped) == count and float(scaling.scale) == 2.0 ** (40 - count)
    assert records[-1]["loss"] < records[0]["loss"] - 0.2


@pytest.mark.parametrize(("dtype", "near"), [(jnp.bfloat16, 0.03), (jnp.float16, 0.01)])
def test_scalars_that_mix_whole_activations_have_exact_gradients(dtype, near):
    """Each sums every token and channel; added up in 16 bits they were 20 % off, or infinite."""
    sets = ["model.recipe=modern", "model.width=64", "model.n_heads=4", "model.seq_len=256", "train.batch_tokens=8192"]
    config = resolve(load_config("nano", [*TINY, *sets])).model  # of this recipe float16 holds them without a scale
    params = gpt.init_params(config, 0)
    params["blocks"]["proj"] = 0.1 * jax.random.normal(jax.random.key(1), params["blocks"]["proj"].shape)
    params["blocks"]["o"] = 0.1 * jax.random.normal(jax.random.key(2), params["blocks"]["o"].shape)
    params["smear_scale"] = jnp.float32(0.3)
    tokens = jax.random.randint(jax.random.key(3), (32, 256), 0, 64)
    toward = jax.random.normal(jax.random.key(4), (config.width,))

    def gradients(dtype):
        def loss(params):
            x = gpt.hidden(config, gpt.cast_params(params, dtype), tokens, gpt.LayerOptions(backend="blocked"))
            return jnp.sum(x.astype(jnp.float32) @ toward)

        found = jax.jit(jax.grad(loss))(params)
        return jnp.concatenate([found["blocks"]["residual_scale"], found["blocks"]["x0_scale"],
                                found["smear_scale"][None]])  # fmt: skip

    exact = gradients(jnp.float32)
    np.testing.assert_allclose(gradients(dtype), exact, atol=near * float(jnp.abs(exact).max()))


def test_a_run_goes_on_in_another_dtype(tiny):
    """float16's loss scale is part of every optimizer's state: a base from one card trains on on another."""
    config, _, _, step = tiny
    state, _ = float16_run(steps=3)
    state, metrics = step(state, batch_of(config))
    assert int(state.step) == 4 and float(metrics["ok"]) == 1
