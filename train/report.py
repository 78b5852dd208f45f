"""The report card: `report.json` with every number, and from it alone `report.md` and `report.html`.

`python -m train.report RUN` renders the two again from the `report.json` of a run.
"""

from __future__ import annotations

import ast
import base64
import functools
import hashlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jaxchat.config import Config, flatten
from jaxchat.log import read_metrics, say
from jaxchat.run_dir import RunDir, atomic_write, read_json, write_json
from jaxchat.tasks.core import CORE_TASKS

from .contamination import LONG_PASSAGE, exam_contamination
from .loop import with_error
from .plots import curves, draw, kinds, rl_figures, save
from .prepare import other_tokenizers
from .statistics import Z95
from .targets import run_cost, wall_clock

FORMAT = 1  # of `report.json`
ROOT = Path(__file__).resolve().parent.parent
STAGE_TITLES = {"base": "BASE", "sft": "SFT", "rl": "RL"}
MODEL_KEYS = ("recipe", "depth", "width", "n_heads", "n_kv_heads", "head_width", "seq_len", "vocab_size")
PRIVATE = ("serve.",)  # a card is published; these keys hold addresses and API keys
CORE = ("core", "core_partial")
LONG = 20  # groups of an exam from which on its table is folded
MOST_TILES = 8
PASSAGE = 300  # characters of a copied passage that are shown
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # forbidden in a page; a sample may hold them

Card = dict[str, Any]  # what report.json holds
Scores = dict[str, Any]  # of one exam, as in eval/<stage>.json
Cell = str | dict[str, Any]  # text, or what `_score` returns
Steps = list[dict[str, Any]]  # records of metrics.jsonl


@dataclass(frozen=True)
class Table:
    """Rows of cells. Without a head it lists facts; all columns after the first `labels` ones hold numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    labels: int = 1
    folded: bool = False


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write the card from the records of the run; facts: its digest."""
    card = collect(config, run)
    write_json(run.root / "report.json", card)
    run.plots.mkdir(parents=True, exist_ok=True)
    for path, _, figure in _pictures(card):
        save(figure, run.root / path)
    return {"digest": hashlib.sha256(write_cards(run, card).encode()).hexdigest()}


def write_cards(run: RunDir, card: Card) -> str:
    """Write `report.md` and `report.html`; returns the Markdown."""
    text, page = render(card)
    atomic_write(run.report, text)
    atomic_write(run.root / "report.html", page)
    say(f"  {run.report}, and the same as one page: {run.root / 'report.html'}")
    return text


# The numbers


def collect(config: Config, run: RunDir) -> Card:
    """Return every number of the card, from the records of the run; what does not exist is left out."""
    metrics = {stage: read_metrics(run.stage(stage) / "metrics.jsonl") for stage in STAGE_TITLES}
    metrics = {stage: steps for stage, steps in metrics.items() if steps}
    done = {name: r for name, r in run.records().items() if r["status"] == "done"}
    records = {name: r for name, r in done.items() if name not in ("report", "export") and "imported" not in r}
    exams = {stage: read_json(run.eval(stage)) for stage in STAGE_TITLES if run.eval(stage).exists()}
    samples = {stage: run.stage(stage) / "samples.json" for stage in STAGE_TITLES}
    facts = {name: record["facts"] for name, record in records.items()}
    seconds = {name: wall_clock(record) for name, record in records.items()}
    pretrain, data = facts.get("pretrain", {}), {"source": config.data.source} | facts.get("prepare", {})
    points = {stage: curves(steps) for stage, steps in metrics.items()}
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
        "other_tokenizers": other_tokenizers(config, run) if "tokenizer" in facts else [],
        "data": data,
        "corpus_share": min(1.0, pretrain["epochs"]) if pretrain else None,
        "pretrain": pretrain,
        "sft": facts.get("sft", {}),
        "rl": facts.get("rl", {}),
        "rl_progress": _progress(metrics.get("rl", []), facts.get("rl", {}).get("start", {})),
        "speed": {stage: speed(steps) for stage, steps in metrics.items()},
        "copied": exams.get("base", {}).get("copied"),
        "overlap": exam_contamination(config, run, data.get("train", {}).get("documents")),
        "exams": {stage: record["tasks"] for stage, record in exams.items()},
        "standing": {stage: standing(record) for stage, record in exams.items()},
        "samples": {stage: read_json(path) for stage, path in samples.items() if path.exists()},
        "curves": points,
        "plots": {
            stage: [f"plots/{stage}_{kind}.png" for kind in drawn]
            for stage in points
            if (drawn := kinds(points[stage]))
        },
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
        "peak_memory_bytes": max((r["peak_rss_bytes"] for r in records.values() if r.get("peak_rss_bytes")), default=0),
        "code": code_size(),
    }


def standing(record: dict[str, Any]) -> dict[str, Any]:
    """Return what an evaluation says beside the exams: CORE or the part of it, ChatCORE, and what was not run."""
    partial = record.get("core_partial")
    if partial:
        partial = {"mean": partial.get("metric"), "tasks": partial["tasks"], "of": len(CORE_TASKS)}
    return {
        "core": record.get("core"),
        "core_partial": partial,
        "chatcore": record.get("chatcore"),
        "not_run": record.get("not_run", {}),
    }


def _alike(records: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return [{"stages": [...], "value": ...}], stages with the same value together."""
    groups: list[dict[str, Any]] = []
    for name, record in records.items():
        group = next((g for g in groups if g["value"] == record[key]), None)
        if group is None:
            groups.append(group := {"stages": [], "value": record[key]})
        group["stages"].append(name)
    return groups


def speed(steps: Steps) -> dict[str, Any]:
    """Return medians over the steps, and the mean with compiling; null where the metrics do not say it."""

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


def _progress(steps: Steps, start: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return where RL's figures began and ended: means over a tenth of the steps.

    Of what is measured at evaluations only: single values, with the one in `start` first.
    """
    progress = {}
    for key in rl_figures(steps):
        values = [r[key] for r in steps if r.get(key) is not None]
        rare = len(values) < len(steps)
        if rare and key in start:
            values.insert(0, start[key])
        part = 1 if rare else -(-len(values) // 10)
        if values:
            ends = {"first": fmean(values[:part]), "last": fmean(values[-part:])}
            progress[key] = ends | {"best": max(values), "values": len(values)}
    return progress


@functools.cache
def code_size() -> dict[str, int]:
    """Return files, lines and code lines (without comments and docstrings) of the product, and its dependencies."""
    files = [p for folder in ("jaxchat", "train", "serve") for p in sorted((ROOT / folder).rglob("*.py"))]
    texts = [p.read_text(encoding="utf-8") for p in (*files, ROOT / "launch.py")]
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {
        "files": len(texts),
        "lines": sum(len(text.splitlines()) for text in texts),
        "code_lines": sum(map(code_lines, texts)),
        "dependencies": sum(1 for line in requirements if line.strip() and not line.startswith("#")),
    }


def code_lines(text: str) -> int:
    """Return how many lines hold Python other than docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for n, line in lines if line.strip() and not line.lstrip().startswith("#") and n not in docstrings)


# The two cards


def render(card: Card) -> tuple[str, str]:
    """Return the card as Markdown and as an HTML page.

    All text of the run is escaped. The page has no script and fetches nothing.
    """
    pictures = [(path, title, _data_uri(figure)) for path, title, figure in _pictures(card)]
    values = {
        "title": f"Report card: {card['tier']}",
        "headline": headline(card),
        "tiles": _tiles(card),
        "exams": exam_tables(card),
        "samples": [
            (f"{when.title()} {STAGE_TITLES[stage]}", card["samples"][stage][when], when == "before")
            for stage in reversed(STAGE_TITLES)
            if stage in card.get("samples", {})
            for when in ("after", "before")
        ],
        "pictures": pictures,
        "tables": [
            table for table in (_rl(card), _training(card), _data(card), _time(card), _machine(card)) if table.rows
        ],
        "settings": [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in card["config"].items()],
    }
    env = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=lambda name: name == "report.html.j2",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"plain": plain, "code": code}
    text = env.get_template("report.md.j2").render(values)
    page = env.get_template("report.html.j2").render(values)
    return re.sub("\n{3,}", "\n\n", text).strip() + "\n", CONTROL.sub("\ufffd", page)


def plain(text: str) -> str:
    """Return one line of Markdown in which nothing is markup."""
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", " ".join(re.split("[\r\n]", text)))


def code(text: str) -> str:
    """Return inline code around any text: more backticks than the text holds in a row."""
    text = " ".join(text.splitlines())
    if "`" not in text:
        return f"`{text}`" if text else ""
    fence = "`" * (1 + max(len(run) for run in re.findall("`+", text)))
    return f"{fence} {text} {fence}"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as plain text, the first row its head; columns but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _pictures(card: Card) -> Iterator[tuple[str, str, Any]]:
    """(path inside the run, title, figure) of every picture, drawn from the curves in `report.json`."""
    titles = {"dynamics": "how training went", "rl": "reward, length and pass@k"}
    for stage, points in card["curves"].items():
        for kind in kinds(points):
            figure = draw(points, kind, STAGE_TITLES[stage])
            yield f"plots/{stage}_{kind}.png", f"{STAGE_TITLES[stage]}: {titles.get(kind, kind)}", figure


def _data_uri(figure: Any) -> str:
    file = io.BytesIO()
    save(figure, file, svg=True)
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def headline(card: Card) -> str:
    """Return what the model is and what it can do, in a few sentences; "" before it is trained."""
    train, model = card["pretrain"], card["model"]
    if origin := card.get("imported"):
        return (
            f"The weights were imported from {origin['from']} ({origin['format']}). What they were trained on is not "
            "known here: they may have seen the held-out text and the exams."
        )
    if not train:
        return ""
    machine = next(group["value"] for group in card["machines"] if "pretrain" in group["stages"])
    text = (
        f"{'A chat model' if card['sft'] else 'A model'} of {count(train['parameters'])} parameters ({model['depth']} "
        f"layers, width {model['width']}), trained from raw text in {duration(card['seconds_total'])} on "
        f"{_device(machine)}."
    )
    text += "" if card["sft"] else " It continues a text; it was not taught to answer."
    if base := card["exams"].get("base", {}).get("bits_per_byte"):
        text += f" Held-out text: {bits(base, 3)} bits per byte."
    exams = [f"{_title(card, name)} {share:.1%}" for name, share in _latest(card).items()]
    return text + (f" Exams: {', '.join(exams)}." if exams else "")


def _tiles(card: Card) -> list[tuple[str, str]]:
    """The figures that a reader wants first: (name, value)."""
    if not card["pretrain"] or card.get("imported"):
        return []
    tiles = [
        ("parameters", count(card["pretrain"]["parameters"])),
        ("wall clock", duration(card["seconds_total"])),
        ("cost", money(card["cost"]["usd"])),
    ]
    if base := card["exams"].get("base", {}).get("bits_per_byte"):
        tiles.append(("bits per byte", bits(base, 3)))
    for key, title in (("core", "CORE"), ("chatcore", "ChatCORE")):
        tiles += [(title, f"{s[key]:.4f}") for s in card["standing"].values() if s.get(key) is not None][-1:]
    tiles += [(_title(card, name), f"{share:.1%}") for name, share in _latest(card).items()]
    return tiles[:MOST_TILES]


def _latest(card: Card) -> dict[str, float]:
    """Accuracy of every exam by the last stage that sat it."""
    stages = (_sat(card, stage) for stage in STAGE_TITLES)
    return {name: task["accuracy"] for tasks in stages for name, task in tasks.items() if "accuracy" in task}


# Exams


def exam_tables(card: Card) -> list[Table]:
    """Return the table BASE / SFT / RL and those behind single scores; none before the first evaluation."""
    stages = [stage for stage in STAGE_TITLES if stage in card["exams"]]
    if not stages:
        return []
    head = ["exam", *(STAGE_TITLES[stage] for stage in stages), "chance", "cases"]
    first = Table("Exams", head, list(_exam_rows(card, stages)), _note(card, stages))
    return [first, *_not_run(card), *_core(card, stages), *_groups(card, stages), *_overlap(card)]


def exam_table(card: Card) -> str:
    """Return the table BASE / SFT / RL as plain text."""

    def words(cell: Cell) -> str:
        if isinstance(cell, str):
            return cell
        return cell["text"] + (f" ({cell['note'].replace(' to ', '..')})" if cell["note"] else "")

    table = exam_tables(card)[0]
    return text_table([table.head, *([words(cell) for cell in row] for row in table.rows)])


def _sat(card: Card, stage: str) -> dict[str, Scores]:
    """The scores of a stage by exam, bits per byte and CORE first."""
    tasks = {name: task for name, task in card["exams"].get(stage, {}).items() if "metric" in task}
    return dict(sorted(tasks.items(), key=lambda item: item[0] not in ("bits_per_byte", *CORE)))


def _title(card: Card, name: str) -> str:
    """The title that the exam's task had when it was scored; older records have none."""
    titles = (tasks[name]["title"] for tasks in card["exams"].values() if "title" in tasks.get(name, ()))
    return next(titles, "CORE" if name == "core" else name.replace("_", " "))


def _exam_rows(card: Card, stages: Sequence[str]) -> Iterator[list[Cell]]:
    scores = {stage: _sat(card, stage) for stage in stages}
    for name in dict.fromkeys(name for stage in stages for name in scores[stage]):
        parts = [_parts(_title(card, name), scores[stage].get(name)) for stage in stages]
        for label in dict.fromkeys(label for part in parts for label in part):
            tasks = [part.get(label) for part in parts]
            yield [label, *map(_score, tasks), _chance(tasks), _cases(tasks)]
    chat = [card["standing"].get(stage, {}).get("chatcore") for stage in stages]
    if any(value is not None for value in chat):
        yield ["ChatCORE", *("-" if v is None else f"{v:.4f}" for v in chat), "0", "-"]


def _parts(title: str, task: Scores | None) -> dict[str, Scores]:
    """An exam's scores by the label of their row; of pass@k the powers of 2 and the last."""
    if task is None:
        return {}
    parts = {title: task}
    if "perplexity" in task:
        parts["perplexity"] = {"shown": f"{task['perplexity']:.1f}", "n": task["n"]}
    if "conversations" in task:
        parts[f"{title}, conversations"] = task["conversations"]
    parts |= {f"{title}, read as {name}": scores for name, scores in task.get("readings", {}).items()}
    passes = list(task.get("pass_at_k", {}).items())
    chosen = (item for i, item in enumerate(passes, 1) if i & (i - 1) == 0 or i == len(passes))
    return parts | {f"{title}, {name}": scores for name, scores in chosen}


def _score(task: Scores | None) -> Cell:
    """A score as text; with its interval in words and as numbers for a picture where it is an accuracy."""
    if task is None:
        return "-"
    if "shown" in task:
        return str(task["shown"])
    if "bits_per_byte" in task:
        return bits(task)
    form = ".1%" if "accuracy" in task else ".4f"
    low, high = task.get("interval") or (None, None)
    note = "" if low is None else f"{low:{form}} to {high:{form}}"
    cell = {"text": f"{task['metric']:{form}}", "note": note, "share": None}
    if "accuracy" in task:
        share = task["metric"]
        cell |= {"share": share, "low": share if low is None else low, "high": share if high is None else high}
        cell |= {"chance": task.get("chance")}
    return cell


def bits(task: Scores, digits: int = 4) -> str:
    """Return bits per byte with the standard error; old records have only its 95 % interval."""
    low, high = task.get("interval") or (None, None)
    error = task.get("se", None if low is None or high is None else (high - low) / (2 * Z95))
    return with_error(task["bits_per_byte"], error, digits)


def _chance(tasks: Sequence[Scores | None]) -> str:
    task = next((task for task in tasks if task and "chance" in task), None)
    if task is None:
        return "-"
    return f"{task['chance']:.0%}" if "accuracy" in task else f"{task['chance']:g}"


def _cases(tasks: Sequence[Scores | None]) -> str:
    """Return the number of questions; by stage where the numbers differ."""
    numbers = [f"{task['n']:,}" for task in tasks if task and "n" in task]
    return numbers[0] if len(set(numbers)) == 1 else " / ".join(numbers) or "-"


def _note(card: Card, stages: Sequence[str]) -> str:
    text = (
        "In brackets: 95 % intervals (Wilson's for shares). Bits per byte (± standard error) and perplexity: lower is "
        "better; their cases are rows of text that no stage trained on."
    )
    tasks = [task for stage in stages for task in _sat(card, stage).values()]
    if any(name in _sat(card, stage) for stage in stages for name in CORE):
        text += " CORE: 0 is guessing and 1 is all right; a mean of fewer than all its tasks is no CORE."
    for key, words in (
        ("too_long", "questions were longer than the context and counted as wrong"),
        ("damaged", "questions were left out because their data is damaged"),
        ("endless", "answers were truncated at the greatest length"),
        ("cropped", "prompts lost their beginning because they were longer than the context"),
    ):
        number = sum(t.get(key, 0) for t in [*tasks, *(g for t in tasks for g in t.get("groups", {}).values())])
        text += f" {number:,} {words}." if number else ""
    levels = {str(task["facts"]["sandbox"]) for task in tasks if "sandbox" in task.get("facts", {})}
    return text + "".join(f" Sandbox of the model's code: {level}." for level in sorted(levels))


def _not_run(card: Card) -> list[Table]:
    """The exams that could not be asked, with the reason."""
    rows: dict[tuple[str, str], list[str]] = {}
    for stage, title in STAGE_TITLES.items():
        for name, reason in card["standing"].get(stage, {}).get("not_run", {}).items():
            rows.setdefault((name, reason), []).append(title)
    cells = [[name, ", ".join(titles), reason] for (name, reason), titles in rows.items()]
    return [Table("Not run", ["exam", "stage", "reason"], cells, labels=3)] if cells else []


def _core(card: Card, stages: Sequence[str]) -> list[Table]:
    """CORE's tasks with their accuracies centred on guessing."""
    for stage in stages:
        for name in CORE:
            rows = [
                [
                    label, f"{t.get('shots', '-')}", _score(t), f"{round(100 * t.get('chance', 0.0), 1):g}%",
                    f"{t['centred']:.4f}", f"{t['n']:,}",
                ]
                for label, t in card["exams"][stage].get(name, {}).get("groups", {}).items()
            ]  # fmt: skip
            if rows:
                head = ["task", "shots", STAGE_TITLES[stage], "guessing", "centred", "cases"]
                return [Table(f"{_title(card, name)}, task by task", head, rows)]
    return []


def _groups(card: Card, stages: Sequence[str]) -> list[Table]:
    """The exams by kind of question; exams of many kinds, as MMLU, each in a table of their own."""
    scores, titles = [_sat(card, stage) for stage in stages], [STAGE_TITLES[stage] for stage in stages]
    kinds: list[list[Cell]] = []
    tables = []
    for exam in dict.fromkeys(name for tasks in scores for name in tasks if name not in CORE):
        groups = [tasks.get(exam, {}).get("groups", {}) for tasks in scores]
        rows: list[list[Cell]] = []
        for name in dict.fromkeys(name for group in groups for name in group):
            tasks = [group.get(name) for group in groups]
            rows.append([_title(card, exam), name, *map(_score, tasks), _cases(tasks)])
        if len(rows) <= LONG:
            kinds += rows
        else:
            kind = str(rows[0][1]).partition(":")[0]
            rows = [[str(name).partition(": ")[2].replace("_", " "), *cells] for _, name, *cells in rows]
            tables.append(Table(f"{_title(card, exam)} by {kind}", [kind, *titles, "cases"], rows, folded=True))
    first = [Table("By kind of question", ["exam", "kind", *titles, "cases"], kinds, labels=2)] if kinds else []
    return first + tables


def _overlap(card: Card) -> list[Table]:
    """Return the tables of contamination: exam text that is in the training text."""
    found, title = card.get("overlap") or {}, "Exam text in the pretraining text"
    if "reason" in found:
        return [Table(title, [], [], f"Not looked up: {found['reason']}")]
    if not found.get("exams"):
        return []
    words, rows = found["words"], []
    for name, exam in found["exams"].items():
        if "reason" in exam:
            rows.append([name, "-", "-", "-", "-"])
            continue
        shares = [f"{exam[key]:.1%}" if exam["looked_up"] else "-" for key in ("share", "gram_share")]
        rows.append([name, f"{exam['looked_up']:,} of {exam['questions']:,}", *shares, f"{exam['grams']:,}"])
    head = ["exam", "questions looked up", "with a match", f"{words}-grams found", f"{words}-grams"]
    share = f", {found['document_share']:.1%} of it" if found.get("document_share") is not None else ""
    note = (
        f"A match: {words} words in a row, in lower case and without punctuation, that a training document has, too. "
        f"Questions of fewer words cannot be looked up. Searched: {found['documents']:,} documents of the pretraining "
        f"text{share} ({card['data']['source']})."
    )
    note += "".join(f" {name}: {exam['reason']}." for name, exam in found["exams"].items() if "reason" in exam)
    return [Table(title, head, rows, note)]


# The other tables


def _rl(card: Card) -> Table:
    names = {"right": "accuracy", "length": "tokens per answer", "endless": "truncated",
             "kl": "KL to the start, nats per token"}  # fmt: skip
    rows = [
        [names.get(name, name), f"{f['first']:.4g}", f"{f['last']:.4g}", f"{f['best']:.4g}", f"{f['values']:,}"]
        for name, f in card["rl_progress"].items()
    ]
    note = "First and last: means over a tenth of the steps; of pass@k and KL the evaluations before and after."
    return Table("Reinforcement learning", ["", "first", "last", "greatest", "measured"], rows, note)


def _training(card: Card) -> Table:
    train, sft, rl, rows = card["pretrain"], card["sft"], card["rl"], []
    if train:
        rows += [
            ["parameters", f"{train['parameters']:,} ({train['scaling_parameters']:,} in products)"],
            ["pretraining FLOPs", f"{train['flops']:.3g} ({train['flops_per_token']:,} per token)"],
        ]
    if sft:
        packed, counts = sft["train"], sft["conversations"].items()
        rows += [
            ["SFT conversations", ", ".join(f"{name} ({number:,})" for name, number in counts)],
            [
                "SFT rows",
                f"{packed['rows']:,}, {packed['fill']:.1%} filled; {packed['cut']:,} conversations cut at a turn",
            ],
        ]
    rows += [[f"RL {key}", str(rl[key])] for key in ("environment", "questions") if key in rl]
    for stage, name, facts in (("base", "pretraining", train), ("sft", "SFT", sft), ("rl", "RL", rl)):
        if stage in card["speed"] and "tokens" in facts:
            rows += [
                [f"{name} tokens", f"{facts['tokens']:,} in {card['speed'][stage]['steps']:,} steps"],
                [f"{name} speed", _speed(card["speed"][stage])],
                [f"{name}, steps skipped", f"{facts.get('bad_steps', 0):,}"],
                [f"{name} parameters' SHA-256", facts["params_sha256"]],
            ]
    return Table("Training", [], rows)


def _data(card: Card) -> Table:
    """The text, how it was packed, how much of it was used, and how much of it the model has memorized."""
    data = card["data"]
    rows = [["source", str(data["source"])]]
    for split, title in (("train", "training text"), ("val", "held-out text")):
        if split not in data:
            continue
        d = data[split]
        duplicates = f" ({d['duplicates']:,} duplicates found)" if d.get("duplicates") else ""
        lost = d.get("lost", 0)
        left = f"{lost:,} tokens ({lost / max(1, d['tokens']):.1%}) left out" if lost else "nothing left out"
        rows += [
            [title, f"{d['documents']:,} documents{duplicates}, {d['bytes']:,} bytes, {d['tokens']:,} tokens"],
            [f"{title}, packed", f"{d['rows']:,} rows, {d['fill']:.2%} filled, {d['cuts']:,} cuts, {left}"],
        ]
        for part in d.get("sources", []) if len(d.get("sources", [])) > 1 else []:
            rows.append([f"{title}, {part['weight']:.1%} from", f"{part['source']}: {part['rows']:,} rows"])
    if card["corpus_share"] is not None:
        rows.append(["training text used", f"{card['corpus_share']:.1%} ({card['pretrain']['epochs']:.2f} epochs)"])
    if found := card["copied"]:
        text = (
            f"{found['share']:.1%} of {found['texts']} texts that BASE wrote is in passages of {LONG_PASSAGE} bytes or "
            f"more from the training text; the longest has {found['longest']:,} characters; {found['documents']:,} "
            "documents searched"
        )
        rows.append(["memorized", text])
        rows += [["that passage", found["passage"][:PASSAGE]]] if found["passage"] else []
    if t := card["tokenizer"]:
        how = "trained on the training text" if t["trained"] else "taken as it was"
        size = f"{t['vocab_size']:,} tokens, {t['bytes_per_token']:.2f} bytes per token on held-out text, {how}"
        rows.append(["tokenizer", size])
        for o in card["other_tokenizers"]:
            text = f"{o['vocab_size']:,} tokens, {o['bytes_per_token']:.2f} bytes per token; "
            text += f"ours needs {o['ours_per_token']:.2f} tokens for one of its"
            rows.append([f"the same text in {o['name']}'s tokens", text])
    return Table("Data", [], rows)


def _time(card: Card) -> Table:
    cost = card["cost"]
    rows = [[name, duration(seconds)] for name, seconds in card["seconds"].items()]
    rows.append(["total", duration(card["seconds_total"])])
    if not cost["prices"]:
        return Table("Time", ["stage", "wall clock"], rows)
    usd = [*(money(cost["stages"].get(name)) for name in card["seconds"]), money(cost["usd"])]
    prices = ", ".join(f"{price:g} USD for {name}" for name, price in cost["prices"].items())
    note = f"Cost: devices x hours x price, {cost['assumption']}: {prices}."
    rows = [[*row, dollars] for row, dollars in zip(rows, usd, strict=True)]
    return Table("Time", ["stage", "wall clock", "USD"], rows, note)


def _machine(card: Card) -> Table:
    size, peak = card["code"], card["peak_memory_bytes"]
    lines = f"{size['files']:,} files, {size['lines']:,} lines ({size['code_lines']:,} without comments)"
    rows = [
        ["hardware", _by_stage(card["machines"], _device)],
        ["cost", card["cost"]["words"]],
        ["peak memory", f"{peak / 2**30:.2f} GiB" if peak else "-"],
        ["versions", _by_stage(card["versions"], lambda found: ", ".join(f"{k} {v}" for k, v in found.items()))],
        ["commit", _by_stage(card["commits"], lambda commit: commit or "-")],
        ["code", f"{lines}, {size['dependencies']} dependencies"],
        ["finished", card["date"] or "-"],
    ]
    return Table("Machine and code", [], rows)


def _by_stage(groups: list[dict[str, Any]], show: Any) -> str:
    """One value where all stages share it; else each with its stages."""
    if len(groups) == 1:
        return show(groups[0]["value"])
    return "; ".join(f"{show(group['value'])} ({', '.join(group['stages'])})" for group in groups) or "-"


def _device(hardware: dict[str, Any]) -> str:
    hosts = f" on {hardware['hosts']} hosts" if hardware["hosts"] > 1 else ""
    if hardware["platform"] == "cpu":
        return f"{hardware['cpu_cores']} CPU cores ({hardware['device']}){hosts}"
    return f"{hardware['devices']} x {hardware['device']}{hosts}"


def _speed(speed: dict[str, Any]) -> str:
    mfu = f", MFU {speed['mfu']:.1%}" if speed["mfu"] is not None else ""
    step = f"a step {speed['step_seconds']:.3g} s"
    if speed["tokens_per_second"] is None:
        return f"{step} (median), the first one {speed['first_step_seconds']:.3g} s"
    return (
        f"{speed['tokens_per_second']:,.0f} tokens/s{mfu}, {step} (medians); "
        f"{speed['mean_tokens_per_second']:,.0f} tokens/s with the first step of {speed['first_step_seconds']:.3g} s"
    )


def money(usd: float | None) -> str:
    """Return a cost in words."""
    if usd is None:
        return "not known"
    return f"{usd:,.2f} USD" if usd else "nothing"


def count(number: int) -> str:
    """Return a number in words: 4.9 million."""
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def duration(seconds: float) -> str:
    """Return a time in words: days and hours, hours and minutes, minutes and seconds, or seconds."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


def summarize(run: RunDir, left: Sequence[str]) -> None:
    """Say at the end of a command what the model can do, where everything is, and what to do next.

    `left`: the stages that this configuration has and that are not done.
    """
    root = shlex.quote(str(run.root))
    rows = []
    if run.report.exists() and "report" not in left:
        say(f"\n{headline(read_json(run.root / 'report.json'))}\n")
        rows.append(("report card", f"{run.report}, as one page {run.root / 'report.html'}"))
    exports = sorted(str(path) for path in run.export.glob("[!.]*/"))
    if exports and "export" not in left:
        rows.append(("for others", ", ".join(exports)))
    if run.records().get("pretrain", {}).get("status") == "done":
        rows += [("talk to it", f"python launch.py chat {root}"), ("on a page", f"python launch.py serve {root}")]
    if left:
        rows.append(("go on", f"python launch.py --run-dir {root}   (next: {left[0]})"))
    for name, text in rows:
        say(f"{name:<12} {text}")


if __name__ == "__main__":
    write_cards(RunDir(sys.argv[1]), read_json(Path(sys.argv[1]) / "report.json"))
