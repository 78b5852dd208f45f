"""Arithmetic written out without the calculator: sums, differences and products, exact match.

An exam case asks about a pair of numbers that training never shows, whatever their order.
"""

from __future__ import annotations

import random

from jaxchat.tasks.base import Conversation, Example, GeneratedTask, assistant, user
from jaxchat.tasks.word_problems import is_held_out

DIGITS = (1, 2, 3)  # of the larger number; of a factor at most two
FACTOR_DIGITS = (1, 2)
FRAMES = ("{e}=", "{e} = ?", "What is {e}?", "Work out {e}.", "{e}")


class Arithmetic(GeneratedTask):
    """The whole answer, spaces around it aside, is the result in digits."""

    name = "arithmetic"
    max_tokens = 16
    exam_size, exam_seed = 512, 20_260_203

    def grade(self, example: Example, answer: str) -> bool:
        return answer.strip() == example.expected

    def conversation(self, rng: random.Random) -> Conversation:
        example = self.example(rng, held_out=False)
        return [*example.prompt, assistant(example.expected)]

    def example(self, rng: random.Random, held_out: bool) -> Example:
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
