"""Download files of data sets on the Hugging Face hub, and zip archives of the web. Verified, and kept in a cache.

The endpoint is huggingface_hub's (`HF_ENDPOINT`). Files that were verified once are used again without any request.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from jaxchat.errors import DataError
from jaxchat.log import animated, say
from jaxchat.run_dir import locked, read_json, sha256_file, write_json

T = TypeVar("T")
PARALLEL = 4  # downloads at once
TRIES = 6
FIRST_TRIES = 3  # where not even the list of files could be had: somebody waits
FIRST_WAIT = 1.0  # seconds before the second try; doubled each time
FINAL = (400, 401, 403, 404, 410, 416, 451)  # HTTP answers that another try does not change
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # faults of our disk, not of the hub
TIMEOUT = 30.0  # seconds without an answer from a web server
LARGEST_ARCHIVE = 4 << 30  # bytes, unpacked


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set on the hub. `revision`: a commit, or a branch, of which the first commit seen is kept."""

    repo: str
    revision: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"get {self.files[0]}{more} of the hub's data set {self.repo}, revision {self.revision[:8]},"


@dataclass(frozen=True)
class Archive:
    """A zip file on the web, of which the members with one of `suffixes` are kept."""

    url: str
    suffixes: tuple[str, ...]

    def __str__(self) -> str:
        return f"unpack {self.url}"


class Hub:
    """One data set repository at one commit, and the folder of its downloaded files. `mirror`: the key of another."""

    def __init__(self, repo: str, revision: str, cache: Path, endpoint: str | None = None, mirror: str = ""):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, logging

        logging.set_verbosity_error()
        if not animated():
            disable_progress_bars()
        self.repo, self.revision, self._api = repo, revision, HfApi(endpoint=endpoint)
        self._mirror = mirror
        self.folder = cache / repo.replace("/", "--") / re.sub(r"[^\w.-]", "--", revision)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.commit = revision
        if not re.fullmatch("[0-9a-f]{40}", revision):
            self.commit = self._kept("commit.json", lambda: self._api.dataset_info(repo, revision=revision).sha or "")

    def listing(self) -> dict[str, dict[str, Any]]:
        """Return path, size, SHA-256 ("" of small files, which lie in git itself) and git's hash of files by path."""
        from huggingface_hub.hf_api import RepoFile

        def ask() -> list[dict[str, Any]]:
            self._api.dataset_info(self.repo, revision=self.commit)  # fails at once, the list after 5 tries of its own
            tree = self._api.list_repo_tree(self.repo, revision=self.commit, repo_type="dataset", recursive=True)
            return [
                {"path": f.path, "size": f.size, "sha256": f.lfs.sha256 if f.lfs else "", "git": f.blob_id}
                for f in tree
                if isinstance(f, RepoFile) and ".." not in f.path and f.path[0] != "/"
            ]

        return {entry["path"]: entry for entry in self._kept("listing.json", ask)}

    def has(self, name: str) -> bool:
        """Return whether the file is here, whole and verified."""
        path = self.folder / name
        mark = path.with_name(f"{path.name}.verified.json")
        return path.is_file() and mark.is_file() and path.stat().st_size == read_json(mark)["size"]

    def get(self, names: Sequence[str]) -> list[Path]:
        """Download what is missing, several files at once; `DataError` if a file stays missing or damaged."""
        if not all(map(self.has, names)):
            files = self.listing()
            if unknown := [name for name in names if name not in files]:
                raise DataError(f"hf:{self.repo}: commit {self.commit[:8]} has no {unknown[0]}")
            with locked(self.folder / ".lock"):  # of several processes one downloads
                missing = [files[name] for name in names if not self._verified(files[name])]
                size, free = sum(file["size"] for file in missing), shutil.disk_usage(self.folder).free
                if size > free:
                    raise DataError(
                        f"{self.folder}: {free / 1e9:.3g} GB are free, {size / 1e9:.3g} GB are needed; choose another "
                        "--cache-dir, or lower data.text_bytes"
                    )
                with ThreadPoolExecutor(PARALLEL) as pool:
                    list(pool.map(self._download, missing))
        return [self.folder / name for name in names]

    def _kept(self, name: str, ask: Callable[[], Any]) -> Any:
        """Return the hub's answer, kept in a file of this name."""
        path = self.folder / name
        with locked(self.folder / ".lock"):
            if not path.is_file():
                write_json(path, self._retried(self.repo, ask))
        return read_json(path)

    def _download(self, file: dict[str, Any]) -> None:
        def ask() -> None:
            where: dict[str, Any] = {"revision": self.commit, "local_dir": self.folder}
            self._api.hf_hub_download(self.repo, file["path"], repo_type="dataset", **where)
            if not self._verified(file):
                raise ConnectionError("damaged on the way")

        self._retried(file["path"], ask)

    def _verified(self, file: dict[str, Any]) -> bool:
        """Return whether the file is whole, and mark it as verified; delete it if it is damaged."""
        path = self.folder / file["path"]
        if self.has(file["path"]) or not path.is_file():
            return path.is_file()
        digest, size = sha256_file(path), path.stat().st_size
        git = "" if file["sha256"] else hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
        if size != file["size"] or file["sha256"] not in ("", digest) or git not in ("", file["git"]):
            path.unlink()
            return False
        write_json(path.with_name(f"{path.name}.verified.json"), {"sha256": digest, "size": size})
        return True

    def _retried(self, what: str, ask: Callable[[], T]) -> T:
        """Ask until an answer comes, with growing waits; `DataError` after `TRIES`, or at once if no try can help."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        for attempt in range(TRIES):
            try:
                return ask()
            except Exception as error:  # also those of the client's HTTP library, which changes between versions
                if isinstance(error, OSError) and error.errno in LOCAL:
                    raise DataError(f"{self.folder}: {error.strerror}; complete files are kept") from None
                cause = error if hasattr(error, "response") else error.__cause__ or error
                status = getattr(getattr(cause, "response", None), "status_code", None)
                sentence = getattr(cause, "server_message", None) or ("" if status in FINAL else str(cause))
                why = " ".join(f"{f'HTTP {status} ' if status in FINAL else ''}{sentence}".split())[:300]
                why = why or type(cause).__name__
                if status in FINAL or isinstance(cause, OfflineModeIsEnabled):
                    break
            if attempt + 1 == (FIRST_TRIES if what == self.repo and status is None else TRIES):
                break
            if attempt + 1 == FIRST_TRIES:
                say(f"  {what}: {why}; {TRIES - FIRST_TRIES} more tries", style="yellow")
            time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.8, 1.2))
        what = f"hf:{self.repo}{f': {what}' if what != self.repo else ''}"
        raise DataError(f"{what} could not be downloaded ({why.rstrip('.')}); {self._advice(cause)}")

    def _advice(self, cause: BaseException) -> str:
        """Return the next step that can help after the hub's last answer."""
        from huggingface_hub import errors, get_token

        page = f"{self._api.endpoint}/datasets/{self.repo}"
        login = "your token has no access to it" if get_token() else "log in with hf auth login, or set HF_TOKEN"
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError):
            return f"accept its terms on {page}; {login}"
        if isinstance(cause, errors.RepositoryNotFoundError):
            return f"check the name, {page}; if it is private, {login}"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"it has no revision {self.revision}; name a branch, tag or commit of {page}"
        if status in (401, 403):
            return f"ask for access on {page}; {login}"
        step = f"see {page}" if status in FINAL else "the same command later goes on where it stopped"
        step = "unset HF_HUB_OFFLINE" if isinstance(cause, errors.OfflineModeIsEnabled) else step
        folder = f"; or give a folder with its files ({self.commit[:8]}), --set {self._mirror}=FOLDER"
        return step + (folder if self._mirror else "")


def download_archive(archive: Archive, cache: Path) -> Path:
    """Return the folder with the unpacked members, downloaded if necessary; `OSError` or `DataError` if that fails."""
    folder = cache / PurePosixPath(archive.url).stem
    with locked(folder.with_suffix(".lock")):
        if (folder / "source.json").is_file():
            return folder
        if not archive.url.startswith("https://"):
            raise DataError(f"{archive.url}: only https is allowed")
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            path, unpacked = Path(aside) / "archive.zip", Path(aside) / "unpacked"
            with urllib.request.urlopen(archive.url, timeout=TIMEOUT) as response, open(path, "wb") as file:
                say(f"  downloading {archive.url}, {int(response.headers.get('Content-Length') or 0) / 1e6:,.0f} MB")
                shutil.copyfileobj(response, file)
            try:
                with zipfile.ZipFile(path) as zipped:  # keeps every name inside the folder, and checks the CRC of each
                    members = [m for m in zipped.infolist() if m.filename.endswith(archive.suffixes)]
                    members = [member for member in members if "__MACOSX" not in member.filename]
                    if sum(member.file_size for member in members) > LARGEST_ARCHIVE:
                        raise DataError(f"{archive.url}: unpacks to more than {LARGEST_ARCHIVE >> 30} GiB")
                    zipped.extractall(unpacked, members)
            except zipfile.BadZipFile as error:
                raise DataError(f"{archive.url}: not a whole zip file ({error})") from None
            write_json(unpacked / "source.json", {"url": archive.url, "sha256": sha256_file(path)})
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unpacked, folder)
    return folder
