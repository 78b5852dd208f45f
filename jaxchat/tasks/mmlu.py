"""MMLU (2009.03300): 14,042 multiple-choice questions from 57 subjects, and 99,842 others to train on."""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxchat.errors import DataError
from jaxchat.log import say
from jaxchat.tasks.base import ChoiceExample, ChoiceTask, Conversation, drawn, sound
from jaxchat.tasks.files import HubFiles, TaskFiles, read_parquet
from jaxchat.tasks.multiple_choice import conversation, example

REPO, REVISION = "cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe"
TEST = HubFiles(REPO, REVISION, ("all/test-00000-of-00001.parquet",))
TRAIN = HubFiles(REPO, REVISION, ("all/auxiliary_train-00000-of-00001.parquet",))
FOLDERS = ("cais/mmlu/", "mmlu/", "")
TEST_PATTERNS = tuple(f"{f}{name}" for f in FOLDERS for name in ("all/test-*.parquet", "*_test.csv"))
TRAIN_PATTERNS = tuple(f"{f}all/auxiliary_train-*.parquet" for f in FOLDERS)
COLUMNS = ("question", "subject", "choices", "answer")
SUBJECTS = 57
HEADER = ["question", "A", "B", "C", "D", "answer"]


class MMLU(ChoiceTask):
    name = "mmlu"
    chance = 0.25

    def __init__(self, files: TaskFiles):
        self.files = files
        self.damaged: list[str] = []

    @functools.cached_property
    def _examples(self) -> list[ChoiceExample]:
        paths = self.files.find(TEST_PATTERNS, TEST)
        found = sound((question for path in paths for question in _read(path)), self.damaged)
        if (subjects := len({e.tags["subject"] for e in found})) != SUBJECTS:
            say(f"  mmlu: the data has {subjects} of {SUBJECTS} subjects; its score is of these alone", style="yellow")
        return found

    def examples(self) -> Sequence[ChoiceExample]:
        return self._examples

    def fetch(self) -> Sequence[Path]:
        return self.files.find(TRAIN_PATTERNS, TRAIN)

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        """From the auxiliary training set, which other exams' questions make up, not MMLU's own."""
        found = [question() for path in self.files.find(TRAIN_PATTERNS, TRAIN) for question in _read(path)]
        return (conversation(found[i]) for i in drawn(count, len(found), seed))


def _read(path: Path) -> Iterator[Callable[[], ChoiceExample]]:
    if path.suffix == ".csv":
        yield from _read_csv(path)
        return
    for number, row in read_parquet(path, COLUMNS):
        parts = row["question"], row["choices"], row["answer"], f"{path}, row {number}"
        yield functools.partial(example, *parts, subject=row["subject"])


def _read_csv(path: Path) -> Iterator[Callable[[], ChoiceExample]]:
    """A file of one subject, which its name says; the answer is a number from 0 to 3."""
    subject = path.name.removesuffix("_test.csv")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not text.strip():
        raise DataError(f"{path}: empty")
    for line, row in records(text):
        where = f"{path}, line {line}"
        if line == 1:
            if row != HEADER:
                raise DataError(f"{path}: the columns are {', '.join(row)}, not {', '.join(HEADER)}")
        else:
            yield functools.partial(_question, row, where, subject)


def _question(row: list[str], where: str, subject: str) -> ChoiceExample:
    if len(row) != len(HEADER):
        raise DataError(f"{where}: {len(row)} fields, not {len(HEADER)}")
    answer = int(row[-1]) if row[-1].isdecimal() else row[-1]
    return example(row[0], row[1:5], answer, where, subject=subject)


def records(text: str) -> list[tuple[int, list[str]]]:
    """(first line, fields) of every record, also where quotes inside a field are not doubled.

    Copies of the set exist that were written so: every text in quotes, whatever it holds. Of such a file a record ends
    where a line ends in a quote, a comma and a number.
    """
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    found, line = [], 1
    try:
        for row in rows:
            found.append((line, row))
            line = rows.line_num + 1
        return [(line, row) for line, row in found if row]
    except csv.Error:
        pass
    header, _, body = text.partition("\n")
    found, line = [(1, header.strip().split(","))], 2
    for record in re.split(r'(?<=",\d)\r?\n', body):
        if record.strip():
            texts, _, answer = record.rpartition('",')
            found.append((line, [*texts.removeprefix('"').split('","'), answer.strip()]))
        line += record.count("\n") + 1
    return found
