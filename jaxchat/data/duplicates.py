"""Documents that came before, letter for letter, found in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

RECENT = 1 << 16  # hashes in a set before they become a sorted array: 8 instead of about 70 bytes each


class Seen:
    """A set of 64-bit hashes: a small Python set, and sorted arrays of which each is more than twice the next."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: list[np.ndarray] = []

    def add(self, value: int) -> bool:
        """Whether it was there before."""
        if value in self._recent or any(self._holds(array, value) for array in self._sorted):
            return True
        self._recent.add(value)
        if len(self._recent) == RECENT:
            self._sorted.append(np.sort(np.fromiter(self._recent, np.uint64, RECENT)))
            self._recent.clear()
            while len(self._sorted) > 1 and len(self._sorted[-2]) <= 2 * len(self._sorted[-1]):
                merged = np.concatenate([self._sorted.pop(), self._sorted.pop()])
                merged.sort()
                self._sorted.append(merged)
        return False

    @staticmethod
    def _holds(array: np.ndarray, value: int) -> bool:
        place = int(np.searchsorted(array, np.uint64(value)))
        return place < len(array) and int(array[place]) == value


class Distinct:
    """Counts in `found` the documents that came before, letter for letter, and leaves them out where `drop`.

    Two documents are the same where 64 bits of their SHA-256 are: among 100 million different ones that is wrong once
    in some thousand corpora.
    """

    def __init__(self, drop: bool):
        self._seen, self._drop = Seen(), drop
        self.found = 0
        self.kept, self.kept_tokens = 0, 0

    def documents(self, hashed: Iterable[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
        """The token arrays of (tokens, hash); may be called for one source after the other."""
        for tokens, number in hashed:
            if self._seen.add(number):
                self.found += 1
                if self._drop:
                    continue
            self.kept += 1
            self.kept_tokens += len(tokens)
            yield tokens
