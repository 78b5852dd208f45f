"""Arithmetic: right results, exact match, exam pairs never trained."""

import re

import pytest

from jaxchat.tasks.base import Example
from jaxchat.tasks.registry import get_task

TASK = get_task("arithmetic")
CASE = re.compile(r"(\d+) ?([-+*]) ?(\d+)")


def pairs(examples):
    found = [CASE.search(e.prompt[0]["content"]).groups() for e in examples]
    return {(min(int(a), int(b)), max(int(a), int(b))) for a, _, b in found}


def test_results_are_right_and_never_negative():
    for example in [*TASK.examples(), *TASK.train_examples(3)[:2000]]:
        a, sign, b = CASE.search(example.prompt[0]["content"]).groups()
        result = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert example.expected == str(result) and result >= 0


def test_exam_pairs_are_not_trained():
    exam = TASK.examples()
    assert len(exam) == 512 and exam == TASK.examples()
    trained = [Example(c[:1], c[1]["content"][0]["text"]) for c in TASK.train_conversations(3000, 1)]
    assert not pairs(exam) & pairs([*trained, *TASK.train_examples(1)])
    assert all(TASK.grade(e, e.expected) for e in trained)
    assert len({e.tags["kind"] for e in exam}) == 8


@pytest.mark.parametrize(
    ("answer", "right"),
    [("42", True), (" 42\n", True), ("042", False), ("42.", False), ("42.0", False), ("= 42", False), ("4 2", False),
     ("", False), ("4" * 100_000, False), ("\ufffd", False)],
)  # fmt: skip
def test_exact_match(answer, right):
    assert TASK.grade(Example([], "42"), answer) is right
