"""Where the exams' data sets lie: a local mirror (`tasks.data_dir`), or downloads from their publishers, pinned and
verified, in a cache that all runs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxchat.errors import DataError


class MissingData(DataError):
    """The files of one exam are not at hand; the exam is left out and the message says how to place them."""


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set repository on the Hugging Face hub, at one commit."""

    repo: str
    revision: str  # of 40 hexadecimal digits
    files: tuple[str, ...]


@dataclass(frozen=True)
class TaskFiles:
    """`data_dir`: a local mirror, "" for none; `download`: whether what it lacks may be fetched."""

    data_dir: str = ""
    download: bool = False
    cache: Path = field(default_factory=lambda: Path("~/.cache/jaxchat/tasks").expanduser())

    def find(self, patterns: Sequence[str], hub: HubFiles | None = None) -> list[Path]:
        """The files of the first of `patterns` (globs inside the mirror) that matches any, sorted; else the hub's.

        Raises `MissingData`.
        """
        raise NotImplementedError


NO_FILES = TaskFiles()
