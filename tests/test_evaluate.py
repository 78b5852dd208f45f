"""Exams: the record follows the contract, is resumed per task, and its numbers equal independent ones."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import lively

from jaxchat import model as gpt
from jaxchat.chat import normalize, render_prompt
from jaxchat.checkpoint import Checkpoints
from jaxchat.config import load_config
from jaxchat.data.packing import Rows, write_rows
from jaxchat.errors import DataError, UsageError
from jaxchat.run_dir import RunDir, read_json, write_json
from jaxchat.scaling import resolve
from jaxchat.tasks import TASKS, core, get_task
from jaxchat.tasks.base import Example, MissingData, TaskFiles, WrittenTask, user
from jaxchat.tasks.core import CORE_TASKS
from jaxchat.tasks.gsm8k import GSM8K
from jaxchat.tasks.humaneval import HumanEval
from jaxchat.tokenizer import train_tokenizer
from jaxchat.train_state import TrainState
from train import evaluate
from train.evaluate import capped, samples_markdown, wilson
from train.report import code

ROOT = Path(__file__).resolve().parent.parent
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
    return lively(config.model, 3)


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
        write_rows(directory, rows, LENGTH + 1, tokenizer.bos, VOCAB, lambda: {"tokenizer": tokenizer.digest})
    save(run, "base", params)
    save(run, "sft", jax.tree.map(lambda p: p * 1.1, params))
    return run


@pytest.fixture(scope="module")
def facts(config, run):
    return evaluate.run(config, run)


def test_the_record_follows_the_contract(run, facts):
    base, sft = read_json(run.eval("base")), read_json(run.eval("sft"))
    assert set(base["tasks"]) == {"bits_per_byte"}
    assert set(sft["tasks"]) == {"bits_per_byte", "word_problems", "identity", "free_answers"}
    assert base["core"] is None and sft["chatcore"] is None
    for scores in (*base["tasks"].values(), *sft["tasks"].values()):
        assert isinstance(scores["metric"], float) and scores["n"] == 5 and scores["seconds"] > 0
    assert sft["tasks"]["word_problems"]["too_long"] > 0  # this context is too short for some: wrong, not a crash
    assert facts["sft"]["identity"] == sft["tasks"]["identity"]["accuracy"] and len(facts["digest"]) == 64


def test_bits_per_byte_equals_a_plain_computation(config, run, facts, tokenizer, params):
    rows = Rows(run.data / "rows" / "val")
    logits_of = jax.jit(lambda x: gpt.logits(config.model, params, gpt.hidden(config.model, params, x)))
    nats = nats_all = size = targets = 0.0
    for tokens, weights in (rows[i] for i in range(len(rows))):
        logits = np.asarray(logits_of(jnp.asarray(tokens[None, :-1])), np.float64)[0]
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
        found = read_json(run.stage(stage) / "samples.json")
        assert [len(found[part]) for part in ("before", "after")] == [prompts] * 2
        assert [a["temperature"] for a in found["after"][0]["answers"]] == [0.0, 0.8]
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


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """All of CORE, MMLU and ARC, a few questions each, in the layouts they come in."""
    root = tmp_path_factory.mktemp("mirror")
    (root / "core").mkdir()
    for task in CORE_TASKS:
        items = {
            core.CHOICE: [{"query": f"Tom {i}", "choices": ["has", "apples"], "gold": i % 2} for i in range(14)],
            core.SCHEMA: [{"context_options": ["Tom", "you"], "continuation": "has", "gold": 1}] * 14,
            core.LANGUAGE: [{"context": f"who {i}", "continuation": "are"} for i in range(14)],
        }[task.kind]
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (root / "core" / task.data).write_text(lines, encoding="utf-8")
    (root / "core" / "arc_easy.jsonl").write_text(
        "".join(json.dumps({"query": f"Question: {i}?", "choices": ["a", "b"], "gold": 0}) + "\n" for i in range(12))
    )
    (root / "mmlu").mkdir()
    for subject in ("law", "art"):
        rows = "".join(f'"{subject} {i}?","1","2","3","4",{i % 4}\n' for i in range(6))
        (root / "mmlu" / f"{subject}_test.csv").write_text("question,A,B,C,D,answer\n" + rows)
    return root


def with_data(config, mirror, *more):
    return dataclasses.replace(
        config,
        tasks=dataclasses.replace(config.tasks, data_dir=str(mirror)),
        eval=dataclasses.replace(config.eval, **dict(more)),
    )


def test_exams_whose_data_is_at_hand_are_sat(config, run, facts, mirror):
    found = evaluate.run(with_data(config, mirror), run)
    base, sft = read_json(run.eval("base")), read_json(run.eval("sft"))
    assert base["core"] == found["base"]["core"] == base["tasks"]["core"]["metric"]
    assert base["core_partial"] is None and base["not_run"] == sft["not_run"] == {}
    parts = base["tasks"]["core"]["groups"]
    assert list(parts) == [task.label for task in CORE_TASKS] and base["tasks"]["core"]["n"] == 5 * 22
    assert base["core"] == pytest.approx(sum(p["centred"] for p in parts.values()) / 22)
    low, high = base["tasks"]["core"]["interval"]
    assert low < base["core"] < high
    for label, part in parts.items():
        assert part["centred"] == pytest.approx((part["accuracy"] - part["chance"]) / (1 - part["chance"]))
        lines = (run.root / "eval" / f"base_core_{label}.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["right"] for line in lines) == part["right"] and len(lines) == part["n"] == 5
    assert {"mmlu", "arc_easy", "arc_challenge"} <= set(sft["tasks"]) and "core" not in sft["tasks"]
    mmlu = sft["tasks"]["mmlu"]
    assert mmlu["chance"] == 0.25 and mmlu["cropped"] == 5  # this context is shorter than every prompt
    assert set(mmlu["groups"]) <= {"subject: law", "subject: art"}
    assert sum(group["n"] for group in mmlu["groups"].values()) == 5
    assert sft["chatcore"] is None  # two of its five are missing


def test_a_decision_equals_a_plain_forward_pass(config, run, facts, mirror, tokenizer, params):
    everything = get_task("mmlu", TaskFiles(str(mirror))).examples()
    evaluate.run(with_data(config, mirror), run)
    lines = (run.root / "eval" / "sft_mmlu.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    assert [a["index"] for a in asked] == np.random.default_rng(42).permutation(12)[:5].tolist()
    for one in asked:
        example = everything[one["index"]]
        tokens = render_prompt(tokenizer, example.prompt)[-LENGTH:]
        x = gpt.hidden(config.model, jax.tree.map(lambda p: p * 1.1, params), jnp.asarray([tokens]))
        z = np.asarray(gpt.logits(config.model, jax.tree.map(lambda p: p * 1.1, params), x))[0, -1]
        ids = [tokenizer.encode(letter)[0] for letter in example.letters]
        assert one["chosen"] == example.letters[int(z[ids].argmax())]
        assert one["right"] == (one["chosen"] == one["expected"] == example.letters[example.right])


def test_missing_and_damaged_data_is_said_and_the_others_go_on(config, run, facts, mirror, capsys):
    names = ("core", "mmlu", "arc_easy", "arc_challenge", "identity", "next_turn")
    damaged = mirror.parent / "damaged"
    shutil.copytree(mirror, damaged)
    (damaged / "core" / "hellaswag.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 2}\n')
    for path in (damaged / "mmlu").glob("*.csv"):
        path.write_text('question,A,B,C,D,answer\n"q","1","2","3","4",7\n')
    (damaged / "core" / "arc_challenge.jsonl").write_bytes(b"\xff")
    evaluate.run(with_data(config, damaged, ("exams", names)), run)
    base, sft = read_json(run.eval("base")), read_json(run.eval("sft"))
    assert base["core"] is None and "core" not in base["tasks"]
    partial = base["core_partial"]
    assert partial["tasks"] == 19 and set(partial["missing"]) == {"hellaswag_zeroshot", "hellaswag", "arc_challenge"}
    assert partial["metric"] == base["tasks"]["core_partial"]["metric"]
    assert "hellaswag.jsonl:1: " in base["not_run"]["core"]
    assert "_test.csv" in sft["not_run"]["mmlu"] and "held-out" in sft["not_run"]["next_turn"]
    assert "arc_challenge.jsonl" in sft["not_run"]["arc_challenge"]
    assert set(sft["tasks"]) == {"bits_per_byte", "arc_easy", "identity"}
    said = capsys.readouterr().err
    assert "mmlu           not run: " in said and "mean of 19 of CORE's 22 tasks" in said


def test_only_what_is_not_done_is_examined_again(config, run, facts, mirror):
    settings = with_data(config, mirror)
    evaluate.run(settings, run)
    record = read_json(run.eval("base"))
    for scores in record["core_tasks"].values():
        scores["seconds"] = 99.0
    del record["core_tasks"]["boolq"], record["tasks"]["core"]
    write_json(run.eval("base"), record)
    evaluate.run(settings, run)
    again = read_json(run.eval("base"))
    assert [label for label, s in again["core_tasks"].items() if s["seconds"] != 99.0] == ["boolq"]
    assert again["core"] == record["core"]
    path = mirror / "core" / "copa.jsonl"  # other questions of one task
    before = path.read_text()
    path.write_text(before.replace("apples", "pears"))
    evaluate.run(settings, run)
    path.write_text(before)
    changed = [label for label, s in read_json(run.eval("base"))["core_tasks"].items() if s["seconds"] != 99.0]
    assert changed == ["copa", "boolq"]


def no_data(self):
    raise MissingData("gsm8k is not here")


def test_exams_while_a_model_trains_are_the_exams_first_questions(
    config, tokenizer, params, mirror, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(GSM8K, "examples", no_data)
    settings = with_data(config, mirror, ("exams", ("identity", "arc_easy", "gsm8k", "auto")))
    state = TrainState(params, {}, jnp.int32(0))
    (check,) = evaluate.spot_checks(settings, RunDir(tmp_path / "run"), tokenizer, "sft", 3)
    found = dict(check(state, 5))
    assert {"exam/identity", "exam/arc_easy", "exam/word_problems", "exam/mmlu"} <= set(found)
    assert "chatcore" not in found and "exam/gsm8k" not in found
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().err
    assert "gsm8k is not asked during training" in said
    check(state, 6)
    assert "gsm8k" not in capsys.readouterr().err
    model = evaluate.Model(settings, RunDir(tmp_path / "other"), "sft", jax.device_get(params), tokenizer)
    asked, _ = model.exam(get_task("identity"), capped(len(get_task("identity").examples()), 3))
    assert found["exam/identity"] == asked["metric"]
    assert evaluate.spot_checks(settings, RunDir(tmp_path), tokenizer, "sft", 0) == []


def test_an_unknown_exam_is_refused_before_any_work(config):
    with pytest.raises(UsageError, match="mmlo.*did you mean mmlu"):
        evaluate.check(dataclasses.replace(config, eval=dataclasses.replace(config.eval, exams=("mmlo",))))
    evaluate.check(config)


@pytest.mark.parametrize("page", ["docs/exams.md", "docs/ko/exams.md"])
def test_the_task_of_the_page_is_an_exam_and_a_source_of_conversations(page, config, run, facts, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    module = {"__name__": "jaxchat.tasks.backwards"}
    exec(compile(code, page, "exec"), module)
    monkeypatch.setitem(TASKS, "backwards", module["Backwards"])
    task = get_task("backwards")
    taught = task.train_conversations(20, seed=0)
    assert len(taught) == 20 and len(list(normalize(taught[0]))) == 2
    asked = {e.prompt[0]["content"] for e in task.examples()}
    assert not asked & {conversation[0]["content"] for conversation in taught}
    right = [task.grade(e, f" {e.expected.upper()}\n") for e in task.examples()]
    assert right == [True] * 3 and not task.grade(task.examples()[0], "apple")
    evaluate.run(dataclasses.replace(config, eval=dataclasses.replace(config.eval, exams=("backwards",))), run)
    scores = read_json(run.eval("sft"))["tasks"]["backwards"]
    assert scores["n"] == 3 and set(scores["groups"]) == {"letters: 5"}


def test_chatcore_needs_all_five():
    scores = {name: {"metric": 0.4, "chance": 0.25 if name in ("arc_easy", "arc_challenge", "mmlu") else 0.0}
              for name in ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")}  # fmt: skip
    assert evaluate.chat_core(scores) == pytest.approx((3 * 0.15 / 0.75 + 2 * 0.4) / 5)
    del scores["humaneval"]
    assert evaluate.chat_core(scores) is None


def test_a_cap_takes_the_first_of_a_fixed_shuffle():
    assert capped(5, -1) == capped(5, 5) == capped(5, 9) == [0, 1, 2, 3, 4]
    assert capped(100, 3) == np.random.default_rng(42).permutation(100)[:3].tolist() == capped(100, 7)[:3]
    assert capped(5, 0) == []


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
    assert code("a `b` ``c``\nd") == "``` a `b` ``c`` d ```"
    answers = [{"temperature": 0.5, "text": "x\ny"}, {"temperature": 1.0, "text": ""}]
    text = samples_markdown([{"prompt": "a\nb", "answers": answers}])
    assert text == "> `a b`\n\n- **0.5**: `x y`\n- **1**: (nothing)\n"


def test_half_a_character_in_a_question_ends_nothing(config, run, facts, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "Caf\\ud800?", "answer": "#### 3"}\n')
    evaluate.run(with_data(config, tmp_path, ("exams", ("gsm8k",))), run)
    (line,) = (run.root / "eval" / "sft_gsm8k.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prompt"][0]["content"] == "Caf\ud800?"


def test_a_score_belongs_to_its_sandbox_and_the_digest_to_the_whole_record(config, run, facts, monkeypatch, tmp_path):
    task = {"task_id": "a", "prompt": "def one():\n", "entry_point": "one", "canonical_solution": "    return 1\n",
            "test": "def check(candidate):\n    assert candidate() == 1\n"}  # fmt: skip
    path = tmp_path / "humaneval" / "HumanEval.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(task) + "\n")
    settings = with_data(config, tmp_path, ("exams", ("humaneval",)))
    first = evaluate.run(settings, run)
    kept = read_json(run.eval("sft"))["tasks"]["humaneval"]
    assert evaluate.run(settings, run) == first and read_json(run.eval("sft"))["tasks"]["humaneval"] == kept
    monkeypatch.setattr(HumanEval, "setting", lambda self: ("another sandbox",))
    evaluate.run(settings, run)
    assert read_json(run.eval("sft"))["tasks"]["humaneval"]["questions_sha256"] != kept["questions_sha256"]
    path.write_text((json.dumps(task) + "\n") * 2)
    more = evaluate.run(settings, run)
    assert more["sft"] == first["sft"] and more["digest"] != first["digest"]


class Halves(WrittenTask):
    """Right is whatever has an even number of characters: some draws are, some are not."""

    name, max_tokens = "halves", 6

    def examples(self):
        return [Example([user(text)], None) for text in ("Tom", "apples", "pears", "x" * LENGTH)]

    def grade(self, example, answer):
        return len(answer) % 2 == 0


def test_several_draws_give_pass_at_k(config, run, facts, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "halves", Halves)
    settings = dataclasses.replace(config.eval, exams=("halves",), samples=4, temperature=1.0)
    evaluate.run(dataclasses.replace(config, eval=settings), run)
    scores = read_json(run.eval("sft"))["tasks"]["halves"]
    lines = [json.loads(line) for line in run.eval("sft").with_name("sft_halves.jsonl").read_text().splitlines()]
    right = np.array([[draw["right"] for draw in line["draws"]] for line in lines])
    assert right.shape == (4, 4) and 0 < right[:3].mean() < 1
    texts = [["".join(p["text"] for p in d["answer"] if p["type"] == "text") for d in line["draws"]] for line in lines]
    assert [[len(t) % 2 == 0 for t in row] for row in texts[:3]] == right[:3].tolist()
    assert len({text for row in texts[:3] for text in row}) > 3  # draws, not one answer four times
    assert scores["too_long"] == 1 and not right[3].any() and texts[3] == [""] * 4
    share = {k: scores["pass_at_k"][f"pass@{k}"]["metric"] for k in (1, 2, 4)}
    assert share[1] == pytest.approx(right.mean()) and share[4] == right.any(axis=1).mean()
    pairs = [right[:, [i, j]].any(axis=1).mean() for i in range(4) for j in range(i)]
    assert share[2] == pytest.approx(np.mean(pairs))
    assert "halves, pass@4" in capsys.readouterr().err


def test_the_table_is_printed(config, run, facts, capsys):
    evaluate.run(config, run)
    said = capsys.readouterr().err
    head, *rows = said[said.index("exam  ") :].splitlines()
    assert head.split() == ["exam", "BASE", "SFT", "chance", "cases"]
    shown = {row.split("  ")[0]: row for row in rows}
    scores = read_json(run.eval("sft"))["tasks"]
    assert f"{scores['identity']['accuracy']:.1%} (" in shown["identity"]
    found = scores["bits_per_byte"]
    low, high = found["interval"]
    assert low < found["metric"] < high and high - low == pytest.approx(2 * 1.96 * found["se"], rel=1e-3)
    assert f"{found['metric']:.4f} ± {found['se']:.4f}" in shown["bits per byte"]
