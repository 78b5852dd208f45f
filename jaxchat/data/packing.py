"""Pack token sequences into fixed rows of `seq_len + 1` tokens, and read the row files, memory-mapped and verified.

A row folder holds `rows.bin`, the token ids (uint16 up to 65,536 ids, else uint32; little-endian), `meta.json`, and
what is a target: `lengths.bin` (uint32 a row: so many tokens are real, the rest is padding) for documents, or
`weights.bin` (a byte per token: 1 for a target) for conversations.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from jaxchat.chat import Message, render
from jaxchat.data.shards import HashedFile, token_dtype, verify_file
from jaxchat.errors import DataError, UsageError
from jaxchat.run_dir import read_sealed, sync_directory, write_sealed
from jaxchat.tokenizer import Tokenizer

T = TypeVar("T")
MIN_CUT = 8  # a document is not cut for fewer free positions than this
FORMAT = 3
LENGTH = np.dtype("<u4")
MASK = np.dtype(np.uint8)


@dataclass
class PackStats:
    """Counts of one packing run; `fill` is the share of row positions that hold tokens."""

    rows: int = 0
    tokens: int = 0  # placed, the additional token at the start of every remainder included
    documents: int = 0
    cuts: int = 0
    cropped: int = 0  # cuts whose remainder was dropped
    lost: int = 0  # tokens of the documents that are in no row
    beginnings: int = 0  # rows before those of `pack_apart`'s remainders
    row_len: int = 0

    @property
    def fill(self) -> float:
        return self.tokens / max(1, self.rows * self.row_len)

    def row(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Return a row of these sequences, counted."""
        row = np.concatenate(tokens)
        self.rows += 1
        self.tokens += len(row)
        return row

    def crop(self, document: np.ndarray, length: int) -> np.ndarray:
        """Return the first `length` tokens, and count the dropped ones."""
        if len(document) > length:
            self.lost += len(document) - length
            self.cuts += 1
            self.cropped += 1
        return document[:length]


class _Pool(Generic[T]):
    """Items by length, with a bit set of the lengths present: best fit in constant time."""

    def __init__(self) -> None:
        self._items: dict[int, list[T]] = defaultdict(list)
        self._present = 0
        self.count = 0

    def add(self, length: int, item: T) -> None:
        self._items[length].append(item)
        self._present |= 1 << length
        self.count += 1

    def take_longest(self, at_most: int) -> T | None:
        """Remove and return the longest item of at most this length; of several the last one added."""
        length = (self._present & ((2 << at_most) - 1)).bit_length() - 1
        if length < 0:
            return None
        item = self._items[length].pop()
        self.count -= 1
        if not self._items[length]:
            self._present -= 1 << length
        return item

    def take_shortest(self, at_least: int = 0) -> T | None:
        """Remove and return the shortest item of at least this length; of several the last one added."""
        present = self._present >> at_least
        return self.take_longest(at_least + (present & -present).bit_length() - 1) if present else None


def begun(tokens: np.ndarray, bos: int) -> np.ndarray:
    """Return tokens behind a `<|bos|>`."""
    return np.concatenate([np.array([bos], tokens.dtype), tokens])


def pack_documents(
    documents: Iterable[np.ndarray],
    row_len: int,
    bos: int,
    window: int,
    stats: PackStats,
    remainder: str = "keep",
    dropped: list[np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Pack documents, each with `<|bos|>` first, into rows: 1-D arrays of at most `row_len` tokens, to be padded.

    Best fit over `window` documents at a time. A document is cut if it is longer than a row, or if no whole one fits
    into the rest of a row. `remainder` says what happens to the remainder of a cut document:
      "keep": it is packed like a document, after a `<|bos|>` of its own. Every token is in one row.
      "drop": it is dropped (`stats.lost`), so every `<|bos|>` starts a document. The shortest document is cut.
        `dropped` takes remainders of documents that were no longer than a row.
      "whole": as "drop", but only documents longer than a row are cut; the rest of a row stays empty.
    """
    stats.row_len = row_len
    pool, source = _Pool[np.ndarray](), iter(documents)
    row: list[np.ndarray] = []
    free = row_len

    while True:
        for document in itertools.islice(source, window - pool.count):
            stats.documents += 1
            if remainder != "keep":
                document = stats.crop(document, row_len)
            elif len(document) > row_len:
                stats.cuts += 1
                yield stats.row([document[:row_len]])
                for end in range(row_len, len(document), row_len - 1):
                    piece = begun(document[end : end + row_len - 1], bos)
                    if end + row_len - 1 < len(document):
                        stats.cuts += 1
                        yield stats.row([piece])
                document = piece
            pool.add(len(document), document.copy())  # a view would keep the whole shard in memory
        fitting = pool.take_longest(free)
        if fitting is None and free >= MIN_CUT:
            if remainder == "keep" and (longest := pool.take_longest(row_len)) is not None:
                fitting, rest = longest[:free], begun(longest[free:], bos)
                pool.add(len(rest), rest)
                stats.cuts += 1
            elif remainder == "drop" and (shortest := pool.take_shortest()) is not None:
                fitting = stats.crop(shortest, free)
                if dropped is not None and len(shortest) > free:
                    dropped.append(shortest[free:])
        if fitting is not None:
            row.append(fitting)
            free -= len(fitting)
        elif not row:
            return
        if fitting is None or not free:
            yield stats.row(row)
            row, free = [], row_len


def pack_apart(
    documents: Iterable[np.ndarray], again: Iterable[np.ndarray], row_len: int, bos: int, window: int, stats: PackStats
) -> Iterator[np.ndarray]:
    """Pack beginnings of documents as "drop" does (`stats.beginnings` rows), then all remainders as "keep" does.

    `again`: the same documents once more, so that long remainders need no memory.
    """
    dropped = list[np.ndarray]()
    yield from pack_documents(documents, row_len, bos, window, stats, "drop", dropped)
    stats.beginnings, count = stats.rows, stats.documents
    longer = (document[row_len:] for document in again if len(document) > row_len)
    remainders = (begun(remainder, bos) for remainder in itertools.chain(longer, dropped))
    yield from pack_documents(remainders, row_len, bos, window, stats)
    stats.documents, stats.lost, stats.cropped = count, 0, 0


Rendered = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]  # ids and mask of a conversation


def render_all(
    tokenizer: tuple[str, str], conversations: Sequence[tuple[str, bool, list[Message]]]
) -> list[tuple[str, bool, np.ndarray, np.ndarray]]:
    """Render (entry of the mixture, held out, messages) to (entry, held out, ids, mask), in any process.

    `tokenizer`: its folder and digest. `DataError` names the entry of a conversation that is out of form.
    """
    loaded, rendered = _loaded(*tokenizer), []
    for entry, held_out, messages in conversations:
        try:
            ids, mask = render(loaded, messages)
        except UsageError as error:
            raise DataError(f"sft.mixture: {entry}: a conversation is out of form: {error}") from None
        rendered.append((entry, held_out, np.array(ids, token_dtype(loaded.vocab_size)), np.array(mask, MASK)))
    return rendered


@functools.lru_cache(1)
def _loaded(path: str, digest: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.digest != digest:
        raise DataError(f"{path}: has changed while the conversations were rendered; run the same command again")
    return tokenizer


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
        stop = len(ids)
        if stop > row_len:
            stop = max((i + 1 for i in range(row_len) if ids[i] == turn_end and mask[i]), default=row_len)
            stats.cuts += 1
        pieces.append((np.asarray(ids[:stop]), np.asarray(mask[:stop], np.uint8)))
        stats.documents += 1
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    open_rows = _Pool[tuple[int, list[tuple[np.ndarray, np.ndarray]]]]()  # by free positions
    for piece in sorted(pieces, key=lambda piece: -len(piece[0])):  # stable: equal lengths keep their order
        free, row = open_rows.take_shortest(len(piece[0])) or (row_len, [])
        if not row:
            rows.append(row)
        row.append(piece)
        if free := free - len(piece[0]):
            open_rows.add(free, (free, row))
    for row in rows:
        yield stats.row([ids for ids, _ in row]), np.concatenate([mask for _, mask in row])


def write_rows(
    directory: Path,
    rows: Iterable[np.ndarray | tuple[np.ndarray, np.ndarray]],
    row_len: int,
    pad: int,
    vocab_size: int,
    facts: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Write rows of at most `row_len` tokens, padded with `pad`, in place of `directory`, and return its meta.

    Rows are all ids (every token is a target) or all pairs (ids, mask). `facts` is called after the last row; what it
    returns is added to the meta.
    """
    aside = directory.with_name(directory.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    dtype, count, source = token_dtype(vocab_size), 0, iter(rows)
    first = next(source, None)
    targets = "lengths.bin" if isinstance(first, np.ndarray) else "weights.bin"
    files = {name: HashedFile(aside / name) for name in ("rows.bin", targets)}
    for row in itertools.chain([] if first is None else [first], source):
        ids, mask = row if isinstance(row, tuple) else (row, None)
        full = np.full(row_len, pad, dtype)
        full[: len(ids)] = ids
        files["rows.bin"].write(full.tobytes())
        target = np.array(len(ids), LENGTH) if mask is None else np.zeros(row_len, MASK)
        if mask is not None:
            target[: len(ids)] = mask
        files[targets].write(target.tobytes())
        count += 1
    about = {"format": FORMAT, "rows": count, "row_len": row_len, "dtype": dtype.name, "targets": targets}
    meta = facts() | about | {"sha256": {name: file.close() for name, file in files.items()}}
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
        shape, targets = (self.meta["rows"], self.meta["row_len"]), self.meta["targets"]

        def mapped(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
            path, size = self.directory / name, int(np.prod(shape)) * dtype.itemsize
            verify_file(path, size, self.meta["sha256"].get(name, "") if verify else None, repair)
            # an empty file cannot be mapped
            return np.memmap(path, dtype, mode="r", shape=shape) if size else np.zeros(shape, dtype)

        self._ids = mapped("rows.bin", np.dtype(self.meta["dtype"]).newbyteorder("<"), shape)
        self._has_lengths = targets == "lengths.bin"
        self._targets = mapped(targets, LENGTH, shape[:1]) if self._has_lengths else mapped(targets, MASK, shape)

    def __len__(self) -> int:
        return self.meta["rows"]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, targets = self._ids[index].astype(np.int32), self._targets[index]
        weights = (np.arange(len(tokens)) < targets).astype(MASK) if self._has_lengths else np.asarray(targets)
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
