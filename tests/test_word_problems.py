"""Word problems: training never shows an exam pair, solutions are what the calculator says, grading is strict."""

import re

import pytest

from jaxchat.errors import UsageError
from jaxchat.tasks.generated import WordProblems, is_held_out_problem
from jaxchat.tasks.registry import TASKS, get_task, parse_mixture_entry
from jaxchat.tools.calculator import calculate

TASK = WordProblems()
NUMBER = re.compile(r"\d+")


def test_training_never_shows_an_exam_pair():
    trained = set()
    for conversation in TASK.train_conversations(3000, seed=1):
        for message in conversation:
            if message["role"] == "assistant" and len(message["content"]) == 3:
                a, b = NUMBER.findall(message["content"][0]["text"])
                trained.add(frozenset((int(a), int(b))))
    examined = {frozenset(map(int, NUMBER.findall(e.prompt[-1]["content"]))) for e in TASK.examples()}
    assert len(trained) > 1500 and len(examined) > 150
    assert not trained & examined


def test_about_one_pair_in_ten_is_held_out_in_either_order():
    held_out = [(a, b) for a in range(2, 100) for b in range(2, 100) if is_held_out_problem(a, b)]
    assert 0.08 < len(held_out) / 98**2 < 0.12
    assert all(is_held_out_problem(b, a) for a, b in held_out)


def test_solutions_are_the_calculators():
    kinds = set()
    for conversation in TASK.train_conversations(500, seed=2):
        assert [m["role"] for m in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
            if len(answer["content"]) == 1:  # small talk before the problem
                continue
            call, output, text = answer["content"]
            assert (call["type"], output["type"], text["type"]) == ("python", "python_output", "text")
            assert calculate(call["text"]) == output["text"]
            assert output["text"] in NUMBER.findall(text["text"])
            assert sorted(NUMBER.findall(call["text"])) == sorted(NUMBER.findall(question["content"]))
            assert "{" not in question["content"] + text["text"]
            kinds.add(re.sub(r"\d+", "", call["text"]))
    assert kinds == {"+", "-", "*", "/"}


def test_same_seed_same_conversations_and_a_fixed_exam():
    assert TASK.train_conversations(50, 3) == TASK.train_conversations(50, 3)
    assert TASK.train_conversations(50, 3) != TASK.train_conversations(50, 4)
    assert TASK.examples() == WordProblems().examples() and len(TASK.examples()) == 256


def test_the_exam_is_right_by_independent_arithmetic():
    for example in TASK.examples():
        a, b = map(int, NUMBER.findall(example.prompt[-1]["content"]))
        assert int(example.expected) in (a + b, abs(a - b), a * b, a // b, b // a)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("There are 42 apples left.", True),
        ("42", True),
        ("1 and 2 make 42.", True),
        ("142", False),
        ("42 or 43", False),
        ("-42", False),
        ("4.2", False),
        ("forty-two", False),
        ("", False),
    ],
)
def test_grading(answer, right):
    example = TASK.examples()[0]
    assert TASK.grade(type(example)(example.prompt, "42"), answer) is right


def test_grading_reads_commas_between_thousands():
    example = TASK.examples()[0]
    assert TASK.grade(type(example)(example.prompt, "1188"), "In all that is 1,188 eggs.")


def test_registry_names_tasks_and_reads_mixture_entries():
    assert {name: get_task(name).name for name in TASKS} == {name: name for name in TASKS}
    assert parse_mixture_entry("identity:500") == ("identity", 500, 1)
    assert parse_mixture_entry("chitchat") == ("chitchat", None, 1)
    assert parse_mixture_entry("mmlu*3") == ("mmlu", None, 3)
    assert parse_mixture_entry("files:my talks/*.jsonl") == ("files:my talks/*.jsonl", None, 1)
    assert parse_mixture_entry("files:a.jsonl:50*2") == ("files:a.jsonl", 50, 2)
    assert parse_mixture_entry(" identity : 50 * 2 ") == ("identity", 50, 2)
    with pytest.raises(UsageError, match="did you mean identity"):
        get_task("identiti")
    for bad in ("identity:", "identity:-1", "identity:0", "identity:many"):
        with pytest.raises(UsageError, match=re.escape(bad)):
            parse_mixture_entry(bad)
