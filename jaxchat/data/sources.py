"""Sources of pretraining text, and the split into training and held-out text by a hash of each document.

    chitchat                        the conversations of the chitchat-dataset package
    files:GLOB                      files at hand (`data/files.py`)
    hf:OWNER/NAME[@REV][:PATTERN]   files of a data set on the Hugging Face hub, or of a mirror (`data/hub.py`)
    synthetic:lottery[:COUNT]       generated sessions of a lottery machine (`data/lottery.py`)
    0.7 SOURCE + 0.3 SOURCE         a mixture: so large a share of the training tokens from each

A source consists of units, each of which can be read, tokenized and restarted by itself. A new kind of source needs a
module and a line in `SOURCES`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxchat.config import DataConfig
from jaxchat.data import hub, lottery
from jaxchat.data.files import check_encoding, find_files, read_file
from jaxchat.errors import DataError, UsageError

MIXTURE = re.compile(r"(\d+(?:\.\d+)?)\s+(\S.*)")


@dataclass(frozen=True)
class Kind:
    """A kind of source: it has files, or it makes documents. `check` raises `UsageError` for a malformed one."""

    form: str
    check: Callable[[str], object] | None = None
    files: Callable[[str, int, DataConfig], list[Path]] | None = None  # of a source with so many bytes of text
    documents: Callable[[str], Iterator[str]] | None = None
    size: Callable[[str], int] = lambda source: 0  # bytes of the documents, about
    package: str = ""  # whose version decides the documents


def chitchat_document(turns: Sequence[Sequence[str]]) -> str:
    """Return a conversation as pretraining text, a message a line."""
    return "\n".join(text for turn in turns for text in turn)


@functools.cache  # parsing takes most of a second; the texts take 40 MB
def chitchat_conversations() -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Return the conversations as turns of non-empty texts; empty turns and conversations are left out."""
    try:
        from chitchat_dataset import Dataset
    except ImportError:
        raise DataError("source chitchat: install it with pip install -r requirements.txt") from None
    conversations = []
    for record in Dataset().values():
        turns = (tuple(m["text"].strip() for m in turn if m["text"].strip()) for turn in record["messages"])
        conversations.append(tuple(turn for turn in turns if turn))
    return tuple(turns for turns in conversations if turns)


SOURCES = {
    "chitchat": Kind(
        "chitchat",
        documents=lambda source: (chitchat_document(turns) for turns in chitchat_conversations()),
        size=lambda source: 12_737_462,
        package="chitchat-dataset",
    ),
    "files": Kind("files:GLOB", files=lambda source, size, data: find_files(source)),
    "hf": Kind(
        "hf:OWNER/NAME",
        hub.parse,
        lambda source, size, data: hub.fetch(source, size, Path(data.cache_dir).expanduser() / "data", data.mirror),
    ),
    "synthetic": Kind(
        "synthetic:lottery",
        lottery.parse,
        documents=lambda source: lottery.documents(lottery.parse(source)),
        size=lambda source: 226 * lottery.parse(source),
    ),
}


def kind_of(source: str) -> Kind:
    """Return the kind of a source; `UsageError` for an unknown or malformed one."""
    kind = SOURCES.get(source.partition(":")[0])
    if kind is None or (kind.form == "chitchat" and source != "chitchat"):
        advice = f"did you mean files:{source}?" if os.path.exists(source) else "for example files:books/*.txt"
        forms = ", ".join(known.form for known in SOURCES.values())
        raise UsageError(f"data.source: {source!r} is unknown; take {forms}; {advice}")
    if kind.check:
        kind.check(source)
    return kind


@dataclass(frozen=True)
class Unit:
    """A part of a source: a file, or all of a source that has none."""

    source: str
    path: str = ""
    encoding: str = "auto"

    def documents(self, counts: Counter[str] | None = None) -> Iterator[str]:
        """Yield the non-empty documents, always in the same order; `counts` as in `read_file`."""
        if self.path:
            yield from read_file(Path(self.path), self.encoding, counts)
        elif make := kind_of(self.source).documents:
            yield from make(self.source)

    def content(self) -> list[Any]:
        """Return what tells this unit from a changed one."""
        if self.path:
            stat = Path(self.path).stat()
            return [self.path, stat.st_size, stat.st_mtime_ns, self.encoding]
        package = kind_of(self.source).package
        return [self.source, *(p.version for p in importlib.metadata.distributions(name=package) if package)]


@dataclass(frozen=True)
class Part:
    """One source of a mixture, or the only source. `weight`: its share of the training tokens."""

    source: str
    weight: float
    units: tuple[Unit, ...]
    partial: bool = False  # only as many files as the run needs were asked for

    def documents(self) -> Iterator[str]:
        """Yield all documents; `DataError` if there is none."""
        document = None
        for unit in self.units:
            for document in unit.documents():
                yield document
        if document is None:
            raise DataError(f"{self.source}: {len(self.units)} file(s), but no text in them")

    @property
    def web_scale(self) -> bool:
        """Return whether the hub has more of this text than the run needs."""
        return self.source.startswith("hf:") and self.partial

    def split(self, split: str, limit: float) -> Iterator[str]:
        """Yield the documents whose hash is below `limit` ("val"), or the others."""
        return (text for text in self.documents() if (document_hash(text) < limit) == (split == "val"))


def parse(source: str) -> list[tuple[str, float]]:
    """Return (source, share) of every part of `data.source`; `UsageError` for a malformed one."""
    terms = [term.strip() for term in source.split(" + ")] if MIXTURE.fullmatch(source.strip()) else [source]
    parts = []
    for term in terms:
        match = MIXTURE.fullmatch(term)
        if len(terms) > 1 and (match is None or not float(match[1])):
            raise UsageError(f"data.source: {term!r} in a mixture; write 0.7 SOURCE + 0.3 SOURCE")
        name, weight = (match[2], float(match[1])) if match else (term, 1.0)
        kind_of(name)
        parts.append((name, weight))
    total = sum(weight for _, weight in parts)
    return [(name, weight / total) for name, weight in parts]


def open_corpus(data: DataConfig) -> list[Part]:
    """Return the parts of `data.source` without the files of `data.val_source`.

    Files of the hub are downloaded, as many as `data.text_bytes` needs.
    Raises `DataError` that names what is missing or cannot be had, `UsageError` for a malformed source.
    """
    check_encoding(data.encoding)
    held_out = open_val(data)
    paths = {unit.path for unit in held_out.units} if held_out else set()
    parts = []
    for name, share in parse(data.source):
        size = max(1, round(data.text_bytes * share)) if data.text_bytes > 0 else 0
        units = tuple(unit for unit in _units(name, size, data) if unit.path not in paths or not unit.path)
        if not units:
            raise DataError(f"{name}: data.val_source {data.val_source} holds out all of its files; name other files")
        parts.append(Part(name, share, units, partial=size > 0))
    return parts


def open_val(data: DataConfig) -> Part | None:
    """Return all files of `data.val_source`, downloaded if they are on the hub; None if it is empty."""
    if not data.val_source:
        return None
    if not data.val_source.startswith(("hf:", "files:")):
        raise UsageError(f"data.val_source: {data.val_source!r}; write hf:OWNER/NAME:PATTERN or files:GLOB")
    if data.val_source.startswith("hf:"):
        hub.parse(data.val_source, "data.val_source")
    return Part(data.val_source, 1.0, _units(data.val_source, 0, data))


def _units(source: str, text_bytes: int, data: DataConfig) -> tuple[Unit, ...]:
    find = kind_of(source).files
    if find is None:
        return (Unit(source),)
    # absolute, since workers of a cluster have another working directory
    return tuple(Unit(source, os.path.abspath(file), data.encoding) for file in find(source, text_bytes, data))


def iterate_documents(source: str | DataConfig, split: str = "all", val_fraction: float = 0.01) -> Iterator[str]:
    """Yield the documents of `split` ("train", "val" or "all"), always in the same order, part after part.

    Held out ("val") are the documents of `data.val_source`, or those whose hash falls below `split_limit`, so that no
    other run, order or mixture can leak them into training.
    Args:
      source: the section `data`, whose `val_fraction` counts too, or just the source.
    Raises `DataError` that names what is missing, empty, unreadable or damaged.
    """
    data = source if isinstance(source, DataConfig) else DataConfig(source=source, val_fraction=val_fraction)
    if split == "val" and (held_out := open_val(data)):
        yield from held_out.documents()
        return
    parts = open_corpus(data)
    limit = 0.0 if split == "all" else training_limit(parts, data)
    for part in parts:
        yield from part.documents() if split == "all" else part.split(split, limit)


def training_limit(parts: Sequence[Part], data: DataConfig) -> float:
    """Return the hash below which no document of `data.source` is trained on; 0 with a `data.val_source`."""
    return 0.0 if data.val_source else split_limit(parts, data.val_fraction)


def interleaved(parts: Sequence[Part], split: str, limit: float) -> Iterator[str]:
    """Yield documents of all parts at once, each part with its share of the characters, as long as it lasts."""
    left = {i: part.split(split, limit) for i, part in enumerate(parts)}
    taken = dict.fromkeys(left, 0.0)
    while left:
        i = min(left, key=lambda i: taken[i])
        document = next(left[i], None)
        if document is None:
            del left[i]
        else:
            taken[i] += len(document) / parts[i].weight
            yield document


def fingerprint(parts: Iterable[Part]) -> str:
    """Return the SHA-256 of names, sizes and times of the sources' files, to see whether they have changed."""
    content = [[part.source, [unit.content() for unit in part.units]] for part in parts]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


def text_digest(text: str) -> bytes:
    """Return the SHA-256 of a document."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def hash_fraction(digest: bytes) -> float:
    """Return a number in [0, 1) from a document's digest."""
    return int.from_bytes(digest[:6], "big") / 2**48


def document_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return hash_fraction(text_digest(text))


def split_limit(parts: Sequence[Part] | str, val_fraction: float) -> float:
    """Return the hash below which a document is held out: `val_fraction`, unless that leaves a split empty.

    Then the document with the smallest hash is held out, or the one with the largest is kept for training. Reads no
    further than needed. All parts of a mixture have the same limit, the largest, so that none trains on what another
    holds out. `DataError` if a part has no two different documents, or none to train on.
    """
    if isinstance(parts, str):
        parts = open_corpus(DataConfig(source=parts, val_fraction=val_fraction))
    limits = []
    for part in parts:
        try:
            limits.append(limit_of_hashes(map(document_hash, part.documents()), val_fraction))
        except ValueError:
            raise DataError(
                f"{part.source}: only one document; at least 2 different ones are needed, one to train on and one held "
                "out: bring more text (a document is some 4,000 characters of it, or a file)"
            ) from None
    for part, limit in zip(parts, limits, strict=True):
        if limit < min(val_fraction, max(limits)):
            raise DataError(f"{part.source}: all of its few documents would be held out; add text, or leave it out")
    return max(limits)


def limit_of_hashes(hashes: Iterable[float], val_fraction: float) -> float:
    """Return the limit of `split_limit` for one part; `ValueError` if all hashes are the same."""
    smallest, largest = 1.0, -1.0
    for value in hashes:
        smallest, largest = min(smallest, value), max(largest, value)
        if smallest < val_fraction <= largest:
            return val_fraction
    if smallest >= largest:
        raise ValueError("no two different hashes")
    return smallest + 2**-48 if smallest >= val_fraction else largest
