"""Rows -> batches through Grain. A batch is a function of the optimizer step alone, so position is one integer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Sharding

from jaxchat.data.rows import Rows

THREADS = 4
PREFETCH = 16  # batches read ahead


class Batches:
    """Batches `{"inputs", "targets": int32, "weights": float32}`, each (A, B, T): A micro-batches of B rows.

    Rows come in a global shuffle by `seed`, another one every epoch, without end.
    """

    def __init__(self, rows: Rows, batch_rows: int, grad_accum: int, seed: int, shuffle: bool = True):
        dataset = grain.MapDataset.source(rows).seed(seed % 2**32)
        if shuffle:
            dataset = dataset.shuffle()
        self._dataset = (
            dataset.repeat().batch(batch_rows * grad_accum).map(lambda row: _split(row, grad_accum, batch_rows))
        )

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The batch of one optimizer step, on the host."""
        batch = self._dataset[step]
        assert batch is not None  # a repeated data set has an element for every position
        return batch

    def iterate(self, start: int, sharding: Sharding | None = None) -> Iterator[dict[str, Any]]:
        """Batches from step `start` on, read ahead in threads, placed on the mesh where a sharding is given."""
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCH)
        for batch in iter(self._dataset[start:].to_iter_dataset(options)):
            yield batch if sharding is None else jax.device_put(batch, sharding)


def _split(batch: tuple[np.ndarray, np.ndarray], grad_accum: int, batch_rows: int) -> dict[str, np.ndarray]:
    """Inputs are all tokens but the last, targets all but the first."""
    tokens, weights = (a.reshape(grad_accum, batch_rows, -1) for a in batch)
    return {
        "inputs": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "weights": weights[..., 1:].astype(np.float32),
    }


def val_batches(rows: Rows, batch_rows: int, max_rows: int) -> Iterator[dict[str, np.ndarray]]:
    """`max_rows` rows spread evenly over the file (all, if there are no more), once and in order.

    Packing puts long documents first, so the first rows alone would not stand for the rest. Each batch is (1, B, T);
    the last one is filled up with rows of weight 0.
    """
    total = min(len(rows), max_rows)
    chosen = [i * len(rows) // total for i in range(total)]
    for start in range(0, total, batch_rows):
        picked = [rows[i] for i in chosen[start : start + batch_rows]]
        tokens, weights = (np.stack(part) for part in zip(*picked, strict=True))
        missing = ((0, batch_rows - len(picked)), (0, 0))
        yield _split((np.pad(tokens, missing), np.pad(weights, missing)), 1, batch_rows)
