"""MMLU and ARC: multiple-choice exams for chat models, in the wording of nanochat's models."""

from __future__ import annotations

import functools
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxchat.data.hub import HubFiles
from jaxchat.errors import DataError
from jaxchat.log import say
from jaxchat.tasks.base import ChoiceExample, ChoiceTask, Conversation, assistant, parse_rows, sample, user

MMLU_DATA = ("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe")
ARC_DATA = ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453")
LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J")


def question(text: str, letters: Sequence[str], options: Sequence[str]) -> str:
    """Return the question as it is put to the model.

    The letter stands behind its option without a space, so that it is the same token that the answer begins with.
    """
    lines = "".join(f"- {option}={letter}\n" for letter, option in zip(letters, options, strict=True))
    return f"Multiple Choice question: {text}\n{lines}\nRespond only with the letter of the correct answer."


def example(
    text: str, options: Sequence[str], right: int, letters: Sequence[str] = LETTERS, **tags: str
) -> ChoiceExample:
    """Return a question whose right option is number `right`; `ValueError` if there is no such option."""
    letters = tuple(letters[: len(options)])
    if not 0 <= right < len(options):
        raise ValueError(f"answer {right} of {len(options)} options")
    return ChoiceExample([user(question(text, letters, options))], letters, right, tags)


class HubChoiceTask(ChoiceTask):
    """A multiple-choice exam from files of the hub, or of a mirror."""

    chance = 0.25
    auto = chat_core = True

    @abstractmethod
    def paths(self, split: str) -> list[Path]:
        """Return the files of split "test" or "train"."""

    @abstractmethod
    def parse(self, path: Path) -> list[ChoiceExample]:
        """Return the questions of a file."""

    @functools.cached_property
    def _examples(self) -> list[ChoiceExample]:
        return [e for path in self.paths("test") for e in self.parse(path)]

    def examples(self) -> Sequence[ChoiceExample]:
        return self._examples

    def fetch(self) -> Sequence[Path]:
        return self.paths("train")

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        examples = [e for path in self.paths("train") for e in self.parse(path)]
        for e in sample(examples, count, seed):
            yield [*e.prompt, assistant(e.letters[e.right])]


class MMLU(HubChoiceTask):
    """MMLU (2009.03300): 14,042 questions from 57 subjects. Its auxiliary training set is made of other exams."""

    name, title = "mmlu", "MMLU"
    subjects = 57

    def paths(self, split: str) -> list[Path]:
        name = {"test": "test", "train": "auxiliary_train"}[split]
        tables = {"test": ["*_test.csv"], "train": []}[split]
        folders = ("cais/mmlu/", "mmlu/", "")
        patterns = [f"{folder}{pattern}" for folder in folders for pattern in (f"all/{name}-*.parquet", *tables)]
        return self.files.find(patterns, HubFiles(*MMLU_DATA, (f"all/{name}-00000-of-00001.parquet",)))

    @functools.cached_property
    def _examples(self) -> list[ChoiceExample]:
        examples = super()._examples
        count = len({e.tags["subject"] for e in examples})
        if count != self.subjects:
            say(f"  mmlu: the data has {count} of {self.subjects} subjects; its score is of these alone", "yellow")
        return examples

    def parse(self, path: Path) -> list[ChoiceExample]:
        return list(map(_mmlu_example, csv_rows(path))) if path.suffix == ".csv" else parse_rows(path, _mmlu_example)


def _mmlu_example(row: dict[str, Any]) -> ChoiceExample:
    return example(row["question"], row["choices"], row["answer"], subject=row["subject"])


def csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table of MMLU as those of the hub; the file is named after the subject.

    Texts stand in quotes, and quotes inside them are not doubled: a record ends with a quote, a comma and a number.
    """
    header, _, body = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    for record in filter(str.strip, re.split(r'(?<=",\d)\r?\n', body)):
        quoted, _, answer = record.rpartition('",')
        question, *choices = quoted.removeprefix('"').split('","')
        if (
            header.strip() != "question,A,B,C,D,answer"
            or len(choices) != 4
            or answer.strip() not in ("0", "1", "2", "3")
        ):
            raise DataError(f"{path}: not a record of question, A, B, C, D, answer: {record[:80]!r}")
        subject = path.name.removesuffix("_test.csv")
        yield {"question": question, "choices": choices, "answer": int(answer), "subject": subject}


class ArcEasy(HubChoiceTask):
    """ARC (1803.05457): 2,376 easy school science questions. CORE's copy of the test set serves too."""

    name, title = "arc_easy", "ARC-Easy"

    def paths(self, split: str) -> list[Path]:
        folders = [f"{place}{self.title}" for place in ("allenai/ai2_arc/", "ai2_arc/", "arc/", "")]
        patterns = [f"{folder}/{split}-*.parquet" for folder in folders]
        if split == "test":
            patterns += [f"{place}{self.name}.jsonl" for place in ("core/", "**/eval_data/**/", "")]
        file = f"{self.title}/{split}-00000-of-00001.parquet"
        return self.files.find(
            patterns, HubFiles("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", (file,))
        )

    def parse(self, path: Path) -> list[ChoiceExample]:
        return parse_rows(path, _arc_example)


def _arc_example(row: dict[str, Any]) -> ChoiceExample:
    if "query" in row:  # CORE's form
        return example(row["query"].removeprefix("Question: "), row["choices"], row["gold"])
    letters = row["choices"]["label"]
    return example(row["question"], row["choices"]["text"], letters.index(row["answerKey"]), letters)


class ArcChallenge(ArcEasy):
    """The 1,172 questions of ARC that simple methods get wrong."""

    name, title = "arc_challenge", "ARC-Challenge"
