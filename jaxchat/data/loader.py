"""Batches of rows, read with Grain. A batch depends on the optimizer step alone, so the position is one integer."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Sharding

from jaxchat.data.packing import Rows

THREADS = 4
PREFETCH = 16  # batches read ahead
LAST_STEP = 2**40  # never reached
NAMES = ("inputs", "targets", "weights")


class Batches:
    """Batches `{"inputs", "targets": int32, "weights": float32}`, each (A, B, T): A micro-batches of B rows.

    Rows come in a global shuffle by `seed`, another one every epoch, without end; of several sources as `Mixture` says.
    Where the rows have beginnings of documents apart (`pack_apart`), the last of the `steps` read each of them once,
    and those before read remainders, or, if there are too few, all rows.
    """

    def __init__(self, rows: Rows, batch_rows: int, grad_accum: int, seed: int, steps: int = 0):
        def order(begin: int, end: int) -> Any:  # of row numbers, so that a batch is read with one indexing
            return grain.MapDataset.range(begin, end).seed(seed % 2**32).shuffle().repeat()

        sources, beginnings = rows.meta.get("sources", ()), rows.meta.get("beginnings", 0)
        self._mixture = Mixture(sources, seed) if len(sources) > 1 else None
        self._before = max(0, steps * grad_accum * batch_rows - beginnings) if beginnings else 0
        if self._before:
            enough = self._before <= len(rows) - beginnings
            self._earlier = order(beginnings if enough else 0, len(rows))
        self._numbers = order(0, beginnings or epoch_rows(rows))
        self._rows = rows
        self._shape = (grad_accum, batch_rows, rows.meta["row_len"] - 1)

    def batch(self, step: int, columns: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the batch of one optimizer step, on the host. `columns`: only these rows of every micro-batch."""
        grad_accum, batch_rows, _ = self._shape
        columns = np.arange(batch_rows) if columns is None else columns
        first_places = (step * grad_accum + np.arange(grad_accum)) * batch_rows  # of every micro-batch
        places = (first_places[:, None] + columns).ravel().tolist()
        before = self._before
        numbers = [self._earlier[at] if at < before else self._numbers[at - before] for at in places]
        if self._mixture:
            numbers = [self._mixture.row(place, number) for place, number in zip(places, numbers, strict=True)]
        arrays = zip(NAMES, self._rows.shifted(np.array(numbers)), strict=True)
        return {name: array.reshape(grad_accum, len(columns), -1) for name, array in arrays}

    def iterate(
        self, start: int, sharding: Sharding | None = None, left_out: Sequence[int] = ()
    ) -> Iterator[dict[str, Any]]:
        """Yield batches from step `start` on, read ahead in threads, placed on the mesh if a sharding is given.

        Batches of the numbers `left_out` are skipped; every later step takes the next one. A process reads only the
        rows of its own devices; which rows a batch has does not depend on that.
        """
        columns = None if sharding is None else own_columns(sharding, self._shape)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCH)
        steps = grain.MapDataset.range(start, LAST_STEP)
        batches = steps.map(lambda step: self.batch(batch_number(step, left_out), columns))
        for batch in iter(batches.to_iter_dataset(options)):
            if sharding is not None:
                batch = jax.make_array_from_process_local_data(sharding, batch, self._shape)
            yield batch


def batch_number(step: int, left_out: Sequence[int]) -> int:
    """Return the batch of a step if those of the numbers `left_out` are skipped."""
    number = step
    for missing in sorted(left_out):
        number += missing <= number
    return number


def epoch_rows(rows: Rows) -> int:
    """Return the rows of one epoch: all, or, of a mixture, as many as it takes to see every row of every source."""
    sources = rows.meta.get("sources", ())
    return Mixture(sources, 0).size if len(sources) > 1 else len(rows)


class Mixture:
    """Rows of several sources, each with its share of every epoch, in one permutation of numbers.

    The source with the most rows for its share is read once an epoch, the others as often as their shares ask. Each
    number of the epoch's `size` stands for a source and for a place in an endless sequence of its rows, which goes
    through all of them, in another order each time, before one is repeated.
    """

    def __init__(self, sources: Sequence[Mapping[str, Any]], seed: int):
        longest = max(source["rows"] / source["weight"] for source in sources)
        counts = [max(1, round(longest * source["weight"])) if source["rows"] else 0 for source in sources]
        self.size = sum(counts)
        self._counts, self._ends = counts, list(itertools.accumulate(counts))
        self._firsts = [0, *itertools.accumulate(source["rows"] for source in sources)]
        self._rows: dict[int, Any] = {
            i: grain.MapDataset.range(source["rows"]).seed((seed + 1 + i) % 2**32).shuffle().repeat()
            for i, source in enumerate(sources)
            if counts[i]
        }

    def row(self, place: int, number: int) -> int:
        """Return the row at a place of the whole order, to which the permutation of its epoch assigns `number`."""
        i = bisect.bisect_right(self._ends, number)
        within = number - (self._ends[i] - self._counts[i])
        return self._firsts[i] + self._rows[i][place // self.size * self._counts[i] + within]


def own_columns(sharding: Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """Return which of a batch's B rows (A, B, T) are on devices of this process, in order."""
    places: Any = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[1])[index[1]] for index in places]))


def val_batches(
    rows: Rows, batch_rows: int, max_rows: int, columns: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yield `max_rows` rows, evenly distributed over the file (all, if there are no more), once and in order.

    Packing puts long documents first, so the first rows alone would not represent the rest. Each batch is (1, B, T);
    the last one is filled up with rows of weight 0. `columns`: only these rows of each batch (`own_columns`).
    """
    total = min(len(rows), max_rows)
    columns = np.arange(batch_rows) if columns is None else columns
    for start in range(0, total, batch_rows):
        real = columns[start + columns < total]
        missing = len(columns) - len(real)
        arrays = zip(NAMES, rows.shifted((start + real) * len(rows) // total), strict=True)
        yield {name: np.pad(array, ((0, missing), (0, 0)))[None] for name, array in arrays}
