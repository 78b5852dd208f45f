"""What is asked of a scorer: spans of texts, and the rows of few lengths that they are laid into. No JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LENGTHS = 6  # prefix lengths at most
SMALLEST = 64  # tokens
TAILS = (32, 128)  # smallest and largest room for continuations, a quarter of the prefix in between


@dataclass(frozen=True)
class Span:
    """`tokens[start:end]` are scored, given what stands before them; start is at least 1."""

    tokens: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class SpanScore:
    """`loss`: nats of the whole span; `best`: every token was the likeliest one; `cropped`: tokens left out before."""

    loss: float
    count: int
    best: bool
    cropped: int = 0

    @property
    def mean(self) -> float:
        """NaN for an empty span."""
        return self.loss / self.count if self.count else math.nan


@dataclass
class Row:
    """A prefix, its continuations, and (index of the sequence, span) asked of each; -1 is the prefix itself."""

    prefix: list[int]
    tails: list[list[int]]
    spans: list[tuple[int, int, int]]  # of each continuation (or of the prefix alone): sequence, start, end


def lengths(seq_len: int) -> list[int]:
    """Prefix lengths: powers of two from 64 on, and the context rounded up to whole tiles of 128; six at most."""
    longest = seq_len if seq_len <= SMALLEST else -(-seq_len // 128) * 128
    powers = [1 << n for n in range(SMALLEST.bit_length() - 1, 31) if 1 << n < longest]
    return [*powers, longest][-LENGTHS:]


def tails(T: int) -> int:
    """Room for continuations beside a prefix of T positions."""
    return min(max(TAILS[0], T // 4), TAILS[1])


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many first tokens all share."""
    first, last = min(sequences), max(sequences)  # in the order of a dictionary, so what these two share all do
    low, high = 0, min(len(first), len(last))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == last[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def crop(group: Sequence[Span], context: int) -> tuple[list[Span], int]:
    """The group with at most `context` tokens each (0: any number), and how many were taken off its left.

    All sequences lose as many, so that the options of a question keep the same context; one that is still too long
    then loses more by itself. A span that began in what is lost begins at its second kept token.
    """
    over = max((len(span.tokens) for span in group), default=0) - context
    if not context or over <= 0:
        return list(group), 0
    shared = min(over, common_prefix([span.tokens for span in group]), *(max(0, x.start - 1) for x in group))
    short = []
    for span in group:
        cut = max(shared, len(span.tokens) - context)
        short.append(Span(span.tokens[cut:], max(1, span.start - cut), max(1, span.end - cut)))
    return short, over
