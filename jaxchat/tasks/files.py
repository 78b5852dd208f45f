"""Where the exams' data sets lie: a local mirror (`tasks.data_dir`), or downloads from their publishers, pinned and
verified, in a cache that all runs share."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from jaxchat.config import CONFIG_DIR, Config
from jaxchat.data.hub import Hub
from jaxchat.errors import DataError
from jaxchat.log import progress
from jaxchat.run_dir import locked, sha256_file, write_json

TIMEOUT = 30.0  # seconds without an answer from a server
PIECE = 1 << 20  # bytes read at once
LARGEST_BUNDLE = 4 << 30  # bytes of an unpacked archive


class MissingData(DataError):
    """The files of one exam are not at hand; the exam is left out and the message says how to place them."""


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set repository on the Hugging Face hub, at one commit."""

    repo: str
    revision: str  # of 40 hexadecimal digits; of a branch the commit that is first seen is kept
    files: tuple[str, ...]


@dataclass(frozen=True)
class Archive:
    """A zip file on the web, of which the members with one of `suffixes` are kept.

    `sha256` "" where nobody has published one that we could check: then the digest found is written down beside the
    files, and a file of another size than the server names is refused.
    """

    url: str
    suffixes: tuple[str, ...]
    sha256: str = ""


@dataclass(frozen=True)
class TaskFiles:
    """`data_dir`: a local mirror, "" for none; `download`: whether what it lacks may be fetched.

    `sandbox`: as `tasks.sandbox`, for tasks that run a model's code; `identity`: as `sft.identity`.
    """

    data_dir: str = ""
    download: bool = False
    cache: Path = field(default_factory=lambda: Path("~/.cache/jaxchat/tasks").expanduser())
    sandbox: str = "auto"
    identity: str = ""

    @classmethod
    def of(cls, config: Config, download: bool) -> TaskFiles:
        """As the configuration says; a relative `sft.identity` is looked for here and beside the tiers."""
        identity = config.sft.identity
        if identity and not Path(identity).expanduser().exists() and (CONFIG_DIR.parent / identity).exists():
            identity = str(CONFIG_DIR.parent / identity)
        cache = Path(config.data.cache_dir).expanduser() / "tasks"
        return cls(config.tasks.data_dir, download, cache, config.tasks.sandbox, identity)

    def find(self, patterns: Sequence[str], source: HubFiles | Archive | None = None) -> list[Path]:
        """The files of the first of `patterns` (globs inside the mirror) that matches any, sorted; else the source's.

        Of an archive the patterns choose among the unpacked files. Raises `MissingData`.
        """
        if self.data_dir:
            root = Path(self.data_dir).expanduser()
            if not root.is_dir():
                raise MissingData(f"tasks.data_dir: {root} is no directory")
            if found := _first_match(root, patterns):
                return found
        if source is None or not self.download:
            raise MissingData(_advice(patterns, source, self.data_dir, ""))
        try:
            if isinstance(source, HubFiles):
                hub = Hub(source.repo, source.revision, self.cache)
                return [hub.get(name) for name in source.files]
            folder = _from_archive(source, self.cache / PurePosixPath(source.url).stem)
        except (OSError, ValueError, DataError, zipfile.BadZipFile, http.client.HTTPException) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MissingData(_advice(patterns, source, self.data_dir, first)) from None
        if found := _first_match(folder, patterns):
            return found
        raise MissingData(f"{source.url} holds none of {', '.join(patterns)}")


NO_FILES = TaskFiles()


def listing(data_dir: str) -> str:
    """A digest of names, sizes and times of all files of a mirror, to see whether it has changed; "" without one."""
    root = Path(data_dir).expanduser()
    if not data_dir or not root.is_dir():
        return ""
    found = sorted((str(path.relative_to(root)), path.stat()) for path in root.rglob("*") if path.is_file())
    lines = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in found)
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()


def identity_digest(config: Config) -> str:
    """SHA-256 of the file of `sft.identity`; "" without one."""
    path = TaskFiles.of(config, download=False).identity
    return sha256_file(path) if path and Path(path).is_file() else ""


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty, also of a file in gzip's format.

    `DataError` names a line that is no JSON object, and a file without any.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not text.strip():
        raise DataError(f"{path}: empty")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: not a JSON object")
            yield number, row


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, the columns) of a parquet file; `DataError` where it is damaged, empty or lacks a column."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        if not table.metadata.num_rows:
            raise DataError(f"{path}: no rows")
        missing = [name for name in columns if name not in table.schema_arrow.names]
        if missing:
            raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(table.schema_arrow.names)}")
        number = 0
        for batch in table.iter_batches(1024, columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def count_rows(path: Path) -> int:
    """Rows of a parquet file; `DataError` where it is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def _first_match(root: Path, patterns: Sequence[str]) -> list[Path]:
    for pattern in patterns:
        found = sorted(path for path in root.glob(pattern) if path.is_file())
        if found:
            return found
    return []


def _advice(patterns: Sequence[str], source: HubFiles | Archive | None, data_dir: str, why: str) -> str:
    """One line: what is missing, where it is published, where to put it."""
    where = f"put it into {data_dir}" if data_dir else "put it into a directory and set tasks.data_dir to that"
    text = f"no file {patterns[0]} at hand"
    if isinstance(source, HubFiles):
        text += f"; get {', '.join(source.files)} of the hub's data set {source.repo}, revision {source.revision[:8]}"
    elif source:
        text += f"; unpack {source.url}"
    return f"{text} and {where}" + (f" (the download failed: {why})" if why else "")


def _from_archive(source: Archive, folder: Path) -> Path:
    """`folder` with the unpacked members; the download goes on where an earlier try stopped."""
    if not source.url.startswith("https://"):
        raise ValueError(f"{source.url}: only https is taken")
    if not (folder / "source.json").is_file():
        with locked(folder.with_suffix(".lock")):
            if not (folder / "source.json").is_file():
                part, tag = folder.with_suffix(".zip.part"), folder.with_suffix(".zip.etag")
                facts = _fetch_web(source.url, part, tag)
                tag.unlink(missing_ok=True)
                try:
                    if source.sha256 and facts["sha256"] != source.sha256:
                        raise ValueError(f"{source.url}: its SHA-256 is {facts['sha256']}, not {source.sha256}")
                    _unpack(part, source.suffixes, folder, facts)
                finally:
                    part.unlink()
    return folder


def _fetch_web(url: str, part: Path, tag: Path) -> dict[str, Any]:
    """Download into `part`, from where it ends if the server still has what `tag` names; URL, size and SHA-256."""
    part.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"Range": f"bytes={done}-", "If-Range": tag.read_text()} if done else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: all of it is there already
            raise
        return {"url": url, "size": done, "sha256": sha256_file(part)}
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        done = done if response.status == 206 else 0
        if etag := response.headers.get("ETag"):
            tag.write_text(etag)
        size = int(response.headers.get("Content-Length") or -1)
        with progress(f"downloading {PurePosixPath(url).name}", done + size if size >= 0 else None, done) as bar:
            while piece := response.read(PIECE):
                file.write(piece)
                bar.advance(len(piece))
    found = part.stat().st_size
    if size >= 0 and found != done + size:
        raise ValueError(f"{url}: {found} bytes came of {done + size}; the same command goes on")
    return {"url": url, "size": found, "sha256": sha256_file(part)}


def _unpack(archive: Path, suffixes: tuple[str, ...], folder: Path, facts: dict[str, Any]) -> None:
    """The wanted members into `folder`, all or nothing; `ValueError` for names that lead outside, and for giants."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with zipfile.ZipFile(archive) as file:
            wanted = [m for m in file.infolist() if not m.is_dir() and m.filename.endswith(suffixes)]
            wanted = [m for m in wanted if "__MACOSX" not in m.filename]
            if sum(member.file_size for member in wanted) > LARGEST_BUNDLE:
                raise ValueError(f"{archive.name}: unpacks to more than {LARGEST_BUNDLE >> 30} GiB")
            for member in wanted:
                name = PurePosixPath(member.filename)
                if name.is_absolute() or ".." in name.parts or "\\" in member.filename:
                    raise ValueError(f"{archive.name}: the member {member.filename!r} leads outside")
                target = aside.joinpath(*name.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(member) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink)
        write_json(aside / "source.json", facts)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
