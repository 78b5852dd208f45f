"""Documents of files: txt and md, jsonl, parquet; text and jsonl also in gzip's and Zstandard's format.

A jsonl line and a parquet row are a document each. A text file becomes several documents: whole paragraphs, about
`TEXT_DOCUMENT_CHARS` characters each, so that part of a single book can be held out. A document of more than
`LARGEST_DOCUMENT` characters is cut in the same way.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxchat.errors import DataError, UsageError

TEXT_DOCUMENT_CHARS = 4_000
LARGEST_DOCUMENT = 1_000_000  # characters; a tokenizer needs some hundred bytes of memory for each
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
# first bytes of a text -> its encoding; UTF-32's mark begins with UTF-16's
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# encodings that texts without a mark are often in, the letters that the right one gives, and how large a share of the
# text those are at least and at most (Cyrillic and accented letters are the same bytes)
GUESSES = (
    ("euc_kr", "[가-힣]", 0, 1),  # the common part of cp949, which would take Japanese for rare syllables
    ("shift_jis", "[、-」ぁ-ヿ一-鿿]", 0, 1),
    ("gb18030", "[一-鿿]", 0, 1),
    ("cp1251", "[А-я]", 0.3, 1),
    ("cp1252", "[À-ÿ‘’“”–—…]", 0, 0.3),
)
GUESS_BYTES = 1 << 16
LIKELY = 0.8  # share of letters among the characters that are not ASCII


def find_files(source: str) -> list[Path]:
    """The files of `files:GLOB` (a folder means everything inside it), sorted; `DataError` if there are none."""
    pattern = os.path.expanduser(source.removeprefix("files:"))
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**", "*")
    found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    files = [p for p in found if kind_of(p) in SUFFIXES]
    if not files:
        _check_folder(pattern)
        kinds = ", ".join(SUFFIXES)
        if found:
            others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise DataError(f"{source}: {found[0]}{others} is of no known kind: {kinds} (text also .gz, .zst)")
        place = f"(text also .gz, .zst); looked for in {os.getcwd()}"
        raise DataError(f"{source}: no such files; give a path or a glob of {kinds} files {place}")
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


def kind_of(path: Path) -> str:
    """The suffix of a file, whether it is compressed or not."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def check_encoding(name: str) -> None:
    """`UsageError` if `data.encoding` is none that Python knows."""
    try:
        "".encode("utf-8" if name == "auto" else name)  # knows from text encodings what is none, such as rot13
    except LookupError:
        raise UsageError(f"data.encoding: {name!r} is unknown; take auto, or one such as cp949 or utf-16") from None


def read_file(path: Path, encoding: str = "auto", counts: Counter[str] | None = None) -> Iterator[str]:
    """The documents of one file that hold text, giants cut; `DataError` names the file (and line) that cannot be read.

    `encoding` of text and jsonl; "auto": what a byte order mark says, or UTF-8. `counts` gets the numbers of documents
    that were "empty" (nothing but spaces) or "binary" (with NUL characters), which are left out, and of "giants".
    """
    counts = Counter() if counts is None else counts
    with _named_faults(path, encoding):
        for document in _documents(path, encoding):
            if not document.strip():
                counts["empty"] += 1
            elif "\0" in document:
                counts["binary"] += 1
            elif len(document) <= LARGEST_DOCUMENT:
                yield document
            else:
                counts["giants"] += 1
                yield from _paragraphs(_lines_of(document, LARGEST_DOCUMENT // 4), LARGEST_DOCUMENT // 4)


@contextlib.contextmanager
def _named_faults(path: Path, encoding: str) -> Iterator[None]:
    """What goes wrong while a file is read, as a `DataError` that names it."""
    try:
        yield
    except UnicodeError as error:
        raise DataError(f"{path}: {_wrong_encoding(path, encoding, error)}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())  # Arrow's messages have several lines
        raise DataError(f"{path}: cannot be read ({reason})") from None


def _documents(path: Path, encoding: str) -> Iterator[str]:
    if kind_of(path) == ".parquet":
        yield from _parquet(path)
    elif kind_of(path) == ".jsonl":
        yield from (_record_text(record, where) for where, record in _records(path, encoding))
    else:
        with _open(path, encoding) as file:
            yield from _paragraphs(_text_lines(file, path), TEXT_DOCUMENT_CHARS)


def _raw(path: Path) -> Any:
    """The bytes of a plain or compressed file."""
    raw: Any = open(path, "rb")
    if path.suffix.lower() == ".gz":
        raw = gzip.GzipFile(fileobj=raw)
    elif path.suffix.lower() == ".zst":
        import pyarrow as pa

        raw = pa.CompressedInputStream(raw, "zstd")
    return raw


def _open(path: Path, encoding: str) -> IO[str]:
    """Text with any line ends, without a byte order mark."""
    if encoding == "auto":
        with _raw(path) as file:
            start = file.read(4)
        encoding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(_raw(path), encoding=encoding, newline=None)


def _wrong_encoding(path: Path, encoding: str, error: UnicodeError) -> str:
    """What to do about a text that is not in the encoding it was read in."""
    if encoding != "auto":
        return f"not text in {encoding} ({getattr(error, 'reason', error)}); mend it, or name another data.encoding"
    with _raw(path) as file:
        start = file.read(GUESS_BYTES)
    for name, letters, least, most in GUESSES:
        share, foreign = _shares(start, name, letters)
        if share > LIKELY and least < foreign < most:
            likely = "cp949" if name == "euc_kr" else name
            return f"not UTF-8 text; it reads like {likely}: give --set data.encoding={likely}, or convert it"
    why = getattr(error, "reason", error)
    return f"not UTF-8 text ({why}); convert it, name its encoding with data.encoding, or leave it out"


def _shares(data: bytes, encoding: str, letters: str) -> tuple[float, float]:
    """Of letters among the characters that are not ASCII, and of those in all; 0 where the encoding cannot be it."""
    text = data.decode(encoding, "ignore")
    lost = len(data) - len(text.encode(encoding, "ignore"))
    foreign = re.findall(r"[^\x00-\x7f]", text)
    if lost > max(2, len(data) // 100) or not foreign:  # the last character may be cut
        return 0.0, 0.0
    return len(re.findall(letters, text)) / len(foreign), len(foreign) / (len(text) + 1)


def _text_lines(file: IO[str], path: Path) -> Iterator[str]:
    """Lines, or pieces of them of bounded length: a file without line breaks needs no memory."""
    while line := file.readline(TEXT_DOCUMENT_CHARS):
        if "\0" in line:
            raise DataError(f"{path}: binary (holds NUL bytes), not text; leave it out")
        yield line


def _lines_of(document: str, longest: int) -> Iterator[str]:
    """Lines of a text, or pieces of them; `io.StringIO` would need four bytes a character."""
    start = 0
    while start < len(document):
        end = document.find("\n", start, start + longest) + 1 or min(start + longest, len(document))
        yield document[start:end]
        start = end


def _paragraphs(lines: Iterable[str], goal: int) -> Iterator[str]:
    """Documents of about `goal` characters that end with a paragraph; where none ends in time, with a line; and then
    anywhere. No line may be longer than `goal`."""
    kept: list[str] = []
    size = 0
    for line in lines:
        kept.append(line)
        size += len(line)
        line_ends, paragraph_ends = line.endswith("\n"), not line.strip()
        if size >= (goal if paragraph_ends else 2 * goal if line_ends else 4 * goal):
            yield "".join(kept).strip("\n")
            kept, size = [], 0
    if kept:
        yield "".join(kept).strip("\n")


def read_records(path: Path, encoding: str = "auto") -> Iterator[tuple[str, Any]]:
    """(file:line, value) of every line of a jsonl file that is not empty; `DataError` as `read_file`."""
    with _named_faults(path, encoding):
        yield from _records(path, encoding)


def _records(path: Path, encoding: str) -> Iterator[tuple[str, Any]]:
    with _open(path, encoding) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers of too many digits, and too deep nesting
                raise DataError(f"{path}:{number}: not JSON ({getattr(error, 'msg', error)})") from None
            yield f"{path}:{number}", record


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
            yield from (text or "" for text in batch.column(0).to_pylist())
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
