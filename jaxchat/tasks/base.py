"""The one interface behind which every exam and every generated SFT set lies.

Messages have the form of `text/chat.py`: {"role", "content"}, where an assistant's content is a string or a list of
{"type": "text" | "python" | "python_output", "text"}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, Any]
Conversation = list[Message]


@dataclass(frozen=True)
class Example:
    """One exam question: `prompt` ends with a user message; `expected` is what the task's `grade` needs."""

    prompt: Conversation
    expected: Any
    tags: dict[str, str] = field(default_factory=dict)  # for breakdowns, such as the kind of a problem


class Task(Protocol):
    """An exam whose answers are written out at temperature 0; `train_conversations` may also feed SFT."""

    name: str
    max_tokens: int  # of an answer

    def train_conversations(self, count: int, seed: int) -> list[Conversation]:
        """`count` conversations, the same for the same seed; no exam question is among them."""
        ...

    def examples(self) -> Sequence[Example]:
        """The exam, always the same and in the same order."""
        ...

    def grade(self, example: Example, answer: str) -> bool:
        """True where the answer (its text, without tool calls and their output) is right."""
        ...


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(*parts: tuple[str, str] | str) -> Message:
    """An assistant message of parts: a string is text, a pair is (type, text)."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0], "text": p[1]} for p in parts]
    return {"role": "assistant", "content": content}
