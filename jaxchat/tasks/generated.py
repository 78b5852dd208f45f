"""Exams whose questions a program draws: word problems, arithmetic, spelling bee, and the lottery machine."""

from __future__ import annotations

import collections
import functools
import hashlib
import random
import re
from collections.abc import Sequence

from jaxchat.data.lottery import FIELDS, SKEW, Session, random_session, read_answer, sessions
from jaxchat.data.sources import chitchat_conversations
from jaxchat.tasks.base import NO_FILES, Conversation, Example, GeneratedTask, Message, TaskFiles, assistant, user
from jaxchat.tasks.identity import TEXTS, persona_of, small_talk
from jaxchat.tools.calculator import calculate

HELD_OUT_ONE_IN = 10  # pairs of numbers, and words
PLAIN_SHARE = 0.2  # of word problems without words
GREETING_SHARE = 0.05  # of conversations that open with small talk, so that a problem may follow it
DIGITS = (1, 2, 3)  # of the larger number of a sum without the calculator
FACTOR_DIGITS = (1, 2)
LEAST_USES = 8  # of a word in the conversations, against typing errors
ABSENT_SHARE = 0.1  # of questions about a letter drawn from the whole alphabet
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def is_held_out(text: str) -> bool:
    """Return whether a word or a pair of numbers belongs to the exam alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % HELD_OUT_ONE_IN == 0


def is_held_out_pair(a: int, b: int) -> bool:
    """Return whether a pair of numbers, in any order, belongs to the exam alone.

    Single numbers do not: most numbers below 100 are one token, and a token never seen cannot be copied.
    """
    return is_held_out(f"{min(a, b)},{max(a, b)}")


class WordProblems(GeneratedTask):
    """Problems of one step: the model finds two numbers and the operation, the calculator does the arithmetic.

    Numbers from 2 to 99 (a dividend up to 480); results are whole and not negative.
    """

    name, title, auto = "word_problems", "word problems", True
    max_tokens = 48
    exam_seed = 20_260_201
    in_the_head = 0.0  # of the sums in the conversations

    def __init__(self, files: TaskFiles = NO_FILES):
        super().__init__(files)
        self._who = persona_of(files).name  # in greetings

    def grade(self, example: Example, answer: str) -> bool:
        """Return whether the last number of the answer is the result."""
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
        return bool(numbers) and numbers[-1].replace(",", "") == example.expected

    def conversation(self, rng: random.Random) -> Conversation:
        messages: Conversation = small_talk(rng, name=self._who) if rng.random() < GREETING_SHARE else []
        for _ in range(1 if rng.random() < 0.8 else 2):
            _, question, expression, sentence, result = word_problem(rng, held_out=False)
            call = [("python", expression), ("python_output", result)]
            in_the_head = self.in_the_head and "+" in expression and rng.random() < self.in_the_head
            messages += [user(question), assistant(*([] if in_the_head else call), sentence)]
        return messages

    def example(self, rng: random.Random, held_out: bool) -> Example:
        kind, question, _, _, result = word_problem(rng, held_out)
        return Example([user(question)], result, {"kind": kind})


class MentalSums(WordProblems):
    """Word problems with most sums in the head, as people do them: RL learns that the calculator is better."""

    name, title, auto = "mental_sums", "mental sums", False
    in_the_head = 0.7


def word_problem(rng: random.Random, held_out: bool) -> tuple[str, str, str, str, str]:
    """Return kind, question, expression, sentence of the answer, and result of a random problem."""
    texts = TEXTS["word_problems"]
    plain = rng.random() < PLAIN_SHARE
    kind = rng.choice(list(texts["plain" if plain else "kinds"]))
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
        if is_held_out_pair(a, b) == held_out:
            break
    fields: dict[str, object] = {"a": a, "b": b}
    expression = texts["kinds"][kind]["expression"]
    if plain:
        question = rng.choice(texts["plain_frames"]).format(e=rng.choice(texts["plain"][kind]).format(**fields))
        sentence = "The answer is {r}."
    else:
        n, m = rng.sample(texts["names"], 2)
        fields |= {"n": n, "m": m, "x": rng.choice(texts["nouns"]), "p": rng.choice(texts["places"])}
        story = texts["kinds"][kind]
        question = f"{rng.choice(story['problems'])} {rng.choice(story['questions'])}".format(**fields)
        sentence = rng.choice(story["answers"])
    expression = expression.format(**fields)
    result = calculate(expression)
    assert result is not None and result.isdigit(), expression  # our own numbers
    return kind, question, expression, sentence.format(r=result, **fields), result


class Arithmetic(GeneratedTask):
    """Sums, differences and products without the calculator; the exam's pairs of numbers are never trained."""

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
            if is_held_out_pair(a, b) == held_out:
                break
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        space = rng.choice(("", " "))
        text = rng.choice(TEXTS["arithmetic"]["frames"]).format(e=f"{a}{space}{sign}{space}{b}")
        return Example([user(text)], str(result), {"kind": f"{digits}-digit {sign}"})


class SpellingBee(GeneratedTask):
    """How often a letter occurs in a word; an answer is right if its last number is the count.

    A model sees tokens, not letters, so the solution spells the word, counts, and checks with the calculator. Words
    come from chitchat.
    """

    name, title = "spelling_bee", "spelling bee"
    max_tokens = 96
    exam_seed = 20_260_202

    def grade(self, example: Example, answer: str) -> bool:
        numbers = re.findall(r"\d+", answer)
        return bool(numbers) and numbers[-1] == example.expected

    def conversation(self, rng: random.Random) -> Conversation:
        text, word, letter = self._question(rng, held_out=False)
        return [user(text), spelling_solution(word, letter)]

    def example(self, rng: random.Random, held_out: bool) -> Example:
        text, word, letter = self._question(rng, held_out)
        count = str(word.count(letter))
        return Example([user(text)], count, {"times": count if int(count) < 3 else "3 or more"})

    def _question(self, rng: random.Random, held_out: bool) -> tuple[str, str, str]:
        """Return question, word and letter."""
        word = rng.choice(words(held_out))
        letter = rng.choice(LETTERS if rng.random() < ABSENT_SHARE else word)
        return rng.choice(TEXTS["spelling_bee"]["questions"]).format(w=word, l=letter), word, letter


@functools.cache
def frequent_words() -> tuple[str, ...]:
    """Return the words of chitchat with `LEAST_USES` or more, sorted."""
    texts = (text for turns in chitchat_conversations() for turn in turns for text in turn)
    uses = collections.Counter(word for text in texts for word in re.findall(r"\b[a-z]{3,12}\b", text.lower()))
    return tuple(sorted(word for word, n in uses.items() if n >= LEAST_USES))


@functools.cache
def words(held_out: bool) -> tuple[str, ...]:
    """Return the exam's words, or the others, sorted."""
    return tuple(word for word in frequent_words() if is_held_out(word) == held_out)


def spelling_solution(word: str, letter: str) -> Message:
    """Return the word spelled out, counted along the way, and checked by the calculator."""
    spelled, seen = [], 0
    for character in word:
        seen += character == letter
        spelled.append(f"{character} {seen}" if character == letter else character)
    call, output = ("python", f"'{word}'.count('{letter}')"), ("python_output", str(seen))
    return assistant(
        f"{word}: {', '.join(spelled)}. Check: ", call, output, f" The letter {letter} is there {seen} times."
    )


class Lottery(GeneratedTask):
    """The lottery machine: an answer is right if all of `FIELDS` are; each field is also a reading of its own.

    Half of the exam's sessions have an outcome (tickets, and how many of each rank) that no training session has.
    """

    name, title = "lottery", "lottery"
    max_tokens = 240
    exam_size, exam_seed = 512, 20_260_204

    def conversation(self, rng: random.Random) -> Conversation:
        session = random_session(rng, held_out=False, skew=SKEW)
        return [user(session.question()), assistant(session.answer())]

    def examples(self) -> Sequence[Example]:
        rng = random.Random(self.exam_seed)
        drawn = [random_session(rng, held_out=bool(i % 2)) for i in range(self.exam_size)]
        return [
            self._example(s, outcome="new" if s.is_held_out() else "trained", tickets=str(len(s.tickets)))
            for s in drawn
        ]

    def train_examples(self, seed: int) -> Sequence[Example]:
        return [self._example(session) for session in sessions(self.train_size, seed + 1)]

    def _example(self, session: Session, **tags: str) -> Example:
        return Example([user(session.question())], session.fields(), tags)

    def grade(self, example: Example, answer: str) -> bool:
        return read_answer(answer) == example.expected

    def readings(self, example: Example, answer: str) -> dict[str, bool]:
        found = read_answer(answer)
        return {name: found[name] == example.expected[name] for name in FIELDS}
