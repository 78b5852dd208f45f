"""Warnings where data and settings do not fit each other: what such a run scores means little."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxchat.config import Config
from jaxchat.data.sources import NO_TEXT
from jaxchat.log import say_once

FEW_STEPS = 10  # optimizer steps
FEW_ROWS = 10  # held-out rows
FEW_BYTES = 100_000  # of training text
ZERO = 5e-4  # what is shown as 0.000
STEPS_KEY = {"pretrain": "train.steps", "sft": "sft.epochs", "rl": "rl.steps"}


def of_text(paths: Sequence[str], size: int, copies: int, held_out: int) -> list[str]:
    """Return what is wrong with a training text of `size` bytes in files (none for a generator).

    `copies`: of the `held_out` documents, those that the training text has as well.
    """
    lines = []
    if paths and all(NO_TEXT.fullmatch(Path(path).name) for path in paths):
        lines.append(f"the only text is {Path(paths[0]).name}: is the data itself missing?")
    if size < FEW_BYTES:
        lines.append(f"the training text has {size:,} bytes: too little to learn a language from")
    if copies:
        share = f"{copies:,} of {held_out:,} held-out documents are in the training text, letter for letter"
        lines.append(f"{share}: bits per byte measure what was memorized")
    return lines


def of_steps(stage: str, config: Config, rows: int | None, held_out: int | None) -> list[str]:
    """Return what is wrong with the steps, batch and held-out rows (None: there are none) of a training."""
    steps, batch, key = config.train.steps, config.train.batch_tokens, STEPS_KEY.get(stage, "train.steps")
    lines = []
    if 0 < steps < FEW_STEPS:
        count = f"{steps} optimizer step{'s' * (steps > 1)}"
        lines.append(f"{count}: too few to learn from; raise {key}, or bring more data")
    if rows is not None and batch > (size := rows * config.model.seq_len):
        lines.append(f"a batch of {batch:,} tokens is larger than all the training data ({size:,} tokens)")
    if held_out is not None and held_out < FEW_ROWS:
        lines.append(f"{held_out} held-out row{'s' * (held_out != 1)}: bits per byte of so little text say little")
    return lines


def of_losses(facts: dict[str, Any], losses: Sequence[float | None]) -> list[str]:
    """Return what is wrong with the loss of every step and the held-out score of a finished training."""
    lines = []
    if losses and losses[-1] is not None and losses[-1] < ZERO:
        zeros = sum(loss is not None and loss < ZERO for loss in losses)
        lines.append(f"the loss was 0.000 in {zeros:,} of {len(losses):,} steps: there was nothing (left) to learn")
    return lines + of_score(facts.get("val_bpb"))


def of_score(bits_per_byte: float | None) -> list[str]:
    """Return a warning for held-out text that is predicted without any doubt."""
    if bits_per_byte is None or bits_per_byte >= ZERO:
        return []
    return [f"{bits_per_byte:.4f} bits per byte: the held-out text says nothing that the training text does not"]


def warn(stage: str, lines: list[str]) -> list[str]:
    """Print the warnings of a stage and return them: the report card shows those in the fact `warnings`."""
    for line in lines:
        say_once(f"  {stage}: {line}", "yellow")  # the check before training finds the same
    return lines
