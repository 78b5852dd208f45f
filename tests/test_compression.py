"""Other tokenizers beside ours: found, counted, and left out where damaged."""

import pytest
import small_model
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from jaxchat.config import load_config
from jaxchat.data.sources import iterate_documents
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from train.prepare import other_tokenizers

TEXT = ["It's 1234 o'clock, isn't it? The other tokenizer reads 안녕 and 🙂.\n\nYes", "them then there"] * 8


def trained():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, min_frequency=0)
    backend.train_from_iterator(TEXT, trainer)
    return backend


@pytest.fixture
def run(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(f"{TEXT[i % 2]} {i}", encoding="utf-8")
    small_model.tokenizer().save(tmp_path / "run" / "tokenizer")
    (tmp_path / "mirror" / "tokenizers").mkdir(parents=True)
    sets = [f"data.source=files:{text}", "data.val_fraction=0.5", f"tasks.data_dir={tmp_path / 'mirror'}"]
    return resolve(load_config("nano", sets)), RunDir(tmp_path / "run"), tmp_path


def test_mirror_and_hub_cache_are_looked_at(run):
    config, directory, tmp_path = run
    assert other_tokenizers(config, directory, tmp_path / "cache") == []
    backend = trained()
    snapshot = tmp_path / "cache" / "models--openai-community--gpt2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    backend.save(str(snapshot / "tokenizer.json"))
    backend.save(str(tmp_path / "mirror" / "tokenizers" / "gpt4.json"))
    gpt2, gpt4 = other_tokenizers(config, directory, tmp_path / "cache")
    assert (gpt2["name"], gpt4["name"]) == ("GPT-2", "GPT-4") and gpt2 == gpt4 | {"name": "GPT-2"}
    held_out = list(iterate_documents(config.data.source, "val", 0.5))
    count = sum(len(backend.encode(text).ids) for text in held_out)
    ours = sum(len(small_model.tokenizer().encode(text)) for text in held_out)
    assert gpt4["bytes_per_token"] == pytest.approx(sum(len(t.encode()) for t in held_out) / count)
    assert gpt4["ours_per_token"] == pytest.approx(ours / count) and gpt4["vocab_size"] == backend.get_vocab_size()


def test_damaged_files_and_missing_text_cost_only_the_comparison(run, capsys):
    config, directory, tmp_path = run
    path = tmp_path / "mirror" / "tokenizers" / "gpt2.json"
    path.write_text("{")
    assert other_tokenizers(config, directory, tmp_path / "cache") == []
    assert "no comparison with other tokenizers" in capsys.readouterr().err
    trained().save(str(path))
    for text in (tmp_path / "text").iterdir():
        text.unlink()
    assert other_tokenizers(config, directory, tmp_path / "cache") == []
    assert "no such files" in capsys.readouterr().err
