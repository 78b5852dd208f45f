"""All tasks by name, and the mixture strings of the configuration ("identity:500*2")."""

from __future__ import annotations

import re

from jaxchat.config import nearest
from jaxchat.errors import UsageError
from jaxchat.tasks.base import NO_FILES, OWN, Task, TaskFiles
from jaxchat.tasks.choice import MMLU, ArcChallenge, ArcEasy
from jaxchat.tasks.conversations import SmolTalk
from jaxchat.tasks.core import Core
from jaxchat.tasks.from_file import FileExam, name_of
from jaxchat.tasks.generated import Arithmetic, Lottery, MentalSums, SpellingBee, WordProblems
from jaxchat.tasks.gsm8k import GSM8K
from jaxchat.tasks.humaneval import HumanEval
from jaxchat.tasks.identity import Identity
from jaxchat.tasks.speech import FreeAnswers, NextTurn

# in the order in which exams run
TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        WordProblems, Identity, FreeAnswers, NextTurn, Core, MMLU, ArcEasy, ArcChallenge, SmolTalk, GSM8K,
        HumanEval, SpellingBee, Arithmetic, MentalSums, Lottery,
    )
}  # fmt: skip


OTHER_SCORES = ("bits_per_byte", "core_partial", "chatcore")  # names in result files beside the tasks


def get_task(name: str, files: TaskFiles = NO_FILES) -> Task:
    """Return the task of that name, or of a source files:...; `UsageError` lists the known ones."""
    source = name if name.startswith(OWN) else next((own for own in files.own if own_name(own) == name), None)
    if source:
        return FileExam(source, own_name(source), files)
    if name not in TASKS:
        raise UsageError(f"task {name!r} is unknown{nearest(name, TASKS)}; tasks: {', '.join(TASKS)}")
    return TASKS[name](files)


def own_name(source: str) -> str:
    """Return the name of the task of a `files:` source in result files; no other task or score has it."""
    name = name_of(source)
    return f"{name}_file" if name in TASKS or name in OTHER_SCORES else name


def parse_mixture_entry(entry: str) -> tuple[str, int | None, int]:
    """Return (name, count, epochs) of "NAME[:COUNT][*EPOCHS]".

    NAME may also be files:GLOB or hf:OWNER/NAME. Without a count, all of a data set is taken. `UsageError` for anything
    else.
    """
    match = re.fullmatch(r"\s*((?:files|hf):.+?|[^:*]+?)\s*(?::\s*(\d+)\s*)?(?:\*\s*(\d+)\s*)?", entry)
    if match is None or 0 in (int(match[2] or 1), int(match[3] or 1)):
        raise UsageError(f"sft.mixture: {entry!r}: write NAME, NAME:COUNT, NAME*EPOCHS or NAME:COUNT*EPOCHS")
    return match[1], int(match[2]) if match[2] else None, int(match[3] or 1)
