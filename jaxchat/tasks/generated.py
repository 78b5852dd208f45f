"""Exams whose questions a program draws: word problems, arithmetic and spelling bee."""

from __future__ import annotations

import collections
import functools
import hashlib
import random
import re

from jaxchat.data.sources import chitchat_conversations
from jaxchat.tasks.base import (
    NO_FILES,
    Conversation,
    Example,
    GeneratedTask,
    Message,
    TaskFiles,
    assistant,
    user,
)
from jaxchat.tasks.identity import NAME, TEXTS, load_persona, small_talk
from jaxchat.tools.calculator import calculate

# Word problems of one step. The model finds the two numbers and the operation; the calculator does the arithmetic.
# One unordered pair of numbers in ten is held out for the exam by a hash, for every operation and wording. (Single
# numbers are not: most numbers below 100 are one token, and a token never seen cannot be copied.)

PROBLEMS_HELD_OUT_ONE_IN = 10
WORDS = TEXTS["word_problems"]
GREETING_SHARE = 0.05  # of conversations that open with small talk, so that a problem may follow it

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
    """Return whether a pair of numbers, in any order, belongs to the exam alone."""
    text = f"{min(a, b)},{max(a, b)}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4]) % PROBLEMS_HELD_OUT_ONE_IN == 0


class WordProblems(GeneratedTask):
    """Numbers from 2 to 99 (a dividend up to 480); results are whole and not negative."""

    name, title, auto = "word_problems", "word problems", True
    max_tokens = 48
    exam_seed = 20_260_201

    def __init__(self, files: TaskFiles = NO_FILES):
        super().__init__(files)
        self._who = load_persona(files.identity).name if files.identity else NAME  # in greetings

    def grade(self, example: Example, answer: str) -> bool:
        """Return whether the last number of the answer is the result."""
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
    """Return the answer as the engine writes it with its calculator."""
    return assistant(("python", expression), ("python_output", result), sentence)


def _problem(rng: random.Random, held_out: bool) -> tuple[str, str, str, str, str]:
    """Return kind, question, expression, sentence of the answer, and result of a random problem."""
    if rng.random() < _PLAIN_SHARE:
        kind = rng.choice(list(_PLAIN))
        a, b = _numbers(rng, kind, held_out)
        expression, wordings = _PLAIN[kind]
        question = rng.choice(_PLAIN_FRAMES).format(e=rng.choice(wordings).format(a=a, b=b))
        sentence = "The answer is {r}."
        fields: dict[str, object] = {"a": a, "b": b}
    else:
        kind = rng.choice(list(WORDS["kinds"]))
        a, b = _numbers(rng, kind, held_out)
        texts = WORDS["kinds"][kind]
        expression = texts["expression"]
        n, m = rng.sample(WORDS["names"], 2)
        fields = {"n": n, "m": m, "x": rng.choice(WORDS["nouns"]), "p": rng.choice(WORDS["places"]), "a": a, "b": b}
        question = f"{rng.choice(texts['problems'])} {rng.choice(texts['questions'])}".format(**fields)
        sentence = rng.choice(texts["answers"])
    expression = expression.format(**fields)
    result = calculate(expression)
    assert result is not None and result.isdigit(), expression  # our own numbers
    return kind, question, expression, sentence.format(r=result, **fields), result


def _numbers(rng: random.Random, kind: str, held_out: bool) -> tuple[int, int]:
    """Return the left and right number of the expression."""
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


DIGITS = (1, 2, 3)  # of the larger number
FACTOR_DIGITS = (1, 2)
FRAMES = ("{e}=", "{e} = ?", "What is {e}?", "Work out {e}.", "{e}")


class Arithmetic(GeneratedTask):
    """Sums, differences and products without the calculator, exact match; pairs are held out as above."""

    name, title = "arithmetic", "arithmetic"
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


# Spelling bee: how often a letter occurs in a word. A model sees tokens, not letters, so the solution spells the word,
# counts, and checks with the calculator (`'word'.count('l')`). Words come from chitchat; one in ten is held out.

WORDS_HELD_OUT_ONE_IN = 10
LEAST_USES = 8  # of a word in the conversations, against typing errors
ABSENT_SHARE = 0.1  # of questions about a letter drawn from the whole alphabet

LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUESTIONS = (
    "How many {l} are in {w}?",
    "How many {l}'s are in the word {w}?",
    "How many times does {l} stand in {w}?",
    "how many {l} in {w}",
    "Count the letter {l} in {w}.",
    "How often does the letter {l} occur in {w}?",
    "In {w}, how many {l} are there?",
    'How many times does "{l}" appear in "{w}"?',
    "{w}: how many {l}?",
    "What is the number of {l} in the word {w}?",
)
_WORD = re.compile(r"\b[a-z]{3,12}\b")
_LAST_COUNT = re.compile(r"\d+")


class SpellingBee(GeneratedTask):
    """An answer is right if its last number is the count."""

    name, title = "spelling_bee", "spelling bee"
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
    """Return the exam's words, or the others, sorted."""
    texts = (text for turns in chitchat_conversations() for turn in turns for text in turn)
    uses = collections.Counter(word for text in texts for word in _WORD.findall(text.lower()))
    return tuple(sorted(w for w, n in uses.items() if n >= LEAST_USES and is_held_out_word(w) == held_out))


def is_held_out_word(word: str) -> bool:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % WORDS_HELD_OUT_ONE_IN == 0


def spelling_solution(word: str, letter: str) -> Message:
    """Return the word spelled out, counted along the way, and checked by the calculator."""
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
    """Return question, word and letter."""
    word = rng.choice(words(held_out))
    letter = rng.choice(LETTERS if rng.random() < ABSENT_SHARE else word)
    text = rng.choice(QUESTIONS).format(w=word, l=letter)
    return text, word, letter
