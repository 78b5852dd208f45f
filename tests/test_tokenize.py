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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stop", [0, 300, 512, 700, 1100, 1200])
def test_an_interrupted_run_goes_on_behind_its_last_whole_shard(tokenizer, tmp_path, stop):
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    expected = write_shards(TEXTS, tokenizer, whole, 5_000, origin="x")

    def documents(until):
        for i, text in enumerate(TEXTS):
            if i == until:
                raise DataError("file:2: not JSON")
            yield text
        if until == len(TEXTS):
            raise DataError("file:2: not JSON")

    with pytest.raises(DataError, match="file:2"):
        write_shards(documents(stop), tokenizer, begun, 5_000, origin="x")
    assert not (begun / "manifest.json").exists()
    kept = [p.name for p in begun.glob("*.bin")]
    with pytest.raises(DataError, match="no such file"):
        read(begun, tokenizer)
    times = {name: (begun / name).stat().st_mtime_ns for name in kept}
    assert write_shards(documents(None), tokenizer, begun, 5_000, origin="x") == expected
    assert contents(begun) == contents(whole)
    whole_shards = [name for name in kept if (begun / name).stat().st_mtime_ns == times[name]]
    assert whole_shards == kept and len(kept) == stop // 512


def test_duplicates_are_counted_and_by_choice_left_out(tokenizer, tmp_path):
    texts = [*TEXTS, *TEXTS[:30], TEXTS[7]]
    kept = write_shards(texts, tokenizer, tmp_path / "kept", 10_000)
    dropped = write_shards(texts, tokenizer, tmp_path / "dropped", 10_000, dedup=True)
    plain = write_shards(TEXTS, tokenizer, tmp_path / "plain", 10_000)
    assert (kept["documents"], kept["duplicates"]) == (len(texts), 31)
    assert (dropped["documents"], dropped["duplicates"], plain["duplicates"]) == (len(TEXTS), 31, 0)
    assert dropped["shards"] == plain["shards"]


@pytest.mark.parametrize("change", ["origin", "shard", "journal"])
def test_what_does_not_belong_to_it_is_not_gone_on_with(tokenizer, tmp_path, change):
    folder = tmp_path / "t"

    def half():
        yield from TEXTS[:1100]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(half(), tokenizer, folder, 5_000, origin="x")
    if change == "shard":
        damaged = bytearray((folder / "00000.bin").read_bytes())
        damaged[7] ^= 1
        (folder / "00000.bin").write_bytes(damaged)
    if change == "journal":
        (folder / "unfinished.json").write_text('{"shards": 3')
    write_shards(TEXTS, tokenizer, folder, 5_000, origin="y" if change == "origin" else "x")
    write_shards(TEXTS, tokenizer, tmp_path / "whole", 5_000, origin="y" if change == "origin" else "x")
    assert contents(folder) == contents(tmp_path / "whole")


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
