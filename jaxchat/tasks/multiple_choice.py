"""How a multiple-choice question is put to a chat model, and how its data becomes one."""

from __future__ import annotations

from collections.abc import Sequence

from jaxchat.errors import DataError
from jaxchat.tasks.base import ChoiceExample, Conversation, assistant, user

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
