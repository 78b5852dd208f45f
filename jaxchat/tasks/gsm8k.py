"""GSM8K (2110.14168): 8,792 school word problems with worked solutions; 1,319 of them are the exam.

A solution's `<<12*3=36>>` marks become calculator calls. Their outputs are recomputed by our own calculator, so that
training shows what the engine will answer; the few marks that it refuses are left out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from jaxchat.errors import DataError
from jaxchat.tasks.base import Conversation, Example, Message, WrittenTask, assistant, drawn, sound, user
from jaxchat.tasks.files import HubFiles, TaskFiles, read_jsonl, read_parquet
from jaxchat.tools.calculator import calculate

REPO, REVISION = "openai/gsm8k", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c"
FOLDERS = ("gsm8k/", f"{REPO}/main/", "gsm8k/main/", "main/", "")
COLUMNS = ("question", "answer")
MARK = "####"  # what the result stands behind

_CALL = re.compile(r"<<([^<>=]*)=[^<>]*>>")
_NUMBER = r"(?:(?<![\w)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"  # the minus of 5-3 is none of 3
_STRICT = re.compile(rf"{MARK} (-?[0-9.,]+)")  # the pattern of the data set's authors; the first one counts
_WELL_FORMED = re.compile(rf"^{MARK} -?\d[\d,]*(?:\.\d+)?\s*\Z", re.M)
_LENIENT = (
    re.compile(rf"{MARK}\s*({_NUMBER})"),
    re.compile(rf"answer is:?\s*({_NUMBER})", re.I),
    re.compile(rf"=\s*({_NUMBER})"),
    re.compile(rf"({_NUMBER})"),
)


class GSM8K(WrittenTask):
    """Right is the number after `####`, commas removed, compared as text."""

    name = "gsm8k"
    title = "GSM8K"
    auto = True
    chat_core = True
    max_tokens = 512  # nanochat's limit; a solution is rarely half as long

    def __init__(self, files: TaskFiles):
        self.files = files
        self.damaged: list[str] = []

    def examples(self) -> Sequence[Example]:
        return self._examples

    @functools.cached_property
    def _examples(self) -> list[Example]:
        return [_asked(*row) for row in sound(_rows(self.files, "test"), self.damaged)]

    def setting(self) -> Sequence[str]:
        return (f"{self.max_tokens} tokens",)

    def fetch(self) -> Sequence[Path]:
        return _paths(self.files, "train")

    def train_examples(self, seed: int) -> Sequence[Example]:
        """All training questions, in the order of the file: RL has an order of its own."""
        return [_asked(*row()) for row in _rows(self.files, "train")]

    def train_conversations(self, count: int | None, seed: int) -> list[Conversation]:
        rows = [row() for row in _rows(self.files, "train")]
        return [[user(rows[i][0]), solution(rows[i][1])] for i in drawn(count, len(rows), seed)]

    def grade(self, example: Example, answer: str) -> bool:
        return strict_answer(answer) == example.expected

    def readings(self, example: Example, answer: str) -> dict[str, bool]:
        """`lenient`: the number after "####", "answer is" or "=" or simply the last one, compared as a number;
        `format`: the answer ends with one well-formed `####` line."""
        found = lenient_answer(answer)
        lenient = found is not None and found == _value(str(example.expected))
        return {"lenient": lenient, "format": answer.count(MARK) == 1 and bool(_WELL_FORMED.search(answer))}


def _asked(question: str, text: str) -> Example:
    return Example([user(question)], strict_answer(text))


@functools.cache
def _paths(files: TaskFiles, split: str) -> list[Path]:
    names = (f"{split}.jsonl", f"{split}-*.parquet")
    hub = HubFiles(REPO, REVISION, (f"main/{split}-00000-of-00001.parquet",))
    return files.find([folder + name for folder in FOLDERS for name in names], hub)


def _rows(files: TaskFiles, split: str) -> Iterator[Callable[[], tuple[str, str]]]:
    """What makes (question, solution) of every problem."""
    return (row for path in _paths(files, split) for row in _read(path))


def solution(text: str) -> Message:
    """A worked solution as an assistant's message: its marks are calls with our calculator's outputs."""
    parts: list[tuple[str, str] | str] = []
    end = 0
    for mark in _CALL.finditer(text):
        parts.append(text[end : mark.start()])
        end = mark.end()
        expression = mark[1].strip()
        if (result := calculate(expression)) is not None:
            parts += [("python", expression), ("python_output", result)]
    return assistant(*(part for part in (*parts, text[end:]) if part))


def strict_answer(text: str) -> str | None:
    """What stands after the first `####`, commas removed; None where nothing does."""
    found = _STRICT.search(text)
    return found[1].replace(",", "") if found else None


def lenient_answer(text: str) -> Fraction | None:
    """The last number of the first kind that the text has."""
    for pattern in _LENIENT:
        if found := pattern.findall(text):
            return _value(found[-1])
    return None


def _value(text: str) -> Fraction | None:
    digits = text.replace(",", "").replace("$", "")
    return Fraction(digits) if len(digits) <= 40 else None  # reading 100 kB of digits would take a while


def _read(path: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    kind = "line" if path.suffix == ".jsonl" else "row"
    for number, row in read_jsonl(path) if kind == "line" else read_parquet(path, COLUMNS):
        yield functools.partial(_problem, row, f"{path}, {kind} {number}")


def _problem(row: dict[str, Any], where: str) -> tuple[str, str]:
    """`DataError` for a row that is no problem with its solution."""
    question, answer = (row.get(name) for name in COLUMNS)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(f"{where}: needs the texts {' and '.join(COLUMNS)}; it has {', '.join(row) or 'nothing'}")
    if strict_answer(answer) is None:
        raise DataError(f"{where}: the answer has no result after {MARK}")
    return question, answer
