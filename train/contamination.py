"""Contamination (exam text in the training text) and memorization (training text in what the model writes)."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxchat.config import Config
from jaxchat.data.shards import batches_of
from jaxchat.data.sources import fingerprint, iterate_documents, open_corpus
from jaxchat.errors import JaxchatError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir, read_json, write_json
from jaxchat.tasks import core
from jaxchat.tasks.base import Task, TaskFiles
from jaxchat.tasks.registry import get_task

# Contamination: 13 words in a row that a question and a training document both have, as for GPT-3 (2005.14165). The
# exams' 13-grams are kept as 64-bit hashes and the documents stream past them, so memory does not grow with the corpus.

WORDS = 13
FORMAT = 1  # of `eval/overlap.json`
CORE_PREFIX = "core: "  # before the names of CORE's tasks, some of which are also chat exams
BATCH_CHARS = 4_000_000  # of documents looked up together
CACHED_WORDS = 1 << 20  # different words whose hashes are remembered
FILTER_BITS = 27  # of the first look-up, at most: 2^27 bytes
WORD = re.compile(r"[^\W_]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Grams = tuple[np.ndarray, np.ndarray]  # hashes (G,) uint64, and the number of the text that each is from (G,) int64


def exam_contamination(config: Config, run: RunDir, train_documents: int | None) -> dict[str, Any]:
    """For every exam that a stage has sat: how many questions share a 13-gram with the training text.

    An exam without data at hand has a `reason` instead; so has the whole, where the training text is not at hand.
    `train_documents`: how many there are, for the share of those read. Empty where it is switched off or no exam was
    sat. The result is kept in `eval/overlap.json` for the same exams and documents.
    """
    limit, reasons, exams = config.eval.overlap_documents, dict[str, str](), dict[str, tuple[int, Grams]]()
    names = _exams_sat(run) if limit else []
    if not names:
        return {}
    for name in names:
        label = name.removeprefix(CORE_PREFIX)
        task = "core" if label != name else name
        try:
            texts = question_texts(get_task(task, TaskFiles.of(config, download=task in config.eval.exams)), label)
            exams[name] = len(texts), question_grams(texts)
        except JaxchatError as error:
            reasons[name] = str(error)
    try:
        source = [fingerprint(open_corpus(config.data)), config.data.val_fraction, limit]
        digests = {name: hashlib.sha256(keys.tobytes()).hexdigest() for name, (_, (keys, _)) in exams.items()}
        inputs = {"format": FORMAT, "source": source, "exams": digests}
        path = run.root / "eval" / "overlap.json"
        result = read_json(path) if path.exists() else {}
        if result.get("inputs") != inputs:
            documents = itertools.islice(iterate_documents(config.data, "train"), limit if limit > 0 else None)
            with progress("exam text in the training text", None) as bar:
                found, read = search(exams, bar.track(documents)) if exams else ({}, 0)
            result = {"inputs": inputs, "exams": found, "documents": read}
            write_json(path, result)
            say(f"  {len(found)} exams' {WORDS}-grams looked up in {read:,} training documents")
    except JaxchatError as error:
        return {"words": WORDS, "reason": str(error)}
    return {
        "words": WORDS,
        "documents": result["documents"],
        "document_share": min(1.0, result["documents"] / train_documents) if train_documents else None,
        "exams": {name: result["exams"].get(name) or {"reason": reasons[name]} for name in [*exams, *reasons]},
    }


def _exams_sat(run: RunDir) -> list[str]:
    """Names of the exams in the records; of CORE each task."""
    names: dict[str, None] = {}
    for path in sorted((run.root / "eval").glob("*.json")):
        if path.name != "overlap.json":
            record = read_json(path)
            names |= dict.fromkeys(n for n, t in record.get("tasks", {}).items() if "accuracy" in t)
            names |= dict.fromkeys(f"{CORE_PREFIX}{label}" for label in record.get("core_tasks", {}))
    return list(names)


def question_texts(task: Task, label: str) -> list[str]:
    """Return the text of a question, options included; of CORE's task `label` with the right continuation."""
    if isinstance(task, core.Core):
        part = next(part for part in core.CORE_TASKS if part.label == label)
        keys = {core.CHOICE: ("query", "choices"), core.SCHEMA: ("context_options", "continuation")}
        first, second = keys.get(part.kind, ("context", "continuation"))
        return [
            " ".join(v[item["gold"]] if isinstance(v, list) else v for v in (item[first], item[second]))
            for item in task.load(part)
        ]
    contents = [[message["content"] for message in example.prompt] for example in task.examples()]
    return [
        "\n".join(c if isinstance(c, str) else " ".join(part["text"] for part in c) for c in question)
        for question in contents
    ]


def words(text: str) -> list[str]:
    """The normalized text: its words of letters and digits, in lower case."""
    return WORD.findall(text.lower())


@functools.lru_cache(CACHED_WORDS)
def word_hash(word: str) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def grams(texts: Iterable[Sequence[str]]) -> Grams:
    """Hashes of all 13-grams of texts of words; none crosses from text to text."""
    lengths, flat = list[int](), list[int]()
    for text in texts:
        lengths.append(len(text))
        flat += map(word_hash, text)
    counts = np.maximum(0, np.array(lengths, np.int64) - WORDS + 1)
    if not counts.sum():
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    ids = np.array(flat, np.uint64)
    hashes = np.zeros(len(ids) - WORDS + 1, np.uint64)
    for place in range(WORDS):
        hashes = hashes * MULTIPLIER + ids[place : place + len(hashes)]
    owners = np.repeat(np.arange(len(lengths)), counts)
    starts = np.cumsum([0, *lengths[:-1]])
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    return hashes[np.repeat(starts, counts) + within], owners


def question_grams(texts: Sequence[str]) -> Grams:
    """The 13-grams of questions, without the words that all of them begin or end with (those are the frame's)."""
    split = [words(text) for text in texts]
    if len(split) > 1:
        first, last = _shared(split), _shared([text[::-1] for text in split])
        split = [text[first : max(first, len(text) - last)] for text in split]
    return grams(split)


def _shared(texts: Sequence[Sequence[str]]) -> int:
    low, high = min(map(list, texts)), max(map(list, texts))  # what these two share all do
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def search(exams: dict[str, tuple[int, Grams]], documents: Iterable[str]) -> tuple[dict[str, dict[str, Any]], int]:
    """Look the grams of every exam (questions, grams) up; scores by exam, and how many documents were read."""
    keys = np.unique(np.concatenate([keys for _, (keys, _) in exams.values()]))
    seen, read = np.zeros(len(keys), bool), 0
    bits = min(FILTER_BITS, max(10, (16 * len(keys)).bit_length()))

    def slots(hashes: np.ndarray) -> np.ndarray:
        return ((hashes * MULTIPLIER) >> np.uint64(64 - bits)).astype(np.int64)

    occupied = np.zeros(1 << bits, bool)  # most grams end at this first look-up
    occupied[slots(keys)] = True
    for batch in batches_of(documents, sys.maxsize, BATCH_CHARS):
        read += len(batch)
        hashes, _ = grams(map(words, batch))
        hashes = hashes[occupied[slots(hashes)]]
        if len(keys):
            at = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
            seen[at[keys[at] == hashes]] = True
    scores = {}
    for name, (questions, (own, owners)) in exams.items():
        found = seen[np.searchsorted(keys, own)]
        looked_up, matched = len(np.unique(owners)), len(np.unique(owners[found]))
        scores[name] = {
            "questions": questions,
            "looked_up": looked_up,
            "found": matched,
            "share": matched / max(1, looked_up),
            "grams": len(own),
            "grams_found": int(found.sum()),
            "gram_share": int(found.sum()) / max(1, len(own)),
        }
    return scores, read


# Memorization: the passages of the model's own texts that are in the training text, letter for letter.

WINDOW = 24  # bytes: shorter passages are found in any two texts of one language, and are not looked for
LONG_PASSAGE = 100  # bytes from which on a passage counts as memorized


def memorized(texts: Sequence[str], documents: Iterable[str]) -> dict[str, Any]:
    """Return how much of `texts` is in one of the documents.

    `longest`: characters of the longest common passage, `passage`: that passage, "" where it is under `WINDOW` bytes;
    `share`: of the texts' bytes, those inside passages of at least `LONG_PASSAGE` bytes; `documents`: how many were
    searched.
    """
    samples = [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]
    hashes = [_windows(sample) for sample in samples]
    wanted = np.unique(np.concatenate([*hashes, np.zeros(1, np.uint64)]))
    inside = [np.zeros(len(sample), bool) for sample in samples]
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
                    inside[i][start : start + length] = True
    passage = best.decode("utf-8", "ignore")
    share = sum(int(part.sum()) for part in inside) / max(1, sum(map(len, samples)))
    return {"longest": len(passage), "passage": passage, "share": share, "documents": count, "texts": len(texts)}


def _windows(data: np.ndarray) -> np.ndarray:
    """A hash of every `WINDOW` bytes, (n - WINDOW + 1,) uint64."""
    hashes = np.zeros(max(0, len(data) - WINDOW + 1), np.uint64)
    for i in range(WINDOW if len(hashes) else 0):
        hashes *= MULTIPLIER
        hashes += data[i : i + len(hashes)]
    return hashes


def _matches(
    sample: np.ndarray, sample_hashes: np.ndarray, text: np.ndarray, text_hashes: np.ndarray, hits: np.ndarray
) -> Iterator[tuple[int, int]]:
    """(start, length) in the sample of its passages that are in the text; `hits`: where its windows may match."""
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
