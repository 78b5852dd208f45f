"""Exact duplicates: found wherever they stand, in bounded memory, and left out only where asked."""

import random

import numpy as np
import pytest

from jaxchat.data import shards as duplicates
from jaxchat.data.shards import Distinct, Seen


@pytest.mark.parametrize("recent", [4, 64, 1 << 16])
def test_it_is_a_set(monkeypatch, recent):
    monkeypatch.setattr(duplicates, "RECENT", recent)
    draw, seen, known = random.Random(0), Seen(), set()
    for _ in range(5000):
        value = draw.choice([draw.randrange(3000), 2**64 - 1 - draw.randrange(3000)])
        assert seen.add(value) == (value in known)
        known.add(value)


def test_memory_is_a_few_bytes_a_document(monkeypatch):
    monkeypatch.setattr(duplicates, "RECENT", 256)
    seen = Seen()
    for value in range(20_000):
        seen.add(value * 0x9E3779B97F4A7C15 % 2**64)
    assert sum(array.nbytes for array in seen._sorted) + 8 * len(seen._recent) == 8 * 20_000
    assert len(seen._sorted) <= 8 and all(a.dtype == np.uint64 for a in seen._sorted)


@pytest.mark.parametrize("drop", [False, True])
def test_what_came_before_is_counted_and_dropped_by_choice(drop):
    numbers = [7, 8, 7, 9, 7, 9, 2**64 - 1, 2**64 - 1]
    hashed = [(np.full(i + 1, i), number) for i, number in enumerate(numbers)]
    distinct = Distinct(drop)
    found = [*distinct.documents(hashed[:5]), *distinct.documents(hashed[5:])]  # two sources, one memory
    assert [d[0] for d in found] == ([0, 1, 3, 6] if drop else list(range(8))) and distinct.found == 4
    assert (distinct.kept, distinct.kept_tokens) == (len(found), sum(map(len, found)))
