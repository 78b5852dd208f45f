"""The scratch folder of a sandbox: made, watched, and removed whatever lies in it."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

MAX_ENTRIES = 1000  # files and folders


def too_much(folder: Path, max_bytes: int) -> bool:
    """Whether more than `max_bytes` or 1,000 entries lie in it; what cannot be looked at counts as too much."""
    total = entries = 0
    folders = [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as inside:
                for entry in inside:
                    entries += 1
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if total > max_bytes or entries > MAX_ENTRIES:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # deleted meanwhile
            continue
        except OSError:  # a path longer than the system allows, a folder that cannot be entered
            return True
    return False


def make() -> Path:
    """A new empty folder inside one that only this user may change: its owner can neither delete nor replace it."""
    outer = Path(tempfile.mkdtemp(prefix="jaxchat-sandbox-"))
    outer.chmod(0o711)
    folder = outer / "scratch"
    folder.mkdir(0o700)
    return folder


def remove(folder: Path) -> None:
    """Delete what `make` made with all that lies in it, once nobody runs there any more.

    Also folders nested deeper than a path may be long, and those that nobody may enter. Links are never followed.
    """
    outer, serial = folder.parent, 0
    if outer.is_symlink():
        return
    todo = [str(outer)]
    while todo:
        top = todo.pop()
        with os.scandir(top) as inside:
            entries = list(inside)
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, stat.S_IRWXU)
            moved = entry.path
            if top != str(outer):
                serial += 1
                moved = str(outer / str(serial))  # beside the others instead of below: no path grows
                os.rename(entry.path, moved)
            todo.append(moved)
        if top != str(outer):
            os.rmdir(top)
    os.rmdir(outer)
