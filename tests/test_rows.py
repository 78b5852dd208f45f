"""Row files: what is written is read, empty folders open, and every kind of damage is named."""

import json

import numpy as np
import pytest

from jaxchat.data.packing import Rows, finish_rows, write_rows
from jaxchat.errors import DataError
from jaxchat.run_dir import write_sealed

PAD, VOCAB, ROW_LEN = 7, 300, 16


def write(folder, rows, vocab=VOCAB, **meta):
    count = write_rows(folder, iter(rows), ROW_LEN, PAD, vocab)
    finish_rows(folder, {"tokenizer": "t", **meta}, ROW_LEN, count, vocab)
    return folder


def documents(count, vocab=VOCAB):
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocab, draw.integers(1, ROW_LEN + 1)) for _ in range(count)]


def test_documents_come_back_with_their_padding_unweighted(tmp_path):
    written = documents(50)
    rows = Rows(write(tmp_path / "r", written, fill=0.5), "t")
    assert len(rows) == 50 and rows.meta["fill"] == 0.5
    for row, (tokens, weights) in zip(written, (rows[i] for i in range(50)), strict=True):
        assert tokens.dtype == np.int32 and weights.dtype == np.uint8 and tokens.shape == weights.shape == (ROW_LEN,)
        assert tokens.tolist() == row.tolist() + [PAD] * (ROW_LEN - len(row))
        assert weights.tolist() == [1] * len(row) + [0] * (ROW_LEN - len(row))
    assert (tmp_path / "r" / "rows.bin").stat().st_size == 50 * ROW_LEN * 2


def test_conversations_come_back_with_their_mask(tmp_path):
    draw = np.random.default_rng(1)
    written = [(ids, draw.integers(0, 2, len(ids))) for ids in documents(50)]
    rows = Rows(write(tmp_path / "r", written), "t")
    for i, (ids, mask) in enumerate(written):
        tokens, weights = rows[i]
        assert tokens[: len(ids)].tolist() == ids.tolist() and weights[: len(ids)].tolist() == mask.tolist()
        assert not weights[len(ids) :].any() and (tokens[len(ids) :] == PAD).all()


def test_large_vocabularies_have_wide_ids(tmp_path):
    written = [np.array([70_000, 99_999])]
    rows = Rows(write(tmp_path / "r", written, vocab=100_000))
    assert rows[0][0][:2].tolist() == [70_000, 99_999] and rows.meta["dtype"] == "uint32"


def test_no_rows_at_all(tmp_path):
    assert len(Rows(write(tmp_path / "r", []), "t")) == 0


def test_a_new_folder_takes_the_place_of_the_old_whole(tmp_path):
    write(tmp_path / "r", documents(5))
    with_masks = [(ids, np.ones(len(ids))) for ids in documents(3)]
    write(tmp_path / "r", with_masks)
    assert len(Rows(tmp_path / "r")) == 3
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["meta.json", "rows.bin", "weights.bin"]


def test_a_failure_leaves_the_old_and_nothing_half_written(tmp_path):
    write(tmp_path / "r", documents(5))

    def failing():
        yield from documents(3)
        raise DataError("shard damaged")

    with pytest.raises(DataError, match="shard damaged"):
        write(tmp_path / "r", failing())
    assert [p.name for p in tmp_path.iterdir()] == ["r"] and len(Rows(tmp_path / "r")) == 5


def change(path, **values):
    """As another program would write it, its seal in order."""
    before = json.loads(path.read_text())
    del before["seal"]
    write_sealed(path, before | values)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: (f / "rows.bin").write_bytes((f / "rows.bin").read_bytes()[:-1]),
            "rows.bin: 1599 bytes, must be 1600",
        ),
        (lambda f: (f / "rows.bin").unlink(), "rows.bin: missing"),
        (lambda f: flip_a_bit(f / "rows.bin"), "rows.bin: damaged"),
        (lambda f: flip_a_bit(f / "lengths.bin"), "lengths.bin: damaged"),
        (lambda f: (f / "lengths.bin").write_bytes(b""), "lengths.bin: 0 bytes"),
        (lambda f: change(f / "meta.json", rows=49), "rows.bin: 1600 bytes, must be 1568"),
        (lambda f: change(f / "meta.json", dtype="uint32"), "rows.bin: 1600 bytes, must be 3200"),
        (
            lambda f: (f / "meta.json").write_text((f / "meta.json").read_text().replace("50", "49")),
            "meta.json: damaged",
        ),
        (lambda f: change(f / "meta.json", targets="weights.bin"), "weights.bin: missing"),
        (lambda f: change(f / "meta.json", format=1), "meta.json: damaged, or of another version"),
        (lambda f: change(f / "meta.json", tokenizer="u"), "made with another tokenizer"),
        (lambda f: (f / "meta.json").write_text("{}"), "meta.json: damaged"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json: not valid JSON"),
        (lambda f: (f / "meta.json").unlink(), "meta.json: no such file"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, words):
    folder = write(tmp_path / "r", documents(50))
    Rows(folder, "t")
    damage(folder)
    with pytest.raises(DataError, match=words) as caught:
        Rows(folder, "t")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("masks", [False, True])
def test_several_rows_at_once_are_the_rows_one_by_one(tmp_path, masks):
    draw = np.random.default_rng(2)
    written = [(ids, draw.integers(0, 2, len(ids))) if masks else ids for ids in [*documents(40), np.arange(ROW_LEN)]]
    rows = Rows(write(tmp_path / "r", written), "t")
    numbers = draw.integers(0, 41, 100)
    inputs, targets, weights = rows.shifted(numbers)
    assert inputs.dtype == targets.dtype == np.int32 and weights.dtype == np.float32
    for i, number in enumerate(numbers):
        tokens, mask = rows[int(number)]
        assert np.array_equal(inputs[i], tokens[:-1]) and np.array_equal(targets[i], tokens[1:])
        assert np.array_equal(weights[i], mask[1:])
