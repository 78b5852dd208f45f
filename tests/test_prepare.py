"""Stage prepare: text to rows, each token once, resumed where it stopped, and clear about what it cannot use."""

import dataclasses
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxchat.config import Config, DataConfig, ModelConfig, to_toml
from jaxchat.data.packing import Rows
from jaxchat.data.shards import read_documents
from jaxchat.data.sources import iterate_documents
from jaxchat.errors import DataError, UsageError
from jaxchat.run_dir import RunDir
from jaxchat.tokenizer import Tokenizer
from train import prepare
from train import prepare as tokenizer_stage

SEQ_LEN = 64
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("\n\n".join(itertools.islice(iterate_documents("chitchat"), 250)), encoding="utf-8")
    return path


@pytest.fixture
def run(book, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 50_000)
    config = Config(
        model=ModelConfig(vocab_size=400, seq_len=SEQ_LEN),
        data=DataConfig(source=f"files:{book}", val_fraction=0.1),
    )
    run = RunDir(tmp_path / "run")
    tokenizer_stage.run_tokenizer(config, run)
    return config, run


def prepared(config, run):
    """The stage's facts without its times."""
    return {key: value for key, value in prepare.run(config, run).items() if not key.endswith("_seconds")}


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def times(run):
    return {p: p.stat().st_mtime_ns for p in run.data.rglob("*.*") if p.is_file()}


def starts_of(rows, bos):
    """What follows each `<|bos|>` in the rows up to the next one, sorted; every row must begin with one."""
    found = []
    for i in range(len(rows)):
        tokens, weights = rows[i]
        assert tokens[0] == bos
        real = tokens[weights == 1]
        found += [piece[1:].tolist() for piece in np.split(real, np.flatnonzero(real == bos))[1:]]
    return sorted(found)


def beginnings(documents, tokenizer):
    """As much of every document as a row holds behind its `<|bos|>`, sorted."""
    return sorted(ids[:SEQ_LEN] for ids in tokenizer.encode_batch(documents))


def test_every_token_of_the_text_is_in_one_row(run):
    config, run = run
    facts = prepared(config, run)
    tokenizer = Tokenizer.load(run.tokenizer)
    for split in ("train", "val"):
        documents = list(iterate_documents(config.data, split))
        rows = Rows(run.data / "rows" / split, tokenizer.digest)
        real = np.concatenate([tokens[weights == 1] for tokens, weights in (rows[i] for i in range(len(rows)))])
        expected = np.array([i for ids in tokenizer.encode_batch(documents) for i in ids])
        if split == "train":
            assert np.array_equal(np.sort(real[real != tokenizer.bos]), np.sort(expected))
            assert (real == tokenizer.bos).sum() == len(documents) + facts[split]["cuts"]
            assert facts[split]["lost"] == 0
        else:
            assert (real != tokenizer.bos).sum() == len(expected) - facts[split]["lost"]
            assert starts_of(rows, tokenizer.bos) == beginnings(documents, tokenizer)
        assert facts[split]["documents"] == len(documents) and facts[split]["rows"] == len(rows)
        assert facts[split]["tokens"] == len(expected) + len(documents)
        assert facts[split]["bytes"] == sum(len(d.encode()) for d in documents)
        assert facts[split]["fill"] == pytest.approx(len(real) / (len(rows) * (SEQ_LEN + 1)))
    assert facts["train"]["fill"] > 0.995
    assert not [p for p in run.data.rglob("*") if "part" in p.name]


def test_the_same_again_does_nothing_and_other_settings_do(run, monkeypatch):
    config, run = run
    facts, before = prepared(config, run), times(run)
    assert prepared(config, run) == facts and times(run) == before
    monkeypatch.setattr(prepare, "WINDOW", 3)
    other = prepared(config, run)  # packs anew, from the same tokens
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 50_000)
    changed = {p.parent.parent.name for p, t in times(run).items() if before.get(p) != t}
    assert changed == {"rows"} and other["digest"] != facts["digest"]
    assert other["train"]["tokens"] == facts["train"]["tokens"]
    assert prepared(config, run) == facts  # and back


def test_what_an_interrupted_run_has_finished_is_kept(run):
    config, run = run
    facts, before = prepared(config, run), times(run)
    (run.data / "rows" / "val" / "meta.json").unlink()  # killed while it packed the second split
    assert prepared(config, run) == facts
    kept = {p.parent for p, t in times(run).items() if before[p] == t}
    assert {p.name for p in kept} == {"00000", "train"}


KILLED = """
import os, signal, sys
from jaxchat.config import load_config
from jaxchat.data.sources import Unit
from jaxchat.run_dir import RunDir
from train import prepare

place, config, folder = sys.argv[1:]
prepare.SHARD_TOKENS = 200_000 if place == "nowhere" else 50_000

def die_at(items, number):
    for i, item in enumerate(items):
        if i == number:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

documents, write = Unit.documents, prepare.write_rows
if place == "documents":
    prepare.training_limit = lambda *args: 0.1
    Unit.documents = lambda *args: die_at(documents(*args), 40)
elif place == "rows":
    prepare.write_rows = lambda directory, rows, *args: write(directory, die_at(rows, 20), *args)
elif place == "finish":
    prepare.write_rows = lambda *args: write(*args[:-1], lambda: os.kill(os.getpid(), signal.SIGKILL))
elif place == "second":
    prepare.write_rows = lambda directory, rows, *args: write(
        directory, die_at(rows, 2 if directory.name == "val" else -1), *args)
prepare.run(load_config(config), RunDir(folder))
"""


@pytest.mark.parametrize("place", ["documents", "rows", "finish", "second"])
def test_killed_half_way_and_run_again_it_is_as_if_nothing_had_been(run, tmp_path, place):
    config, run = run
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    command = [sys.executable, "-c", KILLED, place, str(tmp_path / "config.toml"), str(run.root)]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    with pytest.raises(DataError):
        Rows(run.data / "rows" / ("val" if place == "second" else "train"))  # nothing that could be taken as whole
    assert list(run.data.rglob("*.partial")) or place == "documents"
    facts = prepared(config, run)
    shutil.copytree(run.tokenizer, tmp_path / "other" / "tokenizer")
    assert prepared(config, RunDir(tmp_path / "other")) == facts
    assert not list(run.data.rglob("*part*"))


def contents(run):
    return {p.relative_to(run.data): p.read_bytes() for p in sorted(run.data.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_the_same_bytes(run, tmp_path):
    """kill -9 whenever it comes; each start goes on where the one before was."""
    config, run = run
    book = tmp_path / "book.txt"
    draw = random.Random(0)
    words = " ".join(itertools.islice(iterate_documents("chitchat"), 200)).split()
    book.write_text("\n\n".join(" ".join(draw.choices(words, k=300)) for _ in range(12_000)), encoding="utf-8")
    config = with_data(config, source=f"files:{book}")
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")

    def start(root):
        command = [sys.executable, "-c", KILLED, "nowhere", str(tmp_path / "config.toml"), str(root)]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)

    shutil.copytree(run.tokenizer, tmp_path / "whole" / "tokenizer")
    begin = time.monotonic()
    assert start(tmp_path / "whole").wait(600) == 0
    whole, kills = time.monotonic() - begin, 0
    while kills < 20:
        process = start(run.root)
        try:
            assert process.wait(draw.uniform(0.15, 0.7) * whole) == 0
            shutil.rmtree(run.data)  # it was faster than the signal: from the beginning
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
            process.wait()
    assert start(run.root).wait(600) == 0
    print(f"{kills} kills; undisturbed it takes {whole:.1f} s")
    assert contents(run) == contents(RunDir(tmp_path / "whole"))


def test_damage_is_repaired_where_it_can_be(run):
    config, run = run
    facts = prepared(config, run)
    path = run.data / "rows" / "train" / "rows.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert prepared(config, run) == facts  # packed again from the shards
    path.write_bytes(b"")
    shard = run.data / "tokens" / "00000" / "train-000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[::-1])
    assert prepared(config, run) == facts and shard.read_bytes() == whole  # tokenized again from the text
    with pytest.raises(DataError, match=r"train-000\.bin: damaged"):
        shard.write_bytes(whole[::-1])
        list(read_documents(shard.parent, "train", Tokenizer.load(run.tokenizer).digest))


def test_shards_of_another_tokenizer_are_not_used(run):
    config, run = run
    facts = prepared(config, run)
    smaller = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=390))
    old = Tokenizer.load(run.tokenizer)
    tokenizer_stage.run_tokenizer(smaller, run)
    with pytest.raises(DataError, match="made with another tokenizer"):
        list(read_documents(run.data / "tokens" / "00000", "train", Tokenizer.load(run.tokenizer).digest))
    with pytest.raises(DataError, match="made with another tokenizer"):
        Rows(run.data / "rows" / "train", Tokenizer.load(run.tokenizer).digest)
    again = prepared(smaller, run)
    assert again["train"]["tokenizer"] != facts["train"]["tokenizer"] == old.digest


def test_a_corpus_too_small_for_one_row(run):
    config, run = run
    long = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=10**6))
    with pytest.raises(DataError, match=r"tokens to train on are too few for one row of 1000001; add text, or lower"):
        prepared(long, run)
    assert not (run.data / "rows").exists()


def test_unreadable_text_leaves_nothing_that_counts(run, book):
    config, run = run
    (run.root / "text").mkdir()
    (run.root / "text" / "a.txt").write_bytes(book.read_bytes())
    (run.root / "text" / "b.txt").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match=r"b\.txt: binary"):
        prepared(with_data(config, source=f"files:{run.root / 'text'}"), run)
    assert not (run.data / "rows").exists() and not (run.data / "tokens" / "00001" / "manifest.json").exists()
    (run.root / "text" / "b.txt").unlink()
    mended = prepared(with_data(config, source=f"files:{run.root / 'text'}"), run)
    assert mended["digest"] == prepared(config, run)["digest"]


@pytest.fixture
def shelf(run):
    """Several files, some documents of which stand in two of them."""
    config, run = run
    folder = run.root / "shelf"
    folder.mkdir()
    documents = list(iterate_documents(config.data))
    for i in range(5):
        lines = (json.dumps({"text": text}) for text in documents[i * 8 : i * 8 + 10])
        (folder / f"{i}.jsonl").write_text("\n".join(lines) + '\n{"text": ""}\n')
    return with_data(config, source=f"files:{folder}"), run


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_whoever_tokenizes_the_bytes_are_the_same(shelf, tmp_path, engine, capsys):
    if engine == "ray":
        pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    config, run = shelf
    facts = prepared(with_data(config, workers=1), run)
    other = RunDir(tmp_path / "other")
    shutil.copytree(run.tokenizer, other.tokenizer)
    assert prepared(with_data(config, engine=engine, workers=2), other) == facts
    assert contents(other) == contents(run)
    assert [p.name for p in sorted((run.data / "tokens").iterdir())] == [f"{i:05d}" for i in range(5)]
    said = capsys.readouterr().err
    assert "5 documents without text left out" in said and "documents had come before, letter for letter; kept" in said


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_what_a_worker_cannot_read_is_named(shelf, engine):
    if engine == "ray":
        pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    config, run = shelf
    bad = run.root / "shelf" / "3.jsonl"
    bad.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"3\.jsonl:2: not JSON"):
        prepared(with_data(config, engine=engine, workers=2), run)


def test_duplicates_are_left_out_by_choice_across_files(shelf):
    config, run = shelf
    documents = list(iterate_documents(config.data, "train"))
    kept = prepared(config, run)["train"]
    tokens = times(run)
    dropped = prepared(with_data(config, dedup=True), run)["train"]
    assert kept["documents"] == len(documents) == kept["documents"]
    assert dropped["documents"] == len(set(documents)) == len(documents) - kept["duplicates"] < len(documents)
    assert dropped["duplicates"] == kept["duplicates"] and dropped["tokens"] < kept["tokens"]
    assert {p.parent.name for p, t in times(run).items() if tokens.get(p) != t} <= {"train", "val"}  # only packed anew


def test_a_mixture_is_packed_source_by_source(shelf, book):
    config, run = shelf
    facts = prepared(with_data(config, source=f"1 {config.data.source} + 3 files:{book}"), run)
    sources = facts["train"]["sources"]
    assert [(s["source"], s["weight"]) for s in sources] == [(config.data.source, 0.25), (f"files:{book}", 0.75)]
    assert sum(s["rows"] for s in sources) == facts["train"]["rows"] and all(s["rows"] for s in sources)
    rows, tokenizer = Rows(run.data / "rows" / "train"), Tokenizer.load(run.tokenizer)
    first = tokenizer.decode(np.concatenate([rows[i][0] for i in range(sources[0]["rows"])]))
    assert all(text[:40] in first for text in iterate_documents(config.data, "train"))


@pytest.mark.parametrize("remainder", ["drop", "keep"])
def test_held_out_rows_do_not_depend_on_what_training_does_with_rests(run, remainder):
    config, run = run
    facts = prepared(with_data(config, remainder=remainder), run)
    documents = list(iterate_documents(config.data, "val"))
    tokenizer = Tokenizer.load(run.tokenizer)
    assert starts_of(Rows(run.data / "rows" / "val"), tokenizer.bos) == beginnings(documents, tokenizer)
    train = Rows(run.data / "rows" / "train")
    inside = sum(train[i][0][0] != tokenizer.bos for i in range(len(train)))
    assert (facts["train"]["lost"] > 0) == (remainder == "drop") and inside == 0
    if remainder == "drop":
        assert facts["train"]["lost"] + sum(train[i][1].sum() for i in range(len(train))) == facts["train"]["tokens"]
    assert [s["remainder"] for s in facts["train"]["sources"]] == [remainder]


def test_a_source_of_its_own_is_held_out_whole(shelf):
    config, run = shelf
    last = run.root / "shelf" / "4.jsonl"
    chosen = with_data(config, val_source=f"files:{last}")
    facts = prepared(chosen, run)
    texts = [json.loads(line)["text"] for line in last.read_text().splitlines()]
    texts = [text for text in texts if text]
    assert list(iterate_documents(chosen.data, "val")) == texts and facts["val"]["documents"] == len(texts)
    trained = list(iterate_documents(chosen.data, "train"))
    assert len(trained) == 40 == facts["train"]["documents"]  # of the other four files all, whatever their hashes
    tokenizer = Tokenizer.load(run.tokenizer)
    assert starts_of(Rows(run.data / "rows" / "val"), tokenizer.bos) == beginnings(texts, tokenizer)
    assert prepared(chosen, run) == facts
    assert any(f"2 of {len(texts)} held-out documents" in line for line in facts["warnings"])


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("files:{shelf}/9.jsonl", DataError, "9.jsonl"),
        ("files:{shelf}", DataError, "data.val_source"),
        ("chitchat", UsageError, "data.val_source"),
        ("hf:nobody", UsageError, "data.val_source"),
        ("files:{shelf}/empty.jsonl", DataError, "empty.jsonl"),
    ],
)
def test_a_held_out_source_that_cannot_be_used_is_named(shelf, source, error, words):
    config, run = shelf
    (run.root / "shelf" / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(error, match=words):
        prepared(with_data(config, val_source=source.format(shelf=run.root / "shelf")), run)
