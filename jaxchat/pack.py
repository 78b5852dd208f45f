"""Print the core of jaxchat as one text, for a language model or for paper: `python -m jaxchat.pack > core.txt`.

The core is what turns text into a model that answers. Exports and imports, the sandbox, reports, plans and the service
are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ("stages", "loop", "pretrain", "prepare", "sft", "rl", "evaluate")
CORE = ("launch.py", "configs/*.toml", "jaxchat/**/*.py", *(f"train/{name}.py" for name in TRAIN))
LEFT_OUT = ("jaxchat/interop/", "jaxchat/tools/sandbox", "jaxchat/pack.py")


def core_files() -> list[Path]:
    """Return the files of the core, in the order in which they are printed."""
    paths = [path for pattern in CORE for path in sorted(ROOT.glob(pattern)) if path.stat().st_size]
    return [path for path in paths if not path.relative_to(ROOT).as_posix().startswith(LEFT_OUT)]


def pack(paths: Sequence[Path]) -> str:
    """Return one text of all files, with a table of contents: line in the text, lines, path."""
    head = ["The core of jaxchat. Columns of this table: first line in this text, number of lines, file.", ""]
    line, table, body = len(head) + len(paths) + 2, list[str](), list[str]()
    for path in paths:
        name, lines = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8").rstrip("\n").splitlines()
        table.append(f"{line + 1:>6} {len(lines):>5}  {name}")
        body += [f"==== {name} ====", *lines, ""]
        line += len(lines) + 2
    return "\n".join([*head, *table, "", *body])


if __name__ == "__main__":
    print(pack(core_files()))
