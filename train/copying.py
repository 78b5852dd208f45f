"""What a model has by heart: the passages of its own texts that stand in the training text, letter for letter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

WINDOW = 24  # bytes: shorter passages are found in any two texts of one language, and are not looked for
LONG = 100  # bytes from which on a passage is counted as learned by heart
BASE = np.uint64(0x9E3779B97F4A7C15)


def copied_passages(texts: Sequence[str], documents: Iterable[str]) -> dict[str, Any]:
    """How much of `texts` stands in one of the documents.

    `longest`: characters of the longest common passage, `passage`: that passage, "" where it is under `WINDOW` bytes;
    `share`: of the texts' bytes, those inside passages of at least `LONG` bytes; `documents`: how many were searched.
    """
    samples = [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]
    hashes = [_windows(sample) for sample in samples]
    wanted = np.unique(np.concatenate([*hashes, np.zeros(1, np.uint64)]))
    covered = [np.zeros(len(sample), bool) for sample in samples]
    best, count = b"", 0
    for document in documents:
        count += 1
        text = np.frombuffer(document.encode("utf-8", "replace"), np.uint8)
        found = _windows(text)
        nearest = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        hits = np.flatnonzero(wanted[nearest] == found)
        for i, sample in enumerate(samples):
            for start, length in _matches(sample, hashes[i], text, found, hits):
                best = max(best, sample[start : start + length].tobytes(), key=len)
                if length >= LONG:
                    covered[i][start : start + length] = True
    passage = best.decode("utf-8", "ignore")
    total = sum(map(len, samples))
    share = sum(int(c.sum()) for c in covered) / max(1, total)
    return {"longest": len(passage), "passage": passage, "share": share, "documents": count, "texts": len(texts)}


def _windows(data: np.ndarray) -> np.ndarray:
    """A hash of every `WINDOW` bytes, (n - WINDOW + 1,) uint64."""
    count = len(data) - WINDOW + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for i in range(WINDOW):
        hashes *= BASE
        hashes += data[i : i + count]
    return hashes


def _matches(
    sample: np.ndarray, sample_hashes: np.ndarray, text: np.ndarray, text_hashes: np.ndarray, hits: np.ndarray
) -> Iterable[tuple[int, int]]:
    """(start, length) in the sample of its passages that stand in the text, from the places where windows may match."""
    done: dict[int, int] = {}  # offset between the two -> where the last passage at that offset ended
    for place in hits.tolist():
        for start in np.flatnonzero(sample_hashes == text_hashes[place]).tolist():
            if start < done.get(place - start, -1):
                continue  # inside a passage that is known
            room = min(len(sample) - start, len(text) - place)
            differs = np.flatnonzero(sample[start : start + room] != text[place : place + room])
            length = int(differs[0]) if len(differs) else room
            if length >= WINDOW:  # not just equal hashes
                done[place - start] = start + length
                yield start, length
