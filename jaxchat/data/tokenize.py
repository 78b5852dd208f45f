"""Documents -> token shards: little-endian arrays with `<|bos|>` in front of every document, and a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.data.duplicates import Distinct
from jaxchat.errors import DataError
from jaxchat.paths import read_json, sha256_file, sync_directory, write_json
from jaxchat.text.tokenizer import Tokenizer

FORMAT = 2
BATCH_DOCUMENTS = 512
UNFINISHED = "unfinished.json"
COUNTS = ("tokens", "documents", "duplicates", "bytes", "chars", "shards")
MANIFEST_KEYS = {"origin", "tokenizer", "bos", "vocab_size", "dtype", *COUNTS}
REPAIR = "delete the run's data folder and run stage prepare again"


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while it holds every id, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def write_shards(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    directory: Path,
    shard_tokens: int,
    on_tokens: Callable[[int], None] = lambda count: None,
    origin: str = "",
    dedup: bool = False,
) -> dict[str, Any]:
    """Tokenize documents into `00000.bin`, ... of about `shard_tokens` tokens, and return the manifest.

    The manifest is written last: without it the shards do not count. Until then `unfinished.json` says which shards are
    whole, and the same call goes on behind them; the bytes are the same as without an interruption. `origin` stands for
    the documents and the settings: shards of another one are deleted. Documents that came before, letter for letter,
    are counted, and with `dedup` left out. Memory holds `BATCH_DOCUMENTS` documents and 8 bytes for every one so far.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    manifest: dict[str, Any] = {
        "format": FORMAT, "origin": origin, "tokenizer": tokenizer.digest, "bos": tokenizer.bos,
        "vocab_size": tokenizer.vocab_size, "dtype": dtype.name,
        "tokens": 0, "documents": 0, "duplicates": 0, "bytes": 0, "chars": 0, "shards": [],
    }  # fmt: skip
    if (begun := _unfinished(directory, manifest)) is not None:
        manifest = begun
    else:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    distinct = Distinct(documents, dedup)
    new = itertools.islice(distinct, manifest["documents"], None)
    batches = _token_batches(new, tokenizer, dtype, manifest, on_tokens)
    for first in batches:
        path = directory / f"{len(manifest['shards']):05d}.bin"
        manifest["shards"].append(_write_shard(path, itertools.chain([first], batches), shard_tokens))
        write_json(directory / UNFINISHED, manifest)
    manifest["duplicates"] = distinct.found
    write_json(directory / UNFINISHED, manifest)
    os.replace(directory / UNFINISHED, directory / "manifest.json")  # one of both is there at any time, never both
    sync_directory(directory)
    return manifest


def _unfinished(directory: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What an interrupted `write_shards` of the same origin has finished; None where there is nothing, or no longer."""
    with contextlib.suppress(DataError):
        begun = read_json(directory / UNFINISHED)
        if isinstance(begun, dict) and begun.keys() == wanted.keys():
            same = all(begun[key] == wanted[key] for key in wanted if key not in COUNTS)
            dtype = np.dtype(wanted["dtype"])
            for shard in begun["shards"] if same else ():
                read_shard(directory / shard["file"], shard, dtype, wanted["vocab_size"])
            return begun if same else None
    return None


def _token_batches(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    manifest: dict[str, Any],
    on_tokens: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """Documents as one array per batch of them, each with `<|bos|>` in front; counts them in the manifest."""
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, BATCH_DOCUMENTS)):
        parts = [np.array([tokenizer.bos, *ids], dtype) for ids in tokenizer.encode_batch(batch)]
        tokens = np.concatenate(parts).astype(dtype, copy=False)
        manifest["documents"] += len(batch)
        manifest["chars"] += sum(map(len, batch))
        manifest["bytes"] += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
        manifest["tokens"] += len(tokens)
        on_tokens(manifest["tokens"])
        yield tokens


def _write_shard(path: Path, batches: Iterator[np.ndarray], shard_tokens: int) -> dict[str, Any]:
    """Write batches until the shard has its size; returns its entry of the manifest."""
    count, checksum, aside = 0, hashlib.sha256(), path.with_suffix(".partial")
    with open(aside, "wb") as file:
        for tokens in batches:
            data = tokens.tobytes()
            file.write(data)
            checksum.update(data)
            count += len(tokens)
            if count >= shard_tokens:
                break
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_directory(path.parent)
    return {"file": path.name, "tokens": count, "sha256": checksum.hexdigest()}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a shard folder; `DataError` if it is missing, damaged or of another format."""
    path = directory / "manifest.json"
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not MANIFEST_KEYS <= manifest.keys():
        raise DataError(f"{path}: damaged, or of another version; {REPAIR}")
    if manifest["dtype"] != token_dtype(manifest["vocab_size"]).name:
        raise DataError(f"{path}: dtype {manifest['dtype']} does not go with the vocabulary; {REPAIR}")
    return manifest


def read_documents(directory: Path, tokenizer_digest: str) -> Iterator[np.ndarray]:
    """Token arrays of the documents, `<|bos|>` first. Verifies every shard; `DataError` names a damaged one."""
    manifest = read_manifest(directory)
    if manifest["tokenizer"] != tokenizer_digest:
        raise DataError(f"{directory}: made with another tokenizer; choose another --run-dir, or {REPAIR}")
    dtype = np.dtype(manifest["dtype"])
    for shard in manifest["shards"]:
        tokens = read_shard(directory / shard["file"], shard, dtype, manifest["vocab_size"])
        starts = np.flatnonzero(tokens == manifest["bos"])
        if not len(starts) or starts[0] != 0:
            raise DataError(f"{directory / shard['file']}: does not start with a document; {REPAIR}")
        for start, stop in itertools.pairwise([*starts.tolist(), len(tokens)]):
            yield tokens[start:stop]


def read_shard(path: Path, entry: dict[str, Any], dtype: np.dtype, vocab_size: int) -> np.ndarray:
    """One shard, checked by size, SHA-256 and the range of its ids."""
    if not path.exists():
        raise DataError(f"{path}: missing; {REPAIR}")
    if path.stat().st_size != entry["tokens"] * dtype.itemsize:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, must be {entry['tokens'] * dtype.itemsize} (truncated?); {REPAIR}"
        )
    if sha256_file(path) != entry["sha256"]:
        raise DataError(f"{path}: damaged (SHA-256 differs from the manifest); {REPAIR}")
    tokens = np.fromfile(path, dtype.newbyteorder("<"))
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise DataError(f"{path}: token id {int(tokens.max())} is outside the vocabulary of {vocab_size}; {REPAIR}")
    return tokens
