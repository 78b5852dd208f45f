"""GSM8K (2110.14168): 8,792 school word problems with worked solutions; 1,319 of them are the exam.

The `<<12*3=36>>` marks of a solution become calculator calls. Our own calculator recomputes their outputs, so that
training shows what the engine will answer; the few marks that it refuses are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from jaxchat.data.hub import HubFiles
from jaxchat.tasks.base import Conversation, Example, FileTask, Message, WrittenTask, assistant, user
from jaxchat.tools.calculator import calculate

REPO, REVISION = "openai/gsm8k", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c"
FOLDERS = ("gsm8k/", f"{REPO}/main/", "gsm8k/main/", "main/", "")
MARK = "####"  # before the result

_NUMBER = r"(?:(?<![\w)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"  # the minus of 5-3 is none of 3
_LENIENT = (rf"{MARK}\s*({_NUMBER})", rf"(?i:answer is):?\s*({_NUMBER})", rf"=\s*({_NUMBER})", rf"({_NUMBER})")


class GSM8K(FileTask, WrittenTask):
    """An answer is right if the number after `####`, without commas, equals the result as text."""

    name, title = "gsm8k", "GSM8K"
    auto = chat_core = True
    max_tokens = 512  # nanochat's limit; a solution is rarely half as long

    def paths(self, split: str) -> list[Path]:
        names = (f"{split}.jsonl", f"{split}-*.parquet")
        hub = HubFiles(REPO, REVISION, (f"main/{split}-00000-of-00001.parquet",))
        return self.files.find([folder + name for folder in FOLDERS for name in names], hub)

    def example(self, row: dict[str, Any]) -> Example:
        if (result := strict_answer(row["answer"])) is None:
            raise ValueError(f"no result after {MARK}")
        return Example([user(row["question"])], result)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        return [*self.example(row).prompt, solution(row["answer"])]

    def train_examples(self, seed: int) -> Sequence[Example]:
        """Return all training questions in the order of the file; RL shuffles them."""
        return self.parsed("train", self.example)

    def setting(self) -> Sequence[str]:
        return (f"{self.max_tokens} tokens",)

    def grade(self, example: Example, answer: str) -> bool:
        return strict_answer(answer) == example.expected

    def readings(self, example: Example, answer: str) -> dict[str, bool]:
        """Grade leniently, and say whether the answer ends with one well-formed `####` line.

        `lenient` compares numbers: the one after "####", "answer is" or "=", or simply the last one.
        """
        number = lenient_answer(answer)
        well_formed = re.search(rf"^{MARK} -?\d[\d,]*(?:\.\d+)?\s*\Z", answer, re.M)
        return {
            "lenient": number is not None and number == _value(example.expected),
            "format": answer.count(MARK) == 1 and bool(well_formed),
        }


def solution(text: str) -> Message:
    """Return a worked solution as an assistant message whose marks are calculator calls with our outputs."""
    parts: list[tuple[str, str] | str] = []
    for i, piece in enumerate(re.split(r"<<([^<>=]*)=[^<>]*>>", text)):
        if i % 2 == 0:
            parts += [piece] if piece else []
        elif (result := calculate(piece.strip())) is not None:
            parts += [("python", piece.strip()), ("python_output", result)]
    return assistant(*parts)


def strict_answer(text: str) -> str | None:
    """Return what follows the first `####`, without commas; None if nothing does."""
    found = re.search(rf"{MARK} (-?[0-9.,]+)", text)  # the pattern of the data set's authors
    return found[1].replace(",", "") if found else None


def lenient_answer(text: str) -> Fraction | None:
    """Return the last number of the first kind that occurs in the text."""
    found = next((found for pattern in _LENIENT if (found := re.findall(pattern, text))), None)
    return _value(found[-1]) if found else None


def _value(text: str) -> Fraction | None:
    digits = text.replace(",", "").replace("$", "")
    return Fraction(digits) if len(digits) <= 40 else None  # reading 100 kB of digits would take a while
