"""Console lines and progress bars for people; metrics as JSON lines for programs."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from jaxchat.run_dir import atomic_write

T = TypeVar("T")
UNIT = re.compile(r"seconds|bytes|disk|memory|hours|usd|mfu|share")
console = Console(highlight=False, stderr=True, emoji=False)
_messages: Path | None = None


def keep_messages(path: Path | None) -> None:
    """Append what `say` and `note` are told to a file, for the page that follows a run; None: no more."""
    global _messages
    _messages = path


def note(text: str = "", **facts: Any) -> None:
    """Append a JSON line with its time to the file of messages; nothing where there is none or it cannot be written."""
    if _messages and not console.quiet:
        with contextlib.suppress(OSError), open(_messages, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "text": text.strip()} | facts) + "\n")


def say(text: str, style: str | None = None, keep: bool = True) -> None:
    """Print one line if the terminal is still there; rich markup inside `text` is not interpreted.

    `keep`: among the messages of the run, too.
    """
    if keep:
        note(text)
    try:
        console.print(text, style=style, markup=False, soft_wrap=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise


say_once = functools.cache(say)  # the same line once in a process


def animated() -> bool:
    """Return whether progress bars can be drawn."""
    return console.is_terminal and not console.is_dumb_terminal


class Task:
    """A progress bar."""

    def __init__(self, bars: Progress, task: Any):
        self._bars, self._task = bars, task

    def advance(self, amount: float = 1) -> None:
        self._bars.advance(self._task, amount)

    def reach(self, done: float, total: float) -> None:
        """Set how much is done and how much there is."""
        self._bars.update(self._task, completed=done, total=total)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Pass the items on, advancing by one each."""
        for item in items:
            self.advance()
            yield item

    def update(self, text: str) -> None:
        """Show a short text beside the bar."""
        self._bars.update(self._task, status=text)


@contextlib.contextmanager
def progress(description: str, total: float | None, done: int = 0) -> Iterator[Task]:
    """Show a bar on a terminal; nothing where the output is a file or a pipe."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not animated()) as bars:
        yield Task(bars, bars.add_task(description, total=total, completed=done, status=""))


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Print a line for work of unknown length; a terminal shows that it goes on."""
    say(text)
    with console.status(""):
        yield


class MetricsFile:
    """JSON lines, one object per optimizer step; truncated to the checkpoint on resume.

    `write`: False in all but one of several processes.
    """

    def __init__(self, path: str | Path, write: bool = True):
        self.path, self.write = Path(path), write
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, record: dict[str, Any]) -> None:
        if self.write:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def amend(self, scores: dict[str, Any]) -> None:
        """Add evaluation results to the newest record."""
        data = self.path.read_bytes() if self.write and self.path.exists() else b""
        if data:
            last = data.rfind(b"\n", 0, -1) + 1
            atomic_write(self.path, data[:last] + json.dumps(json.loads(data[last:]) | scores).encode() + b"\n")

    def truncate_to(self, step: int) -> None:
        """Keep the records of steps below `step`; a torn last line (from a kill) goes, too."""
        if self.write and self.path.exists():
            records = [r for r in read_metrics(self.path) if r["step"] < step]
            atomic_write(self.path, "".join(json.dumps(r) + "\n" for r in records))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return all whole records of a metrics file, none if it does not exist."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # torn by a kill
                records.append(json.loads(line))
    return records


def print_facts(facts: Mapping[str, Any], title: str | None = None) -> None:
    """Print names and values as a table on standard output; see `value_text`."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(Text(name.replace("_", " "), style="bold", no_wrap=True), Text(value_text(name, value)))
    Console(highlight=False).print(table)


def value_text(name: str, value: Any, separator: str = "\n") -> str:
    """Return a value of a JSON object as text; the end of a name tells the unit, as in `peak_bytes`."""
    if isinstance(value, Mapping):  # a number whose own name has no unit has that of the whole
        named = {str(key): (str(key) if UNIT.search(str(key)) else name, part) for key, part in value.items()}
        between = ": " if separator == "\n" else " "
        lines = (key.replace("_", " ") + between + value_text(*part, ", ") for key, part in named.items())
        return separator.join(lines) or "none"
    if isinstance(value, list | tuple):
        return separator.join(value_text(name, part, ", ") for part in value) or "none"
    if value is None or isinstance(value, bool | str):
        return {None: "-", "": "-", True: "yes", False: "NO"}.get(value, str(value))
    match UNIT.findall(name)[-1:]:
        case ["bytes" | "disk" | "memory"]:
            return size_text(value)
        case ["seconds"]:
            return f"{value / 3600:.2f} h" if value >= 3600 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
        case ["hours"]:
            return f"{value:.3g} h"
        case ["usd"]:
            return f"{value:,.2f} USD"
        case ["mfu" | "share"]:
            return f"{value:.1%}"
    return f"{value:,.0f}" if value < 1e13 and (value >= 1000 or float(value).is_integer()) else f"{value:.3g}"


def size_text(count: float) -> str:
    """Return bytes in words: 1.5 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
