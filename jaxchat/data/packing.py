"""Token sequences -> fixed rows by best fit, and what becomes of the rest of a document that is cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

MIN_CUT = 8  # a document is not cut for fewer free positions than this


@dataclass
class PackStats:
    """Counts of one packing run; `fill` is the share of row positions that hold tokens."""

    rows: int = 0
    tokens: int = 0  # placed, the one more token at the start of every rest included
    documents: int = 0
    cuts: int = 0
    cropped: int = 0  # cuts whose rest was thrown away
    lost: int = 0  # tokens of the documents that stand in no row
    row_len: int = 0

    @property
    def fill(self) -> float:
        return self.tokens / max(1, self.rows * self.row_len)


@dataclass
class _Pool:
    """Pieces by length, with a bit set of the lengths present: best fit in constant time."""

    by_length: dict[int, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    present: int = 0
    count: int = 0

    def add(self, piece: np.ndarray) -> None:
        self.by_length[len(piece)].append(piece)
        self.present |= 1 << len(piece)
        self.count += 1

    def take(self, at_most: int) -> np.ndarray | None:
        """The longest piece of at most that length."""
        length = (self.present & ((1 << (at_most + 1)) - 1)).bit_length() - 1
        return None if length < 0 else self._pop(length)

    def take_shortest(self) -> np.ndarray | None:
        return self._pop((self.present & -self.present).bit_length() - 1) if self.present else None

    def _pop(self, length: int) -> np.ndarray:
        pieces = self.by_length[length]
        piece = pieces.pop()
        if not pieces:
            self.present &= ~(1 << length)
        self.count -= 1
        return piece


def pack_documents(
    documents: Iterable[np.ndarray], row_len: int, bos: int, window: int, stats: PackStats, remainder: str = "keep"
) -> Iterator[np.ndarray]:
    """Pack documents, each with `<|bos|>` first, into rows: 1-D arrays of at most `row_len` tokens, to be padded.

    Best fit looks at `window` documents at a time. A document is cut where it is longer than a row, and where no whole
    one fits into what is left of a row. `remainder` says what becomes of the rest:
      "keep": it is packed like a document, behind a `<|bos|>` of its own. Every token stands in one row.
      "continue": it goes on at the start of the next row, behind the token before it. Every token is a target once.
      "drop": it is thrown away (`stats.lost`), so every `<|bos|>` starts a document. The shortest document is cut.
      "whole": as "drop", but only documents longer than a row are cut; what is left of a row stays empty.
    """
    stats.row_len = row_len
    if remainder == "continue":
        yield from _pack_continued(documents, row_len, window, stats)
        return
    pool, source, more = _Pool(), iter(documents), True
    row: list[np.ndarray] = []
    free = row_len
    while True:
        while more and pool.count < window:
            document = next(source, None)
            more = document is not None
            if document is None:
                break
            stats.documents += 1
            if remainder == "keep":
                *full, last = _pieces(document, row_len, bos)
                stats.cuts += len(full)
                for piece in full:
                    yield _count(stats, piece)
            else:
                last = _cropped(document, row_len, stats)
            pool.add(last.copy())  # a view would keep the whole shard in memory for as long as the piece waits
        fitting = pool.take(free)
        if fitting is None and free >= MIN_CUT:
            if remainder == "keep" and (longest := pool.take(row_len)) is not None:
                pool.add(_rest(longest, free, bos))
                stats.cuts += 1
                fitting = longest[:free]
            elif remainder == "drop" and (shortest := pool.take_shortest()) is not None:
                fitting = _cropped(shortest, free, stats)
        if fitting is not None:
            row.append(fitting)
            free -= len(fitting)
        elif not row:
            return
        if fitting is None or not free:
            yield _count(stats, np.concatenate(row))
            row, free = [], row_len


def _pack_continued(
    documents: Iterable[np.ndarray], row_len: int, window: int, stats: PackStats
) -> Iterator[np.ndarray]:
    """Rows of "continue". At most one rest waits: whatever is cut goes on in the very next row."""
    pool, source, more = _Pool(), iter(documents), True
    long: list[np.ndarray] = []  # documents longer than a row, which have to be cut anyway
    row: list[np.ndarray] = []
    free, rest = row_len, None
    while True:
        while more and pool.count + len(long) < window:
            document = next(source, None)
            more = document is not None
            if document is None:
                break
            stats.documents += 1
            if len(document) > row_len:
                long.append(document.copy())
            else:
                pool.add(document.copy())
        piece: np.ndarray | None = None
        if not row and (rest is not None or long):
            piece, rest = (rest if rest is not None else long.pop()), None
        else:
            piece = pool.take(free)
            if piece is None and free >= MIN_CUT:
                piece = long.pop() if long else pool.take(row_len)
        if piece is None and not row:
            return
        if piece is not None:
            if len(piece) > free:
                piece, rest = piece[:free], piece[free - 1 :]
                stats.cuts += 1
            row.append(piece)
            free -= len(piece)
        if piece is None or not free:
            yield _count(stats, np.concatenate(row))
            row, free = [], row_len


def _cropped(document: np.ndarray, length: int, stats: PackStats) -> np.ndarray:
    """The first `length` tokens; what is thrown away is counted."""
    lost = max(0, len(document) - length)
    stats.lost += lost
    stats.cuts += lost > 0
    stats.cropped += lost > 0
    return document[:length]


def _pieces(document: np.ndarray, row_len: int, bos: int) -> Iterator[np.ndarray]:
    """The document cut into pieces of at most `row_len`, each with a `<|bos|>` of its own."""
    yield document[:row_len]
    for start in range(row_len, len(document), row_len - 1):
        yield _rest(document[: start + row_len - 1], start, bos)


def _rest(document: np.ndarray, taken: int, bos: int) -> np.ndarray:
    return np.concatenate([np.array([bos], document.dtype), document[taken:]])


def _count(stats: PackStats, row: np.ndarray) -> np.ndarray:
    stats.rows += 1
    stats.tokens += len(row)
    return row


def pack_conversations(
    conversations: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]],
    row_len: int,
    turn_end: int,
    stats: PackStats,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of (ids, mask), whole conversations only, by best fit decreasing; each is copied when it is asked for.

    A conversation longer than a row is cut after its last `turn_end` token that fits (or at the row's end where not
    one turn fits) and counted in `stats.cuts`. Every row is at most `row_len` long.
    """
    stats.row_len = row_len
    pieces = []
    for ids, mask in conversations:
        if len(ids) > row_len:
            ends = [i + 1 for i in range(row_len) if ids[i] == turn_end and mask[i]]
            stop = ends[-1] if ends else row_len
            ids, mask = ids[:stop], mask[:stop]
            stats.cuts += 1
        pieces.append((np.asarray(ids), np.asarray(mask, np.uint8)))
        stats.documents += 1
    pieces.sort(key=lambda piece: -len(piece[0]))  # stable: equal lengths keep their order
    open_rows: dict[int, list[list[tuple[np.ndarray, np.ndarray]]]] = defaultdict(list)
    present, rows = 0, []
    for piece in pieces:
        need = len(piece[0])
        fitting = present >> need
        free = need + (fitting & -fitting).bit_length() - 1 if fitting else row_len
        if fitting:
            row = open_rows[free].pop()
            if not open_rows[free]:
                present &= ~(1 << free)
        else:
            row = []
            rows.append(row)
        row.append(piece)
        if free - need > 0:
            open_rows[free - need].append(row)
            present |= 1 << (free - need)
    for row in rows:
        yield _count(stats, np.concatenate([p[0] for p in row])), np.concatenate([p[1] for p in row])
