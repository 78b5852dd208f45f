"""SpellingBee: how often a letter stands in a word.

A model sees tokens, not letters, so the way to the answer is to spell the word, which makes each letter a token, to
count, and to check by a call of the calculator (`'word'.count('l')`). Words are those that people use in chitchat's
conversations; one in ten belongs to the exam alone, by a hash.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import random
import re

from jaxchat.data.corpus import chitchat_conversations
from jaxchat.tasks.base import Conversation, Example, GeneratedTask, Message, assistant, user
from jaxchat.tools.calculator import calculate

HELD_OUT_ONE_IN = 10
LEAST_USES = 8  # of a word in the conversations, against typing errors
ABSENT_SHARE = 0.1  # of questions about a letter drawn from the whole alphabet

LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUESTIONS = (
    "How many {l} are in {w}?", "How many {l}'s are in the word {w}?", "How many times does {l} stand in {w}?",
    "how many {l} in {w}", "Count the letter {l} in {w}.", "How often does the letter {l} occur in {w}?",
    "In {w}, how many {l} are there?", 'How many times does "{l}" appear in "{w}"?', "{w}: how many {l}?",
    "What is the number of {l} in the word {w}?",
)  # fmt: skip
_WORD = re.compile(r"\b[a-z]{3,12}\b")
_LAST_NUMBER = re.compile(r"\d+")


class SpellingBee(GeneratedTask):
    """The last number of the answer is the count."""

    name = "spelling_bee"
    max_tokens = 96
    exam_seed = 20_260_202

    def grade(self, example: Example, answer: str) -> bool:
        numbers = _LAST_NUMBER.findall(answer)
        return bool(numbers) and numbers[-1] == example.expected

    def conversation(self, rng: random.Random) -> Conversation:
        text, word, letter = _question(rng, held_out=False)
        return [user(text), solution(word, letter)]

    def example(self, rng: random.Random, held_out: bool) -> Example:
        text, word, letter = _question(rng, held_out)
        count = str(word.count(letter))
        return Example([user(text)], count, {"times": count if int(count) < 3 else "3 or more"})


@functools.cache
def words(held_out: bool) -> tuple[str, ...]:
    """The exam's words or the others, sorted."""
    texts = (text for turns in chitchat_conversations() for turn in turns for text in turn)
    uses = collections.Counter(word for text in texts for word in _WORD.findall(text.lower()))
    return tuple(sorted(w for w, n in uses.items() if n >= LEAST_USES and is_held_out(w) == held_out))


def is_held_out(word: str) -> bool:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % HELD_OUT_ONE_IN == 0


def solution(word: str, letter: str) -> Message:
    """Spelled out, counted along the way, and checked by the calculator."""
    spelled, seen = [], 0
    for character in word:
        seen += character == letter
        spelled.append(f"{character} {seen}" if character == letter else character)
    call = f"'{word}'.count('{letter}')"
    result = calculate(call)
    assert result == str(seen), call  # our own words
    text = f"{word}: {', '.join(spelled)}. Check: "
    return assistant(text, ("python", call), ("python_output", result), f" The letter {letter} is there {seen} times.")


def _question(rng: random.Random, held_out: bool) -> tuple[str, str, str]:
    """(question, word, letter)."""
    word = rng.choice(words(held_out))
    letter = rng.choice(LETTERS if rng.random() < ABSENT_SHARE else word)
    text = rng.choice(QUESTIONS).format(w=word, l=letter)
    return text, word, letter
