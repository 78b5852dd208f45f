"""Download files: of data sets on the Hugging Face hub, and archives from the web. Verified, and kept in a cache.

`hf:OWNER/NAME[@REVISION][:PATTERN]` names pretraining text. The endpoint is huggingface_hub's (`HF_ENDPOINT`). Files
that have been downloaded and verified are used again without any request.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import itertools
import os
import random
import re
import shutil
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from jaxchat.data.files import SUFFIXES, kind_of, text_size
from jaxchat.errors import DataError, UsageError
from jaxchat.log import animated, progress, say
from jaxchat.run_dir import locked, read_json, sha256_file, write_json

T = TypeVar("T")
PARALLEL = 4  # downloads at once
TRIES = 6
FIRST_WAIT = 1.0  # seconds before the second try; doubled each time
FINAL = (400, 401, 403, 404, 410, 416, 451)  # HTTP answers that another try does not change
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # faults of our disk, not of the hub
MARGIN = 1.05  # files hold somewhat more or less text than the first
TIMEOUT = 30.0  # seconds without an answer from a web server
LARGEST_ARCHIVE = 4 << 30  # bytes, unpacked


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set on the hub. `revision`: a commit, or a branch, of which the first commit seen is kept."""

    repo: str
    revision: str = "main"
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"get {', '.join(self.files)} of the hub's data set {self.repo}, revision {self.revision[:8]},"


@dataclass(frozen=True)
class Archive:
    """A zip file on the web, of which the members with one of `suffixes` are kept. `sha256`: "" if unpublished."""

    url: str
    suffixes: tuple[str, ...]
    sha256: str = ""

    def __str__(self) -> str:
        return f"unpack {self.url}"


class Hub:
    """One data set repository at one commit, and the folder of its downloaded files."""

    def __init__(self, repo: str, revision: str, cache: Path, endpoint: str | None = None):
        from huggingface_hub import HfApi

        self.repo, self.revision, self._endpoint = repo, revision, endpoint
        self._api = HfApi(endpoint=endpoint)
        self.folder = cache / repo.replace("/", "--") / re.sub(r"[^\w.-]", "--", revision)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.commit = revision
        if not re.fullmatch("[0-9a-f]{40}", revision):
            self.commit = self._kept("commit.json", lambda: self._api.dataset_info(repo, revision=revision).sha or "")

    def listing(self) -> list[dict[str, Any]]:
        """Return path, size, SHA-256 ("" of small files, which lie in git itself) and git's hash of every file."""
        from huggingface_hub.hf_api import RepoFile

        def ask() -> list[dict[str, Any]]:
            tree = self._api.list_repo_tree(self.repo, revision=self.commit, repo_type="dataset", recursive=True)
            return [
                {"path": f.path, "size": f.size, "sha256": f.lfs.sha256 if f.lfs else "", "git": f.blob_id}
                for f in tree
                if isinstance(f, RepoFile) and ".." not in f.path and f.path[0] != "/"
            ]

        return self._kept("listing.json", ask)

    def _kept(self, name: str, ask: Callable[[], T]) -> T:
        path = self.folder / name
        with locked(self.folder / ".lock"):
            if not path.is_file():
                write_json(path, self._retried(ask, self.repo))
        return read_json(path)

    def has(self, name: str) -> bool:
        """Return whether the file is here, whole and verified."""
        path = self.folder / name
        mark = _mark(path)
        return path.is_file() and mark.is_file() and path.stat().st_size == read_json(mark)["size"]

    def get(self, names: Sequence[str]) -> list[Path]:
        """Download what is missing, several files at once; `DataError` if a file cannot be had or stays damaged."""
        if not all(map(self.has, names)):
            entries = {entry["path"]: entry for entry in self.listing()}
            if unknown := [name for name in names if name not in entries]:
                raise DataError(f"hf:{self.repo}: commit {self.commit[:8]} has no {unknown[0]}")
            with locked(self.folder / ".lock"):  # of several processes one downloads
                missing = [entries[name] for name in names if not self._verified(entries[name])]
                size, free = sum(f["size"] for f in missing), shutil.disk_usage(self.folder).free
                if size > free:
                    raise DataError(
                        f"{self.folder}: {free / 1e9:.3g} GB are free, {size / 1e9:.3g} GB are needed; choose another "
                        "--cache-dir, or lower data.text_bytes"
                    )
                with ThreadPoolExecutor(PARALLEL) as pool:
                    list(pool.map(self._download, missing))
        return [self.folder / name for name in names]

    def _download(self, entry: dict[str, Any]) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars, logging

        logging.set_verbosity_error()
        if not animated():
            disable_progress_bars()

        def ask() -> None:
            hf_hub_download(
                self.repo, entry["path"], repo_type="dataset", revision=self.commit, endpoint=self._endpoint,
                local_dir=self.folder,
            )  # fmt: skip
            if not self._verified(entry):
                raise ConnectionError("damaged on the way")

        self._retried(ask, entry["path"])

    def _verified(self, entry: dict[str, Any]) -> bool:
        """Return whether the file is whole, and mark it as verified; delete it if it is damaged."""
        path = self.folder / entry["path"]
        if self.has(entry["path"]) or not path.is_file():
            return path.is_file()
        digest = sha256_file(path)
        equal = digest == entry["sha256"] if entry["sha256"] else _git_hash(path) == entry["git"]
        if not equal or path.stat().st_size != entry["size"]:
            path.unlink()
            return False
        compared = "sha256" if entry["sha256"] else "git"
        facts = {"sha256": digest, "size": entry["size"], "compared_with": compared, "commit": self.commit}
        write_json(_mark(path), facts)
        return True

    def _retried(self, ask: Callable[[], T], what: str) -> T:
        """Ask until an answer comes, with growing waits; `DataError` after `TRIES`, or at once if no try can help."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        for attempt in itertools.count(1):
            try:
                return ask()
            except Exception as error:  # also those of the client's HTTP library, which changes between versions
                if isinstance(error, OSError) and error.errno in LOCAL:
                    raise DataError(f"{self.folder}: {error.strerror}; complete files are kept") from None
                status = _status(error)
                why = f"HTTP {status}" if status else (str(error).strip().splitlines() or [type(error).__name__])[0]
                final = status in FINAL or isinstance(error, OfflineModeIsEnabled) or attempt == TRIES
            if final:
                raise DataError(
                    f"hf:{self.repo}: {what} cannot be had ({why[:200]}). Run the same command again; or download "
                    f"{self.repo} ({self.commit[:8]}) elsewhere and give its folder, --set data.mirror=FOLDER; or "
                    "train on text of your own, --data 'files:*.txt'"
                )
            wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
            say(f"  {what}: {why[:200]}; again in {wait:.0f} s", style="yellow")
            time.sleep(wait)
        raise AssertionError("unreachable")


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error of the hub's client."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return getattr(getattr(error, "response", None), "status_code", None)


def _mark(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified.json")


def _git_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def download(files: HubFiles, cache: Path) -> list[Path]:
    """Return the paths of files of a data set, downloaded into `cache` if necessary; `DataError` if that fails."""
    return Hub(files.repo, files.revision, cache).get(files.files)


def parse(source: str, key: str = "data.source") -> tuple[str, str, str]:
    """Return (repository, revision, pattern) of an `hf:` source; `UsageError` if it is malformed."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([^:@\s]+))?(?::(.+))?", source)
    if match is None:
        raise UsageError(f"{key}: {source!r}; write hf:OWNER/NAME, hf:OWNER/NAME@REVISION:PATTERN")
    return match[1], match[2] or "main", match[3] or ""


def fetch(source: str, text_bytes: int, cache: Path, mirror: str = "", endpoint: str | None = None) -> list[Path]:
    """Return the first files, by name, that together hold `text_bytes` of text (0: all files).

    They come from `mirror`, a folder that holds `OWNER/NAME/` or is itself called NAME, or from the hub into `cache`.
    `DataError` says what is missing or cannot be had, and where to put it by hand.
    """
    repo, revision, pattern = parse(source)
    if mirror:
        root = Path(mirror).expanduser()
        folder = root / repo
        if not folder.is_dir() and root.resolve().name == repo.partition("/")[2]:
            folder = root
        if not folder.is_dir():
            raise DataError(f"data.mirror: no folder {root / repo}; put the files of hf:{repo} into it")
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        paths = [folder / name for name in _matching(names, repo, pattern)]
        return paths[: _enough(map(text_size, paths), text_bytes)]
    hub = Hub(repo, revision, cache, endpoint)
    sizes = {entry["path"]: entry["size"] for entry in hub.listing()}
    names = _matching(list(sizes), repo, pattern)
    count, where = len(names), f"  {repo} at {hub.commit[:8]}"
    if text_bytes:  # how much text a file holds is measured at the first
        if not hub.has(names[0]):
            size = f"{sizes[names[0]] / 1e9:.3g} GB"
            say(f"{where}: the first of {count:,} files, {size}, to see how much text it holds")
        (first,) = hub.get(names[:1])
        if not (first_text := text_size(first)):
            raise DataError(f"{first}: no text in it")
        count = _enough((sizes[name] * first_text / max(1, sizes[names[0]]) for name in names), text_bytes) or count
    if missing := [sizes[name] for name in names[:count] if not hub.has(name)]:
        reason = f" for {text_bytes / 1e9:.3g} GB of text" if text_bytes else ""
        left = f"{len(missing):,} to download, {sum(missing) / 1e9:.3g} GB"
        say(f"{where}: {count:,} of {len(names):,} files{reason}; {left}")
    return hub.get(names[:count])


def _matching(names: Sequence[str], repo: str, pattern: str) -> list[str]:
    """Return the readable files that the pattern names, sorted; without one, all of the kind that holds the text."""
    readable = sorted(n for n in names if kind_of(Path(n)) in SUFFIXES and PurePosixPath(n).name != "README.md")
    matching = [n for n in readable if fnmatch.fnmatchcase(n, pattern)]
    if not pattern:  # many data sets lie there in two forms
        forms = ([n for n in readable if kind_of(Path(n)) == kind] for kind in SUFFIXES)
        matching = next((form for form in forms if form), [])
    if not matching:
        first = ", ".join(readable[:3]) or "none at all"
        raise DataError(f"hf:{repo}: no file matches {pattern or '*'!r}; readable files: {first}")
    return matching


def _enough(sizes: Iterable[float], needed: float) -> int | None:
    """Return how many of the first files hold the text that is needed, with a margin; None for all."""
    total = 0.0
    for count, size in enumerate(sizes, 1):
        total += size
        if total >= needed * MARGIN > 0:
            return count
    return None


def download_archive(source: Archive, cache: Path) -> Path:
    """Return the folder with the unpacked members, downloaded if necessary; `OSError` or `DataError` if that fails."""
    folder = cache / PurePosixPath(source.url).stem
    with locked(folder.with_suffix(".lock")):
        if not (folder / "source.json").is_file():
            with tempfile.TemporaryDirectory(dir=cache) as aside:
                archive, unpacked = Path(aside) / "archive.zip", Path(aside) / "unpacked"
                facts = download_url(source.url, archive, source.sha256)
                _unpack(archive, source.suffixes, unpacked)
                write_json(unpacked / "source.json", facts)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(unpacked, folder)
    return folder


def download_url(url: str, path: Path, sha256: str = "") -> dict[str, Any]:
    """Download a file over https, and return its URL, size and SHA-256; `DataError` if these are not as expected."""
    if not url.startswith("https://"):
        raise DataError(f"{url}: only https is allowed")
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(path, "wb") as file:
        size = int(response.headers.get("Content-Length") or -1)
        with progress(f"downloading {PurePosixPath(url).name}", size if size >= 0 else None) as bar:
            while piece := response.read(1 << 20):
                file.write(piece)
                bar.advance(len(piece))
    facts = {"url": url, "size": path.stat().st_size, "sha256": sha256_file(path)}
    if size not in (-1, facts["size"]) or sha256 not in ("", facts["sha256"]):
        raise DataError(f"{url}: damaged on the way: {facts}, must be {size} bytes and SHA-256 {sha256 or 'any'}")
    return facts


def _unpack(archive: Path, suffixes: tuple[str, ...], folder: Path) -> None:
    """Extract the wanted members; `zipfile` keeps every name inside `folder`."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = [m for m in file.infolist() if m.filename.endswith(suffixes) and "__MACOSX" not in m.filename]
            if sum(member.file_size for member in members) > LARGEST_ARCHIVE:
                raise DataError(f"{archive.name}: unpacks to more than {LARGEST_ARCHIVE >> 30} GiB")
            file.extractall(folder, members)
    except zipfile.BadZipFile as error:
        raise DataError(f"not a zip file ({error})") from None
