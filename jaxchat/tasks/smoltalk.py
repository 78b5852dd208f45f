"""SmolTalk's small variant, 460 thousand synthetic conversations (SmolLM2, 2502.02737): what the real tiers learn to
chat from. Not an exam."""

from __future__ import annotations

import random
from collections.abc import Iterator

from jaxchat.errors import DataError
from jaxchat.tasks.base import Conversation, Task
from jaxchat.tasks.files import HubFiles, MissingData, TaskFiles

FOLDERS = ("HuggingFaceTB/smol-smoltalk/", "smol-smoltalk/", "smoltalk/")
PATTERNS = tuple(f"{folder}{name}" for folder in FOLDERS for name in ("data/train-*.parquet", "train*.parquet"))
HUB = HubFiles(  # the names as the hub's viewer shows them; the newest commit, whose id the download records
    "HuggingFaceTB/smol-smoltalk", "main", tuple(f"data/train-{i:05d}-of-00004.parquet" for i in range(4))
)


class SmolTalk(Task):
    name = "smoltalk"

    def __init__(self, files: TaskFiles):
        self._files = files

    def fetch(self) -> None:
        self._files.find(PATTERNS, HUB)

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        """`count` of them drawn at random (None: all), in the order of the files."""
        import pyarrow.parquet as pq

        tables = [pq.ParquetFile(path) for path in self._files.find(PATTERNS, HUB)]
        total = sum(table.metadata.num_rows for table in tables)
        chosen = None if count is None or count >= total else set(random.Random(seed).sample(range(total), count))
        index = 0
        for table in tables:
            if "messages" not in table.schema_arrow.names:
                raise MissingData(f"smoltalk: no column messages; found {', '.join(table.schema_arrow.names)}")
            for batch in table.iter_batches(1024, columns=["messages"]):
                for messages in batch.column(0).to_pylist():
                    if chosen is None or index in chosen:
                        yield _checked(messages, index)
                    index += 1


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
