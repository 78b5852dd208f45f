"""RL: the update against a float64 reference, what carries gradient, groups without news, resume, learning."""

import dataclasses
import functools
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_model import lively
from small_model import write_run
from whole_run import on_devices

from jaxchat import tasks as registry
from jaxchat.checkpoint import params_sha256, restore_params
from jaxchat.config import MeshConfig, load_config
from jaxchat.errors import DataError, InterruptedRun, UsageError
from jaxchat.log import read_metrics
from jaxchat.low_precision import dynamic_loss_scale
from jaxchat.optimizer import make_optimizer
from jaxchat.scaling import resolve
from jaxchat.sharding import batch_sharding, make_mesh
from jaxchat.tasks.base import Example, WrittenTask, user
from jaxchat.train_state import TrainState, init_state, make_nll_step, make_train_step
from train import rl
from train.evaluate import passes
from train.rl import Answers, advantages, build, kl_per_token, micro_batches, question_order, sample_seed

CLASSIC = ["model.recipe=classic", "model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16",
           "model.vocab_size=64", "model.seq_len=16", "train.batch_tokens=64", "train.steps=4"]  # fmt: skip


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def answers_of(rewarded, seed=0, length=17):
    """Random answers, (P, S) of them, right where `rewarded` says so; the last id of each is its stop id."""
    draw = np.random.default_rng(seed)
    right = np.array(rewarded, bool)
    P, S = right.shape
    lengths = draw.integers(8, length, (P, S))
    place = np.arange(length)
    inside = place < lengths[..., None]
    sampled = inside & (place >= 4) & (place != 6)  # a question of 4 ids, a forced id at 6
    tokens = np.where(inside, draw.integers(0, 64, (P, S, length)), 0).astype(np.int32)
    return Answers(tokens, lengths.astype(np.int32), sampled, right, np.zeros((P, S), bool), np.ones((P, S), bool))


def gradient_keeper():
    """An optimizer that changes nothing and whose state is the loss scale and the gradient itself."""
    keeper = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    return optax.chain(dynamic_loss_scale(), keeper)


@functools.cache
def config():
    return resolve(load_config("nano", [*CLASSIC, "train.compute_dtype=float32"]))


@functools.cache
def params():
    return lively(config().model, 1, 0.2)


@functools.cache
def step():
    return make_train_step(config(), gradient_keeper(), one_device())


def update_of(batch):
    """(gradient, metrics) of the jitted update."""
    state = TrainState(jax.tree.map(jnp.array, params()), gradient_keeper().init(params()), jnp.int32(0))
    state, metrics = step()(state, batch)
    return jax.device_get(state.opt_state[1]), jax.device_get(metrics)


def reference_logits(model, p, tokens):
    """The classic model written out once more, (T, V) in the precision of `p`."""
    H, N = model.n_heads, model.head_width
    norm = lambda x: x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + model.norm_eps)  # noqa: E731
    T = len(tokens)
    angle = jnp.arange(T)[:, None, None] * model.rotary_base ** (-jnp.arange(0, N, 2) / N)

    def turn(x):
        a, b = x[..., : N // 2], x[..., N // 2 :]
        return jnp.concatenate([a * jnp.cos(angle) + b * jnp.sin(angle), b * jnp.cos(angle) - a * jnp.sin(angle)], -1)

    x = norm(p["embedding"][tokens])
    for i in range(model.depth):
        w = {name: stacked[i] for name, stacked in p["blocks"].items()}
        h = norm(x)
        q, k, v = ((h @ w[name]).reshape(T, H, N) for name in "qkv")
        q, k = norm(turn(q)) * model.qk_scale, norm(turn(k)) * model.qk_scale
        scores = jnp.einsum("qhn,khn->hqk", q, k) / np.sqrt(N)
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
        x = x + jnp.einsum("hqk,khn->qhn", jax.nn.softmax(scores), v).reshape(T, H * N) @ w["o"]
        x = x + jnp.maximum(norm(x) @ w["fc"], 0) ** 2 @ w["proj"]
    return model.softcap * jnp.tanh(norm(x) @ p["unembedding"].T / model.softcap)


def reference_gradient(answers, bonus=0.0):
    """By the textbook, in float64, one answer after the other: -(1/N) sum A log p over sampled ids of live groups."""
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params())
    rows, weights, count = [], [], 0
    for group in range(len(answers.correct)):
        reward = [float(r) + bonus * f for r, f in zip(answers.correct[group], answers.formatted[group], strict=True)]
        mean = sum(reward) / len(reward)
        if all(r == reward[0] for r in reward):
            continue
        for s, r in enumerate(reward):
            drawn = [t for t in range(answers.length[group, s]) if answers.sampled[group, s, t]]
            rows.append(answers.tokens[group, s])
            weights.append([r - mean if t in drawn else 0.0 for t in range(1, len(rows[-1]))])
            count += len(drawn)
    with jax.enable_x64(True):

        def surprise(p, tokens, weights):
            log_p = jax.nn.log_softmax(reference_logits(config().model, p, tokens[:-1]))
            return -jnp.sum(weights * jnp.take_along_axis(log_p, tokens[1:, None], axis=-1)[:, 0]) / count

        def objective(p):
            return jax.vmap(surprise, (None, 0, 0))(p, np.array(rows), np.array(weights)).sum()

        value, grads = jax.jit(jax.value_and_grad(objective))(exact)
        assert value.dtype == jnp.float64 and grads["embedding"].dtype == jnp.float64
        return float(value), jax.device_get(grads)


def batch_of(answers, bonus=0.0, shape=(6, 2)):
    return build(answers, advantages(answers.correct + bonus * answers.formatted), shape, 16)


def close(found, expected):
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6 * scale), found, expected)


def test_the_updates_gradient_is_the_float64_reference():
    answers = answers_of([[1, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]])
    answers.formatted[2] = [1, 1, 0]  # the format bonus is part of the reward
    value, expected = reference_gradient(answers, 0.2)
    for shape in ((1, 6), (6, 2)):  # in one piece, and accumulated over micro-batches of which the last are padding
        grads, metrics = update_of(batch_of(answers, 0.2, shape=shape))
        close(grads, expected)
        assert metrics["loss"] == pytest.approx(value, rel=1e-4) and metrics["ok"] == 1


def test_equal_rewards_give_exactly_zero():
    assert not advantages(np.array([[0.1 + 0.2] * 7, [1.0] * 7, [0.0] * 7])).any()
    alone, beside = answers_of([[1, 0, 0]]), answers_of([[1, 0, 0], [1, 1, 1]])
    alone.tokens, alone.length, alone.sampled = beside.tokens[:1], beside.length[:1], beside.sampled[:1]
    one, two = update_of(batch_of(alone)), update_of(batch_of(beside))
    jax.tree.map(np.testing.assert_allclose, one, two)
    dead = batch_of(answers_of([[1, 1, 1], [0, 0, 0]]))
    assert not dead["weights"].any() and not dead["counts"].any()
    grads, metrics = update_of(dead)
    assert metrics["grad_norm"] == 0 and not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_the_stop_id_carries_gradient_and_forced_ids_carry_none():
    answers = answers_of([[1, 0]], seed=3)
    batch = batch_of(answers)
    rows = {name: array.reshape(-1, 16) for name, array in batch.items()}
    for s, sign in enumerate((0.5, -0.5)):
        last = answers.length[0, s] - 1  # the stop id's place; its target is one to the left
        assert rows["targets"][s, last - 1] == answers.tokens[0, s, last]
        weights = np.zeros(16)
        weights[3:last] = sign
        weights[5] = 0  # forced
        np.testing.assert_array_equal(rows["weights"][s], weights)
    whole = update_of(batch)[0]["unembedding"]
    without = {name: array.copy() for name, array in batch.items()}
    without["weights"][..., answers.length[0, 0] - 2] = 0
    assert np.abs(whole - update_of(without)[0]["unembedding"]).max() > 1e-4
    other = {name: array.copy() for name, array in batch.items()}
    other["targets"][..., 5] = 63 - other["targets"][..., 5]  # what had to be predicted there does not matter
    jax.tree.map(np.testing.assert_array_equal, update_of(batch)[0], update_of(other)[0])


def test_rows_have_few_shapes():
    for rows in (1, 7, 128, 256):
        for devices in (1, 2, 8):
            for device_rows in (1, 3, 8, 500):
                A, B = micro_batches(rows, devices, device_rows)
                assert rows <= A * B < rows + A * devices and B % devices == 0 and B // devices <= device_rows


def test_pass_at_k_counts_every_choice_of_k():
    right = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], bool)
    found = {name: scores["metric"] for name, scores in passes(right).items()}
    assert found.keys() == {"pass@1", "pass@2", "pass@3", "pass@4"}
    assert found["pass@1"] == right.mean() and found["pass@4"] == 0.75
    assert found["pass@2"] == pytest.approx((5 / 6 + 0 + 1 + 3 / 6) / 4)


def test_kl_of_a_sample_is_that_of_the_distributions():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(8)), rng.dirichlet(np.ones(8))
    drawn = rng.choice(8, 200_000, p=p)
    exact = (p * np.log(p / q)).sum()
    found = kl_per_token(-np.log(p)[drawn], -np.log(q)[drawn], np.ones(len(drawn)))
    assert found == pytest.approx(exact, rel=0.02)
    assert kl_per_token(np.ones(3), np.ones(3), np.zeros(3)) == 0.0


def test_log_probs_are_the_models():
    answers = answers_of([[1, 0, 1]])
    batch = build(answers, np.ones((1, 3), np.float32), (3, 1), 16)
    nll = np.asarray(make_nll_step(config(), one_device())(params(), batch))
    for s in range(3):
        log_p = jax.nn.log_softmax(reference_logits(config().model, params(), answers.tokens[0, s]))
        expected = [-log_p[t - 1, answers.tokens[0, s, t]] for t in range(1, 17)]
        np.testing.assert_allclose(nll[s, 0], expected, rtol=1e-3, atol=1e-4)


# Whole runs


class Brevity(WrittenTask):
    """A task of one's own: right is an answer of few letters."""

    name, max_tokens = "brevity", 12

    def examples(self):
        return [Example([user(f"say {n}")], None) for n in range(5)]

    def train_examples(self, seed):
        return [Example([user(f"say {n}")], None) for n in range(10, 30)]

    def grade(self, example, answer):
        return len(answer) < 8


@pytest.fixture
def brevity(monkeypatch):
    monkeypatch.setitem(registry.TASKS, "brevity", Brevity)


def run_config(run, *more):
    sets = ["rl.environment=brevity", "rl.steps=6", "rl.prompts=4", "rl.samples=6", "rl.max_tokens=12",
            "rl.eval_every=3", "rl.eval_prompts=3", "rl.eval_samples=3", "rl.checkpoint_every=2", "rl.slots=8",
            "train.device_batch_rows=24", "optim.kind=adamw", "optim.adamw_lr=0.02"]  # fmt: skip
    return resolve(load_config(run.config, [*sets, *more]))


def without_times(run):
    times = {"step_seconds", "tokens_per_second", "rollout_seconds", "mfu"}
    return [{k: v for k, v in r.items() if k not in times} for r in read_metrics(run.stage("rl") / "metrics.jsonl")]


COUNTED = {"step", "tokens", "reward", "right", "length", "endless", "live"}
WHOLE = []  # the run that several tests look at, and its facts


@pytest.fixture
def undisturbed(brevity, tmp_path_factory):
    if not WHOLE:
        run = write_run(tmp_path_factory.mktemp("rl"))
        WHOLE.extend((run, rl.run(run_config(run), run)))
    return WHOLE


def test_a_run_leaves_what_the_contract_says(undisturbed):
    run, facts = undisturbed
    records = read_metrics(run.stage("rl") / "metrics.jsonl")
    keys = {"step", "tokens", "loss", "lr_mult", "grad_norm", "step_seconds", "tokens_per_second", "mfu",
            "reward", "right", "length", "endless", "live", "rollout_seconds"}  # fmt: skip
    assert [r["step"] for r in records] == list(range(6)) and all(keys <= r.keys() for r in records)
    assert [r["lr_mult"] for r in records] == pytest.approx([(1 + np.cos(np.pi * n / 6)) / 2 for n in range(6)])
    assert {r["step"] for r in records if "pass@1" in r} == {2, 5}
    assert records[-1]["kl"] > 0 == facts["start"]["kl"]
    assert facts["start"].keys() == {"pass@1", "pass@2", "pass@3", "kl"}
    made = np.diff([0, *(r["tokens"] for r in records)])
    assert made.tolist() == [round(r["length"] * 24) for r in records] and records[-1]["tokens"] == facts["tokens"]
    assert facts["params_sha256"] == params_sha256(restore_params(run.stage("rl"))[0])
    for name in ("loss.png", "reward.png", "rollouts.md", "6/opt_state"):
        assert (run.stage("rl") / name).exists(), name
    text = (run.stage("rl") / "rollouts.md").read_text()
    assert "after 6 steps" in text and text.count("\n- **") == 6


def test_stopped_and_resumed_ends_bit_equal(undisturbed, tmp_path, monkeypatch):
    """Stopped by a signal in step 1, saved there; lost in step 5, after the checkpoint of step 4; then to the end."""
    whole, facts = undisturbed
    run, next_batch, disturbed = write_run(tmp_path), rl.RolloutWorker.next_batch, []

    def disturb(self, state, step):
        if step in (1, 5) and step not in disturbed:
            disturbed.append(step)
            if step == 5:
                raise KeyError("power cut")
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self, state, step)

    monkeypatch.setattr(rl.RolloutWorker, "next_batch", disturb)
    with pytest.raises(InterruptedRun, match="stopped by SIGTERM after step 2, saved"):
        rl.run(run_config(run), run)
    with pytest.raises(KeyError):
        rl.run(run_config(run), run)
    resumed = rl.run(run_config(run), run)
    assert disturbed == [1, 5] and resumed["params_sha256"] == facts["params_sha256"]
    assert without_times(run) == without_times(whole)
    of_time = {"seconds", "eval_seconds"}
    assert {k: v for k, v in resumed.items() if k not in of_time} == {
        k: v for k, v in facts.items() if k not in of_time
    }


def test_four_devices_sample_the_same_answers_and_make_the_same_update(undisturbed, tmp_path):
    """Data parallel and fsdp; each device samples its share of the questions."""
    four = on_devices(4, "rl_devices.py", write_run(tmp_path).root)
    one = read_metrics(undisturbed[0].stage("rl") / "metrics.jsonl")
    assert {k: v for k, v in four[0].items() if k in COUNTED} == {k: v for k, v in one[0].items() if k in COUNTED}
    assert four[0]["live"] > 0
    for name in ("loss", "grad_norm"):
        assert four[0][name] == pytest.approx(one[0][name], rel=1e-3)
    assert four[1]["reward"] == pytest.approx(one[1]["reward"], abs=0.1)  # after one update, sampled anew


def test_a_step_without_a_live_group_changes_nothing_but_the_schedules(brevity, tmp_path, monkeypatch):
    monkeypatch.setattr(Brevity, "grade", lambda self, example, answer: True)
    run = write_run(tmp_path)
    start = params_sha256(restore_params(run.stage("sft"))[0])
    facts = rl.run(run_config(run, "rl.steps=2", "rl.eval_every=0"), run)
    assert facts["params_sha256"] == start and facts["pass@1"] == 1.0
    records = read_metrics(run.stage("rl") / "metrics.jsonl")
    assert [(r["loss"], r["grad_norm"], r["live"], r["reward"]) for r in records] == [(0.0, 0.0, 0, 1.0)] * 2


def test_schedules_go_on_over_a_step_without_update():
    """The update after a skipped step has the next rate, and untouched moments."""
    from train.loop import train_step

    mesh, cfg = (
        one_device(),
        dataclasses.replace(config(), optim=dataclasses.replace(config().optim, warmdown_ratio=1.0)),
    )
    optimizer = make_optimizer(cfg, jnp.float32, mesh)
    step = train_step(cfg, optimizer, mesh)
    state = init_state(cfg, optimizer, mesh)
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, None)
    after = jax.device_get((state.params, state.opt_state))
    assert int(state.step) == 1 and metrics["loss"] == metrics["grad_norm"] == 0
    changed = [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
        if not np.array_equal(a, b)
    ]
    assert changed and all(re.search(r"\.count$", name) for name in changed)
    assert not any("mu" in name or "nu" in name for name in changed)
    batch = jax.device_put(batch_of(answers_of([[1, 0], [0, 1]])), batch_sharding(mesh))
    moved = [jax.device_get(step(init_state(cfg, optimizer, mesh), b)[0].params["unembedding"]) for b in [batch]]
    second = jax.device_get(step(state, batch)[0].params["unembedding"])
    first_change = np.abs(moved[0] - before[0]["unembedding"]).max()
    assert np.abs(second - before[0]["unembedding"]).max() == pytest.approx(first_change * 3 / 4, rel=0.02)


def test_rewards_rise(brevity, tmp_path):
    run = write_run(tmp_path)
    more = ["rl.steps=14", "rl.eval_every=0", "rl.samples=8", "rl.lr_ratio=0.1"]
    facts = rl.run(run_config(run, *more), run)
    records = read_metrics(run.stage("rl") / "metrics.jsonl")
    first, last = (np.mean([r["reward"] for r in part]) for part in (records[:3], records[-3:]))
    assert last > first + 0.2, (first, last)
    assert facts["pass@1"] > facts["start"]["pass@1"]


def test_samples_depend_on_seed_step_question_and_sample():
    places = [
        (1, 0, 0, 0),
        (2, 0, 0, 0),
        (1, 1, 0, 0),
        (1, 0, 1, 0),
        (1, 0, 0, 1),
        (1, "exam", 0, 0),
        (1, 0, 10, 0),
        (1, 1, 0, 1),
    ]
    seeds = [sample_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**32 for s in seeds)
    assert sample_seed(1, 0, 0, 0) == 3_268_961_429  # the same on every machine


def test_every_epoch_has_every_question_once():
    epochs = [question_order(20, 1, epoch) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_steps_and_rates():
    given = resolve(load_config("nano", ["rl.steps=-1"]))
    found = rl.rl_config(given, 8192, 8)
    assert found.train.steps == 8192 // given.rl.prompts
    assert found.optim.lr_scale == pytest.approx(given.optim.lr_scale * given.rl.lr_ratio)
    assert found.optim.weight_decay == 0 and found.train.batch_tokens % (8 * given.model.seq_len) == 0
    assert rl.rl_config(resolve(load_config("nano", ["rl.steps=7"])), 8192, 1).train.steps == 7


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["rl.environment=gsm9k"], UsageError, "task 'gsm9k' is unknown, did you mean gsm8k"),
        (["rl.environment=mmlu"], UsageError, "rl.environment: mmlu has no questions for training"),
        (["rl.environment=identity"], UsageError, "rl.environment: identity has no questions for training"),
        (["rl.slots=48"], UsageError, "rl.slots: must be a power of two, not 48"),
        (["rl.format_bonus=0.2"], UsageError, "rl.format_bonus: word_problems asks for no form"),
        (["rl.environment=gsm8k", "tasks.data_dir=/nowhere"], DataError, "tasks.data_dir: /nowhere is no directory"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(overrides, error, message):
    with pytest.raises(error, match=re.escape(message)):
        rl.check(resolve(load_config("nano", ["rl.environment=word_problems", *overrides])))
