"""Every small tier from its first stage to its last, at a hundredth of its size or less, on text that lies here.

python -m pytest tests/test_tiers.py -m slow      three minutes; CI runs it
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from whole_run import finish, start

from jaxchat.config import load_config

pytestmark = pytest.mark.slow
ENGLISH = "One day the {a} went to the {b}. It was very {c}. The {b} said hello, and they were friends. The end.\n\n"
KOREAN = "옛날에 {a} 하나가 {b}에 갔어요. 아주 {c}. {b}는 인사했고, 둘은 친구가 되었어요. 끝.\n\n"
WORDS = {
    "en": (("cat", "dog", "bird", "boat"), ("park", "lake", "tree", "house"), ("happy", "cold", "big", "kind")),
    "ko": (("고양이", "강아지", "새", "나룻배"), ("공원", "호수", "나무", "집"), ("기뻤어요", "추웠어요", "컸어요")),
}
SMALL = ["model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16", "train.steps=12",
         "train.batch_tokens=1024", "train.eval_every=6", "eval.sample_tokens=12",
         "train.device_batch_rows=2"]  # fmt: skip


def story(language, i):
    a, b, c = (words[i // (5**k) % len(words)] for k, words in enumerate(WORDS[language]))
    return (ENGLISH if language == "en" else KOREAN).format(a=f"{a} {i}", b=b, c=c)


def mirror(folder, repo, name, language):
    path = folder / repo / name
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": [story(language, i) * 3 for i in range(400)]}), path)
    return folder


def launched(tier, run_dir, *settings):
    sets = [part for setting in settings for part in ("--set", setting)]
    code, _, err = finish(start(["--tier", tier, "--run-dir", str(run_dir), *sets]))
    assert code == 0, err
    return err


def test_tinystories(tmp_path):
    folder = mirror(tmp_path / "mirror", "roneneldan/TinyStories", "data/train-00000-of-00004.parquet", "en")
    run = tmp_path / "run"
    for kind in ("adamw", "muon"):
        settings = [*SMALL, "model.vocab_size=400", "model.seq_len=64", "data.val_fraction=0.1", f"optim.kind={kind}"]
        launched("tinystories", run / kind, *settings, f"data.mirror={folder}")
        made = {p.relative_to(run / kind).as_posix() for p in (run / kind).rglob("*") if p.is_file()}
        assert {"config.toml", "tokenizer/tokenizer.json", "base/metrics.jsonl", "base/loss.png", "report.md"} <= made
        samples = (run / kind / "base" / "samples.md").read_text()
        assert samples.count("\n> ") == 20  # ten before, ten after
        for temperature in ("0.5", "0.8", "1.2"):
            assert samples.count(f"- **{temperature}**") == 20
        assert not (run / kind / "sft").exists()
    card = json.loads((run / "adamw" / "report.json").read_text())
    assert card["config"]["optim.kind"] == "adamw" and card["copied"]["texts"] > 0
    code, out, _ = finish(start(["--compare", str(run / "adamw"), str(run / "muon")]))
    assert code == 0 and "optim.kind" in out and "Bits per byte" in out


def test_book_in_korean_and_talked_to(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(story("ko", i) for i in range(400)))
    run = tmp_path / "run"
    err = launched("book", run, f"data.source=files:{book}", "train.steps=12", "eval.sample_tokens=12")
    assert "3 layers, a vocabulary of 384 tokens" in err and "longest memorized passage" in err
    book.unlink()  # the model stays
    process = start(["--run-dir", str(run), "--chat"], stdin=-1)
    out, err = process.communicate("옛날에 고양이", timeout=240)
    assert process.returncode == 0 and out.strip(), err


def test_korean_from_the_tokenizer_to_the_page(tmp_path):
    folder = mirror(tmp_path / "mirror", "HuggingFaceFW/fineweb-2", "data/kor_Hang/test/000_00000.parquet", "ko")
    run = tmp_path / "run"
    settings = [*SMALL, "model.vocab_size=400", "model.seq_len=128", f"data.mirror={folder}", "eval.max_per_task=4"]
    launched("ko-nano", run, *settings, 'sft.mixture=["chatterbot_korean:50", "identity:50"]')
    config = load_config(run / "config.toml")
    assert config.serve.language == "ko" and config.tokenizer.normalize == "nfc"
    assert json.loads((run / "tokenizer" / "tokenizer.json").read_text())["normalizer"] == {"type": "NFC"}
    samples = (run / "sft" / "samples.md").read_text()
    assert "너는 누구야?" in samples and "hello" not in samples
    assert "identity" in json.loads((run / "eval" / "sft.json").read_text())["tasks"]


def test_lotto(tmp_path):
    settings = [*SMALL, "model.seq_len=384", "train.batch_tokens=768", "sft.batch_tokens=768", "eval.max_per_task=2"]
    launched(
        "lotto",
        tmp_path,
        *settings,
        "data.source=synthetic:lottery:500",
        'sft.mixture=["lottery:60"]',
        "sft.exam_cases=0",
    )
    scores = json.loads((tmp_path / "eval" / "sft.json").read_text())["tasks"]["lottery"]
    assert list(scores["readings"]) == ["tickets", "3", "4", "5", "5+bonus", "6", "yield"]
