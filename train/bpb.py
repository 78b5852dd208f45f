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


def bits_per_byte(
    eval_step: Any, params: Any, rows: Rows, byte_lengths: np.ndarray, batch_rows: int, max_rows: int, mesh: Mesh
) -> dict[str, float]:
    """`bits_per_byte`, mean `loss` (nats per target), `perplexity`, and the `targets` and `bytes` behind them.

    Special tokens count neither way in bits per byte; loss and perplexity are over every weighted target.
    `eval_step` comes from `scores.make_eval_step`; `byte_lengths` is (V,) int32, 0 for special tokens.
    """
    sums = {"nats": 0.0, "bytes": 0.0, "all_nats": 0.0, "targets": 0.0}
    lengths = np.asarray(byte_lengths, np.int32)
    shape, sharding = (1, batch_rows, rows.meta["row_len"] - 1), batch_sharding(mesh)
    columns = own_columns(sharding, shape)
    for batch in val_batches(rows, batch_rows, max_rows, columns):
        found = jax.device_get(eval_step(params, place(batch, sharding, shape, columns), lengths))
        sums = {name: total + float(found[name]) for name, total in sums.items()}
    loss = sums["all_nats"] / max(sums["targets"], 1.0)
    return {
        "bits_per_byte": sums["nats"] / math.log(2) / max(sums["bytes"], 1.0),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "targets": int(sums["targets"]),
        "bytes": int(sums["bytes"]),
    }
