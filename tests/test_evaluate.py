"""Exams: the record follows the contract, is resumed per task, and its numbers equal independent ones."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import load_config
from jaxchat.data.rows import Rows, finish_rows, write_rows
from jaxchat.errors import DataError
from jaxchat.model import gpt
from jaxchat.optim.horizon import resolve
from jaxchat.paths import RunDir, read_json, write_json
from jaxchat.state import TrainState
from jaxchat.text.tokenizer import train_tokenizer
from train import evaluate
from train.exams import wilson
from train.samples import _code

VOCAB, LENGTH = 280, 64


@pytest.fixture(scope="module")
def config():
    small = (
        "model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16", f"model.seq_len={LENGTH}",
        f"model.vocab_size={VOCAB}", "train.steps=1", "train.batch_tokens=512", "eval.batch_rows=4",
        "eval.max_per_task=5", "eval.sample_tokens=6",
    )  # fmt: skip
    return resolve(load_config("nano", small))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Tom has 12 apples and 30 pears, who are you? " * 3], VOCAB, 1000, 1000)


@pytest.fixture(scope="module")
def params(config):
    leaves, tree = jax.tree.flatten(gpt.init_params(config.model, 3))
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return jax.tree.unflatten(
        tree, [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    )


def save(run, stage, params):
    checkpoints = Checkpoints(run.stage(stage))
    checkpoints.save(1, TrainState(params, {"nothing": jnp.zeros(1)}, jnp.int32(1)), {})
    checkpoints.wait()
    checkpoints.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, params):
    """A run directory with held-out text and conversations, a base and a chat model, examined once."""
    run = RunDir(tmp_path_factory.mktemp("run"))
    tokenizer.save(run.tokenizer)
    rng = np.random.default_rng(0)
    for folder, masked in (("rows/val", False), ("sft/val", True)):
        directory = run.data / folder
        directory.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for length in (65, 65, 40, 65, 9):
            ids = np.array([tokenizer.bos, *rng.integers(10, VOCAB - 10, length - 1)])
            rows.append((ids, rng.integers(0, 2, length)) if masked else ids)
        count = write_rows(directory, rows, LENGTH + 1, tokenizer.bos, VOCAB)
        finish_rows(directory, {"tokenizer": tokenizer.digest}, LENGTH + 1, count, VOCAB)
    save(run, "base", params)
    save(run, "sft", jax.tree.map(lambda p: p * 1.1, params))
    return run


@pytest.fixture(scope="module")
def facts(config, run):
    return evaluate.run(config, run)


def test_the_record_follows_the_contract(run, facts):
    base, sft = read_json(run.eval("base")), read_json(run.eval("sft"))
    assert set(base["tasks"]) == {"bits_per_byte"}
    assert set(sft["tasks"]) == {"bits_per_byte", "word_problems", "identity"}
    assert base["core"] is None and sft["chatcore"] is None
    for scores in (*base["tasks"].values(), *sft["tasks"].values()):
        assert isinstance(scores["metric"], float) and scores["n"] == 5 and scores["seconds"] > 0
    assert sft["tasks"]["word_problems"]["too_long"] > 0  # this context is too short for some: wrong, not a crash
    assert facts["sft"]["identity"] == sft["tasks"]["identity"]["accuracy"] and len(facts["digest"]) == 64


def test_bits_per_byte_equals_a_plain_computation(config, run, facts, tokenizer, params):
    rows = Rows(run.data / "rows" / "val")
    nats = nats_all = size = targets = 0.0
    for tokens, weights in (rows[i] for i in range(len(rows))):
        x = gpt.hidden(config.model, params, jnp.asarray(tokens[None, :-1]))
        logits = np.asarray(gpt.logits(config.model, params, x), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        for t, target in enumerate(tokens[1:]):
            if weights[t + 1]:
                nats_all, targets = nats_all - logp[t, target], targets + 1
                if length := len(tokenizer.token_bytes(int(target))):
                    nats, size = nats - logp[t, target], size + length
    scores = read_json(run.eval("base"))["tasks"]["bits_per_byte"]
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(nats_all / targets), rel=1e-5)
    assert scores["conversations"]["bits_per_byte"] != scores["text"]["bits_per_byte"] == scores["metric"]


def test_every_answer_is_kept_and_adds_up(run, facts):
    for name in ("word_problems", "identity"):
        lines = (run.root / "eval" / f"sft_{name}.jsonl").read_text().splitlines()
        scores = read_json(run.eval("sft"))["tasks"][name]
        assert len(lines) == scores["n"] and sum(json.loads(line)["right"] for line in lines) == scores["right"]
        assert sum(group["n"] for group in scores["groups"].values()) == scores["n"]


def test_samples_show_both_models_at_both_temperatures(run, facts):
    for stage, prompts in (("base", 5), ("sft", 5)):
        text = (run.stage(stage) / "samples.md").read_text()
        before, after = text.split("## Before")[1].split("## After")
        for part in (before, after):
            assert part.count("- **0**:") == part.count("- **0.8**:") == part.count("\n> ") == prompts
        assert before != after
    assert "who are you?" in (run.stage("sft") / "samples.md").read_text()


def test_a_killed_evaluation_goes_on_where_it_was(config, run, facts):
    path = run.eval("sft")
    record = read_json(path)
    del record["tasks"]["identity"]
    record["tasks"]["word_problems"]["seconds"] = 123456.0  # would not survive a second exam
    write_json(path, record)
    again = evaluate.run(config, run)
    after = read_json(path)
    assert after["tasks"]["word_problems"]["seconds"] == 123456.0 and "identity" in after["tasks"]
    assert again["digest"] == facts["digest"]


def test_other_parameters_are_examined_anew(config, run, facts):
    path = run.eval("base")
    record = read_json(path)
    record["inputs"]["params_sha256"] = "0" * 64
    record["tasks"]["bits_per_byte"]["metric"] = 99.0
    write_json(path, record)
    evaluate.run(config, run)
    assert read_json(path)["tasks"]["bits_per_byte"]["metric"] < 20


def test_nothing_trained_is_an_error_that_says_so(config, tmp_path, tokenizer):
    run = RunDir(tmp_path)
    tokenizer.save(run.tokenizer)
    with pytest.raises(DataError, match="nothing to examine"):
        evaluate.run(config, run)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (50, 100, 0.4038315, 0.5961685)],
)
def test_wilson_intervals(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_samples_hold_any_text_as_code():
    assert _code("a `b` ``c``\nd") == "``` a `b` ``c`` d ```" and _code(" ") == "(nothing)"
