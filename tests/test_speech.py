"""The exams of free speech and of the next turn: their figures by hand, their questions, and a run that took them."""

import json
import math

import pytest

from jaxchat.chat import render
from jaxchat.checkpoint import trained_params
from jaxchat.config import load_config, replaced
from jaxchat.engine.scoring import Span
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.tasks.base import Example, MissingData, TaskFiles, assistant, user
from jaxchat.tasks.speech import (
    OPTIONS,
    FreeAnswers,
    NextTurn,
    Words,
    conversations_of,
    distinct,
    repeated,
    text_of,
    words,
)
from jaxchat.tokenizer import Tokenizer, train_tokenizer
from train import evaluate, report

TALK = [user("hi"), assistant("Hello there"), user("6 times 7?"),
        assistant(("python", "6*7"), ("python_output", "42"), "It is 42.")]  # fmt: skip


def test_words_are_letters_with_apostrophes_inside():
    assert words("I don’t 'like' TRUFFLES, 30 of_them…x2") == ["i", "don't", "like", "truffles", "of", "them", "x"]
    assert words("커피를 마셔요!") == ["커피를", "마셔요"] == words("커피를 마셔요!")


def test_a_word_is_known_from_any_text_and_a_korean_one_by_its_pairs():
    known = Words(["The truffle is good.", "학교에서 친구를 만나요", "커피는 좋아요"])
    assert "truffle" in known and "truffleee" not in known and "rufflei" not in known
    assert "친구는" not in known and "친구를" in known and "학교" in known and "요" not in known
    assert "구를만나" not in known  # 를만 stands in no word


def test_shares_of_n_grams_by_hand():
    a, b = ["i", "like", "to", "like", "to", "like"], ["i", "like", "it"]
    assert repeated([a, b]) == (1, 5)  # "like to like" comes twice
    assert distinct([a, b]) == (4, 7)
    assert repeated([["hi"]]) == (0, 0) == distinct([["hi"], []])


def test_conversations_come_back_from_rows():
    tokenizer = train_tokenizer(["hello there, it is 42 times"] * 9, 280, fewer=True)
    row = [*render(tokenizer, TALK)[0], *render(tokenizer, TALK[:2])[0], tokenizer.bos, tokenizer.bos]
    first, second = conversations_of(tokenizer, [row])
    assert [text_of(m) for m in first] == ["hi", "Hello there", "6 times 7?", "It is 42."] and first[3] == TALK[3]
    assert second == TALK[:2]


def talks(count):
    return [[user(f"q {i}"), assistant(f"answer {i}"), user("more"), assistant("same")] for i in range(count)]


def test_the_next_turn_is_asked_for_turns_that_occur_once():
    task = NextTurn()
    task.conversations = [*talks(OPTIONS + 2), TALK]
    examples = task.examples()
    assert len(examples) == OPTIONS + 3 and task.examples() == examples  # "same" and the sum are not asked
    for example in examples:
        asked, (options, right) = text_of(example.prompt[-1]), example.expected
        assert len(set(options)) == OPTIONS and right in options
        assert right == ("Hello there" if asked == "hi" else asked.replace("q", "answer"))
    assert len({options.index(right) for options, right in (example.expected for example in examples)}) > 1
    task.conversations = talks(OPTIONS - 1)
    assert not task.examples()


def test_questions_are_in_the_languages_of_the_persona(tmp_path):
    (tmp_path / "me.toml").write_text('name = "Mina"\nlanguages = ["ko"]\n')
    english = FreeAnswers().examples()
    korean = FreeAnswers(TaskFiles(identity=str(tmp_path / "me.toml"))).examples()
    assert len(english) == len(korean) == 200
    asked = {text_of(example.prompt[0]) for example in english}
    assert not asked & {text_of(example.prompt[0]) for example in FreeAnswers(kind="tuning").examples()}


@pytest.fixture(scope="module")
def model(finished):
    config, run = resolve(load_config(finished / "config.toml")), RunDir(finished)
    return evaluate.Model(config, run, "rl", trained_params(run, "rl"), Tokenizer.load(run.tokenizer))


def test_the_turn_that_gains_most_by_its_conversation_is_chosen(model):
    task = NextTurn()
    task.conversations = talks(OPTIONS + 2)
    scores, decisions = model.exam(task, [0, 1])
    one = lambda prompt, text: model.scorer.spans([[Span(prompt + text, len(prompt), len(prompt + text))]])[0][0].loss  # noqa: E731
    alone = evaluate.render_prompt(model.tokenizer, [user("")])
    for example, decision in zip(task.examples(), decisions, strict=False):
        options, right = example.expected
        prompt, ids = evaluate.render_prompt(model.tokenizer, example.prompt), model.tokenizer.encode
        gains = [(one(alone, ids(text)) - one(prompt, ids(text))) / len(text) for text in options]
        best = max(gains)
        assert math.isclose(gains[options.index(decision["chosen"])], best, abs_tol=1e-5)
        assert decision["right"] == (decision["chosen"] == right)
    assert scores["chance"] == 0.1 and scores["n"] == 2


def test_a_run_has_the_figures_in_its_records_and_its_card(finished):
    task = json.loads((finished / "eval" / "rl.json").read_text())["tasks"]["free_answers"]
    answers = [json.loads(line) for line in (finished / "eval" / "rl_free_answers.jsonl").read_text().splitlines()]
    unknown = sum(len(answer["unknown"]) for answer in answers)
    assert len(answers) == 4 and task["metric"] == unknown / max(1, task["figures"]["words in no training text"]["n"])
    card = json.loads((finished / "report.json").read_text())
    rows = {row[0]: row for row in report.exam_tables(card)[0].rows}
    for name, figure in task["figures"].items():
        assert rows[f"free answers, {name}"][2]["text"] == f"{figure['metric']:.1%}"


def test_words_of_the_training_text_are_none_and_made_up_ones_are(model, monkeypatch):
    class Answer:
        finish_reason = "length"
        parts = [{"type": "text", "text": "The cat seees the river agai"}]  # noqa: RUF012

    monkeypatch.setattr(model.engine, "generate", lambda requests, **_: [Answer()] * len(requests))
    too_long = Example([user("cat " * 999)], None)
    scores, decisions = model.free_answers(FreeAnswers(), [too_long, *FreeAnswers().examples()[:2]])
    assert decisions[0]["unknown"] == ["seees"] and scores["metric"] == 0.2 and scores["n"] == 2
    monkeypatch.setattr(model, "config", replaced(model.config, "eval", overlap_documents=0))
    with pytest.raises(MissingData, match="overlap_documents"):
        model.free_answers(FreeAnswers(), FreeAnswers().examples()[:2])
