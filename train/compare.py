"""Compare two runs: bits per byte of the same documents, the same questions, settings, speed and cost.

Every difference is the second run minus the first, measured in pairs, with a 95 % interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.config import Config, flatten, load_config
from jaxchat.data.sources import document_hash, iterate_documents
from jaxchat.engine import load_run
from jaxchat.engine.scoring import Scorer, Span
from jaxchat.errors import DataError, UsageError, command_line
from jaxchat.log import progress, read_metrics, say
from jaxchat.run_dir import RunDir, saved_steps
from jaxchat.scaling import resolve
from jaxchat.tasks.speech import FreeAnswers
from jaxchat.tokenizer import Tokenizer

from .loop import Z95, ratio_error
from .report import PRIVATE, STAGES, Table, count, duration, money, speed, text_table, warnings_of
from .targets import run_cost, wall_clock

DOCUMENTS = 1000  # held-out ones at most
BLOCK = 64  # documents tokenized and scored together


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    run: RunDir
    config: Config
    records: dict[str, Any]  # of the stages that are done
    trained: tuple[str, ...]  # stages with a checkpoint


def compare(first: str, second: str, as_json: bool = False) -> dict[str, Any]:
    """Print the comparison of two run directories, as tables or as one JSON object; returns that object.

    Raises `UsageError` for twice the same directory, `DataError` for a directory that is no run and for two runs that
    have nothing in common to compare.
    """
    if Path(first).resolve() == Path(second).resolve():
        raise UsageError(f"compare: {first} and {second} are the same directory; name two runs")
    found = collect(side(first), side(second))
    print(json.dumps(found) if as_json else text(found))
    return found


def side(path: str) -> Side:
    """Return a run directory's own records; `DataError` where it is none, or has neither checkpoints nor exams."""
    run = RunDir(path)
    if not run.config.is_file():
        what = "not a run directory (no config.toml)" if run.root.is_dir() else "no such directory"
        raise DataError(f"compare: {path}: {what}; name the directories of two runs, such as runs/nano")
    trained = tuple(s for s in STAGES if saved_steps(run.stage(s)))
    if not trained and not any(run.eval(stage).is_file() for stage in STAGES):
        advice = f"train it first: {command_line('--run-dir', path)}"
        raise DataError(f"compare: {path}: neither checkpoints nor exams; {advice}")
    done = {name: record for name, record in run.records().items() if record["status"] == "done"}
    return Side(run, resolve(load_config(run.config)), done, trained)


def collect(a: Side, b: Side) -> dict[str, Any]:
    """Return the whole comparison, as `--json` prints it."""
    common = [stage for stage in STAGES if stage in a.trained and stage in b.trained]
    scores: dict[str, Any] = {}
    asked: dict[str, dict[str, Any]] = {}
    not_compared: dict[str, str] = {}  # name -> reason
    try:
        scores = bits_per_byte(a, b, common)
    except DataError as error:
        not_compared["bits per byte"] = str(error)
    for stage in STAGES:
        for path in sorted((a.run.root / "eval").glob(f"{stage}_*.jsonl")):
            other, exam = b.run.root / "eval" / path.name, path.stem.removeprefix(f"{stage}_")
            try:
                if other.is_file() and exam != FreeAnswers.name:  # whose answers are neither right nor wrong
                    asked.setdefault(stage, {})[exam] = paired(answers(path), answers(other))
            except DataError as error:
                not_compared[f"{stage} {exam}"] = str(error)
    if not scores and not asked:
        reasons = "; ".join(f"{name}: {why}" for name, why in not_compared.items())
        raise DataError(f"compare: nothing in common: {reasons}")
    sides = (a, b)
    settings = [{k: v for k, v in flatten(s.config).items() if not k.startswith(PRIVATE)} for s in sides]
    metrics = {stage: [read_metrics(s.run.stage(stage) / "metrics.jsonl") for s in sides] for stage in common}
    names = dict.fromkeys([*a.records, *b.records])
    return {
        "runs": [str(s.run.root) for s in sides],
        "bits_per_byte": scores,
        "exams": asked,
        "not_compared": not_compared,
        "warnings": [warnings_of(s.records) for s in sides],
        "config": {k: [s[k] for s in settings] for k in settings[0] if settings[0][k] != settings[1][k]},
        "speed": {stage: [speed(steps) if steps else None for steps in pair] for stage, pair in metrics.items()},
        "seconds": {n: [wall_clock(s.records[n]) if n in s.records else None for s in sides] for n in names},
        "cost_usd": [run_cost(s.records)["usd"] for s in sides],
        "parameters": [s.records.get("pretrain", {}).get("facts", {}).get("parameters") for s in sides],
    }


# Bits per byte


def bits_per_byte(a: Side, b: Side, stages: Sequence[str]) -> dict[str, Any]:
    """Return, by stage, both models' bits per byte of the same documents, each with its own tokenizer.

    The documents are those of the first run's held-out text that the second run holds out as well.
    """
    if not stages:
        raise DataError(f"no stage trained in both ({', '.join(a.trained)}; {', '.join(b.trained)})")
    texts, note = documents(a, b)
    sizes = np.array([len(text.encode("utf-8", "replace")) for text in texts], np.float64)
    found = {}
    for stage in stages:
        bits = []
        for one in (a, b):
            say(f"  {stage}: {one.run.root} reads {len(texts):,} held-out documents")
            config, params, tokenizer, _ = load_run(one.run, stage)
            scorer = Scorer(config, params, batch_rows=one.config.eval.batch_rows)
            bits.append(document_nats(scorer, tokenizer, texts, config.seq_len) / math.log(2))
        first, second = (float(n.sum() / sizes.sum()) for n in bits)
        error = ratio_error(bits[1] - bits[0], sizes)
        found[stage] = {
            "documents": len(texts),
            "bytes": round(sizes.sum()),
            "values": [first, second],
            "difference": second - first,
            "interval": None if error is None else [second - first - Z95 * error, second - first + Z95 * error],
            "note": note,
        }
    return found


def documents(a: Side, b: Side) -> tuple[list[str], str]:
    """Return the first documents that both runs hold out, and a note on those that the second does not.

    Without `data.val_source` a document is held out by a hash of its text, whatever a run was trained on.
    """
    first, second = a.config.data, b.config.data
    fraction = 0.0 if second.val_source else second.val_fraction
    if second.val_source and second.val_source == first.val_source:
        fraction = 1.0  # the same text, held out whole
    both: dict[str, None] = {}
    others: dict[str, None] = {}
    for text in iterate_documents(first, "val"):
        (both if document_hash(text) < fraction else others)[text] = None
        if len(both) == DOCUMENTS:
            break
    if not both:
        note = "the second run holds none of these documents out and may have been trained on them"
        return list(others)[:DOCUMENTS], note
    return list(both), f"{len(others):,} documents that the second run does not hold out are left out" if others else ""


def document_nats(scorer: Scorer, tokenizer: Tokenizer, texts: Sequence[str], context: int) -> np.ndarray:
    """Return the nats of each whole document, (n,) float64.

    A document longer than the context is read in windows that overlap by half, so that every later token has at least
    half a context before it.
    """
    nats = np.zeros(len(texts))
    with progress("documents", len(texts)) as bar:
        for start in range(0, len(texts), BLOCK):
            groups = [windows([tokenizer.bos, *ids], context) for ids in tokenizer.encode_batch(texts[start:][:BLOCK])]
            scores = iter(scorer.spans([[span] for group in groups for span in group]))
            for i, group in enumerate(groups, start):
                nats[i] = sum(next(scores)[0].loss for _ in group)
            bar.advance(len(groups))
    return nats


def windows(ids: list[int], context: int) -> list[Span]:
    """Return spans of at most `context` tokens that score every token but the first exactly once."""
    spans, done = [], 1
    while done < len(ids):
        begin = 0 if done == 1 else done - context // 2
        end = min(len(ids), begin + context)
        spans.append(Span(ids[begin:end], done - begin, end - begin))
        done = end
    return spans


# Exams


def answers(path: Path) -> dict[str, bool]:
    """Return whether each question was answered correctly, by its text; `DataError` for a damaged file."""
    found: dict[str, bool] = {}
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                row = json.loads(line)
                key = [row["index"], row.get("question"), row.get("prompt"), row.get("expected")]
                found[json.dumps(key, sort_keys=True)] = bool(row["right"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); run stage eval again") from None
    return found


def paired(first: dict[str, bool], second: dict[str, bool]) -> dict[str, Any]:
    """Return the accuracies on the questions of both, the difference, and how often only one was right."""
    common = [key for key in first if key in second]
    if not common:
        raise DataError("no question was put to both runs")
    only_first = sum(first[key] and not second[key] for key in common)
    only_second = sum(second[key] and not first[key] for key in common)
    shares = [sum(side[key] for key in common) / len(common) for side in (first, second)]
    found = {"n": len(common), "values": shares, "difference": shares[1] - shares[0]}
    found["interval"] = share_interval(only_first, only_second, len(common))
    return found | {"only_first": only_first, "only_second": only_second, "p": mcnemar(only_first, only_second)}


def share_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two paired shares, second minus first (Agresti and Min, 2005).

    Wald's interval after half a case is added to every cell of the 2 x 2 table, so it has a width also where the two
    agree on everything.
    """
    b, c, size = only_first + 0.5, only_second + 0.5, n + 2
    middle = (c - b) / size
    half = Z95 * math.sqrt(max(0.0, b + c - (c - b) ** 2 / size)) / size
    return max(-1.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test: how likely so lopsided a split is of two equally good models."""
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


# On the terminal


def text(found: dict[str, Any]) -> str:
    """Return the comparison as plain text; A is the first run, B the second."""
    scores, asked = [], []
    for stage, f in found["bits_per_byte"].items():
        scores.append([stage.upper(), *_difference(f, ".4f"), f"{f['documents']:,}", f"{f['bytes']:,}"])
    for stage, exams in found["exams"].items():
        for name, f in exams.items():
            sides = [f"{f['only_first']:,}", f"{f['only_second']:,}", f"{f['p']:.2g}", f"{f['n']:,}"]
            asked.append([f"{stage.upper()} {name}", *_difference(f, ".1%"), *sides])
    costs = []

    def cost(name: str, values: Sequence[Any], show: Callable[[Any], str]) -> None:
        if any(value is not None for value in values):
            costs.append([name, *("-" if value is None else show(value) for value in values)])

    cost("parameters", found["parameters"], count)
    for stage, pair in found["speed"].items():
        cost(f"{stage.upper()} tokens/s", [s and s["tokens_per_second"] for s in pair], lambda v: f"{v:,.0f}")
        cost(f"{stage.upper()} MFU", [s and s["mfu"] for s in pair], lambda v: f"{v:.1%}")
    for name, pair in found["seconds"].items():
        cost(f"{name}, wall clock", pair, duration)
    costs.append(["cost", *map(money, found["cost_usd"])])
    settings = [[key, *map(str, pair)] for key, pair in found["config"].items()]
    notes = "\n".join({f["note"]: None for f in found["bits_per_byte"].values()})
    head, two = ["", "A", "B", "B - A", "interval"], ["", "A", "B"]
    more, p = ["only A right", "only B right", "p", "questions"], "p: McNemar's exact test"
    tables = [
        Table("Bits per byte of the same held-out documents", [*head, "documents", "bytes"], scores, notes),
        Table("Exams, the same questions to both", [*head, *more], asked, p),
        Table("Speed and cost", two, costs),
        Table("Settings that differ", two, settings),
        Table("Not compared", ["", "reason"], [list(item) for item in found["not_compared"].items()]),
    ]
    a, b = found["runs"]
    warnings = [
        f"Warning, {name}: {line}" for name, lines in zip("AB", found["warnings"], strict=True) for line in lines
    ]
    first = f"A: {a}\nB: {b}\nDifferences are B minus A, measured in pairs, with 95 % intervals."
    first = "\n".join([first, *warnings])
    parts = [f"{t.title}\n\n{text_table([t.head, *t.rows])}\n{t.note}".rstrip() for t in tables if t.rows]
    return "\n\n".join([first, *parts])


def _difference(f: dict[str, Any], form: str) -> list[str]:
    interval = f"{f['interval'][0]:+{form}} to {f['interval'][1]:+{form}}" if f["interval"] else "not known"
    return [*(f"{value:{form}}" for value in f["values"]), f"{f['difference']:+{form}}", interval]
