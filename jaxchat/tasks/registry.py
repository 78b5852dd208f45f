"""Tasks by name, and the mixture strings of the configuration ("identity:500")."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from jaxchat.errors import UsageError
from jaxchat.tasks.base import Task
from jaxchat.tasks.files import NO_FILES, TaskFiles
from jaxchat.tasks.identity import Identity
from jaxchat.tasks.word_problems import WordProblems

# name -> the task, made from where its data lies; nothing is read before its examples are asked for
TASKS: dict[str, Callable[[TaskFiles], Task]] = {
    "word_problems": lambda files: WordProblems(),
    "identity": lambda files: Identity(),
}


def get_task(name: str, files: TaskFiles = NO_FILES) -> Task:
    """The task of that name; `UsageError` lists the known ones."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, list(TASKS), n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UsageError(f"task {name!r} is unknown{hint}; tasks: {', '.join(TASKS)}")
    return TASKS[name](files)


def parse_mixture_entry(entry: str) -> tuple[str, int | None]:
    """("identity", 500) of "identity:500"; no count means all of a data set. `UsageError` for a bad count."""
    name, colon, count = entry.partition(":")
    if not colon:
        return name.strip(), None
    if not count.strip().isdecimal() or int(count) < 1:
        raise UsageError(f"sft.mixture: {entry!r}: write NAME or NAME:COUNT with a whole count of at least 1")
    return name.strip(), int(count)
