"""Conversations for SFT from installed data sets, as messages (see `text/chat.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxchat.data.corpus import chitchat_conversations, document_hash
from jaxchat.errors import DataError

MAX_TURNS = 6  # of one chitchat dialogue; a longer one is cut into several
OTHER_BOTS = ("ai.yml", "botprofile.yml")  # answers about itself that are another program's
OTHER_BOT_WORDS = ("alice", "aiml", "chatterbot", "a.l.i.c.e", "robot", "program", "my name", "botmaster", "computer")

Message = dict[str, Any]


def chitchat_dialogues(split: str, val_fraction: float) -> Iterator[list[Message]]:
    """Chitchat's conversations, two people as user and assistant, at most `MAX_TURNS` turns each.

    `split` is "train" or "val", by the same hash as the pretraining corpus: what is held out there is held out here.
    """
    for turns in chitchat_conversations():
        text = "\n".join(message for turn in turns for message in turn)
        if (document_hash(text) < val_fraction) != (split == "val"):
            continue
        for start in range(0, len(turns), MAX_TURNS):
            piece = turns[start : start + MAX_TURNS]
            piece = piece[: len(piece) // 2 * 2]  # ends with the assistant
            if piece:
                roles = ("user", "assistant")
                yield [{"role": roles[i % 2], "content": "\n".join(turn)} for i, turn in enumerate(piece)]


def chatterbot_pairs(language: str = "english") -> Iterator[list[Message]]:
    """Question-answer pairs of chatterbot-corpus, without those in which another bot speaks of itself."""
    try:
        import chatterbot_corpus
        import yaml
    except ImportError:
        raise DataError("source chatterbot: install it with pip install -r requirements.txt") from None
    folder = Path(str(chatterbot_corpus.__file__)).parent / "data" / language
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in folder.parent.iterdir() if p.is_dir()))
        raise DataError(f"source chatterbot: no language {language!r}; it has {known}")
    for file in sorted(folder.glob("*.yml")):
        if file.name in OTHER_BOTS:
            continue
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            texts = [str(text).strip() for text in conversation[:2]]
            about_itself = any(word in text.lower() for text in texts for word in OTHER_BOT_WORDS)
            if len(texts) == 2 and all(texts) and not about_itself:
                yield [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
