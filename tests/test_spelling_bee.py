"""SpellingBee: exam words never trained, solutions that are right, grading."""

import re

import pytest
from small_model import tokenizer

from jaxchat.chat import render
from jaxchat.engine.turn import Turn
from jaxchat.tasks.base import Example
from jaxchat.tasks.generated import QUESTIONS, spelling_solution, words
from jaxchat.tasks.registry import get_task

TASK = get_task("spelling_bee")
WORDING = {word for text in QUESTIONS for word in re.findall("[a-z]+", text.lower())}


def test_a_solution_spells_counts_and_checks():
    assert spelling_solution("strawberry", "r")["content"] == [
        {"type": "text", "text": "strawberry: s, t, r 1, a, w, b, e, r 2, r 3, y. Check: "},
        {"type": "python", "text": "'strawberry'.count('r')"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": " The letter r is there 3 times."},
    ]


def test_exam_words_are_not_trained():
    exam, train = words(True), words(False)
    assert len(train) > 5000 and len(exam) > 500 and not set(exam) & set(train)
    texts = [c[0]["content"] for c in TASK.train_conversations(500, 1)]
    texts += [e.prompt[0]["content"] for e in TASK.train_examples(1)[:500]]
    asked = [set(re.findall("[a-z]+", text)) for text in texts]
    assert not any((set(exam) - WORDING) & found for found in asked) and all(set(train) & found for found in asked)
    assert all(set(exam) & set(re.findall("[a-z]+", e.prompt[0]["content"])) for e in TASK.examples())


def test_every_solution_grades_itself_right_and_is_answered_by_the_calculator():
    for conversation in TASK.train_conversations(300, 3):
        parts = conversation[1]["content"]
        word, letter = parts[1]["text"][1:-1].split("'.count('")
        example = Example(conversation[:1], str(word.count(letter.rstrip("'"))))
        assert TASK.grade(example, "".join(p["text"] for p in parts if p["type"] == "text"))
        turn = Turn(tokenizer())
        ids, _ = render(tokenizer(), [*conversation[:1], {"role": "assistant", "content": parts[:2]}])
        for token in ids[ids.index(tokenizer().special["<|assistant_start|>"]) + 1 : -1]:
            turn.add(token)
        assert tokenizer().decode(turn.tool_output()[1:-1]) == parts[2]["text"] == example.expected


def test_examples_are_always_the_same_and_have_every_count():
    exam = TASK.examples()
    assert len(exam) == 256 and exam == TASK.examples() and TASK.train_examples(1) != TASK.train_examples(2)
    assert {e.tags["times"] for e in exam} == {"0", "1", "2", "3 or more"}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("3", True), ("r 1, r 2, so 3 times.", True), ("3 or 4", False), ("three", False), ("", False), ("13", False),
     ("9" * 100_000, False), ("\ufffd", False)],
)  # fmt: skip
def test_grades(answer, right):
    assert TASK.grade(Example([], "3"), answer) is right
