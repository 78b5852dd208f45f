"""What a command leaves a person with: what the model can do, where everything is, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from jaxchat.log import say
from jaxchat.paths import RunDir


def summarize(run: RunDir, left: Sequence[str]) -> None:
    """Say it. `left`: the stages that this configuration has and that are not done."""
    command = f"python launch.py --run-dir {shlex.quote(str(run.root))}"
    rows = []
    if run.report.exists() and "report" not in left:
        say(f"\n{headline(run.report.read_text(encoding='utf-8'))}\n")
        rows.append(("report card", f"{run.report}, as one page {run.root / 'report.html'}"))
    exports = sorted(str(path) for path in run.export.glob("[!.]*/"))
    if exports and "export" not in left:
        rows.append(("for others", ", ".join(exports)))
    if run.records().get("pretrain", {}).get("status") == "done":
        rows += [("talk to it", f"{command} --chat"), ("on a page", f"{command} --serve")]
    if left:
        rows.append(("go on", f"{command}   (next: {left[0]})"))
    for name, text in rows:
        say(f"{name:<12} {text}")


def headline(card: str) -> str:
    """The first paragraph of a report card, without its marks for bold."""
    return next(part for part in card.split("\n\n")[1:] if part.strip()).replace("**", "")
