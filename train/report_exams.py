"""The exams of a report card: the table over all of them, and what lies behind single scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jaxchat.tasks.core import CORE_TASKS
from train.bpb import with_error
from train.report_blocks import Block, Fold, Heading, Line, Mono, Paragraph, Score, Table, text_table
from train.shares import Z95

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
