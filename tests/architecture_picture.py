"""The architecture as it is: a row for every layer with its modules, an arc for every import between two rows.

python tests/architecture_picture.py      draws docs/images/architecture.svg anew; a test compares
"""

import ast
import collections
import html
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
LEAVES = ("errors", "paths", "log", "tools", "xla_cache")
ORDER = (
    "toml", "config", "recipes", "mesh", "hosts", "text", "data", "model", "losses", "optim", "state", "scores",
    "checkpoint", "engine", "tasks", "interop",
)  # fmt: skip
ROWS = (*LEAVES, *ORDER, "train", "serve", "launch")
WIDTH, LEFT, TEXT, ARCS = 980, 110, 114, 740
LINE, GAP, TOP = 15, 9, 34
INK, FAINT, COLOURS = "#24292f", "#8c959f", ("#0969da", "#8250df", "#bf3989", "#bc4c00", "#1a7f37")


def row_of(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "jaxchat" and len(parts) > 1 else parts[0]


def product():
    """{module: path} of the product."""
    paths = [p for top in ("jaxchat", "train", "serve") for p in sorted((ROOT / top).rglob("*.py"))]
    found = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    return {name: path for name, path in found.items() if name != "jaxchat"} | {"launch": ROOT / "launch.py"}


def imports(path, modules):
    """Modules of the product that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ([name for name in inner if name in modules] or [node.module] if node.module in modules
                        or any(name in modules for name in inner) else [])  # fmt: skip


def graph():
    """({row: its modules' names}, {(importing row, imported row): imports})."""
    modules = product()
    rows, edges = collections.defaultdict(list), collections.Counter()
    for name, path in modules.items():
        row = row_of(name)
        rows[row].append(name.removeprefix("jaxchat.").removeprefix(f"{row}.") if name.count(".") else name)
        for other in imports(path, modules):
            if row_of(other) != row:
                edges[row, row_of(other)] += 1
    return rows, edges


def purpose(row):
    """First sentence of the docstring of a row that is one file."""
    path = next(p for p in (ROOT / f"jaxchat/{row}.py", ROOT / f"{row}.py") if p.exists())
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return textwrap.shorten(re.split(r"(?<=[a-z])[.;] ", text)[0].rstrip("."), 82, placeholder=" ...")


def draw():
    """The picture as SVG."""
    rows, edges = graph()
    assert set(rows) == set(ROWS), set(rows) ^ set(ROWS)
    y, middle, parts = TOP, {}, []
    for row in ROWS:
        names = [name for name in rows[row] if name != row]
        lines = textwrap.wrap(", ".join(names), 82) or [purpose(row)]
        height = LINE * len(lines) + GAP
        middle[row] = y + height / 2
        folder = "/" if names else ".py"
        parts.append(f'<rect x="4" y="{y}" width="{ARCS - 12}" height="{height - 3}" rx="4" class="box"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + LINE}" text-anchor="end" class="name">{row}{folder}</text>')
        parts += [
            f'<text x="{TEXT + 4}" y="{y + LINE * (i + 1)}" class="modules">{html.escape(line)}</text>'
            for i, line in enumerate(lines)
        ]
        y += height
    for (row, other), count in sorted(edges.items()):
        if other in LEAVES:  # everyone may, and nearly everyone does
            continue
        low, high = middle[row], middle[other]
        reach = 14 + abs(low - high) * 0.36
        colour = COLOURS[ROWS.index(other) % len(COLOURS)]
        parts.append(
            f'<path d="M{ARCS - 8} {low:g} C{ARCS + reach:g} {low:g} {ARCS + reach:g} {high:g} {ARCS - 8} {high:g}" '
            f'stroke="{colour}" stroke-width="{0.6 + 0.35 * min(count, 8):.2f}"><title>{row} imports {other}, {count}'
            "</title></path>"
        )
    style = (
        f"text{{font:12px ui-monospace,monospace;fill:{INK}}}.name{{font-weight:bold}}.modules,.head{{fill:#57606a}}"
        ".box{fill:#f6f8fa;stroke:#d0d7de}path{fill:none;opacity:.65}"
    )
    head = (
        "imports point up and never down; arcs: which row imports which (the first five are open to all and not drawn)"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 6}" width="{WIDTH}" height="{y + 6}">'
        f'<style>{style}</style><rect width="{WIDTH}" height="{y + 6}" fill="#ffffff"/>'
        f'<text x="6" y="20" class="head">{head}</text>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
