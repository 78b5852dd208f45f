"""Corpus: every kind of file, one split for ever, and each kind of bad input named."""

import dataclasses
import gzip
import itertools
import json
import os
import random
import unicodedata
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
        with pytest.raises(DataError, match="at least 2 are needed"):
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


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_every_type_of_text_column_is_read(tmp_path, kind):
    column = pa.array(["one", "둘", None, "one"])
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    pq.write_table(pa.table({"id": range(4), "text": column, "body.x": column}), tmp_path / "a.parquet")
    for name in ("text", "body.x"):
        counts = Counter()
        assert list(files.read_file(tmp_path / "a.parquet", "auto", counts, name)) == ["one", "둘", "one"]
        assert counts == {"empty": 1} and files.text_size(tmp_path / "a.parquet", name) > 5


def test_conversations_of_any_form_are_text(tmp_path):
    talks = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "안녕"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "안녕"}]},
        {"text": None, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]},
                                    {"role": "assistant", "content": None}, {"role": "tool", "content": "안녕"}]},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text(jsonl(*talks, talks[0]["messages"]))
    for i, talk in enumerate(talks[:2]):
        pq.write_table(pa.Table.from_pylist([talk]), tmp_path / f"b{i}.parquet")
    assert everything(tmp_path) == ["hi\n안녕"] * 6


def test_the_column_with_the_text_may_be_named(tmp_path):
    texts = [f"text {i}" for i in range(30)]
    (tmp_path / "a.ndjson").write_text(jsonl(*({"story": text, "text": 7} for text in texts[:10])))
    (tmp_path / "b.json").write_text(json.dumps({"rows": [{"story": text} for text in texts[10:20]]}))
    pq.write_table(pa.table({"id": range(10), "story": texts[20:]}), tmp_path / "c.parquet")
    data = DataConfig(source=f"files:{tmp_path}", column="story")
    assert list(iterate_documents(data)) == texts
    with pytest.raises(DataError, match=r"c\.parquet.*`lines`.*story.*data\.column"):
        list(iterate_documents(DataConfig(source=f"files:{tmp_path}/c.parquet", column="lines")))


JSON = {  # a file -> its records
    '[{"text": "a]"}, {"text": "\\u00e9\\\\"},\n\n "c"]': [{"text": "a]"}, {"text": "é\\"}, "c"],
    '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}': [{"text": "a"}, {"text": "b"}],
    '{"text": "a", "tags": ["b"]}': [{"text": "a", "tags": ["b"]}],
    '{\n "text": "a"\n}\n\ufeff{"text": "b"}\n': [{"text": "a"}, {"text": "b"}],
    "[1.25e-3, -12345, true, null, [[]], -Infinity]": [0.00125, -12345, True, None, [[]], float("-inf")],
    '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]': [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ],
    '{"id": 1, "turns": [{"from": "human", "value": "a"}]}': [{"id": 1, "turns": [{"from": "human", "value": "a"}]}],
    "[]": [],
    " \n": [],
}


@pytest.mark.parametrize("chars", [1, 5, 1 << 20])
def test_json_is_read_whatever_is_around_its_records(tmp_path, monkeypatch, chars):
    monkeypatch.setattr(files, "JSON_CHARS", chars)
    for text, records in JSON.items():
        (tmp_path / "a.json").write_text("\ufeff" + text, encoding="utf-8")
        assert [record for _, record in files.read_records(tmp_path / "a.json")] == records
    for wrong in ("[1, 2", "[1] 2]", '["a" "b', "[tru]", '{"a": }', "]"):
        (tmp_path / "a.json").write_text("\n\n" + wrong)
        with pytest.raises(DataError, match=r"a\.json:3: not JSON"):
            list(files.read_records(tmp_path / "a.json"))


def test_one_line_with_an_array_of_records_is_those_records(tmp_path):
    path, pairs = tmp_path / "a.jsonl", [{"question": "a", "answer": 1}, {"question": "b", "answer": 2}]
    said, line = [{"role": "user", "content": "a"}], json.dumps(pairs)
    for text, records in {
        f"\n{line}\n\n": pairs,
        f"{line}\n{line}\n": [pairs, pairs],
        json.dumps(said): [said],
        '["a", "b"]': [["a", "b"]],
        "[]": [[]],
    }.items():
        path.write_text(text)
        assert [record for _, record in files.read_records(path)] == records


def test_an_array_needs_no_memory_for_the_whole_file(tmp_path):
    import tracemalloc

    (tmp_path / "a.json").write_text("[" + ",\n".join(json.dumps({"text": "word " * 2000}) for _ in range(2000)) + "]")
    tracemalloc.start()
    assert sum(map(len, files.read_file(tmp_path / "a.json"))) == 20_000_000
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_byte_order_marks_inside_a_file_are_no_text(tmp_path):
    mark = "\ufeff"
    (tmp_path / "a.txt").write_text(f"{mark}one\n{mark}{mark}two\n{mark}\nthree", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(f'{mark}{{"text": "four"}}\n{mark}\n{mark}{{"text": "five"}}', encoding="utf-8")
    assert everything(tmp_path) == ["one\ntwo\n\nthree", "four", "five"]


def test_records_without_text_are_left_out_and_counted(tmp_path):
    lines = '{"text": "one"}\n\n{"text": null}\n{"text": NaN}\n{"id": 3}\nnull\n"two"\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "about.json").write_text('{"title": "a book"}')  # beside the text
    counts = Counter()
    found = [d for path in files.find_files(f"files:{tmp_path}") for d in files.read_file(path, counts=counts)]
    assert found == ["one", "two"] and counts == {"empty": 5}


def test_what_lies_beside_the_text_is_left_out_and_said_once(tmp_path, capsys):
    names = ("a.txt", "README.md", "sub/LICENSE.txt", "LICENSE", "b.pdf", "c.pdf", "dataset_infos.json", "d.json")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("json") else name)
    assert everything(tmp_path) == everything(tmp_path / "**") == ["a.txt", "d.json"]
    assert everything(tmp_path) and capsys.readouterr().err.count("6 files") == 2
    for named in ("README.md", "README*"):
        assert everything(tmp_path / named) == ["README.md"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "d.json").unlink()
    with pytest.raises(DataError, match=r"README\.md"):
        everything(tmp_path)


ODD_NAMES = {  # what is asked for -> the files that are read, of all these
    "book [1].txt": ["book [1].txt"],
    "old [a]/*.txt": ["old [a]/x [2].txt"],
    "*/x [2].txt": ["old [a]/x [2].txt"],
    "book [0-9].txt": ["book 1.txt"],
    "what?.txt": ["what?.txt"],
    "st*r/*.txt": ["st*r/y.txt"],
    r"st*r\y.txt": ["st*r/y.txt"],
    " book 1.txt": ["book 1.txt"],
    "~tilde.txt": ["~tilde.txt"],
    "two\nlines.txt": ["two\nlines.txt"],
    unicodedata.normalize("NFC", "소설.txt"): [unicodedata.normalize("NFD", "소설.txt")],
    "a + b.txt": ["a + b.txt"],
    "star/../st*r/": ["st*r/y.txt"],
}


def test_a_path_that_exists_is_no_pattern(tmp_path, monkeypatch):
    for name in {*itertools.chain(*ODD_NAMES.values()), "whatX.txt", "star/y.txt", "old a/x 2.txt"}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    for name, found in ODD_NAMES.items():
        assert everything(name) == found, name
    joined = "files:a + b.txt + files:book [1].txt+files:st*r"
    assert list(iterate_documents(joined)) == ["a + b.txt", "book [1].txt", "st*r/y.txt"]


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt", "*/../**/a.txt"])
def test_each_file_is_read_once(tmp_path, pattern):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "a.txt").write_text("one")
    for loop in ("l1", "l2", "l3"):  # without a memory of folders these are 3 ** 40 ways
        (tmp_path / "sub" / "deep" / loop).symlink_to(tmp_path)
    (tmp_path / "link.txt").symlink_to("sub/a.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.link(tmp_path / "sub" / "a.txt", tmp_path / "sub" / "hard.txt")
    assert everything(tmp_path / pattern) == ["one"]


def test_sources_without_shares_are_one_text(tmp_path):
    for name, count in (("a", 300), ("b", 100)):
        (tmp_path / f"{name}.jsonl").write_text(jsonl(*({"text": f"{name} {i}"} for i in range(count))))
    a, b = (f"files:{tmp_path}/{name}.jsonl" for name in "ab")
    (part,) = open_corpus(DataConfig(source=f"{a} + {b} + files:{tmp_path}/*.jsonl"))
    assert part.weight == 1 and len(list(part.documents())) == 400  # so each counts by its size, and once
    assert len(list(iterate_documents(f"chitchat + {a}"))) == 7168 + 300
    with pytest.raises(DataError, match=r"b\.jsonl"):
        open_corpus(DataConfig(source=f"0.5 files:{tmp_path} + 0.5 {b}"))
    with pytest.raises(UsageError, match="shares"):
        parse(f"0.5 {a} + {b}")


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
    pq.write_table(pa.table({"text": [b"fine", b"\xff\xfe"]}), folder / "p3.parquet")
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
        "list.jsonl": (b"[1, 2]\n", r"list\.jsonl:1: "),
        "number.jsonl": (b'{"text": "a"}\n{"text": 5}\n', r"number\.jsonl:2: .*`text`.*5"),
        "field.jsonl": (b'{"content": "a"}\n', r"field\.jsonl: .*`text`.*content.*data\.column"),
        "nulls.jsonl": (b'{"text": null}\n{"text": NaN}\n', r"nulls\.jsonl: .*`text`"),
        "parts.jsonl": (b'{"messages": [{"role": "user"}]}\n', r"parts\.jsonl: "),
        "open.json": (b'[{"text": "a"},\n{"text": "b"}', r"open\.json:2: not JSON"),
        "comma.json": (b'[\n{"text": "a"},\n{"text" "b"}]', r"comma\.json:3: not JSON"),
        "fields.json": (b'[{"body": "a"}, {"body": "b"}]', r"fields\.json: .*`text`.*body.*data\.column"),
        "deep.jsonl": (deep, r"deep\.jsonl:1: not JSON"),
        "digits.jsonl": (b"9" * 10_000, r"digits\.jsonl:1: "),
        "nojson.jsonl": (b"\xff\xfd", "not text in UTF-8"),
        "none.gz": (b"plain", "other kinds"),
        "plain.txt.gz": (b"not gzipped", "cannot be read"),
        "cut.txt.gz": (gzip.compress(BOOK.encode())[:-20], "cannot be read"),
        "plain.txt.zst": (b"not compressed at all", "cannot be read"),
        "text.parquet": (b"not parquet", "not a readable parquet"),
        "p1.parquet": ((folder / "p1.parquet").read_bytes(), r"`text`.*body.*data\.column"),
        "p2.parquet": ((folder / "p2.parquet").read_bytes(), r"p2\.parquet:1: .*`text`.*1"),
        "p3.parquet": ((folder / "p3.parquet").read_bytes(), r"p3\.parquet:2: .*UTF-8"),
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
    with pytest.raises(DataError, match=r"\.pdf 2; first .*a\.pdf"):
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
