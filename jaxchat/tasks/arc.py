"""ARC (1803.05457): school science questions, 2,376 easy ones and 1,172 that simple methods get wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import DataError
from jaxchat.tasks.base import ChoiceExample, ChoiceTask, Conversation, drawn, sound
from jaxchat.tasks.files import HubFiles, TaskFiles, read_jsonl, read_parquet
from jaxchat.tasks.multiple_choice import conversation, example

REPO, REVISION = "allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453"
SETS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
CORE_START = "Question: "  # of the queries in CORE's copy, which is the same test set


class Arc(ChoiceTask):
    """`name`: one of `SETS`."""

    chance = 0.25  # as ChatCORE counts it; a few questions have three or five options

    def __init__(self, name: str, files: TaskFiles):
        self.name, self.files = name, files
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
        return (question for path in self._paths(split, others) for question in _read(path))

    def _paths(self, split: str, others: tuple[str, ...]) -> list[Path]:
        file = f"{SETS[self.name]}/{split}-00000-of-00001.parquet"
        patterns = tuple(f"{f}{SETS[self.name]}/{split}-*.parquet" for f in (f"{REPO}/", "ai2_arc/", "arc/", ""))
        return self.files.find((*patterns, *others), HubFiles(REPO, REVISION, (file,)))


def _read(path: Path) -> Iterator[Callable[[], ChoiceExample]]:
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
