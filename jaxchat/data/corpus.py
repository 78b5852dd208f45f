"""Documents of a source, one by one, split into training and validation by a hash of their text.

Sources: `chitchat` (the conversations of the chitchat-dataset package) and `files:GLOB` (txt, md, jsonl, parquet, each
also gzipped). A text file becomes several documents: whole paragraphs, about `TEXT_DOCUMENT_CHARS` characters each, so
that part of a single book can be held out.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxchat.errors import DataError, UsageError

TEXT_DOCUMENT_CHARS = 4_000
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


def iterate_documents(source: str, split: str = "all", val_fraction: float = 0.01) -> Iterator[str]:
    """Non-empty documents of `split` ("train", "val" or "all"), always in the same order.

    A document is held out where a hash of its text falls below `val_fraction`, so no other run, order or mixture can
    leak it into training. A corpus too small for that holds out its document of smallest hash.
    Raises `DataError` that names what is missing, empty, unreadable or damaged.
    """
    documents = _opener(source)
    if split == "all":
        yield from documents()
        return
    limit = _val_limit(source, documents, val_fraction)
    for document in documents():
        if (document_hash(document) < limit) == (split == "val"):
            yield document


def document_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _val_limit(source: str, documents: Callable[[], Iterator[str]], val_fraction: float) -> float:
    """`val_fraction` where it holds out anything, else just above the smallest hash. Stops at the first one found."""
    smallest, distinct = 1.0, set()
    for document in documents():
        value = document_hash(document)
        if value < val_fraction:
            return val_fraction
        smallest = min(smallest, value)
        if len(distinct) < 2:
            distinct.add(value)
    if len(distinct) < 2:
        raise DataError(
            f"{source}: {len(distinct)} document(s); at least 2 different ones are needed, one of them is held out"
        )
    return smallest + 2**-48


def _opener(source: str) -> Callable[[], Iterator[str]]:
    """A function that starts the source anew."""
    if source == "chitchat":
        return _chitchat
    if source.startswith("files:"):
        files = find_files(source)
        return lambda: _nonempty(files, source)
    raise UsageError(f"data.source: {source!r} is unknown; take chitchat or files:GLOB, for example files:books/*.txt")


def find_files(source: str) -> list[Path]:
    """The files of `files:GLOB` (a folder means everything inside it), sorted; `DataError` if there are none."""
    pattern = os.path.expanduser(source.removeprefix("files:"))
    if os.path.isdir(pattern):
        try:
            os.listdir(pattern)
        except OSError as error:
            raise DataError(f"{pattern}: cannot be read ({error.strerror})") from None
        pattern = os.path.join(glob.escape(pattern), "**", "*")
    found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    files = [p for p in found if _suffix(p) in SUFFIXES]
    if not files:
        kinds = ", ".join(SUFFIXES)
        if found:
            raise DataError(f"{source}: {found[0]} and {len(found) - 1} more are of no known kind ({kinds}, also .gz)")
        raise DataError(f"{source}: no such files; give a path or a glob of {kinds} files (also .gz)")
    return files


def _nonempty(files: list[Path], source: str) -> Iterator[str]:
    empty = True
    for file in files:
        for document in read_file(file):
            if document.strip():
                empty = False
                yield document
    if empty:
        raise DataError(f"{source}: {len(files)} file(s), but no text in them")


def read_file(path: Path) -> Iterator[str]:
    """The documents of one file; `DataError` names the file (and line) that cannot be read."""
    try:
        if _suffix(path) == ".parquet":
            yield from _parquet(path)
        elif _suffix(path) == ".jsonl":
            yield from _jsonl(path)
        else:
            yield from _text(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from None


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _open(path: Path) -> IO[str]:
    raw: Any = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline=None)


def _text(path: Path) -> Iterator[str]:
    """Whole paragraphs until a document has its size; a paragraph without end is cut at a line."""
    lines: list[str] = []
    size = 0
    with _open(path) as file:
        for line in _lines(file, path):
            lines.append(line)
            size += len(line)
            paragraph_ends = not line.strip()
            if size >= TEXT_DOCUMENT_CHARS and (paragraph_ends or size >= 4 * TEXT_DOCUMENT_CHARS):
                yield "".join(lines).strip("\n")
                lines, size = [], 0
    if lines:
        yield "".join(lines).strip("\n")


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    """Lines of bounded length, so that a file without line breaks needs no memory; NUL means binary."""
    while line := file.readline(16 * TEXT_DOCUMENT_CHARS):
        if "\0" in line:
            raise DataError(f"{path}: binary (holds NUL bytes), not text")
        yield line


def _jsonl(path: Path) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON ({error.msg})") from None
            yield _record_text(record, f"{path}:{number}")


def _record_text(record: Any, where: str) -> str:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return "\n".join(m["content"] for m in messages)
    raise DataError(f"{where}: needs a field `text`, or `messages` with a `content` each")


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise DataError(f"{path}: no column `text` (it has {', '.join(file.schema_arrow.names)})")
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def _chitchat() -> Iterator[str]:
    for conversation in chitchat_conversations():
        yield "\n".join(text for turn in conversation for text in turn)


def chitchat_conversations() -> Iterator[list[list[str]]]:
    """Conversations as turns of messages (only their texts); empty ones are left out."""
    try:
        from chitchat_dataset import Dataset
    except ImportError:
        raise DataError("source chitchat: install it with pip install -r requirements.txt") from None
    for record in Dataset().values():
        turns = [[m["text"].strip() for m in turn if m["text"].strip()] for turn in record["messages"]]
        turns = [turn for turn in turns if turn]
        if turns:
            yield turns
