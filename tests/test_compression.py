"""Other tokenizers beside ours, from files in both formats: found, counted, and left out where damaged."""

import base64

import pytest
import small_model
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from jaxchat.config import load_config
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from train import prepare as compression

TEXT = [
    "It's 1234 o'clock, isn't it?  The other tokenizer tokenizes the text of 안녕 and 🙂.\n\nYes",
    "them then there",
] * 8


def trained():
    """Byte-level BPE with GPT-4's split, and its tokens by rank as tiktoken writes them."""
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(compression.GPT4_SPLIT), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, min_frequency=0)
    backend.train_from_iterator(TEXT, trainer)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte = {chr(b): b for b in printable}
    byte |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
    return backend, {bytes(byte[c] for c in token): rank for token, rank in backend.get_vocab().items()}


def test_ranks_give_back_the_merges(tmp_path):
    """The same ids as the tokenizer whose vocabulary the file of ranks lists."""
    backend, ranks = trained()
    path = tmp_path / "cl100k_base.tiktoken"
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda i: i[1])]
    path.write_bytes(b"".join(lines))
    other = compression.load(path)
    assert other.get_vocab_size() == backend.get_vocab_size() > 300
    for text in (*TEXT[:2], "thereof it isn't 99999 안녕하세요"):
        assert other.encode(text).ids == backend.encode(text).ids
    assert len(other.encode(TEXT[0]).ids) < len(TEXT[0].encode()) / 2


@pytest.fixture
def run(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(f"{TEXT[i % 2]} {i}", encoding="utf-8")
    small_model.tokenizer().save(tmp_path / "run" / "tokenizer")
    sets = [f"data.source=files:{text}", "data.val_fraction=0.5", f"tasks.data_dir={tmp_path / 'mirror'}"]
    return resolve(load_config("nano", sets)), RunDir(tmp_path / "run"), tmp_path


def test_none_at_hand_none_compared(run):
    config, directory, tmp_path = run
    assert compression.other_tokenizers(config, directory, tmp_path / "cache") == []


def test_mirror_and_hub_cache_are_looked_at(run):
    config, directory, tmp_path = run
    backend, _ = trained()
    snapshot = tmp_path / "cache" / "models--openai-community--gpt2" / "snapshots" / "abc"
    for folder, name in ((snapshot, "tokenizer.json"), (tmp_path / "mirror" / "tokenizers", "gpt4.json")):
        folder.mkdir(parents=True)
        backend.save(str(folder / name))
    gpt2, gpt4 = compression.other_tokenizers(config, directory, tmp_path / "cache")
    assert (gpt2["name"], gpt4["name"]) == ("GPT-2", "GPT-4") and gpt2 == gpt4 | {"name": "GPT-2"}
    texts = [p.read_text(encoding="utf-8") for p in (tmp_path / "text").iterdir()]
    held_out = list(compression.iterate_documents(config.data.source, "val", 0.5))
    assert 0 < len(held_out) < len(texts)
    count = sum(len(backend.encode(text).ids) for text in held_out)
    ours = sum(len(small_model.tokenizer().encode(text)) for text in held_out)
    assert gpt4["bytes_per_token"] == pytest.approx(sum(len(t.encode()) for t in held_out) / count)
    assert gpt4["ours_per_token"] == pytest.approx(ours / count) and gpt4["vocab_size"] > 300


def test_a_damaged_file_is_said_and_left_out(run, capsys):
    config, directory, tmp_path = run
    folder = tmp_path / "mirror" / "tokenizers"
    folder.mkdir(parents=True)
    (folder / "gpt2.json").write_text("{")
    (folder / "cl100k_base.tiktoken").write_text("IQ== 0\nnot base64 at all\n")
    assert compression.other_tokenizers(config, directory, tmp_path / "cache") == []
    said = capsys.readouterr().err
    assert "gpt2.json: not a tokenizer" in said and "line 2 is no token with its rank" in said


def test_text_that_is_gone_costs_only_the_comparison(run, capsys):
    config, directory, tmp_path = run
    (tmp_path / "mirror" / "tokenizers").mkdir(parents=True)
    trained()[0].save(str(tmp_path / "mirror" / "tokenizers" / "gpt2.json"))
    for path in (tmp_path / "text").iterdir():
        path.unlink()
    assert compression.other_tokenizers(config, directory, tmp_path / "cache") == []
    assert "no such files" in capsys.readouterr().err
