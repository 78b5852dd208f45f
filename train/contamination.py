"""How much of each exam's text stands in the training text: 13 words in a row that both have (as GPT-3, 2005.14165).

The exams' 13-grams are kept as 64-bit hashes; the training documents stream past them, so memory does not grow with the
corpus. The result lies in `eval/overlap.json` and is kept for the same exams and the same documents.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.config import Config
from jaxchat.data.shards import batches_of
from jaxchat.data.sources import fingerprint, iterate_documents, open_corpus
from jaxchat.errors import JaxchatError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir, read_json, write_json
from jaxchat.tasks import core
from jaxchat.tasks.base import ChoiceExample, ChoiceTask, Example, Task, WrittenTask
from jaxchat.tasks.files import TaskFiles
from jaxchat.tasks.registry import get_task

# What a model has by heart: the passages of its own texts that stand in the training text, letter for letter.


WINDOW = 24  # bytes: shorter passages are found in any two texts of one language, and are not looked for
LONG_PASSAGE = 100  # bytes from which on a passage is counted as learned by heart
BASE = np.uint64(0x9E3779B97F4A7C15)


def copied_passages(texts: Sequence[str], documents: Iterable[str]) -> dict[str, Any]:
    """How much of `texts` stands in one of the documents.

    `longest`: characters of the longest common passage, `passage`: that passage, "" where it is under `WINDOW` bytes;
    `share`: of the texts' bytes, those inside passages of at least `LONG` bytes; `documents`: how many were searched.
    """
    samples = [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]
    hashes = [_windows(sample) for sample in samples]
    wanted = np.unique(np.concatenate([*hashes, np.zeros(1, np.uint64)]))
    covered = [np.zeros(len(sample), bool) for sample in samples]
    best, count = b"", 0
    for document in documents:
        count += 1
        text = np.frombuffer(document.encode("utf-8", "replace"), np.uint8)
        found = _windows(text)
        nearest = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        hits = np.flatnonzero(wanted[nearest] == found)
        for i, sample in enumerate(samples):
            for start, length in _matches(sample, hashes[i], text, found, hits):
                best = max(best, sample[start : start + length].tobytes(), key=len)
                if length >= LONG_PASSAGE:
                    covered[i][start : start + length] = True
    passage = best.decode("utf-8", "ignore")
    total = sum(map(len, samples))
    share = sum(int(c.sum()) for c in covered) / max(1, total)
    return {"longest": len(passage), "passage": passage, "share": share, "documents": count, "texts": len(texts)}


def _windows(data: np.ndarray) -> np.ndarray:
    """A hash of every `WINDOW` bytes, (n - WINDOW + 1,) uint64."""
    count = len(data) - WINDOW + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for i in range(WINDOW):
        hashes *= BASE
        hashes += data[i : i + count]
    return hashes


def _matches(
    sample: np.ndarray, sample_hashes: np.ndarray, text: np.ndarray, text_hashes: np.ndarray, hits: np.ndarray
) -> Iterable[tuple[int, int]]:
    """(start, length) in the sample of its passages that stand in the text, from the places where windows may match."""
    done: dict[int, int] = {}  # offset between the two -> where the last passage at that offset ended
    for place in hits.tolist():
        for start in np.flatnonzero(sample_hashes == text_hashes[place]).tolist():
            if start < done.get(place - start, -1):
                continue  # inside a passage that is known
            room = min(len(sample) - start, len(text) - place)
            differs = np.flatnonzero(sample[start : start + room] != text[place : place + room])
            length = int(differs[0]) if len(differs) else room
            if length >= WINDOW:  # not just equal hashes
                done[place - start] = start + length
                yield start, length


WORDS = 13
FORMAT = 1
CORE_PREFIX = "core: "  # before the names of CORE's tasks, some of which are also chat exams
BATCH_CHARS = 4_000_000  # of documents looked up together
MOST_WORDS = 2_000_000  # different words whose hashes are remembered
FILTER_BITS = 27  # of the first look-up, at most: 2^27 bytes
WORD = re.compile(r"[^\W_]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Hashes(dict[str, int]):
    """64-bit hashes of words, the same on every machine."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


def words(text: str) -> list[str]:
    """The normalized text: its words of letters and digits, in lower case."""
    return WORD.findall(text.lower())


def grams(texts: Iterable[Sequence[str]], hashes: Hashes) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all 13-grams (G,) uint64, and which text each is from (G,) int64; none crosses from text to text."""
    lengths, flat = [], []
    for text in texts:
        lengths.append(len(text))
        flat += [hashes[word] for word in text]
    counts = np.maximum(0, np.array(lengths, np.int64) - WORDS + 1)
    if not counts.sum():
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    ids = np.array(flat, np.uint64)
    every = np.zeros(len(ids) - WORDS + 1, np.uint64)
    with np.errstate(over="ignore"):
        for place in range(WORDS):
            every = every * MULTIPLIER + ids[place : place + len(every)]
    owners = np.repeat(np.arange(len(lengths)), counts)
    starts = np.cumsum([0, *lengths[:-1]])
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    return every[np.repeat(starts, counts) + within], owners


@dataclass
class Exam:
    """`keys` (G,) uint64 of its 13-grams and the question (G,) of each; `questions` in all."""

    questions: int
    keys: np.ndarray
    owners: np.ndarray

    def scores(self, seen: np.ndarray) -> dict[str, Any]:
        """`seen` (G,) bool: the gram stands in the training text."""
        looked_up, found = len(np.unique(self.owners)), len(np.unique(self.owners[seen]))
        return {
            "questions": self.questions,
            "looked_up": looked_up,
            "found": found,
            "share": found / max(1, looked_up),
            "grams": len(self.keys),
            "grams_found": int(seen.sum()),
            "gram_share": int(seen.sum()) / max(1, len(self.keys)),
        }


def exam_of(texts: Sequence[str], hashes: Hashes) -> Exam:
    """The 13-grams of questions, without the words that all of them begin or end with (those are the frame's)."""
    split = [words(text) for text in texts]
    if len(split) > 1:
        first, last = _shared(split), _shared([text[::-1] for text in split])
        split = [text[first : max(first, len(text) - last)] for text in split]
    keys, owners = grams(split, hashes)
    return Exam(len(texts), keys, owners)


def _shared(texts: Sequence[Sequence[str]]) -> int:
    low, high = min(map(list, texts)), max(map(list, texts))  # what these two share all do
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


class Searched:
    """The set of all exams' 13-grams, and which of them have been seen."""

    def __init__(self, keys: np.ndarray):
        self.keys = np.unique(keys)
        self.seen = np.zeros(len(self.keys), bool)
        bits = min(FILTER_BITS, max(10, (16 * len(self.keys)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[self._slots(self.keys)] = True

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return ((keys * MULTIPLIER) >> self._shift).astype(np.int64)

    def look_up(self, keys: np.ndarray) -> None:
        keys = keys[self._filter[self._slots(keys)]]
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        self.seen[at[self.keys[at] == keys]] = True

    def of(self, exam: Exam) -> np.ndarray:
        """(G,) bool for the exam's grams."""
        return self.seen[np.searchsorted(self.keys, exam.keys)]


def search(exams: dict[str, Exam], documents: Iterable[str], hashes: Hashes) -> tuple[dict[str, dict[str, Any]], int]:
    """Scores of every exam, and how many documents were read."""
    searched, read = Searched(np.concatenate([exam.keys for exam in exams.values()])), 0
    for batch in batches_of(documents, sys.maxsize, BATCH_CHARS):
        read += len(batch)
        if len(searched.keys):
            searched.look_up(grams(map(words, batch), hashes)[0])
    return {name: exam.scores(searched.of(exam)) for name, exam in exams.items()}, read


def exam_overlap(config: Config, run: RunDir, train_documents: int | None) -> dict[str, Any]:
    """For every exam that a stage has sat: questions, how many have a 13-gram of the training text, and of how many.

    An exam without data at hand has a `reason` instead; so has the whole, where the training text is not at hand.
    `train_documents`: how many there are, for the share of those read. Empty: switched off, or no exam was sat.
    """
    names = _sat(run)
    if not names or config.eval.overlap_documents == 0:
        return {}
    hashes = Hashes()
    exams, reasons = _exams(config, names, hashes)
    try:
        inputs = _inputs(config, exams)
        path = run.root / "eval" / "overlap.json"
        kept = read_json(path) if path.exists() else {}
        if kept.get("inputs") != inputs:
            documents = _documents(config)
            with progress("exam text in the training text", None) as bar:
                found, read = search(exams, bar.track(documents), hashes) if exams else ({}, 0)
            kept = {"inputs": inputs, "exams": found, "documents": read}
            write_json(path, kept)
            say(f"  {len(found)} exams' {WORDS}-grams looked up in {read:,} training documents")
    except JaxchatError as error:
        return {"words": WORDS, "reason": str(error)}
    return {
        "words": WORDS,
        "documents": kept["documents"],
        "document_share": min(1.0, kept["documents"] / train_documents) if train_documents else None,
        "exams": {name: kept["exams"].get(name) or {"reason": reasons[name]} for name in [*exams, *reasons]},
    }


def _documents(config: Config) -> Iterator[str]:
    limit = config.eval.overlap_documents
    documents = iterate_documents(config.data, "train")
    return itertools.islice(documents, limit if limit >= 0 else None)


def _inputs(config: Config, exams: dict[str, Exam]) -> dict[str, Any]:
    """What the result depends on."""
    digests = {name: hashlib.sha256(exam.keys.tobytes()).hexdigest() for name, exam in exams.items()}
    source = [fingerprint(open_corpus(config.data)), config.data.val_fraction, config.eval.overlap_documents]
    return {"format": FORMAT, "source": source, "exams": digests}


def _sat(run: RunDir) -> list[str]:
    """Names of the exams in the records; of CORE each task."""
    names: dict[str, None] = {}
    for path in sorted(Path(run.root / "eval").glob("*.json")):
        if path.name == "overlap.json":
            continue
        record = read_json(path)
        names |= dict.fromkeys(n for n, t in record.get("tasks", {}).items() if "accuracy" in t)
        names |= dict.fromkeys(f"{CORE_PREFIX}{label}" for label in record.get("core_tasks", {}))
    return list(names)


def _exams(config: Config, names: Sequence[str], hashes: Hashes) -> tuple[dict[str, Exam], dict[str, str]]:
    """The exams' 13-grams, and why some have none."""
    exams: dict[str, Exam] = {}
    reasons: dict[str, str] = {}
    for name in names:
        label = name.removeprefix(CORE_PREFIX)
        task = "core" if label != name else name
        files = TaskFiles.of(config, download=task in config.eval.exams)
        try:
            found = get_task(task, files)
            exams[name] = exam_of(_texts(found, label), hashes)
        except JaxchatError as error:
            reasons[name] = str(error)
    return exams, reasons


def _texts(task: Task, label: str) -> list[str]:
    """What is asked, options included; of CORE with the right continuation."""
    if isinstance(task, core.Core):
        part = next(part for part in core.CORE_TASKS if part.label == label)
        return [_core_text(part, item) for item in task.load(part)]
    if isinstance(task, WrittenTask | ChoiceTask):
        return [_prompt_text(example) for example in task.examples()]
    return []


def _prompt_text(example: Example | ChoiceExample) -> str:
    contents = [message["content"] for message in example.prompt]
    return "\n".join(c if isinstance(c, str) else " ".join(part["text"] for part in c) for c in contents)


def _core_text(part: core.CoreTask, item: core.Item) -> str:
    if part.kind == core.CHOICE:
        return f"{item['query']} {item['choices'][item['gold']]}"
    if part.kind == core.SCHEMA:
        return f"{item['context_options'][item['gold']]} {item['continuation']}"
    return f"{item['context']} {item['continuation']}"
