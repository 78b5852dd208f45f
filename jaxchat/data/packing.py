"""Token sequences -> fixed rows by best fit: nothing dropped, nothing twice, next to no padding."""

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
    tokens: int = 0  # placed, the extra `<|bos|>` of cut pieces included
    documents: int = 0
    cuts: int = 0
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
        if length < 0:
            return None
        pieces = self.by_length[length]
        piece = pieces.pop()
        if not pieces:
            self.present &= ~(1 << length)
        self.count -= 1
        return piece


def pack_documents(
    documents: Iterable[np.ndarray], row_len: int, bos: int, window: int, stats: PackStats
) -> Iterator[np.ndarray]:
    """Rows as 1-D arrays of at most `row_len` tokens (shorter: to be padded), each token of the corpus once.

    Documents start with `<|bos|>`. One longer than a row is cut into pieces, each with its own `<|bos|>`; a shorter
    one is cut only where nothing fits, and its rest goes back. Best fit looks at `window` documents at a time.
    """
    stats.row_len = row_len
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
            *full, last = _pieces(document, row_len, bos)
            stats.cuts += len(full)
            for piece in full:
                yield _count(stats, piece)
            pool.add(last.copy())  # a view would keep the whole shard in memory for as long as the piece waits
        fitting = _next_piece(pool, free, row_len, bos, stats)
        if fitting is not None:
            row.append(fitting)
            free -= len(fitting)
        elif not row:
            return
        if fitting is None or not free:
            yield _count(stats, np.concatenate(row))
            row, free = [], row_len


def _next_piece(pool: _Pool, free: int, row_len: int, bos: int, stats: PackStats) -> np.ndarray | None:
    """What best fills the `free` positions of a row; None where they stay empty, or the pool is."""
    piece = pool.take(free)
    if piece is None and free >= MIN_CUT and (longest := pool.take(row_len)) is not None:
        pool.add(_rest(longest, free, bos))
        stats.cuts += 1
        piece = longest[:free]
    return piece


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
