"""Sessions of a lottery machine: input, working and output, which can be checked.

A ticket costs 1,000 and holds six different numbers from 1 to 45. The prize depends on how many of them were drawn;
five and the bonus number are a rank of their own. The yield is the sum of prizes over the price of the tickets, in per
cent, rounded half up to one decimal. Rules and prizes are those of a programming exercise on Korea's lottery.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

PRICE = 1_000
NUMBERS, DRAWN = 45, 6
MOST_TICKETS = 8
# rank -> prize, smallest first
PRIZES = {
    "3": 5_000,
    "4": 50_000,
    "5": 1_500_000,
    "5+bonus": 30_000_000,
    "6": 2_000_000_000,
}
FIELDS = ("tickets", *PRIZES, "yield")
DOCUMENTS = 20_000  # of `synthetic:lottery` without a count
SKEW = 1.0  # of training: a model learns to compare numbers on sessions of few tickets
HELD_OUT_ONE_IN = 10  # outcomes (tickets and how many of each rank)

# how many of a ticket's numbers are drawn: chance alone would make nearly all of them 0 or 1, and nothing to learn
HITS = ("0", "1", "2", "3", "4", "5", "5+bonus", "6")
HIT_WEIGHTS = (3, 3, 3, 4, 4, 3, 3, 3)


@dataclass(frozen=True)
class Session:
    """One customer: tickets as drawn (not sorted), the six winning numbers and the bonus number."""

    tickets: tuple[tuple[int, ...], ...]
    winning: tuple[int, ...]
    bonus: int

    def hits(self, ticket: tuple[int, ...]) -> str:
        """Return how many numbers of a ticket were drawn, "5+bonus" if the bonus number is the sixth."""
        count = len(set(ticket) & set(self.winning))
        return "5+bonus" if count == 5 and self.bonus in ticket else str(count)

    def prize(self) -> int:
        return sum(PRIZES.get(self.hits(ticket), 0) for ticket in self.tickets)

    def fields(self) -> dict[str, str]:
        """Return the right output by the names of `FIELDS`."""
        hits, price = [self.hits(ticket) for ticket in self.tickets], PRICE * len(self.tickets)
        tenths = (2 * 1_000 * self.prize() + price) // (2 * price)  # in whole numbers: no float rounds 0.05 down
        counts = {rank: str(hits.count(rank)) for rank in PRIZES}
        return {"tickets": str(len(self.tickets)), **counts, "yield": f"{tenths // 10:,}.{tenths % 10}%"}

    def is_held_out(self) -> bool:
        """Return whether no training session has as many tickets of each rank. Those of a single ticket are trained."""
        outcome = " ".join(value for name, value in self.fields().items() if name != "yield")
        return len(self.tickets) > 1 and hashlib.sha256(outcome.encode()).digest()[0] * HELD_OUT_ONE_IN < 256

    def question(self) -> str:
        """Return the input: amount, tickets, winning numbers, bonus number."""
        lines = [" ".join(map(str, ticket)) for ticket in self.tickets]
        drawn = " ".join(map(str, self.winning))
        return "\n".join([f"paid {PRICE * len(lines):,}", *lines, f"drawn {drawn}", f"bonus {self.bonus}"])

    def answer(self) -> str:
        """Return the output, with the working between.

        The working is every ticket again (+ drawn, * bonus number, - neither, and the hits) and the sum of prizes.
        """
        fields = self.fields()
        lines = [f"tickets: {fields['tickets']}"]
        for ticket in self.tickets:
            marks = "".join(f"{n}{'+' if n in self.winning else '*' if n == self.bonus else '-'}" for n in ticket)
            lines.append(f"{marks} {self.hits(ticket)}")
        lines += [f"{rank}: {fields[rank]}" for rank in PRIZES]
        return "\n".join([*lines, f"prize: {self.prize():,}", f"yield: {fields['yield']}"])


def read_answer(text: str) -> dict[str, str]:
    """Return the fields of an answer: the last value of a repeated field, "" for a missing one."""
    found = dict.fromkeys(FIELDS, "")
    for line in text.splitlines():
        if match := re.fullmatch(r"\s*([\w+]+):\s*(\S+)\s*", line):
            found |= {match[1]: match[2]} if match[1] in found else {}
    return found


def random_session(rng: random.Random, held_out: bool | None = None, skew: float = 0.0) -> Session:
    """Draw a session of n tickets, 1 to `MOST_TICKETS`, with a chance proportional to n to the power of -`skew`.

    `held_out`: only outcomes that are (True) or are not (False) kept for the exam.
    """
    sizes = range(1, MOST_TICKETS + 1)
    while True:
        *winning, bonus = rng.sample(range(1, NUMBERS + 1), DRAWN + 1)
        (count,) = rng.choices(sizes, [n**-skew for n in sizes])
        others = [n for n in range(1, NUMBERS + 1) if n not in winning and n != bonus]
        tickets = []
        for hits in rng.choices(HITS, HIT_WEIGHTS, k=count):
            ticket = rng.sample(winning, int(hits[0]))
            if hits == "5+bonus" or (int(hits[0]) < 5 and rng.random() < 0.15):
                ticket.append(bonus)
            ticket += rng.sample(others, DRAWN - len(ticket))
            rng.shuffle(ticket)
            tickets.append(tuple(ticket))
        session = Session(tuple(tickets), tuple(winning), bonus)
        if held_out is None or session.is_held_out() == held_out:
            return session


def sessions(count: int, seed: int) -> Iterator[Session]:
    """Yield `count` training sessions, always the same for the same seed."""
    rng = random.Random(f"lottery {seed}")
    return (random_session(rng, held_out=False, skew=SKEW) for _ in range(count))


def documents(source: str) -> Iterator[str]:
    """Yield sessions as pretraining text: input, an empty line, output."""
    return (f"{session.question()}\n\n{session.answer()}" for session in sessions(count_of(source), 0))


def count_of(source: str) -> int:
    """Return the number of documents of `synthetic:lottery[:COUNT]`."""
    return int(source.removeprefix("synthetic:lottery")[1:] or DOCUMENTS)
