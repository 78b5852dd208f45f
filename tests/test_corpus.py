"""Corpus: every kind of file, one split for ever, and each kind of bad input named."""

import dataclasses
import gzip
import itertools
import json
import os
import random
import zlib
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.config import DataConfig, load_config
from jaxchat.data import sources as files
from jaxchat.data.sources import (
    GENERATORS,
    Generator,
    document_hash,
    fingerprint,
    interleaved,
    iterate_documents,
    open_corpus,
    parse,
)
from jaxchat.errors import DataError, UsageError
from train.plan import text_bytes

BOOK = "\n\n".join(f"Paragraph {i}. " + "그래서 그는 길을 떠났다. " * 40 for i in range(60))


def everything(path, split="all", fraction=0.1):
    return list(iterate_documents(f"files:{path}", split, fraction))


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_chitchat_is_conversations_a_message_a_line():
    documents = list(iterate_documents("chitchat"))
    assert len(documents) == 7168
    assert documents[0].splitlines()[0] == "Hello"
    assert all(d.strip() for d in documents) and not any("\n\n" in d for d in documents)
    assert 12e6 < sum(map(len, documents)) < 13e6


def test_the_splits_share_nothing_and_lack_nothing():
    train, val, whole = (list(iterate_documents("chitchat", split, 0.02)) for split in ("train", "val", "all"))
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(whole)
    assert 0.01 < len(val) / len(whole) < 0.03
    # more held out means the same documents and others, never other documents
    assert set(val) <= set(iterate_documents("chitchat", "val", 0.05))


def test_the_split_depends_on_the_text_alone(tmp_path):
    texts = [f"document {i}" for i in range(400)]
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(jsonl(*({"text": t} for t in texts)))
        random.Random(1).shuffle(texts)
    one, two = (everything(tmp_path / f"{n}.jsonl", "val") for n in ("one", "two"))
    assert set(one) == set(two) and 20 < len(one) < 60
    assert set(one) == {t for t in texts if document_hash(t) < 0.1}
    assert document_hash("document 1") == 0xCAA0C419ED4B / 2**48  # the first digits of its sha256sum


@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.01, 0.5, 0.999999])
def test_a_tiny_corpus_still_has_both_splits(tmp_path, fraction):
    for count in (2, 3, 10):
        path = tmp_path / f"{count}.jsonl"
        path.write_text(jsonl(*({"text": f"text {i}"} for i in range(count))))
        train, val = everything(path, "train", fraction), everything(path, "val", fraction)
        assert train and val
        assert sorted(train + val) == [f"text {i}" for i in range(count)]


@pytest.mark.parametrize("texts", [["one"], ["same", "same", "same"]])
def test_one_document_cannot_be_split(tmp_path, texts):
    path = tmp_path / "x.jsonl"
    path.write_text(jsonl(*({"text": t} for t in texts)))
    for split in ("train", "val"):
        with pytest.raises(DataError, match="only one document; at least 2"):
            everything(path, split)
    assert everything(path) == texts


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.txt.zst", "A.TXT"])
def test_a_book_becomes_several_documents(tmp_path, name):
    path = tmp_path / name
    data = b"\xef\xbb\xbf" + BOOK.replace("\n", "\r\n").encode()  # as some editors write it
    if name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    documents = everything(tmp_path / name)
    assert "\n\n".join(d.strip("\n") for d in documents) == BOOK
    assert 5 < len(documents) < 20
    assert all(4000 <= len(d) < 6000 for d in documents[:-1])
    assert everything(path, "val", 0.2) and everything(path, "train", 0.2)


@pytest.mark.parametrize("separator", ["", " ", "\n"])
def test_text_without_paragraphs_is_cut_all_the_same(tmp_path, separator):
    text = separator.join("단어" for _ in range(40_000))
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    documents = everything(tmp_path / "x.txt")
    assert len(documents) >= 4 and max(map(len, documents)) <= 20_000
    assert "".join(documents).replace("\n", "") == text.replace("\n", "")  # nothing lost but line breaks at the cuts


def test_jsonl_with_texts_and_conversations(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "안녕"}]
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl({"text": "one\ntwo"}, {"messages": chat}) + "\n" + jsonl({"text": "  "}, {"text": "x"}))
    assert everything(path) == ["one\ntwo", "hi\n안녕", "x"]
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert everything(packed) == everything(path)


def test_parquet(tmp_path):
    texts = [f"text {i}" for i in range(3000)] + [None, ""]
    pq.write_table(pa.table({"id": range(3002), "text": texts}), tmp_path / "a.parquet", row_group_size=700)
    assert everything(tmp_path / "a.parquet") == texts[:3000]


def test_folders_and_globs_find_every_file_in_order(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.jsonl", "sub/deep/d.txt", "ignored.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(jsonl({"text": name}) if name.endswith("jsonl") else name)
    assert everything(tmp_path) == ["a.md", "b.txt", "sub/c.jsonl", "sub/deep/d.txt"]
    assert everything(tmp_path / "*.txt") == ["b.txt"]
    assert everything(tmp_path / "**" / "*.txt") == ["b.txt", "sub/deep/d.txt"]
    odd = tmp_path / "odd [name]*"
    odd.mkdir()
    (odd / "x.txt").write_text("found")
    assert everything(odd) == ["found"]


def bad_files(folder):
    """name -> (bytes, words of the message)"""
    deep = b"[" * 100_000 + b"]" * 100_000
    pq.write_table(pa.table({"body": ["x"]}), folder / "p1.parquet")
    pq.write_table(pa.table({"text": [1]}), folder / "p2.parquet")
    cases = {
        "empty.txt": (b"", "no text"),
        "blank.txt": (b" \n\n\t\n", "no text"),
        "empty.jsonl": (b"\n\n", "no text"),
        "nul.txt": (b"some\0text", "binary"),
        "random.md": (random.Random(0).randbytes(5000), "binary|not text in UTF-8"),
        "utf16.txt": ("hello".encode("utf-16-le"), "binary"),  # without its mark
        "cut16.txt": ("hello".encode("utf-16")[:-1], "not text in UTF-8"),
        "cp949.txt": ("한국어 문장".encode("cp949"), r"not text in UTF-8 .*data\.encoding"),
        "bad.jsonl": (b'{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: not JSON"),
        "list.jsonl": (b"[1, 2]\n", r"list\.jsonl:1: needs a field `text`"),
        "field.jsonl": (b'{"content": "a"}\n', r"field\.jsonl:1: needs a field `text`"),
        "parts.jsonl": (b'{"messages": [{"role": "user"}]}\n', r"parts\.jsonl:1: needs"),
        "deep.jsonl": (deep, r"deep\.jsonl:1: not JSON"),
        "digits.jsonl": (b"9" * 10_000, r"digits\.jsonl:1: "),
        "nojson.jsonl": (b"\xff\xfd", "not text in UTF-8"),
        "none.gz": (b"plain", "unknown kind"),
        "plain.txt.gz": (b"not gzipped", "cannot be read"),
        "cut.txt.gz": (gzip.compress(BOOK.encode())[:-20], "cannot be read"),
        "plain.txt.zst": (b"not compressed at all", "cannot be read"),
        "text.parquet": (b"not parquet", "not a readable parquet"),
        "p1.parquet": ((folder / "p1.parquet").read_bytes(), r"no column `text` \(it has body\)"),
        "p2.parquet": ((folder / "p2.parquet").read_bytes(), r"p2\.parquet:1: needs a field `text`"),
        "cut.parquet": ((folder / "p1.parquet").read_bytes()[:-30], "not a readable parquet"),
    }
    flipped = bytearray(gzip.compress(BOOK.encode()))
    flipped[len(flipped) // 2] ^= 255
    assert zlib.crc32(flipped)
    return cases | {"flipped.txt.gz": (bytes(flipped), "cannot be read|not text in UTF-8|binary")}


def test_bad_files_are_named_in_one_line(tmp_path):
    for name, (content, words) in bad_files(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        for split in ("all", "train"):
            with pytest.raises(DataError, match=words) as caught:
                everything(path, split)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value), name


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_whatever_is_damaged_is_read_or_named_in_one_line(tmp_path, name):
    """Bits flipped at random, most of them at the two ends, where formats keep what they are."""
    texts = [f"text {i} 안녕 " * (i % 40 + 1) for i in range(100)]
    lines = jsonl(*({"text": text} for text in texts)).encode()
    path, draw = tmp_path / name, random.Random(name)
    if name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write("\n\n".join(texts).encode())
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"id": range(100), "text": texts}), path)
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        data = bytearray(whole)
        for place in (draw.randrange(len(data)), draw.randrange(30), len(data) - 1 - draw.randrange(300)):
            data[place] ^= draw.choice([0, 1 << draw.randrange(8)])
        path.write_bytes(data)
        try:
            everything(path)
        except DataError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 10


def test_what_is_not_there(tmp_path):
    for pattern in (tmp_path / "no.txt", tmp_path / "*.txt", tmp_path / "none" / "**", tmp_path):
        with pytest.raises(DataError, match="no such files"):
            everything(pattern)
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"a\.pdf is of an unknown kind"):
        everything(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")  # would be waited for until the end of time
    with pytest.raises(DataError, match="no such files"):
        everything(tmp_path / "pipe.txt")
    for source in ("", "shakespeare", "hf:", "file:x"):
        with pytest.raises(UsageError, match=r"data\.source"):
            list(iterate_documents(source))


def test_reading_needs_no_memory_for_the_whole_file(tmp_path):
    """40 MB without a line break, read while the process holds a few pieces at a time."""
    import tracemalloc

    path = tmp_path / "big.txt"
    path.write_text("word " * 8_000_000)
    tracemalloc.start()
    assert sum(map(len, files.read_file(path))) == 40_000_000
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_the_fingerprint_changes_with_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = f"files:{tmp_path}"

    def mark(source, **settings):
        return fingerprint(open_corpus(DataConfig(source=source, **settings)))

    before = mark(source)
    assert mark(source) == before != mark("chitchat") == mark("chitchat")
    assert mark(source, encoding="cp949") != before
    path.write_text("three")
    after = mark(source)
    (tmp_path / "b.txt").write_text("x")
    assert len({before, after, mark(source), mark(f"1 {source} + 1 chitchat")}) == 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_byte_order_marks_are_read_and_vanish(tmp_path, name, encoding):
    text = "한국어 문장, and English."
    content = (jsonl({"text": text}) if "jsonl" in name else text).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / "b.txt").write_text("another")
    assert everything(tmp_path) == [text, "another"]


def test_an_encoding_may_be_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("한국어 문장".encode("cp949"))
    data = DataConfig(source=f"files:{tmp_path}", encoding="cp949")
    assert list(iterate_documents(data)) == ["한국어 문장"]
    with pytest.raises(DataError, match="not text in utf-16"):
        list(iterate_documents(dataclasses.replace(data, encoding="utf-16")))
    for name in ("klingon", "rot13"):  # the second is a codec of Python, but no encoding
        with pytest.raises(UsageError, match=rf"data\.encoding: '{name}' is unknown"):
            list(iterate_documents(dataclasses.replace(data, encoding=name)))


def test_what_is_no_text_is_left_out_and_counted_and_giants_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_DOCUMENT", 10_000)
    giant = "\n\n".join("A paragraph of a giant. " * 20 for _ in range(100))
    texts = ["one", "", " \n ", "two\0", giant, "x" * 50_000, "three"]
    (tmp_path / "a.jsonl").write_text(jsonl(*({"text": text} for text in texts)))
    pq.write_table(pa.table({"text": ["four", None, "", "fi\0ve"]}), tmp_path / "b.parquet")
    counts = Counter()
    found = [d for name in ("a.jsonl", "b.parquet") for d in files.read_file(tmp_path / name, counts=counts)]
    assert counts == {"empty": 4, "binary": 2, "giants": 2}
    assert found[0] == "one" and found[-2:] == ["three", "four"] and all(len(d) <= 10_000 for d in found)
    assert "".join("".join(found[1:-2]).split()) == "".join((giant + "x" * 50_000).split())  # nothing lost


def test_a_mixture_is_its_sources_each_with_its_share(tmp_path):
    for name, count in (("a", 300), ("b", 100)):
        records = ({"text": f"{name} {i} " + "word " * (10 if name == "a" else 20)} for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text(jsonl(*records))
    source = f"3 files:{tmp_path}/a.jsonl + 1 files:{tmp_path}/b.jsonl"
    assert parse(source) == [(f"files:{tmp_path}/a.jsonl", 0.75), (f"files:{tmp_path}/b.jsonl", 0.25)]
    parts = open_corpus(DataConfig(source=source))
    mixed = list(itertools.islice(interleaved(parts, "train", 0.1), 100))
    share = sum(len(d) for d in mixed if d[0] == "a") / sum(map(len, mixed))
    assert 0.72 < share < 0.78
    whole = list(interleaved(parts, "train", 0.1))
    assert sorted(whole) == sorted(iterate_documents(source, "train", 0.1))
    assert parse("2 chitchat") == [("chitchat", 1.0)]
    for wrong in ("1 chitchat + files:x", "1 chitchat + 0 files:x", "1 chitchat + 2", "0.5 nothing", "chitchat + x"):
        with pytest.raises(UsageError, match=r"data\.source"):
            parse(wrong)


def test_the_lottery_is_a_source():
    documents = list(iterate_documents("synthetic:lottery:50"))
    assert len(documents) == len(set(documents)) == 50 == len(list(iterate_documents("synthetic:lottery:50")))
    for wrong in ("synthetic:", "synthetic:poems", "synthetic:lottery:", "synthetic:lottery:0", "synthetic:lottery:-3"):
        with pytest.raises(UsageError, match="synthetic:lottery"):
            list(iterate_documents(wrong))


def test_a_mixture_holds_out_of_all_sources_what_it_holds_out_of_one(tmp_path):
    """A small source has to hold out more than its fraction, and shares documents with a large one."""
    texts = [f"document number {i}" for i in range(400)]
    (tmp_path / "big.jsonl").write_text(jsonl(*({"text": text} for text in texts)))
    high = sorted(texts, key=document_hash)[200:203]  # none of them would be held out of the large one
    (tmp_path / "small.jsonl").write_text(jsonl(*({"text": text} for text in high)))
    source = f"0.5 files:{tmp_path}/big.jsonl + 0.5 files:{tmp_path}/small.jsonl"
    train, val = (set(iterate_documents(source, split, 0.01)) for split in ("train", "val"))
    assert not train & val and high[0] in val and set(high[1:]) <= train
    low = sorted(texts, key=document_hash)[:2]
    (tmp_path / "small.jsonl").write_text(jsonl(*({"text": text} for text in low)))
    with pytest.raises(DataError, match=r"small\.jsonl: all of its few documents would be held out"):
        list(iterate_documents(source, "train", 0.2))


def test_a_new_source_needs_a_line_in_the_table_only(monkeypatch):
    poems = Generator("poems", lambda source: iter(["roses are red", "violets are blue"]), lambda source: 29)
    monkeypatch.setitem(GENERATORS, "poems", poems)
    assert list(iterate_documents("poems")) == ["roses are red", "violets are blue"]
    assert text_bytes(load_config("nano", ["data.source=2 poems + 1 chitchat"])) > 29
