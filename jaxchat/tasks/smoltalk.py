"""SmolTalk's small variant, 460 thousand synthetic conversations (SmolLM2, 2502.02737): what the real tiers learn to
chat from. Not an exam."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxchat.errors import DataError
from jaxchat.tasks.base import Conversation, Task, drawn
from jaxchat.tasks.files import HubFiles, TaskFiles, count_rows, read_parquet

FOLDERS = ("HuggingFaceTB/smol-smoltalk/", "smol-smoltalk/", "smoltalk/")
PATTERNS = tuple(f"{folder}{name}" for folder in FOLDERS for name in ("data/train-*.parquet", "train*.parquet"))
HUB = HubFiles(  # the names as the hub's viewer shows them; the newest commit, whose id the download records
    "HuggingFaceTB/smol-smoltalk", "main", tuple(f"data/train-{i:05d}-of-00004.parquet" for i in range(4))
)


class SmolTalk(Task):
    name = "smoltalk"

    def __init__(self, files: TaskFiles):
        self._files = files

    def fetch(self) -> Sequence[Path]:
        return self._files.find(PATTERNS, HUB)

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        """`count` of them drawn at random (None: all), in the order of the files."""
        paths = self._files.find(PATTERNS, HUB)
        chosen = set(drawn(count, sum(map(count_rows, paths)), seed))
        rows = itertools.chain.from_iterable(read_parquet(path, ["messages"]) for path in paths)
        for index, (_, row) in enumerate(rows):
            if index in chosen:
                yield _checked(row["messages"], index)


def _checked(messages: object, index: int) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"smoltalk: row {index} has no messages")
    try:
        conversation = [{"role": m["role"], "content": m["content"]} for m in messages]
    except (TypeError, KeyError) as error:
        raise DataError(f"smoltalk: row {index}: a message needs role and content") from error
    while len(conversation) > 1 and conversation[-1]["role"] != "assistant":
        conversation.pop()  # nothing to learn from a question alone
    return conversation
