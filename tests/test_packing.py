"""Packing: every token once, rows nearly full. Row files: what is written is read, and damage is named."""

import itertools
import json
import random
import time
import weakref
from collections import Counter

import numpy as np
import pytest

from jaxchat.data.packing import MIN_CUT, PackStats, Rows, pack_apart, pack_conversations, pack_documents, write_rows
from jaxchat.data.sources import iterate_documents
from jaxchat.errors import DataError
from jaxchat.run_dir import write_sealed
from jaxchat.tokenizer import train_tokenizer

BOS = 0


def documents_of(lengths):
    """Documents of numbered tokens, so that each token can be told from every other."""
    number = itertools.count(1)
    return [np.array([BOS, *itertools.islice(number, n)], np.uint32) for n in lengths]


def pack(documents, row_len, window=1000):
    stats = PackStats()
    return list(pack_documents(iter(documents), row_len, BOS, window, stats)), stats


def check_law(documents, rows, stats, row_len):
    """Every token of the corpus exactly once, each run of a row an unbroken piece of one document behind a bos."""
    tokens = np.concatenate(rows)
    real = tokens[tokens != BOS]
    expected = np.concatenate(documents)
    assert sorted(real.tolist()) == expected[expected != BOS].tolist()
    owner = np.zeros(int(expected.max()) + 1, int)
    for i, document in enumerate(documents):
        owner[document[1:]] = i
    for row in rows:
        assert 0 < len(row) <= row_len and row[0] == BOS
        for piece in np.split(row, np.flatnonzero(row == BOS))[1:]:
            assert len(piece) > 1
            assert (np.diff(piece[1:].astype(int)) == 1).all() and len(set(owner[piece[1:]])) == 1
    assert stats.rows == len(rows) and stats.tokens == len(tokens) and stats.documents == len(documents)
    assert len(tokens) - len(expected) == stats.cuts  # each cut costs one bos more, and nothing else
    assert stats.fill == pytest.approx(len(tokens) / (len(rows) * row_len))


def test_every_token_exactly_once_whatever_the_lengths():
    hypothesis = pytest.importorskip("hypothesis", reason="needs the extra dev")
    draw = hypothesis.strategies

    @hypothesis.settings(max_examples=100, deadline=None, database=None)
    @hypothesis.given(
        draw.lists(draw.integers(1, 120), min_size=1, max_size=60), draw.integers(2, 70), draw.integers(1, 70)
    )
    def check(lengths, row_len, window):
        documents = documents_of(lengths)
        rows, stats = pack(documents, row_len, window)
        check_law(documents, rows, stats, row_len)
        assert all(len(row) > row_len - MIN_CUT for row in rows[:-1])
        stats = PackStats()
        rows = list(pack_apart(documents, documents, row_len, BOS, window, stats))
        check_law(documents, rows, stats, row_len)
        first, starts = np.concatenate(rows[: stats.beginnings]), {int(one[1]) for one in documents if len(one) > 1}
        places = np.flatnonzero(first == BOS)
        assert len(places) == len(documents) and {int(first[i + 1]) for i in places if i + 1 < len(first)} >= starts
        assert stats.lost == stats.cropped == 0

    check()


def test_conversations_whole_or_cut_at_a_turn_whatever_the_lengths():
    hypothesis = pytest.importorskip("hypothesis", reason="needs the extra dev")
    draw = hypothesis.strategies
    turns = draw.lists(draw.tuples(draw.integers(1, 12), draw.integers(1, 12)), min_size=1, max_size=6)

    @hypothesis.settings(max_examples=100, deadline=None, database=None)
    @hypothesis.given(draw.lists(turns, max_size=30), draw.integers(30, 80))
    def check(all_turns, row_len):
        conversations, stats = [conversation(*turns) for turns in all_turns], PackStats()
        expected = []
        for ids, mask in conversations:
            stop = max(i + 1 for i, token in enumerate(ids) if token == END and i < row_len)
            expected.append((ids[:stop], mask[:stop]))
        found = []
        for ids, mask in pack_conversations(conversations, row_len, END, stats):
            assert len(ids) == len(mask) <= row_len
            starts = [*np.flatnonzero(ids == BOS), len(ids)]
            found += [(ids[a:b].tolist(), mask[a:b].tolist()) for a, b in itertools.pairwise(starts)]
        assert sorted(found) == sorted(expected)
        assert stats.cuts == sum(len(ids) > row_len for ids, _ in conversations)

    check()


def check_dropped(documents, rows, stats, row_len, gaps):
    """Every `<|bos|>` starts a document, of which as much follows as there is room for; the rest is counted as lost."""
    found = [piece for row in rows for piece in np.split(row, np.flatnonzero(row == BOS))[1:]]
    assert all(len(row) <= row_len and row[0] == BOS for row in rows)
    by_start = {int(document[1]) if len(document) > 1 else None: document for document in documents}
    seen = []
    for piece in found:
        if len(piece) > 1:
            seen.append(int(piece[1]))
            assert np.array_equal(piece, by_start[seen[-1]][: len(piece)])
            if not gaps:  # whole, or as long as a row
                assert len(piece) == min(row_len, len(by_start[seen[-1]]))
    assert len(set(seen)) == len(seen) and len(found) == len(documents)  # every document begins in one place
    assert stats.lost == sum(map(len, documents)) - sum(map(len, rows))
    assert stats.cuts == stats.cropped and stats.rows == len(rows)


@pytest.mark.parametrize("remainder", ["drop", "whole"])
@pytest.mark.parametrize("window", [1, 5, 1000])
@pytest.mark.parametrize("row_len", [9, 33, 257])
def test_what_becomes_of_rests(row_len, window, remainder):
    draw = random.Random(row_len)
    lengths = [draw.choice([1, 2, draw.randrange(1, row_len), draw.randrange(1, 5 * row_len)]) for _ in range(300)]
    documents, stats = documents_of(lengths), PackStats()
    rows = list(pack_documents(iter(documents), row_len, BOS, window, stats, remainder))
    check_dropped(documents, rows, stats, row_len, remainder == "drop")
    if remainder != "whole":
        assert all(len(row) > row_len - MIN_CUT for row in rows[:-1])


def test_rests_by_hand():
    """Rows of 10; documents of 26, 7 and 7 tokens, their `<|bos|>` included."""
    documents = documents_of([25, 6, 6])

    def lengths(remainder):
        stats = PackStats()
        rows = list(pack_documents(documents, 10, BOS, 100, stats, remainder))
        return [len(row) for row in rows], stats.lost, [int(row[0] == BOS) for row in rows]

    assert lengths("drop") == ([10, 7, 7], 16, [1, 1, 1])  # 3 places are too few for a cut
    assert lengths("whole") == ([10, 7, 7], 16, [1, 1, 1])
    assert lengths("keep")[1:] == (0, [1, 1, 1, 1, 1])


def test_one_giant_document_takes_linear_time():
    document = np.arange(5_000_000, dtype=np.uint32)
    start = time.monotonic()
    rows, stats = pack([document], 257)
    assert time.monotonic() - start < 3  # copying the rest at each cut took minutes
    assert stats.cuts == len(rows) - 1 and stats.tokens == 5_000_000 + stats.cuts
    assert np.array_equal(np.concatenate([row[1:] for row in rows]), document[1:])


def test_memory_is_bounded_by_the_window():
    """What a row took is read after it, and no more: 20 + 13 positions of the first row are two documents."""
    read = []

    def stream():
        for document in documents_of([20] * 500):
            read.append(1)
            yield document

    rows = pack_documents(stream(), 33, BOS, 50, PackStats())
    next(rows)
    assert len(read) == 51


def test_the_real_corpus_fills_the_rows():
    texts = list(iterate_documents("chitchat", "val", 0.1))
    tokenizer = train_tokenizer(texts[:200], 600, 10**9, 10_000)
    documents = [np.array([tokenizer.bos, *ids]) for ids in tokenizer.encode_batch(texts)]
    stats = PackStats()
    rows = list(pack_documents(documents, 257, tokenizer.bos, 20_000, stats))
    assert stats.fill >= 0.995
    count = Counter(np.concatenate(documents).tolist())
    packed = Counter(np.concatenate(rows).tolist())
    assert packed[tokenizer.bos] == count[tokenizer.bos] + stats.cuts
    del packed[tokenizer.bos], count[tokenizer.bos]
    assert packed == count
    # and as texts: the pieces of each document, put together again, are the document
    pieces = [p for row in rows for p in np.split(row, np.flatnonzero(row == tokenizer.bos))[1:]]
    assert sum(len(tokenizer.decode_bytes(p)) for p in pieces) == sum(len(t.encode()) for t in texts)


END = 99


def conversation(*turns):
    """(ids, mask): bos, then per turn some user tokens (1) and assistant tokens (2) and the end of the turn."""
    ids, mask = [BOS], [0]
    for asked, answered in turns:
        ids += [1] * asked + [2] * answered + [END]
        mask += [0] * asked + [1] * (answered + 1)
    return ids, mask


def test_a_conversation_too_long_is_cut_at_a_turn_and_counted():
    stats = PackStats()
    long = conversation((5, 4), (5, 4), (5, 4))  # 1 + 3 x 10
    ((ids, mask),) = pack_conversations([long], 25, END, stats)
    assert (ids.tolist(), mask.tolist()) == (long[0][:21], long[1][:21]) and ids[-1] == END
    assert stats.cuts == 1
    ((ids, mask),) = pack_conversations([conversation((3, 40))], 25, END, stats)  # not one whole answer fits
    assert len(ids) == 25 and mask.sum() == 21
    ((ids, mask),) = pack_conversations([conversation((40, 3))], 25, END, stats)  # and nothing to learn in this one
    assert len(ids) == 25 and mask.sum() == 0
    assert stats.cuts == 3 and not list(pack_conversations([], 25, END, PackStats()))


def test_an_end_that_the_user_typed_is_no_end():
    ids, mask = conversation((5, 40))
    ids[3] = END  # not learned: not the end of an answer
    ((cut, _),) = pack_conversations([(ids, mask)], 25, END, PackStats())
    assert len(cut) == 25


def test_what_waits_does_not_keep_its_shard_in_memory():
    """Documents come as views of whole shards."""
    shards = []

    def documents():
        for i in range(30):
            shard = np.full(5_000, 7, np.uint16)
            shards.append(weakref.ref(shard))
            yield from (shard[k : k + 40 + i] for k in range(0, 4_000, 400))

    rows = pack_documents(documents(), 64, 1, 10_000, PackStats())
    next(rows)
    assert sum(shard() is not None for shard in shards) <= 1 and list(rows)


# row files


PAD, VOCAB, ROW_LEN = 7, 300, 16


def write(folder, rows, vocab=VOCAB, **meta):
    write_rows(folder, iter(rows), ROW_LEN, PAD, vocab, lambda: {"tokenizer": "t", **meta})
    return folder


def some_rows(count, vocab=VOCAB):
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocab, draw.integers(1, ROW_LEN + 1)) for _ in range(count)]


def test_documents_come_back_with_their_padding_unweighted(tmp_path):
    written = some_rows(50)
    rows = Rows(write(tmp_path / "r", written, fill=0.5), "t")
    assert len(rows) == 50 and rows.meta["fill"] == 0.5
    for row, (tokens, weights) in zip(written, (rows[i] for i in range(50)), strict=True):
        assert tokens.dtype == np.int32 and weights.dtype == np.uint8 and tokens.shape == weights.shape == (ROW_LEN,)
        assert tokens.tolist() == row.tolist() + [PAD] * (ROW_LEN - len(row))
        assert weights.tolist() == [1] * len(row) + [0] * (ROW_LEN - len(row))
    assert (tmp_path / "r" / "rows.bin").stat().st_size == 50 * ROW_LEN * 2


def test_conversations_come_back_with_their_mask(tmp_path):
    draw = np.random.default_rng(1)
    written = [(ids, draw.integers(0, 2, len(ids))) for ids in some_rows(50)]
    rows = Rows(write(tmp_path / "r", written), "t")
    for i, (ids, mask) in enumerate(written):
        tokens, weights = rows[i]
        assert tokens[: len(ids)].tolist() == ids.tolist() and weights[: len(ids)].tolist() == mask.tolist()
        assert not weights[len(ids) :].any() and (tokens[len(ids) :] == PAD).all()


def test_no_rows_at_all(tmp_path):
    assert len(Rows(write(tmp_path / "r", []), "t")) == 0


def test_a_new_folder_takes_the_place_of_the_old_whole(tmp_path):
    write(tmp_path / "r", some_rows(5))
    with_masks = [(ids, np.ones(len(ids))) for ids in some_rows(3)]
    write(tmp_path / "r", with_masks)
    assert len(Rows(tmp_path / "r")) == 3
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["meta.json", "rows.bin", "weights.bin"]


def test_a_failure_leaves_the_old(tmp_path):
    write(tmp_path / "r", some_rows(5))

    def failing():
        yield from some_rows(3)
        raise DataError("shard damaged")

    with pytest.raises(DataError, match="shard damaged"):
        write(tmp_path / "r", failing())
    assert len(Rows(tmp_path / "r")) == 5
    write(tmp_path / "r", some_rows(3))
    assert [p.name for p in tmp_path.iterdir()] == ["r"] and len(Rows(tmp_path / "r")) == 3


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
    folder = write(tmp_path / "r", some_rows(50))
    Rows(folder, "t")
    damage(folder)
    with pytest.raises(DataError, match=words) as caught:
        Rows(folder, "t")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("masks", [False, True])
def test_several_rows_at_once_are_the_rows_one_by_one(tmp_path, masks):
    draw = np.random.default_rng(2)
    written = [(ids, draw.integers(0, 2, len(ids))) if masks else ids for ids in [*some_rows(40), np.arange(ROW_LEN)]]
    rows = Rows(write(tmp_path / "r", written), "t")
    numbers = draw.integers(0, 41, 100)
    inputs, targets, weights = rows.shifted(numbers)
    assert inputs.dtype == targets.dtype == np.int32 and weights.dtype == np.float32
    for i, number in enumerate(numbers):
        tokens, mask = rows[int(number)]
        assert np.array_equal(inputs[i], tokens[:-1]) and np.array_equal(targets[i], tokens[1:])
        assert np.array_equal(weights[i], mask[1:])
