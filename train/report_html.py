"""Blocks of a report card as one HTML page: styles and pictures inside, no script, nothing is fetched."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

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
    Turn,
    inlines,
)

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # no page may hold these; a sample may
STYLE = Path(__file__).with_name("report.css")
Svgs = Mapping[str, Mapping[str, bytes]]


def page(title: str, blocks: Iterable[Block], pictures: Svgs) -> str:
    """The whole page. `pictures`: the SVG of every picture by theme, by its path in the blocks. All text is escaped."""
    body = "\n".join(_block(block, pictures) for block in blocks)
    shown = escape(title)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # holds what the text above promises
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{shown}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<h1>{shown}</h1>
{body}
</main>
</body>
</html>
"""
    return CONTROL.sub("\ufffd", text)


def _block(block: Block, pictures: Svgs) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(line, small):
            return f'<p class="note">{_line(line)}</p>' if small else f"<p>{_line(line)}</p>"
        case Table():
            return _table(block)
        case Tiles(figures):
            tiles = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures)
            return f'<dl class="tiles">{"".join(tiles)}</dl>'
        case Pictures(files):
            return "\n".join(_picture(title, pictures[path]) for title, path in files)
        case Listing(lines):
            return f"<pre>{escape(chr(10).join(lines))}</pre>"
        case Samples(title, _, turns, folded):
            inner = "\n".join(_turn(turn) for turn in turns)
            return _fold(title, inner) if folded else f"<h3>{escape(title)}</h3>\n{inner}"
        case Fold(title, blocks):
            return _fold(title, "\n".join(_block(inner, pictures) for inner in blocks))


def _fold(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{inner}\n</details>"


def _table(table: Table) -> str:
    kinds = ["" if i < table.labels or not table.numeric else ' class="number"' for i in range(len(table.head))]
    head = "".join(f'<th scope="col"{k}>{escape(cell)}</th>' for k, cell in zip(kinds, table.head, strict=True))
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td{k}>{_line(cell)}</td>" for k, cell in zip(kinds[1:], others, strict=True))
        rows.append(f'<tr><th scope="row">{_line(first)}</th>{cells}</tr>')
    top = f"<thead><tr>{head}</tr></thead>\n" if any(table.head) else ""
    kind = "numbers" if table.numeric else "facts"
    body = "\n".join(rows)
    return f'<div class="wide"><table class="{kind}">\n{top}<tbody>\n{body}\n</tbody>\n</table></div>'


def _picture(title: str, svg: Mapping[str, bytes]) -> str:
    light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(svg[shade]).decode()}" for shade in ("light", "dark"))
    return (
        f'<figure><picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(title)}" src="{light}"></picture></figure>'
    )


def _turn(turn: Turn) -> str:
    answers = "".join(
        f'<p class="answer"><span class="heat">{escape(heat)}</span> {_text(text)}</p>' for heat, text in turn.answers
    )
    return f'<div class="turn"><p class="prompt">{_text(turn.prompt)}</p>{answers}</div>'


def _text(text: str) -> str:
    return f'<bdi class="said">{escape(text)}</bdi>'


def _line(line: Line) -> str:
    return "".join(_inline(piece) for piece in inlines(line))


def _inline(piece: Inline) -> str:
    match piece:
        case Bold(text):
            return f"<strong>{escape(text)}</strong>"
        case Mono(text):
            return f"<code>{escape(text)}</code>"
        case Score():
            return _score(piece)
        case str():
            return escape(piece)


def _score(score: Score) -> str:
    """The number, its interval below it, and both as a bar with a mark where guessing is."""
    note = f" <small>({escape(score.note)})</small>" if score.note else ""
    text = f"<span>{escape(score.text)}</span>{note}"
    if score.share is None:
        return text
    low, high = score.interval or (score.share, score.share)
    parts = f'<i class="band" style="left:{low:.2%};width:{max(0.0, high - low):.2%}"></i>'
    parts += f'<i class="dot" style="left:{score.share:.2%}"></i>'
    if score.chance:
        parts += f'<i class="chance" style="left:{score.chance:.2%}"></i>'
    return f'{text}<span class="bar" aria-hidden="true">{parts}</span>'
