"""Run directory layout and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from jaxchat.errors import DataError, UsageError

RECORD_FORMAT = 1  # of an entry of `stages.json`
RECORD_FIELDS = {"status": str, "start": str, "inputs": dict, "facts": dict, "seconds": int | float}
RESTORE = "put it back from a copy, or choose another --run-dir"
CHECKSUMS = "SHA256SUMS"
TRAINED = {"base": "pretrain", "sft": "sft", "rl": "rl"}  # folder of a trained stage -> its name in `stages.json`


class RunInUse(UsageError):
    """Another process, the `owner`, has the run directory."""

    def __init__(self, root: Path, owner: str):
        super().__init__(f"{root}: in use by {owner}; wait for it, stop it, or choose another --run-dir")
        self.owner = owner


class RunDir:
    """Paths of everything inside one run directory."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.toml"
        self.stages = self.root / "stages.json"
        self.messages = self.root / "messages.jsonl"
        self.tokenizer = self.root / "tokenizer"
        self.data = self.root / "data"
        self.report = self.root / "report.md"
        self.plots = self.root / "plots"
        self.export = self.root / "export"

    def stage(self, name: str) -> Path:
        """Return the directory of a trained stage: `base`, `sft`, `rl`."""
        return self.root / name

    def eval(self, name: str) -> Path:
        return self.root / "eval" / f"{name}.json"

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the entries of `stages.json`, {} for a new run. `DataError` if it is damaged or of another version."""
        records = read_json(self.stages) if self.stages.exists() else {}
        if not isinstance(records, dict):
            raise DataError(f"{self.stages}: damaged; {RESTORE}")
        for name, record in records.items():
            require_format(record, RECORD_FORMAT, f"{self.stages}, {name}")
            fields = record if isinstance(record, dict) else {}
            wrong = [key for key, kind in RECORD_FIELDS.items() if not isinstance(fields.get(key), kind)]
            if wrong or (record["status"] == "done" and not isinstance(record["facts"].get("digest"), str)):
                raise DataError(f"{self.stages}: damaged, {name} lacks {', '.join(wrong) or 'facts.digest'}; {RESTORE}")
        return records

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory for this process; `RunInUse` names the process that already has it.

        The lock is the operating system's, so it vanishes with the process however that ends.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.root}: cannot be a run directory ({error.strerror}); give another --run-dir"
            ) from None
        owner = self.root / ".owner"
        try:
            lock = filelock.FileLock(self.root / ".lock", blocking=False).acquire()
        except filelock.Timeout:
            raise RunInUse(self.root, f"process {owner.read_text() if owner.exists() else 'unknown'}") from None
        with lock:
            try:
                owner.write_text(str(os.getpid()))
                yield
            finally:
                owner.unlink(missing_ok=True)


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a stage's folder, the newest last."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def locked(path: str | Path) -> filelock.BaseFileLock:
    """Return a lock to enter, which waits for other processes: one downloads and the others find it done."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(path)


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Write a file so that readers see the old one or the whole new one, also after a power cut.

    A lone surrogate, which UTF-8 cannot hold, becomes "\\udXXX", as JSON writes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise
    sync_directory(path.parent)


def link(source: str, target: str) -> None:
    """Hard-link a file that is never changed in place, or copy it where that does not work."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sync_directory(path: str | Path) -> None:
    """Make renames inside `path` durable (no effect where directories cannot be opened, as on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Parse a JSON file; `DataError` names a missing or damaged one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers or depths beyond Python's limits
        raise DataError(f"{path}: not valid JSON ({error}); delete it to have it made again") from None


def write_sealed(path: str | Path, value: dict[str, Any]) -> None:
    """Write a JSON object with its own SHA-256 in it, for files whose checksums and counts others rely on."""
    write_json(path, {**value, "seal": _seal(value)})


def read_sealed(path: str | Path, known: int, advice: str) -> dict[str, Any]:
    """Return the object that `write_sealed` wrote. `DataError` if it was changed or is not of the format `known`."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != known:
        raise DataError(f"{path}: damaged, or of another version; {advice}")
    if value.pop("seal", None) != _seal(value):
        raise DataError(f"{path}: damaged (its seal does not fit); {advice}")
    return value


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def require_format(value: Any, known: int, source: object) -> None:
    """Raise `DataError` if a file has another format than `known`; a file without a number has format 1."""
    number = value.get("format", 1) if isinstance(value, dict) else 1
    if number != known:
        advice = "update jaxchat" if isinstance(number, int) and number > known else "make it again"
        raise DataError(f"{source}: has format {number!r}, and this version reads format {known}; {advice}")


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, but: Sequence[str] = ()) -> None:
    """Write `SHA256SUMS` over every file of the folder `but` these, as `sha256sum --check` reads it."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name not in but)
    atomic_write(folder / CHECKSUMS, "".join(f"{sha256_file(folder / f)}  {f}\n" for f in files))


def damage(folder: Path, within: Sequence[str] = ("",)) -> str | None:
    """Return the first file that does not match the folder's `SHA256SUMS`, and why; None without such a file.

    `within`: only files whose names begin with one of these.
    """
    if not (folder / CHECKSUMS).is_file():
        return None
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if not name:
            return f"{CHECKSUMS} is damaged"
        if name.startswith(tuple(within)):
            if not (folder / name).is_file():
                return f"{name} is gone"
            if sha256_file(folder / name) != digest:
                return f"{name} is damaged (its SHA-256 is not the recorded one)"
    return None
