"""Files of a data set on the Hugging Face hub, or of a local mirror of it: as many as are needed, verified, kept.

`hf:OWNER/NAME[@REVISION][:PATTERN]`. The endpoint is huggingface_hub's (`HF_ENDPOINT`). What has been downloaded and
verified is used again without asking anybody; a download that was cut off goes on where it stopped.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxchat.data.files import COMPRESSED, SUFFIXES, kind_of
from jaxchat.data.hub_files import Hub
from jaxchat.errors import DataError, UsageError
from jaxchat.log import say

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
