"""Row files: fixed rows of `seq_len + 1` tokens on disk, memory-mapped and verified."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.data.tokenize import token_dtype
from jaxchat.errors import DataError
from jaxchat.paths import read_json, sha256_file, sync_directory, write_json

FORMAT = 1
WRITE_ROWS = 4096  # buffered between writes


def write_rows(
    directory: Path, rows: Iterable[np.ndarray | tuple[np.ndarray, np.ndarray]], row_len: int, pad: int, vocab_size: int
) -> int:
    """Write rows (ids, or (ids, mask) pairs), each at most `row_len` long, padded with `pad`; returns their number.

    `rows.bin` holds the ids, `weights.bin` a byte per position: 1 where the token is a target to learn. Everything is
    written into a folder aside, which `finish_rows` puts in place.
    """
    aside = _aside(directory)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    dtype, count = token_dtype(vocab_size), 0
    with open(aside / "rows.bin", "wb") as ids_file, open(aside / "weights.bin", "wb") as weights_file:
        for row in rows:
            ids, mask = row if isinstance(row, tuple) else (row, np.ones(len(row), np.uint8))
            full = np.full(row_len, pad, dtype)
            weights = np.zeros(row_len, np.uint8)
            full[: len(ids)], weights[: len(ids)] = ids, mask
            ids_file.write(full.tobytes())
            weights_file.write(weights.tobytes())
            count += 1
        for file in (ids_file, weights_file):
            file.flush()
            os.fsync(file.fileno())
    return count


def finish_rows(directory: Path, meta: dict[str, Any], row_len: int, count: int, vocab_size: int) -> dict[str, Any]:
    """Add sizes and checksums to `meta`, and put the written folder in place of `directory`; returns the meta."""
    aside = _aside(directory)
    meta = meta | {
        "format": FORMAT,
        "rows": count,
        "row_len": row_len,
        "dtype": token_dtype(vocab_size).name,
        "sha256": {name: sha256_file(aside / name) for name in ("rows.bin", "weights.bin")},
    }
    write_json(aside / "meta.json", meta)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(aside, directory)
    sync_directory(directory.parent)
    return meta


def _aside(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")


class Rows:
    """Random access to a row folder: `rows[i]` is (tokens int32 (row_len,), weights uint8 (row_len,))."""

    def __init__(self, directory: str | Path, tokenizer_digest: str | None = None, verify: bool = True):
        self.directory = Path(directory)
        self.meta = read_json(self.directory / "meta.json")
        repair = f"delete {self.directory} and run its stage again"
        if tokenizer_digest is not None and self.meta["tokenizer"] != tokenizer_digest:
            raise DataError(f"{self.directory}: made with another tokenizer; {repair}")
        shape = (self.meta["rows"], self.meta["row_len"])
        arrays = []
        for name, dtype in (("rows.bin", np.dtype(self.meta["dtype"])), ("weights.bin", np.dtype(np.uint8))):
            path, size = self.directory / name, shape[0] * shape[1] * dtype.itemsize
            if not path.exists() or path.stat().st_size != size:
                found = path.stat().st_size if path.exists() else "no"
                raise DataError(f"{path}: {found} bytes, must be {size}; {repair}")
            if verify and sha256_file(path) != self.meta["sha256"][name]:
                raise DataError(f"{path}: damaged (SHA-256 differs); {repair}")
            arrays.append(np.memmap(path, dtype.newbyteorder("<"), mode="r", shape=shape))
        self._ids, self._weights = arrays

    def __len__(self) -> int:
        return self.meta["rows"]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._ids[index].astype(np.int32), np.asarray(self._weights[index])
