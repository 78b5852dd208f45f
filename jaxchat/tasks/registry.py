"""Tasks by name, and the mixture strings of the configuration ("identity:500*2")."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from jaxchat.errors import UsageError
from jaxchat.tasks.base import Task
from jaxchat.tasks.choice import MMLU, Arc
from jaxchat.tasks.conversations import SmolTalk
from jaxchat.tasks.core import Core
from jaxchat.tasks.files import NO_FILES, TaskFiles
from jaxchat.tasks.generated import Arithmetic, SpellingBee, WordProblems
from jaxchat.tasks.gsm8k import GSM8K
from jaxchat.tasks.humaneval import HumanEval
from jaxchat.tasks.identity import Identity, Persona, load_persona
from jaxchat.tasks.lottery import Lottery

# name -> the task, made from where its data lies; nothing is read before its examples are asked for
TASKS: dict[str, Callable[[TaskFiles], Task]] = {
    "word_problems": lambda files: WordProblems(persona_of(files).name),
    "identity": lambda files: Identity(persona_of(files) if files.identity else None),
    "core": Core,
    "mmlu": MMLU,
    "arc_easy": lambda files: Arc("arc_easy", files),
    "arc_challenge": lambda files: Arc("arc_challenge", files),
    "smoltalk": SmolTalk,
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
    "spelling_bee": lambda files: SpellingBee(),
    "arithmetic": lambda files: Arithmetic(),
    "lottery": lambda files: Lottery(),
}


def persona_of(files: TaskFiles) -> Persona:
    """Who the model is."""
    return load_persona(files.identity) if files.identity else Persona()


def get_task(name: str, files: TaskFiles = NO_FILES) -> Task:
    """The task of that name; `UsageError` lists the known ones."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, list(TASKS), n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UsageError(f"task {name!r} is unknown{hint}; tasks: {', '.join(TASKS)}")
    return TASKS[name](files)


def parse_mixture_entry(entry: str) -> tuple[str, int | None, int]:
    """(name, count, epochs) of "NAME", "NAME:COUNT", "NAME*EPOCHS" or "NAME:COUNT*EPOCHS".

    No count means all of a data set. NAME may be files:GLOB. `UsageError` for anything else.
    """
    match = re.fullmatch(r"\s*(files:.+?|[^:*]+?)\s*(?::\s*(\d+)\s*)?(?:\*\s*(\d+)\s*)?", entry)
    if match is None or 0 in (int(match[2] or 1), int(match[3] or 1)):
        raise UsageError(
            f"sft.mixture: {entry!r}: write NAME, NAME:COUNT, NAME*EPOCHS or NAME:COUNT*EPOCHS, "
            "with whole numbers of at least 1"
        )
    return match[1], int(match[2]) if match[2] else None, int(match[3] or 1)
