"""Row files: fixed rows of `seq_len + 1` tokens on disk, memory-mapped and verified.

A folder holds `rows.bin`, the token ids (uint16 up to 65,536 of them, else uint32; little-endian), and what of them is
to be learned: `lengths.bin` (uint32 a row: so many tokens are real, the rest is padding) for documents, or
`weights.bin` (a byte per token: 1 where it is a target) for conversations; and `meta.json`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.data.shards import token_dtype
from jaxchat.errors import DataError
from jaxchat.run_dir import read_sealed, sha256_file, sync_directory, write_sealed

# Token sequences -> fixed rows by best fit, and what becomes of the rest of a document that is cut.


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


FORMAT = 3
LENGTH = np.dtype("<u4")


def write_rows(
    directory: Path, rows: Iterable[np.ndarray | tuple[np.ndarray, np.ndarray]], row_len: int, pad: int, vocab_size: int
) -> int:
    """Write rows, each at most `row_len` long, padded with `pad`; returns their number.

    Rows are all ids (every token is a target) or all pairs (ids, mask). They are written into a folder aside, which
    `finish_rows` puts in place; a failure leaves nothing of it.
    """
    aside = _aside(directory)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    dtype, count, source = token_dtype(vocab_size), 0, iter(rows)
    try:
        first = next(source, None)
        targets = "lengths.bin" if isinstance(first, np.ndarray) else "weights.bin"
        with open(aside / "rows.bin", "wb") as ids_file, open(aside / targets, "wb") as targets_file:
            for row in itertools.chain([] if first is None else [first], source):
                ids, mask = row if isinstance(row, tuple) else (row, None)
                full = np.full(row_len, pad, dtype)
                full[: len(ids)] = ids
                ids_file.write(full.tobytes())
                if mask is None:
                    targets_file.write(np.array(len(ids), LENGTH).tobytes())
                else:
                    weights = np.zeros(row_len, np.uint8)
                    weights[: len(ids)] = mask
                    targets_file.write(weights.tobytes())
                count += 1
            for file in (ids_file, targets_file):
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return count


def finish_rows(directory: Path, meta: dict[str, Any], row_len: int, count: int, vocab_size: int) -> dict[str, Any]:
    """Add sizes and checksums to `meta`, and put the written folder in place of `directory`; returns the meta."""
    aside = _aside(directory)
    targets = "lengths.bin" if (aside / "lengths.bin").exists() else "weights.bin"
    meta = meta | {
        "format": FORMAT,
        "rows": count,
        "row_len": row_len,
        "dtype": token_dtype(vocab_size).name,
        "targets": targets,
        "sha256": {name: sha256_file(aside / name) for name in ("rows.bin", targets)},
    }
    write_sealed(aside / "meta.json", meta)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(aside, directory)
    sync_directory(directory.parent)
    return meta


def finished_rows(directory: Path, origin: str) -> dict[str, Any] | None:
    """The meta of whole, undamaged rows whose meta has that "origin"; None where there are none."""
    with contextlib.suppress(DataError):
        meta = Rows(directory).meta
        if meta.get("origin") == origin:
            return meta
    return None


def _aside(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")


class Rows:
    """Random access to a row folder: `rows[i]` is (tokens int32 (row_len,), weights uint8 (row_len,)).

    Checked on opening by format, sizes, tokenizer and (unless `verify` is off) SHA-256; `DataError` names the fault.
    """

    def __init__(self, directory: str | Path, tokenizer_digest: str | None = None, verify: bool = True):
        self.directory = Path(directory)
        repair = f"delete {self.directory} and run its stage again"
        self.meta = read_sealed(self.directory / "meta.json", FORMAT, repair)
        if tokenizer_digest is not None and self.meta["tokenizer"] != tokenizer_digest:
            raise DataError(f"{self.directory}: made with another tokenizer; {repair}, or choose another --run-dir")
        count, row_len = self.meta["rows"], self.meta["row_len"]
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self._ids = self._map("rows.bin", dtype, (count, row_len), verify, repair)
        self._has_lengths = self.meta["targets"] == "lengths.bin"
        if self._has_lengths:
            self._targets = self._map("lengths.bin", LENGTH, (count,), verify, repair)
        else:
            self._targets = self._map("weights.bin", np.dtype(np.uint8), (count, row_len), verify, repair)
        self._positions = np.arange(row_len, dtype=np.uint32)

    def _map(self, name: str, dtype: np.dtype, shape: tuple[int, ...], verify: bool, repair: str) -> np.ndarray:
        path, size = self.directory / name, int(np.prod(shape)) * dtype.itemsize
        if not path.exists():
            raise DataError(f"{path}: missing; {repair}")
        if path.stat().st_size != size:
            raise DataError(f"{path}: {path.stat().st_size} bytes, must be {size} (truncated?); {repair}")
        if verify and sha256_file(path) != self.meta["sha256"].get(name):
            raise DataError(f"{path}: damaged (SHA-256 differs from meta.json); {repair}")
        # an empty file cannot be mapped
        return np.memmap(path, dtype, mode="r", shape=shape) if size else np.zeros(shape, dtype)

    def __len__(self) -> int:
        return self.meta["rows"]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, targets = self._ids[index].astype(np.int32), self._targets[index]
        weights = (self._positions < targets).astype(np.uint8) if self._has_lengths else np.asarray(targets)
        return tokens, weights

    def shifted(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs and targets int32 and weights float32, all (n, row_len - 1), of the n rows `numbers`, in order.

        Inputs are all tokens but the last, targets and weights all but the first. A few passes over whole arrays, in
        which numpy lets go of Python's lock: about twice the tokens a second of stacking row by row.
        """
        ids, targets = self._ids[numbers], self._targets[numbers]
        inputs, following = (np.ascontiguousarray(a, np.int32) for a in (ids[:, :-1], ids[:, 1:]))
        if not self._has_lengths:
            return inputs, following, targets[:, 1:].astype(np.float32)
        weights = np.ones(inputs.shape, np.float32)
        for i in np.flatnonzero(targets < ids.shape[1]):  # rows with padding are few
            weights[i, max(int(targets[i]) - 1, 0) :] = 0.0
        return inputs, following, weights
