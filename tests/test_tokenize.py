"""Token shards: every document comes back, and every kind of damage is found before training."""

import json

import numpy as np
import pytest

from jaxchat.data.tokenize import read_documents, token_dtype, write_shards
from jaxchat.errors import DataError
from jaxchat.text.tokenizer import train_tokenizer

TEXTS = [f"Document {i}: " + "안녕 hello <|bos|> \ud800" * (i % 7) for i in range(1200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300, 10**9, 10_000)


@pytest.fixture
def shards(tokenizer, tmp_path):
    manifest = write_shards(TEXTS, tokenizer, tmp_path / "t", 10_000)
    return tmp_path / "t", manifest


def read(folder, tokenizer):
    return list(read_documents(folder, tokenizer.digest))


def test_every_document_comes_back(tokenizer, shards):
    folder, manifest = shards
    documents = read(folder, tokenizer)
    assert all(d[0] == tokenizer.bos and d.dtype == np.uint16 for d in documents)
    assert [tokenizer.decode(d[1:]) for d in documents] == [t.replace("\ud800", "\ufffd") for t in TEXTS]
    assert sum(map(len, documents)) == manifest["tokens"] == sum(s["tokens"] for s in manifest["shards"])
    assert manifest["documents"] == len(TEXTS) and manifest["chars"] == sum(map(len, TEXTS))
    assert manifest["bytes"] == sum(len(t.encode("utf-8", "surrogatepass")) for t in TEXTS)
    assert len(manifest["shards"]) == 3  # of at least 10,000 tokens, the last one of what is left
    assert all(s["tokens"] >= 10_000 for s in manifest["shards"][:-1])
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert sorted(p.name for p in folder.iterdir()) == ["00000.bin", "00001.bin", "00002.bin", "manifest.json"]


def test_shards_are_little_endian_and_no_wider_than_needed(tokenizer, shards):
    folder, manifest = shards
    first = np.array([tokenizer.bos, *tokenizer.encode(TEXTS[0])])
    raw = (folder / "00000.bin").read_bytes()
    assert [raw[2 * i] + 256 * raw[2 * i + 1] for i in range(len(first))] == first.tolist()
    assert manifest["dtype"] == "uint16"
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32


def test_writing_again_leaves_nothing_of_before(tokenizer, shards):
    folder, _ = shards
    write_shards(TEXTS[:3], tokenizer, folder, 10**9, origin="x")
    assert sorted(p.name for p in folder.iterdir()) == ["00000.bin", "manifest.json"]
    assert len(read(folder, tokenizer)) == 3


def test_a_failure_leaves_nothing_half_written(tokenizer, tmp_path):
    def failing():
        yield from TEXTS
        raise DataError("file:2: not JSON")

    with pytest.raises(DataError, match="file:2"):
        write_shards(failing(), tokenizer, tmp_path / "t", 1000)
    assert not list(tmp_path.iterdir())


def test_no_documents(tokenizer, tmp_path):
    assert write_shards([], tokenizer, tmp_path / "t", 1000)["tokens"] == 0
    assert read(tmp_path / "t", tokenizer) == []


def damage_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def swap(folder):
    first, second = folder / "00000.bin", folder / "00001.bin"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "00001.bin").write_bytes((f / "00001.bin").read_bytes()[:-6]), "00001.bin: .*truncated"),
        (lambda f: (f / "00001.bin").unlink(), "00001.bin: missing"),
        (lambda f: flip_a_bit(f / "00001.bin"), "00001.bin: damaged"),
        (lambda f: (f / "00000.bin").write_bytes(b""), "00000.bin: .*truncated"),
        (swap, "00000.bin: "),
        (lambda f: damage_manifest(f, dtype="uint32"), "manifest.json: dtype uint32 does not go"),
        (lambda f: damage_manifest(f, tokenizer="0" * 64), "made with another tokenizer; choose another --run-dir"),
        (lambda f: damage_manifest(f, format=0), "manifest.json: damaged, or of another version"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: damaged"),
        (lambda f: (f / "manifest.json").write_text('{"format'), "manifest.json: not valid JSON"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: no such file"),
    ],
)
def test_damage_is_found_and_named(tokenizer, shards, damage, words):
    folder, _ = shards
    damage(folder)
    with pytest.raises(DataError, match=words) as caught:
        read(folder, tokenizer)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_another_tokenizer_is_noticed(shards):
    other = train_tokenizer(TEXTS, 290, 10**9, 10_000)
    with pytest.raises(DataError, match="made with another tokenizer"):
        read(shards[0], other)
