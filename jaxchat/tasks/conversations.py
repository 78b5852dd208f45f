"""Conversations for SFT: from installed packages, from your own files, and from SmolTalk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxchat.chat import normalize
from jaxchat.config import DataConfig
from jaxchat.data.hub import HubFiles
from jaxchat.data.sources import (
    chitchat_conversations,
    chitchat_document,
    count_rows,
    document_hash,
    find_files,
    open_corpus,
    read_records,
    suffix_of,
    training_limit,
)
from jaxchat.errors import DataError, UsageError
from jaxchat.tasks.base import Conversation, Task, sample
from jaxchat.tasks.identity import TEXTS

MAX_TURNS = 6  # of one chitchat dialogue; a longer one is cut into several


def chitchat_dialogues(split: str, val_fraction: float) -> Iterator[Conversation]:
    """Yield chitchat's dialogues, two people as user and assistant, in parts of at most `MAX_TURNS` turns.

    `split` is "train" or "val", the same as in the pretraining corpus.
    """
    data = DataConfig(source="chitchat", val_fraction=val_fraction)
    limit = training_limit(open_corpus(data), data)
    for turns in chitchat_conversations():
        if (document_hash(chitchat_document(turns)) < limit) != (split == "val"):
            continue
        for start in range(0, len(turns), MAX_TURNS):
            part = turns[start : start + MAX_TURNS]
            part = part[: len(part) // 2 * 2]  # ends with the assistant
            if part:
                roles = ("user", "assistant")
                yield [{"role": roles[i % 2], "content": "\n".join(turn)} for i, turn in enumerate(part)]


def chatterbot_pairs(language: str = "english") -> Iterator[Conversation]:
    """Yield the question-answer pairs of chatterbot-corpus, each once, without bots that speak about themselves.

    `DataError` names a language that the corpus does not have.
    """
    try:
        import chatterbot_corpus
        import yaml
    except ImportError:
        raise DataError("source chatterbot: install it with pip install -r requirements.txt") from None
    folder = Path(str(chatterbot_corpus.__file__)).parent / "data" / language
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in folder.parent.iterdir() if p.is_dir()))
        raise DataError(f"source chatterbot: no language {language!r}; it has {known}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is there: ten times as fast
    seen = set()
    for file in sorted(folder.glob("*.yml")):
        if file.name.lower() in TEXTS["other_bots"]["files"]:
            continue
        for conversation in yaml.load(file.read_text(encoding="utf-8"), loader)["conversations"]:
            pair = tuple(str(text).strip() for text in conversation[:2])
            if len(pair) < 2 or not all(pair) or pair in seen or is_other_bot(*pair):
                continue
            seen.add(pair)
            yield [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


def file_conversations(source: str, encoding: str = "auto") -> Iterator[Conversation]:
    """Yield your own conversations from `files:GLOB`, a record {"messages": [{"role", "content"}, ...]} each.

    `DataError` names the file and line of a conversation that is not in the form of `chat.py`.
    """
    for path in find_files(source):
        if suffix_of(path) in (".txt", ".md"):
            raise DataError(f"sft.mixture: {path}: conversations are read from jsonl, json and parquet files")
        for where, record in read_records(path, encoding):
            messages: Any = record.get("messages") if isinstance(record, dict) else None
            try:
                normalize(messages)
            except UsageError as error:
                raise DataError(f"{where}: {error}") from None
            yield [{"role": m["role"], "content": m["content"]} for m in messages]


def spoken(conversation: Conversation) -> str:
    """Return a conversation as pretraining reads it from a file: a message a line, without roles."""
    contents = (m["content"] for m in conversation)
    return "\n".join(c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents)


def is_other_bot(question: str, answer: str) -> bool:
    """Return whether a pair is about who answers, or the answer speaks as a machine (`other_bots` in `texts.toml`)."""
    bots, both = TEXTS["other_bots"], (question, answer)
    if re.search("[가-힣]", question + answer):
        return any(re.search(pattern, text) for pattern in bots["korean"] for text in both)
    either = any(re.search(pattern, text) for pattern in bots["either"] for text in both)
    return either or any(re.search(pattern, answer) for pattern in bots["answer"])


class SmolTalk(Task):
    """SmolTalk's small variant (2502.02737): 460 thousand synthetic conversations; no exam."""

    name, title = "smoltalk", "SmolTalk"

    def fetch(self) -> Sequence[Path]:
        folders = ("HuggingFaceTB/smol-smoltalk/", "smol-smoltalk/", "smoltalk/")
        patterns = [f"{folder}{name}" for folder in folders for name in ("data/train-*.parquet", "train*.parquet")]
        names = tuple(f"data/train-{i:05d}-of-00004.parquet" for i in range(4))
        return self.files.find(patterns, HubFiles("HuggingFaceTB/smol-smoltalk", "main", names))

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        """Yield `count` random conversations (None: all), in the order of the files."""
        paths = self.fetch()
        chosen = set(sample(range(sum(map(count_rows, paths))), count, seed))
        for index, row in enumerate(row for path in paths for _, row in read_records(path, columns=["messages"])):
            if index in chosen:
                conversation = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
                while len(conversation) > 1 and conversation[-1]["role"] != "assistant":
                    conversation.pop()  # nothing to learn from a question alone
                yield conversation
