"""The report card: `report.md` and `report.html` for people, `report.json` with every number, and the curves."""

from __future__ import annotations

import ast
import base64
import functools
import hashlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxchat.config import Config, flatten
from jaxchat.log import read_metrics, say
from jaxchat.run_dir import RunDir, atomic_write, read_json, write_json
from jaxchat.tasks.core import CORE_TASKS

from .contamination import LONG_PASSAGE, exam_overlap
from .loop import with_error
from .plots import loss_plot
from .prepare import other_tokenizers
from .statistics import Z95
from .targets import run_cost, wall_clock

# What a report card consists of, before it is Markdown or HTML: blocks of inline pieces, plain text all of it.


@dataclass(frozen=True)
class Bold:
    text: str


@dataclass(frozen=True)
class Mono:
    """Text as it is, such as paths and digests."""

    text: str


@dataclass(frozen=True)
class Score:
    """A number of an exam; `note` is its interval in words.

    `share` (0 to 1), its `interval` and the `chance` of guessing are what a picture of it shows; None: no picture.
    """

    text: str
    note: str = ""
    share: float | None = None
    interval: tuple[float, float] | None = None
    chance: float | None = None


Inline = str | Bold | Mono | Score
Line = Inline | Sequence[Inline]


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    line: Line
    small: bool = False  # a note below something


@dataclass(frozen=True)
class Table:
    """`numeric`: all columns behind the first `labels` ones hold numbers; with an empty head it is a list of facts."""

    head: Sequence[str]
    rows: Sequence[Sequence[Line]]
    numeric: bool = False
    labels: int = 1


@dataclass(frozen=True)
class Tiles:
    """The figures that come first: (name, value)."""

    figures: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Pictures:
    """(title, path inside the run directory)."""

    files: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Listing:
    lines: Sequence[str]


@dataclass(frozen=True)
class Turn:
    """A prompt and what was made of it, by temperature."""

    prompt: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Samples:
    """What one stage writes: `source` is the Markdown of `samples.md`, `turns` what it says."""

    title: str
    source: Sequence[str]
    turns: Sequence[Turn]
    folded: bool = False


@dataclass(frozen=True)
class Fold:
    """Blocks that a reader opens."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


Block = Heading | Paragraph | Table | Tiles | Pictures | Listing | Samples | Fold


def inlines(line: Line) -> Sequence[Inline]:
    """A line as a sequence of pieces."""
    return (line,) if isinstance(line, str | Bold | Mono | Score) else line


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in plain text, the first row its head; columns but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


# The exams of a report card: the table over all of them, and what lies behind single scores.


STAGE_TITLES = {"base": "BASE", "sft": "SFT", "rl": "RL"}
FIRST = ("bits_per_byte", "core", "core_partial", "mmlu", "arc_easy", "arc_challenge", "gsm8k", "humaneval")
CORE = ("core", "core_partial")
LONG = 20  # groups of an exam that a reader opens rather than scrolls past

Card = dict[str, Any]
Found = dict[str, Any] | None  # scores of one stage


def exam_blocks(card: Card) -> list[Block]:
    """The table BASE / SFT / RL and everything below it; nothing before the first evaluation."""
    stages = [stage for stage in STAGE_TITLES if stage in card["exams"]]
    if not stages:
        return []
    head = ["exam", *(STAGE_TITLES[stage] for stage in stages), "chance", "cases"]
    blocks: list[Block] = [Heading("Exams"), Table(head, list(_rows(card, stages)), numeric=True)]
    blocks += [Paragraph(_note(card, stages), small=True), *_not_run(card, stages)]
    return [*blocks, *_core(card, stages), *_groups(card, stages), *_overlap(card)]


def standing(record: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation says beside the scores of its exams: CORE or the part of it, ChatCORE, what was not run."""
    partial = record.get("core_partial")
    if partial:
        partial = {"mean": partial.get("metric"), "tasks": partial["tasks"], "of": len(CORE_TASKS)}
    return {
        "core": record.get("core"),
        "core_partial": partial,
        "chatcore": record.get("chatcore"),
        "not_run": record.get("not_run", {}),
    }


def exam_table(card: Card) -> str:
    """The table BASE / SFT / RL in plain text."""
    stages = [stage for stage in STAGE_TITLES if stage in card["exams"]]
    rows = [["exam", *(STAGE_TITLES[stage] for stage in stages), "chance", "cases"]]
    for row in _rows(card, stages):
        notes = [f" ({c.note.replace(' to ', '..')})" if isinstance(c, Score) and c.note else "" for c in row]
        rows.append([getattr(c, "text", str(c)) + note for c, note in zip(row, notes, strict=True)])
    return text_table(rows)


def taken(card: Card, stage: str) -> dict[str, Any]:
    """The scores of the exams that a stage has sat, the common ones first."""
    tasks = {name: task for name, task in card["exams"].get(stage, {}).items() if "metric" in task}
    return dict(sorted(tasks.items(), key=lambda item: FIRST.index(item[0]) if item[0] in FIRST else len(FIRST)))


def _rows(card: Card, stages: Sequence[str]) -> Iterator[list[Line]]:
    scores = {stage: taken(card, stage) for stage in stages}
    names = dict.fromkeys(name for stage in stages for name in scores[stage])
    order = sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    for name in order:
        tasks = [scores[stage].get(name) for stage in stages]
        yield [_title(card, name), *(_score(task) for task in tasks), _chance(tasks), _cases(tasks)]
        if name == "bits_per_byte":
            yield from _reading(tasks)
        for reading in dict.fromkeys(r for task in tasks if task for r in task.get("readings", {})):
            read = [task.get("readings", {}).get(reading) if task else None for task in tasks]
            yield [f"{name}, read as {reading}", *(_score(task) for task in read), _chance(read), _cases(read)]
        for name_k in _passes(tasks):
            drawn = [task.get("pass_at_k", {}).get(name_k) if task else None for task in tasks]
            yield [f"{name}, {name_k}", *(_score(task) for task in drawn), "-", _cases(drawn)]
    chat = [card["standing"].get(stage, {}).get("chatcore") for stage in stages]
    if any(value is not None for value in chat):
        yield ["ChatCORE", *("-" if v is None else Score(f"{v:.4f}") for v in chat), "0", "-"]


def _passes(tasks: Sequence[Found]) -> list[str]:
    """pass@1, 2, 4 ... and the last of those there are."""
    names = list(dict.fromkeys(name for task in tasks if task for name in task.get("pass_at_k", {})))
    return [name for i, name in enumerate(names, 1) if i & (i - 1) == 0 or i == len(names)]


def _title(card: Card, name: str) -> str:
    if name == "core":
        return "CORE"
    if name == "core_partial":
        partial = next(s["core_partial"] for s in card["standing"].values() if s.get("core_partial"))
        return f"core_partial (mean of {partial['tasks']} of CORE's {partial['of']} tasks)"
    return name


def _reading(tasks: Sequence[Found]) -> Iterator[list[Line]]:
    """The rows below bits per byte."""
    if any(task and "perplexity" in task for task in tasks):
        shown = (f"{task['perplexity']:.1f}" if task and "perplexity" in task else "-" for task in tasks)
        yield ["perplexity", *shown, "-", _cases(tasks)]
    talks = [task.get("conversations") if task else None for task in tasks]
    if any(talks):
        scores = (bits(talk) if talk else "-" for talk in talks)
        yield ["bits_per_byte, conversations", *scores, "-", _cases(talks)]


def _score(task: Found) -> Line:
    if task is None:
        return "-"
    low, high = task.get("interval") or (None, None)
    if "accuracy" in task:
        note = "" if low is None else f"{low:.1%} to {high:.1%}"
        interval = None if low is None or high is None else (low, high)
        return Score(f"{task['metric']:.1%}", note, task["metric"], interval, task.get("chance"))
    if "bits_per_byte" in task:
        return Score(bits(task))
    return Score(f"{task['metric']:.4f}", "" if low is None else f"{low:.4f} to {high:.4f}")


def bits(task: dict[str, Any], digits: int = 4) -> str:
    """Bits per byte with the standard error; records of before have only its 95 % interval."""
    low, high = task.get("interval") or (None, None)
    error = task.get("se", None if low is None or high is None else (high - low) / (2 * Z95))
    return with_error(task["bits_per_byte"], error, digits)


def _chance(tasks: Sequence[Found]) -> str:
    known = next((task for task in tasks if task and "chance" in task), None)
    if known is None:
        return "-"
    return f"{known['chance']:.0%}" if "accuracy" in known else f"{known['chance']:g}"


def _cases(tasks: Sequence[Found]) -> str:
    """How many; by stage where they were not asked the same number."""
    numbers = [f"{task['n']:,}" for task in tasks if task and "n" in task]
    return numbers[0] if len(set(numbers)) == 1 else " / ".join(numbers) or "-"


def _note(card: Card, stages: Sequence[str]) -> str:
    text = (
        "In brackets: 95 % intervals (Wilson's for shares). Bits per byte (± standard error) and perplexity: lower is "
        "better; their cases are rows of text that no stage trained on."
    )
    tasks = [task for stage in stages for task in taken(card, stage).values()]
    if any("core" in name for stage in stages for name in taken(card, stage)):
        text += " CORE counts from the accuracy of guessing, 0, to 1; a mean of fewer than all its tasks is no CORE."
    for key, words in (
        ("too_long", "times a question was longer than the context and counted as wrong"),
        ("damaged", "questions were left out, their rows in the data being damaged"),
        ("endless", "answers had no end within the length allowed"),
        ("cropped", "prompts lost their beginning, being longer than the context"),
    ):
        count = sum(t.get(key, 0) for t in [*tasks, *(g for t in tasks for g in t.get("groups", {}).values())])
        text += f" {count:,} {words}." if count else ""
    levels = {str(task["facts"]["sandbox"]) for task in tasks if "sandbox" in task.get("facts", {})}
    return text + "".join(f" Sandbox of the model's code: {level}." for level in sorted(levels))


def _not_run(card: Card, stages: Sequence[str]) -> list[Block]:
    """What was wanted and could not be asked, with the reason."""
    rows: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        for name, reason in card["standing"].get(stage, {}).get("not_run", {}).items():
            rows.setdefault((name, reason), []).append(STAGE_TITLES[stage])
    if not rows:
        return []
    table = Table(["exam", "stage", "reason"], [[n, ", ".join(found), why] for (n, why), found in rows.items()])
    return [Heading("Not run", 3), table]


def _core(card: Card, stages: Sequence[str]) -> list[Block]:
    """CORE's tasks with their centred accuracies."""
    for stage in stages:
        for name in CORE:
            tasks = card["exams"][stage].get(name, {}).get("groups", {})
            if tasks:
                rows: list[Sequence[Line]] = [
                    [label, f"{t.get('shots', '-')}", _score(t), _baseline(t), f"{t['centred']:.4f}", f"{t['n']:,}"]
                    for label, t in tasks.items()
                ]
                head = ["task", "shots", STAGE_TITLES[stage], "guessing", "centred", "cases"]
                return [Heading(f"{_title(card, name)}, task by task", 3), Table(head, rows, numeric=True)]
    return []


def _baseline(task: dict[str, Any]) -> str:
    return f"{round(100 * task.get('chance', 0.0), 1):g}%"


def _groups(card: Card, stages: Sequence[str]) -> list[Block]:
    """MMLU by subject, and the other exams by kind of question."""
    found: dict[str, dict[str, list[Found]]] = {}
    for place, stage in enumerate(stages):
        for exam, task in taken(card, stage).items():
            for name, group in task.get("groups", {}).items() if exam not in CORE else ():
                found.setdefault(exam, {}).setdefault(name, [None] * len(stages))[place] = group
    blocks: list[Block] = []
    titles = [STAGE_TITLES[stage] for stage in stages]
    kinds: list[tuple[str, str, list[Found]]] = []
    for exam, groups in found.items():
        if len(groups) <= LONG:
            kinds += [(exam, name, tasks) for name, tasks in groups.items()]
            continue
        used = [i for i in range(len(stages)) if any(tasks[i] for tasks in groups.values())]
        rows: list[Sequence[Line]] = [
            [name.partition(": ")[2].replace("_", " ") or name, *(_score(tasks[i]) for i in used), _cases(tasks)]
            for name, tasks in groups.items()
        ]
        what = next(iter(groups)).partition(":")[0]
        table = Table([what, *(titles[i] for i in used), "cases"], rows, numeric=True)
        shown = {"mmlu": "MMLU"}.get(exam, exam)
        blocks += [Heading(f"{shown} by {what}", 3), Fold(f"All {len(groups)} of {shown}", [table])]
    if kinds:
        used = [i for i in range(len(stages)) if any(tasks[i] for _, _, tasks in kinds)]
        rows = [[exam, name, *(_score(tasks[i]) for i in used), _cases(tasks)] for exam, name, tasks in kinds]
        table = Table(["exam", "kind", *(titles[i] for i in used), "cases"], rows, numeric=True, labels=2)
        blocks = [Heading("By kind of question", 3), table, *blocks]
    return blocks


def _overlap(card: Card) -> list[Block]:
    """How much of the exams' text stands in the training text."""
    found = card.get("overlap") or {}
    blocks: list[Block] = [Heading("Exam text in the pretraining text", 3)]
    if "reason" in found:
        return [*blocks, Paragraph(["Not looked up: ", found["reason"]])]
    if not found.get("exams"):
        return []
    rows: list[Sequence[Line]] = []
    for name, exam in found["exams"].items():
        if "reason" in exam:
            rows.append([name, "-", "-", "-", "-"])
            continue
        asked = f"{exam['looked_up']:,} of {exam['questions']:,}"
        shares = [f"{exam[key]:.1%}" if exam["looked_up"] else "-" for key in ("share", "gram_share")]
        rows.append([name, asked, shares[0], shares[1], f"{exam['grams']:,}"])
    words = found["words"]
    head = ["exam", "questions looked up", "with a match", f"{words}-grams found", f"{words}-grams"]
    note = (
        f"A match: {words} words in a row, in lower case and without punctuation, that also stand in a training "
        f"document. Questions of fewer words cannot be looked up. Searched: {found['documents']:,} documents of the "
        "pretraining text"
    )
    if found.get("document_share") is not None:
        note += f", {found['document_share']:.1%} of it"
    reasons = [f" {name}: {exam['reason']}." for name, exam in found["exams"].items() if "reason" in exam]
    source: Line = [f"{note} (", Mono(str(card["data"]["source"])), ").", *reasons]
    return [*blocks, Table(head, rows, numeric=True), Paragraph(source, small=True)]


# The report card's section on the data.


PASSAGE = 300  # characters of a copied passage that are shown


def data_blocks(card: Card) -> list[Block]:
    """The text, how it was packed, how much of it was used and how much of it the model says by heart."""
    data = card["data"]
    rows: list[Sequence[Line]] = [["source", Mono(str(data["source"]))]]
    for split, title in (("train", "training text"), ("val", "held-out text")):
        if split in data:
            d = data[split]
            again = f" ({d['duplicates']:,} duplicates found)" if d.get("duplicates") else ""
            rows += [
                [title, f"{d['documents']:,} documents{again}, {d['bytes']:,} bytes, {d['tokens']:,} tokens"],
                [
                    f"{title}, packed",
                    f"{d['rows']:,} rows, {d['fill']:.2%} filled, {d['cuts']:,} cuts, {_left_out(d)}",
                ],
            ]
            for part in d.get("sources", []) if len(d.get("sources", [])) > 1 else []:
                rows.append([f"{title}, {part['weight']:.1%} from", Mono(f"{part['source']}: {part['rows']:,} rows")])
    if card["corpus_share"] is not None:
        epochs = card["pretrain"]["epochs"]
        rows.append(["training text used", f"{card['corpus_share']:.1%} ({epochs:.2f} epochs)"])
    if found := card["copied"]:
        searched = f"{found['documents']:,} documents searched"
        share = f"{found['share']:.1%} of {found['texts']} texts that BASE wrote stands there in passages"
        share += f" of {LONG_PASSAGE} bytes"
        rows.append(["by heart", f"{share} and more; the longest has {found['longest']:,} characters; {searched}"])
        rows += [["that passage", Mono(found["passage"][:PASSAGE])]] if found["passage"] else []
    if t := card["tokenizer"]:
        how = "trained on the training text" if t["trained"] else "taken as it was"
        size = f"{t['vocab_size']:,} tokens, {t['bytes_per_token']:.2f} bytes per token on held-out text, {how}"
        rows.append(["tokenizer", size])
        rows += [[f"the same text in {o['name']}'s tokens", _other(o)] for o in card["other_tokenizers"]]
    return [Heading("Data"), Table(["", ""], rows)]


def _left_out(split: dict[str, Any]) -> str:
    """How many tokens stand in no row."""
    lost = split.get("lost", 0)
    return f"{lost:,} tokens ({lost / max(1, split['tokens']):.1%}) left out" if lost else "nothing left out"


def _other(other: dict[str, Any]) -> str:
    return (
        f"{other['vocab_size']:,} tokens, {other['bytes_per_token']:.2f} bytes per token; "
        f"ours needs {other['ours_per_token']:.2f} tokens for one of its"
    )


# The words of a report card: blocks from the numbers of `report.json` and the samples, and from nothing else.


TILE_EXAMS = {"mmlu": "MMLU", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "gsm8k": "GSM8K",
              "humaneval": "HumanEval", "word_problems": "word problems", "identity": "identity"}  # fmt: skip
MOST_TILES = 8


def card_blocks(card: Card, samples: dict[str, str]) -> list[Block]:
    """The whole card; `samples` holds the text of each stage's `samples.md`, empty where there is none."""
    sections = (
        _headline(card), exam_blocks(card), _samples_blocks(samples), _curves(card), _learning(card), _training(card),
        data_blocks(card), _time(card), _machine(card), _config(card),
    )  # fmt: skip
    return [block for section in sections for block in section]


def _headline(card: Card) -> list[Block]:
    train, model = card["pretrain"], card["model"]
    if origin := card.get("imported"):
        return [
            Paragraph(
                [
                    f"The weights were imported from {origin['from']} ({origin['format']}). What they were trained on "
                    "is not known here: they may have seen the held-out text and the exams."
                ]
            )
        ]
    if not train:
        return []
    base = card["exams"].get("base", {}).get("bits_per_byte")
    text: list[Any] = [
        f"{'A chat model' if card['sft'] else 'A model'} of {count(train['parameters'])} parameters "
        f"({model['depth']} layers, width {model['width']}), trained from raw text in ",
        Bold(duration(card["seconds_total"])),
        f" on {_device(_main_machine(card))}.",
        "" if card["sft"] else " It goes on with a text; it was not taught to answer.",
    ]
    if base:
        text += [" It reads held-out text at ", Bold(f"{bits(base, 3)} bits per byte"), "."]
    latest = {name: task for stage in STAGE_TITLES for name, task in taken(card, stage).items() if "accuracy" in task}
    for i, (name, task) in enumerate(latest.items()):
        text += [", " if i else " Exams: ", f"{name.replace('_', ' ')} ", Bold(f"{task['accuracy']:.1%}")]
    return [Paragraph([*text, "."] if latest else text), Tiles(_tiles(card, latest))]


def _tiles(card: Card, latest: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that a reader wants first."""
    figures = [
        ("parameters", count(card["pretrain"]["parameters"])),
        ("wall clock", duration(card["seconds_total"])),
        ("cost", money(card["cost"]["usd"])),
    ]
    if base := card["exams"].get("base", {}).get("bits_per_byte"):
        figures.append(("bits per byte", bits(base, 3)))
    standing = card["standing"].values()
    for key, title in (("core", "CORE"), ("chatcore", "ChatCORE")):
        figures += [(title, f"{s[key]:.4f}") for s in standing if s.get(key) is not None][-1:]
    figures += [(title, f"{latest[name]['metric']:.1%}") for name, title in TILE_EXAMS.items() if name in latest]
    return figures[:MOST_TILES]


def _samples_blocks(samples: dict[str, str]) -> list[Block]:
    """What each stage writes, the furthest first; what it wrote before that stage is folded."""
    blocks: list[Block] = []
    for stage in reversed(STAGE_TITLES):
        parts = dict(part.split("\n", 1) for part in f"\n{samples.get(stage, '')}\n".split("\n## ")[1:])
        for title, folded in (("After", False), ("Before", True)):
            if title in parts:
                source = parts[title].strip().split("\n")
                blocks.append(Samples(f"{title} {STAGE_TITLES[stage]}", source, turns(source), folded))
    note = "The same prompts at both temperatures (in bold); the calculator's calls in brackets."
    return [Heading("Samples"), Paragraph(note, small=True), *blocks] if blocks else []


def turns(source: Sequence[str]) -> list[Turn]:
    """What the lines of `samples.md` say: prompts and answers without their marks."""
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for line in source:
        if line.startswith("> "):
            found.append((_bare(line[2:]), []))
        elif (match := re.fullmatch(r"- \*\*(.+?)\*\*: (.*)", line)) and found:
            found[-1][1].append((match[1], _bare(match[2])))
    return [Turn(prompt, answers) for prompt, answers in found]


def _bare(text: str) -> str:
    match = re.fullmatch(r"(`+) (.*) \1", text) or re.fullmatch("(`)([^`]*)`", text)
    return match[2] if match else text


def _curves(card: Card) -> list[Block]:
    titles = {"dynamics": "how training went", "loss": "loss", "rl": "reward, length and pass@k"}
    files = [
        (f"{STAGE_TITLES[stage]}: {titles.get(kind, kind)}", path)
        for stage, paths in card["plots"].items()
        for path in paths
        for kind in [path.rsplit("_", 1)[-1].removesuffix(".png")]
    ]
    return [Heading("Curves"), Pictures(files)] if files else []


def _learning(card: Card) -> list[Block]:
    """Reinforcement learning: where its figures began and ended."""
    found = card["rl_progress"]
    if not found:
        return []
    names = {"right": "share right", "length": "tokens per answer", "endless": "share without an end",
             "kl": "KL to the start, nats per token"}  # fmt: skip
    rows: list[Sequence[Line]] = [
        [names.get(name, name), f"{f['first']:.4g}", f"{f['last']:.4g}", f"{f['best']:.4g}", f"{f['values']:,}"]
        for name, f in found.items()
    ]
    note = "First and last: means over a tenth of the steps; of pass@k and KL the evaluations before and after."
    table = Table(["", "first", "last", "greatest", "measured"], rows, numeric=True)
    return [Heading("Reinforcement learning"), table, Paragraph(note, small=True)]


def _training(card: Card) -> list[Block]:
    train, speed = card["pretrain"], card["speed"]
    rows: list[Sequence[Line]] = []
    if train:
        rows += [
            ["parameters", f"{train['parameters']:,} ({train['scaling_parameters']:,} in products)"],
            ["model", _settings(card["model"])],
            ["optimizer", _settings(card["optimizer"])],
            ["pretraining tokens", f"{train['tokens']:,} in {speed['base']['steps']:,} steps"],
            ["pretraining FLOPs", f"{train['flops']:.3g} ({train['flops_per_token']:,} per token)"],
            ["pretraining speed", _speed(speed["base"])],
            ["pretraining, steps skipped", f"{train['bad_steps']:,}"],
            ["base parameters' SHA-256", Mono(train["params_sha256"])],
        ]
    if sft := card["sft"]:
        rows += [
            ["SFT conversations", ", ".join(f"{name} ({number:,})" for name, number in sft["conversations"].items())],
            [
                "SFT rows",
                f"{sft['train']['rows']:,}, {sft['train']['fill']:.1%} filled; "
                f"{sft['train']['cut']:,} conversations longer than a row, cut at a turn",
            ],
            ["SFT tokens", f"{sft['tokens']:,} in {sft['steps']:,} steps"],
            ["SFT speed", _speed(speed["sft"])],
            ["SFT, steps skipped", f"{sft['bad_steps']:,}"],
            ["SFT parameters' SHA-256", Mono(sft["params_sha256"])],
        ]
    if rl := card["rl"]:
        rows += [["RL environment", str(rl["environment"])]] if "environment" in rl else []
        rows += [[f"RL {key}", f"{rl[key]:,}"] for key in ("questions", "steps", "tokens") if key in rl]
        rows += [["RL speed", _speed(speed["rl"])]] if "rl" in speed else []
        rows += [["RL parameters' SHA-256", Mono(rl["params_sha256"])]] if "params_sha256" in rl else []
    return [Heading("Training"), Table(["", ""], rows)] if rows else []


def _speed(speed: dict[str, Any]) -> str:
    mfu = f", MFU {speed['mfu']:.1%}" if speed["mfu"] is not None else ""
    step = f"a step {speed['step_seconds']:.3g} s"
    if speed["tokens_per_second"] is None:
        return f"{step} (median), the first one {speed['first_step_seconds']:.3g} s"
    return (
        f"{speed['tokens_per_second']:,.0f} tokens/s{mfu}, {step} (medians); "
        f"{speed['mean_tokens_per_second']:,.0f} tokens/s with the first step of {speed['first_step_seconds']:.3g} s"
    )


def _time(card: Card) -> list[Block]:
    cost, head = card["cost"], ["stage", "wall clock"]
    rows: list[list[Line]] = [[name, duration(seconds)] for name, seconds in card["seconds"].items()]
    rows.append([Bold("total"), Bold(duration(card["seconds_total"]))])
    if not cost["prices"]:
        return [Heading("Time"), Table(head, rows, numeric=True)]
    for row, name in zip(rows, card["seconds"], strict=False):
        row.append(money(cost["stages"].get(name)))
    rows[-1].append(Bold(money(cost["usd"])))
    prices = ", ".join(f"{price:g} USD for {name}" for name, price in cost["prices"].items())
    note = f"Cost: devices x hours x price, {cost['assumption']}: {prices}."
    return [Heading("Time"), Table([*head, "USD"], rows, numeric=True), Paragraph(note, small=True)]


def money(usd: float | None) -> str:
    """A cost as people say it."""
    if usd is None:
        return "not known"
    return f"{usd:,.2f} USD" if usd else "nothing"


def _machine(card: Card) -> list[Block]:
    code, peak = card["code"], card["peak_memory_bytes"]
    rows: list[Sequence[Line]] = [
        ["hardware", _by_stage(card["machines"], _device)],
        ["cost", card["cost"]["words"]],
        ["peak memory", f"{peak / 2**30:.2f} GiB" if peak else "-"],
        ["versions", _by_stage(card["versions"], lambda found: ", ".join(f"{k} {v}" for k, v in found.items()))],
        ["commit", _by_stage(card["commits"], lambda commit: Mono(commit) if commit else "-")],
        [
            "code",
            f"{code['files']:,} files, {code['lines']:,} lines ({code['code_lines']:,} without comments), "
            f"{code['dependencies']} dependencies",
        ],
        ["seed", str(card["seed"])],
        ["finished", card["date"] or "-"],
    ]
    return [Heading("Machine and code"), Table(["", ""], rows)]


def _config(card: Card) -> list[Block]:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in card["config"].items()]
    return [Heading("Configuration"), Fold(f"All settings ({len(card['config'])})", [Listing(lines)])]


def _by_stage(groups: list[dict[str, Any]], show: Any) -> Line:
    """One value where all stages share it; else each with its stages."""
    if len(groups) == 1:
        return show(groups[0]["value"])
    pieces: list[Any] = []
    for group in groups:
        pieces += ["; "] if pieces else []
        pieces += [show(group["value"]), f" ({', '.join(group['stages'])})"]
    return pieces or "-"


def _main_machine(card: Card) -> dict[str, Any]:
    return next(group["value"] for group in card["machines"] if "pretrain" in group["stages"])


def _device(hardware: dict[str, Any]) -> str:
    hosts = f" on {hardware['hosts']} hosts" if hardware["hosts"] > 1 else ""
    if hardware["platform"] == "cpu":
        return f"{hardware['cpu_cores']} CPU cores ({hardware['device']}){hosts}"
    return f"{hardware['devices']} x {hardware['device']}{hosts}"


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def count(number: int) -> str:
    """A number as people say it: 4.9 million."""
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def duration(seconds: float) -> str:
    """A time as people say it: seconds, minutes and seconds, hours and minutes, or days and hours."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


# Blocks of a report card as Markdown.


def markdown(title: str, blocks: Iterable[Block]) -> str:
    """The whole card. No text of the run is taken for markup."""
    lines = [f"# {_plain(title)}", "", *_blocks(blocks)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _blocks(blocks: Iterable[Block]) -> list[str]:
    return [line for block in blocks for line in [*_md_block(block), ""]]


def _md_block(block: Block) -> list[str]:
    match block:
        case Heading(text, level):
            return [f"{'#' * level} {_plain(text)}"]
        case Paragraph(line):
            return [_md_line(line)]
        case Table(head, rows):
            return _md_table([_plain(cell) for cell in head], [[_md_line(cell) for cell in row] for row in rows])
        case Tiles(figures):
            names, values = zip(*figures, strict=True)
            return _md_table([_plain(name) for name in names], [[f"**{_plain(value)}**" for value in values]])
        case Pictures(files):
            return [line for title, path in files for line in (f"![{_plain(title)}]({path})", "")][:-1]
        case Listing(lines):
            fence = "`" * (1 + max((len(run) for line in lines for run in re.findall("`+", line)), default=2))
            return [f"{fence}toml", *lines, fence]
        case Samples(title, source, _, folded):
            return _md_fold(title, list(source)) if folded else [f"### {_plain(title)}", "", *source]
        case Fold(title, inner):
            return _md_fold(title, _blocks(inner)[:-1])


def _md_fold(title: str, lines: list[str]) -> list[str]:
    return ["<details>", f"<summary>{_plain(title)}</summary>", "", *lines, "", "</details>"]


def _md_table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{' --- |' * len(head)}", *lines[1:]]


def _md_line(line: Line) -> str:
    return "".join(_md_inline(piece) for piece in inlines(line))


def _md_inline(piece: Inline) -> str:
    match piece:
        case Bold(text):
            return f"**{_plain(text)}**"
        case Mono(text):
            return code(text)
        case Score(text, note):
            return _plain(f"{text} ({note})" if note else text)
        case str():
            return _plain(piece)


def _plain(text: str) -> str:
    """One line in which nothing is markup."""
    return re.sub(r"([\\`*\[\]<])", r"\\\1", " ".join(text.split("\n")).replace("\r", " "))


def code(text: str) -> str:
    """Inline code around any text: more backticks than the text holds in a row."""
    text = " ".join(text.splitlines())
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(len(run) for run in re.findall("`+", text)))
    return f"{fence} {text} {fence}"


# Blocks of a report card as one HTML page: styles and pictures inside, no script, nothing is fetched.


CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # no page may hold these; a sample may
STYLE = Path(__file__).with_name("report.css")
Svgs = Mapping[str, Mapping[str, bytes]]


def page(title: str, blocks: Iterable[Block], pictures: Svgs) -> str:
    """The whole page. `pictures`: the SVG of every picture by theme, by its path in the blocks. All text is escaped."""
    body = "\n".join(_html_block(block, pictures) for block in blocks)
    shown = escape(title)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # holds what the text above promises
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{shown}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<h1>{shown}</h1>
{body}
</main>
</body>
</html>
"""
    return CONTROL.sub("\ufffd", text)


def _html_block(block: Block, pictures: Svgs) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(line, small):
            return f'<p class="note">{_html_line(line)}</p>' if small else f"<p>{_html_line(line)}</p>"
        case Table():
            return _html_table(block)
        case Tiles(figures):
            tiles = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures)
            return f'<dl class="tiles">{"".join(tiles)}</dl>'
        case Pictures(files):
            return "\n".join(_picture(title, pictures[path]) for title, path in files)
        case Listing(lines):
            return f"<pre>{escape(chr(10).join(lines))}</pre>"
        case Samples(title, _, turns, folded):
            inner = "\n".join(_turn(turn) for turn in turns)
            return _html_fold(title, inner) if folded else f"<h3>{escape(title)}</h3>\n{inner}"
        case Fold(title, blocks):
            return _html_fold(title, "\n".join(_html_block(inner, pictures) for inner in blocks))


def _html_fold(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{inner}\n</details>"


def _html_table(table: Table) -> str:
    kinds = ["" if i < table.labels or not table.numeric else ' class="number"' for i in range(len(table.head))]
    head = "".join(f'<th scope="col"{k}>{escape(cell)}</th>' for k, cell in zip(kinds, table.head, strict=True))
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td{k}>{_html_line(cell)}</td>" for k, cell in zip(kinds[1:], others, strict=True))
        rows.append(f'<tr><th scope="row">{_html_line(first)}</th>{cells}</tr>')
    top = f"<thead><tr>{head}</tr></thead>\n" if any(table.head) else ""
    kind = "numbers" if table.numeric else "facts"
    body = "\n".join(rows)
    return f'<div class="wide"><table class="{kind}">\n{top}<tbody>\n{body}\n</tbody>\n</table></div>'


def _picture(title: str, svg: Mapping[str, bytes]) -> str:
    light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(svg[shade]).decode()}" for shade in ("light", "dark"))
    return (
        f'<figure><picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(title)}" src="{light}"></picture></figure>'
    )


def _turn(turn: Turn) -> str:
    answers = "".join(
        f'<p class="answer"><span class="heat">{escape(heat)}</span> {_text(text)}</p>' for heat, text in turn.answers
    )
    return f'<div class="turn"><p class="prompt">{_text(turn.prompt)}</p>{answers}</div>'


def _text(text: str) -> str:
    return f'<bdi class="said">{escape(text)}</bdi>'


def _html_line(line: Line) -> str:
    return "".join(_html_inline(piece) for piece in inlines(line))


def _html_inline(piece: Inline) -> str:
    match piece:
        case Bold(text):
            return f"<strong>{escape(text)}</strong>"
        case Mono(text):
            return f"<code>{escape(text)}</code>"
        case Score():
            return _html_score(piece)
        case str():
            return escape(piece)


def _html_score(score: Score) -> str:
    """The number, its interval below it, and both as a bar with a mark where guessing is."""
    note = f" <small>({escape(score.note)})</small>" if score.note else ""
    text = f"<span>{escape(score.text)}</span>{note}"
    if score.share is None:
        return text
    low, high = score.interval or (score.share, score.share)
    parts = f'<i class="band" style="left:{low:.2%};width:{max(0.0, high - low):.2%}"></i>'
    parts += f'<i class="dot" style="left:{score.share:.2%}"></i>'
    if score.chance:
        parts += f'<i class="chance" style="left:{score.chance:.2%}"></i>'
    return f'{text}<span class="bar" aria-hidden="true">{parts}</span>'


# The pictures of a report card: PNGs in `plots/`, and the same as SVG in light and dark for the page.


PANELS = (
    ("grad_norm", "gradient norm", "C4"),
    ("lr_mult", "learning rate (of the full one)", "C2"),
    ("tokens_per_second", "tokens per second", "C0"),
)
RL_PANELS = (
    ("reward", "mean reward", "C0"),
    ("length", "tokens per answer", "C4"),
    ("kl", "KL to the start (nats per token)", "C2"),
)
POINTS = 1500  # of one curve in a picture, at most
COLORS = {
    "light": (["#1f5a94", "#c2571a", "#2a7f4f", "#b3203a", "#6a3d9a"], "#23272f", "#ffffff"),
    "dark": (["#7db3e8", "#f0a063", "#6fcf97", "#f08a9a", "#b79ae6"], "#d7dce5", "#171a21"),
}


@dataclass(frozen=True)
class Plot:
    """`path` of the PNG inside the run directory; `svg` by theme."""

    path: str
    svg: dict[str, bytes]


def theme(name: str) -> Any:
    """Matplotlib's settings in the colors of a theme. Texts of an SVG stay text, in the reader's own font."""
    colors, ink, paper = COLORS[name]
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return {
        "axes.prop_cycle": cycler(color=colors),
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "legend.facecolor": paper,
        "axes.spines.top": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "jaxchat",
    } | dict.fromkeys(inked, ink)


def draw(run: RunDir, metrics: dict[str, list[dict[str, Any]]]) -> dict[str, list[Plot]]:
    """Draw `plots/`, by stage, from the records of `metrics.jsonl`."""
    drawn: dict[str, list[Plot]] = {}
    run.plots.mkdir(parents=True, exist_ok=True)
    for stage, steps in metrics.items():
        if not any(record.get("loss") is not None for record in steps):
            continue
        title, source = STAGE_TITLES[stage], run.stage(stage) / "metrics.jsonl"
        pictures: dict[str, Callable[[Any], None]] = {}
        if all("tokens" in record for record in steps):
            pictures["loss"] = functools.partial(loss_plot, source, title=title)
        if any("reward" in record for record in steps):
            pictures["rl"] = functools.partial(rl_plot, steps, title=title)
        if all(key in record for record in steps for key, _, _ in PANELS):
            pictures["dynamics"] = functools.partial(dynamics_plot, steps, title=title)
        drawn[stage] = [_plot(run, f"{stage}_{name}.png", paint) for name, paint in pictures.items()]
    return drawn


def _plot(run: RunDir, name: str, paint: Callable[[Any], None]) -> Plot:
    out, path = io.BytesIO(), run.plots / name
    with rc_context(theme("light")):
        paint(path)
    with rc_context(theme("light") | {"savefig.format": "svg", "savefig.transparent": True}):
        paint(out)
    light = re.sub(rb"<metadata>.*?</metadata>", b"", out.getvalue(), flags=re.S)  # it holds the date
    return Plot(path.relative_to(run.root).as_posix(), {"light": light, "dark": _darkened(light)})


def _darkened(svg: bytes) -> bytes:
    """The same picture in the dark theme's colors."""
    (colors, *others), (dark, *dark_others) = COLORS["light"], COLORS["dark"]
    for old, new in zip([*colors, *others], [*dark, *dark_others], strict=True):
        svg = svg.replace(old.encode(), new.encode())
    return svg


def dynamics_plot(records: Sequence[dict[str, Any]], picture: Any, title: str) -> None:
    """Draw the records of `metrics.jsonl` over tokens, one panel a quantity; steps without a value leave a gap.

    `picture`: a path, or a file to write to.
    """
    _panels(records, PANELS, picture, title)


def rl_plot(records: Sequence[dict[str, Any]], picture: Any, title: str) -> None:
    """Reward, length of the answers, KL where there is one, and pass@k of the evaluations, over steps."""
    _panels(records, [panel for panel in RL_PANELS if any(panel[0] in r for r in records)], picture, title, "step")


def _panels(
    records: Sequence[dict[str, Any]],
    panels: Sequence[tuple[str, str, str]],
    picture: Any,
    title: str,
    over: str = "tokens",
) -> None:
    records = records[:: -(-len(records) // POINTS)] if over == "tokens" else records
    at = [record["tokens"] / 1e6 if over == "tokens" else record["step"] for record in records]
    passes = sorted({key for record in records for key in record if key.startswith("pass@")}, key=lambda k: (len(k), k))
    figure = Figure(figsize=(11, 3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels) + bool(passes), squeeze=False)[0]
    for axis, (key, label, color) in zip(axes, panels, strict=False):
        values = [float("nan") if record.get(key) is None else record[key] for record in records]
        seldom = over == "step" and any(key not in record for record in records)
        axis.plot(at, values, "o" if seldom else "-", color=color, linewidth=0.9, markersize=4)
        axis.set(title=label)
        axis.set_ylim(bottom=0)
    for key in passes:
        points = [(place, record[key]) for place, record in zip(at, records, strict=True) if key in record]
        axes[-1].plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, label=key)
        axes[-1].set(title="evaluations")
        axes[-1].legend()
    for axis in axes:
        axis.set(xlabel="million tokens" if over == "tokens" else "step")
        axis.grid(alpha=0.2)
    figure.suptitle(title)
    figure.savefig(picture)


# What a command leaves a person with: what the model can do, where everything is, and what to do next.


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


ROOT = Path(__file__).resolve().parent.parent
MODEL_KEYS = ("recipe", "depth", "width", "n_heads", "n_kv_heads", "head_width", "seq_len", "vocab_size")
FORMAT = 1  # of `report.json`
CURVE_POINTS = 500  # of one curve in report.json, at most; metrics.jsonl has them all
PRIVATE = ("serve.",)  # a card is there to be shown around; these keys hold addresses and API keys
RL_CURVES = ("reward", "right", "length", "endless", "kl")  # and pass@k

Steps = list[dict[str, Any]]


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write the card from the records of the run; facts: its digest."""
    metrics = {stage: read_metrics(run.stage(stage) / "metrics.jsonl") for stage in STAGE_TITLES}
    card = collect(config, run, metrics)
    card["overlap"] = exam_overlap(config, run, card["data"].get("train", {}).get("documents"))
    card["other_tokenizers"] = other_tokenizers(config, run) if card["tokenizer"] else []
    drawn = draw(run, metrics)
    card["plots"] = {stage: [plot.path for plot in plots] for stage, plots in drawn.items()}
    write_json(run.root / "report.json", card)
    title, blocks = f"Report card: {card['tier']}", card_blocks(card, {s: _samples(run, s) for s in STAGE_TITLES})
    text = markdown(title, blocks)
    atomic_write(run.report, text)
    themes = {plot.path: plot.svg for plots in drawn.values() for plot in plots}
    atomic_write(run.root / "report.html", page(title, blocks, themes))
    say(f"  {run.report}, and the same as one page: {run.root / 'report.html'}")
    return {"digest": hashlib.sha256(text.encode()).hexdigest()}


def collect(config: Config, run: RunDir, metrics: dict[str, Steps]) -> dict[str, Any]:
    """Every number of the card, from `stages.json`, the metrics and the exams; parts that do not exist are left out."""
    done = {name: r for name, r in run.records().items() if r["status"] == "done"}
    records = {name: r for name, r in done.items() if name not in ("report", "export") and "imported" not in r}
    exams = {stage: read_json(run.eval(stage)) for stage in STAGE_TITLES if run.eval(stage).exists()}
    facts = {name: record["facts"] for name, record in records.items()}
    seconds = {name: wall_clock(record) for name, record in records.items()}
    pretrain = facts.get("pretrain", {})
    return {
        "format": FORMAT,
        "tier": config.tier,
        "date": max((record["end"] for record in records.values()), default=None),
        "machines": _alike(records, "hardware"),
        "versions": _alike(records, "versions"),
        "commits": _alike(records, "commit"),
        "cost": run_cost(records),
        "seed": config.seed,
        "config": {key: value for key, value in flatten(config).items() if not key.startswith(PRIVATE)},
        "model": {key: getattr(config.model, key) for key in MODEL_KEYS},
        "optimizer": {key: getattr(config.optim, key) for key in ("kind", "lr_scale", "matrix_lr", "weight_decay")},
        "imported": next((r["imported"] for r in done.values() if "imported" in r), None),
        "tokenizer": facts.get("tokenizer", {}),
        "data": {"source": config.data.source} | facts.get("prepare", {}),
        "corpus_share": min(1.0, pretrain["epochs"]) if pretrain else None,
        "pretrain": pretrain,
        "sft": facts.get("sft", {}),
        "rl": facts.get("rl", {}),
        "rl_progress": _progress(metrics.get("rl", []), facts.get("rl", {}).get("start", {})),
        "speed": {stage: speed(steps) for stage, steps in metrics.items() if steps},
        "copied": exams.get("base", {}).get("copied"),
        "exams": {stage: record["tasks"] for stage, record in exams.items()},
        "standing": {stage: standing(record) for stage, record in exams.items()},
        "curves": {stage: _curve(steps) for stage, steps in metrics.items() if steps},
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
        "peak_memory_bytes": max((r["peak_rss_bytes"] for r in records.values() if r.get("peak_rss_bytes")), default=0),
        "code": code_size(),
    }


def _alike(records: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """[{"stages": [...], "value": ...}]: what the stages ran on or with, those with the same value together."""
    groups: list[dict[str, Any]] = []
    for name, record in records.items():
        group = next((g for g in groups if g["value"] == record[key]), None)
        if group is None:
            groups.append(group := {"stages": [], "value": record[key]})
        group["stages"].append(name)
    return groups


def speed(steps: Steps) -> dict[str, Any]:
    """Medians over the steps, and the mean, compiling included; null where the metrics do not say it."""

    def middle(key: str) -> float | None:
        known = [r[key] for r in steps if r.get(key) is not None]
        return median(known) if known else None

    spent, tokens = sum(r.get("step_seconds") or 0.0 for r in steps), steps[-1].get("tokens")
    return {
        "steps": len(steps),
        "tokens_per_second": middle("tokens_per_second"),
        "mean_tokens_per_second": None if tokens is None else tokens / max(spent, 1e-9),
        "step_seconds": middle("step_seconds") or 0.0,
        "first_step_seconds": steps[0].get("step_seconds") or 0.0,
        "mfu": middle("mfu"),
    }


def _curve(steps: Steps) -> dict[str, Any]:
    """Points (tokens, value), of RL (step, value)."""
    stride = -(-len(steps) // CURVE_POINTS)
    chosen = [*steps[:-1:stride], steps[-1]]
    curves = {
        "loss": [[r.get("tokens", r["step"]), r.get("loss")] for r in chosen],
        "val_bpb": [[r.get("tokens", r["step"]), r["val_bpb"]] for r in steps if "val_bpb" in r],
    }
    for key in _learned(steps):
        curves[key] = [[r["step"], r[key]] for r in (steps if "@" in key else chosen) if key in r]
    return curves


def _learned(steps: Steps) -> list[str]:
    """The figures of reinforcement learning that the records hold."""
    held = dict.fromkeys(key for record in steps for key in record if key in RL_CURVES or key.startswith("pass@"))
    order = {key: i for i, key in enumerate(RL_CURVES)}
    return sorted(held, key=lambda key: (order.get(key, len(order)), len(key), key))


def _progress(steps: Steps, start: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Where each figure of RL began and ended: means over a tenth of the steps, single values of what is measured at
    evaluations only, of which `start` is the one before the first step."""
    found = {}
    for key in _learned(steps):
        values = [r[key] for r in steps if r.get(key) is not None]
        seldom = len(values) < len(steps)
        if seldom and key in start:
            values.insert(0, start[key])
        part = 1 if seldom else -(-len(values) // 10)
        if values:
            ends = {"first": fmean(values[:part]), "last": fmean(values[-part:])}
            found[key] = ends | {"best": max(values), "values": len(values)}
    return found


def _samples(run: RunDir, stage: str) -> str:
    """`samples.md` of a stage, empty where there is none; a carriage return in a sample must not end its line."""
    path = run.stage(stage) / "samples.md"
    return path.read_bytes().decode("utf-8").replace("\r", " ") if path.exists() else ""


@functools.cache
def code_size() -> dict[str, int]:
    """Files and code lines (without blank lines, comments and docstrings) of the product, and its dependencies."""
    files = [p for folder in ("jaxchat", "train", "serve") for p in sorted((ROOT / folder).rglob("*.py"))]
    files.append(ROOT / "launch.py")
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {
        "files": len(files),
        "lines": sum(len(p.read_text(encoding="utf-8").splitlines()) for p in files),
        "code_lines": sum(len(code_lines(p.read_text(encoding="utf-8"))) for p in files),
        "dependencies": sum(1 for line in requirements if line.strip() and not line.startswith("#")),
    }


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold Python other than a docstring: the reader's load."""
    tree = ast.parse(text)
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return {n for n, line in lines if line.strip() and not line.lstrip().startswith("#") and n not in docstrings}
