"""Sources of pretraining text, their documents one by one, and the split by a hash of each document's text.

    chitchat                        the conversations of the chitchat-dataset package
    files:GLOB                      files at hand (`data/files.py`)
    hf:OWNER/NAME[@REV][:PATTERN]   files of a data set on the Hugging Face hub, or of a mirror (`data/hub.py`)
    synthetic:lottery[:COUNT]       generated sessions of a lottery machine (`data/lottery.py`)
    0.7 SOURCE + 0.3 SOURCE         a mixture: so large a share of the training tokens from each

A source consists of units, each of which can be read, tokenized and restarted by itself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxchat.config import DataConfig
from jaxchat.data import hub, lottery
from jaxchat.data.files import check_encoding, find_files, read_file
from jaxchat.errors import DataError, UsageError

MIXTURE = re.compile(r"(\d+(?:\.\d+)?)\s+(\S.*)")
KNOWN = "chitchat, files:GLOB, hf:OWNER/NAME, synthetic:lottery"


@dataclass(frozen=True)
class Unit:
    """A part of a source: a file, or all of a source that has none."""

    source: str
    path: str = ""
    encoding: str = "auto"

    def documents(self, counts: Counter[str] | None = None) -> Iterator[str]:
        """Those with text in them, always in the same order; `counts` as in `read_file`."""
        if self.path:
            yield from read_file(Path(self.path), self.encoding, counts)
        elif self.source == "chitchat":
            yield from (chitchat_document(turns) for turns in chitchat_conversations())
        else:
            yield from lottery.documents(_lottery_count(self.source))

    def content(self) -> list[Any]:
        """What tells this unit from a changed one."""
        if self.path:
            stat = Path(self.path).stat()
            return [self.path, stat.st_size, stat.st_mtime_ns, self.encoding]
        if self.source == "chitchat":
            return [self.source, *(p.version for p in importlib.metadata.distributions(name="chitchat-dataset"))]
        return [self.source]


@dataclass(frozen=True)
class Part:
    """One source of a mixture, or the only one there is. `weight`: its share of the training tokens."""

    source: str
    weight: float
    units: tuple[Unit, ...]
    partial: bool = False  # only as many files as the run needs were asked for

    def documents(self) -> Iterator[str]:
        """All of them; `DataError` if there is none."""
        document = None
        for unit in self.units:
            for document in unit.documents():
                yield document
        if document is None:
            raise DataError(f"{self.source}: {len(self.units)} file(s), but no text in them")

    @property
    def web_scale(self) -> bool:
        """Whether it is a part of a data set on the hub, of which there is more than the run needs."""
        return self.source.startswith("hf:") and self.partial

    def split(self, split: str, limit: float) -> Iterator[str]:
        """Those below (`split` "val") or not below (any other) a limit of `split_limit`."""
        return (text for text in self.documents() if (document_hash(text) < limit) == (split == "val"))


def parse(source: str) -> list[tuple[str, float]]:
    """(source, share) of every part of `data.source`; `UsageError` for what is none."""
    pieces = source.split(" + ") if MIXTURE.fullmatch(source.strip()) else [source]
    found = []
    for piece in pieces:
        match = MIXTURE.fullmatch(piece.strip())
        if len(pieces) > 1 and (match is None or not float(match[1])):
            raise UsageError(f"data.source: {piece.strip()!r} in a mixture; write 0.7 SOURCE + 0.3 SOURCE")
        name, weight = (match[2], float(match[1])) if match else (piece, 1.0)
        if name.startswith("hf:"):
            hub.parse(name)
        elif name.startswith("synthetic:"):
            _lottery_count(name)
        elif name != "chitchat" and not name.startswith("files:"):
            advice = f"did you mean files:{name}?" if os.path.exists(name) else "for example files:books/*.txt"
            raise UsageError(f"data.source: {name!r} is unknown; take {KNOWN}; {advice}")
        found.append((name, weight))
    total = sum(weight for _, weight in found)
    return [(name, weight / total) for name, weight in found]


def open_corpus(data: DataConfig) -> list[Part]:
    """The parts of `data.source`; those of the hub are downloaded here, as many files as `data.text_bytes` needs.

    Files of `data.val_source` are left out.
    Raises `DataError` that names what is missing or cannot be had, `UsageError` for a malformed source.
    """
    check_encoding(data.encoding)
    if not 0 <= data.val_fraction < 1:
        raise UsageError(f"data.val_fraction: {data.val_fraction} is not at least 0 and below 1")
    held_out = open_val(data)
    paths = {unit.path for unit in held_out.units} if held_out else set()
    parts = []
    for name, share in parse(data.source):
        wanted = max(1, round(data.text_bytes * share)) if data.text_bytes > 0 else 0
        units = tuple(unit for unit in _units(name, wanted, data) if unit.path not in paths or not unit.path)
        if not units:
            raise DataError(f"{name}: data.val_source {data.val_source} holds all of its files out; name other files")
        parts.append(Part(name, share, units, partial=wanted > 0))
    return parts


def open_val(data: DataConfig) -> Part | None:
    """All files of `data.val_source`, downloaded where they are on the hub; None where it is empty."""
    if not data.val_source:
        return None
    if not data.val_source.startswith(("hf:", "files:")):
        raise UsageError(f"data.val_source: {data.val_source!r}; write hf:OWNER/NAME:PATTERN or files:GLOB")
    if data.val_source.startswith("hf:"):
        hub.parse(data.val_source, "data.val_source")
    return Part(data.val_source, 1.0, _units(data.val_source, 0, data))


def _units(source: str, text_bytes: int, data: DataConfig) -> tuple[Unit, ...]:
    if source.startswith("hf:"):
        files = hub.fetch(source, text_bytes, Path(data.cache_dir).expanduser() / "data", data.mirror)
    elif source.startswith("files:"):
        files = find_files(source)
    else:
        return (Unit(source),)
    # workers of a cluster have another working directory
    return tuple(Unit(source, os.path.abspath(file), data.encoding) for file in files)


def iterate_documents(source: str | DataConfig, split: str = "all", val_fraction: float = 0.01) -> Iterator[str]:
    """Non-empty documents of `split` ("train", "val" or "all"), always in the same order, part after part.

    Held out ("val") are the documents of `data.val_source`; without one those where a hash of the text falls below
    `split_limit`, so no other run, order or mixture can leak them into training.
    Args:
      source: the whole section, of which `val_fraction` is taken too, or just the source.
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
    """The hash below which no document of `data.source` is trained on; 0 where `data.val_source` is held out."""
    return 0.0 if data.val_source else split_limit(parts, data.val_fraction)


def interleaved(parts: Sequence[Part], split: str, limit: float) -> Iterator[str]:
    """Documents of all parts at once, each part with its share of the characters, as long as it lasts."""
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
    """SHA-256 over what the sources consist of (names, sizes and times of files), to see whether it has changed."""
    content = [[part.source, [unit.content() for unit in part.units]] for part in parts]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


def text_digest(text: str) -> bytes:
    """SHA-256 of a document."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def hash_fraction(digest: bytes) -> float:
    """A number in [0, 1) from a document's digest."""
    return int.from_bytes(digest[:6], "big") / 2**48


def document_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return hash_fraction(text_digest(text))


def split_limit(parts: Sequence[Part] | str, val_fraction: float) -> float:
    """The hash below which a document is held out: `val_fraction`, unless that leaves one of the splits empty.

    Then the document of smallest hash is held out, or the one of largest hash is kept to train on. Reads no further
    than needed. One limit for all parts of a mixture, the largest: what one holds out no other trains on.
    `DataError` if a part has no two different documents, or none to train on; `UsageError` if the fraction is none.
    """
    if isinstance(parts, str):
        parts = open_corpus(DataConfig(source=parts, val_fraction=val_fraction))
    limits = [_limit_of(part, val_fraction) for part in parts]
    few = [part.source for part, limit in zip(parts, limits, strict=True) if limit < min(val_fraction, max(limits))]
    if few:
        raise DataError(f"{few[0]}: all of its few documents would be held out; add text, or leave the source out")
    return max(limits)


def _limit_of(part: Part, val_fraction: float) -> float:
    hashes = (document_hash(document) for document in part.documents())
    try:
        return limit_of_hashes(hashes, val_fraction)
    except ValueError:
        raise DataError(
            f"{part.source}: only one document; at least 2 different ones are needed, one to train on and one held "
            "out: bring more text (a document is some 4,000 characters of it, or a file)"
        ) from None


def limit_of_hashes(hashes: Iterable[float], val_fraction: float) -> float:
    """See `split_limit`; `ValueError` if all are the same."""
    smallest, largest = 1.0, -1.0
    for value in hashes:
        smallest, largest = min(smallest, value), max(largest, value)
        if smallest < val_fraction <= largest:
            return val_fraction
    if smallest >= largest:
        raise ValueError("no two different hashes")
    return smallest + 2**-48 if smallest >= val_fraction else largest


def _lottery_count(source: str) -> int:
    match = re.fullmatch(r"synthetic:lottery(?::(\d+))?", source)
    if match is None or match[1] in ("0", "1"):
        raise UsageError(f"data.source: {source!r}; generators: synthetic:lottery, or synthetic:lottery:COUNT")
    return int(match[1] or lottery.DOCUMENTS)


def chitchat_document(turns: Sequence[Sequence[str]]) -> str:
    """A conversation as pretraining text: a message a line."""
    return "\n".join(text for turn in turns for text in turn)


@functools.cache  # parsing takes most of a second, and a run reads it about ten times; the texts alone take 40 MB
def chitchat_conversations() -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Conversations as turns of messages (only their texts); empty ones are left out."""
    try:
        from chitchat_dataset import Dataset
    except ImportError:
        raise DataError("source chitchat: install it with pip install -r requirements.txt") from None
    conversations = []
    for record in Dataset().values():
        turns = (tuple(m["text"].strip() for m in turn if m["text"].strip()) for turn in record["messages"])
        conversations.append(tuple(turn for turn in turns if turn))
    return tuple(turns for turns in conversations if turns)
