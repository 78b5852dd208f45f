"""Token shards: documents come back, damage is found before training; and jobs in other processes or over Ray."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxchat.data import shards as module
from jaxchat.data.shards import (
    Distinct,
    Job,
    parallel_map,
    read_documents,
    token_dtype,
    tokenize_unit,
)
from jaxchat.data.sources import Unit, document_hash, find_files
from jaxchat.errors import DataError, UsageError
from jaxchat.run_dir import write_sealed
from jaxchat.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"Document {i}: " + "안녕 hello <|bos|> \ud800" * (i % 7) for i in range(1200)]
LIMIT = 0.1
SPLITS = {split: [t for t in TEXTS if (document_hash(t) < LIMIT) == (split == "val")] for split in ("train", "val")}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300, 10**9, 10_000)


@pytest.fixture(scope="module")
def job(tokenizer, tmp_path_factory):
    """One file of many documents, to be tokenized into parts of 5,000 tokens."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer.save(folder / "tokenizer")
    return Job(Unit("files", str(folder / "a.jsonl")), LIMIT, str(folder / "tokenizer"), "", 5_000, "x")


def to(job, folder, **changes):
    return dataclasses.replace(job, directory=str(folder), **changes)


@pytest.fixture
def shards(job, tmp_path):
    return tmp_path / "t", tokenize_unit(to(job, tmp_path / "t"))


def read(folder, tokenizer, split="train"):
    return [tokens for tokens, _ in read_documents(folder, split, tokenizer.digest)]


def test_every_document_comes_back(tokenizer, shards):
    folder, manifest = shards
    for split, texts in SPLITS.items():
        documents = read(folder, tokenizer, split)
        assert all(d[0] == tokenizer.bos and d.dtype == np.uint16 for d in documents)
        assert [tokenizer.decode(d[1:]) for d in documents] == [t.replace("\ud800", "\ufffd") for t in texts]
        sizes = manifest["splits"][split]
        assert sum(map(len, documents)) == sizes["tokens"] == sum(p[split]["tokens"] for p in manifest["parts"])
        assert sizes["documents"] == len(texts) and sizes["chars"] == sum(map(len, texts))
        assert sizes["bytes"] == sum(len(t.encode("utf-8", "surrogatepass")) for t in texts)
        hashes = [number for _, number in read_documents(folder, split, tokenizer.digest)]
        assert len(set(hashes)) == len(set(texts)) and all(n / 2**64 < LIMIT for n in hashes if split == "val")
    assert len(manifest["parts"]) == 3 and all(p["train"]["tokens"] >= 5_000 for p in manifest["parts"][:-1])
    names = [f"{s}-{i:03d}.{end}" for s in ("train", "val") for i in range(3) for end in ("bin", "hash")]
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", *names]


def test_many_cores_and_one_give_the_same_bytes(job, tmp_path):
    tokenize_unit(to(job, tmp_path / "one"))
    tokenize_unit(to(job, tmp_path / "many"), alone=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_shards_are_little_endian_and_no_wider_than_needed(tokenizer, shards):
    folder, manifest = shards
    first = np.array([tokenizer.bos, *tokenizer.encode(SPLITS["train"][0])])
    raw = (folder / "train-000.bin").read_bytes()
    assert [raw[2 * i] + 256 * raw[2 * i + 1] for i in range(len(first))] == first.tolist()
    assert manifest["dtype"] == "uint16"
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32


def test_done_before_is_done_and_another_origin_begins_anew(job, shards):
    folder, manifest = shards
    times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert tokenize_unit(to(job, folder)) == manifest
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    other = tokenize_unit(to(job, folder, origin="y", shard_tokens=10**9))
    assert len(other["parts"]) == 1 and len(list(folder.iterdir())) == 5


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stopped(Exception):
    pass


def interrupted(monkeypatch, job, stop):
    """Tokenize until document number `stop` is asked for."""

    def documents(self, counts=None):
        for i, text in enumerate(whole(self, counts)):
            if i == stop:
                raise Stopped
            yield text
        raise Stopped

    whole = Unit.documents
    with monkeypatch.context() as patch:
        patch.setattr(Unit, "documents", documents)
        with pytest.raises(Stopped):
            tokenize_unit(job)


@pytest.mark.parametrize("stop", [0, 300, 512, 700, 1100, 1200])
def test_an_interrupted_run_goes_on_behind_its_last_whole_part(job, tokenizer, tmp_path, monkeypatch, stop):
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    expected = tokenize_unit(to(job, whole))
    interrupted(monkeypatch, to(job, begun), stop)
    assert not (begun / "manifest.json").exists()
    times = {p: p.stat().st_mtime_ns for p in begun.glob("*.bin")}
    with pytest.raises(DataError, match="no such file"):
        read(begun, tokenizer)
    assert tokenize_unit(to(job, begun)) == expected
    assert contents(begun) == contents(whole)
    assert {p: p.stat().st_mtime_ns for p in times} == times and len(times) == 2 * (stop // 512)


@pytest.mark.parametrize("change", ["origin", "shard", "hashes", "journal"])
def test_what_does_not_belong_to_it_is_not_gone_on_with(job, tmp_path, monkeypatch, change):
    folder = tmp_path / "t"
    interrupted(monkeypatch, to(job, folder), 1100)
    if change in ("shard", "hashes"):
        flip_a_bit(folder / ("train-000.bin" if change == "shard" else "train-000.hash"))
    if change == "journal":
        (folder / "unfinished.json").write_text('{"parts": 3')
    origin = "y" if change == "origin" else "x"
    tokenize_unit(to(job, folder, origin=origin))
    tokenize_unit(to(job, tmp_path / "whole", origin=origin))
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_batch_is_bounded_in_characters_too():
    sizes = [sum(map(len, batch)) for batch in module.batches_of(iter(TEXTS), chars=1_000)]
    assert max(sizes) < 1_200 and sum(sizes) == sum(map(len, TEXTS))


def test_no_documents(job, tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    unit = Unit("files", str(tmp_path / "empty.jsonl"))
    manifest = tokenize_unit(to(job, tmp_path / "t", unit=unit))
    assert manifest["splits"]["train"]["tokens"] == 0 and manifest["left_out"] == {"empty": 2}
    assert read(tmp_path / "t", tokenizer) == []


def damage_manifest(folder, **changes):
    path = folder / "manifest.json"
    before = json.loads(path.read_text())
    del before["seal"]
    write_sealed(path, before | changes)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def swap(folder):
    first, second = folder / "train-000.bin", folder / "train-001.bin"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-6])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: cut(f / "train-001.bin"), "train-001.bin: .*truncated"),
        (lambda f: cut(f / "train-001.hash"), "train-001.hash: .*truncated"),
        (lambda f: flip_a_bit(f / "train-001.hash"), "train-001.hash: damaged"),
        (lambda f: (f / "train-001.bin").unlink(), "train-001.bin: missing"),
        (lambda f: flip_a_bit(f / "train-001.bin"), "train-001.bin: damaged"),
        (lambda f: (f / "train-000.bin").write_bytes(b""), "train-000.bin: .*truncated"),
        (swap, "train-000.bin: "),
        (lambda f: damage_manifest(f, dtype="uint32"), "train-000.bin: .*truncated"),
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


@pytest.mark.parametrize("drop", [False, True])
def test_what_came_before_is_counted_and_dropped_by_choice(drop):
    numbers = [7, 8, 7, 9, 7, 9, 2**64 - 1, 2**64 - 1]
    hashed = [(np.full(i + 1, i), number) for i, number in enumerate(numbers)]
    distinct = Distinct(drop)
    found = [*distinct.documents(hashed[:5]), *distinct.documents(hashed[5:])]  # two sources, one memory
    assert [d[0] for d in found] == ([0, 1, 3, 6] if drop else list(range(8))) and distinct.duplicates == 4
    assert (distinct.kept, distinct.kept_tokens) == (len(found), sum(map(len, found)))


def work(job):
    kind, value = job
    if kind == "fail":
        raise DataError(f"{value}: not readable")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(value % 3 / 100)  # later jobs are done before earlier ones
    return value * value


def test_results_come_in_the_order_of_the_jobs():
    jobs = [("square", i) for i in range(40)]
    assert list(parallel_map(work, jobs, "local", 2)) == [i * i for i in range(40)]


def test_jobs_of_a_generator_are_taken_as_they_are_needed():
    taken = []
    jobs = (taken.append(i) or ("square", i) for i in range(60))
    found = parallel_map(work, jobs, "local", 2)
    for done in range(40):
        assert next(found) == done * done and len(taken) <= done + 1 + 2 * module.AHEAD
    assert list(found) == [i * i for i in range(40, 60)]


def test_what_a_job_says_is_said():
    jobs = [("square", 2), ("fail", "a.txt"), *(("square", i) for i in range(20))]
    found = parallel_map(work, jobs, "local", 2)
    assert next(found) == 4
    with pytest.raises(DataError, match=r"^a\.txt: not readable$"):
        list(found)


def test_ray_gives_the_same(capfd):
    """With functions of the package, which its workers find; a whole preparation over Ray is in test_prepare."""
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    sizes = [300, 70_000, 65_536, 65_537] * 5
    assert list(parallel_map(token_dtype, sizes, "ray", 2)) == list(map(token_dtype, sizes))
    with pytest.raises(DataError, match=r"^files:none: no such files"):
        list(parallel_map(find_files, ["files:*", "files:none"], "ray", 2))


def test_a_worker_that_is_killed_is_told():
    with pytest.raises(
        DataError, match=r"was killed \(out of memory\?\); run the same command again, --set data.workers=1"
    ):
        list(parallel_map(work, [("die", 0)], "local", 1))


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"ray is not installed; pip install -e '\.\[ray\]'"):
        list(parallel_map(work, [("square", 1)], "ray", 1))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Or they would write beside the next run."""
    (tmp_path / "sleeper.py").write_text(
        "import os, time\n\ndef sleep(path):\n    open(path, 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
    )
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
from sleeper import sleep
from jaxchat.data.shards import parallel_map
if __name__ == "__main__":
    list(parallel_map(sleep, [{str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}], "local", 2))
"""
    (tmp_path / "main.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=env)
    files = [tmp_path / "a", tmp_path / "b"]
    end = time.monotonic() + 60
    while not all(f.exists() and f.read_text() for f in files) and time.monotonic() < end:
        time.sleep(0.05)
    workers = [int(f.read_text()) for f in files]
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
