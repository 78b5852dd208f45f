"""Exams while a model trains: the same numbers as the exam's own, in metrics.jsonl, and nothing kept beside them."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxchat import model as gpt
from jaxchat.config import load_config
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.tokenizer import train_tokenizer
from jaxchat.train_state import TrainState
from train.evaluate import Model, spot_checks

SHAPE = ["model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16", "model.vocab_size=300",
         "model.seq_len=128", "train.batch_tokens=512", "train.steps=1", "eval.batch_rows=4"]  # fmt: skip
QUESTION = {"query": "Which one?", "choices": ["this", "that", "it", "none"], "gold": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Who are you? Tom has 12 apples. Which one? A B C D so then what " * 9], 300, 10**5, 10**4)


def test_exams_of_a_model_on_its_way(tmp_path, tokenizer, capsys):
    (tmp_path / "mirror" / "core").mkdir(parents=True)
    lines = "".join(json.dumps(QUESTION | {"query": f"Which one of {i}?"}) + "\n" for i in range(5))
    (tmp_path / "mirror" / "core" / "arc_easy.jsonl").write_text(lines, encoding="utf-8")
    exams = ["eval.exams=['identity','arc_easy','gsm8k','auto']", f"tasks.data_dir='{tmp_path / 'mirror'}'"]
    config = resolve(load_config("nano", [*SHAPE, *exams]))
    params = gpt.init_params(config.model, 1)
    state = TrainState(params, {}, jnp.int32(0))
    (check,) = spot_checks(config, RunDir(tmp_path / "run"), tokenizer, "sft", 3)
    found = dict(check(state, 5))
    assert {"exam/identity", "exam/arc_easy", "exam/word_problems"} <= set(found)
    assert "chatcore" not in found and "exam/gsm8k" not in found
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().err
    assert "gsm8k is not asked during training" in said and "mmlu" not in said
    check(state, 6)
    model = Model(config, RunDir(tmp_path / "other"), "sft", jax.device_get(params), tokenizer)
    from jaxchat.tasks.identity import Identity
    from train.evaluate import capped

    asked = model.written(Identity(), capped(len(Identity().examples()), 3))
    assert found["exam/identity"] == asked["metric"]
    assert spot_checks(config, RunDir(tmp_path), tokenizer, "sft", 0) == []
