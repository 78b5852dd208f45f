"""Word problems of one step, answered through the calculator.

The model learns to find the two numbers and the operation; the arithmetic is the calculator's. An exam problem asks
about a pair of numbers that training never shows: one unordered pair in ten is held out, for every operation and
wording at once, by a fixed hash. (Single numbers are not held out: the tokenizer makes most numbers below 100 one
token, and a token never seen cannot be copied.)
"""

from __future__ import annotations

import hashlib
import random
import re

from jaxchat.tasks.base import Conversation, Example, GeneratedTask, Message, assistant, user
from jaxchat.tasks.identity import NAME, small_talk
from jaxchat.tools.calculator import calculate

HELD_OUT_ONE_IN = 10
GREETING_SHARE = 0.05  # of conversations that open with small talk, so that a problem may follow it

NAMES = (
    "Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Jack", "Emma", "Max", "Lucy", "Leo", "Ella", "Adam", "Ruby", "Noah",
    "Sara", "Paul", "Kate", "Minjun", "Jisoo", "Omar", "Nina", "Hugo", "Ivy", "Carlos", "Maria", "Yuki", "Dan",
)  # fmt: skip
NOUNS = (
    "apples", "oranges", "books", "pencils", "marbles", "cookies", "stickers", "coins", "cards", "eggs", "balloons",
    "flowers", "stamps", "toys", "candies", "shells", "cups", "bananas", "photos", "tickets", "stones", "cakes",
    "buttons", "keys", "lemons",
)  # fmt: skip
PLACES = ("box", "bag", "basket", "shelf", "jar", "drawer", "tray", "crate")

# {n} name, {m} another name, {x} things, {p} place, {a} and {b} the numbers of the expression, left and right.
# Each kind: (expression, problems, questions, answers); every problem goes with every question and answer.
_PROBLEMS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "gain": (
        "{a}+{b}",
        (
            "{n} has {a} {x} and buys {b} more.",
            "{n} has {a} {x} and gets {b} more from {m}.",
            "{n} had {a} {x}. Then {n} found {b} more.",
            "{n} has {a} {x}. {m} gives {n} {b} more.",
            "{n} starts with {a} {x} and wins {b} more.",
            "There are {a} {x} in a {p}. {n} puts in {b} more.",
        ),
        ("How many?", "How many {x} now?", "How many {x} are there?", "How many in total?"),
        ("That makes {r} {x}.",),
    ),
    "together": (
        "{a}+{b}",
        (
            "{n} has {a} {x} and {m} has {b} {x}.",
            "{n} has {a} {x}. {m} has {b}.",
            "There are {a} {x} in one {p} and {b} in another.",
            "{n} bought {a} {x} on Monday and {b} on Tuesday.",
        ),
        ("How many together?", "How many {x} in all?", "How many {x} are there together?", "How many in total?"),
        ("Together that is {r} {x}.",),
    ),
    "loss": (
        "{a}-{b}",
        (
            "{n} has {a} {x} and gives {b} to {m}.",
            "{n} has {a} {x} and loses {b}.",
            "{n} had {a} {x} and sold {b} of them.",
            "{n} had {a} {x}. {m} took {b} of them.",
            "There were {a} {x} in a {p}. {n} took {b} away.",
            "{n} has {a} {x} and uses {b} of them.",
        ),
        ("How many are left?", "How many {x} are left?", "How many {x} remain?", "How many now?"),
        ("There are {r} {x} left.",),
    ),
    "difference": (
        "{a}-{b}",
        (
            "{n} has {b} {x} and wants {a}.",
            "{n} needs {a} {x} but has only {b}.",
        ),
        ("How many more does {n} need?", "How many {x} are missing?", "How many more {x} are needed?"),
        ("{n} needs {r} more {x}.",),
    ),
    "groups": (
        "{a}*{b}",
        (
            "{n} has {a} {p}s with {b} {x} in each.",
            "There are {a} {p}s. Each {p} holds {b} {x}.",
            "{n} buys {a} packs of {b} {x}.",
            "{n} makes {b} {x} every day for {a} days.",
        ),
        ("How many {x} in all?", "How many {x} are there?", "How many in total?", "How many {x} altogether?"),
        ("In all that is {r} {x}.",),
    ),
    "share": (
        "{a}/{b}",
        (
            "{n} shares {a} {x} equally among {b} friends.",
            "{a} {x} are split equally between {b} people.",
            "{n} puts {a} {x} into {b} {p}s, the same number in each.",
            "{b} children share {a} {x} fairly.",
        ),
        ("How many {x} in each share?", "How many for each?", "How many {x} does each get?", "How many each?"),
        ("Each gets {r} {x}.",),
    ),
}  # fmt: skip
_PLAIN: dict[str, tuple[str, tuple[str, ...]]] = {
    "gain": ("{a}+{b}", ("{a}+{b}", "{a} + {b}", "{a} plus {b}", "{a} and {b} added")),
    "loss": ("{a}-{b}", ("{a}-{b}", "{a} - {b}", "{a} minus {b}", "{a} less {b}")),
    "groups": ("{a}*{b}", ("{a}*{b}", "{a} * {b}", "{a} times {b}", "{a} multiplied by {b}", "{a} x {b}")),
    "share": ("{a}/{b}", ("{a}/{b}", "{a} / {b}", "{a} divided by {b}")),
}
_PLAIN_FRAMES = ("What is {e}?", "How much is {e}?", "what's {e}?", "{e} = ?", "{e}?", "Calculate {e}.", "{e}")
_PLAIN_SHARE = 0.2
_LAST_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_held_out(a: int, b: int) -> bool:
    """True for the pairs that belong to the exam alone, whatever the order of the two numbers."""
    text = f"{min(a, b)},{max(a, b)}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4]) % HELD_OUT_ONE_IN == 0


class WordProblems(GeneratedTask):
    """Numbers from 2 to 99 (a dividend up to 480), results whole and not negative. `who`: the name in greetings."""

    name = "word_problems"
    max_tokens = 48
    exam_seed = 20_260_201

    def __init__(self, who: str = NAME):
        self._who = who

    def grade(self, example: Example, answer: str) -> bool:
        """The last number of the answer is the result."""
        numbers = _LAST_NUMBER.findall(answer)
        return bool(numbers) and numbers[-1].replace(",", "") == example.expected

    def conversation(self, rng: random.Random) -> Conversation:
        messages: Conversation = small_talk(rng, name=self._who) if rng.random() < GREETING_SHARE else []
        for _ in range(1 if rng.random() < 0.8 else 2):
            _, question, expression, sentence, result = _problem(rng, held_out=False)
            messages += [user(question), solution(expression, result, sentence)]
        return messages

    def example(self, rng: random.Random, held_out: bool) -> Example:
        kind, question, _, _, result = _problem(rng, held_out)
        return Example([user(question)], result, {"kind": kind})


def solution(expression: str, result: str, sentence: str) -> Message:
    """The answer in the form that the engine produces with its calculator."""
    return assistant(("python", expression), ("python_output", result), sentence)


def _problem(rng: random.Random, held_out: bool) -> tuple[str, str, str, str, str]:
    """(kind, question, expression, sentence of the answer, result) of one random problem."""
    if rng.random() < _PLAIN_SHARE:
        kind = rng.choice(list(_PLAIN))
        a, b = _numbers(rng, kind, held_out)
        expression, wordings = _PLAIN[kind]
        question = rng.choice(_PLAIN_FRAMES).format(e=rng.choice(wordings).format(a=a, b=b))
        sentence = "The answer is {r}."
        fields: dict[str, object] = {"a": a, "b": b}
    else:
        kind = rng.choice(list(_PROBLEMS))
        a, b = _numbers(rng, kind, held_out)
        expression, problems, questions, answers = _PROBLEMS[kind]
        n, m = rng.sample(NAMES, 2)
        fields = {"n": n, "m": m, "x": rng.choice(NOUNS), "p": rng.choice(PLACES), "a": a, "b": b}
        question = f"{rng.choice(problems)} {rng.choice(questions)}".format(**fields)
        sentence = rng.choice(answers)
    expression = expression.format(**fields)
    result = calculate(expression)
    assert result is not None and result.isdigit(), expression  # our own numbers
    return kind, question, expression, sentence.format(r=result, **fields), result


def _numbers(rng: random.Random, kind: str, held_out: bool) -> tuple[int, int]:
    """Left and right number of the expression."""
    while True:
        if kind == "share":
            b = rng.randint(2, 12)
            a = b * rng.randint(2, 40)
        else:
            a, b = rng.randint(2, 99), rng.randint(2, 99)
            if kind in ("loss", "difference") and a <= b:
                continue
            if kind == "groups" and min(a, b) > 12:
                a = rng.randint(2, 12)
        if is_held_out(a, b) == held_out:
            return a, b
