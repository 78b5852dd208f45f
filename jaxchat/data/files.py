"""Read documents and rows from files: txt, md, jsonl (also as .gz and .zst) and parquet.

A jsonl line and a parquet row are one document each. A text file is cut at paragraphs into documents of about
`TEXT_DOCUMENT_CHARS` characters, so that part of a single book can be held out. Documents longer than
`LARGEST_DOCUMENT` are cut in the same way.
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
SUFFIXES = (".parquet", ".jsonl", ".txt", ".md")  # of two forms of the same text the first is read
COMPRESSED = (".gz", ".zst")
COMPRESSION = 3.0  # characters of text per byte of a compressed text file, about
# byte order mark -> encoding; UTF-32's mark begins with UTF-16's
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# likely encodings of other texts: the letters that the right one decodes to, and the smallest and largest share of
# them in a text (Cyrillic and accented letters are the same bytes)
GUESSES = (
    ("euc_kr", "[가-힣]", 0, 1),  # the common part of cp949, which would take Japanese for rare syllables
    ("shift_jis", "[、-」ぁ-ヿ一-鿿]", 0, 1),
    ("gb18030", "[一-鿿]", 0, 1),
    ("cp1251", "[А-я]", 0.3, 1),
    ("cp1252", "[À-ÿ‘’“”–—…]", 0, 0.3),
)
GUESS_BYTES = 1 << 16


def find_files(source: str) -> list[Path]:
    """Return the files of `files:GLOB`, sorted; a folder means everything in it. `DataError` if there are none."""
    pattern = os.path.expanduser(source.removeprefix("files:"))
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**", "*")
    found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    files = [p for p in found if kind_of(p) in SUFFIXES]
    if not files:
        what = f"{found[0]} is of an unknown kind" if found else f"no such files (in {os.getcwd()}), or not readable"
        raise DataError(f"{source}: {what}; give {', '.join(SUFFIXES)} files (text and jsonl also as .gz, .zst)")
    return files


def kind_of(path: Path) -> str:
    """Return the suffix of a file without that of its compression."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def check_encoding(name: str) -> None:
    """Raise `UsageError` if `data.encoding` is not a text encoding of Python."""
    try:
        "".encode("utf-8" if name == "auto" else name)  # unlike codecs.lookup, refuses rot13 and the like
    except LookupError:
        raise UsageError(f"data.encoding: {name!r} is unknown; take auto, or one such as cp949 or utf-16") from None


def read_file(path: Path, encoding: str = "auto", counts: Counter[str] | None = None) -> Iterator[str]:
    """Yield the documents of a file; `DataError` names the file (and line) that cannot be read.

    `encoding` of text and jsonl; "auto": by byte order mark, else UTF-8. Documents that are "empty" or "binary" (with
    NUL characters) are skipped and counted in `counts`; "giants" are cut and counted.
    """
    counts = Counter() if counts is None else counts
    with _read_errors(path, encoding):
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


def read_records(path: Path, encoding: str = "auto") -> Iterator[tuple[str, Any]]:
    """Yield (file:line, value) of every non-empty line of a jsonl file; `DataError` as `read_file`."""
    with _read_errors(path, encoding), _open(path, encoding) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # also numbers of too many digits
                    raise DataError(f"{path}:{number}: not JSON ({getattr(error, 'msg', error)})") from None
                yield f"{path}:{number}", record


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a jsonl or parquet file, only these `columns` of a parquet file; `DataError` as `read_file`."""
    if kind_of(path) == ".jsonl":
        yield from (row for _, row in read_records(path))
        return
    with _parquet(path) as file:
        names = file.schema_arrow.names
        if missing := [name for name in columns or () if name not in names]:
            raise DataError(f"{path}: no column `{'`, `'.join(missing)}` (it has {', '.join(names)})")
        for batch in file.iter_batches(1024, columns=columns):
            yield from batch.to_pylist()


def count_rows(path: Path) -> int:
    """Return the number of rows of a parquet file; `DataError` where it is damaged."""
    with _parquet(path) as file:
        return file.metadata.num_rows


def text_size(path: Path) -> int:
    """Return about how many bytes of text a file holds."""
    if kind_of(path) != ".parquet":
        return round(path.stat().st_size * (COMPRESSION if path.suffix.lower() in COMPRESSED else 1))
    with _parquet(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        columns = [group.column(j) for group in groups for j in range(group.num_columns)]
        if columns and not any(column.path_in_schema == "text" for column in columns):
            names = ", ".join(dict.fromkeys(column.path_in_schema for column in columns))
            raise DataError(f"{path}: no column `text` (it has {names})")
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


@contextlib.contextmanager
def _read_errors(path: Path, encoding: str) -> Iterator[None]:
    """Turn what goes wrong while a text is read into a `DataError` that names the file."""
    try:
        yield
    except UnicodeError as error:
        raise DataError(f"{path}: {_wrong_encoding(path, encoding, error)}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _documents(path: Path, encoding: str) -> Iterator[str]:
    if kind_of(path) == ".parquet":
        for row in read_rows(path, ["text"]):
            if not isinstance(row["text"] or "", str):
                raise DataError(f"{path}: column `text` holds {type(row['text']).__name__}, not text")
            yield row["text"] or ""
    elif kind_of(path) == ".jsonl":
        yield from (_record_text(record, where) for where, record in read_records(path, encoding))
    else:
        with _open(path, encoding) as file:
            yield from _paragraphs(_text_lines(file, path), TEXT_DOCUMENT_CHARS)


def _record_text(record: Any, where: str) -> str:
    fields = record if isinstance(record, dict) else {}
    if isinstance(fields.get("text"), str):
        return fields["text"]
    messages = fields.get("messages")
    if isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return "\n".join(m["content"] for m in messages)
    raise DataError(f"{where}: needs a field `text`, or `messages` with a `content` each")


def _bytes(path: Path) -> Any:
    """Open a plain or compressed file for reading bytes."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(open(path, "rb"), "zstd")
    return open(path, "rb")


def _open(path: Path, encoding: str) -> IO[str]:
    """Open a text with any line ends; a byte order mark is dropped."""
    if encoding == "auto":
        with _bytes(path) as file:
            start = file.read(4)
        encoding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(_bytes(path), encoding=encoding, newline=None)


def _wrong_encoding(path: Path, encoding: str, error: UnicodeError) -> str:
    """Say what to do about a text that is not in the encoding it was read in, with a guess at the right one."""
    why = getattr(error, "reason", error)
    if encoding != "auto":
        return f"not text in {encoding} ({why}); mend it, or name another data.encoding"
    with _bytes(path) as file:
        data = file.read(GUESS_BYTES)
    for name, letters, least, most in GUESSES:
        text = data.decode(name, "ignore")
        lost = len(data) - len(text.encode(name, "ignore"))  # the last character may be cut
        foreign = re.findall(r"[^\x00-\x7f]", text)
        share = len(foreign) / (len(text) + 1)
        likely = lost <= max(2, len(data) // 100) and least < share < most
        if likely and len(re.findall(letters, text)) > 0.8 * len(foreign):
            name = "cp949" if name == "euc_kr" else name
            return f"not UTF-8 text; it reads like {name}: give --set data.encoding={name}, or convert it"
    return f"not UTF-8 text ({why}); convert it, name its encoding with data.encoding, or leave it out"


def _text_lines(file: IO[str], path: Path) -> Iterator[str]:
    """Yield lines, or parts of bounded length: a file without line breaks needs no memory."""
    while line := file.readline(TEXT_DOCUMENT_CHARS):
        if "\0" in line:
            raise DataError(f"{path}: binary (holds NUL bytes), not text; leave it out")
        yield line


def _lines_of(document: str, longest: int) -> Iterator[str]:
    """Yield the lines of a text, or parts of them; `io.StringIO` would need four bytes a character."""
    start = 0
    while start < len(document):
        end = document.find("\n", start, start + longest) + 1 or min(start + longest, len(document))
        yield document[start:end]
        start = end


def _paragraphs(lines: Iterable[str], goal: int) -> Iterator[str]:
    """Join lines to documents of about `goal` characters.

    They end with a paragraph; if none ends in time, with a line; and else anywhere. No line may be longer than `goal`.
    """
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
