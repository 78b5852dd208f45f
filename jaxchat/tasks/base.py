"""The interface of exams, SFT data sets and RL environments, and where their data files come from.

Messages have the form of `chat.py`: {"role", "content"}, where an assistant's content is a string or a list of
{"type": "text" | "python" | "python_output", "text"}. A task is one small file and one line in `tasks/__init__.py`;
see `docs/exams.md`.
"""

from __future__ import annotations

import functools
import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from jaxchat.config import CONFIG_DIR, Config
from jaxchat.data.hub import Archive, Hub, HubFiles, download_archive
from jaxchat.data.sources import read_records
from jaxchat.errors import DataError, UsageError
from jaxchat.log import say
from jaxchat.run_dir import sha256_file
from jaxchat.tools.sandbox import STRICT, Sandbox, SandboxError

T = TypeVar("T")
RIGHT = 0.5  # the least score of a right answer
OWN = "files:"  # before the name of a file of one's own
DEFAULT_COUNT = 1000  # conversations of a generator, where the mixture names no count
Message = dict[str, Any]
Conversation = list[Message]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(*parts: tuple[str, str] | str) -> Message:
    """Return an assistant message; a string is text, a pair is (type, text)."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0], "text": p[1]} for p in parts]
    return {"role": "assistant", "content": content}


@dataclass(frozen=True)
class Example:
    """A question with a written answer. `prompt` ends with a user message; `expected` is what `grade` needs."""

    prompt: Conversation
    expected: Any
    tags: dict[str, str] = field(default_factory=dict)  # for breakdowns, such as the kind of a problem


@dataclass(frozen=True)
class ChoiceExample:
    """A multiple-choice question: the answer is one of `letters`, and `right` is the index of the right one."""

    prompt: Conversation
    letters: tuple[str, ...]
    right: int
    tags: dict[str, str] = field(default_factory=dict)


class MissingData(DataError):
    """The files of one exam are not at hand; the message says where to get them and where to put them."""


@dataclass(frozen=True)
class TaskFiles:
    """Where tasks find their files: a local mirror (`data_dir`), else the download cache.

    `download`: whether missing files may be downloaded. `sandbox`: `tasks.sandbox`. `identity`: `sft.identity`.
    `own`: the `files:` among `eval.exams` and `rl.environment`; `environment`: the latter, if it is one of them.
    """

    data_dir: str = ""
    download: bool = False
    cache: Path = field(default_factory=lambda: Path("~/.cache/jaxchat/tasks").expanduser())
    sandbox: str = "auto"
    identity: str = ""
    own: tuple[str, ...] = ()
    environment: str = ""
    encoding: str = "auto"
    max_left_out: float = 0.05

    @classmethod
    def of(cls, config: Config, download: bool) -> TaskFiles:
        """Take the settings from `config`. A relative `sft.identity` may also lie beside the tiers."""
        identity = config.sft.identity
        if identity and not Path(identity).expanduser().exists() and (CONFIG_DIR.parent / identity).exists():
            identity = str(CONFIG_DIR.parent / identity)
        cache = Path(config.data.cache_dir).expanduser() / "tasks"
        own = tuple(s for s in (*config.eval.exams, config.rl.environment) if s.startswith(OWN))
        environment = config.rl.environment if config.rl.environment in own else ""
        settings = config.tasks.data_dir, download, cache, config.tasks.sandbox, identity
        return cls(*settings, own, environment, config.data.encoding, config.sft.max_left_out)

    def find(self, patterns: Sequence[str], source: HubFiles | Archive | None = None) -> list[Path]:
        """Return the files of the first pattern that matches in the mirror, sorted; else download `source`.

        Patterns are globs; they also choose among the files of an archive. Raises `MissingData`.
        """
        root = Path(self.data_dir).expanduser()
        if self.data_dir and not root.is_dir():
            raise MissingData(f"tasks.data_dir: {root} is no directory")
        if paths := _first_match(root, patterns) if self.data_dir else []:
            return paths
        place = f"into {self.data_dir}" if self.data_dir else "into a folder and set tasks.data_dir to it"
        advice = f"no file {patterns[0]} found; {f'{source} and ' if source else ''}put it {place}"
        if source is None or not self.download:
            raise MissingData(advice)
        try:
            if isinstance(source, HubFiles):
                return Hub(source.repo, source.revision, self.cache).get(source.files)
            paths = _first_match(download_archive(source, self.cache), patterns)
        except (OSError, DataError) as error:
            raise MissingData(f"{advice} (the download failed: {error})") from None
        if not paths:
            raise MissingData(f"{source.url} holds none of {', '.join(patterns)}")
        return paths


NO_FILES = TaskFiles()


def _first_match(root: Path, patterns: Sequence[str]) -> list[Path]:
    matches = (sorted(path for path in root.glob(pattern) if path.is_file()) for pattern in patterns)
    return next((paths for paths in matches if paths), [])


def listing(data_dir: str) -> str:
    """Return a digest of names, sizes and times of a mirror's files, to see changes; "" without a mirror."""
    root = Path(data_dir).expanduser()
    if not data_dir or not root.is_dir():
        return ""
    found = sorted((str(path.relative_to(root)), path.stat()) for path in root.rglob("*") if path.is_file())
    lines = "".join(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in found)
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()


def identity_digest(config: Config) -> str:
    """Return the SHA-256 of the file of `sft.identity`; "" without one."""
    path = TaskFiles.of(config, download=False).identity
    return sha256_file(path) if path and Path(path).is_file() else ""


def parse_rows(
    path: Path,
    parse: Callable[[dict[str, Any]], T],
    read: Callable[[Path], Iterator[tuple[str, dict[str, Any]]]] = read_records,
) -> list[T]:
    """Parse every row of a jsonl or parquet file; `DataError` names the first row that does not fit."""
    items = []
    for where, row in read(path):
        try:
            items.append(parse(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"{where}: not in the expected form ({error!r})") from None
    if not items:
        raise DataError(f"{path}: no rows")
    return items


def sample(items: Sequence[T], count: int | None, seed: int) -> Sequence[T]:
    """Return all items in order, or `count` of them at random."""
    return items if count is None or count >= len(items) else random.Random(seed).sample(items, count)


class Task(ABC):
    """An exam, an SFT data set, or both."""

    name: str  # in configurations and result files
    title: str = ""  # in the report card and on the page; "": the name
    chance: float = 0.0  # accuracy of guessing
    auto: ClassVar[bool] = False  # whether `eval.exams` "auto" includes it, if its data is at hand
    chat_core: ClassVar[bool] = False  # whether it counts in ChatCORE

    def __init__(self, files: TaskFiles = NO_FILES):
        self.files = files

    def examples(self) -> Sequence[Any]:
        """Return the exam's questions, always in the same order; none if the task is no exam."""
        return ()

    def train_conversations(self, count: int | None, seed: int) -> Iterable[Conversation]:
        """Return `count` SFT conversations (None: all, or 1,000 of a generator), the same for the same seed.

        No exam question is among them.
        """
        return []

    def fetch(self) -> Sequence[Path]:
        """Return the files of `train_conversations`, downloaded if necessary. Raises `MissingData`."""
        return ()

    def check(self) -> None:  # noqa: B027 - most exams can always run
        """Raise `UsageError`, before any work, for settings that the exam cannot run with."""

    def setting(self) -> Sequence[str]:
        """Return what a score depends on besides model, questions and `eval.*`."""
        return ()


class ChoiceTask(Task):
    """An exam of `ChoiceExample`s: the answer is the letter with the largest logit where the answer begins."""


class WrittenTask(Task):
    """An exam of `Example`s: answers are sampled at temperature 0 with the calculator, then graded."""

    max_tokens: int  # of an answer

    def train_examples(self, seed: int) -> Sequence[Example]:
        """Return RL questions, none of them from the exam; empty if the task is no RL environment."""
        return []

    @abstractmethod
    def grade(self, example: Example, answer: str) -> bool:
        """Return whether the answer (its text, without tool calls and their output) is right."""

    def grade_all(self, examples: Sequence[Example], answers: Sequence[str]) -> Sequence[float]:
        """Return a score from 0 to 1 for each answer, right from `RIGHT` on; in parallel where grading is slow."""
        return [self.grade(example, answer) for example, answer in zip(examples, answers, strict=True)]

    def readings(self, example: Example, answer: str) -> dict[str, bool]:
        """Return other ways to grade the answer, shown beside the score ("lenient")."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Return what to record beside the score, such as the sandbox's level."""
        return {}


class ProgramTask(WrittenTask):
    """An exam that runs code in a sandbox; a subclass grades in `grade_all`."""

    def __init__(self, files: TaskFiles = NO_FILES):
        super().__init__(files)
        self.outcomes = Counter[str]()

    @functools.cached_property
    def sandbox(self) -> Sandbox:
        """The strongest sandbox here; `UsageError` if `tasks.sandbox` "strict" asks for more."""
        try:
            box = Sandbox(mode=self.files.sandbox)
        except SandboxError as error:
            raise UsageError(f"tasks.{error}") from None
        if box.level < STRICT:
            say(f"  {self.name} runs code with little around it: {box} (docs/reliability.md)", style="yellow")
        return box

    def facts(self) -> dict[str, Any]:
        """Return the sandbox in words and as a level, and the numbers of outcomes."""
        outcomes = dict(sorted(self.outcomes.items()))
        return {"sandbox": str(self.sandbox), "sandbox_level": self.sandbox.level, "outcomes": outcomes}

    def grade(self, example: Example, answer: str) -> bool:
        return self.grade_all([example], [answer])[0] >= RIGHT


class GeneratedTask(WrittenTask):
    """An exam whose questions a program draws. Questions drawn with `held_out` are never trained on."""

    exam_size, exam_seed = 256, 0
    train_size = 8192  # RL questions

    @abstractmethod
    def conversation(self, rng: random.Random) -> Conversation:
        """Draw one SFT conversation."""

    def example(self, rng: random.Random, held_out: bool) -> Example:
        """Draw one question."""
        raise NotImplementedError

    def examples(self) -> Sequence[Example]:
        rng = random.Random(self.exam_seed)
        return [self.example(rng, held_out=True) for _ in range(self.exam_size)]

    def train_conversations(self, count: int | None, seed: int) -> list[Conversation]:
        rng = random.Random(f"{self.name} {seed}")
        return [self.conversation(rng) for _ in range(count or DEFAULT_COUNT)]

    def train_examples(self, seed: int) -> Sequence[Example]:
        rng = random.Random(f"{self.name} rl {seed}")
        return [self.example(rng, held_out=False) for _ in range(self.train_size)]


class FileTask(Task):
    """A task whose rows lie in files: those of split "test" are the exam, those of "train" are for SFT and RL."""

    @abstractmethod
    def paths(self, split: str) -> list[Path]:
        """Return the files of a split, downloaded if necessary. Raises `MissingData`."""

    @abstractmethod
    def example(self, row: dict[str, Any]) -> Any:
        """Return the question of a row."""

    @abstractmethod
    def conversation(self, row: dict[str, Any]) -> Conversation:
        """Return the question of a row and its answer, as SFT shows them."""

    def parsed(self, split: str, parse: Callable[[dict[str, Any]], T]) -> list[T]:
        """Return every row of a split parsed; `DataError` names one that does not fit."""
        return [item for path in self.paths(split) for item in parse_rows(path, parse)]

    @functools.cached_property
    def _examples(self) -> list[Any]:
        return self.parsed("test", self.example)

    def examples(self) -> Sequence[Any]:
        return self._examples

    def train_conversations(self, count: int | None, seed: int) -> Sequence[Conversation]:
        return sample(self.parsed("train", self.conversation), count, seed)

    def fetch(self) -> Sequence[Path]:
        return self.paths("train")
