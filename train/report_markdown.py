"""Blocks of a report card as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable

from train.report_blocks import (
    Block,
    Bold,
    Fold,
    Heading,
    Inline,
    Line,
    Listing,
    Mono,
    Paragraph,
    Pictures,
    Samples,
    Score,
    Table,
    Tiles,
    inlines,
)


def markdown(title: str, blocks: Iterable[Block]) -> str:
    """The whole card. No text of the run is taken for markup."""
    lines = [f"# {_plain(title)}", "", *_blocks(blocks)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _blocks(blocks: Iterable[Block]) -> list[str]:
    return [line for block in blocks for line in [*_block(block), ""]]


def _block(block: Block) -> list[str]:
    match block:
        case Heading(text, level):
            return [f"{'#' * level} {_plain(text)}"]
        case Paragraph(line):
            return [_line(line)]
        case Table(head, rows):
            return _table([_plain(cell) for cell in head], [[_line(cell) for cell in row] for row in rows])
        case Tiles(figures):
            names, values = zip(*figures, strict=True)
            return _table([_plain(name) for name in names], [[f"**{_plain(value)}**" for value in values]])
        case Pictures(files):
            return [line for title, path in files for line in (f"![{_plain(title)}]({path})", "")][:-1]
        case Listing(lines):
            fence = "`" * (1 + max((len(run) for line in lines for run in re.findall("`+", line)), default=2))
            return [f"{fence}toml", *lines, fence]
        case Samples(title, source, _, folded):
            return _fold(title, list(source)) if folded else [f"### {_plain(title)}", "", *source]
        case Fold(title, inner):
            return _fold(title, _blocks(inner)[:-1])


def _fold(title: str, lines: list[str]) -> list[str]:
    return ["<details>", f"<summary>{_plain(title)}</summary>", "", *lines, "", "</details>"]


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{' --- |' * len(head)}", *lines[1:]]


def _line(line: Line) -> str:
    return "".join(_inline(piece) for piece in inlines(line))


def _inline(piece: Inline) -> str:
    match piece:
        case Bold(text):
            return f"**{_plain(text)}**"
        case Mono(text):
            return code(text)
        case Score(text, note):
            return _plain(f"{text} ({note})" if note else text)
        case str():
            return _plain(piece)


def _plain(text: str) -> str:
    """One line in which nothing is markup."""
    return re.sub(r"([\\`*\[\]<])", r"\\\1", " ".join(text.split("\n")).replace("\r", " "))


def code(text: str) -> str:
    """Inline code around any text: more backticks than the text holds in a row."""
    text = " ".join(text.splitlines())
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(len(run) for run in re.findall("`+", text)))
    return f"{fence} {text} {fence}"
