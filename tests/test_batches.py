"""Batches: a function of the step alone, each row once an epoch, the same on a mesh and after a resumption."""

import itertools
import time

import jax
import numpy as np
import pytest

from jaxchat.config import MeshConfig
from jaxchat.data.loader import Batches, Mixture, batch_number, epoch_rows, val_batches
from jaxchat.data.packing import Rows, write_rows
from jaxchat.sharding import batch_sharding, make_mesh

COUNT, ROW_LEN = 50, 9


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Row i holds i, i + 1, ... and every fifth row is padded at its end."""
    folder = tmp_path_factory.mktemp("data") / "rows"
    content = (np.arange(i, i + ROW_LEN - (3 if i % 5 == 0 else 0)) for i in range(COUNT))
    write_rows(folder, content, ROW_LEN, 0, 300, lambda: {"tokenizer": "t"})
    return Rows(folder, "t")


def numbers(batch):
    """The numbers of the rows in a batch, in order."""
    return batch["inputs"][..., 0].ravel().tolist()


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_batch_worked_by_hand(rows):
    batch = Batches(rows, 3, 2, seed=0).batch(0)
    assert all(batch[k].shape == (2, 3, ROW_LEN - 1) for k in ("inputs", "targets", "weights"))
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32 and batch["weights"].dtype == np.float32
    for a, b in itertools.product(range(2), range(3)):
        tokens, weights = rows[int(batch["inputs"][a, b, 0])]
        assert np.array_equal(batch["inputs"][a, b], tokens[:-1])
        assert np.array_equal(batch["targets"][a, b], tokens[1:])
        assert np.array_equal(batch["weights"][a, b], weights[1:])


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(rows):
    batches = Batches(rows, 4, 2, seed=1)  # 8 rows a batch: epochs end inside batches
    order = list(itertools.chain.from_iterable(numbers(batches.batch(step)) for step in range(25)))
    epochs = [order[i : i + COUNT] for i in range(0, 200, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and list(range(COUNT)) not in epochs


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_beginnings_come_last_and_once(tmp_path, steps):
    """16 of 40 rows are beginnings, 8 rows a batch: remainders before them, or all rows if they are too few."""
    content = (np.arange(i, i + ROW_LEN) for i in range(40))
    write_rows(tmp_path / "rows", content, ROW_LEN, 0, 300, lambda: {"tokenizer": "t", "beginnings": 16})
    batches = Batches(Rows(tmp_path / "rows", "t"), 4, 2, seed=1, steps=steps)
    order = list(itertools.chain.from_iterable(numbers(batches.batch(step)) for step in range(steps)))
    before, last = order[:-16], order[-16:]
    assert len(set(last)) == len(last) and max(last) < 16
    assert len(set(before)) == min(len(before), 40)
    assert min(before, default=16) >= 16 or len(before) > 24


def test_the_seed_decides(rows):
    def order(seed):
        return [numbers(Batches(rows, 5, 2, seed).batch(step)) for step in range(5)]

    assert order(3) == order(3) != order(4)
    assert order(3 + 2**32) == order(3)  # any whole number will do


def test_resumed_batches_equal_the_uninterrupted_ones(rows):
    whole = list(itertools.islice(Batches(rows, 4, 2, seed=5).iterate(0), 30))
    assert all(equal(batch, Batches(rows, 4, 2, seed=5).batch(step)) for step, batch in enumerate(whole))
    for start in (1, 7, 29):  # 7 is inside the second epoch
        resumed = itertools.islice(Batches(rows, 4, 2, seed=5).iterate(start), 30 - start)
        assert all(equal(a, b) for a, b in zip(resumed, whole[start:], strict=True))


def test_the_split_into_micro_batches_does_not_change_the_rows(rows):
    orders = [[numbers(Batches(rows, b, a, seed=2).batch(i)) for i in range(9)] for b, a in ((8, 1), (4, 2), (1, 8))]
    assert orders[0] == orders[1] == orders[2]


def test_on_a_mesh_the_content_is_the_same(rows):
    mesh = make_mesh(MeshConfig())
    sharding = batch_sharding(mesh)
    batches = Batches(rows, 8, 2, seed=2)
    for step, batch in zip(range(3, 6), batches.iterate(3, sharding), strict=False):
        assert all(isinstance(v, jax.Array) and v.sharding == sharding for v in batch.values())
        assert equal({k: np.asarray(v) for k, v in batch.items()}, batches.batch(step))


def test_reading_ahead_ends_with_the_iterator(rows):
    """Nothing hangs when a run stops in the middle."""
    iterator = Batches(rows, 4, 1, seed=0).iterate(0)
    next(iterator)
    start = time.monotonic()
    iterator.close()
    del iterator
    assert time.monotonic() - start < 5


def test_held_out_rows_come_once_in_order(rows):
    batches = list(val_batches(rows, 8, 1000))
    assert len(batches) == 7 and all(b["inputs"].shape == (1, 8, ROW_LEN - 1) for b in batches)
    assert list(itertools.chain.from_iterable(map(numbers, batches)))[:COUNT] == list(range(COUNT))
    assert batches[-1]["weights"][0, 2:].sum() == 0 < batches[-1]["weights"][0, :2].sum()
    total = sum(b["weights"].sum() for b in batches)
    assert total == sum(rows[i][1][1:].sum() for i in range(COUNT))


def test_fewer_held_out_rows_are_spread_over_all(rows):
    (batch,) = val_batches(rows, 8, 5)
    assert numbers(batch)[:5] == [0, 10, 20, 30, 40] and batch["weights"][0, 5:].sum() == 0
    assert list(val_batches(rows, 8, 0)) == []


SOURCES = (
    {"rows": 30, "weight": 0.5},
    {"rows": 5, "weight": 0.25},
    {"rows": 15, "weight": 0.25},
    {"rows": 0, "weight": 0.2},
)


@pytest.fixture
def mixed(rows, tmp_path):
    """The same rows, said to come from four sources, of which one is empty."""
    content = [rows[i][0] for i in range(COUNT)]
    write_rows(tmp_path / "rows", content, ROW_LEN, 0, 300, lambda: {"tokenizer": "t", "sources": SOURCES})
    return Rows(tmp_path / "rows", "t")


def test_a_mixture_has_its_shares_in_every_epoch_and_no_row_twice_before_all_once(mixed):
    size = epoch_rows(mixed)
    assert size == 60  # 30 of the first source are half of it
    batches = Batches(mixed, 6, 1, seed=5)
    order = list(itertools.chain.from_iterable(numbers(batches.batch(step)) for step in range(30)))
    for epoch in (order[i : i + size] for i in range(0, 180, size)):
        shares = [sum(first <= n < last for n in epoch) for first, last in ((0, 30), (30, 35), (35, 50))]
        assert shares == [30, 15, 15] and sorted(n for n in epoch if n < 30) == list(range(30))
        assert sorted(n for n in epoch if 30 <= n < 35) == sorted(list(range(30, 35)) * 3)
    assert order[:size] != order[size : 2 * size]
    again = itertools.islice(batches.iterate(7), 5)
    assert all(equal(batch, batches.batch(7 + i)) for i, batch in enumerate(again))


def test_a_source_larger_than_its_share_goes_on_in_the_next_epoch():
    """0.5 of 8 rows against 0.5 of 3: the three come 8 times in 3 passes, none more often than another by two."""
    mixture = Mixture(({"rows": 8, "weight": 0.5}, {"rows": 3, "weight": 0.5}), seed=1)
    assert mixture.size == 16
    seen = [mixture.row(place, number) for place, number in zip(range(48), list(range(16)) * 3, strict=True)]
    counts = [seen.count(n) for n in range(11)]
    assert counts == [3] * 8 + [8] * 3
    passes = [n for n in seen if n >= 8]
    assert all(sorted(passes[i : i + 3]) == [8, 9, 10] for i in range(0, 24, 3))


def test_batches_that_are_left_out_never_come():
    left_out = [7, 2, 3, 0]
    numbers = [batch_number(step, left_out) for step in range(10)]
    assert numbers == [1, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    assert [batch_number(step, []) for step in range(3)] == [0, 1, 2]
