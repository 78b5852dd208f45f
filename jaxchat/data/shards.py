"""Documents -> token shards: a folder for each unit of the corpus, written by whoever is free, the same bytes always.

A unit's folder holds parts of about `data.shard_tokens` tokens: `train-000.bin` and `val-000.bin`, little-endian arrays
with `<|bos|>` in front of every document, and beside each a `.hash` with 8 bytes of every document's SHA-256; and, last
of all, `manifest.json`.
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
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxchat.data.sources import Unit, hash_fraction, text_digest
from jaxchat.errors import DataError, JaxchatError, UsageError
from jaxchat.run_dir import read_sealed, sha256_file, sync_directory, write_sealed
from jaxchat.tokenizer import Tokenizer

# Documents that came before, letter for letter, found in bounded memory.


RECENT = 1 << 16  # hashes in a set before they become a sorted array: 8 instead of about 70 bytes each


class Seen:
    """A set of 64-bit hashes: a small Python set, and sorted arrays of which each is more than twice the next."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: list[np.ndarray] = []

    def add(self, value: int) -> bool:
        """Whether it was there before."""
        if value in self._recent or any(self._holds(array, value) for array in self._sorted):
            return True
        self._recent.add(value)
        if len(self._recent) == RECENT:
            self._sorted.append(np.sort(np.fromiter(self._recent, np.uint64, RECENT)))
            self._recent.clear()
            while len(self._sorted) > 1 and len(self._sorted[-2]) <= 2 * len(self._sorted[-1]):
                merged = np.concatenate([self._sorted.pop(), self._sorted.pop()])
                merged.sort()
                self._sorted.append(merged)
        return False

    @staticmethod
    def _holds(array: np.ndarray, value: int) -> bool:
        place = int(np.searchsorted(array, np.uint64(value)))
        return place < len(array) and int(array[place]) == value


class Distinct:
    """Counts in `found` the documents that came before, letter for letter, and leaves them out where `drop`.

    Two documents are the same where 64 bits of their SHA-256 are: among 100 million different ones that is wrong once
    in some thousand corpora.
    """

    def __init__(self, drop: bool):
        self._seen, self._drop = Seen(), drop
        self.found = 0
        self.kept, self.kept_tokens = 0, 0

    def documents(self, hashed: Iterable[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
        """The token arrays of (tokens, hash); may be called for one source after the other."""
        for tokens, number in hashed:
            if self._seen.add(number):
                self.found += 1
                if self._drop:
                    continue
            self.kept += 1
            self.kept_tokens += len(tokens)
            yield tokens


# Independent jobs over the cores of this machine, or over a Ray cluster; results come in the order of the jobs.


J = TypeVar("J")
R = TypeVar("R")
ENGINES = ("local", "ray")
AHEAD = 4  # jobs of a generator that are taken ahead of the results, for each worker
ORPHAN_POLL = 0.5  # seconds between a worker's looks at whether its parent is still there


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(wanted: int, jobs: int) -> int:
    """Processes to start: `wanted`, or (-1) one a core, but none without a job."""
    return max(1, min(jobs, wanted if wanted > 0 else cores()))


def spread(work: Callable[[J], R], jobs: Iterable[J], engine: str, workers: int) -> Iterator[R]:
    """`work(job)` for every job, in other processes (`local`) or as Ray tasks; `work` and jobs must be picklable.

    A sequence of jobs is handed out at once. Of any other iterable a few jobs for each worker are in memory at a time.

    What a job raises is raised here; jobs not yet begun are dropped. With Ray, the cluster that `RAY_ADDRESS` names is
    used, or one is started on this machine; paths in the jobs must mean the same on all its machines.
    """
    if engine not in ENGINES:
        raise UsageError(f"data.engine: {engine!r} is unknown; choose from {', '.join(ENGINES)}")
    return _over_ray(work, jobs, workers) if engine == "ray" else _over_processes(work, jobs, workers)


def _over_processes(work: Callable[[J], R], jobs: Iterable[J], workers: int) -> Iterator[R]:
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would leave half dead
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_die_with, initargs=(os.getpid(),))
    at_once = len(jobs) if isinstance(jobs, Sequence) else AHEAD * workers
    waiting: collections.deque[concurrent.futures.Future[R]] = collections.deque()
    try:
        for job in jobs:
            if len(waiting) >= at_once:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, job))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenized was killed (out of memory?); the same command goes on, "
            "--set data.workers=1 needs the least memory"
        ) from None
    finally:
        _stop(pool)


def _stop(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Without waiting for jobs under way: what they have finished is on the disk."""
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)


def _die_with(parent: int) -> None:
    """A worker whose parent was killed ends too, instead of writing beside the next run; Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _over_ray(work: Callable[[J], R], jobs: Iterable[J], workers: int) -> Iterator[R]:
    try:
        import ray
    except ImportError:
        raise UsageError("data.engine: ray is not installed; pip install -e '.[ray]'") from None
    started = not ray.is_initialized()
    if started:
        # the cluster's machines must find this very package, wherever the command was started
        root = str(Path(__file__).resolve().parents[2])
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": root}})
    try:
        task: Any = ray.remote(max_retries=3)(_called)
        at_once = max(workers, 2 * int(ray.cluster_resources().get("CPU", 1)))  # submitted, so that nobody waits
        waiting: collections.deque[Any] = collections.deque()
        for job in jobs:
            if len(waiting) >= at_once:
                yield _result(ray, waiting.popleft())
            waiting.append(task.remote(work, job))
        while waiting:
            yield _result(ray, waiting.popleft())
    finally:
        if started:
            ray.shutdown()


def _called(work: Callable[[J], R], job: J) -> R:
    return work(job)  # Ray takes plain functions alone, no partial ones


def _result(ray: Any, reference: Any) -> Any:
    """What the task returned; its own error, not Ray's wrapping of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, JaxchatError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise DataError(f"data.engine ray: {str(error).splitlines()[0]}; the same command goes on") from None


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
