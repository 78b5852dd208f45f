"""What a report card consists of, before it is Markdown or HTML: blocks of inline pieces, plain text all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bold:
    text: str


@dataclass(frozen=True)
class Mono:
    """Text as it is, such as paths and digests."""

    text: str


@dataclass(frozen=True)
class Score:
    """A number of an exam; `note` is its interval in words.

    `share` (0 to 1), its `interval` and the `chance` of guessing are what a picture of it shows; None: no picture.
    """

    text: str
    note: str = ""
    share: float | None = None
    interval: tuple[float, float] | None = None
    chance: float | None = None


Inline = str | Bold | Mono | Score
Line = Inline | Sequence[Inline]


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    line: Line
    small: bool = False  # a note below something


@dataclass(frozen=True)
class Table:
    """`numeric`: all columns behind the first `labels` ones hold numbers; with an empty head it is a list of facts."""

    head: Sequence[str]
    rows: Sequence[Sequence[Line]]
    numeric: bool = False
    labels: int = 1


@dataclass(frozen=True)
class Tiles:
    """The figures that come first: (name, value)."""

    figures: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Pictures:
    """(title, path inside the run directory)."""

    files: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Listing:
    lines: Sequence[str]


@dataclass(frozen=True)
class Turn:
    """A prompt and what was made of it, by temperature."""

    prompt: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Samples:
    """What one stage writes: `source` is the Markdown of `samples.md`, `turns` what it says."""

    title: str
    source: Sequence[str]
    turns: Sequence[Turn]
    folded: bool = False


@dataclass(frozen=True)
class Fold:
    """Blocks that a reader opens."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


Block = Heading | Paragraph | Table | Tiles | Pictures | Listing | Samples | Fold


def inlines(line: Line) -> Sequence[Inline]:
    """A line as a sequence of pieces."""
    return (line,) if isinstance(line, str | Bold | Mono | Score) else line


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in plain text, the first row its head; columns but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
