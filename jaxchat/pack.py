"""Print the core of jaxchat as one text, for a language model or for paper: `python -m jaxchat.pack > core.txt`.

The core is what turns text into a model that answers. Exports and imports, the sandbox, reports, plans and the service
are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ("launch.py", "configs/*.toml", "jaxchat/**/*.py")
TRAIN = ("stages", "loop", "pretrain", "prepare", "sft", "rl", "evaluate")
LEFT_OUT = ("jaxchat/interop/", "jaxchat/tools/sandbox", "jaxchat/pack.py")


def core_files() -> list[Path]:
    """Return the files of the core, in the order in which they are printed."""
    patterns = (*CORE, *(f"train/{name}.py" for name in TRAIN))
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    own = [path for path in paths if not path.relative_to(ROOT).as_posix().startswith(LEFT_OUT)]
    return [path for path in own if path.stat().st_size]


def pack(paths: Sequence[Path]) -> str:
    """Return one text of all files, with a table of contents: line in the text, lines, path."""
    texts = [path.read_text(encoding="utf-8").rstrip("\n") for path in paths]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    head = ["The core of jaxchat. Columns of this table: first line in this text, number of lines, file.", ""]
    line, table, body = len(head) + len(paths) + 2, list[str](), list[str]()
    for name, text in zip(names, texts, strict=True):
        count = len(text.splitlines())
        table.append(f"{line + 1:>6} {count:>5}  {name}")
        body += [f"==== {name} ====", text, ""]
        line += count + 2
    return "\n".join([*head, *table, "", *body])


if __name__ == "__main__":
    print(pack(core_files()))
