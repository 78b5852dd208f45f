"""Exams and RL environments from a file: questions and answers, a `grade` of your own in Python, or preferences.

    files:sums.jsonl             rows with a question and its accepted answers
    files:sums.jsonl#grade.py    the answers are graded by `grade(question, answer)` of a Python file, in the sandbox

See `docs/finetune.md` for the fields. What RL trains on is no exam: a fifth of its questions is held out, by a hash of
their text, and an exam asks no question that RL trains on.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from jaxchat.chat import Message, normalize
from jaxchat.data.shards import cores
from jaxchat.data.sources import document_hash, find_files, limit_of_hashes, read_records, spoken, suffix_of
from jaxchat.errors import DataError, UsageError
from jaxchat.log import say
from jaxchat.run_dir import sha256_file
from jaxchat.tasks.base import OWN, Example, ProgramTask, TaskFiles
from jaxchat.tasks.conversations import LISTS, conversation_of
from jaxchat.tools.sandbox import SandboxError

T = TypeVar("T")
HELD_OUT = 0.2  # of the questions that RL trains on
ANSWER = (
    "answers", "answer", "expected", "target", "ground_truth", "reference", "solution", "output", "response",
    "completion", "answerkey", "label", "gold", "ideal", "reward_model", "답변", "정답",
)  # fmt: skip
SIDES = ("chosen", "rejected")
MATCHES = ("exact", "numeric", "regex")
PROGRAM = "grade"
SCORED = "scored"
TRIED = 8  # questions that `grade` is tried on before any work
MARK = "####"  # before the result of a worked solution, as in GSM8K
# with groups of three digits, a fraction, an exponent of at most two digits; the minus of 5-3 is none of 3
NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d\d?(?!\d))?(?:\s?/\s?\d+)?"
)
QUOTES = " \t\n\"'`*_“”‘’「」『』.,!?;:。、…"  # around an answer; none of them is part of it
Pair = tuple[list[Message], list[Message]]  # the conversation with its chosen and with its rejected answer
REGEX_GRADE = "import re\ndef grade(question, answer, expected): return any(re.search(p, answer) for p in expected)\n"


def split_source(source: str) -> tuple[str, str]:
    """Return (files:GLOB, Python file or "") of a source."""
    match = re.fullmatch(r"(files:.+)#(.+\.py)", source)
    return (match[1], match[2]) if match else (source, "")


def name_of(source: str) -> str:
    """Return the name of the task of a file: the file's without its suffixes, with `_` for what is no letter."""
    parts = split_source(source)[0].removeprefix(OWN).replace("\\", "/").split("/")
    stems = (re.sub(r"(?i)(\.(jsonl|ndjson|json|parquet|gz|zst))+$", "", part) for part in reversed(parts))
    names = (re.sub(r"\W+", "_", stem).strip("_") for stem in stems)
    return next(filter(None, names), "files")


def paths_of(source: str) -> list[Path]:
    """Return the files of questions and, last, the Python file, if there is one; `DataError` if one is missing."""
    files, program = split_source(source)
    paths = find_files(files)
    if text := next((path for path in paths if suffix_of(path) in (".txt", ".md")), None):
        raise DataError(f"{source}: {text} is text; questions are read from jsonl, json and parquet files")
    if program:
        own = Path(program).expanduser()
        places = [own, paths[0].parent / own]
        if not (found := [place for place in places if place.is_file()]):
            raise DataError(f"{source}: no file {program}, neither here nor beside {paths[0]}")
        paths.append(found[0])
    return paths


def digest_of(sources: Iterable[str]) -> str:
    """Return a digest of the contents of all `files:` among the sources; "" without one."""
    digests = []
    for source in (source for source in sources if source.startswith(OWN)):
        try:
            digests += [sha256_file(path) for path in paths_of(source)]
        except DataError:  # said where it is needed
            digests.append("missing")
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""


# Rows


def first_field(row: dict[str, Any], names: Sequence[str], otherwise: Any = None) -> Any:
    """Return the first of these fields that is there, or `otherwise`; `ValueError` without any."""
    value = next((row[name] for name in names if row.get(name) is not None), otherwise or None)
    if value is None:
        raise ValueError(f"no {names[0]}")
    return value


def prompt_of(row: dict[str, Any]) -> tuple[list[Message], str]:
    """Return the messages before the answer, in any form of SFT's files, and the answer where they end with it."""
    fields = {name: value for name, value in row.items() if name not in ANSWER} | {"answer": "-"}
    if listed := next((name for name in LISTS if isinstance(row.get(name), list)), ""):
        fields["prompt"] = fields.pop(listed)
    *prompt, last = normalize(conversation_of(fields)[1])  # the last turn: the messages' answer, if any, and ours
    return prompt, "".join(part["text"] for part in last["content"][:-1] if part["type"] == "text")


def accepted(value: Any) -> list[str]:
    """Return the accepted answers as texts; `ValueError` if one is empty or neither text nor number."""
    if isinstance(value, dict):  # SQuAD's, verl's
        value = first_field(value, ("text", "ground_truth", "value", "answer"))
    texts = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(item, str | int | float) or (isinstance(item, float) and not math.isfinite(item)):
            raise ValueError(f"the answer {str(item)[:40]!r} is neither text nor number")
        text = str(item).lower() if isinstance(item, bool) else str(item)
        texts.append(text.rpartition(MARK)[2].strip())
    if not all(texts) or not texts:
        raise ValueError("the answer is empty")
    return list(dict.fromkeys(texts))


def plain(text: str) -> str:
    """Return a text without currency, in compatible characters: ½ as 1/2, full-width digits as digits."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2044", "/")
    return re.sub("[$€£₩¥]", "", text)


def number_of(text: str) -> Fraction | None:
    """Return the last number of a text, of at most 40 characters; None without one."""
    number = re.sub(r"[,\s]", "", (NUMBER.findall(plain(text)) or [""])[-1])
    top, _, bottom = number.partition("/")
    if not 0 < len(number) <= 40 or (bottom and not int(bottom)):
        return None
    return Fraction(top) / int(bottom or 1)


def is_number(text: str) -> bool:
    """Return whether the text is a number and nothing else, but for a percent sign."""
    return bool(NUMBER.fullmatch(plain(text).removesuffix("%").strip())) and number_of(text) is not None


def normalized(text: str) -> str:
    """Return a text as `exact` compares it: without case, spaces around, quotes and a final stop."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(QUOTES) or text


def same_number(answer: str, expected: str) -> bool:
    """Return whether the last number of an answer is the expected one, up to 1e-6 of it."""
    a, b = number_of(answer), number_of(expected)
    return a is not None and b is not None and abs(a - b) <= abs(b) / 1_000_000


def match_of(row: dict[str, Any], answers: list[str]) -> str:
    """Return how a row's answers are compared; `ValueError` if that cannot work."""
    match = row.get("match") or ("numeric" if all(map(is_number, answers)) else "exact")
    if match not in MATCHES:
        raise ValueError(f"match {str(match)[:40]!r} is unknown; take {', '.join(MATCHES)}")
    if match == "numeric" and any(number_of(text) is None for text in answers):
        raise ValueError("match is numeric, and the answer has no number")
    for text in answers if match == "regex" else ():
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {text[:40]!r} ({error})") from None
    return str(match)


@dataclass(frozen=True)
class Questions:
    """What a source holds. `expected` of an example is {how it is compared: accepted answers}."""

    examples: tuple[Example, ...]  # no two with the same prompt
    program: str  # text of the Python file; "": none
    arguments: int  # of its function `grade`: 2, or 3 with the accepted answers

    @functools.cached_property
    def training(self) -> frozenset[str]:
        return not_held_out(spoken(example.prompt) for example in self.examples)


def not_held_out(prompts: Iterable[str]) -> frozenset[str]:
    """Return the prompts that RL trains on: all but a fifth, by their hashes. `DataError` with fewer than two."""
    hashes = {prompt: document_hash(prompt) for prompt in prompts}
    try:
        limit = limit_of_hashes(hashes.values(), HELD_OUT)
    except ValueError:
        raise DataError("rl.environment: needs at least 2 questions, one to train on and one held out") from None
    return frozenset(prompt for prompt, value in hashes.items() if value >= limit)


def parsed(parse: Callable[[Any], T], source: str, paths: Iterable[Path], files: TaskFiles) -> list[T]:
    """Return all records that `parse` can use; `DataError` if more are left out than `files.max_left_out`."""
    items, left_out, first = list[T](), 0, ""
    for where, record in itertools.chain.from_iterable(read_records(path, files.encoding) for path in paths):
        try:
            items.append(parse(record))
        except (ValueError, UsageError, TypeError, LookupError, AttributeError) as error:
            left_out, first = left_out + 1, first or f"{where}: {error}"
    if left_out:
        text = f"{source}: {left_out:,} of {left_out + len(items):,} rows cannot be used, the first {first}"
        if left_out > files.max_left_out * (left_out + len(items)):
            raise DataError(f"{text}; sft.max_left_out allows {files.max_left_out:.0%}")
        say(f"  {text}", style="yellow")
    return items


def until_changed(read: Callable[[str, TaskFiles], T]) -> Callable[[str, TaskFiles], T]:
    """Cache what `read` returns of a source until one of its files has another size or time."""
    cached = functools.lru_cache(8)(lambda source, files, state: read(source, files))

    def current(source: str, files: TaskFiles) -> T:
        stats = ((path, path.stat()) for path in paths_of(source))
        return cached(source, files, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))

    return current


@until_changed
def read_questions(source: str, files: TaskFiles) -> Questions:
    """Return the questions of a source; `DataError` if too many rows cannot be used, with the first."""
    paths, program, arguments = paths_of(source), "", 0
    if split_source(source)[1]:
        program = paths.pop().read_text(encoding="utf-8", errors="replace")
        arguments = arguments_of(program, source)
    read = parsed(lambda row: example_of(row, arguments), source, paths, files)
    examples = {spoken(example.prompt): example for example in reversed(read)}  # the first of the same questions
    if not examples:
        raise DataError(f"{source}: no questions in it")
    kinds = Counter(kind for example in examples.values() for kind in example.expected)
    summary = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    repeated = f", {len(read) - len(examples):,} repeated" if len(read) > len(examples) else ""
    say(f"  {source}: {len(examples):,} questions ({summary}){repeated}")
    return Questions(tuple(examples.values())[::-1], program, arguments)


def arguments_of(program: str, source: str) -> int:
    """Return 3 if `grade` of a program takes the accepted answers too, else 2; `UsageError` without the function."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{source}: not valid Python ({error})") from None
    grades = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "grade"]
    if not grades:
        raise UsageError(f"{source}: defines no function grade(question, answer)")
    return 3 if len(grades[-1].args.args) > 2 else 2


def example_of(record: Any, arguments: int) -> Example:
    """Return the question of a row for a program with so many arguments (0: none).

    `ValueError` and the like say why the row cannot be used.
    """
    if not isinstance(record, dict):
        raise ValueError("not an object with fields")
    row = {str(name).lower(): value for name, value in record.items()}
    if row.get("choices") or row.get("options") or all(isinstance(row.get(letter), str) for letter in "ab"):
        raise ValueError("choices; write them into the question, and as its answer the letter")
    prompt, written = prompt_of(row)
    if arguments == 2:
        return Example(prompt, {PROGRAM: []})
    answers = accepted(first_field(row, ANSWER, written))
    return Example(prompt, {PROGRAM if arguments else match_of(row, answers): answers})


# Preferences


def is_preferences(source: str) -> bool:
    """Return whether the first record of a `files:` source is a pair of answers."""
    if not source.startswith(OWN) or split_source(source)[1]:
        return False
    _, record = next((item for path in find_files(source) for item in read_records(path)), ("", None))
    return isinstance(record, dict) and record.keys() >= set(SIDES)


def pair_of(record: Any) -> Pair:
    """Return the two conversations of a record; `UsageError` says why it cannot be used.

    The answers are texts, messages, or (as in UltraFeedback) whole conversations, then also without a prompt.
    """
    if not isinstance(record, dict) or not record.keys() >= set(SIDES):
        raise UsageError(f"no {' and '.join(SIDES)}")
    fields = {key: value for key, value in record.items() if key not in (*SIDES, *ANSWER, *LISTS) and value}
    sides = []
    for name in SIDES:
        answer = record[name]
        if isinstance(answer, list) and len(answer) == 1:  # the answer's message alone
            answer = answer[0].get("content", answer[0].get("value")) if isinstance(answer[0], dict) else answer[0]
        alone = isinstance(answer, str) and bool(fields)
        whole = {"messages" if isinstance(answer, list) else "text": answer}
        sides.append(normalize(conversation_of(fields | {"answer": answer} if alone else whole)[1]))
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1] or any(turns[-1]["role"] != "assistant" for turns in sides):
        raise UsageError("the two answers do not follow the same messages")
    if chosen == rejected:
        raise UsageError("the two answers are the same")
    return chosen, rejected


@until_changed
def read_pairs(source: str, files: TaskFiles) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to train on and those held out; `DataError` if too many rows cannot be used."""
    pairs = parsed(pair_of, source, paths_of(source), files)
    training = not_held_out(spoken(chosen[:-1]) for chosen, _ in pairs)
    train = [pair for pair in pairs if spoken(pair[0][:-1]) in training]
    held_out = [pair for pair in pairs if spoken(pair[0][:-1]) not in training]
    say(f"  {source}: {len(train):,} preferences to train on, {len(held_out):,} held out")
    return train, held_out


# Tasks


class FileExam(ProgramTask):
    """An exam or RL environment of written answers, compared with the accepted ones or graded by a program."""

    max_tokens = 512  # as GSM8K's

    def __init__(self, source: str, name: str, files: TaskFiles):
        super().__init__(files)
        self.source, self.name, self.title = source, name, name.replace("_", " ")
        self.questions = read_questions(source, files)
        self._kinds = {kind for example in self.questions.examples for kind in example.expected}

    @functools.cached_property
    def _examples(self) -> list[Example]:
        environment, trained = self.files.environment, frozenset[str]()
        if is_preferences(environment):
            trained = frozenset(spoken(chosen[:-1]) for chosen, _ in read_pairs(environment, self.files)[0])
        elif environment:
            trained = read_questions(environment, self.files).training
        asked = [example for example in self.questions.examples if spoken(example.prompt) not in trained]
        if not asked:
            raise DataError(f"{self.source}: all of its questions are trained on by rl.environment")
        return asked

    def examples(self) -> Sequence[Example]:
        """Return the questions, but those that `rl.environment` trains on."""
        return self._examples

    def train_examples(self, seed: int) -> Sequence[Example]:
        """Return the questions that are not held out, in the order of the file; RL shuffles them."""
        training = self.questions.training
        return [example for example in self.questions.examples if spoken(example.prompt) in training]

    def check(self) -> None:
        """Read every row, and try the program on a few questions with their own answers."""
        asked, count = len(self.examples()), len(self.questions.examples)
        if asked < count:
            say(f"  {self.source}: RL trains on {count - asked:,} of them, the exam asks the other {asked:,}")
        if not self.questions.program:
            return
        tried = self.questions.examples[:TRIED]
        answers = [next(iter(accepted), "") for example in tried for accepted in example.expected.values()]
        outcomes = [outcome for outcome, _ in self._call(tried, answers)]
        if bad := next((outcome for outcome in outcomes if outcome != SCORED), None):
            share = f"{len(outcomes) - outcomes.count(SCORED)} of {len(outcomes)}"
            text = f"{self.source}: grade gave no score from 0 to 1 for {share} first questions ({bad})"
            if SCORED not in outcomes:
                raise DataError(f"{text}; it runs alone, with the standard library only (docs/finetune.md)")
            say(f"  {text}; such answers count as wrong", style="yellow")

    def setting(self) -> Sequence[str]:
        """Return the length of an answer, and the program with the sandbox that runs it."""
        program = (self.questions.program, str(self.sandbox)) if self.questions.program else ()
        return (f"{self.max_tokens} tokens", *program)

    def facts(self) -> dict[str, Any]:
        """Return what `ProgramTask` records, of programs and regular expressions; nothing without any."""
        return {} if self._kinds <= COMPARED.keys() else super().facts()

    def grade_all(self, examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        """Return 1 for an accepted answer and 0 for another, or a program's score, 0 where it gives none."""
        scores = [0.0] * len(examples)
        called = []
        for i, (example, answer) in enumerate(zip(examples, answers, strict=True)):
            ((kind, accepted),) = example.expected.items()
            if kind in COMPARED:
                scores[i] = float(any(COMPARED[kind](answer, text) for text in accepted))
            else:
                called.append(i)
        results = self._call([examples[i] for i in called], [answers[i] for i in called])
        for i, (outcome, score) in zip(called, results, strict=True):
            scores[i] = score
            self.outcomes[outcome] += 1
        return scores

    def _call(self, examples: Sequence[Example], answers: Sequence[str]) -> list[tuple[str, float]]:
        """Return (outcome, score) of the program, or of regular expressions, on as many cores as there are."""
        program, arguments = self.questions.program or REGEX_GRADE, self.questions.arguments or 3
        calls = []
        for example, answer in zip(examples, answers, strict=True):
            (accepted,) = example.expected.values()
            calls.append([example.prompt[-1]["content"], answer, accepted][:arguments])
        size = -(-len(calls) // cores()) or 1
        chunks = [calls[i : i + size] for i in range(0, len(calls), size)]
        try:
            with ThreadPoolExecutor(cores()) as pool:
                parts = list(pool.map(lambda chunk: self.sandbox.call(program, "grade", chunk), chunks))
        except SandboxError as error:
            raise DataError(f"{self.source}: {error}") from None
        results = []
        for outcome, value in itertools.chain.from_iterable(parts):
            if outcome == "returned":
                outcome = SCORED if 0 <= value <= 1 else "returned a number that is not from 0 to 1"
            results.append((outcome, float(value) if outcome == SCORED else 0.0))
        return results

    def readings(self, example: Example, answer: str) -> dict[str, bool]:
        """Return whether an accepted answer stands anywhere in the answer ("lenient"), where all are `exact`."""
        if self._kinds != {"exact"}:
            return {}
        return {"lenient": any(normalized(text) in normalized(answer) for text in example.expected["exact"])}


COMPARED: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, text: normalized(answer) == normalized(text),
    "numeric": same_number,
}
