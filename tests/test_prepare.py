"""Stage prepare: text to rows, each token once, resumed where it stopped, and clear about what it cannot use."""

import dataclasses
import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxchat.config import Config, DataConfig, ModelConfig
from jaxchat.data.corpus import iterate_documents
from jaxchat.data.rows import Rows
from jaxchat.data.tokenize import read_documents
from jaxchat.errors import DataError, UsageError
from jaxchat.paths import RunDir
from jaxchat.text.tokenizer import Tokenizer
from jaxchat.toml import to_toml
from train import prepare
from train import tokenizer as tokenizer_stage

SEQ_LEN = 64
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("\n\n".join(itertools.islice(iterate_documents("chitchat"), 250)), encoding="utf-8")
    return path


@pytest.fixture
def run(book, tmp_path):
    config = Config(
        model=ModelConfig(vocab_size=400, seq_len=SEQ_LEN),
        data=DataConfig(source=f"files:{book}", val_fraction=0.1, shard_tokens=50_000),
    )
    run = RunDir(tmp_path / "run")
    tokenizer_stage.run(config, run)
    return config, run


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def times(run):
    return {p: p.stat().st_mtime_ns for p in run.data.rglob("*.*") if p.is_file()}


def test_every_token_of_the_text_is_in_one_row(run):
    config, run = run
    facts = prepare.run(config, run)
    tokenizer = Tokenizer.load(run.tokenizer)
    for split in ("train", "val"):
        documents = list(iterate_documents(config.data.source, split, 0.1))
        rows = Rows(run.data / "rows" / split, tokenizer.digest)
        real = np.concatenate([tokens[weights == 1] for tokens, weights in (rows[i] for i in range(len(rows)))])
        expected = np.array([i for ids in tokenizer.encode_batch(documents) for i in ids])
        assert np.array_equal(np.sort(real[real != tokenizer.bos]), np.sort(expected))
        assert (real == tokenizer.bos).sum() == len(documents) + facts[split]["cuts"]
        assert facts[split]["documents"] == len(documents) and facts[split]["rows"] == len(rows)
        assert facts[split]["tokens"] == len(expected) + len(documents)
        assert facts[split]["bytes"] == sum(len(d.encode()) for d in documents)
        assert facts[split]["fill"] == pytest.approx(len(real) / (len(rows) * (SEQ_LEN + 1)))
    assert facts["train"]["fill"] > 0.995
    assert not [p for p in run.data.rglob("*") if "partial" in p.name]


def test_the_same_again_does_nothing_and_other_settings_do(run):
    config, run = run
    facts, before = prepare.run(config, run), times(run)
    assert prepare.run(config, run) == facts and times(run) == before
    other = prepare.run(with_data(config, pack_docs=3), run)  # packs anew, from the same tokens
    changed = {p.parent.parent.name for p, t in times(run).items() if before.get(p) != t}
    assert changed == {"rows"} and other["digest"] != facts["digest"]
    assert other["train"]["tokens"] == facts["train"]["tokens"]
    assert prepare.run(config, run) == facts  # and back


def test_what_an_interrupted_run_has_finished_is_kept(run):
    config, run = run
    facts, before = prepare.run(config, run), times(run)
    (run.data / "tokens" / "val" / "manifest.json").unlink()  # killed while it tokenized the second split
    (run.data / "rows" / "val" / "meta.json").unlink()
    assert prepare.run(config, run) == facts
    kept = {p for p, t in times(run).items() if before[p] == t}
    assert {p.parent.name for p in kept} == {"train"} and len(kept) > 4


KILLED = """
import os, signal, sys
from jaxchat.config import load_config
from jaxchat.paths import RunDir
from train import prepare

place, config, folder = sys.argv[1:]

def die_at(items, number):
    for i, item in enumerate(items):
        if i == number:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

documents, write, finish = prepare.iterate_documents, prepare.write_rows, prepare.finish_rows
if place == "documents":
    prepare.iterate_documents = lambda *args: die_at(documents(*args), 40)
elif place == "rows":
    prepare.write_rows = lambda directory, rows, *args: write(directory, die_at(rows, 20), *args)
elif place == "finish":
    prepare.finish_rows = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
elif place == "second":
    prepare.write_rows = lambda directory, rows, *args: write(
        directory, die_at(rows, 3 if directory.name == "val" else -1), *args)
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
    facts = prepare.run(config, run)
    shutil.copytree(run.tokenizer, tmp_path / "other" / "tokenizer")
    assert prepare.run(config, RunDir(tmp_path / "other")) == facts
    assert not list(run.data.rglob("*.partial"))


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
    config = with_data(config, source=f"files:{book}", shard_tokens=200_000)
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
    facts = prepare.run(config, run)
    path = run.data / "rows" / "train" / "rows.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert prepare.run(config, run) == facts  # packed again from the shards
    path.write_bytes(b"")
    shard = run.data / "tokens" / "train" / "00000.bin"
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(DataError, match=r"00000\.bin: damaged"):
        prepare.run(config, run)


def test_new_text_is_noticed(run, book):
    config, run = run
    facts = prepare.run(config, run)
    copy = run.root / "copy.txt"
    copy.write_text(book.read_text(encoding="utf-8") + "\n\n" + "One more line. " * 99, encoding="utf-8")
    more = prepare.run(with_data(config, source=f"files:{copy}"), run)
    assert more["train"]["bytes"] + more["val"]["bytes"] > facts["train"]["bytes"] + facts["val"]["bytes"] + 1000


def test_shards_of_another_tokenizer_are_not_used(run):
    config, run = run
    facts = prepare.run(config, run)
    smaller = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=390))
    old = Tokenizer.load(run.tokenizer)
    tokenizer_stage.run(smaller, run)
    with pytest.raises(DataError, match="made with another tokenizer"):
        list(read_documents(run.data / "tokens" / "train", Tokenizer.load(run.tokenizer).digest))
    with pytest.raises(DataError, match="made with another tokenizer"):
        Rows(run.data / "rows" / "train", Tokenizer.load(run.tokenizer).digest)
    again = prepare.run(smaller, run)
    assert again["train"]["tokenizer"] != facts["train"]["tokenizer"] == old.digest


def test_a_corpus_too_small_for_one_row(run):
    config, run = run
    long = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=10**6))
    with pytest.raises(DataError, match=r"tokens to train on are too few for one row of 1000001; add text, or lower"):
        prepare.run(long, run)
    assert not (run.data / "rows").exists()


@pytest.mark.parametrize("key", ["pack_docs", "shard_tokens"])
@pytest.mark.parametrize("value", [0, -5])
def test_sizes_that_are_none_are_refused(run, key, value):
    """A window of no documents once gave no rows, and said that it was done."""
    config, run = run
    with pytest.raises(UsageError, match=rf"data\.{key}: must be at least 1, not {value}"):
        prepare.run(with_data(config, **{key: value}), run)
    assert not run.data.exists()


def test_unreadable_text_leaves_nothing_half_written(run, book):
    config, run = run
    (run.root / "text").mkdir()
    (run.root / "text" / "a.txt").write_bytes(book.read_bytes())
    (run.root / "text" / "b.txt").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match=r"b\.txt: binary"):
        prepare.run(with_data(config, source=f"files:{run.root / 'text'}"), run)
    assert not list(run.data.rglob("*.bin"))


def test_the_tokenizer_stage_must_have_run(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read|tokenizer: cannot be read"):
        prepare.run(Config(), RunDir(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
