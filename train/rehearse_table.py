"""A rehearsal on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30
console = Console(highlight=False, markup=False)


def show(result: dict[str, Any]) -> None:
    """Print the measurements, what the run will take, and what would go wrong, to standard output."""
    m = result["measured"]
    for rows, title in ((measurements(m), f"{result['tier']}, rehearsed in {result['rehearsal_seconds']:.0f} s"),):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, text in rows.items():
            table.add_row(name, text)
        console.print(table)
    console.print(_forecast(result))
    if result["made_up"]:
        console.print("made up: " + "; ".join(result["made_up"]), soft_wrap=True)
    if result["directory"]:
        console.print(f"kept: {result['directory']}", soft_wrap=True)
    for problem in result["problems"]:
        console.print(f"WRONG  {problem['stage']}, {problem['kind']}: {problem['text']}", soft_wrap=True)
    console.print("nothing would go wrong" if result["ok"] else f"{len(result['problems'])} things would go wrong")


def measurements(m: dict[str, Any]) -> dict[str, str]:
    """A line for everything that was measured."""
    machine, rows = m["machine"], {}
    rows["devices"] = f"{machine['devices']} x {machine['device']} ({machine['platform']})"
    rows["attention"] = m["attention"]["backend"]
    if m["peak_memory_bytes"]:
        of = "the process" if machine["platform"] == "cpu" else "the fullest device"
        rows["peak memory"] = f"{m['peak_memory_bytes'] / GIB:.2f} GiB, {of}"
    for name in ("pretrain", "sft", "rl"):
        if name in m:
            rows |= _training(name, m[name])
    if found := m.get("pretrain"):
        rows["checkpoint"] = (
            f"{found['checkpoint_bytes'] / 1e6:,.0f} MB, {found['checkpoint_seconds']:.2f} s to write, of which "
            f"training waits {found['save_seconds']:.2f} s; {found['restore_seconds']:.2f} s to restore"
        )
        rows["loader"] = f"{found['loader_seconds'] * 1e3:,.1f} ms a batch"
    for stage, exams in m.get("eval", {}).get("exams", {}).items():
        cells = [f"{name} {exam['n'] / max(1e-9, exam['again_seconds']):,.3g}" for name, exam in exams.items()]
        rows[f"exams of {stage}"] = ", ".join(cells) + " a second"
    if answer := m.get("answer"):
        rows["one answer"] = (
            f"{answer['tokens']} tokens in {answer['seconds']:.2f} s, {answer['load_seconds']:.2f} s to load the model"
        )
    return rows


def _training(name: str, found: dict[str, Any]) -> dict[str, str]:
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
    beside = ""
    if name == "rl":
        beside = f", of which {found['rollout_seconds']:.3g} s make {found['answers']} answers"
    return {
        name: f"{found['step_seconds']:.3g} s a step{beside}, {found['tokens_per_second']:,.0f} tokens/s{mfu}; "
        f"compiled in {found['compile_seconds']:.1f} s; {found['steps']:,} steps"
    }


def _forecast(result: dict[str, Any]) -> Table:
    table = Table(title="the whole run", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("stage", "time", "disk", "USD"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    table.add_column("how")
    for name, stage in result["stages"].items():
        table.add_row(name, _time(stage["seconds"]), _size(stage["disk_bytes"]), _usd(stage["usd"]), stage["how"])
    total = result["total"]
    table.add_row("all", _time(total["seconds"]), _size(total["disk_bytes"]), _usd(total["usd"]), "")
    return table


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.0f} s"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _usd(dollars: float | None) -> str:
    return "?" if dollars is None else f"{dollars:.2f}"
