"""Generated tasks: exam questions are never trained, solutions are right, grading is strict; and the registry."""

import re
from collections import Counter

import pytest
from small_model import tokenizer

from jaxchat.chat import render
from jaxchat.engine.request import Turn
from jaxchat.errors import UsageError
from jaxchat.tasks import TASKS, get_task, parse_mixture_entry
from jaxchat.tasks.base import Example
from jaxchat.tasks.generated import MentalSums, WordProblems, spelling_solution, words
from jaxchat.tasks.identity import TEXTS
from jaxchat.tools.calculator import calculate

ARITHMETIC, SPELLING, PROBLEMS = get_task("arithmetic"), get_task("spelling_bee"), get_task("word_problems")
CASE = re.compile(r"(\d+) ?([-+*]) ?(\d+)")


def pairs(examples):
    found = [CASE.search(e.prompt[0]["content"]).groups() for e in examples]
    return {(min(int(a), int(b)), max(int(a), int(b))) for a, _, b in found}


def test_sums_are_right_and_never_negative():
    for example in [*ARITHMETIC.examples(), *ARITHMETIC.train_examples(3)[:2000]]:
        a, sign, b = CASE.search(example.prompt[0]["content"]).groups()
        result = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert example.expected == str(result) and result >= 0


def test_exam_pairs_are_not_trained():
    exam = ARITHMETIC.examples()
    assert len(exam) == 512 and exam == ARITHMETIC.examples()
    trained = [Example(c[:1], c[1]["content"][0]["text"]) for c in ARITHMETIC.train_conversations(3000, 1)]
    assert not pairs(exam) & pairs([*trained, *ARITHMETIC.train_examples(1)])
    assert all(ARITHMETIC.grade(e, e.expected) for e in trained)
    assert len({e.tags["kind"] for e in exam}) == 8


@pytest.mark.parametrize(
    ("answer", "right"),
    [("42", True), (" 42\n", True), ("042", False), ("42.", False), ("42.0", False), ("= 42", False), ("4 2", False),
     ("", False), ("4" * 100_000, False), ("\ufffd", False)],
)  # fmt: skip
def test_arithmetic_is_an_exact_match(answer, right):
    assert ARITHMETIC.grade(Example([], "42"), answer) is right


WORDING = {word for text in TEXTS["spelling_bee"]["questions"] for word in re.findall("[a-z]+", text.lower())}


def test_a_spelling_spells_counts_and_checks():
    assert spelling_solution("strawberry", "r")["content"] == [
        {"type": "text", "text": "strawberry: s, t, r 1, a, w, b, e, r 2, r 3, y. Check: "},
        {"type": "python", "text": "'strawberry'.count('r')"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": " The letter r is there 3 times."},
    ]


def test_exam_words_are_not_trained():
    exam, train = words(True), words(False)
    assert len(train) > 5000 and len(exam) > 500 and not set(exam) & set(train)
    texts = [c[0]["content"] for c in SPELLING.train_conversations(500, 1)]
    texts += [e.prompt[0]["content"] for e in SPELLING.train_examples(1)[:500]]
    asked = [set(re.findall("[a-z]+", text)) for text in texts]
    assert not any((set(exam) - WORDING) & found for found in asked) and all(set(train) & found for found in asked)
    assert all(set(exam) & set(re.findall("[a-z]+", e.prompt[0]["content"])) for e in SPELLING.examples())


def test_every_solution_grades_itself_right_and_is_answered_by_the_calculator():
    for conversation in SPELLING.train_conversations(300, 3):
        parts = conversation[1]["content"]
        word, letter = parts[1]["text"][1:-1].split("'.count('")
        example = Example(conversation[:1], str(word.count(letter.rstrip("'"))))
        assert SPELLING.grade(example, "".join(p["text"] for p in parts if p["type"] == "text"))
        turn = Turn(tokenizer())
        ids, _ = render(tokenizer(), [*conversation[:1], {"role": "assistant", "content": parts[:2]}])
        for token in ids[ids.index(tokenizer().special["<|assistant_start|>"]) + 1 : -1]:
            turn.add(token)
        assert tokenizer().decode(turn.tool_output()[1:-1]) == parts[2]["text"] == example.expected


def test_examples_are_always_the_same_and_have_every_count():
    exam = SPELLING.examples()
    assert len(exam) == 256 and exam == SPELLING.examples() and SPELLING.train_examples(1) != SPELLING.train_examples(2)
    assert {e.tags["times"] for e in exam} == {"0", "1", "2", "3 or more"}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("3", True), ("r 1, r 2, so 3 times.", True), ("3 or 4", False), ("three", False), ("", False), ("13", False),
     ("9" * 100_000, False), ("\ufffd", False)],
)  # fmt: skip
def test_spelling_grades(answer, right):
    assert SPELLING.grade(Example([], "3"), answer) is right


NUMBER = re.compile(r"\d+")


def test_problems_never_shows_an_exam_pair():
    trained = set()
    for conversation in PROBLEMS.train_conversations(3000, seed=1):
        for message in conversation[::2]:
            if len(pair := NUMBER.findall(message["content"])) == 2:
                trained.add(frozenset(map(int, pair)))
    examined = {frozenset(map(int, NUMBER.findall(e.prompt[-1]["content"]))) for e in PROBLEMS.examples()}
    assert len(trained) > 1500 and len(examined) > 150
    assert not trained & examined


def test_solutions_are_the_calculators():
    taught = [len(m["content"]) for c in PROBLEMS.train_conversations(99, seed=2) for m in c if m["role"] != "user"]
    assert taught.count(3) > 90, "without mental sums every problem shows the calculator"
    kinds, in_the_head = Counter(), 0
    for conversation in MentalSums().train_conversations(500, seed=2):
        assert [m["role"] for m in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
            if len(answer["content"]) == 1:  # small talk before the problem, or a sum in the head
                numbers = NUMBER.findall(question["content"])
                in_the_head += bool(numbers)
                assert not numbers or str(sum(map(int, numbers))) in NUMBER.findall(answer["content"][0]["text"])
                continue
            call, output, text = answer["content"]
            assert (call["type"], output["type"], text["type"]) == ("python", "python_output", "text")
            assert calculate(call["text"]) == output["text"]
            assert output["text"] in NUMBER.findall(text["text"])
            assert sorted(NUMBER.findall(call["text"])) == sorted(NUMBER.findall(question["content"]))
            assert "{" not in question["content"] + text["text"]
            kinds[re.sub(r"\d+", "", call["text"])] += 1
    assert set(kinds) == {"+", "-", "*", "/"} and 0.6 < in_the_head / (in_the_head + kinds["+"]) < 0.8


def test_same_seed_same_conversations_and_a_fixed_exam():
    assert PROBLEMS.train_conversations(50, 3) == PROBLEMS.train_conversations(50, 3)
    assert PROBLEMS.train_conversations(50, 3) != PROBLEMS.train_conversations(50, 4)
    assert PROBLEMS.examples() == WordProblems().examples() and len(PROBLEMS.examples()) == 256


def test_the_exam_is_right_by_independent_arithmetic():
    for example in PROBLEMS.examples():
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
def test_problem_grades(answer, right):
    example = PROBLEMS.examples()[0]
    assert PROBLEMS.grade(type(example)(example.prompt, "42"), answer) is right


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
