"""MMLU and ARC: multiple-choice exams for chat models, in the wording of nanochat's models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxchat.data.hub import HubFiles
from jaxchat.data.sources import read_records
from jaxchat.errors import DataError
from jaxchat.tasks.base import ChoiceExample, ChoiceTask, Conversation, FileTask, assistant, parse_rows, user

T = TypeVar("T")
LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J")


def question(text: str, letters: Sequence[str], options: Sequence[str]) -> str:
    """Return the question as it is put to the model.

    The letter stands behind its option without a space, so that it is the same token that the answer begins with.
    """
    lines = "".join(f"- {option}={letter}\n" for letter, option in zip(letters, options, strict=True))
    return f"Multiple Choice question: {text}\n{lines}\nRespond only with the letter of the correct answer."


def choice_example(
    text: str, options: Sequence[str], right: int, letters: Sequence[str] = LETTERS, **tags: str
) -> ChoiceExample:
    """Return a question whose right option is number `right`; `ValueError` if there is no such option."""
    letters = tuple(letters[: len(options)])
    if not 0 <= right < len(options):
        raise ValueError(f"answer {right} of {len(options)} options")
    return ChoiceExample([user(question(text, letters, options))], letters, right, tags)


class ChoiceFileTask(FileTask, ChoiceTask):
    """A multiple-choice exam from files of the hub, or of a mirror."""

    chance = 0.25
    auto = chat_core = True

    def conversation(self, row: dict[str, Any]) -> Conversation:
        example = self.example(row)
        return [*example.prompt, assistant(example.letters[example.right])]


class MMLU(ChoiceFileTask):
    """MMLU (2009.03300): 14,042 questions from 57 subjects. Its auxiliary training set is made of other exams."""

    name, title = "mmlu", "MMLU"

    def paths(self, split: str) -> list[Path]:
        name, tables = ("test", ["*_test.csv"]) if split == "test" else ("auxiliary_train", [])
        folders = ("cais/mmlu/", "mmlu/", "")
        patterns = [f"{folder}{pattern}" for folder in folders for pattern in (f"all/{name}-*.parquet", *tables)]
        revision, files = "c30699e8356da336a370243923dbaf21066bb9fe", (f"all/{name}-00000-of-00001.parquet",)
        return self.files.find(patterns, HubFiles("cais/mmlu", revision, files))

    def parsed(self, split: str, parse: Callable[[dict[str, Any]], T]) -> list[T]:
        paths = self.paths(split)
        return [i for p in paths for i in parse_rows(p, parse, csv_rows if p.suffix == ".csv" else read_records)]

    def example(self, row: dict[str, Any]) -> ChoiceExample:
        return choice_example(row["question"], row["choices"], row["answer"], subject=row["subject"])


def csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a table of MMLU as those of the hub; the file is named after the subject.

    Texts stand in quotes, and quotes inside them are not doubled: a record ends with a quote, a comma and a number.
    """
    header, _, body = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    for record in filter(str.strip, re.split(r'(?<=",\d)\r?\n', body)):
        quoted, _, answer = record.rpartition('",')
        text, *choices = quoted.removeprefix('"').split('","')
        if header.strip() != "question,A,B,C,D,answer" or len(choices) != 4 or not answer.strip().isdecimal():
            raise DataError(f"{path}: not a record of question, A, B, C, D, answer: {record[:80]!r}")
        subject = path.name.removesuffix("_test.csv")
        yield str(path), {"question": text, "choices": choices, "answer": int(answer), "subject": subject}


class ArcEasy(ChoiceFileTask):
    """ARC (1803.05457): 2,376 easy school science questions. CORE's copy of the test set serves too."""

    name, title = "arc_easy", "ARC-Easy"

    def paths(self, split: str) -> list[Path]:
        folders = [f"{place}{self.title}" for place in ("allenai/ai2_arc/", "ai2_arc/", "arc/", "")]
        patterns = [f"{folder}/{split}-*.parquet" for folder in folders]
        if split == "test":
            patterns += [f"{place}{self.name}.jsonl" for place in ("core/", "**/eval_data/**/", "")]
        revision, files = "210d026faf9955653af8916fad021475a3f00453", (f"{self.title}/{split}-00000-of-00001.parquet",)
        return self.files.find(patterns, HubFiles("allenai/ai2_arc", revision, files))

    def example(self, row: dict[str, Any]) -> ChoiceExample:
        if "query" in row:  # CORE's form
            return choice_example(row["query"].removeprefix("Question: "), row["choices"], row["gold"])
        letters = row["choices"]["label"]
        return choice_example(row["question"], row["choices"]["text"], letters.index(row["answerKey"]), letters)


class ArcChallenge(ArcEasy):
    """The 1,172 questions of ARC that simple methods get wrong."""

    name, title = "arc_challenge", "ARC-Challenge"
