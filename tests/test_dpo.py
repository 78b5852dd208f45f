"""DPO: the forms of pairs, the gradient against the formula, a preference that is learned, resume."""

import json
import os
import random
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, SHAPES, learned, tokenizer, write_run

from jaxchat.config import load_config
from jaxchat.data.sources import spoken
from jaxchat.errors import DataError, InterruptedRun, UsageError
from jaxchat.log import read_metrics
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from jaxchat.tasks import get_task
from jaxchat.tasks.base import TaskFiles
from jaxchat.tasks.from_file import pair_of, read_pairs
from train import evaluate, rl

WORDS = ("tea", "ink", "oak", "sun", "map", "ice", "jar", "fox", "rug", "pen")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"files:{path}"


def polite(count=60):
    """Whatever is asked for, a polite answer is preferred; each pair has its own words."""
    draw, rows = random.Random(3), []
    for _ in range(count):
        a, b, c = draw.sample(WORDS, 3)
        rows.append({"prompt": f"{a} {b}", "chosen": f"please {c}", "rejected": f"no {c}"})
    return rows


def settings(source, *more):
    sizes = ["rl.steps=24", "rl.prompts=8", "rl.checkpoint_every=4", "rl.eval_every=0", "train.device_batch_rows=8"]
    shape = [f"model.{key}={getattr(CONFIG, key)}" for key in SHAPES]
    return resolve(load_config("nano", [*shape, *sizes, "train.batch_tokens=128", f"rl.environment={source}", *more]))


def pairs_of(config):
    return read_pairs(config.rl.environment, TaskFiles.of(config, download=False))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."},
        {"question": "Hi", "chosen": "Hello.", "rejected": "Go.", "score": 3},
        {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello."}],
         "rejected": [{"role": "assistant", "content": "Go."}]},
        {"prompt": "Hi", "messages": [], "chosen": [{"role": "user", "content": "Hi"},
         {"role": "assistant", "content": "Hello."}],
         "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go."}]},
        {"chosen": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
         "rejected": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Go."}]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."},
    ],
)  # fmt: skip
def test_forms_of_pairs(row):
    assert [spoken(side) for side in pair_of(row)] == ["Hi\nHello.", "Hi\nGo."]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello."},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "Hello."},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": ""},
        {"prompt": "Hi", "chosen": None, "rejected": "Go."},
        {"chosen": "Hello.", "rejected": "Go."},
        {"chosen": [{"role": "user", "content": "Hi"}], "rejected": [{"role": "user", "content": "Ho"}]},
        [1],
    ],
)
def test_what_is_no_pair_is_left_out(tmp_path, row):
    with pytest.raises(UsageError):
        pair_of(row)
    config = settings(write(tmp_path / "pairs.jsonl", [*polite(40), row]))
    train, held_out = pairs_of(config)
    assert len(train) + len(held_out) == 40
    prompts = [{spoken(pair[0][:-1]) for pair in pairs} for pairs in (train, held_out)]
    assert all(prompts) and not prompts[0] & prompts[1]
    rl.check(config)
    with pytest.raises(DataError, match=r"pairs\.jsonl"):
        rl.check(settings(write(tmp_path / "pairs.jsonl", [polite(1)[0], row])))


def test_an_exam_asks_no_question_whose_preference_is_trained_on(tmp_path):
    rows = polite(40)
    exam = write(tmp_path / "exam.jsonl", [{"question": row["prompt"], "answer": row["chosen"]} for row in rows])
    config = settings(write(tmp_path / "pairs.jsonl", rows), f'eval.exams=["{exam}"]')
    evaluate.check(config)
    asked = {spoken(one.prompt) for one in get_task(exam, TaskFiles.of(config, download=False)).examples()}
    assert asked == {spoken(pair[0][:-1]) for pair in pairs_of(config)[1]}


def test_the_updates_gradient_is_that_of_the_formula(tmp_path):
    config = settings(write(tmp_path / "pairs.jsonl", polite(20)), "rl.beta=0.5")
    run, mesh = write_run(tmp_path / "run"), make_mesh(config.mesh)
    pairs = [tuple(rl._rendered(tokenizer(), side) for side in pair) for pair in pairs_of(config)[0]]
    learner = rl.Preferences(config, run, mesh, pairs, len(pairs))
    params = jax.tree.map(lambda p: p + 0.02 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), learned())
    batch, chosen = learner.next_batch(SimpleNamespace(params=params), 0), rl.question_order(len(pairs), 42, 0)[:8]
    rows = learner.rows(chosen)
    now, start = (learner.log_likelihoods(p, rows, 8) for p in (params, learned()))
    np.testing.assert_allclose(start, learner.reference[chosen], rtol=1e-5)

    def formula(likelihoods):
        gained = likelihoods - start
        return -jax.nn.log_sigmoid(0.5 * (gained[:, 0] - gained[:, 1])).mean()

    loss, slopes = jax.value_and_grad(formula)(jnp.asarray(now))
    assert batch.facts["loss"] == pytest.approx(float(loss), rel=1e-5) and abs(loss - np.log(2)) > 0.01
    # the update minimizes sum(weights * nll) / sum(counts): its slope in log p of an answer is -weights / sum(counts)
    weights, counts = (np.asarray(batch.arrays[name]) for name in ("weights", "counts"))
    expected = -8 * np.repeat(np.asarray(slopes).ravel(), rows["weights"].shape[-1]).reshape(16, -1)
    assert counts.sum() == 8
    mask = rows["weights"].reshape(16, -1)
    np.testing.assert_allclose(weights.reshape(16, -1), expected * mask, rtol=1e-5)
    first = rows["targets"].reshape(16, -1)[0][mask[0] > 0].tolist()
    assert tokenizer().decode(first[:-1]) == spoken(pairs_of(config)[0][chosen[0]][0][-1:])


def test_a_preference_is_learned_and_resumed_bit_equal(tmp_path, monkeypatch):
    source, next_batch = write(tmp_path / "pairs.jsonl", polite()), rl.Preferences.next_batch
    run = write_run(tmp_path / "whole")
    facts = rl.run(settings(source), run)
    assert facts["start"]["preferred"] == 0.5 and facts["preferred"] > 0.9 and facts["margin"] > 0.1
    losses = [record["loss"] for record in read_metrics(run.stage("rl") / "metrics.jsonl")]
    assert losses[0] == pytest.approx(np.log(2)) and losses[-1] < losses[0]

    def stop(self, state, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self, state, step)

    other = write_run(tmp_path / "stopped")
    monkeypatch.setattr(rl.Preferences, "next_batch", stop)
    with pytest.raises(InterruptedRun):
        rl.run(settings(source), other)
    monkeypatch.setattr(rl.Preferences, "next_batch", next_batch)
    assert rl.run(settings(source), other)["params_sha256"] == facts["params_sha256"]
