"""Contamination (exam text in the training text) and memorization (training text in what the model writes).

Both look up short pieces by their hashes: 13 words in a row of an exam's questions, as for GPT-3 (2005.14165), and 24
bytes in a row of what the model wrote. The training documents stream past, so memory does not grow with them.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxchat.config import Config
from jaxchat.data.sources import fingerprint, iterate_documents, open_corpus, spoken
from jaxchat.engine.scoring import common_prefix
from jaxchat.errors import JaxchatError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir, read_json, write_json
from jaxchat.tasks import core, get_task
from jaxchat.tasks.base import Task, TaskFiles
from jaxchat.tasks.speech import NextTurn

WORDS = 13  # in a row that a question and a document share
WINDOW = 24  # bytes; shorter passages stand in any two texts of one language
LONG_PASSAGE = 100  # bytes from which on a passage counts as memorized
FORMAT = 2  # of `eval/overlap.json`
CORE_PREFIX = "core: "  # before the names of CORE's tasks, some of which are also chat exams
WORD = re.compile(r"[^\W_]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def training_documents(config: Config) -> Iterator[str]:
    """Yield the first `eval.overlap_documents` documents of the training text (-1: all of them)."""
    limit = config.eval.overlap_documents
    with progress("training documents searched", None) as bar:
        documents = iterate_documents(config.data, "train")
        yield from bar.track(itertools.islice(documents, limit if limit >= 0 else None))


def hashes(units: np.ndarray, size: int) -> np.ndarray:
    """Return a hash of every `size` units in a row of (n,) units: (n - size + 1,) uint64."""
    result = np.zeros(max(0, len(units) - size + 1), np.uint64)
    for i in range(size if len(result) else 0):
        result = result * MULTIPLIER + units[i : i + len(result)]
    return result


def words(text: str) -> list[str]:
    """Return the words of letters and digits, in lower case."""
    return WORD.findall(text.lower())


def grams(text: Sequence[str]) -> np.ndarray:
    """Return the hashes of all 13-grams of the words of one text; another process has others."""
    return hashes(np.array([hash(word) for word in text], np.int64).view(np.uint64), WORDS)


def question_grams(texts: Sequence[str]) -> list[np.ndarray]:
    """Return every question's 13-grams, without the words that all questions begin or end with."""
    split = [words(text) for text in texts]
    if len(split) > 1:
        first, last = common_prefix(split), common_prefix([text[::-1] for text in split])
        split = [text[first : max(first, len(text) - last)] for text in split]
    return [grams(text) for text in split]


def question_texts(task: Task, label: str) -> list[str]:
    """Return the text of a question, options included; of CORE's task `label` with the right continuation."""
    if isinstance(task, core.Core):
        part = next(part for part in core.CORE_TASKS if part.label == label)
        first, second = core.FIELDS[part.kind][:2]
        return [
            " ".join(v[item["gold"]] if isinstance(v, list) else v for v in (item[first], item[second]))
            for item in task.load(part)
        ]
    return [spoken(example.prompt) for example in task.examples()]


def search(exams: dict[str, list[np.ndarray]], documents: Iterable[str]) -> tuple[dict[str, dict[str, Any]], int]:
    """Look the grams of every exam's questions up; returns scores by exam, and how many documents were read."""
    wanted = {gram for questions in exams.values() for question in questions for gram in question.tolist()}
    seen, read = set[int](), 0
    for document in documents:
        read += 1
        seen |= wanted.intersection(grams(words(document)).tolist())
    scores = {}
    for name, questions in exams.items():
        looked_up = [question.tolist() for question in questions if len(question)]
        found = sum(not seen.isdisjoint(question) for question in looked_up)
        share = found / max(1, len(looked_up))
        scores[name] = {"questions": len(questions), "looked_up": len(looked_up), "found": found, "share": share}
    return scores, read


def exam_contamination(config: Config, run: RunDir, train_documents: int | None) -> dict[str, Any]:
    """Return for every exam of the records how many questions share a 13-gram with the training text.

    An exam without data at hand has a `reason` instead; so has the whole, where the training text is not at hand.
    `train_documents`: how many there are, for the share of those read. Empty where it is switched off or no exam was
    taken. The result is kept in `eval/overlap.json` for the same exams and documents.
    """
    path, names = run.root / "eval" / "overlap.json", dict[str, None]()
    for file in sorted(path.parent.glob("*.json")) if config.eval.overlap_documents else []:
        record = read_json(file) if file != path else {}
        names |= dict.fromkeys(name for name, task in record.get("tasks", {}).items() if "accuracy" in task)
        names |= dict.fromkeys(f"{CORE_PREFIX}{label}" for label in record.get("core_tasks", {}))
    names.pop(NextTurn.name, None)  # conversations of the run itself, held out
    if not names:
        return {}
    exams, reasons = dict[str, list[np.ndarray]](), dict[str, Any]()
    for name in names:
        label = name.removeprefix(CORE_PREFIX)
        task = name if label == name else "core"
        try:
            files = TaskFiles.of(config, download=task in config.eval.exams)
            exams[name] = question_grams(question_texts(get_task(task, files), label))
        except JaxchatError as error:
            reasons[name] = {"reason": str(error)}
    try:
        source = [fingerprint(open_corpus(config.data)), config.data.val_fraction, config.eval.overlap_documents]
        sums = {name: sum(sum(hashed.tolist()) for hashed in questions) for name, questions in exams.items()}
        inputs = {"format": FORMAT, "source": source, "exams": sums}
        result = read_json(path) if path.exists() else {}
        if result.get("inputs") != inputs:
            scores, read = search(exams, training_documents(config)) if exams else ({}, 0)
            result = {"inputs": inputs, "exams": scores, "documents": read}
            write_json(path, result)
            say(f"  {len(scores)} exams' {WORDS}-grams looked up in {read:,} training documents")
    except JaxchatError as error:
        return {"words": WORDS, "reason": str(error)}
    return {
        "words": WORDS,
        "documents": result["documents"],
        "document_share": min(1.0, result["documents"] / train_documents) if train_documents else None,
        "exams": {name: result["exams"][name] for name in exams} | reasons,
    }


def memorized(texts: Sequence[str], documents: Iterable[str]) -> dict[str, Any]:
    """Return how much of `texts` is in one of the documents, letter for letter.

    `longest`: characters of the longest common passage, `passage`: that passage, "" where it is under `WINDOW` bytes;
    `share`: of the texts' bytes, those inside passages of at least `LONG_PASSAGE` bytes; `documents`: how many were
    searched.
    """
    data = b"\xff".join(text.encode("utf-8", "replace") for text in texts)  # a byte that is in no document
    places: dict[int, list[int]] = defaultdict(list)
    for place, key in enumerate(hashes(np.frombuffer(data, np.uint8), WINDOW).tolist()):
        places[key].append(place)
    inside, best, count = np.zeros(len(data), bool), b"", 0
    for document in documents:
        count += 1
        text, end = document.encode("utf-8", "replace"), 0
        found = places.keys() & set(hashes(np.frombuffer(text, np.uint8), WINDOW).tolist())
        # a passage that begins later never ends earlier
        for start in sorted(place for key in found for place in places[key]):
            if end < start + WINDOW:
                if data[start : start + WINDOW] not in text:  # equal hashes alone
                    continue
                end = start + WINDOW
            while end < len(data) and data[start : end + 1] in text:
                end += 1
            best = max(best, data[start:end], key=len)
            if end - start >= LONG_PASSAGE:
                inside[start:end] = True
    passage = best.decode("utf-8", "ignore")
    share = int(inside.sum()) / max(1, len(data) - len(texts) + 1)
    return {"longest": len(passage), "passage": passage, "share": share, "documents": count, "texts": len(texts)}
