"""MMLU (2009.03300): 14,042 multiple-choice questions from 57 subjects, and 99,842 others to train on."""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import DataError
from jaxchat.log import say
from jaxchat.tasks.base import ChoiceExample, ChoiceTask, Conversation, assistant, drawn, sound, user
from jaxchat.tasks.files import HubFiles, TaskFiles, read_jsonl, read_parquet

# How a multiple-choice question is put to a chat model, and how its data becomes one.


LETTERS = "ABCDEFGHIJ"


def question(text: str, letters: Sequence[str], options: Sequence[str]) -> str:
    """The protocol of nanochat's models: the letter stands behind its option, without a space before it, so that it is
    the very token that the answer begins with."""
    lines = "".join(f"- {option}={letter}\n" for letter, option in zip(letters, options, strict=True))
    return f"Multiple Choice question: {text}\n{lines}\nRespond only with the letter of the correct answer."


def example(
    text: object, options: object, right: object, where: str, letters: Sequence[str] = LETTERS, **tags: str
) -> ChoiceExample:
    """`right` counts from 0. `DataError` begins with `where` if the parts are no question."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: no question")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) for o in options):
        raise DataError(f"{where}: no list of at least two options")
    if type(right) is not int or not 0 <= right < len(options):
        raise DataError(f"{where}: answer {right!r} is none of the {len(options)} options")
    letters = tuple(letters[: len(options)])
    if len(letters) < len(options) or len(set(letters)) < len(letters):
        raise DataError(f"{where}: {len(options)} options do not go with the letters {', '.join(letters)}")
    return ChoiceExample([user(question(text, letters, options))], letters, right, tags)


def conversation(question: ChoiceExample) -> Conversation:
    """The question with its right letter, for training."""
    return [*question.prompt, assistant(question.letters[question.right])]


# ARC (1803.05457): school science questions, 2,376 easy ones and 1,172 that simple methods get wrong.


ARC_REPO, ARC_REVISION = "allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453"
SETS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
CORE_START = "Question: "  # of the queries in CORE's copy, which is the same test set


class Arc(ChoiceTask):
    """`name`: one of `SETS`."""

    auto = chat_core = True
    chance = 0.25  # as ChatCORE counts it; a few questions have three or five options

    def __init__(self, name: str, files: TaskFiles):
        self.name, self.title, self.files = name, SETS[name], files
        self.damaged: list[str] = []

    @functools.cached_property
    def _examples(self) -> list[ChoiceExample]:
        core = (f"core/{self.name}.jsonl", f"**/eval_data/**/{self.name}.jsonl", f"{self.name}.jsonl")
        return sound(self._find("test", core), self.damaged)

    def examples(self) -> Sequence[ChoiceExample]:
        return self._examples

    def fetch(self) -> Sequence[Path]:
        return self._paths("train", ())

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        found = [question() for question in self._find("train", ())]
        return (conversation(found[i]) for i in drawn(count, len(found), seed))

    def _find(self, split: str, others: tuple[str, ...]) -> Iterator[Callable[[], ChoiceExample]]:
        return (question for path in self._paths(split, others) for question in _read_arc(path))

    def _paths(self, split: str, others: tuple[str, ...]) -> list[Path]:
        file = f"{SETS[self.name]}/{split}-00000-of-00001.parquet"
        patterns = tuple(f"{f}{SETS[self.name]}/{split}-*.parquet" for f in (f"{ARC_REPO}/", "ai2_arc/", "arc/", ""))
        return self.files.find((*patterns, *others), HubFiles(ARC_REPO, ARC_REVISION, (file,)))


def _read_arc(path: Path) -> Iterator[Callable[[], ChoiceExample]]:
    if path.suffix == ".jsonl":
        for number, row in read_jsonl(path):
            yield functools.partial(_from_core, row, f"{path}, line {number}")
        return
    for number, row in read_parquet(path, ("question", "choices", "answerKey")):
        yield functools.partial(_from_hub, row, f"{path}, row {number}")


def _from_core(row: dict[str, Any], where: str) -> ChoiceExample:
    if missing := [name for name in ("query", "choices", "gold") if name not in row]:
        raise DataError(f"{where}: no {', '.join(missing)}")
    return example(str(row["query"]).removeprefix(CORE_START), row["choices"], row["gold"], where)


def _from_hub(row: dict[str, Any], where: str) -> ChoiceExample:
    try:
        letters, options = row["choices"]["label"], row["choices"]["text"]
    except (TypeError, KeyError):
        raise DataError(f"{where}: choices hold no label and text") from None
    if not isinstance(letters, list) or not all(isinstance(letter, str) for letter in letters):
        raise DataError(f"{where}: the labels of the choices are no texts")
    if row["answerKey"] not in letters:
        raise DataError(f"{where}: answer {row['answerKey']!r} is none of {', '.join(letters)}")
    return example(row["question"], options, letters.index(row["answerKey"]), where, letters)


MMLU_REPO, MMLU_REVISION = "cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe"
TEST = HubFiles(MMLU_REPO, MMLU_REVISION, ("all/test-00000-of-00001.parquet",))
TRAIN = HubFiles(MMLU_REPO, MMLU_REVISION, ("all/auxiliary_train-00000-of-00001.parquet",))
FOLDERS = ("cais/mmlu/", "mmlu/", "")
TEST_PATTERNS = tuple(f"{f}{name}" for f in FOLDERS for name in ("all/test-*.parquet", "*_test.csv"))
TRAIN_PATTERNS = tuple(f"{f}all/auxiliary_train-*.parquet" for f in FOLDERS)
COLUMNS = ("question", "subject", "choices", "answer")
SUBJECTS = 57
HEADER = ["question", "A", "B", "C", "D", "answer"]


class MMLU(ChoiceTask):
    name = "mmlu"
    title = "MMLU"
    auto = True
    chat_core = True
    chance = 0.25

    def __init__(self, files: TaskFiles):
        self.files = files
        self.damaged: list[str] = []

    @functools.cached_property
    def _examples(self) -> list[ChoiceExample]:
        paths = self.files.find(TEST_PATTERNS, TEST)
        found = sound((question for path in paths for question in _read_mmlu(path)), self.damaged)
        if (subjects := len({e.tags["subject"] for e in found})) != SUBJECTS:
            say(f"  mmlu: the data has {subjects} of {SUBJECTS} subjects; its score is of these alone", style="yellow")
        return found

    def examples(self) -> Sequence[ChoiceExample]:
        return self._examples

    def fetch(self) -> Sequence[Path]:
        return self.files.find(TRAIN_PATTERNS, TRAIN)

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        """From the auxiliary training set, which other exams' questions make up, not MMLU's own."""
        found = [question() for path in self.files.find(TRAIN_PATTERNS, TRAIN) for question in _read_mmlu(path)]
        return (conversation(found[i]) for i in drawn(count, len(found), seed))


def _read_mmlu(path: Path) -> Iterator[Callable[[], ChoiceExample]]:
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
