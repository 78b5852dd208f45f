"""Arithmetic written out without the calculator: sums, differences and products, exact match.

An exam case asks about a pair of numbers that training never shows, whatever their order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from jaxchat.tasks.base import DEFAULT_COUNT, Conversation, Example, WrittenTask, assistant, user
from jaxchat.tasks.word_problems import is_held_out

EXAM_SIZE = 512
RL_SIZE = 8192
EXAM_SEED = 20_260_203
DIGITS = (1, 2, 3)  # of the larger number; of a factor at most two
FACTOR_DIGITS = (1, 2)
FRAMES = ("{e}=", "{e} = ?", "What is {e}?", "Work out {e}.", "{e}")


class Arithmetic(WrittenTask):
    """The whole answer, spaces around it aside, is the result in digits."""

    name = "arithmetic"
    max_tokens = 16

    def train_conversations(self, count: int | None, seed: int) -> list[Conversation]:
        rng = random.Random(f"{self.name} {seed}")
        return [_conversation(rng) for _ in range(count or DEFAULT_COUNT)]

    def train_examples(self, seed: int) -> Sequence[Example]:
        rng = random.Random(f"{self.name} rl {seed}")
        return [_example(rng, held_out=False) for _ in range(RL_SIZE)]

    def examples(self) -> Sequence[Example]:
        rng = random.Random(EXAM_SEED)
        return [_example(rng, held_out=True) for _ in range(EXAM_SIZE)]

    def grade(self, example: Example, answer: str) -> bool:
        return answer.strip() == example.expected


def _conversation(rng: random.Random) -> Conversation:
    example = _example(rng, held_out=False)
    return [*example.prompt, assistant(example.expected)]


def _example(rng: random.Random, held_out: bool) -> Example:
    sign = rng.choice("+-*")
    digits = rng.choice(FACTOR_DIGITS if sign == "*" else DIGITS)
    while True:
        a, b = rng.randrange(10**digits), rng.randrange(10 ** rng.randint(1, digits))
        a, b = (max(a, b), min(a, b)) if sign == "-" else rng.choice(((a, b), (b, a)))
        if is_held_out(a, b) == held_out:
            break
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    space = rng.choice(("", " "))
    text = rng.choice(FRAMES).format(e=f"{a}{space}{sign}{space}{b}")
    return Example([user(text)], str(result), {"kind": f"{digits}-digit {sign}"})
