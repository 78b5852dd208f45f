"""Tasks by name, and the mixture strings of the configuration ("identity:500")."""

from __future__ import annotations

import difflib

from jaxchat.errors import UsageError
from jaxchat.tasks.base import Task
from jaxchat.tasks.identity import Identity
from jaxchat.tasks.word_problems import WordProblems

TASKS: dict[str, Task] = {task.name: task for task in (WordProblems(), Identity())}


def get_task(name: str) -> Task:
    """The task of that name; `UsageError` lists the known ones."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, list(TASKS), n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UsageError(f"task {name!r} is unknown{hint}; tasks: {', '.join(TASKS)}")
    return TASKS[name]


def parse_mixture_entry(entry: str) -> tuple[str, int | None]:
    """("identity", 500) of "identity:500"; no count means all of a data set. `UsageError` for a bad count."""
    name, colon, count = entry.partition(":")
    if not colon:
        return name.strip(), None
    if not count.strip().isdecimal() or int(count) < 1:
        raise UsageError(f"sft.mixture: {entry!r}: write NAME or NAME:COUNT with a whole count of at least 1")
    return name.strip(), int(count)
