"""GSM8K: calls from its marks, both readings of an answer, and the real data graded by itself."""

import json
import re
from pathlib import Path

import pytest

from jaxchat.errors import DataError
from jaxchat.tasks import get_task, gsm8k
from jaxchat.tasks.base import Example, MissingData, TaskFiles
from jaxchat.tasks.gsm8k import GSM8K, solution
from jaxchat.tools.calculator import calculate

DATA = Path(__file__).resolve().parent.parent.parent / "shared/data"
needs_data = pytest.mark.skipif(not (DATA / "gsm8k/train.jsonl").exists(), reason=f"no GSM8K in {DATA}")


def text_of(message):
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def test_marks_become_calls_and_outputs_are_our_calculators():
    message = solution("He sold 48/2 = <<48/2=24.0>>24 clips, a third: <<1/3=.33>>.33 of it.\n#### 24")
    assert message["content"] == [
        {"type": "text", "text": "He sold 48/2 = "},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        {"type": "text", "text": "24 clips, a third: "},
        {"type": "python", "text": "1/3"},
        {"type": "python_output", "text": "0.3333333333"},
        {"type": "text", "text": ".33 of it.\n#### 24"},
    ]


def test_a_mark_that_the_calculator_refuses_is_left_out():
    assert solution("All: <<+7+3=10>>10 or <<2**3=8>>8\n#### 10")["content"] == [
        {"type": "text", "text": "All: "}, {"type": "text", "text": "10 or "}, {"type": "text", "text": "8\n#### 10"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "strict", "lenient", "well_formed"),
    [
        ("so 30 + 42 = 72.\n#### 72", True, True, True),
        ("#### 7,2", True, True, True),
        ("#### 72 \n", True, True, True),
        ("#### 72.0", False, True, True),  # text is compared, as the authors do
        ("#### 72.", False, True, False),
        ("#### $72", False, True, False),
        ("####72", False, True, False),
        ("#### 7\n#### 72", False, True, False),  # strict takes the first, lenient the last
        ("#### 72\n#### 7", True, False, False),
        ("#### 72 clips", True, True, False),
        ("The answer is 72.", False, True, False),
        ("The answer is: $72 of 100", False, True, False),
        ("x = 70, y = 72, over 3 days", False, True, False),
        ("at last 100 - 28 gives 72", False, True, False),
        ("0072.000", False, True, False),
        ("-72", False, False, False),
        ("144-72", False, True, False),
        ("#### 73 because 72", False, False, False),
        ("seventy-two", False, False, False),
        ("", False, False, False),
        ("####", False, False, False),
        ("#### ", False, False, False),
        ("9" * 100_000, False, False, False),
        ("#### " + "9" * 100_000, False, False, True),
        ("\ufffd\ufffd #### \ufffd", False, False, False),
    ],
)
def test_strict_and_lenient(answer, strict, lenient, well_formed):
    task, example = GSM8K(TaskFiles()), Example([], "72")
    assert task.grade(example, answer) is strict
    assert task.readings(example, answer) == {"lenient": lenient, "format": well_formed}


@needs_data
def test_every_solution_of_the_training_set_grades_itself_right():
    task = get_task("gsm8k", TaskFiles(str(DATA)))
    conversations, examples = task.train_conversations(None, 0), task.train_examples(0)
    assert len(conversations) == len(examples) == 7473 and len(task.examples()) == 1319
    calls = 0
    for conversation, example in zip(conversations, examples, strict=True):
        assert conversation[:1] == example.prompt
        answer = text_of(conversation[1])
        assert task.grade(example, answer) and task.readings(example, answer) == {"lenient": True, "format": True}
        assert "<<" not in answer and ">>" not in answer
        for call, output in zip(conversation[1]["content"], conversation[1]["content"][1:], strict=False):
            if call["type"] == "python":
                assert output == {"type": "python_output", "text": calculate(call["text"])}
                calls += 1
    assert calls == 23_716 - 14  # marks of the set, less those that our calculator refuses
    shown = {e.prompt[0]["content"] for e in examples}
    assert not shown & {e.prompt[0]["content"] for e in task.examples()}


@needs_data
def test_a_count_draws_the_same_ones_for_the_same_seed():
    task = GSM8K(TaskFiles(str(DATA)))
    some = task.train_conversations(20, 5)
    assert len(some) == 20 and some == task.train_conversations(20, 5) != task.train_conversations(20, 6)
    assert len(task.train_conversations(10**6, 5)) == 7473


@needs_data
def test_parquet_in_the_hubs_layout_reads_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in (DATA / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()]
    folder = tmp_path / "openai/gsm8k/main"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
    assert GSM8K(TaskFiles(str(tmp_path))).examples() == GSM8K(TaskFiles(str(DATA))).examples()


@pytest.mark.parametrize(
    "line", ['{"question": "q", "solution": "#### 5"}', '{"question": "q", "answer": "five"}', "{"]
)
def test_a_damaged_row_is_named(tmp_path, line):
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "a #### 1"}\n' + line)
    with pytest.raises(DataError, match=r"test\.jsonl:2"):
        GSM8K(TaskFiles(str(tmp_path))).examples()


def test_missing_files_say_what_to_fetch(tmp_path):
    with pytest.raises(MissingData, match=r"gsm8k/test\.jsonl.*openai/gsm8k"):
        GSM8K(TaskFiles(str(tmp_path))).examples()
    assert re.fullmatch("[0-9a-f]{40}", gsm8k.REVISION)
