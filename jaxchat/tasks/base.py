"""The interface behind which every exam, every generated SFT set and every RL environment lies.

Messages have the form of `text/chat.py`: {"role", "content"}, where an assistant's content is a string or a list of
{"type": "text" | "python" | "python_output", "text"}. A task is one small file: see `docs/exams.md`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jaxchat.errors import DataError

T = TypeVar("T")
DEFAULT_COUNT = 1000  # conversations of a generator, where the mixture names no count
Message = dict[str, Any]
Conversation = list[Message]


@dataclass(frozen=True)
class Example:
    """A question that is answered in writing: `prompt` ends with a user message; `expected` is what `grade` needs."""

    prompt: Conversation
    expected: Any
    tags: dict[str, str] = field(default_factory=dict)  # for breakdowns, such as the kind of a problem


@dataclass(frozen=True)
class ChoiceExample:
    """A question whose answer is one of `letters`: `right` is the index of the right one."""

    prompt: Conversation
    letters: tuple[str, ...]
    right: int
    tags: dict[str, str] = field(default_factory=dict)


class Task(ABC):
    """What all tasks have: what evaluation, report card and page show of an exam comes from here alone."""

    name: str
    title: str = ""  # for people, where it is not the name
    chance: float = 0.0  # accuracy of guessing
    auto: bool = False  # one of the exams of `eval.exams = ["auto"]`, where its data is at hand
    chat_core: bool = False  # one of the five exams of ChatCORE
    damaged: Sequence[str] = ()  # what is wrong with rows of the exam's data that were left out

    def train_conversations(self, count: int | None, seed: int) -> Iterable[Conversation]:
        """`count` conversations for SFT (None: all, or 1,000 of a generator), the same for the same seed; no exam
        question is among them."""
        return []

    def examples(self) -> Sequence[Any]:
        """The questions of the exam, always the same and in the same order; none where there is no exam."""
        return ()

    def check(self) -> None:  # noqa: B027 - most exams can always be sat
        """Refuse, before any work, settings that the exam cannot be sat with."""

    def setting(self) -> Sequence[str]:
        """What a score depends on beside model, questions and `eval.*`."""
        return ()

    def fetch(self) -> Sequence[Path]:
        """Have at hand the files that `train_conversations` reads, and return them; most tasks read none. Asked before
        training. `MissingData` where a file cannot be had."""
        return ()


class WrittenTask(Task):
    """Answers are written out at temperature 0, with the calculator at hand, and graded."""

    max_tokens: int  # of an answer

    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """The exam, always the same and in the same order."""

    def train_examples(self, seed: int) -> Sequence[Example]:
        """Questions for RL, the same for the same seed; no exam question is among them. Empty: not for RL."""
        return []

    @abstractmethod
    def grade(self, example: Example, answer: str) -> bool:
        """True where the answer (its text, without tool calls and their output) is right."""

    def grade_all(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        """The grades of many answers; a task whose grading is slow does them in parallel."""
        return [self.grade(example, answer) for example, answer in zip(examples, answers, strict=True)]

    def readings(self, example: Example, answer: str) -> dict[str, bool]:
        """Other ways to read the answer, counted and shown beside the grade ("lenient")."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What belongs beside the score, such as the sandbox's level."""
        return {}


class GeneratedTask(WrittenTask):
    """Questions that a program draws without end; what `held_out` draws is for the exam alone."""

    exam_size = 256
    exam_seed: int
    train_size = 8192  # questions for RL

    @abstractmethod
    def example(self, rng: random.Random, held_out: bool) -> Example:
        """One question."""

    @abstractmethod
    def conversation(self, rng: random.Random) -> Conversation:
        """One conversation for SFT."""

    def train_conversations(self, count: int | None, seed: int) -> list[Conversation]:
        rng = random.Random(f"{self.name} {seed}")
        return [self.conversation(rng) for _ in range(count or DEFAULT_COUNT)]

    def train_examples(self, seed: int) -> Sequence[Example]:
        rng = random.Random(f"{self.name} rl {seed}")
        return [self.example(rng, held_out=False) for _ in range(self.train_size)]

    def examples(self) -> Sequence[Example]:
        rng = random.Random(self.exam_seed)
        return [self.example(rng, held_out=True) for _ in range(self.exam_size)]


class ChoiceTask(Task):
    """Multiple choice: the answer is the one of the letters that has the largest logit where the answer begins."""

    @abstractmethod
    def examples(self) -> Sequence[ChoiceExample]:
        """The exam, always the same and in the same order."""


def sound(questions: Iterable[Callable[[], T]], damaged: list[str]) -> list[T]:
    """What each of them makes; one that raises `DataError` is left out, and what it says goes into `damaged`.

    `DataError` where that is true of all: then it is not a row that is wrong.
    """
    found, errors = [], []
    for question in questions:
        try:
            found.append(question())
        except DataError as error:
            errors.append(str(error))
    if errors and not found:
        raise DataError(errors[0])
    damaged += errors
    return found


def drawn(count: int | None, total: int, seed: int) -> Sequence[int]:
    """Which of `total` things are taken: all in their order, or `count` of them in an order of their own."""
    if count is None or count >= total:
        return range(total)
    return random.Random(seed).sample(range(total), count)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(*parts: tuple[str, str] | str) -> Message:
    """An assistant message of parts: a string is text, a pair is (type, text)."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0], "text": p[1]} for p in parts]
    return {"role": "assistant", "content": content}
