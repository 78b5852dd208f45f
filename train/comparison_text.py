"""The comparison of two runs as plain tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.report_blocks import text_table
from train.report_exams import STAGE_TITLES
from train.report_text import count, duration, money

Rows = list[list[str]]


def tables(found: dict[str, Any]) -> str:
    """All of the comparison; A is the first run, B the second."""
    a, b = found["runs"]
    parts = [f"A: {a}\nB: {b}\nDifferences are B minus A, measured in pairs, with 95 % intervals."]
    sections: tuple[tuple[str, Rows, list[str]], ...] = (
        ("Bits per byte of the same held-out documents (lower is better)", _bytes(found), _byte_notes(found)),
        ("Exams, the questions put to both", _exams(found), ["p: McNemar's exact test"]),
        ("Speed and cost", _speed(found), []),
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


def _speed(found: dict[str, Any]) -> Rows:
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
