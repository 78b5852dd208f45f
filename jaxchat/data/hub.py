"""Files of a data set on the Hugging Face hub, or of a local mirror of it: as many as are needed, verified, kept.

`hf:OWNER/NAME[@REVISION][:PATTERN]`. The endpoint is huggingface_hub's (`HF_ENDPOINT`). What has been downloaded and
verified is used again without asking anybody; a download that was cut off goes on where it stopped.
"""

from __future__ import annotations

import concurrent.futures
import errno
import fnmatch
import hashlib
import io
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jaxchat.data.files import COMPRESSED, SUFFIXES, kind_of
from jaxchat.errors import DataError, UsageError
from jaxchat.log import progress, say
from jaxchat.run_dir import locked, read_json, sha256_file, write_json

# Single files of a data set on the Hugging Face hub: verified, resumed where a download was cut off, kept for ever.


T = TypeVar("T")
PARALLEL = 4  # downloads at once
TRIES = 6  # of one request
SILENT_TRIES = 2  # of one that nobody answers: the client itself tries several times before it says so
FIRST_WAIT = 1.0  # seconds before the second try; doubled each time
LONGEST_WAIT = 120.0  # seconds, also where the hub asks for more
FINAL = (400, 401, 403, 404, 410, 416, 451)  # HTTP answers that another try does not change
FULL_OR_CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # it is our disk, not the hub


class Damaged(Exception):
    """What came is not what the hub says it is."""


class _Stoppable(io.RawIOBase):
    """A file whose next piece is refused once `stop` is set."""

    def __init__(self, file: Any, stop: threading.Event):
        self._file, self._stop = file, stop

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise DataError("stopped")
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        return self._file.truncate(size)


class Hub:
    """One data set repository at one commit, and the folder where its files are kept.

    Of a branch the commit that is first seen is kept, so that a run that goes on reads what it began with.
    """

    def __init__(self, repo: str, revision: str, cache: Path, endpoint: str | None = None):
        from huggingface_hub import HfApi

        self.repo, self.revision, self._endpoint = repo, revision, endpoint
        self._api = HfApi(endpoint=endpoint)
        self.folder = cache / repo.replace("/", "--") / re.sub(r"[^\w.-]", "--", revision)
        self._stop = threading.Event()
        self.speed = 0.0  # bytes a second of the last download
        self.folder.mkdir(parents=True, exist_ok=True)
        self.commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else self._kept("commit.json", self._newest)

    def _newest(self) -> str:
        return self._api.dataset_info(self.repo, revision=self.revision).sha or ""

    def listing(self) -> list[dict[str, Any]]:
        """Path, size, SHA-256 ("" of small files, which lie in git itself) and git's hash of every file."""
        return self._kept("listing.json", self._list)

    def _list(self) -> list[dict[str, Any]]:
        tree = self._api.list_repo_tree(self.repo, revision=self.commit, repo_type="dataset", recursive=True)
        files: list[Any] = [entry for entry in tree if hasattr(entry, "size")]  # the others are folders
        inside = [f for f in files if ".." not in f.path.split("/") and not f.path.startswith("/")]
        return [
            {"path": f.path, "size": f.size, "sha256": f.lfs.sha256 if f.lfs else "", "git": f.blob_id} for f in inside
        ]

    def _kept(self, name: str, ask: Callable[[], T]) -> T:
        path = self.folder / name
        with locked(self.folder / ".lock"):
            if not path.is_file():
                write_json(path, self._persistently(ask, self.repo))
        return read_json(path)

    def has(self, name: str) -> bool:
        """Whether the file is here, whole and compared with what the hub says of it."""
        path = self.folder / name
        mark = self._mark(path)
        return path.is_file() and mark.is_file() and path.stat().st_size == read_json(mark)["size"]

    @staticmethod
    def _mark(path: Path) -> Path:
        return path.with_name(f"{path.name}.verified.json")

    def get_all(self, files: Sequence[dict[str, Any]]) -> list[Path]:
        """Several at once; the first that fails stops the others, and what was complete is kept."""
        missing = [f for f in files if not self.has(f["path"])]
        if missing:
            with progress(f"downloading {self.repo}", sum(f["size"] for f in missing)) as bar:
                pool = concurrent.futures.ThreadPoolExecutor(PARALLEL)
                try:
                    jobs = {pool.submit(self.get, f["path"]): f for f in missing}
                    for done in concurrent.futures.as_completed(jobs):
                        done.result()
                        bar.advance(jobs[done]["size"])
                except BaseException:
                    self._stop.set()  # the others leave at their next piece, and go on there another time
                    raise
                finally:
                    pool.shutdown(cancel_futures=True)
        return [self.folder / f["path"] for f in files]

    def get(self, name: str) -> Path:
        """One file, downloaded if it is not here; `DataError` where it cannot be had, or never comes whole."""
        path = self.folder / name
        if not self.has(name):
            entry = next((f for f in self.listing() if f["path"] == name), None)
            if entry is None:
                raise DataError(f"hf:{self.repo}: commit {self.commit[:8]} has no {name}")
            with locked(path.with_name(f".{path.name}.lock")):
                if not self.has(name):
                    begin = time.perf_counter()
                    facts = self._persistently(lambda: self._download(entry, path), name)
                    self.speed = entry["size"] / max(1e-3, time.perf_counter() - begin)
                    write_json(self._mark(path), facts)
        return path

    def _download(self, entry: dict[str, Any], path: Path) -> dict[str, Any]:
        """Into a file aside, from where that ends; the library's own download begins anew in every process."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars

        disable_progress_bars()
        where = {"repo_type": "dataset", "revision": self.commit, "endpoint": self._endpoint}
        part, size = path.with_name(f".{path.name}.part"), entry["size"]
        with open(part, "ab") as file:
            if file.tell() > size:
                file.truncate(0)
            url = hf_hub_url(self.repo, entry["path"], **where)
            http_get(
                url,
                _Stoppable(file, self._stop),  # type: ignore[arg-type]
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=size,
            )
            file.flush()
            os.fsync(file.fileno())
        digest = sha256_file(part)
        right = digest == entry["sha256"] if entry["sha256"] else _git_hash(part) == entry["git"]
        if part.stat().st_size != size or not right:
            part.unlink()
            raise Damaged(f"{entry['path']}: came damaged, and was thrown away")
        os.replace(part, path)
        compared = "sha256" if entry["sha256"] else "git"
        return {"sha256": digest, "size": size, "compared_with": compared, "commit": self.commit}

    def _persistently(self, ask: Callable[[], T], what: str) -> T:
        """Ask until an answer comes: waits grow, or are what the hub asks for; `DataError` after `TRIES`."""
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()
        failure: Exception
        for attempt in range(TRIES):
            try:
                return ask()
            except Exception as error:  # beside the hub's own errors those of its HTTP library, which changed before
                failure = error
            if isinstance(failure, DataError):
                raise failure
            if isinstance(failure, OSError) and failure.errno in FULL_OR_CLOSED:
                raise DataError(f"{self.folder}: {failure.strerror}; what was complete is kept")
            offline = type(failure).__name__ == "OfflineModeIsEnabled"  # HF_HUB_OFFLINE
            silent = _status(failure) is None and not isinstance(failure, Damaged)
            tries = SILENT_TRIES if silent else TRIES
            if offline or _status(failure) in FINAL or attempt + 1 >= tries:
                break
            wait = min(LONGEST_WAIT, max(_asked_wait(failure), FIRST_WAIT * 2**attempt * random.uniform(0.8, 1.2)))
            if wait >= 1:
                say(f"  {what}: {_line(failure)}; again in {wait:.0f} s", style="yellow")
            if self._stop.wait(wait):
                break
        raise DataError(
            f"hf:{self.repo}: {what} cannot be had ({_line(failure)}). The same command goes on where it stopped; or "
            f"download {self.repo} ({self.commit[:8] if hasattr(self, 'commit') else self.revision}) elsewhere and "
            "give its folder, --set data.mirror=FOLDER; or train on text of your own, --data 'files:*.txt'"
        )


def _git_hash(path: Path) -> str:
    """SHA-1 as git has it of a file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _response(error: BaseException | None) -> Any:
    """The HTTP answer behind an error of the hub's client."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response  # type: ignore[attr-defined]
        error = error.__cause__ or error.__context__
    return None


def _status(error: BaseException) -> int | None:
    return getattr(_response(error), "status_code", None)


def _asked_wait(error: BaseException) -> float:
    """Seconds that the answer asks to wait for."""
    asked = getattr(_response(error), "headers", {}).get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


def _line(error: BaseException) -> str:
    status = _status(error)
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"HTTP {status}" if status else text[:200]


COMPRESSION = 3.0  # characters of text in a byte of a compressed text file, about
KINDS = (".parquet", ".jsonl", ".txt", ".md")
MARGIN = 1.05  # files hold somewhat more or less than the first


@dataclass(frozen=True)
class HubSource:
    repo: str
    revision: str = "main"
    pattern: str = ""  # "": all files of the kind that holds the text, parquet before jsonl before plain text


def parse(source: str, key: str = "data.source") -> HubSource:
    """`UsageError` for what has not the form `hf:OWNER/NAME[@REVISION][:PATTERN]`."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([^:@\s]+))?(?::(.+))?", source)
    if match is None:
        raise UsageError(f"{key}: {source!r}; write hf:OWNER/NAME, hf:OWNER/NAME@REVISION:PATTERN")
    return HubSource(match[1], match[2] or "main", match[3] or "")


def fetch(source: str, text_bytes: int, cache: Path, mirror: str = "", endpoint: str | None = None) -> list[Path]:
    """Paths of the first files, in the order of their names, that hold `text_bytes` of text (0: of all files).

    From `mirror`, a folder that holds `OWNER/NAME/` or is itself the one called NAME, or from the hub into `cache`.
    `DataError` says what is missing or cannot be had, and where to put it by hand.
    """
    wanted = parse(source)
    if mirror:
        return _from_mirror(wanted, text_bytes, Path(mirror).expanduser())
    hub = Hub(wanted.repo, wanted.revision, cache, endpoint)
    files = _matching(hub.listing(), wanted)
    _check_room(hub, files[:1])
    if not hub.has(files[0]["path"]):
        size = f"{files[0]['size'] / 1e9:.3g} GB"
        what = f"the first of {len(files):,} files, {size}, to see how much text it holds"
        say(f"  {hub.repo} at {hub.commit[:8]}: {what}")
    first = hub.get(files[0]["path"])
    if not text_bytes:
        count = len(files)
    else:
        ratio = text_size(first) / max(1, files[0]["size"])
        if not ratio:
            raise DataError(f"{first}: no text in it")
        count = _enough([f["size"] * ratio for f in files], text_bytes)
    _announce(hub, files, count, text_bytes)
    return [first, *hub.get_all(files[1:count])]


def _from_mirror(wanted: HubSource, text_bytes: int, mirror: Path) -> list[Path]:
    if not mirror.is_dir():
        raise DataError(f"data.mirror: {mirror} is no folder")
    name = wanted.repo.partition("/")[2]
    folders = [mirror / wanted.repo, mirror / wanted.repo.replace("/", "--")]
    folders += [mirror] if mirror.resolve().name in (name, wanted.repo.replace("/", "--")) else []
    folder = next((p for p in folders if p.is_dir()), None)
    if folder is None:
        raise DataError(f"data.mirror: {folders[0]} is not there; put the files of hf:{wanted.repo} into it")
    names = sorted(str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file())
    files = _matching([{"path": name} for name in names], wanted, f"data.mirror {folder}")
    paths = [folder / f["path"] for f in files]
    return paths[: _enough([text_size(p) for p in paths], text_bytes)] if text_bytes else paths


def _matching(listing: Sequence[dict[str, Any]], wanted: HubSource, where: str = "") -> list[dict[str, Any]]:
    """Those of a readable kind that the pattern names, sorted."""
    readable = [f for f in listing if kind_of(Path(f["path"])) in SUFFIXES and Path(f["path"]).name != "README.md"]
    found = [f for f in readable if fnmatch.fnmatchcase(f["path"], wanted.pattern)]
    if not wanted.pattern:  # many data sets lie there in two forms
        kinds = [[f for f in readable if kind_of(Path(f["path"])) == kind] for kind in KINDS]
        found = next((files for files in kinds if files), [])
    if not found:
        names = ", ".join(f["path"] for f in readable[:3]) or "none at all"
        raise DataError(
            f"hf:{wanted.repo}: no file matches {wanted.pattern or '*'!r}{' in ' + where if where else ''}; "
            f"of {len(readable)} files of a known kind the first: {names}"
        )
    return sorted(found, key=lambda f: f["path"])


def _enough(sizes: Sequence[float], needed: float) -> int:
    """How many of the first hold what is needed, with a margin."""
    total = 0.0
    for count, size in enumerate(sizes, 1):
        total += size
        if total >= needed * MARGIN:
            return count
    return len(sizes)


def text_size(path: Path) -> int:
    """Bytes of text in a file, about: a parquet file says so, a compressed text is some times its size."""
    if kind_of(path) == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            meta = pq.read_metadata(path)
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            columns = [group.column(j) for group in groups for j in range(group.num_columns)]
            text = [c.total_uncompressed_size for c in columns if c.path_in_schema == "text"]
            if columns and not text:
                names = ", ".join(dict.fromkeys(c.path_in_schema for c in columns))
                raise DataError(f"{path}: no column `text` (it has {names})")
            return sum(text)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    return round(path.stat().st_size * (COMPRESSION if path.suffix.lower() in COMPRESSED else 1))


def _announce(hub: Hub, files: Sequence[dict[str, Any]], count: int, text_bytes: int) -> None:
    """Say what will be downloaded and how long that takes, at the speed of the first file."""
    missing = [f["size"] for f in files[:count] if not hub.has(f["path"])]
    reason = f" for {text_bytes / 1e9:.3g} GB of text" if text_bytes else ""
    line = f"  {hub.repo} at {hub.commit[:8]}: {count:,} of {len(files):,} files{reason}"
    if not missing:
        return
    speed = f", about {sum(missing) / hub.speed / 60:.1f} minutes" if hub.speed else ""
    say(f"{line}; {len(missing):,} to download, {sum(missing) / 1e9:.3g} GB{speed}")
    _check_room(hub, files[:count])


def _check_room(hub: Hub, files: Sequence[dict[str, Any]]) -> None:
    """`DataError` where the disk has no room for what is missing."""
    missing = sum(f["size"] for f in files if not hub.has(f["path"]))
    free = shutil.disk_usage(hub.folder).free
    if missing > free:
        raise DataError(
            f"{hub.folder}: {free / 1e9:.3g} GB are free, {missing / 1e9:.3g} GB are needed; choose another "
            "--cache-dir, or lower data.text_bytes"
        )
