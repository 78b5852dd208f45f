"""A model that fits its text: deterministic, monotone, and what the person sets stays."""

import dataclasses
import itertools
import random
import re

import pytest

from jaxchat.config import load_config, to_toml
from jaxchat.data.sources import iterate_documents
from jaxchat.errors import DataError, UsageError
from jaxchat.run_dir import RunDir
from jaxchat.scaling import derivations, resolve
from jaxchat.tokenizer import train_tokenizer
from train.prepare import run_tokenizer, sized


def book(path, size):
    """So many bytes of text, of documents of about 4,000 characters."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(3000)]
    lines, length = [], 0
    while length < size:
        lines.append(f"{' '.join(draw.choices(words, k=70))}\n\n")
        length += len(lines[-1])
    path.write_text("".join(lines))
    return path


def given(path, *overrides):
    return load_config("book", [f"data.source=files:{path}", *overrides])


def test_a_longer_text_gets_a_larger_model(tmp_path):
    found = [sized(given(book(tmp_path / f"{size}.txt", size))) for size in (20_000, 400_000, 1_200_000, 12_000_000)]
    for smaller, larger in itertools.pairwise(found):
        for key in ("depth", "width", "vocab_size"):
            assert getattr(smaller.model, key) <= getattr(larger.model, key)
        assert smaller.train.steps < larger.train.steps
    assert (found[0].model.depth, found[0].model.vocab_size) == (3, 384)
    assert (found[2].model.depth, found[2].model.width, found[2].model.vocab_size) == (4, 192, 1024)
    for config in found:
        resolve(config)


@pytest.mark.parametrize("size", [60_000, 1_000_000])
@pytest.mark.parametrize("letters", ["etaoinshrdlu", "가나다라마바사아자차카타파하고는을이"])
def test_the_text_is_read_as_often_as_it_says(tmp_path, capsys, letters, size):
    """Counted with the tokenizer that the run then has: a syllable of Hangul has three bytes, a letter one."""
    draw, path = random.Random(1), tmp_path / "a.txt"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(4000)]
    lines = (" ".join(draw.choices(words, k=12)) for _ in range(size // 100))
    path.write_text("\n\n".join(lines), encoding="utf-8")
    config = sized(given(path))
    said = float(re.search(r"the text about (.*) times", capsys.readouterr().err)[1])
    documents = list(iterate_documents(config.data))
    tokenizer = train_tokenizer(documents, config.model.vocab_size, 10**8, 10**8)
    whole = sum(map(len, tokenizer.encode_batch(documents))) * (1 - config.data.val_fraction)
    read = config.train.steps * config.train.batch_tokens / whole
    assert read == pytest.approx(said, abs=0.1) and read == pytest.approx(4, rel=0.05)


def test_what_is_set_stays(tmp_path):
    path = book(tmp_path / "a.txt", 400_000)
    config = sized(given(path, "model.depth=2", "model.vocab_size=500", "train.steps=7", "model.seq_len=128"))
    model = resolve(config).model
    assert (model.depth, model.width, model.vocab_size, model.seq_len, config.train.steps) == (2, 128, 500, 128, 7)
    whole = resolve(sized(given(path)))
    assert sized(whole) == whole  # a saved configuration asks for nothing, and its text may be gone
    gone = dataclasses.replace(whole, data=dataclasses.replace(whole.data, source="files:/gone.txt"))
    assert sized(gone) == gone
    nano = load_config("nano")
    assert sized(nano) == nano
    reasons = derivations(given(path), whole)
    assert {"model.depth", "model.vocab_size", "model.seq_len", "train.steps"} <= reasons.keys()
    assert "depth = 4  # derived: fitted to the amount of text" in to_toml(whole, reasons)


def test_a_tokenizer_from_elsewhere_decides_the_vocabulary(tmp_path):
    train_tokenizer(["some text of a book"] * 50, 270, 10**6, 10**4).save(tmp_path / "tokenizer")
    config = sized(given(book(tmp_path / "a.txt", 50_000), f"tokenizer.path={tmp_path}/tokenizer/tokenizer.json"))
    assert config.model.vocab_size == 270


def test_without_a_text_it_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"files:book\.txt: no such files"):
        sized(load_config("book", []))


def test_a_few_lines_are_a_text_too(tmp_path):
    (tmp_path / "a.txt").write_text("One line.\n\n" * 3 + "Another one.\n\n" * 400)
    assert 265 < sized(given(tmp_path / "a.txt")).model.vocab_size < 300
    (tmp_path / "b.txt").write_text("tiny")
    with pytest.raises(DataError, match=r"b\.txt"):
        sized(given(tmp_path / "b.txt"))


def digits(draw):
    return "".join(draw.choices("123456789.", k=81))


def moves(draw):
    return " ".join(f"{i}. {draw.choice('NBRQ')}{draw.choice('abcdefgh')}{draw.randint(1, 8)}" for i in range(1, 30))


@pytest.mark.parametrize("line", [digits, moves, lambda draw: "One line, again and again.", lambda draw: "a" * 700])
def test_a_small_alphabet_decides_the_vocabulary(tmp_path, line):
    """The model has as many rows as the tokenizer that the run then trains."""
    draw, path = random.Random(2), tmp_path / "a.txt"
    text = ""
    while len(text) < 260_000:
        text += "".join(line(draw) + "\n" for _ in range(500))
    path.write_text(text)
    config = resolve(sized(given(path)))
    assert 265 < config.model.vocab_size < 384
    facts = run_tokenizer(config, RunDir(tmp_path / "run"))
    assert facts["vocab_size"] == config.model.vocab_size
    if line is digits:
        assert config.model.vocab_size in range(265 + 81, 265 + 101)  # pairs of ten characters at most
    with pytest.raises(DataError, match=rf"model\.vocab_size: 4096.*model\.vocab_size={config.model.vocab_size}"):
        run_tokenizer(load_config("nano", [f"data.source=files:{path}"]), RunDir(tmp_path / "nano"))


def test_of_the_hub_it_must_be_told_how_much():
    with pytest.raises(UsageError, match=r"data\.size_model: how much of the hub's text\? Set data\.text_bytes"):
        sized(load_config("book", ["data.source=hf:a/b"]))
