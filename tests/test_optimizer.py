"""Rates of every group of parameters; schedules; carrying moments over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import model as gpt
from jaxchat.config import load_config
from jaxchat.errors import UsageError
from jaxchat.optimizer import carry_moments, make_optimizer, make_schedule, muon_decay, muon_momentum
from jaxchat.scaling import resolve
from train.rl import rl_config
from train.sft import sft_config

TINY = ["model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16", "model.vocab_size=64",
        "model.seq_len=32", "train.batch_tokens=64", "train.steps=10"]  # fmt: skip


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_first_updates_have_the_rates_of_the_table(kind):
    config = resolve(load_config("nano", [*TINY, f"optim.kind={kind}", "optim.warmup_steps=0", "optim.weight_decay=0"]))
    optimizer = make_optimizer(config, jnp.float32)
    params = jax.tree.map(lambda p: p + 0.01, gpt.init_params(config.model, 0))
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape) * 0.1, params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    scale = config.optim.lr_scale
    if kind == "adamw":
        np.testing.assert_allclose(np.abs(updates["blocks"]["q"]), scale * 6e-4, rtol=1e-3)
        return
    # Adam's first step moves every weight by its rate; Muon's has the norm of a semi-orthogonal matrix
    by_width = scale * (32 / 768) ** -0.5
    np.testing.assert_allclose(np.abs(updates["unembedding"]), 0.008 * by_width, rtol=0.05)
    np.testing.assert_allclose(np.abs(updates["value_embedding"]), 0.15 * by_width, rtol=0.05)
    np.testing.assert_allclose(np.abs(updates["smear_gate"]), 0.2, rtol=0.05)
    norm = np.linalg.norm(updates["blocks"]["fc"], axis=(-2, -1))
    np.testing.assert_allclose(norm, 0.02 * scale * 2 * 32**0.5, rtol=0.02)


# Written by hand after nanochat's chat_sft.py and chat_rl.py: the rates at 2^19 tokens a step and more, times 0.8 and
# 0.05; tables are also divided by sqrt(width / 768), value embeddings have half of the embedding's rate.
FIRST_RATES = {
    "sft": {"matrix": 0.016, "unembedding": 0.0064, "embedding": 0.24, "value_embedding": 0.12, "residual": 0.004,
            "x0": 0.4, "mixing": 0.16},
    "rl": {"matrix": 0.001, "unembedding": 0.0002, "embedding": 0.01, "value_embedding": 0.005, "residual": 0.00025,
           "x0": 0.025, "mixing": 0.01},
}  # fmt: skip


@pytest.mark.parametrize(("stage", "batch"), [("sft", 2**20), ("rl", 2**19)])
def test_sft_and_rl_begin_at_their_own_rates(stage, batch):
    config = resolve(load_config("d20", [*TINY, f"train.batch_tokens={batch}"]))
    config = sft_config(config, rows=10**6) if stage == "sft" else rl_config(config, questions=1000, devices=1)
    updates = first_updates(config)
    labels = gpt.map_parameters(config.model, lambda p: p.group)
    for name, group, update in zip(*map(jax.tree.leaves, (names(updates), labels, updates)), strict=True):
        rate = FIRST_RATES[stage][group]
        if "embedding" in group:
            rate *= (32 / 768) ** -0.5
        if group == "matrix":  # each update has the norm of a semi-orthogonal matrix, more where it widens
            rows, columns = update.shape[-2:]
            norm = np.linalg.norm(update, axis=(-2, -1))
            expected = rate * min(rows, columns) ** 0.5 * max(1, columns / rows) ** 0.5
            np.testing.assert_allclose(norm, expected, rtol=0.02, err_msg=name)
        else:  # Adam's first step moves every weight by the rate
            np.testing.assert_allclose(np.abs(update), rate, rtol=0.02, err_msg=name)


def test_small_batches_keep_their_factor_in_sft_and_rl():
    config = resolve(load_config("nano", ["optim.lr_scale=-1"]))
    for stage in (sft_config(config, rows=1000), rl_config(config, questions=1000, devices=1)):
        ratio = config.sft.lr_ratio if stage.optim.warmdown_ratio == 0.5 else config.rl.lr_ratio
        assert stage.optim.lr_scale == pytest.approx(ratio)
        assert stage.optim.mixing_lr == pytest.approx(0.2 * ratio)


@pytest.mark.parametrize("value", ["[0.9]", "[0.9, 1.5, 0.9]"])
def test_momentum_takes_three_numbers_below_one(value):
    with pytest.raises(UsageError, match=r"optim\.momentum"):
        resolve(load_config("nano", [f"optim.momentum={value}"]))


def test_the_smear_gate_moves_on_gradients_far_below_the_epsilon_of_the_scalars():
    config = resolve(load_config("nano", [*TINY, "optim.warmup_steps=0"]))
    updates = first_updates(config, size=3e-5)
    np.testing.assert_allclose(np.abs(updates["smear_gate"]), 0.2, rtol=1e-3)
    # m / (sqrt(v) + 1e-4)
    np.testing.assert_allclose(np.abs(updates["backout_scale"]), 0.2 * 3e-5 / (3e-5 + 1e-4), rtol=1e-3)
    np.testing.assert_allclose(np.abs(updates["smear_scale"]), 0.2 * 3e-5 / (3e-5 + 1e-4), rtol=1e-3)


def first_updates(config, size=0.1):
    """The first step from weights of zero, which nothing decays, with gradients of one size and random signs."""
    optimizer = make_optimizer(config, jnp.float32)
    params = jax.tree.map(jnp.zeros_like, gpt.init_params(config.model, 0))
    key = jax.random.key(1)
    grads = {}
    for i, (path, p) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        grads[path] = size * jax.random.rademacher(jax.random.fold_in(key, i), p.shape, jnp.float32)
    grads = jax.tree_util.tree_map_with_path(lambda path, _: grads[path], params)
    return jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params)[0]


def names(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), tree)


def config_of(*sets):
    return resolve(load_config("nano", sets))


def test_the_rate_rises_stays_and_falls():
    f = make_schedule(config_of("train.steps=100", "optim.warmup_steps=10", "optim.warmdown_ratio=0.5",
                                "optim.final_lr=0.1"))  # fmt: skip
    assert [float(f(s)) for s in (0, 9, 30, 50, 75, 100, 500)] == pytest.approx([0.1, 1, 1, 1, 0.55, 0.1, 0.1])
    to_zero = make_schedule(config_of("train.steps=7", "optim.warmup_steps=0", "optim.warmdown_ratio=1",
                                      "optim.final_lr=0"))  # fmt: skip
    values = [float(to_zero(s)) for s in range(12)]
    assert values[0] == 1.0 and min(values) == 0.0 and values == sorted(values, reverse=True)


def test_momentum_and_decay_schedules():
    f = muon_momentum(config_of("train.steps=1000", "optim.warmdown_ratio=0.4"))
    assert [float(f(s)) for s in (0, 200, 400, 600, 800, 1000)] == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.935, 0.90])
    g = muon_decay(config_of("train.steps=100", "optim.weight_decay=0.2"))
    assert [float(g(s)) for s in (0, 50, 100, 300)] == pytest.approx([0.2, 0.1, 0, 0], abs=1e-7)


def test_adamw_has_warm_up_and_cosine():
    config = resolve(load_config("nano", ["optim.kind=adamw", "train.steps=1000", "optim.warmup_steps=100"]))
    f = make_schedule(config)
    assert [float(f(s)) for s in (0, 99, 1000)] == pytest.approx([0.01, 1.0, 0.1])


def test_moments_are_carried_and_schedules_start_again():
    config = resolve(load_config("nano", TINY))
    optimizer = make_optimizer(config, jnp.float32)
    params = gpt.init_params(config.model, 0)
    fresh = optimizer.init(params)
    state = fresh
    update, ones = jax.jit(optimizer.update), jax.tree.map(jnp.ones_like, params)
    for _ in range(3):
        _, state = update(ones, state, params)
    carried = carry_moments(state, fresh)
    assert jax.tree.structure(carried) == jax.tree.structure(state)
    pairs = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree_util.tree_leaves_with_path(carried), strict=True)
    changed = {jax.tree_util.keystr(path) for (path, a), (_, b) in pairs if not np.array_equal(a, b)}
    assert changed and all(name.endswith(".count") for name in changed)
    counts = [
        int(s) for p, s in jax.tree_util.tree_leaves_with_path(carried) if jax.tree_util.keystr(p).endswith(".count")
    ]
    assert set(counts) == {0, 3}  # schedules at 0; Adam's bias correction goes on
