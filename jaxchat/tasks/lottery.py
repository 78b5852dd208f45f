"""The lottery machine as an exam: every field of the output must be right, letter for letter."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from jaxchat.data.lottery import FIELDS, Session, is_held_out, random_session, read_answer, sessions
from jaxchat.tasks.base import DEFAULT_COUNT, Conversation, Example, WrittenTask, assistant, user

EXAM_SIZE = 512
RL_SIZE = 8192
EXAM_SEED = 20_260_204


class Lottery(WrittenTask):
    """An answer is right if all of `FIELDS` are; each field is also a reading of its own.

    Half of the exam's sessions have an outcome (tickets, and how many of each rank) that no training session has.
    """

    name, title = "lottery", "lottery"
    max_tokens = 240

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        for session in sessions(count or DEFAULT_COUNT, seed):
            yield [user(session.question()), assistant(session.answer())]

    def train_examples(self, seed: int) -> Sequence[Example]:
        return [Example([user(s.question())], s.fields()) for s in sessions(RL_SIZE, seed + 1)]

    def examples(self) -> Sequence[Example]:
        rng = random.Random(EXAM_SEED)
        drawn = [random_session(rng, held_out=bool(i % 2)) for i in range(EXAM_SIZE)]
        return [Example([user(s.question())], s.fields(), _tags(s)) for s in drawn]

    def grade(self, example: Example, answer: str) -> bool:
        return read_answer(answer) == example.expected

    def readings(self, example: Example, answer: str) -> dict[str, bool]:
        found = read_answer(answer)
        return {name: found[name] == example.expected[name] for name in FIELDS}


def _tags(session: Session) -> dict[str, str]:
    return {"outcome": "new" if is_held_out(session) else "trained", "tickets": str(len(session.tickets))}
