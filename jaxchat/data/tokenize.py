"""Documents -> token shards: little-endian arrays with `<|bos|>` in front of every document, and a manifest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.errors import DataError
from jaxchat.paths import atomic_write, read_json, sha256_file, write_json
from jaxchat.text.tokenizer import Tokenizer

FORMAT = 1
BATCH_DOCUMENTS = 512


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while it holds every id, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def write_shards(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    directory: Path,
    shard_tokens: int,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Tokenize documents into `00000.bin`, ... of about `shard_tokens` tokens, and return the manifest.

    The manifest is written last: without it the shards do not count. Memory is bounded by one shard.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    manifest = {
        "format": FORMAT, "tokenizer": tokenizer.digest, "bos": tokenizer.bos, "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name, "tokens": 0, "documents": 0, "bytes": 0, "chars": 0, "shards": [],
    }  # fmt: skip
    pending: list[np.ndarray] = []

    def flush() -> None:
        tokens = np.concatenate(pending)
        path = directory / f"{len(manifest['shards']):05d}.bin"
        atomic_write(path, tokens.tobytes())
        manifest["shards"].append({"file": path.name, "tokens": len(tokens), "sha256": sha256_file(path)})
        pending.clear()

    held = 0
    for batch in _batched(documents, BATCH_DOCUMENTS):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            pending.append(np.array([tokenizer.bos, *ids], dtype))
            manifest["documents"] += 1
            manifest["chars"] += len(text)
            manifest["bytes"] += len(text.encode("utf-8", "surrogatepass"))
            manifest["tokens"] += len(ids) + 1
            held += len(ids) + 1
        on_tokens(manifest["tokens"])
        if held >= shard_tokens:
            flush()
            held = 0
    if pending:
        flush()
    write_json(directory / "manifest.json", manifest)
    return manifest


def read_documents(directory: Path, tokenizer_digest: str) -> Iterator[np.ndarray]:
    """Token arrays of the documents, `<|bos|>` first. Verifies every shard; `DataError` names a damaged one."""
    manifest = read_json(directory / "manifest.json")
    if manifest["tokenizer"] != tokenizer_digest:
        raise DataError(f"{directory}: made with another tokenizer; choose another --run-dir, or delete this folder")
    dtype = np.dtype(manifest["dtype"])
    for shard in manifest["shards"]:
        tokens = read_shard(directory / shard["file"], shard, dtype, manifest["vocab_size"])
        starts = np.flatnonzero(tokens == manifest["bos"])
        if not len(starts) or starts[0] != 0:
            raise DataError(f"{directory / shard['file']}: does not start with a document; delete it and run again")
        for start, stop in itertools.pairwise([*starts.tolist(), len(tokens)]):
            yield tokens[start:stop]


def read_shard(path: Path, entry: dict[str, Any], dtype: np.dtype, vocab_size: int) -> np.ndarray:
    """One shard, checked by size, SHA-256 and the range of its ids."""
    repair = "delete the run's data folder and run stage prepare again"
    if not path.exists():
        raise DataError(f"{path}: missing; {repair}")
    if path.stat().st_size != entry["tokens"] * dtype.itemsize:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, must be {entry['tokens'] * dtype.itemsize} (truncated?); {repair}"
        )
    if sha256_file(path) != entry["sha256"]:
        raise DataError(f"{path}: damaged (SHA-256 differs from the manifest); {repair}")
    tokens = np.fromfile(path, dtype.newbyteorder("<"))
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise DataError(f"{path}: token id {int(tokens.max())} is outside the vocabulary of {vocab_size}; {repair}")
    return tokens


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
