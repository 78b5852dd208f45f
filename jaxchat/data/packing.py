"""Pack token sequences into fixed rows of `seq_len + 1` tokens, and read the row files, memory-mapped and verified.

A row folder holds `rows.bin`, the token ids (uint16 up to 65,536 ids, else uint32; little-endian), `meta.json`, and
what is a target: `lengths.bin` (uint32 a row: so many tokens are real, the rest is padding) for documents, or
`weights.bin` (a byte per token: 1 for a target) for conversations.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from jaxchat.data.shards import token_dtype
from jaxchat.errors import DataError
from jaxchat.run_dir import read_sealed, sha256_file, sync_directory, write_sealed

T = TypeVar("T")
MIN_CUT = 8  # a document is not cut for fewer free positions than this
FORMAT = 3
LENGTH = np.dtype("<u4")


@dataclass
class PackStats:
    """Counts of one packing run; `fill` is the share of row positions that hold tokens."""

    rows: int = 0
    tokens: int = 0  # placed, the additional token at the start of every remainder included
    documents: int = 0
    cuts: int = 0
    cropped: int = 0  # cuts whose remainder was dropped
    lost: int = 0  # tokens of the documents that are in no row
    row_len: int = 0

    @property
    def fill(self) -> float:
        return self.tokens / max(1, self.rows * self.row_len)


class _Pool(Generic[T]):
    """Items by length, with a bit set of the lengths present: best fit in constant time."""

    def __init__(self) -> None:
        self._by_length: dict[int, list[T]] = defaultdict(list)
        self._present = 0
        self.count = 0

    def add(self, length: int, item: T) -> None:
        self._by_length[length].append(item)
        self._present |= 1 << length
        self.count += 1

    def take_longest(self, at_most: int) -> T | None:
        length = (self._present & ((1 << (at_most + 1)) - 1)).bit_length() - 1
        return None if length < 0 else self._take(length)

    def take_shortest(self, at_least: int = 0) -> T | None:
        present = self._present >> at_least
        return self._take(at_least + (present & -present).bit_length() - 1) if present else None

    def _take(self, length: int) -> T:
        items = self._by_length[length]
        item = items.pop()
        if not items:
            self._present &= ~(1 << length)
        self.count -= 1
        return item


def pack_documents(
    documents: Iterable[np.ndarray], row_len: int, bos: int, window: int, stats: PackStats, remainder: str = "keep"
) -> Iterator[np.ndarray]:
    """Pack documents, each with `<|bos|>` first, into rows: 1-D arrays of at most `row_len` tokens, to be padded.

    Best fit over `window` documents at a time. A document is cut if it is longer than a row, or if no whole one fits
    into the rest of a row. `remainder` says what happens to the remainder of a cut document:
      "keep": it is packed like a document, after a `<|bos|>` of its own. Every token is in one row.
      "drop": it is dropped (`stats.lost`), so every `<|bos|>` starts a document. The shortest document is cut.
      "whole": as "drop", but only documents longer than a row are cut; the rest of a row stays empty.
    """
    stats.row_len = row_len
    pool, source = _Pool[np.ndarray](), iter(documents)
    row: list[np.ndarray] = []
    free = row_len
    while True:
        for document in itertools.islice(source, window - pool.count):
            stats.documents += 1
            if remainder == "keep":
                starts = range(row_len, len(document), row_len - 1)
                pieces = [document[:row_len], *(_remainder(document[: s + row_len - 1], s, bos) for s in starts)]
                document = pieces.pop()
                stats.cuts += len(pieces)
                yield from (_count(stats, piece) for piece in pieces)
            else:
                document = _cropped(document, row_len, stats)
            pool.add(len(document), document.copy())  # a view would keep the whole shard in memory
        fitting = pool.take_longest(free)
        if fitting is None and free >= MIN_CUT:
            if remainder == "keep" and (longest := pool.take_longest(row_len)) is not None:
                rest = _remainder(longest, free, bos)
                pool.add(len(rest), rest)
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


def _cropped(document: np.ndarray, length: int, stats: PackStats) -> np.ndarray:
    """Return the first `length` tokens, and count the dropped ones."""
    lost = max(0, len(document) - length)
    stats.lost += lost
    stats.cuts += lost > 0
    stats.cropped += lost > 0
    return document[:length]


def _remainder(document: np.ndarray, taken: int, bos: int) -> np.ndarray:
    return np.concatenate([np.array([bos], document.dtype), document[taken:]])


def _count(stats: PackStats, row: np.ndarray) -> np.ndarray:
    stats.rows += 1
    stats.tokens += len(row)
    return row


Rendered = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]  # ids and mask of a conversation


def pack_conversations(
    conversations: Sequence[Rendered], row_len: int, turn_end: int, stats: PackStats
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pack whole conversations into rows of (ids, mask) of at most `row_len` tokens, by best fit decreasing.

    A conversation longer than a row is cut after its last `turn_end` token that fits (at the row's end if not one turn
    fits) and counted in `stats.cuts`.
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
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    open_rows = _Pool[list[tuple[np.ndarray, np.ndarray]]]()  # by free positions
    for piece in pieces:
        row = open_rows.take_shortest(len(piece[0]))
        if row is None:
            row = []
            rows.append(row)
        row.append(piece)
        if free := row_len - sum(len(ids) for ids, _ in row):
            open_rows.add(free, row)
    for row in rows:
        yield _count(stats, np.concatenate([ids for ids, _ in row])), np.concatenate([mask for _, mask in row])


def write_rows(
    directory: Path, rows: Iterable[np.ndarray | tuple[np.ndarray, np.ndarray]], row_len: int, pad: int, vocab_size: int
) -> int:
    """Write rows of at most `row_len` tokens, padded with `pad`, into a folder aside, and return their number.

    Rows are all ids (every token is a target) or all pairs (ids, mask). `finish_rows` puts the folder in place; a
    failure leaves nothing of it.
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
    """Add sizes and checksums to `meta`, put the written folder in place of `directory`, and return the meta."""
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
    """Return the meta of undamaged rows with that "origin"; None if there are none."""
    with contextlib.suppress(DataError):
        meta = Rows(directory).meta
        if meta.get("origin") == origin:
            return meta
    return None


def _aside(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")


class Rows:
    """Random access to a row folder: `rows[i]` is (tokens int32 (row_len,), weights uint8 (row_len,)).

    Checks format, sizes, tokenizer and (if `verify`) SHA-256 on opening; `DataError` names the fault.
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
        return np.memmap(path, dtype, mode="r", shape=shape) if size else np.zeros(shape, dtype)  # cannot map nothing

    def __len__(self) -> int:
        return self.meta["rows"]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, targets = self._ids[index].astype(np.int32), self._targets[index]
        weights = (self._positions < targets).astype(np.uint8) if self._has_lengths else np.asarray(targets)
        return tokens, weights

    def shifted(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return inputs and targets (int32) and weights (float32), all (n, row_len - 1), of the n rows `numbers`.

        Inputs are all tokens but the last, targets and weights all but the first. Whole-array passes release Python's
        lock: about twice the tokens a second of stacking row by row.
        """
        ids, targets = self._ids[numbers], self._targets[numbers]
        inputs, following = (np.ascontiguousarray(a, np.int32) for a in (ids[:, :-1], ids[:, 1:]))
        if not self._has_lengths:
            return inputs, following, targets[:, 1:].astype(np.float32)
        weights = np.ones(inputs.shape, np.float32)
        for i in np.flatnonzero(targets < ids.shape[1]):  # rows with padding are few
            weights[i, max(int(targets[i]) - 1, 0) :] = 0.0
        return inputs, following, weights
