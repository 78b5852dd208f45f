"""Sources of pretraining text: how files are read, what a mixture is, and which documents are held out.

    chitchat                        the conversations of the chitchat-dataset package
    files:GLOB                      files at hand: txt, md, jsonl, ndjson and json (also as .gz and .zst), parquet
    hf:OWNER/NAME[@REV][:PATTERN]   the same kinds of files of a data set on the Hugging Face hub, or of a mirror
    synthetic:lottery[:COUNT]       generated sessions of a lottery machine (`data/lottery.py`)
    SOURCE + SOURCE                 several sources as one text
    0.7 SOURCE + 0.3 SOURCE         a mixture: so large a share of the training tokens from each

A source consists of units, files or one generator, each of which can be read, tokenized and restarted by itself. Its
documents are the records of jsonl and json, the rows of parquet, and parts of about `TEXT_DOCUMENT_CHARS` characters
of a text file, so that part of a single book can be held out.
"""

from __future__ import annotations

import codecs
import contextlib
import fnmatch
import functools
import glob
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from jaxchat.config import DataConfig
from jaxchat.data import lottery
from jaxchat.data.hub import Hub
from jaxchat.errors import DataError, UsageError, install_command
from jaxchat.log import say, say_once

# Files


SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".txt", ".md")  # of two forms of the same text the first is read
# Files of a folder that are no text of it, unless they are named
NO_TEXT = re.compile(
    r"(?i)(readme|licen[cs]e|copying)([._-][\w-]{1,7})?(\.md|\.txt)?|(dataset_infos?|dataset_dict|state)\.json"
)
COMPRESSED = (".gz", ".zst")
COMPRESSION = 3.0  # characters of text per byte of a compressed text file, about
TEXT_DOCUMENT_CHARS = 4_000
JSON_CHARS = 1 << 20  # of a .json file that are read at once
JSON_GAP = re.compile(r"[\s,\ufeff]*")  # between values
CHATS = ("messages", "conversations")  # fields with a list of messages
BOM = "\ufeff"  # byte order mark: at the start of a line it is left over from a file that was appended
LARGEST_DOCUMENT = 1_000_000  # characters; a tokenizer needs some hundred bytes of memory for each
UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)  # byte order marks, of which UTF-32's begins with UTF-16's
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def suffix_of(path: Path) -> str:
    """Return the suffix of a file without that of its compression."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def find_files(source: str) -> list[Path]:
    """Return the files of `files:GLOB`, sorted and each once; a folder means everything in it.

    A path that exists wins over its reading as a pattern. README, licence and index files (`NO_TEXT`) are left out
    unless they are named; the kinds that are left out are said once. `DataError` if no file remains.
    """
    given = source.removeprefix("files:")
    spellings = [given, os.path.expanduser(given), given.strip(), given.replace("\\", "/")]
    spellings += [unicodedata.normalize(form, given) for form in ("NFC", "NFD")]  # as Linux and macOS write Hangul
    place = next(filter(os.path.exists, spellings), "")
    if place:
        found = _glob(os.path.join(glob.escape(place), "**")) if os.path.isdir(place) else [place]
    else:
        found = next(filter(None, map(_matches, spellings)), [])
    paths = [path for path in sorted(map(Path, found)) if path.is_file()]
    files, left_out = dict[tuple[int, int], Path](), Counter[str]()
    for path in paths:
        if (kind := suffix_of(path)) not in SUFFIXES:
            left_out[kind or "without a suffix"] += 1
        elif NO_TEXT.fullmatch(path.name) and not NO_TEXT.fullmatch(os.path.basename(given).replace("*", "")):
            left_out[path.name] += 1
        else:
            files.setdefault(file_id(path), path)  # links to it are the same text
    kinds = ", ".join(f"{kind} {count}" for kind, count in left_out.most_common(8))
    if not files:
        what = f"no such files (in {os.getcwd()}), or not readable"
        what = f"only files of other kinds ({kinds}; first {paths[0]})" if paths else what
        raise DataError(f"{source}: {what}; give {', '.join(SUFFIXES)} files (all but parquet also as .gz, .zst)")
    if left_out:
        total = left_out.total()
        say_once(f"  {source}: {total:,} file{'s' * (total > 1)} of other kinds left out: {kinds}", "yellow")
    return list(files.values())


def file_id(path: str | Path) -> tuple[int, int]:
    """Return what links to the same file have in common."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _matches(pattern: str) -> list[str]:
    """Return the paths of a pattern, in which folders and brackets that exist stand for themselves."""
    folder, rest = pattern, ""
    while not os.path.exists(folder or "."):
        folder, name = os.path.split(folder.rstrip("/"))
        rest = os.path.join(name, rest) if rest else name
    readings = (rest.replace("[", "[[]"), rest)
    return next(filter(None, (_glob(os.path.join(glob.escape(folder), reading)) for reading in readings)), [])


def _glob(pattern: str) -> list[str]:
    """Return the paths of a pattern. `**` follows links as `glob` does, but enters each folder once."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return glob.glob(pattern)
    at, found, entered = parts.index("**"), list[str](), set[tuple[int, int]]()
    for top in glob.glob(os.path.join(*parts[:at])) if at else ["."]:
        for folder, names, _ in os.walk(top, followlinks=True):
            new = file_id(folder) not in entered
            entered.add(file_id(folder))
            names[:] = sorted(name for name in names if new and not name.startswith("."))
            found += _glob(os.path.join(glob.escape(folder), *(parts[at + 1 :] or "*"))) if new else []
    return found


def read_file(
    path: Path, encoding: str = "auto", counts: Counter[str] | None = None, column: str = "text"
) -> Iterator[str]:
    """Yield the documents of a file; `DataError` names the file (and line) that cannot be read.

    `encoding` of text and jsonl; "auto": by byte order mark, else UTF-8. `column`: the field of a record that is the
    text, unless it has `messages`. Documents that are "empty" (or without that field) or "binary" (with NUL characters)
    are skipped and counted in `counts`; "giants" are cut and counted.
    """
    counts = Counter() if counts is None else counts
    if suffix_of(path) in (".txt", ".md"):
        documents = _paragraphs(_text_lines(path, encoding), TEXT_DOCUMENT_CHARS)
    else:
        documents = _record_texts(path, encoding, column)
    for document in documents:
        if not document.strip():
            counts["empty"] += 1
        elif "\0" in document:
            counts["binary"] += 1
        elif len(document) <= LARGEST_DOCUMENT:
            yield document
        else:
            counts["giants"] += 1
            goal = LARGEST_DOCUMENT // 4
            lines = re.finditer(rf"[^\n]{{0,{goal - 1}}}\n|[^\n]{{1,{goal}}}", document)  # or parts of lines
            yield from _paragraphs((line[0] for line in lines), goal)


def read_records(path: Path, encoding: str = "auto", columns: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (FILE:NUMBER, record) of every non-empty line of jsonl, row of parquet, or record of json.

    Of a jsonl file whose only line is an array of records: each of them. A json file is an array of records, an object
    with one list of them, objects one after the other, or the messages of one conversation. Only an object around a
    list is held in memory as a whole.
    `columns`: the only ones to read of a parquet file. `DataError` names the file, and the line that is not JSON.
    """
    with _named_errors(path, encoding):
        if suffix_of(path) == ".parquet":
            with _parquet(path, columns or ()) as file:
                batches = file.iter_batches(1024, columns=columns)
                rows = (row for batch in batches for row in batch.to_pylist())
                yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))
            return
        with _open(path, encoding) as file:
            if suffix_of(path) == ".json":
                records = _json_records(path, file, columns or ())
                yield from ((f"{path}:{number}", record) for number, record in enumerate(records, 1))
                return
            lines = ((number, text) for number, line in enumerate(file, 1) if (text := line.lstrip(BOM)).strip())
            head = list(itertools.islice(lines, 2))
            for number, line in itertools.chain(head, lines):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # also numbers of too many digits
                    advice = "a file whose records are no lines is read as .json"
                    raise DataError(f"{path}:{number}: not JSON ({error}); {advice}") from None
                array = len(head) == 1 and isinstance(record, list) and isinstance((record or [0])[0], dict)
                items = record if array and not _is_message(record[0]) else [record]
                yield from ((f"{path}:{i}", item) for i, item in enumerate(items, number))


def _json_records(path: Path, file: IO[str], columns: Sequence[str]) -> Iterator[Any]:
    """Yield the records of an open json file; see `read_records`."""
    values = _json_values(path, file)
    head = list(itertools.islice(values, 2))
    own = {"text", *columns}  # of a record, so not of an object around records
    if len(head) == 1 and isinstance(head[0], dict) and not own & head[0].keys():
        lists = [value for value in head[0].values() if isinstance(value, list) and value]
        kinds = dict if head[0].keys() & set(CHATS) else dict | str  # texts in turn are a conversation
        if len(lists) == 1 and isinstance(lists[0][0], kinds) and not _is_message(lists[0][0]):
            head = lists[0]
    yield from [[*head, *values]] if head and _is_message(head[0]) else itertools.chain(head, values)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _json_values(path: Path, file: IO[str]) -> Iterator[Any]:
    """Yield the items of an array, or values one after the other; memory holds the largest of them."""
    decoder, text, at, line, inside = json.JSONDecoder(), "", 0, 1, False
    while True:
        at = JSON_GAP.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if text[at : at + 1] == ("]" if inside else "["):
            inside, at = not inside, at + 1
            continue
        error: Exception | None = None
        try:
            value, end = decoder.raw_decode(text, at)
            cut = end + 4 > len(text)  # a number may go on
        except (ValueError, RecursionError) as caught:  # also numbers of too many digits
            error, end = caught, getattr(caught, "pos", at)
            cut = end + 16 > len(text) or "Unterminated string" in str(error)
        if cut and (more := file.read(max(JSON_CHARS, len(text) - at))):
            line += text.count("\n", 0, at)
            text, at = text[at:] + more, 0
        elif at == len(text) and not inside:
            return
        elif error:
            line += text.count("\n", 0, end)
            raise DataError(f"{path}:{line}: not JSON ({getattr(error, 'msg', error)})")
        else:
            yield value
            at = end


def count_rows(path: Path) -> int:
    """Return the number of rows of a parquet file; `DataError` where it is damaged."""
    with _parquet(path) as file:
        return file.metadata.num_rows


def text_size(path: Path, column: str = "text") -> int:
    """Return about how many bytes of text a file holds."""
    if suffix_of(path) != ".parquet":
        return round(path.stat().st_size * (COMPRESSION if path.suffix.lower() in COMPRESSED else 1))
    with _parquet(path) as file:
        name = _text_column(path, column, file.schema_arrow.names)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(c.total_uncompressed_size for c in columns if f"{c.path_in_schema}.".startswith(f"{name}."))


def _text_column(path: Path, column: str, names: Collection[str]) -> str:
    """Return the field that is read as text: `column`, or a conversation. `DataError` names the fields there are."""
    if name := next((name for name in (column, *CHATS) if name in names), ""):
        return name
    fields = f"it has {', '.join(names)}" if names else "its records have no names"
    raise DataError(f"{path}: no column `{column}` ({fields}); name the one with the text, --set data.column=NAME")


def _record_texts(path: Path, encoding: str, column: str) -> Iterator[str]:
    """Yield the text of every record, "" of those without. `DataError` if no record has one.

    A json file of one record without text, such as one about the files beside it, is no error.
    """
    columns, names, number, texts = [column], dict[str, None](), 0, 0
    if suffix_of(path) == ".parquet":
        with _parquet(path) as file:
            columns = [_text_column(path, column, file.schema_arrow.names)]
    for number, (where, record) in enumerate(read_records(path, encoding, columns), 1):
        text = _record_text(where, record, column)
        texts += bool(text)
        names |= dict.fromkeys(record) if isinstance(record, dict) and number < 100 else {}
        yield text
    if not texts and number > (suffix_of(path) == ".json"):
        _text_column(path, column, names)
        raise DataError(f"{path}: none of its {number:,} records has text in `{column}`; leave it out")


def _record_text(where: str, record: Any, column: str) -> str:
    """Return the text of a record, or what is said in its conversation, a message a line; "" if there is none."""
    text = record.get(column) if isinstance(record, dict) else record
    if isinstance(text, bytes):
        try:
            return text.decode()
        except UnicodeError as error:
            raise DataError(f"{where}: `{column}` is not text in UTF-8 ({error}); leave it out") from None
    if isinstance(text, str):
        return text
    chats = [text, *map(record.get, CHATS)] if isinstance(record, dict) else [record]
    if messages := next((chat for chat in chats if chat and isinstance(chat, list) and isinstance(chat[0], dict)), []):
        return spoken(messages)
    if text is None or text != text:  # NaN, with which pandas fills gaps
        return ""
    raise DataError(f"{where}: `{column}` holds {json.dumps(text, default=str)[:40]}, not text")


def spoken(messages: Iterable[Any]) -> str:
    """Return a conversation as pretraining text: a message a line, without roles."""
    contents = (m.get("content", m.get("value")) for m in messages if isinstance(m, dict))
    return "\n".join(
        content if isinstance(content, str) else "".join(str(part.get("text") or "") for part in content)
        for content in contents
        if isinstance(content, str) or (isinstance(content, list) and all(isinstance(part, dict) for part in content))
    )


def _text_lines(path: Path, encoding: str) -> Iterator[str]:
    """Yield lines, or parts of bounded length: a file without line breaks needs no memory."""
    with _named_errors(path, encoding), _open(path, encoding) as file:
        begins = True
        while line := file.readline(TEXT_DOCUMENT_CHARS):
            line = line.lstrip(BOM) if begins else line
            begins = line.endswith("\n") or (begins and not line)
            if "\0" in line:
                raise DataError(f"{path}: binary (holds NUL bytes), not text; leave it out")
            yield line


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


@contextlib.contextmanager
def _parquet(path: Path, columns: Sequence[str] = ()) -> Iterator[Any]:
    """Open a parquet file; `DataError` if it is damaged or lacks one of the columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if missing := [name for name in columns if name not in names]:
            raise DataError(f"{path}: no column `{'`, `'.join(missing)}` (it has {', '.join(names)})")
        yield file
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


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
        encoding = "utf-32" if start.startswith(UTF32) else "utf-16" if start.startswith(UTF16) else "utf-8-sig"
    return io.TextIOWrapper(_bytes(path), encoding=encoding, newline=None)


@contextlib.contextmanager
def _named_errors(path: Path, encoding: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a `DataError` that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except UnicodeError as error:
        raise DataError(
            f"{path}: not text in {'UTF-8' if encoding == 'auto' else encoding} ({error}); name its encoding with "
            "data.encoding (cp949, shift_jis, gb18030, cp1252, ...), or leave it out"
        ) from None


# Sources


HUB_SOURCE = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^:@\s]+))?(?::(.+))?")
FORMS = "chitchat, files:GLOB, hf:OWNER/NAME[@REVISION][:PATTERN], synthetic:lottery[:COUNT]"
SHARE = re.compile(r"(\d+(?:\.\d+)?)\s+(\S.*)")  # of a mixture
MARGIN = 1.05  # of the hub's text: files hold somewhat more or less of it than the first


def chitchat_document(turns: Sequence[Sequence[str]]) -> str:
    """Return a conversation as pretraining text, a message a line."""
    return "\n".join(text for turn in turns for text in turn)


@functools.cache  # parsing takes most of a second; the texts take 40 MB
def chitchat_conversations() -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Return the conversations as turns of non-empty texts; empty turns and conversations are left out."""
    try:
        from chitchat_dataset import Dataset
    except ImportError:
        raise DataError(f"source chitchat: install it with {install_command()}") from None
    conversations = []
    for record in Dataset().values():
        turns = (tuple(m["text"].strip() for m in turn if m["text"].strip()) for turn in record["messages"])
        conversations.append(tuple(turn for turn in turns if turn))
    return tuple(turns for turns in conversations if turns)


@dataclass(frozen=True)
class Generator:
    """A source without files. `form`: a regular expression of its names; `size`: bytes of the documents, about."""

    form: str
    documents: Callable[[str], Iterator[str]]
    size: Callable[[str], int]
    package: str = ""  # whose version decides the documents


GENERATORS = {
    "chitchat": Generator(
        "chitchat",
        lambda source: map(chitchat_document, chitchat_conversations()),
        lambda source: 12_737_462,
        "chitchat-dataset",
    ),
    "synthetic": Generator(
        r"synthetic:lottery(:([2-9]|[1-9]\d+))?",
        lottery.documents,
        lambda source: 226 * lottery.count_of(source),
    ),
}


def generator_of(source: str) -> Generator | None:
    """Return the generator of a source, None for one of files; `UsageError` for an unknown or malformed one."""
    generator = GENERATORS.get(source.partition(":")[0])
    form = generator.form if generator else rf"(?s:files:.+)|{HUB_SOURCE.pattern}"
    if not re.fullmatch(form, source):
        advice = f"; did you mean files:{source}?" if os.path.exists(source) else ""
        raise UsageError(f"data.source: {source!r} is unknown or malformed; take one of {FORMS}{advice}")
    return generator


def parse_hub(source: str) -> tuple[str, str, str]:
    """Return (repository, revision, pattern) of an `hf:` source."""
    place, _, pattern = source.removeprefix("hf:").partition(":")
    repo, _, revision = place.partition("@")
    return repo, revision or "main", pattern


def hub_files(
    source: str, text_bytes: int, cache: Path, mirror: str = "", endpoint: str | None = None, column: str = "text"
) -> list[Path]:
    """Return the first files, by name, that together hold `text_bytes` of text (0: all files).

    They come from `mirror`, a folder that holds `OWNER/NAME/` or is itself called NAME, or from the hub into `cache`.
    `DataError` says what is missing or could not be downloaded, and where to put it by hand.
    """
    repo, revision, pattern = parse_hub(source)
    if mirror:
        root = Path(mirror).expanduser()
        places = [root / repo, *([root] if root.resolve().name == repo.partition("/")[2] else [])]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise DataError(f"data.mirror: no folder {root / repo}; put the files of hf:{repo} into it")
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        paths = [folder / name for name in _readable(names, repo, pattern)]
        return paths[: _enough((text_size(path, column) for path in paths), text_bytes)]
    hub = Hub(repo, revision, cache, endpoint, "data.mirror")
    sizes = {name: file["size"] for name, file in hub.listing().items()}
    names = everything = _readable(sizes, repo, pattern)
    if text_bytes:  # how much text a file holds is measured at the first
        (first,) = hub.get(names[:1])
        if not (first_text := text_size(first, column)):
            raise DataError(f"{first}: no text in it; name files with text, hf:{repo}:PATTERN")
        ratio = first_text / sizes[names[0]]
        names = names[: _enough((sizes[name] * ratio for name in names), text_bytes)]
    if missing := [sizes[name] for name in names if not hub.has(name)]:
        left = f"{len(missing):,} to download, {sum(missing) / 1e9:.3g} GB"
        say(f"  {repo} at {hub.commit[:8]}: {len(names):,} of {len(everything):,} files; {left}")
    return hub.get(names)


def _readable(names: Iterable[str], repo: str, pattern: str) -> list[str]:
    """Return the readable files that the pattern names, sorted; without one, all of the kind that holds the text."""
    names = sorted(names)
    kinds = {n: suffix_of(Path(n)) for n in names if not NO_TEXT.fullmatch(PurePosixPath(n).name)}
    kind = next((kind for kind in SUFFIXES if kind in kinds.values()), "")  # many lie there in two forms
    readable = [name for name in kinds if kinds[name] in SUFFIXES]
    matching = [n for n in readable if (fnmatch.fnmatchcase(n, pattern) if pattern else kinds[n] == kind)]
    if not matching:
        what = f"no file matches {pattern!r}" if readable else f"no file is {', '.join(SUFFIXES)}"
        there = ", ".join((readable or list(kinds) or names)[:5]) or "nothing"
        raise DataError(f"hf:{repo}: {what}; of {len(names):,} there are {there}")
    return matching


def _enough(sizes: Iterable[float], needed: float) -> int | None:
    """Return how many of the first files hold the text that is needed, with a margin; None for all."""
    totals = enumerate(itertools.accumulate(sizes), 1) if needed else ()
    return next((count for count, total in totals if total >= needed * MARGIN), None)


@dataclass(frozen=True)
class Unit:
    """A part of a source: a file, or all that a generator makes."""

    source: str
    path: str = ""
    encoding: str = "auto"
    column: str = "text"

    def documents(self, counts: Counter[str] | None = None) -> Iterator[str]:
        """Yield the non-empty documents, always in the same order; `counts` as in `read_file`."""
        if not self.path and (generator := generator_of(self.source)):
            return generator.documents(self.source)
        return read_file(Path(self.path), self.encoding, counts, self.column)

    def content(self) -> list[Any]:
        """Return what tells this unit from a changed one."""
        if self.path:
            stat = Path(self.path).stat()
            column = [self.column] if self.column != "text" else []  # absent from runs of before this setting
            return [self.path, stat.st_size, stat.st_mtime_ns, self.encoding, *column]
        generator = generator_of(self.source)
        package = generator.package if generator else ""
        return [self.source, *(p.version for p in importlib.metadata.distributions(name=package) if package)]


@dataclass(frozen=True)
class Part:
    """One source of a mixture, or the only source."""

    source: str
    weight: float  # its share of the training tokens
    units: tuple[Unit, ...]
    web_scale: bool = False  # the hub has more of this text than the run needs

    def documents(self) -> Iterator[str]:
        """Yield all documents; `DataError` if there is none."""
        document = None
        for unit in self.units:
            for document in unit.documents():
                yield document
        if document is None:
            advice = "name the field of the records that holds it, --set data.column=NAME"
            raise DataError(f"{self.source}: {len(self.units)} file(s), but no text in them; {advice}")

    def split(self, split: str, limit: float) -> Iterator[str]:
        """Yield the documents whose hash is below `limit` ("val"), or the others."""
        return (text for text in self.documents() if (document_hash(text) < limit) == (split == "val"))


def parse(source: str) -> list[tuple[str, float]]:
    """Return (source, share) of every part of `data.source`; `UsageError` for a malformed one."""
    begins = rf"(?:\d+(?:\.\d+)?\s+)?(?:files:|hf:|(?:{'|'.join(GENERATORS)})(?:[:\s]|$))"
    whole = os.path.exists(source.removeprefix("files:"))
    terms = [source] if whole else re.split(rf"\s*\+\s*(?={begins})", source.strip())
    shares = [SHARE.fullmatch(term) for term in terms]
    parts = []
    for term, match in zip(terms, shares, strict=True):
        if len(terms) > 1 and any(shares) and (match is None or not float(match[1])):
            raise UsageError(f"data.source: {term!r} in a mixture; write 0.7 SOURCE + 0.3 SOURCE, or no shares at all")
        name, weight = (match[2], float(match[1])) if match else (term, 1.0)
        generator_of(name)  # raises for an unknown source
        parts.append((name, weight))
    total = sum(weight for _, weight in parts)
    return [(name, weight / total) for name, weight in parts]


def open_corpus(data: DataConfig) -> list[Part]:
    """Return the parts of `data.source` without the files of `data.val_source`.

    Sources without shares are one part, in which each counts by its size. Every file is read once. Files of the hub are
    downloaded, as many as `data.text_bytes` needs.
    `DataError` names what is missing or could not be downloaded; `UsageError` names a malformed source.
    """
    try:
        "".encode("utf-8" if data.encoding == "auto" else data.encoding)  # unlike codecs.lookup, refuses rot13
    except LookupError:
        raise UsageError(f"data.encoding: {data.encoding!r} is unknown; take auto, cp949, utf-16 or the like") from None
    held_out, joined = open_val(data), not SHARE.fullmatch(data.source.strip())
    taken = {file_id(unit.path) for unit in held_out.units} if held_out else set()
    parts = list[Part]()
    for name, share in parse(data.source):
        size = max(1, round(data.text_bytes * share)) if data.text_bytes > 0 else 0
        units = tuple(u for u in _units(name, size, data) if not u.path or file_id(u.path) not in taken)
        if not units and not (joined and parts):
            raise DataError(f"{name}: all of its files are held out (data.val_source), or in a source before it")
        taken |= {file_id(unit.path) for unit in units if unit.path}
        parts.append(Part(name, share, units, web_scale=name.startswith("hf:") and size > 0))
    if len(parts) > 1 and joined:
        units = tuple(unit for part in parts for unit in part.units)
        return [Part(data.source, 1.0, units, web_scale=all(part.web_scale for part in parts))]
    return parts


def open_val(data: DataConfig) -> Part | None:
    """Return all files of `data.val_source`, downloaded if they are on the hub; None if it is empty."""
    if not data.val_source:
        return None
    if not re.fullmatch(rf"(?s:files:.+)|{HUB_SOURCE.pattern}", data.val_source):
        raise UsageError(f"data.val_source: {data.val_source!r}; write hf:OWNER/NAME:PATTERN or files:GLOB")
    return Part(data.val_source, 1.0, _units(data.val_source, 0, data))


def _units(source: str, text_bytes: int, data: DataConfig) -> tuple[Unit, ...]:
    if generator_of(source):
        return (Unit(source),)
    files = source_files(source, data, text_bytes)
    # absolute, since workers of a cluster have another working directory
    return tuple(Unit(source, os.path.abspath(file), data.encoding, data.column) for file in files)


def source_files(source: str, data: DataConfig, text_bytes: int = 0) -> list[Path]:
    """Return the files of `files:GLOB` or `hf:...` as `find_files` or `hub_files` do."""
    if not source.startswith("hf:"):
        return find_files(source)
    if not HUB_SOURCE.fullmatch(source):
        raise UsageError(f"{source!r}: a data set on the hub is hf:OWNER/NAME[@REVISION][:PATTERN]")
    return hub_files(source, text_bytes, Path(data.cache_dir).expanduser() / "data", data.mirror, column=data.column)


def iterate_documents(source: str | DataConfig, split: str = "all", val_fraction: float = 0.01) -> Iterator[str]:
    """Yield the documents of `split` ("train", "val" or "all"), always in the same order, part after part.

    Held out ("val") are the documents of `data.val_source`, or those whose hash falls below `training_limit`, so that
    no other run, order or mixture can leak them into training.
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


# The held-out split


def text_hash(text: bytes) -> int:
    """Return the first 64 bits of the SHA-256 of a document in UTF-8."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def hash_fraction(number: int) -> float:
    """Return a number in [0, 1) from a document's `text_hash`."""
    return (number >> 16) / 2**48


def document_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return hash_fraction(text_hash(text.encode("utf-8", "surrogatepass")))


def training_limit(parts: Sequence[Part], data: DataConfig) -> float:
    """Return the hash below which no document is trained on: `data.val_fraction`, or 0 with a `data.val_source`.

    If that left a split empty, the document with the smallest hash is held out, or the one with the largest is kept
    for training. Reads no further than needed. All parts of a mixture have the same limit, the largest, so that none
    trains on what another holds out. `DataError` if a part has no two different documents, or none to train on.
    """
    if data.val_source:
        return 0.0
    limits = []
    for part in parts:
        try:
            limits.append(limit_of_hashes(map(document_hash, part.documents()), data.val_fraction))
        except ValueError:
            raise DataError(
                f"{part.source}: no two documents differ; at least 2 are needed, one to train on and one held "
                "out: bring more text (a document is some 4,000 characters of it, or a file)"
            ) from None
    for part, limit in zip(parts, limits, strict=True):
        if limit < min(data.val_fraction, max(limits)):
            raise DataError(f"{part.source}: all of its few documents would be held out; add text, or leave it out")
    return max(limits)


def limit_of_hashes(hashes: Iterable[float], val_fraction: float) -> float:
    """Return the limit of `training_limit` for one part; `ValueError` if all hashes are the same."""
    smallest, largest = 1.0, -1.0
    for value in hashes:
        smallest, largest = min(smallest, value), max(largest, value)
        if smallest < val_fraction <= largest:
            return val_fraction
    if smallest >= largest:
        raise ValueError("no two different hashes")
    return smallest + 2**-48 if smallest >= val_fraction else largest
