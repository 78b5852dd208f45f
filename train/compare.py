"""Two runs side by side: bits per byte of the same documents, the same questions, settings, speed and cost.

Every difference is the second run minus the first, measured in pairs, with a 95 % interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
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

# The comparison of two runs as plain tables for a terminal.


Rows = list[list[str]]


def tables(found: dict[str, Any]) -> str:
    """All of the comparison; A is the first run, B the second."""
    a, b = found["runs"]
    parts = [f"A: {a}\nB: {b}\nDifferences are B minus A, measured in pairs, with 95 % intervals."]
    sections: tuple[tuple[str, Rows, list[str]], ...] = (
        ("Bits per byte of the same held-out documents (lower is better)", _bytes(found), _byte_notes(found)),
        ("Exams, the questions put to both", _exams(found), ["p: McNemar's exact test"]),
        ("Speed and cost", _speed_lines(found), []),
        ("Settings that differ", _settings(found), []),
    )
    for title, rows, notes in sections:
        if len(rows) > 1:
            parts.append("\n".join([title, "", text_table(rows), *notes]))
    if found["not_compared"]:
        parts.append("\n".join(["Not compared", "", *(f"{n}: {why}" for n, why in found["not_compared"].items())]))
    return "\n\n".join(parts)


def _bytes(found: dict[str, Any]) -> Rows:
    rows = [["", "A", "B", "B - A", "interval", "documents", "bytes"]]
    for stage, f in found["bits_per_byte"].items():
        values = [f"{value:.4f}" for value in f["values"]]
        spread = _interval(f["interval"], "+.4f")
        rows.append([STAGE_TITLES[stage], *values, f"{f['difference']:+.4f}", spread, f"{f['documents']:,}"])
        rows[-1].append(f"{f['bytes']:,}")
    return rows


def _byte_notes(found: dict[str, Any]) -> list[str]:
    return sorted({f["note"] for f in found["bits_per_byte"].values() if f["note"]})


def _exams(found: dict[str, Any]) -> Rows:
    rows = [["", "A", "B", "B - A", "interval", "only A right", "only B right", "p", "questions"]]
    for stage, exams in found["exams"].items():
        for name, f in exams.items():
            values = [f"{value:.1%}" for value in f["values"]]
            sides = [f"{f['only_first']:,}", f"{f['only_second']:,}", f"{f['p']:.2g}", f"{f['n']:,}"]
            spread = _interval(f["interval"], "+.1%")
            rows.append([f"{STAGE_TITLES[stage]} {name}", *values, f"{f['difference']:+.1%}", spread, *sides])
    return rows


def _interval(interval: Sequence[float] | None, form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}" if interval else "not known"


def _speed_lines(found: dict[str, Any]) -> Rows:
    rows = [["", "A", "B"]]
    if any(found["parameters"]):
        rows.append(["parameters", *(count(n) if n else "-" for n in found["parameters"])])
    for stage, pair in found["speed"].items():
        for key, form, unit in (("tokens_per_second", ",.0f", "tokens/s"), ("mfu", ".1%", "MFU")):
            values = [one[key] if one else None for one in pair]
            if any(value is not None for value in values):
                shown = ["-" if value is None else f"{value:{form}}" for value in values]
                rows.append([f"{STAGE_TITLES[stage]} {unit}", *shown])
    for name, pair in found["seconds"].items():
        rows.append([f"{name}, wall clock", *("-" if s is None else duration(s) for s in pair)])
    rows.append(["cost", *(money(usd) for usd in found["cost_usd"])])
    return rows


def _settings(found: dict[str, Any]) -> Rows:
    return [["", "A", "B"], *([key, str(pair[0]), str(pair[1])] for key, pair in found["config"].items())]


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
        raise UsageError(f"--compare: {first} and {second} are the same directory; name two runs")
    sides = side(first), side(second)
    found = collect(*sides)
    print(json.dumps(found) if as_json else tables(found))
    return found


def side(path: str) -> Side:
    """A run directory's own records; `DataError` where it is none, or has neither checkpoints nor exams."""
    run = RunDir(path)
    if not run.root.is_dir():
        raise DataError(f"--compare: {path}: no such directory; name the directories of two runs, such as runs/nano")
    if not run.config.is_file():
        raise DataError(f"--compare: {path}: not a run directory (no config.toml)")
    trained = tuple(s for s in STAGE_TITLES if any(p.name.isdigit() for p in run.stage(s).glob("*")))
    examined = tuple(s for s in STAGE_TITLES if run.eval(s).is_file())
    if not trained and not examined:
        raise DataError(f"--compare: {path}: neither checkpoints nor exams; train it first: launch.py --run-dir {path}")
    done = {name: record for name, record in run.records().items() if record["status"] == "done"}
    return Side(run, resolve(load_config(run.config)), done, trained, examined)


def collect(a: Side, b: Side) -> dict[str, Any]:
    """Everything that the comparison says."""
    apart: dict[str, str] = {}  # what could not be compared, and why
    found: dict[str, Any] = {"runs": [a.name, b.name], "bits_per_byte": {}, "exams": {}, "not_compared": apart}
    common = [stage for stage in STAGE_TITLES if stage in a.trained and stage in b.trained]
    try:
        if not common:
            raise DataError(f"no stage trained in both ({', '.join(a.trained)}; {', '.join(b.trained)})")
        found["bits_per_byte"] = bits_per_byte(a, b, common)
    except DataError as error:
        apart["bits per byte"] = str(error)
    for stage in STAGE_TITLES:
        if stage in a.examined and stage in b.examined:
            found["exams"] |= {stage: asked} if (asked := exams(a.run, b.run, stage, apart)) else {}
    if not found["bits_per_byte"] and not found["exams"]:
        raise DataError(f"--compare: nothing in common: {'; '.join(f'{n}: {w}' for n, w in apart.items())}")
    settings = [{k: v for k, v in flatten(s.config).items() if not k.startswith(PRIVATE)} for s in (a, b)]
    found["config"] = {k: [s.get(k) for s in settings] for k in settings[0] if settings[0][k] != settings[1].get(k)}
    found["speed"] = {stage: [_speed(s, stage) for s in (a, b)] for stage in common}
    names = dict.fromkeys([*a.records, *b.records])
    found["seconds"] = {n: [wall_clock(s.records[n]) if n in s.records else None for s in (a, b)] for n in names}
    found["cost_usd"] = [run_cost(s.records)["usd"] for s in (a, b)]
    found["parameters"] = [s.records.get("pretrain", {}).get("facts", {}).get("parameters") for s in (a, b)]
    return found


def _speed(one: Side, stage: str) -> dict[str, Any] | None:
    steps = read_metrics(one.run.stage(stage) / "metrics.jsonl")
    return speed(steps) if steps else None


# Bits per byte


def bits_per_byte(a: Side, b: Side, stages: Sequence[str]) -> dict[str, Any]:
    """By stage: both models on the same documents of the first run's held-out text, each with its own tokenizer.

    Documents that the second run's own split would have let into its training text are left out.
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
    """The first held-out documents of the first run that are held out of the second as well; what to know.

    Without `data.val_source` a document is held out by a hash of its text, so this holds whatever the second run was
    trained on, unless its `data.val_fraction` left nothing and one document was taken instead.
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
    """Nats of each whole document, (n,) float64.

    A document longer than the context is read through windows that overlap by half, so that every token but the first
    ones has at least half a context before it.
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
    """Spans that score every token but the first exactly once, in texts of at most `context` tokens."""
    spans, done = [], 1
    while done < len(ids):
        begin = 0 if done == 1 else done - context // 2
        end = min(len(ids), begin + context)
        spans.append(Span(ids[begin:end], done - begin, end - begin))
        done = end
    return spans


# Exams


def exams(a: RunDir, b: RunDir, stage: str, apart: dict[str, str]) -> dict[str, Any]:
    """By exam, of those with a record of every question in both runs: the questions that both were asked."""
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
    """Whether each question was answered rightly, by what was asked; `DataError` for a damaged file."""
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
    """Shares of right answers among the questions of both, the difference, and how often only one was right."""
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
