"""Tokenize documents into shards: a folder for each unit of the corpus, with the same bytes whoever writes it.

A unit's folder holds parts of about `shard_tokens` tokens: `train-000.bin` and `val-000.bin`, little-endian arrays
with `<|bos|>` before every document, and beside each a `.hash` with 8 bytes of every document's SHA-256. The last file
written is `manifest.json`. Work is spread over the cores of this machine, or over a Ray cluster.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxchat.data.sources import Unit, hash_fraction, text_hash
from jaxchat.errors import DataError, JaxchatError, UsageError, install_command
from jaxchat.run_dir import read_sealed, sha256_file, sync_directory, write_sealed
from jaxchat.tokenizer import Tokenizer

J = TypeVar("J")
R = TypeVar("R")
FORMAT = 4
SPLITS = ("train", "val")
SETTINGS = ("origin", "tokenizer", "bos", "vocab_size", "dtype")  # of a manifest; others begin anew
UNFINISHED = "unfinished.json"
HASH = np.dtype("<u8")
BATCH_DOCUMENTS, BATCH_CHARS = 512, 4_000_000  # encoded at once
AHEAD = 4  # jobs that are taken ahead of the results, for each worker
REPAIR = "delete the run's data folder and run stage prepare again"


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


def tokenize_unit(
    job: Job, alone: bool = False, on_tokens: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Tokenize one unit into `job.directory` and return its manifest; a finished unit is only verified.

    The manifest is written last: without it the parts do not count. Until then `unfinished.json` lists the complete
    parts, and the same call continues after them with the same bytes. Files of another origin are deleted. Memory
    holds one batch.
    Args:
      alone: no other unit is tokenized meanwhile, so that all cores may encode this one.
    """
    directory, tokenizer = Path(job.directory), Tokenizer.load(job.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    manifest: dict[str, Any] = {
        "format": FORMAT, "origin": job.origin, "tokenizer": tokenizer.digest, "bos": tokenizer.bos,
        "vocab_size": tokenizer.vocab_size, "dtype": dtype.name, "read": 0, "left_out": {},
        "splits": {split: {"tokens": 0, "documents": 0, "bytes": 0, "chars": 0} for split in SPLITS}, "parts": [],
    }  # fmt: skip
    if finished := _undamaged(directory / "manifest.json", manifest):
        return finished
    if begun := _undamaged(directory / UNFINISHED, manifest):
        manifest = begun
    else:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    counts = Counter[str]()
    batches = batches_of(itertools.islice(job.unit.documents(counts), manifest["read"], None))
    while batch := next(batches, []):
        names = {split: f"{split}-{len(manifest['parts']):03d}" for split in SPLITS}
        part: dict[str, dict[str, Any]] = {s: {"file": f"{names[s]}.bin", "tokens": 0, "documents": 0} for s in SPLITS}
        tokens = {split: HashedFile(directory / f"{names[split]}.bin") for split in SPLITS}
        hashes = {split: HashedFile(directory / f"{names[split]}.hash") for split in SPLITS}
        while batch:
            encoded = tokenizer.encode_batch(batch) if alone else [tokenizer.encode_batch([text])[0] for text in batch]
            for text, ids in zip(batch, encoded, strict=True):
                data = text.encode("utf-8", "surrogatepass")
                number = text_hash(data)
                split = "val" if hash_fraction(number) < job.limit else "train"
                tokens[split].write(np.array([tokenizer.bos, *ids], dtype).tobytes())
                hashes[split].write(number.to_bytes(8, "little"))
                sizes = manifest["splits"][split]
                sizes["bytes"] += len(data)
                sizes["chars"] += len(text)
                for counted in (sizes, part[split]):
                    counted["tokens"] += 1 + len(ids)
                    counted["documents"] += 1
            manifest["read"] += len(batch)
            on_tokens(manifest["splits"]["train"]["tokens"])
            full = any(part[split]["tokens"] >= job.shard_tokens for split in SPLITS)
            batch = [] if full else next(batches, [])
        for split in SPLITS:
            part[split] |= {"sha256": tokens[split].close(), "hashes_sha256": hashes[split].close()}
        manifest["parts"].append(part)
        sync_directory(directory)
        write_sealed(directory / UNFINISHED, manifest)
    manifest["left_out"] = dict(counts)
    write_sealed(directory / UNFINISHED, manifest)
    os.replace(directory / UNFINISHED, directory / "manifest.json")  # exactly one of both exists at any time
    sync_directory(directory)
    return manifest


def _undamaged(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return a manifest of the same origin and settings whose parts are undamaged; None if there is none."""
    with contextlib.suppress(DataError):
        manifest = read_sealed(path, FORMAT, REPAIR)
        if all(manifest[key] == settings[key] for key in SETTINGS):
            for part, split in itertools.product(manifest["parts"], SPLITS):
                read_shard(path.parent, part[split], manifest)
            return manifest
    return None


class HashedFile:
    """A file that is written under the name `PATH.partial`, and its SHA-256."""

    def __init__(self, path: Path):
        self._path, self._sha256 = path, hashlib.sha256()
        self._file = open(f"{path}.partial", "wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)

    def close(self) -> str:
        """Put the whole file in place, and return its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._file.name, self._path)
        return self._sha256.hexdigest()


def verify_file(path: Path, size: int, sha256: str | None, repair: str) -> None:
    """Raise `DataError` if a file is missing or has another size or SHA-256 (None: not compared)."""
    if not path.exists():
        raise DataError(f"{path}: missing; {repair}")
    if path.stat().st_size != size:
        raise DataError(f"{path}: {path.stat().st_size} bytes, must be {size} (truncated?); {repair}")
    if sha256 is not None and sha256_file(path) != sha256:
        raise DataError(f"{path}: damaged (its SHA-256 is not the recorded one); {repair}")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return uint16 if it holds every id, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def batches_of(documents: Iterable[str], chars: int = BATCH_CHARS) -> Iterator[list[str]]:
    """Yield lists of at most `BATCH_DOCUMENTS` documents that end when `chars` characters are reached."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == BATCH_DOCUMENTS or size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_shard(directory: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and document hashes of one shard, checked by size and SHA-256."""

    def checked(path: Path, dtype: np.dtype, count: int, sha256: str) -> np.ndarray:
        verify_file(path, count * dtype.itemsize, sha256, REPAIR)
        return np.fromfile(path, dtype)

    path, dtype = directory / entry["file"], np.dtype(manifest["dtype"]).newbyteorder("<")
    hashes = checked(path.with_suffix(".hash"), HASH, entry["documents"], entry["hashes_sha256"])
    return checked(path, dtype, entry["tokens"], entry["sha256"]), hashes


def read_documents(directory: Path, split: str, tokenizer_digest: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (tokens, hash) of a unit's documents, `<|bos|>` first. Verifies shards; `DataError` names a damaged one."""
    manifest = read_sealed(directory / "manifest.json", FORMAT, REPAIR)
    if manifest["tokenizer"] != tokenizer_digest:
        raise DataError(f"{directory}: made with another tokenizer; choose another --run-dir, or {REPAIR}")
    for part in manifest["parts"]:
        tokens, hashes = read_shard(directory, part[split], manifest)
        documents = np.split(tokens, np.flatnonzero(tokens == manifest["bos"])[1:])
        yield from zip(documents, hashes.tolist(), strict=False)  # an empty split has one empty document and no hash


class Distinct:
    """Counts exact duplicates in `duplicates`, and leaves them out if `drop`.

    Documents are the same if 64 bits of their SHA-256 are: among 100 million different ones that is wrong once in some
    thousand corpora. Needs about 80 bytes of memory a document.
    """

    def __init__(self, drop: bool):
        self._seen: set[int] = set()
        self._drop = drop
        self.duplicates, self.kept, self.kept_tokens = 0, 0, 0

    def documents(self, hashed: Iterable[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
        """Yield the tokens of (tokens, hash); may be called for one source after the other."""
        for tokens, number in hashed:
            if number in self._seen:
                self.duplicates += 1
                if self._drop:
                    continue
            self._seen.add(number)
            self.kept += 1
            self.kept_tokens += len(tokens)
            yield tokens


# Parallel work


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(wanted: int, jobs: int) -> int:
    """Return the number of processes to start: `wanted`, or (-1) one a core, but none without a job."""
    return max(1, min(jobs, wanted if wanted > 0 else cores()))


def parallel_map(work: Callable[[J], R], jobs: Iterable[J], engine: str, workers: int) -> Iterator[R]:
    """Yield `work(job)` in order, computed by other processes (`local`) or as Ray tasks; both must be picklable.

    What a job raises is raised here, and no other job begins. Ray uses the cluster of `RAY_ADDRESS`, or starts one on
    this machine; paths in the jobs must mean the same on all its machines.
    """
    with _ray(work, workers) if engine == "ray" else _processes(work, workers) as (submit, result, ahead):
        waiting: collections.deque[Any] = collections.deque()
        for job in jobs:
            if len(waiting) >= ahead:
                yield result(waiting.popleft())
            waiting.append(submit(job))
        while waiting:
            yield result(waiting.popleft())


Pool = tuple[Callable[[Any], Any], Callable[[Any], Any], int]  # submit, result, how many jobs to take ahead


@contextlib.contextmanager
def _processes(work: Callable[[J], R], workers: int) -> Iterator[Pool]:
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would leave half dead
    before = multiprocessing.active_children()
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        yield lambda job: pool.submit(work, job), concurrent.futures.Future.result, AHEAD * workers
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenized was killed (out of memory?); run the same command again, "
            "--set data.workers=1 needs the least memory"
        ) from None
    finally:  # without waiting for jobs under way: what they have finished is on the disk
        for process in multiprocessing.active_children():
            if process not in before:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker end when its parent is killed, instead of writing beside the next run; Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _ray(work: Callable[[J], R], workers: int) -> Iterator[Pool]:
    try:
        import ray
    except ImportError:
        raise UsageError(f"data.engine: ray is not installed; {install_command('ray')}") from None
    started = not ray.is_initialized()
    if started:
        # the cluster's machines must find this very package, wherever the command was started
        root = str(Path(__file__).resolve().parents[2])
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": root}})

    def result(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, JaxchatError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            first = str(error).splitlines()[0]
            raise DataError(f"data.engine ray: {first}; run the same command again") from None

    try:
        task: Any = ray.remote(max_retries=3)(_call)
        ahead = max(workers, 2 * int(ray.cluster_resources().get("CPU", 1)))  # so that no machine waits
        yield lambda job: task.remote(work, job), result, ahead
    finally:
        if started:
            ray.shutdown()


def _call(work: Callable[[J], R], job: J) -> R:
    return work(job)  # Ray takes only plain functions, no functools.partial
