"""Bits per byte of held-out rows: nats over the targets that stand for text, by the bytes of that text."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxchat.data.batches import own_columns, place, val_batches
from jaxchat.data.rows import Rows
from jaxchat.mesh import batch_sharding
from train.shares import Z95


def bits_per_byte(
    eval_step: Any, params: Any, rows: Rows, byte_lengths: np.ndarray, batch_rows: int, max_rows: int, mesh: Mesh
) -> dict[str, Any]:
    """`bits_per_byte` with its standard error `se` and 95 % `interval`, mean `loss` (nats per target), `perplexity`,
    and the `targets` and `bytes` behind them.

    The error takes rows as drawn at random (the variance of a ratio by linearization; None for a single row).
    Special tokens count neither way in bits per byte; loss and perplexity are over every weighted target.
    `eval_step` comes from `scores.make_eval_step`; `byte_lengths` is (V,) int32, 0 for special tokens.
    """
    sums, by_row = {"all_nats": 0.0, "targets": 0.0}, []
    lengths = np.asarray(byte_lengths, np.int32)
    shape, sharding = (1, batch_rows, rows.meta["row_len"] - 1), batch_sharding(mesh)
    columns = own_columns(sharding, shape)
    for batch in val_batches(rows, batch_rows, max_rows, columns):
        found = jax.device_get(eval_step(params, place(batch, sharding, shape, columns), lengths))
        sums = {name: total + float(found[name]) for name, total in sums.items()}
        by_row.append(np.stack([found["nats"], found["bytes"]]).astype(np.float64))
    nats, sizes = np.concatenate(by_row, axis=1)
    score = nats.sum() / math.log(2) / max(sizes.sum(), 1.0)
    error = standard_error(nats / math.log(2), sizes)
    loss = sums["all_nats"] / max(sums["targets"], 1.0)
    return {
        "bits_per_byte": float(score),
        "se": error,
        "interval": None if error is None else (float(score - Z95 * error), float(score + Z95 * error)),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "targets": int(sums["targets"]),
        "bytes": int(sizes.sum()),
    }


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """A value and its standard error as text: 1.5740 ± 0.0100."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def standard_error(amounts: np.ndarray, sizes: np.ndarray) -> float | None:
    """Of sum(amounts) / sum(sizes); rows without size (padding of the last batch) say nothing."""
    amounts, sizes = amounts[sizes > 0], sizes[sizes > 0]
    n = len(sizes)
    if n < 2:
        return None
    ratio = amounts.sum() / sizes.sum()
    return float(math.sqrt(n / (n - 1) * np.square(amounts - ratio * sizes).sum()) / sizes.sum())
