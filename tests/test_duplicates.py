"""Exact duplicates: found wherever they stand, in bounded memory, and left out only where asked."""

import random

import numpy as np
import pytest

from jaxchat.data import duplicates
from jaxchat.data.duplicates import Distinct, Seen


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
    texts = ["a", "b", "a", "안녕", "A", "안녕", "a", "\ud800", "\ud800"]
    distinct = Distinct(texts, drop)
    assert list(distinct) == (["a", "b", "안녕", "A", "\ud800"] if drop else texts) and distinct.found == 4
    assert list(distinct) and distinct.found == 4  # and again
