"""Documents of a source, one by one, split into training and validation by a hash of their text.

Sources: `chitchat` (the conversations of the chitchat-dataset package) and `files:GLOB` (txt, md, jsonl, also .gz and
.zst; parquet). A jsonl line and a parquet row are a document each. A text file becomes several documents: whole
paragraphs, about `TEXT_DOCUMENT_CHARS` characters each, so that part of a single book can be held out.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jaxchat.errors import DataError, UsageError

TEXT_DOCUMENT_CHARS = 4_000
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")


def iterate_documents(source: str, split: str = "all", val_fraction: float = 0.01) -> Iterator[str]:
    """Non-empty documents of `split` ("train", "val" or "all"), always in the same order.

    A document is held out where a hash of its text falls below `split_limit`, so no other run, order or mixture can
    leak it into training.
    Raises `DataError` that names what is missing, empty, unreadable or damaged.
    """
    limit = 1.0 if split == "all" else split_limit(source, val_fraction)
    for document in _opener(source)():
        if split == "all" or (document_hash(document) < limit) == (split == "val"):
            yield document


def fingerprint(source: str) -> str:
    """SHA-256 over what the source consists of (names, sizes and times of files), to see whether it has changed."""
    if source == "chitchat":
        found = importlib.metadata.distributions(name="chitchat-dataset")
        content: list[Any] = [source, *(package.version for package in found)]
    else:
        stats = [(file, file.stat()) for file in find_files(source)]
        content = [source, *((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


def document_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_limit(source: str, val_fraction: float) -> float:
    """The hash below which a document is held out: `val_fraction`, unless that leaves one of the splits empty.

    Then the document of smallest hash is held out, or the one of largest hash is kept to train on. Reads no further
    than needed. `DataError` if there are no two different documents, `UsageError` if the fraction is none.
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"data.val_fraction: {val_fraction} is not at least 0 and below 1")
    smallest, largest = 1.0, -1.0
    for document in _opener(source)():
        value = document_hash(document)
        smallest, largest = min(smallest, value), max(largest, value)
        if smallest < val_fraction <= largest:
            return val_fraction
    if smallest >= largest:
        count = "no document" if largest < 0 else "only one document"
        raise DataError(f"{source}: {count}; at least 2 different ones are needed, one to train on and one held out")
    return smallest + 2**-48 if smallest >= val_fraction else largest


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
        pattern = os.path.join(glob.escape(pattern), "**", "*")
    found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    files = [p for p in found if _suffix(p) in SUFFIXES]
    if not files:
        _check_folder(pattern)
        kinds = ", ".join(SUFFIXES)
        if found:
            others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise DataError(f"{source}: {found[0]}{others} is of no known kind: {kinds} (text also .gz, .zst)")
        raise DataError(f"{source}: no such files; give a path or a glob of {kinds} files (text also .gz, .zst)")
    return files


def _check_folder(pattern: str) -> None:
    """`DataError` if the folder that a glob starts in exists but cannot be listed: `glob` would find nothing there."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder.replace("[[]", "").replace("[*]", "").replace("[?]", "")):
        folder = os.path.dirname(folder)
    folder = folder.replace("[[]", "[").replace("[*]", "*").replace("[?]", "?") or "."
    if os.path.isdir(folder):
        try:
            os.listdir(folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({error.strerror}); allow it or choose another") from None


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
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert it first, or leave it out") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())  # Arrow's messages have several lines
        raise DataError(f"{path}: cannot be read ({reason})") from None


def _suffix(path: Path) -> str:
    """The kind of a file, whether it is compressed or not."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def _open(path: Path) -> IO[str]:
    """Text with any line ends, from a plain or compressed file, without a byte order mark."""
    raw: Any = open(path, "rb")
    if path.suffix.lower() == ".gz":
        raw = gzip.GzipFile(fileobj=raw)
    elif path.suffix.lower() == ".zst":
        import pyarrow as pa

        raw = pa.CompressedInputStream(raw, "zstd")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline=None)


def _text(path: Path) -> Iterator[str]:
    """Documents that end with a paragraph; where none ends in time, with a line; and then anywhere."""
    lines: list[str] = []
    size, goal = 0, TEXT_DOCUMENT_CHARS
    with _open(path) as file:
        # pieces of bounded length, so that a file without line breaks needs no memory
        while line := file.readline(goal):
            if "\0" in line:
                raise DataError(f"{path}: binary (holds NUL bytes), not text; leave it out")
            lines.append(line)
            size += len(line)
            line_ends, paragraph_ends = line.endswith("\n"), not line.strip()
            if size >= (goal if paragraph_ends else 2 * goal if line_ends else 4 * goal):
                yield "".join(lines).strip("\n")
                lines, size = [], 0
    if lines:
        yield "".join(lines).strip("\n")


def _jsonl(path: Path) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers of too many digits, and too deep nesting
                raise DataError(f"{path}:{number}: not JSON ({getattr(error, 'msg', error)})") from None
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
        schema = file.schema_arrow
        if "text" not in schema.names:
            raise DataError(f"{path}: no column `text` (it has {', '.join(schema.names)})")
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: column `text` holds {kind}, not text")
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def _chitchat() -> Iterator[str]:
    for turns in chitchat_conversations():
        yield chitchat_document(turns)


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
