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
from jaxchat.engine.loading import load_run
from jaxchat.engine.scoring import Scorer, Span
from jaxchat.errors import DataError, UsageError
from jaxchat.log import progress, read_metrics, say
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.tokenizer import Tokenizer

from .report import PRIVATE, STAGE_TITLES, count, duration, money, speed, text_table
from .statistics import mcnemar, ratio_interval, share_interval
from .targets import run_cost, wall_clock

DOCUMENTS = 1000  # held-out ones at most
BLOCK = 64  # documents tokenized and scored together


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    run: RunDir
    config: Config
    records: dict[str, Any]
    trained: tuple[str, ...]  # stages with a checkpoint
    examined: tuple[str, ...]  # stages with a record of exams

    @property
    def name(self) -> str:
        return str(self.run.root)


def compare(first: str, second: str, as_json: bool = False) -> dict[str, Any]:
    """Print the comparison of two run directories, as tables or as one JSON object; returns that object.

    Raises `UsageError` for twice the same directory, `DataError` for a directory that is no run and for two runs that
    have nothing in common to compare.
    """
    if Path(first).resolve() == Path(second).resolve():
        raise UsageError(f"compare: {first} and {second} are the same directory; name two runs")
    found = collect(side(first), side(second))
    print(json.dumps(found) if as_json else tables(found))
    return found


def side(path: str) -> Side:
    """Return a run directory's own records; `DataError` where it is none, or has neither checkpoints nor exams."""
    run = RunDir(path)
    if not run.root.is_dir():
        raise DataError(f"compare: {path}: no such directory; name the directories of two runs, such as runs/nano")
    if not run.config.is_file():
        raise DataError(f"compare: {path}: not a run directory (no config.toml)")
    trained = tuple(s for s in STAGE_TITLES if any(p.name.isdigit() for p in run.stage(s).glob("*")))
    examined = tuple(s for s in STAGE_TITLES if run.eval(s).is_file())
    if not trained and not examined:
        raise DataError(f"compare: {path}: neither checkpoints nor exams; train it first: launch.py --run-dir {path}")
    done = {name: record for name, record in run.records().items() if record["status"] == "done"}
    return Side(run, resolve(load_config(run.config)), done, trained, examined)


def collect(a: Side, b: Side) -> dict[str, Any]:
    """Return the whole comparison, as `--json` prints it."""
    common = [stage for stage in STAGE_TITLES if stage in a.trained and stage in b.trained]
    not_compared: dict[str, str] = {}  # name -> reason
    scores: dict[str, Any] = {}
    try:
        if not common:
            raise DataError(f"no stage trained in both ({', '.join(a.trained)}; {', '.join(b.trained)})")
        scores = bits_per_byte(a, b, common)
    except DataError as error:
        not_compared["bits per byte"] = str(error)
    both = [stage for stage in STAGE_TITLES if stage in a.examined and stage in b.examined]
    asked = {stage: found for stage in both if (found := exams(a.run, b.run, stage, not_compared))}
    if not scores and not asked:
        reasons = "; ".join(f"{name}: {why}" for name, why in not_compared.items())
        raise DataError(f"compare: nothing in common: {reasons}")
    settings = [{k: v for k, v in flatten(s.config).items() if not k.startswith(PRIVATE)} for s in (a, b)]
    metrics = {stage: [read_metrics(s.run.stage(stage) / "metrics.jsonl") for s in (a, b)] for stage in common}
    names = dict.fromkeys([*a.records, *b.records])
    return {
        "runs": [a.name, b.name],
        "bits_per_byte": scores,
        "exams": asked,
        "not_compared": not_compared,
        "config": {k: [s.get(k) for s in settings] for k in settings[0] if settings[0][k] != settings[1].get(k)},
        "speed": {stage: [speed(steps) if steps else None for steps in pair] for stage, pair in metrics.items()},
        "seconds": {n: [wall_clock(s.records[n]) if n in s.records else None for s in (a, b)] for n in names},
        "cost_usd": [run_cost(s.records)["usd"] for s in (a, b)],
        "parameters": [s.records.get("pretrain", {}).get("facts", {}).get("parameters") for s in (a, b)],
    }


# Bits per byte


def bits_per_byte(a: Side, b: Side, stages: Sequence[str]) -> dict[str, Any]:
    """Return, by stage, both models' bits per byte of the same documents, each with its own tokenizer.

    The documents are those of the first run's held-out text that the second run holds out as well.
    """
    texts, note = documents(a, b)
    found = {}
    for stage in stages:
        nats = []
        for one in (a, b):
            say(f"  {stage}: {one.name} reads {len(texts):,} held-out documents")
            config, params, tokenizer, _ = load_run(one.run, stage)
            scorer = Scorer(config, params, batch_rows=one.config.eval.batch_rows)
            nats.append(document_nats(scorer, tokenizer, texts, config.seq_len))
        sizes = np.array([len(text.encode("utf-8", "replace")) for text in texts], np.float64) * math.log(2)
        first, second = (float(n.sum() / sizes.sum()) for n in nats)
        found[stage] = {
            "documents": len(texts),
            "bytes": round(sizes.sum() / math.log(2)),
            "values": [first, second],
            "difference": second - first,
            "interval": ratio_interval(nats[1] - nats[0], sizes),
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
    for text in iterate_documents(a.config.data, "val"):
        (both if document_hash(text) < fraction else others)[text] = None
        if len(both) == DOCUMENTS:
            break
    if not both:
        note = "the second run holds none of these documents out and may have been trained on them"
        return list(others)[:DOCUMENTS], note
    note = f"{len(others):,} documents that the second run does not hold out are left out" if others else ""
    return list(both), note


def document_nats(scorer: Scorer, tokenizer: Tokenizer, texts: Sequence[str], context: int) -> np.ndarray:
    """Return the nats of each whole document, (n,) float64.

    A document longer than the context is read in windows that overlap by half, so that every later token has at least
    half a context before it.
    """
    nats = np.zeros(len(texts))
    with progress("documents", len(texts)) as bar:
        for start in range(0, len(texts), BLOCK):
            block = texts[start : start + BLOCK]
            groups = [windows([tokenizer.bos, *ids], context) for ids in tokenizer.encode_batch(block)]
            singles = [[span] for group in groups for span in group]
            scores = iter(scorer.spans(singles))
            for i, group in enumerate(groups):
                nats[start + i] = sum(next(scores)[0].loss for _ in group)
            bar.advance(len(block))
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


def exams(a: RunDir, b: RunDir, stage: str, apart: dict[str, str]) -> dict[str, Any]:
    """Return the comparison of every exam that both runs have a record of; reasons for the others go to `apart`."""
    found = {}
    files = [{p.stem: p for p in sorted((run.root / "eval").glob(f"{stage}_*.jsonl"))} for run in (a, b)]
    for name in files[0]:
        if name not in files[1]:
            continue
        exam = name.removeprefix(f"{stage}_")
        try:
            one, other = (answers(each[name]) for each in files)
            found[exam] = paired(one, other)
        except DataError as error:
            apart[f"{stage} {exam}"] = str(error)
    return found


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
    return {
        "n": len(common),
        "values": shares,
        "difference": shares[1] - shares[0],
        "interval": share_interval(only_first, only_second, len(common)),
        "only_first": only_first,
        "only_second": only_second,
        "p": mcnemar(only_first, only_second),
    }


# On the terminal


def tables(found: dict[str, Any]) -> str:
    """Return the comparison as plain text; A is the first run, B the second."""
    a, b = found["runs"]
    scores = [["", "A", "B", "B - A", "interval", "documents", "bytes"]]
    for stage, f in found["bits_per_byte"].items():
        sizes = [f"{f['documents']:,}", f"{f['bytes']:,}"]
        scores.append([STAGE_TITLES[stage], *_difference(f, ".4f"), *sizes])
    asked = [["", "A", "B", "B - A", "interval", "only A right", "only B right", "p", "questions"]]
    for stage, exams in found["exams"].items():
        for name, f in exams.items():
            sides = [f"{f['only_first']:,}", f"{f['only_second']:,}", f"{f['p']:.2g}", f"{f['n']:,}"]
            asked.append([f"{STAGE_TITLES[stage]} {name}", *_difference(f, ".1%"), *sides])
    settings = [["", "A", "B"], *([key, str(pair[0]), str(pair[1])] for key, pair in found["config"].items())]
    notes = sorted({f["note"] for f in found["bits_per_byte"].values() if f["note"]})
    parts = [f"A: {a}\nB: {b}\nDifferences are B minus A, measured in pairs, with 95 % intervals."]
    for title, rows, lines in (
        ("Bits per byte of the same held-out documents (lower is better)", scores, notes),
        ("Exams, the same questions to both", asked, ["p: McNemar's exact test"]),
        ("Speed and cost", _speed_rows(found), []),
        ("Settings that differ", settings, []),
    ):
        if len(rows) > 1:
            parts.append("\n".join([title, "", text_table(rows), *lines]))
    if reasons := found["not_compared"]:
        parts.append("\n".join(["Not compared", "", *(f"{name}: {why}" for name, why in reasons.items())]))
    return "\n\n".join(parts)


def _difference(f: dict[str, Any], form: str) -> list[str]:
    interval = f"{f['interval'][0]:+{form}} to {f['interval'][1]:+{form}}" if f["interval"] else "not known"
    return [*(f"{value:{form}}" for value in f["values"]), f"{f['difference']:+{form}}", interval]


def _speed_rows(found: dict[str, Any]) -> list[list[str]]:
    def row(name: str, values: Sequence[Any], words: Callable[[Any], str]) -> list[list[str]]:
        known = any(value is not None for value in values)
        return [[name, *("-" if value is None else words(value) for value in values)]] if known else []

    rows = [["", "A", "B"], *row("parameters", found["parameters"], count)]
    for stage, pair in found["speed"].items():
        for key, form, unit in (("tokens_per_second", ",.0f", "tokens/s"), ("mfu", ".1%", "MFU")):
            values = [one and one[key] for one in pair]
            rows += row(f"{STAGE_TITLES[stage]} {unit}", values, lambda value, form=form: f"{value:{form}}")  # type: ignore[misc]
    for name, pair in found["seconds"].items():
        rows += row(f"{name}, wall clock", pair, duration)
    return [*rows, ["cost", *map(money, found["cost_usd"])]]
