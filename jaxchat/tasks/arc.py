"""ARC (1803.05457): school science questions, 2,376 easy ones and 1,172 that simple methods get wrong."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxchat.errors import DataError
from jaxchat.tasks.base import ChoiceExample, ChoiceTask, Conversation, drawn
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

    @functools.cached_property
    def _examples(self) -> list[ChoiceExample]:
        core = (f"core/{self.name}.jsonl", f"**/eval_data/**/{self.name}.jsonl", f"{self.name}.jsonl")
        return self._find("test", core)

    def examples(self) -> Sequence[ChoiceExample]:
        return self._examples

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        found = self._find("train", ())
        return (conversation(found[i]) for i in drawn(count, len(found), seed))

    def _find(self, split: str, others: tuple[str, ...]) -> list[ChoiceExample]:
        file = f"{SETS[self.name]}/{split}-00000-of-00001.parquet"
        patterns = tuple(f"{f}{SETS[self.name]}/{split}-*.parquet" for f in (f"{REPO}/", "ai2_arc/", "arc/", ""))
        paths = self.files.find((*patterns, *others), HubFiles(REPO, REVISION, (file,)))
        return [e for path in paths for e in _read(path)]


def _read(path: Path) -> Iterator[ChoiceExample]:
    if path.suffix == ".jsonl":
        for number, row in read_jsonl(path):
            if missing := [name for name in ("query", "choices", "gold") if name not in row]:
                raise DataError(f"{path}, line {number}: no {', '.join(missing)}")
            text = str(row["query"]).removeprefix(CORE_START)
            yield example(text, row["choices"], row["gold"], f"{path}, line {number}")
        return
    for number, row in read_parquet(path, ("question", "choices", "answerKey")):
        where = f"{path}, row {number}"
        try:
            letters, options = row["choices"]["label"], row["choices"]["text"]
        except (TypeError, KeyError):
            raise DataError(f"{where}: choices hold no label and text") from None
        if not isinstance(letters, list) or not all(isinstance(letter, str) for letter in letters):
            raise DataError(f"{where}: the labels of the choices are no texts")
        if row["answerKey"] not in letters:
            raise DataError(f"{where}: answer {row['answerKey']!r} is none of {', '.join(letters)}")
        yield example(row["question"], options, letters.index(row["answerKey"]), where, letters)
