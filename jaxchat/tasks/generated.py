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

from jaxchat.data.sources import chitchat_conversations
from jaxchat.tasks.base import Conversation, Example, GeneratedTask, Message, assistant, user
from jaxchat.tasks.identity import NAME, small_talk
from jaxchat.tools.calculator import calculate

# Word problems of one step, answered through the calculator.
#
# The model learns to find the two numbers and the operation; the arithmetic is the calculator's. An exam problem asks
# about a pair of numbers that training never shows: one unordered pair in ten is held out, for every operation and
# wording at once, by a fixed hash. (Single numbers are not held out: the tokenizer makes most numbers below 100 one
# token, and a token never seen cannot be copied.)


PROBLEMS_HELD_OUT_ONE_IN = 10
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


def is_held_out_problem(a: int, b: int) -> bool:
    """True for the pairs that belong to the exam alone, whatever the order of the two numbers."""
    text = f"{min(a, b)},{max(a, b)}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4]) % PROBLEMS_HELD_OUT_ONE_IN == 0


class WordProblems(GeneratedTask):
    """Numbers from 2 to 99 (a dividend up to 480), results whole and not negative. `who`: the name in greetings."""

    name = "word_problems"
    auto = True
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
        if is_held_out_problem(a, b) == held_out:
            return a, b


# Arithmetic written out without the calculator: sums, differences and products, exact match.
#
# An exam case asks about a pair of numbers that training never shows, whatever their order.


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
            if is_held_out_problem(a, b) == held_out:
                break
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        space = rng.choice(("", " "))
        text = rng.choice(FRAMES).format(e=f"{a}{space}{sign}{space}{b}")
        return Example([user(text)], str(result), {"kind": f"{digits}-digit {sign}"})


WORDS_HELD_OUT_ONE_IN = 10
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
_LAST_COUNT = re.compile(r"\d+")


class SpellingBee(GeneratedTask):
    """The last number of the answer is the count."""

    name = "spelling_bee"
    max_tokens = 96
    exam_seed = 20_260_202

    def grade(self, example: Example, answer: str) -> bool:
        numbers = _LAST_COUNT.findall(answer)
        return bool(numbers) and numbers[-1] == example.expected

    def conversation(self, rng: random.Random) -> Conversation:
        text, word, letter = _question(rng, held_out=False)
        return [user(text), spelling_solution(word, letter)]

    def example(self, rng: random.Random, held_out: bool) -> Example:
        text, word, letter = _question(rng, held_out)
        count = str(word.count(letter))
        return Example([user(text)], count, {"times": count if int(count) < 3 else "3 or more"})


@functools.cache
def words(held_out: bool) -> tuple[str, ...]:
    """The exam's words or the others, sorted."""
    texts = (text for turns in chitchat_conversations() for turn in turns for text in turn)
    uses = collections.Counter(word for text in texts for word in _WORD.findall(text.lower()))
    return tuple(sorted(w for w, n in uses.items() if n >= LEAST_USES and is_held_out_word(w) == held_out))


def is_held_out_word(word: str) -> bool:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % WORDS_HELD_OUT_ONE_IN == 0


def spelling_solution(word: str, letter: str) -> Message:
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
