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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.data.tokenize import token_dtype
from jaxchat.errors import DataError
from jaxchat.paths import read_sealed, sha256_file, sync_directory, write_sealed

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
