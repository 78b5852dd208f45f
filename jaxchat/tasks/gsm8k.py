"""GSM8K (2110.14168): 8,792 school word problems with worked solutions; 1,319 of them are the exam.

The `<<12*3=36>>` marks of a solution become calculator calls. Our own calculator recomputes their outputs, so that
training shows what the engine will answer; the few marks that it refuses are left out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from jaxchat.data.hub import HubFiles
from jaxchat.tasks.base import Conversation, Example, Message, WrittenTask, assistant, parse_rows, sample, user
from jaxchat.tools.calculator import calculate

REPO, REVISION = "openai/gsm8k", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c"
FOLDERS = ("gsm8k/", f"{REPO}/main/", "gsm8k/main/", "main/", "")
MARK = "####"  # before the result

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
    """An answer is right if the number after `####`, without commas, equals the result as text."""

    name, title = "gsm8k", "GSM8K"
    auto = chat_core = True
    max_tokens = 512  # nanochat's limit; a solution is rarely half as long

    def examples(self) -> Sequence[Example]:
        return self._examples

    @functools.cached_property
    def _examples(self) -> list[Example]:
        return [Example([user(question)], result) for question, _, result in self._rows("test")]

    def setting(self) -> Sequence[str]:
        return (f"{self.max_tokens} tokens",)

    def fetch(self) -> Sequence[Path]:
        return self._paths("train")

    def train_examples(self, seed: int) -> Sequence[Example]:
        """Return all training questions in the order of the file; RL shuffles them."""
        return [Example([user(question)], result) for question, _, result in self._rows("train")]

    def train_conversations(self, count: int | None, seed: int) -> list[Conversation]:
        return [[user(question), solution(text)] for question, text, _ in sample(self._rows("train"), count, seed)]

    def grade(self, example: Example, answer: str) -> bool:
        return strict_answer(answer) == example.expected

    def readings(self, example: Example, answer: str) -> dict[str, bool]:
        """Grade leniently, and say whether the answer ends with one well-formed `####` line.

        `lenient` compares numbers: the one after "####", "answer is" or "=", or simply the last one.
        """
        number = lenient_answer(answer)
        lenient = number is not None and number == _value(str(example.expected))
        return {"lenient": lenient, "format": answer.count(MARK) == 1 and bool(_WELL_FORMED.search(answer))}

    def _paths(self, split: str) -> list[Path]:
        names = (f"{split}.jsonl", f"{split}-*.parquet")
        hub = HubFiles(REPO, REVISION, (f"main/{split}-00000-of-00001.parquet",))
        return self.files.find([folder + name for folder in FOLDERS for name in names], hub)

    def _rows(self, split: str) -> list[tuple[str, str, str]]:
        """Return (question, solution, result) of every problem."""
        return [row for path in self._paths(split) for row in parse_rows(path, _parse)]


def _parse(row: dict[str, Any]) -> tuple[str, str, str]:
    if (result := strict_answer(row["answer"])) is None:
        raise ValueError(f"no result after {MARK}")
    return row["question"], row["answer"], result


def solution(text: str) -> Message:
    """Return a worked solution as an assistant message whose marks are calculator calls with our outputs."""
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
    """Return what follows the first `####`, without commas; None if nothing does."""
    found = _STRICT.search(text)
    return found[1].replace(",", "") if found else None


def lenient_answer(text: str) -> Fraction | None:
    """Return the last number of the first kind that occurs in the text."""
    for pattern in _LENIENT:
        if found := pattern.findall(text):
            return _value(found[-1])
    return None


def _value(text: str) -> Fraction | None:
    digits = text.replace(",", "").replace("$", "")
    return Fraction(digits) if len(digits) <= 40 else None  # reading 100 kB of digits would take a while
