"""The ONNX export, run by onnxruntime; the long tests are skipped where torch or onnxruntime is not installed."""

import re
import subprocess
import sys

import numpy as np
import pytest
from random_model import logits_of, random_model, random_run

from jaxchat.chat import render_prompt
from jaxchat.engine import Engine, Request
from jaxchat.interop.__main__ import main, make_parser
from jaxchat.interop.onnx import write_onnx

PROMPTS, LENGTH = 100, 16
WORDS = ["hello", "What is", "the weather", "3 plus 14", "안녕", "너는 누구니", "12 apples", "😀", "<|user_end|>"]


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    run = random_run(tmp_path / "run", "classic")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    words = ["export", "--run-dir", str(run.root), "--format", "onnx", "--out", str(tmp_path / "onnx")]
    assert main(lambda: make_parser().parse_args(words)) == 2
    err = capsys.readouterr().err
    assert "onnxscript" in err and len(err.splitlines()) == 1 and not (tmp_path / "onnx").exists()


@pytest.fixture(scope="module", params=["classic", "modern", "jaxchat"])
def exported(request, tmp_path_factory):
    """(the model, a session of its export, the export's folder)."""
    for package in ("torch", "transformers", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs pip install -e '.[onnx]'")
    import onnxruntime

    model, folder = random_model(request.param), tmp_path_factory.mktemp("onnx") / "model"
    write_onnx(model, folder)
    return model, onnxruntime.InferenceSession(str(folder / "model.onnx")), folder


def empty(session, rows):
    axes = {"batch": rows, "past": 0}
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    return {i.name: np.zeros([axes.get(n, n) for n in i.shape], types[i.type]) for i in session.get_inputs()[2:]}


def step(session, ids, mask, cache):
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, **cache})
    return logits, dict(zip(cache, present, strict=True))


def greedy(session, prompt, length, end, cached):
    answer, cache = [], empty(session, 1)
    while len(answer) < length and answer[-1:] != [end]:
        mask = np.ones((1, len(prompt) + len(answer)), np.int64)
        new = answer[-1:] if cached and answer else prompt + answer
        logits, present = step(session, np.array([new]), mask, cache)
        cache = present if cached else cache
        answer.append(int(logits[0, -1].argmax()))
    return answer


@pytest.mark.slow
def test_logits_agree_in_chunks_and_behind_padding(exported):
    model, session, _ = exported
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 90))
    wanted, cache, parts = logits_of(model.config, model.params, ids), empty(session, 3), []
    for start, end in ((0, 1), (1, 20), (20, 21), (21, 22), (22, 90)):
        part, cache = step(session, ids[:, start:end], np.ones((3, end), np.int64), cache)
        parts.append(part)
    assert np.abs(np.concatenate(parts, 1) - wanted).max() < 1e-4
    padded, mask = np.pad(ids, [(0, 0), (7, 0)], constant_values=5), np.pad(np.ones_like(ids), [(0, 0), (7, 0)])
    assert np.abs(step(session, padded, mask, empty(session, 3))[0][:, 7:] - wanted).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_greedy_answers_are_the_engine_s(exported, cached):
    """Equal, or the two logits at the first difference within 1e-3."""
    model, session, _ = exported
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(PROMPTS)]
    prompts = [render_prompt(model.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    end, engine = (
        model.tokenizer.special["<|assistant_end|>"],
        Engine(model.config, model.params, model.tokenizer, slots=8),
    )
    results = engine.generate([Request(prompt, max_tokens=LENGTH, stop=(end,), tools=False) for prompt in prompts])
    for prompt, result in zip(prompts, results, strict=True):
        wanted = result.tokens + ([] if result.stop_id is None else [result.stop_id])
        found = greedy(session, prompt, LENGTH, end, cached)
        if found != wanted:
            at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b)
            logits = logits_of(model.config, model.params, np.array([prompt + found[:at]]))[0, -1]
            assert abs(logits[found[at]] - logits[wanted[at]]) < 1e-3


@pytest.mark.slow
def test_the_lines_of_its_card_run(exported):
    from transformers import AutoTokenizer

    model, session, folder = exported
    lines = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)[1]
    done = subprocess.run([sys.executable, "-c", lines], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    end, prompt = model.tokenizer.special["<|assistant_end|>"], [{"role": "user", "content": "Hello!"}]
    found = greedy(session, render_prompt(model.tokenizer, prompt), 64, end, True)
    assert done.stdout == AutoTokenizer.from_pretrained(folder).decode(found) + "\n"
