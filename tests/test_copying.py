"""Copied passages: the same as the slow way finds, in any language."""

import difflib
import random

import pytest

from train.contamination import LONG_PASSAGE, WINDOW, copied_passages

WORDS = [
    "river",
    "walked",
    "over",
    "the",
    "hill",
    "그는",
    "길을",
    "떠났다",
    "and",
    "then",
    "나무",
    "slowly",
    "back",
    "home",
]


def text(draw, words):
    return " ".join(draw.choice(WORDS) for _ in range(words))


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_the_slow_way_finds(seed):
    draw = random.Random(seed)
    documents = [text(draw, 120) for _ in range(8)]
    samples = [text(draw, 40) for _ in range(3)]
    samples[1] = samples[1][:50] + documents[5][100 : 160 + 20 * seed] + samples[1][50:]
    found = copied_passages(samples, documents)
    longest = max(
        difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
        for a in samples
        for b in documents
    )
    assert abs(found["longest"] - longest) <= 1  # a match may begin or end inside a character's bytes
    assert any(found["passage"] in d for d in documents) and any(found["passage"] in s for s in samples)
    assert (found["documents"], found["texts"]) == (8, 3)


def test_nothing_in_common():
    found = copied_passages(["abc" * 50], ["xyz" * 500, "", "a"])
    assert found == {"longest": 0, "passage": "", "share": 0.0, "documents": 3, "texts": 1}
    assert copied_passages([], ["text"])["share"] == 0.0 and copied_passages(["", "short"], ["short"])["longest"] == 0


def test_the_share_counts_long_passages_alone():
    document = text(random.Random(1), 400)
    new = "".join(chr(0x4E00 + i) for i in range(500))
    long, short = document[200 : 200 + LONG_PASSAGE + 50], document[900 : 900 + WINDOW + 8]
    sample = new[:100] + long + new[100:200] + short + new[200:]
    found = copied_passages([sample], [document])
    assert found["passage"] == long
    assert found["share"] == pytest.approx(len(long.encode()) / len(sample.encode()), abs=0.01)
    assert copied_passages([document], [document])["share"] == 1.0
