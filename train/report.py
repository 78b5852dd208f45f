"""The report card: `report.json` with every number, and from it alone `report.md` and `report.html`.

`python -m train.report RUN` renders the two again from the `report.json` of a run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jaxchat import PACKAGE, ROOT
from jaxchat.config import Config, flatten
from jaxchat.errors import command_line
from jaxchat.log import read_metrics, say
from jaxchat.run_dir import TRAINED, RunDir, atomic_write, read_json, write_json
from jaxchat.tasks.core import CORE_TASKS

from .contamination import LONG_PASSAGE, exam_contamination
from .curves import RL_FIGURES, curves, draw, kinds, rl_figures
from .loop import Z95, with_error
from .prepare import other_tokenizers
from .targets import run_cost, wall_clock

FORMAT = 1  # of `report.json`
STAGES = tuple(TRAINED)  # names of folders and, in capitals, of columns
MODEL_KEYS = ("recipe", "depth", "width", "n_heads", "n_kv_heads", "head_width", "seq_len", "vocab_size")
PRIVATE = ("serve.",)  # a card is published; these keys hold addresses and API keys
CORE = ("core", "core_partial")
LONG = 20  # groups of an exam above which they have a folded table of their own
TILES = 8  # at most
PASSAGE = 300  # characters of a memorized passage that are shown
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # forbidden in a page; a sample may hold them

Card = dict[str, Any]  # what report.json holds
Scores = dict[str, Any]  # of one exam, as in eval/<stage>.json
Cell = str | dict[str, Any]  # text, or what `score_cell` returns
Row = list[Cell]
Picture = tuple[str, str, bytes]  # path inside the run, title, PNG
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
    return {"digest": hashlib.sha256(write_cards(run, card).encode()).hexdigest()}


def write_cards(run: RunDir, card: Card) -> str:
    """Write the pictures, `report.md` and `report.html`; returns the Markdown."""
    pictures = _pictures(card)
    run.plots.mkdir(parents=True, exist_ok=True)
    for path, _, data in pictures:
        atomic_write(run.root / path, data)
    text, page = render(card, pictures)
    atomic_write(run.report, text)
    atomic_write(run.root / "report.html", page)
    say(f"  {run.report}, and the same as one page: {run.root / 'report.html'}")
    return text


# The numbers


def collect(config: Config, run: RunDir) -> Card:
    """Return every number of the card, from the records of the run; what does not exist is left out."""
    metrics = {stage: steps for stage in STAGES if (steps := read_metrics(run.stage(stage) / "metrics.jsonl"))}
    done = {name: r for name, r in run.records().items() if r["status"] == "done"}
    records = {name: r for name, r in done.items() if name not in ("report", "export") and "imported" not in r}
    exams = {stage: read_json(run.eval(stage)) for stage in STAGES if run.eval(stage).exists()}
    samples = {stage: path for stage in STAGES if (path := run.stage(stage) / "samples.json").exists()}
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
        "warnings": warnings_of(records),
        "imported": done.get("pretrain", {}).get("imported"),
        "extended": done.get("pretrain", {}).get("extended", []),
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
        "samples": {stage: read_json(path) for stage, path in samples.items()},
        "curves": points,
        "plots": {stage: [f"plots/{stage}_{kind}.png" for kind in kinds(p)] for stage, p in points.items() if kinds(p)},
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
        "peak_memory_bytes": max((r.get("peak_rss_bytes") or 0 for r in records.values()), default=0),
        "code": code_size(),
    }


def warnings_of(records: dict[str, Any]) -> list[str]:
    """Return the warnings of all stages: figures of a run that has some mean less than they seem to."""
    return [f"{name}: {line}" for name, r in records.items() for line in r["facts"].get("warnings", [])]


def standing(record: dict[str, Any]) -> dict[str, Any]:
    """Return what an evaluation says beside the exams: CORE or the part of it, ChatCORE, and what was not run."""
    partial = record.get("core_partial")
    return {
        "core": record.get("core"),
        "core_partial": partial and {"mean": partial["metric"], "tasks": partial["tasks"], "of": len(CORE_TASKS)},
        "chatcore": record.get("chatcore"),
        "not_run": record.get("not_run", {}),
    }


def _alike(records: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return [{"stages": [...], "value": ...}], stages with the same value together."""
    groups: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        group = groups.setdefault(json.dumps(record[key]), {"stages": [], "value": record[key]})
        group["stages"].append(name)
    return list(groups.values())


def speed(steps: Steps) -> dict[str, Any]:
    """Return medians over the steps, and the mean with compiling; null where the metrics do not say it."""

    def middle(key: str) -> float | None:
        known = [r[key] for r in steps if r.get(key) is not None]
        return median(known) if known else None

    return {
        "steps": len(steps),
        "tokens_per_second": middle("tokens_per_second"),
        "mean_tokens_per_second": steps[-1]["tokens"] / max(sum(r["step_seconds"] for r in steps), 1e-9),
        "step_seconds": middle("step_seconds"),
        "first_step_seconds": steps[0]["step_seconds"],
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
    """Return files and lines of the product, and its dependencies."""
    files = [ROOT / "launch.py", *(p for part in (PACKAGE, ROOT / "train", ROOT / "serve") for p in part.rglob("*.py"))]
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {
        "files": len(files),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files),
        "dependencies": sum(line.strip() != "" and line[0] != "#" for line in requirements),
    }


# The two cards


def render(card: Card, pictures: Sequence[Picture] | None = None) -> tuple[str, str]:
    """Return the card as Markdown and as an HTML page; `pictures` are drawn where they are not given.

    All text of the run is escaped. The page has no script and fetches nothing.
    """
    pictures = _pictures(card) if pictures is None else pictures
    uris = [(path, title, "data:image/png;base64," + base64.b64encode(png).decode()) for path, title, png in pictures]
    values = {
        "title": f"Report card: {card['tier']}",
        "headline": headline(card),
        "warnings": card.get("warnings", []),
        "tiles": tiles(card),
        "exams": exam_tables(card),
        "samples": card.get("samples", {}),
        "pictures": uris,
        "tables": [table for table in (_rl(card), _stages(card), _data(card), _facts(card)) if table.rows],
    }
    markdown, html = (page(kind, card["config"], **values) for kind in ("md", "html"))
    return re.sub("\n{3,}", "\n\n", markdown).strip() + "\n", html


def page(kind: str, config: dict[str, Any], **values: Any) -> str:
    """Return the card's template as "md" or "html", filled with values; parts without one are left out."""
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    env = Environment(loader=loader, autoescape=kind == "html", undefined=StrictUndefined)
    env.trim_blocks = env.lstrip_blocks = True
    env.filters |= {"words": words, "plain": plain, "code": code}
    empty = dict.fromkeys(("warnings", "tiles", "exams", "samples", "pictures", "tables"), ())
    settings = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in config.items()]
    text = env.get_template("card.j2").render(empty | values, settings=settings, kind=f"{kind}.j2")
    return CONTROL.sub("\ufffd", text.lstrip()) if kind == "html" else text


def words(cell: Cell) -> str:
    """Return a cell as text: a score with its interval in brackets."""
    if isinstance(cell, str):
        return cell
    return f"{cell['text']} ({cell['note']})" if cell["note"] else cell["text"]


def text_table(rows: Sequence[Sequence[Cell]]) -> str:
    """Return rows as plain text, the first one the head; all columns but the first to the right."""
    texts = [[words(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ([f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in texts)
    return "\n".join("  ".join(line).rstrip() for line in lines)


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


def _pictures(card: Card) -> list[Picture]:
    """Return every picture, drawn from the curves in `report.json`."""
    titles, pictures = {"dynamics": "how training went", "rl": "reward, length and pass@k"}, []
    for stage, points in card["curves"].items():
        for kind in kinds(points):
            title, data = f"{stage.upper()}: {titles.get(kind, kind)}", io.BytesIO()
            draw(points, kind, title).savefig(data)
            pictures.append((f"plots/{stage}_{kind}.png", title, data.getvalue()))
    return pictures


def headline(card: Card) -> str:
    """Return what the model is, in a few sentences; "" before it is trained."""
    train, model = card["pretrain"], card["model"]
    if (origin := card.get("imported")) and origin["format"] == "jaxchat":
        return f"Fine-tuned from {origin_text(origin)}, whose report card says what that was trained on."
    if origin:
        return (
            f"The weights were imported from {origin['from']} ({origin['format']}). What they were trained on is not "
            "known here: they may have seen the held-out text and the exams."
        )
    if not train:
        return ""
    machine = next(group["value"] for group in card["machines"] if "pretrain" in group["stages"])
    source = f"the weights of {origin_text(train['init'])}" if "init" in train else "raw text"
    kind, ending = ("A chat model", "") if card["sft"] else ("A model", " It was not taught to answer.")
    return (
        f"{kind} of {count(train['parameters'])} parameters ({model['depth']} layers, width {model['width']}), trained "
        f"from {source} in {duration(card['seconds_total'])} on {_device(machine)}.{ending}"
    )


def origin_text(origin: dict[str, Any]) -> str:
    """Return where weights came from: the name of the run or folder, its format, the stage."""
    return f"{origin['from']} ({origin['format']}{f', stage {stage}' if (stage := origin.get('stage')) else ''})"


def tiles(card: Card) -> list[tuple[str, str]]:
    """Return the figures that a reader wants first: (name, value); of an exam by the last stage that took it."""
    if not card["pretrain"] or card.get("imported"):
        return []
    size, time = count(card["pretrain"]["parameters"]), duration(card["seconds_total"])
    scores: dict[str, tuple[str, str]] = {}
    for stage in STAGES:
        for name, task in _taken(card, stage).items():
            if name != "core_partial" and (name != "bits_per_byte" or stage == "base"):
                scores[name] = _title(card, name) + next(iter(_parts(task))), score_cell(task)["text"]
    first = sorted(scores, key=lambda name: name not in ("bits_per_byte", "core", "chatcore"))
    costs = [("parameters", size), ("wall clock", time), ("cost", money(card["cost"]["usd"]))]
    return [*costs, *(scores[name] for name in first)][:TILES]


# Exams


def exam_tables(card: Card) -> list[Table]:
    """Return the table BASE / SFT / RL and those behind single scores; none before the first evaluation."""
    stages = [stage for stage in STAGES if stage in card["exams"]]
    titles, taken = [stage.upper() for stage in stages], [_taken(card, stage) for stage in stages]
    rows, kinds, tables = list[Row](), list[Row](), list[Table]()
    for name in _union(taken):
        title, tasks = _title(card, name), [tasks.get(name, {}) for tasks in taken]
        parts = [_parts(task) for task in tasks]
        rows += [[title + part, *_cells([p.get(part) for p in parts])] for part in _union(parts)]
        groups = [task.get("groups", {}) for task in tasks]
        own: list[Row] = [
            ["core" if name in CORE else title, label.replace("_", " "), *_cells([g.get(label) for g in groups])]
            for label in _union(groups)
        ]
        if len(own) > LONG:
            tables.append(
                _scores(f"{own[0][0]} by kind of question", ["kind"], titles, [row[1:] for row in own], folded=True)
            )
        else:
            kinds += own
    if not rows:
        return []
    reasons = [
        [name, stage.upper(), reason]
        for stage in stages
        for name, reason in card["standing"].get(stage, {}).get("not_run", {}).items()
    ]
    return [
        _scores("Exams", ["exam"], titles, rows, note=_note(card)),
        *([Table("Not run", ["exam", "stage", "reason"], reasons, labels=3)] if reasons else []),
        *([_scores("By kind of question", ["exam", "kind"], titles, kinds)] if kinds else []),
        *tables,
        *_contamination(card),
    ]


def _scores(title: str, labels: list[str], stages: list[str], rows: list[Row], **settings: Any) -> Table:
    """Return a table of scores without the stages that have none."""
    head = [*labels, *stages, "chance", "cases"]
    used = [i for i in range(len(head)) if any(row[i] != "-" for row in rows)]
    rows = [[row[i] for i in used] for row in rows]
    return Table(title, [head[i] for i in used], rows, labels=len(labels), **settings)


def _union(dictionaries: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(key for keys in dictionaries for key in keys))


def _taken(card: Card, stage: str) -> dict[str, Scores]:
    """Return the scores of a stage by exam, bits per byte and CORE first, ChatCORE last."""
    tasks, mean = card["exams"].get(stage, {}), card["standing"].get(stage, {}).get("chatcore")
    tasks = dict(sorted(tasks.items(), key=lambda item: item[0] not in ("bits_per_byte", *CORE)))
    return tasks | ({} if mean is None else {"chatcore": {"title": "ChatCORE", "metric": mean, "chance": 0.0}})


def _title(card: Card, name: str) -> str:
    """Return the title that the exam's task had when it was scored; older records have none."""
    titles = (tasks[name]["title"] for tasks in card["exams"].values() if "title" in tasks.get(name, ()))
    return next(titles, {"core": "CORE", "chatcore": "ChatCORE"}.get(name, name.replace("_", " ")))


def _parts(task: Scores) -> dict[str, Scores]:
    """Return an exam's scores by what its row adds to its title; of pass@k the powers of 2."""
    passes = {f", {name}": s for k, (name, s) in enumerate(task.get("pass_at_k", {}).items(), 1) if k & (k - 1) == 0}
    readings = {f", read as {name}": scores for name, scores in task.get("readings", {}).items()}
    parts = {f", {name}": figure for name, figure in task.get("figures", {}).items()} or ({"": task} if task else {})
    if "perplexity" in task:
        parts[", perplexity"] = {"metric": task["perplexity"], "n": task["n"], "form": ".1f"}
    if "conversations" in task:
        parts[", conversations"] = task["conversations"]
    return parts | readings | passes


def _cells(tasks: Sequence[Scores | None]) -> Row:
    """Return every stage's score, the score of guessing, and the number of cases (of each where they differ)."""
    known = [task for task in tasks if task]
    chances = (
        f"{t['chance']:.3g}" if "accuracy" not in t else f"{100 * t['chance']:.3g}%" for t in known if "chance" in t
    )
    cases = " / ".join(dict.fromkeys(f"{task['n']:,}" for task in known if "n" in task))
    return [*("-" if task is None else score_cell(task) for task in tasks), next(chances, "-"), cases or "-"]


def score_cell(task: Scores) -> dict[str, Any]:
    """Return a score as text with a note; with its interval as numbers for a picture where it is an accuracy."""
    interval = task.get("interval")
    if "bits_per_byte" in task:  # older records have no standard error
        error = task.get("se", (interval[1] - interval[0]) / (2 * Z95) if interval else None)
        return {"text": with_error(task["bits_per_byte"], error), "note": ""}
    share, form = task["metric"], task.get("form", ".1%" if "accuracy" in task else ".4f")
    low, high = interval or (share, share)
    notes = [f"{low:{form}} to {high:{form}}"] if interval else []
    notes += [f"centred {task['centred']:.4f}"] if "centred" in task else []
    bar = {"share": share, "low": low, "high": high, "chance": task.get("chance")} if "accuracy" in task else {}
    return {"text": f"{share:{form}}", "note": ", ".join(notes)} | bar


def _note(card: Card) -> str:
    text = (
        "In brackets: 95 % intervals (Wilson's for shares). Bits per byte (± standard error) and perplexity: lower is "
        "better; their cases are rows of text that no stage trained on."
    )
    exams = [item for tasks in card["exams"].values() for item in tasks.items()]
    if any(name in CORE for name, _ in exams):
        text += " CORE: 0 is guessing and 1 is all right; a mean of fewer than all its tasks is no CORE."
    for key, what in (
        ("too_long", "questions were longer than the context and counted as wrong"),
        ("endless", "answers were truncated at the greatest length"),
        ("cropped", "prompts lost their beginning because they were longer than the context"),
    ):
        number = sum(t.get(key, 0) for _, task in exams for t in (task, *task.get("groups", {}).values()))
        text += f" {number:,} {what}." if number else ""
    levels = {str(task["facts"]["sandbox"]) for _, task in exams if "sandbox" in task.get("facts", {})}
    return text + "".join(f" Sandbox of the model's code: {level}." for level in sorted(levels))


def _contamination(card: Card) -> list[Table]:
    """Return the table of exam text that is in the training text."""
    found, title = card.get("overlap") or {}, "Exam text in the pretraining text"
    if "reason" in found:
        return [Table(title, [], [], f"Not looked up: {found['reason']}")]
    if not found.get("exams"):
        return []
    size, rows, reasons = found["words"], list[Row](), ""
    for name, exam in found["exams"].items():
        if "reason" in exam:
            reasons += f" {name}: {exam['reason']}."
            continue
        share = f"{exam['share']:.1%}" if exam["looked_up"] else "-"
        rows.append([name, f"{exam['looked_up']:,} of {exam['questions']:,}", share])
    head = ["exam", "questions looked up", "with a match"]
    share = f", {found['document_share']:.1%} of it" if found.get("document_share") is not None else ""
    note = (
        f"A match: {size} words in a row, in lower case and without punctuation, that a training document has, too. "
        f"Questions of fewer words cannot be looked up. Searched: {found['documents']:,} documents of the pretraining "
        f"text{share} ({card['data']['source']}).{reasons}"
    )
    return [Table(title, head, rows, note)]


# The other tables


def _rl(card: Card) -> Table:
    rows = [
        [RL_FIGURES.get(name, name), f"{f['first']:.4g}", f"{f['last']:.4g}", f"{f['best']:.4g}", f"{f['values']:,}"]
        for name, f in card["rl_progress"].items()
    ]
    note = "First and last: means over a tenth of the steps; of pass@k, KL and held-out pairs the evaluations "
    note += "before and after."
    return Table("Reinforcement learning", ["", "first", "last", "greatest", "measured"], rows, note)


def _stages(card: Card) -> Table:
    """Return time, cost and speed of every stage."""
    cost, rows = card["cost"], list[Row]()
    speeds = {TRAINED[folder]: speed for folder, speed in card["speed"].items()}
    for name, seconds in (card["seconds"] | {"total": card["seconds_total"]}).items():
        usd = money(cost["usd"] if name == "total" else cost["stages"].get(name))
        pace, facts = speeds.get(name), card.get(name, {})
        figures = ["-"] * 6
        if pace and "tokens" in facts:
            median = "-" if pace["tokens_per_second"] is None else f"{pace['tokens_per_second']:,.0f}"
            mfu = "-" if pace["mfu"] is None else f"{pace['mfu']:.1%}"
            step, first = f"{pace['step_seconds']:.3g} s", f"{pace['first_step_seconds']:.3g} s"
            figures = [f"{facts['tokens']:,}", f"{pace['steps']:,}", median, mfu, step, first]
        rows.append([name, duration(seconds), usd, *figures])
    note = "Tokens a second, MFU and step: medians over the steps; the first step includes compiling."
    prices = ", ".join(f"{price:g} USD for {name}" for name, price in cost["prices"].items())
    note += f" Cost: devices x hours x price, {cost['assumption']}: {prices}." if prices else ""
    head = ["stage", "wall clock", "cost", "tokens", "steps", "tokens/s", "MFU", "step", "first step"]
    return Table("Stages", head, rows if card["seconds"] else [], note)


def _data(card: Card) -> Table:
    rows = list[Row]()
    for split, title in (("train", "training text"), ("val", "held-out text")):
        if d := card["data"].get(split):
            counts = [f"{d.get(key, 0):,}" for key in ("documents", "duplicates", "bytes", "tokens", "rows", "cuts")]
            rows.append([title, *counts, f"{d['fill']:.2%}", f"{d.get('lost', 0):,}"])
    head = ["", "documents", "duplicates", "bytes", "tokens", "rows", "cuts", "filled", "tokens left out"]
    return Table("Data", head, rows, f"Source: {card['data']['source']}")


def _facts(card: Card) -> Table:
    """Return the model, what it read, what made it, and how much of the training text it has memorized."""

    def by_stage(key: str, show: Callable[[Any], str]) -> str:
        """Return one value where all stages share it; else each with its stages."""
        groups = [(show(group["value"]), ", ".join(group["stages"])) for group in card[key]]
        return groups[0][0] if len(groups) == 1 else "; ".join(f"{value} ({names})" for value, names in groups) or "-"

    train, sft, rl, size, t = card["pretrain"], card["sft"], card["rl"], card["code"], card["tokenizer"]
    facts = {}
    if train:
        facts["parameters"] = f"{train['parameters']:,} ({train['scaling_parameters']:,} in products)"
        facts["pretraining FLOPs"] = f"{train['flops']:.3g} ({train['flops_per_token']:,} per token)"
        facts["training text used"] = f"{card['corpus_share']:.1%} ({train['epochs']:.2f} epochs)"
    if origin := train.get("init") or card.get("imported"):
        facts["weights to start from"] = origin_text(origin)
        facts["their parameters' SHA-256"] = origin.get("params_sha256", "-")
    for part in card.get("extended", []):
        facts[f"extended after {part['planned']:,} steps"] = f"from step {part['from']:,} on"
    for part in card["data"].get("train", {}).get("sources", []):
        facts[f"{part['weight']:.1%} of it from"] = f"{part['source']}: {part['rows']:,} rows"
    if t:
        how = "trained on the training text" if t["trained"] else "taken as it was"
        facts["tokenizer"] = f"{t['vocab_size']:,} tokens, {t['bytes_per_token']:.2f} bytes per held-out token, {how}"
    for o in card["other_tokenizers"]:
        text = f"{o['vocab_size']:,} tokens, {o['bytes_per_token']:.2f} bytes per token"
        facts[f"{o['name']}'s"] = f"{text}; ours needs {o['ours_per_token']:.2f} tokens for one of its"
    if sft:
        packed, sources = sft["train"], (f"{name} ({number:,})" for name, number in sft["conversations"].items())
        facts["SFT conversations"] = ", ".join(sources)
        if sft.get("left_out"):
            facts["SFT left out"] = "; ".join(f"{name}: {what}" for name, what in sft["left_out"].items())
        facts["SFT rows"] = f"{packed['rows']:,}, {packed['fill']:.1%} filled; {packed['cut']:,} conversations cut"
        if no_target := sft.get("no_target"):
            facts["SFT conversations without an answer inside the context"] = f"{no_target:,}"
    if "environment" in rl:
        facts["RL environment"] = rl["environment"]
    for name, stage in (("pretraining", train), ("SFT", sft), ("RL", rl)):
        if "params_sha256" in stage:
            facts[f"{name}, steps skipped"] = f"{stage.get('bad_steps', 0):,}"
            facts[f"{name}, parameters' SHA-256"] = stage["params_sha256"]
    if found := card["copied"]:
        facts["memorized"] = (
            f"{found['share']:.1%} of {found['texts']} texts that BASE wrote is in passages of {LONG_PASSAGE} bytes or "
            f"more from the training text; the longest has {found['longest']:,} characters; {found['documents']:,} "
            f"documents searched"
        )
        facts["the longest passage"] = found["passage"][:PASSAGE] or "-"
    facts |= {
        "hardware": by_stage("machines", _device),
        "cost": card["cost"]["words"],
        "peak memory": f"{card['peak_memory_bytes'] / 2**30:.2f} GiB",
        "versions": by_stage("versions", lambda found: ", ".join(f"{k} {v}" for k, v in found.items())),
        "commit": by_stage("commits", lambda commit: commit or "-"),
        "code": f"{size['files']:,} files, {size['lines']:,} lines, {size['dependencies']} dependencies",
        "finished": card["date"] or "-",
    }
    return Table("Model and machine", [], list(map(list, facts.items())))


def _device(hardware: dict[str, Any]) -> str:
    hosts = f" on {hardware['hosts']} hosts" if hardware["hosts"] > 1 else ""
    if hardware["platform"] == "cpu":
        return f"{hardware['cpu_cores']} CPU cores ({hardware['device']}){hosts}"
    return f"{hardware['devices']} x {hardware['device']}{hosts}"


def money(usd: float | None) -> str:
    """Return a cost in words."""
    if usd is None:
        return "not known"
    return f"{usd:,.2f} USD" if usd else "nothing"


def count(number: int) -> str:
    """Return a number in words: 4.9 million."""
    units = ((1e9, "billion"), (1e6, "million"))
    return next((f"{number / size:.1f} {unit}" for size, unit in units if number >= size), f"{number:,}")


def duration(seconds: float) -> str:
    """Return a time in words: days and hours, hours and minutes, minutes and seconds, or seconds."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    parts = [(hours // 24, "d"), (hours % 24, "h"), (m, "min"), (s, "s")]
    first = next((i for i, (number, _) in enumerate(parts) if number), 3)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2])


def summarize(run: RunDir, left: Sequence[str]) -> None:
    """Say at the end of a command what the model can do, where everything is, and what to do next.

    `left`: the stages that this configuration has and that are not done.
    """
    if run.report.exists() and "report" not in left:
        card = read_json(run.root / "report.json")
        say(f"\n{headline(card)}\n{', '.join(f'{name} {value}' for name, value in tiles(card))}\n")
        for line in card.get("warnings", []):
            say(f"warning      {line}", style="yellow")
        say(f"report card  {run.report}, as one page {run.root / 'report.html'}")
    exports = sorted(str(path) for path in run.export.glob("[!.]*/"))
    if exports and "export" not in left:
        say(f"for others   {', '.join(exports)}")
    if run.records().get("pretrain", {}).get("status") == "done":
        say(f"talk to it   {command_line('chat', run.root)}")
        say(f"on a page    {command_line('serve', run.root)}")
    if left:
        say(f"go on        {command_line('--run-dir', run.root)}   (next: {left[0]})")


if __name__ == "__main__":
    write_cards(RunDir(sys.argv[1]), read_json(Path(sys.argv[1]) / "report.json"))
