"""Documents -> token shards: a folder for each unit of the corpus, written by whoever is free, the same bytes always.

A unit's folder holds parts of about `data.shard_tokens` tokens: `train-000.bin` and `val-000.bin`, little-endian arrays
with `<|bos|>` in front of every document, and beside each a `.hash` with 8 bytes of every document's SHA-256; and, last
of all, `manifest.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.data.corpus import Unit, hash_fraction, text_digest
from jaxchat.errors import DataError
from jaxchat.paths import read_sealed, sha256_file, sync_directory, write_sealed
from jaxchat.text.tokenizer import Tokenizer

FORMAT = 4
SPLITS = ("train", "val")
BATCH_DOCUMENTS, BATCH_CHARS = 512, 4_000_000  # encoded at once
UNFINISHED, ASIDE = "unfinished.json", ".part-"
SETTINGS = ("origin", "tokenizer", "bos", "vocab_size", "dtype")
REPAIR = "delete the run's data folder and run stage prepare again"
HASH = np.dtype("<u8")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while it holds every id, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


@dataclass(frozen=True)
class Job:
    """One unit to tokenize, complete enough to be sent to another process or machine.

    Documents whose hash falls below `limit` are held out. `origin` stands for the unit's content and all settings.
    """

    unit: Unit
    limit: float
    tokenizer: str
    directory: str
    shard_tokens: int
    origin: str


@dataclass
class _Part:
    """The two splits of one part, written aside."""

    number: int
    directory: Path
    dtype: np.dtype

    def __post_init__(self) -> None:
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.hashes: dict[str, list[int]] = {split: [] for split in SPLITS}
        self._files = {
            split: tempfile.NamedTemporaryFile(dir=self.directory, prefix=ASIDE, delete=False) for split in SPLITS
        }
        self._checksums = {split: hashlib.sha256() for split in SPLITS}

    def add(self, split: str, documents: list[np.ndarray], hashes: list[int]) -> None:
        tokens = np.concatenate(documents).astype(self.dtype, copy=False)
        data = tokens.tobytes()
        self._files[split].write(data)
        self._checksums[split].update(data)
        self.tokens[split] += len(tokens)
        self.hashes[split] += hashes

    def finish(self) -> dict[str, dict[str, Any]]:
        """Put the files in place; the part's entries of the manifest."""
        entries = {}
        for split, file in self._files.items():
            name = f"{split}-{self.number:03d}"
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, self.directory / f"{name}.bin")
            hashes = np.array(self.hashes[split], HASH).tobytes()
            with open(self.directory / f"{name}.hash", "wb") as beside:
                beside.write(hashes)
                beside.flush()
                os.fsync(beside.fileno())
            entries[split] = {
                "file": f"{name}.bin", "tokens": self.tokens[split], "sha256": self._checksums[split].hexdigest(),
                "documents": len(self.hashes[split]), "hashes_sha256": hashlib.sha256(hashes).hexdigest(),
            }  # fmt: skip
        sync_directory(self.directory)
        return entries

    def discard(self) -> None:
        for file in self._files.values():
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)


def tokenize_unit(
    job: Job, alone: bool = False, on_tokens: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Tokenize one unit into `job.directory` and return its manifest; nothing is done where that has been done before.

    The manifest is written last: without it the parts do not count. Until then `unfinished.json` says which parts are
    whole, and the same call goes on behind them; the bytes are the same as without an interruption. What is of another
    origin is deleted. Memory holds one batch, and 8 bytes for every document of a part.
    Args:
      alone: no other unit is tokenized meanwhile, so that all cores may encode this one.
    """
    directory, tokenizer = Path(job.directory), Tokenizer.load(job.tokenizer)
    manifest = _new_manifest(job, tokenizer)
    if (finished := _same(directory / "manifest.json", manifest, directory)) is not None:
        return finished
    if (begun := _same(directory / UNFINISHED, manifest, directory)) is not None:
        manifest = begun
    else:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    for aside in directory.glob(f"{ASIDE}*"):  # of a run that was killed
        aside.unlink()
    dtype, counts = np.dtype(manifest["dtype"]), Counter[str]()
    new = itertools.islice(job.unit.documents(counts), manifest["read"], None)
    batches = batches_of(new)
    while batch := next(batches, None):
        part = _Part(len(manifest["parts"]), directory, dtype)
        try:
            while batch:
                _add_batch(part, batch, job.limit, tokenizer, manifest, alone)
                on_tokens(manifest["splits"]["train"]["tokens"])
                full = part.tokens["train"] >= job.shard_tokens or part.tokens["val"] >= job.shard_tokens
                batch = None if full else next(batches, None)
            manifest["parts"].append(part.finish())
        except BaseException:
            part.discard()
            raise
        write_sealed(directory / UNFINISHED, manifest)
    manifest["left_out"] = dict(counts)
    write_sealed(directory / UNFINISHED, manifest)
    os.replace(directory / UNFINISHED, directory / "manifest.json")  # one of both is there at any time, never both
    sync_directory(directory)
    return manifest


def _new_manifest(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    sizes = {"tokens": 0, "documents": 0, "bytes": 0, "chars": 0}
    return {
        "format": FORMAT, "origin": job.origin, "tokenizer": tokenizer.digest, "bos": tokenizer.bos,
        "vocab_size": tokenizer.vocab_size, "dtype": token_dtype(tokenizer.vocab_size).name,
        "read": 0, "left_out": {}, "splits": {split: dict(sizes) for split in SPLITS}, "parts": [],
    }  # fmt: skip


def _same(path: Path, wanted: dict[str, Any], directory: Path) -> dict[str, Any] | None:
    """A manifest of the same origin and settings whose parts are all there; None where there is none."""
    with contextlib.suppress(DataError):
        found = read_sealed(path, FORMAT, REPAIR)
        if all(found[key] == wanted[key] for key in SETTINGS):
            for part, split in itertools.product(found["parts"], SPLITS):
                read_shard(directory, part[split], found)
            return found
    return None


def batches_of(documents: Iterable[str], count: int | None = None, chars: int | None = None) -> Iterator[list[str]]:
    """Documents in lists of at most `count`, and no longer than the one that reaches `chars` characters."""
    count, chars = count or BATCH_DOCUMENTS, chars or BATCH_CHARS
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == count or size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _add_batch(
    part: _Part, batch: list[str], limit: float, tokenizer: Tokenizer, manifest: dict[str, Any], alone: bool
) -> None:
    """Encode and write a batch of documents, and count it in the manifest."""
    encoded = tokenizer.encode_batch(batch) if alone else [tokenizer.encode_batch([text])[0] for text in batch]
    digests = [text_digest(text) for text in batch]
    for split in SPLITS:
        chosen = [i for i, d in enumerate(digests) if (hash_fraction(d) < limit) == (split == "val")]
        if chosen:
            documents = [np.array([tokenizer.bos, *encoded[i]], part.dtype) for i in chosen]
            part.add(split, documents, [int.from_bytes(digests[i][:8], "big") for i in chosen])
            sizes = manifest["splits"][split]
            sizes["documents"] += len(chosen)
            sizes["tokens"] += sum(map(len, documents))
            sizes["chars"] += sum(len(batch[i]) for i in chosen)
            sizes["bytes"] += sum(len(batch[i].encode("utf-8", "surrogatepass")) for i in chosen)
    manifest["read"] += len(batch)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a unit's folder; `DataError` if it is missing, damaged or of another format."""
    return read_sealed(directory / "manifest.json", FORMAT, REPAIR)


def read_documents(directory: Path, split: str, tokenizer_digest: str) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, hash) of a unit's documents, `<|bos|>` first. Verifies every shard; `DataError` names a damaged one."""
    manifest = read_manifest(directory)
    if manifest["tokenizer"] != tokenizer_digest:
        raise DataError(f"{directory}: made with another tokenizer; choose another --run-dir, or {REPAIR}")
    for part in manifest["parts"]:
        entry = part[split]
        tokens, hashes = read_shard(directory, entry, manifest)
        starts = np.flatnonzero(tokens == manifest["bos"])
        if len(starts) != len(hashes) or (len(starts) and starts[0] != 0):
            raise DataError(f"{directory / entry['file']}: {len(starts)} documents, must be {len(hashes)}; {REPAIR}")
        bounds = itertools.pairwise([*starts.tolist(), len(tokens)])
        for (start, stop), number in zip(bounds, hashes.tolist(), strict=True):
            yield tokens[start:stop], number


def read_shard(directory: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and document hashes of one shard, checked by size, SHA-256 and the range of its ids."""
    path = directory / entry["file"]
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    tokens = _read_array(path, dtype, entry["tokens"], entry["sha256"])
    hashes = _read_array(path.with_suffix(".hash"), HASH, entry["documents"], entry["hashes_sha256"])
    if len(tokens) and int(tokens.max()) >= manifest["vocab_size"]:
        raise DataError(
            f"{path}: token id {int(tokens.max())} is outside the vocabulary of {manifest['vocab_size']}; {REPAIR}"
        )
    return tokens, hashes


def _read_array(path: Path, dtype: np.dtype, count: int, checksum: str) -> np.ndarray:
    if not path.exists():
        raise DataError(f"{path}: missing; {REPAIR}")
    size = count * dtype.itemsize
    if path.stat().st_size != size:
        raise DataError(f"{path}: {path.stat().st_size} bytes, must be {size} (truncated?); {REPAIR}")
    if sha256_file(path) != checksum:
        raise DataError(f"{path}: damaged (SHA-256 differs from the manifest); {REPAIR}")
    return np.fromfile(path, dtype)
