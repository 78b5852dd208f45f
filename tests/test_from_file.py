"""Exams and RL environments from files: what rows are read, what is right, what a program of one's own may do."""

import json

import pytest

from jaxchat.config import load_config
from jaxchat.errors import DataError, UsageError
from jaxchat.scaling import resolve
from jaxchat.tasks import get_task
from jaxchat.tasks.base import NO_FILES, TaskFiles
from jaxchat.tasks.from_file import digest_of, name_of, same_number
from jaxchat.tools.sandbox import Policy, Sandbox
from train import evaluate, rl


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"files:{path}"


def sums(count=40):
    return [{"question": f"{i} + 1?", "answer": i + 1} for i in range(count)]


def grades(source, *answers):
    """The kind of every question and the grades of the answers to it."""
    task = get_task(source)
    return [(*e.expected, [task.grade(e, answer) for answer in answers]) for e in task.examples()]


@pytest.mark.parametrize(
    ("row", "kind", "right", "wrong"),
    [
        ({"question": "대한민국의 수도는?", "answer": "서울"}, "exact", ["서울", ' "서울." ', "서울"], ["부산", ""]),
        ({"problem": "one thousand", "answer": "1,234"}, "numeric", ["It is 1234 won", "약 1,234원"], ["234", "12,34"]),
        ({"query": "a half", "target": 0.5}, "numeric", ["1/2", "½ of it", "4 / 8", ".5"], ["1", "0.5 or 2", "1/0"]),
        ({"prompt": "minus", "expected": "-5"}, "numeric", ["\u22125", "x=-5", "-$5"], ["5", "10-5"]),
        ({"question": "units", "answer": "12 km", "match": "numeric"}, "numeric", ["12 miles"], ["km"]),
        ({"question": "days?", "answers": ["365", "365 days"]}, "exact", ["365 Days!", "365"], ["366"]),
        ({"question": "squad", "answers": {"text": ["Ann", "Bob"]}}, "exact", ["bob"], ["Eve"]),
        ({"input": [{"role": "user", "content": "evals"}], "ideal": "4"}, "numeric", ["4"], ["5"]),
        ({"question": "regex", "answer": r"^(?i)no\b", "match": "regex"}, None, [], []),
        ({"question": "regex", "answer": r"(?i)\bno\b", "match": "regex"}, "regex", ["Oh no, never"], ["know"]),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "numeric", ["3"], ["4"]),
        ({"question": "worked", "answer": "3 + 4 = 7.\n#### 7"}, "numeric", ["#### 7"], ["3"]),
        ({"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Ann"}]}, "exact", ["ann"],
         ["Ann and Bob"]),
        ({"question": "", "answer": "x"}, None, [], []),
        ({"question": "empty", "answer": " "}, None, [], []),
        ({"question": "null", "answer": None}, None, [], []),
        ({"question": "words", "answer": "one", "match": "numeric"}, None, [], []),
        ({"question": "kind", "answer": "one", "match": "similar"}, None, [], []),
        ("[1, 2]", None, [], []),
    ],
)  # fmt: skip
def test_rows_and_what_is_right(tmp_path, row, kind, right, wrong):
    source = write(tmp_path / "questions.jsonl", [row])
    if kind is None:
        with pytest.raises(DataError, match=r"questions\.jsonl:1"):
            get_task(source)
        return
    assert grades(source, *right, *wrong) == [(kind, [True] * len(right) + [False] * len(wrong))]


def test_numbers_are_equal_up_to_rounding_and_long_ones_are_none():
    assert same_number("0.333333333", "1/3") and not same_number("0.333", "1/3")
    assert not same_number("9" * 100_000, "9")


def test_few_bad_rows_are_left_out_and_repeated_questions_are_asked_once(tmp_path):
    source = write(tmp_path / "sums.jsonl", [*sums(), {"question": "?"}, *sums(5)])
    assert len(get_task(source).examples()) == 40
    with pytest.raises(DataError, match=r"sums\.jsonl:2"):
        get_task(write(tmp_path / "sums.jsonl", [sums()[0], {"question": "?"}]))


@pytest.mark.parametrize("more", [{"choices": ["no", "yes"]}, {"options": {"A": "no"}}, {"A": "no", "B": "yes"}])
def test_choices_are_refused_and_not_asked_without_them(tmp_path, more):
    with pytest.raises(DataError, match="choices"):
        get_task(write(tmp_path / "quiz.jsonl", [{"question": "q", "answer": "B"} | more]))


def test_a_multiple_choice_exam_is_no_environment():
    config = resolve(load_config("nano", ["rl.environment=mmlu"]))
    with pytest.raises(UsageError, match=r"rl\.environment"):
        rl.environment(config)


def test_names_come_from_the_file_and_never_from_another_exam(tmp_path):
    assert name_of("files:data/my sums.jsonl.gz") == "my_sums"
    assert name_of("files:quiz/*.json#own/grade.py") == "quiz"
    source = write(tmp_path / "gsm8k.jsonl", sums())
    task = get_task(source)
    assert task.name == "gsm8k_file" and not task.chat_core
    assert get_task(task.name, TaskFiles(own=(source,))).source == source
    (tmp_path / "other").mkdir()
    config = load_config("nano", [f'eval.exams=["{source}", "{write(tmp_path / "other" / "gsm8k.jsonl", sums())}"]'])
    with pytest.raises(UsageError, match="gsm8k_file"):
        evaluate.check(config)


def test_the_exam_asks_nothing_that_rl_trains_on(tmp_path):
    environment, exam = write(tmp_path / "train.jsonl", sums(200)), write(tmp_path / "exam.jsonl", sums(300))
    config = resolve(load_config("nano", [f"rl.environment={environment}", f'eval.exams=["{exam}"]']))
    task, questions = rl.environment(config)
    trained = {example.prompt[0]["content"] for example in questions}
    held_out = {example.prompt[0]["content"] for example in task.examples()}
    assert len(trained) + len(held_out) == 200 and not trained & held_out and 20 < len(held_out) < 60
    ((other, _),) = evaluate.exam_tasks(config)
    asked = {example.prompt[0]["content"] for example in other.examples()}
    assert asked == {row["question"] for row in sums(300)} - trained
    assert len(get_task(exam).examples()) == 300  # without RL, all of them
    with pytest.raises(DataError, match=r"rl\.environment"):
        rl.environment(resolve(load_config("nano", [f"rl.environment={write(tmp_path / 'one.jsonl', sums(1))}"])))


def test_a_changed_file_or_program_is_another_input(tmp_path):
    source, program = write(tmp_path / "sums.jsonl", sums()), tmp_path / "grade.py"
    program.write_text("def grade(question, answer): return True")
    digests = {digest_of([source]), digest_of([source + "#grade.py"]), digest_of(["gsm8k"])}
    program.write_text("def grade(question, answer): return False")
    digests.add(digest_of([source + "#grade.py"]))
    write(tmp_path / "sums.jsonl", sums(41))
    digests |= {digest_of([source]), digest_of([f"files:{tmp_path}/gone.jsonl"])}
    assert len(digests) == 6 and "" in digests


# ---- programs


def graded(folder, program, *answers):
    """(scores, outcomes) of a program's grades of the answers to different questions."""
    (folder / "grade.py").write_text(program)
    task = get_task(write(folder / "sums.jsonl", sums()) + "#grade.py")
    task.sandbox = Sandbox(Policy(cpu_seconds=1, seconds=2.0))
    return task, lambda: (task.grade_all(task.examples()[: len(answers)], answers), task.facts()["outcomes"])


def test_a_program_grades(tmp_path):
    _, result = graded(tmp_path, "def grade(q, a): return 1", "1")
    rl.check(resolve(load_config("nano", [f"rl.environment=files:{tmp_path}/sums.jsonl#grade.py"])))
    program = "def grade(question, answer):\n    print(answer)\n    return eval(question[:-1]) == int(answer)"
    _, result = graded(tmp_path, program, "1", "2", "5", "none")
    assert result() == ([1.0, 1.0, 0.0, 0.0], {"raised ValueError": 1, "scored": 3})
    task, result = graded(tmp_path, "def grade(q, a, expected): return 0.75 if a in expected else 0.25", "1", "1")
    assert result()[0] == [0.75, 0.25]
    assert [task.grade(e, "1") for e in task.examples()[:2]] == [True, False]


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("raise KeyError(answer)", "raised KeyError"),
        ("import os; os._exit(0)", "ended"),
        ("import sys; sys.exit()", "raised SystemExit"),
        ("import numpy; return True", "raised ModuleNotFoundError"),
        ("return 'yes'", "returned no number"),
        ("return None", "returned no number"),
        ("return 100", "returned a number that is not from 0 to 1"),
        ("return float('nan')", "returned a number that is not from 0 to 1"),
        ("return open('/etc/passwd').read() != ''", "raised PermissionError"),
        ("while True: pass", "timeout"),
        ("import os\n    for n in range(3, 99):\n        try: os.write(n, bytes([0, 0, 0, 2]) + b'[]')\n"
         "        except OSError: pass\n    return 1", "ended"),
    ],
)  # fmt: skip
def test_what_a_program_does_wrong_is_counted_and_ends_nothing(tmp_path, body, outcome):
    program = f"def grade(question, answer):\n    if answer != 'x': return 1\n    {body}"
    task, result = graded(tmp_path, program, "good", "good", "x", "good")
    assert result() == ([1.0, 1.0, 0.0, 1.0], {outcome: 1, "scored": 3})
    task, _ = graded(tmp_path, f"def grade(question, answer):\n    {body}")
    task.sandbox = Sandbox(Policy(cpu_seconds=1, seconds=2.0))
    if outcome != "timeout":  # seconds for each
        with pytest.raises(DataError, match="grade"):
            task.check()


@pytest.mark.parametrize("program", ["def grade(question, answer)", "def score(question, answer): return 1", ""])
def test_a_program_without_grade_is_refused(tmp_path, program):
    with pytest.raises(UsageError, match="grade"):
        graded(tmp_path, program)


def test_a_regular_expression_without_end_is_wrong(tmp_path):
    task = get_task(write(tmp_path / "q.jsonl", [{"question": "q", "answer": "(a+)+$", "match": "regex"}]))
    task.sandbox = Sandbox(Policy(cpu_seconds=1, seconds=2.0))
    assert task.grade_all([*task.examples() * 2], ["a" * 40 + "b", "aa"]) == [0.0, 1.0]
    assert NO_FILES.own == ()


def test_messages_are_questions_too_with_their_answer_elsewhere_or_none_for_a_program(tmp_path):
    asked = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
    ]
    source = write(tmp_path / "asked.jsonl", [{"messages": asked, "answer": "2"}])
    (example,) = get_task(source).examples()
    assert example.expected == {"numeric": ["2"]} and [turn["role"] for turn in example.prompt] == [
        "user",
        "assistant",
        "user",
    ]
    write(tmp_path / "asked.jsonl", [{"messages": asked}])
    with pytest.raises(DataError):
        get_task(source)
    (tmp_path / "grade.py").write_text("def grade(question, answer): return question == 'two?' and answer == '2'")
    task = get_task(source + "#grade.py")
    task.sandbox = Sandbox(Policy(cpu_seconds=1, seconds=2.0))
    assert task.grade_all([*task.examples() * 2], ["2", "3"]) == [1.0, 0.0]
