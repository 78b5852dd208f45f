"""SFT: a mixture without leaks, steps from the data, masks on what the assistant says."""

import collections
import dataclasses
import functools
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.chat import render
from jaxchat.config import Config, DataConfig, SftConfig, load_config
from jaxchat.data.packing import PackStats, Rows, pack_conversations
from jaxchat.data.sources import iterate_documents, spoken
from jaxchat.errors import DataError, UsageError
from jaxchat.optimizer import make_schedule
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.tasks import get_task
from jaxchat.tasks.base import TaskFiles
from jaxchat.tasks.conversations import SmolTalk
from jaxchat.tasks.identity import Identity
from jaxchat.tokenizer import ASSISTANT_END, train_tokenizer
from train import sft
from train.loop import Trainer
from train.sft import mixture, sft_config


def split_of(config):
    """(train, val) conversations by entry."""
    found = {entry: ([], []) for entry in config.sft.mixture}
    for entry, held_out, conversation in mixture(config):
        found[entry][held_out].append(conversation)
    return [{entry: split[i] for entry, split in found.items()} for i in (0, 1)]


def config_of(*entries, **more):
    config = resolve(load_config("nano"))
    return dataclasses.replace(config, sft=dataclasses.replace(config.sft, mixture=tuple(entries), **more))


def test_held_out_conversations_are_not_trained():
    train, val = split_of(config_of("identity:400", "word_problems:400", "chatterbot", "chitchat:300"))
    for entry in ("identity:400", "word_problems:400", "chatterbot"):
        seen = {json.dumps(c) for c in train[entry]}
        assert seen and val[entry] and not seen & {json.dumps(c) for c in val[entry]}
    assert len(train["chitchat:300"]) == 300 and val["chitchat:300"]
    assert not {json.dumps(c) for c in train["chitchat:300"]} & {json.dumps(c) for c in val["chitchat:300"]}


def test_unknown_or_empty_mixtures_are_refused():
    with pytest.raises(UsageError, match="identty"):
        split_of(config_of("identty:5"))
    for bad in ("identty", "identity:5x", "humaneval", "hf:nobody"):
        with pytest.raises(UsageError, match=bad):
            sft.check(config_of(bad))
    with pytest.raises(UsageError, match="identity stands there twice"):
        sft.check(config_of("identity:5", "identity*2"))


def prepared(config, run, tokenizer):
    tokenizer.save(run.tokenizer)
    return sft.prepare_rows(config, run, tokenizer)


def test_a_training_goes_on_with_the_rows_that_it_began_with(tmp_path, tokenizer):
    run, one, other = RunDir(tmp_path), config_of("identity:50"), config_of("identity:51")
    prepared(one, run, tokenizer)
    facts = sft.prepare_rows(other, run, tokenizer)  # nothing is trained yet
    (run.stage("sft") / "2").mkdir(parents=True)
    before = sums(run)
    assert sft.prepare_rows(one, run, tokenizer) == facts and sums(run) == before
    for config in (other, one):
        (run.data / "sft" / "train" / "rows.bin").write_bytes(b"x")
        if config is one:
            with pytest.raises(DataError, match="not those that this SFT began with"):
                sft.prepare_rows(one, run, tokenizer)
        else:
            assert sft.prepare_rows(other, run, tokenizer) == facts and sums(run) == before


@pytest.mark.parametrize(("rows", "epochs", "steps"), [(1, 1.0, 1), (16, 1.0, 16), (800, 1.0, 100), (800, 0.5, 50)])
def test_steps_follow_the_rows(rows, epochs, steps):
    config = sft_config(config_of("identity:5", epochs=epochs), rows)
    assert config.train.steps == steps
    multiplier = make_schedule(config)
    values = [float(multiplier(s)) for s in range(steps + 5)]
    assert values[0] == 1.0 and min(values) >= 0.0
    assert config.optim.lr_scale == pytest.approx(0.8 * resolve(load_config("nano")).optim.lr_scale)


def test_packed_rows_learn_only_what_the_assistant_says():
    train, _ = split_of(config_of("word_problems:50"))
    conversations = train["word_problems:50"]
    texts = [
        part["text"]
        for c in conversations
        for m in c
        for part in ([{"text": m["content"]}] if m["role"] == "user" else m["content"])
    ]
    tokenizer = train_tokenizer(texts, 300, 10**6, 10**4)
    rendered = [render(tokenizer, c) for c in conversations]
    packed = list(pack_conversations(rendered, 400, tokenizer.special[ASSISTANT_END], PackStats()))
    assert sum(map(len, (ids for ids, _ in packed))) == sum(len(ids) for ids, _ in rendered)
    ids = np.concatenate([ids for ids, _ in packed])
    mask = np.concatenate([mask for _, mask in packed]).astype(bool)
    special = {i: name for name, i in tokenizer.special.items()}
    learned = {special[i] for i in ids[mask] if i in special}
    assert learned == {"<|python_start|>", "<|python_end|>", "<|assistant_end|>"}
    assert mask.sum() == sum(sum(m) for _, m in rendered)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [json.dumps(c) for _, _, c in mixture(config_of("identity:200", "word_problems:50"))]
    return train_tokenizer(texts, 400, 10**6, 10**4)


def test_every_epoch_is_packed_for_itself(tmp_path, tokenizer):
    config = config_of("identity:40*3", "word_problems:30")
    run = RunDir(tmp_path)
    facts = prepared(config, run, tokenizer)
    rows = Rows(run.data / "sft" / "train", tokenizer.digest)
    assert facts["train"]["rows"] == len(rows)
    once = facts["conversations"]
    assert facts["train"]["conversations"] == 3 * once["identity:40*3"] + once["word_problems:30"]
    seen: dict[tuple[int, ...], int] = collections.Counter()
    for row, _ in (rows[i] for i in range(len(rows))):
        starts = [*np.flatnonzero(row == tokenizer.bos), len(row)]
        found = [tuple(row[a:b]) for a, b in itertools.pairwise(starts) if b - a > 1]
        seen.update(set(found))
        repeated = [piece for piece in found if found.count(piece) > 1]
        assert all(identical(config, tokenizer, piece) for piece in repeated)
    assert max(seen.values()) >= 3


def sums(run):
    return [Rows(run.data / "sft" / split).meta["sha256"] for split in ("train", "val")]


def talks(path, count):
    lines = [
        [{"role": r, "content": f"{r} says {i} " * (i % 40 + 1)} for r in ("user", "assistant")] for i in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in lines))
    return f"files:{path}"


def test_many_conversations_are_rendered_by_other_processes_and_the_rows_are_the_same(tmp_path, tokenizer, monkeypatch):
    config = config_of(talks(tmp_path / "talks.jsonl", 700), "word_problems:400*2")
    runs = [RunDir(tmp_path / name) for name in ("here", "there")]
    first = prepared(config, runs[0], tokenizer)
    monkeypatch.setattr(sft, "FEW", 100)
    calls, parallel_map = [], sft.parallel_map
    monkeypatch.setattr(sft, "parallel_map", lambda *args: calls.append(1) or parallel_map(*args))
    two = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2))
    assert prepared(two, runs[1], tokenizer) == first and calls
    assert sums(runs[0]) == sums(runs[1])


def identical(config, tokenizer, piece):
    """Whether the mixture itself, a generator's draws, has the conversation more than once."""
    rendered = [tuple(render(tokenizer, c)[0]) for _, _, c in mixture(config)]
    return rendered.count(tuple(int(i) for i in piece)) > 1


def test_smoltalk_is_read_from_a_mirror(tmp_path):
    (tmp_path / "smol-smoltalk" / "data").mkdir(parents=True)
    says = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [[*says, {"role": "assistant", "content": f"Hello {i} <|assistant_end|>"}] for i in range(40)]
    rows[3] = [*rows[3], {"role": "user", "content": "a question that nobody answers"}]
    path = tmp_path / "smol-smoltalk" / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"messages": rows, "source": ["x"] * 40}), path)
    task = get_task("smoltalk", TaskFiles(str(tmp_path)))
    assert isinstance(task, SmolTalk)
    conversations = list(task.train_conversations(None, 0))
    assert len(conversations) == 40 and conversations[0] == rows[0]
    assert conversations[3][-1]["role"] == "assistant"
    some = list(task.train_conversations(7, 1))
    assert len(some) == 7 and some == list(task.train_conversations(7, 1))
    pq.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(DataError, match="no column `messages`"):
        list(task.train_conversations(None, 0))


def test_a_conversation_out_of_form_is_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(Identity, "train_conversations", lambda *_: [[{"role": "king", "content": "I speak first"}]])
    with pytest.raises(DataError, match=r"identity:5: a conversation is out of form: messages\[0\]"):
        prepared(config_of("identity:5"), RunDir(tmp_path), tokenizer)
    monkeypatch.setattr(Identity, "train_conversations", lambda *_: [])
    with pytest.raises(DataError, match=r"sft.mixture: no conversations"):
        prepared(config_of("identity:5"), RunDir(tmp_path), tokenizer)


def test_what_cannot_be_used_is_counted_and_told_once(tmp_path, tokenizer, monkeypatch):
    """In the facts, too; more than the limit stops the run."""
    said = []
    monkeypatch.setattr(sft, "say_once", functools.cache(said.append))
    entry = talks(tmp_path / "talks.jsonl", 60)
    with open(tmp_path / "talks.jsonl", "a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "who answers?"}]}) + "\n")
    config, place = config_of(entry), f"{tmp_path}/talks.jsonl:61: no answer"
    facts = prepared(config, RunDir(tmp_path), tokenizer)
    assert facts["conversations"][entry] + facts["val"]["conversations"] + facts["no_target"] == 60
    assert facts["left_out"][entry].startswith(f"1, first: {place}")
    sft.check(config)
    assert len(list(mixture(config))) == 60
    assert sum("1 of 61 left out" in line and place in line for line in said) == 1
    strict = config_of(entry, max_left_out=0.01)
    with pytest.raises(DataError, match=r"max_left_out.*talks\.jsonl:61"):
        list(mixture(strict))


def test_conversations_of_a_data_set_on_the_hub(tmp_path):
    folder = tmp_path / "someone" / "talks" / "data"
    folder.mkdir(parents=True)
    for split, count in (("train", 30), ("test", 5)):
        columns = {"instruction": [f"{split} {i}" for i in range(count)], "output": ["ok"] * count}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    for entry, count in (("hf:someone/talks", 35), ("hf:someone/talks@main:data/train*", 30),
                         ("hf:someone/talks:data/train.parquet:7*2", 7)):  # fmt: skip
        config = config_of(entry)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, mirror=str(tmp_path)))
        sft.check(config)
        assert len(list(mixture(config))) == count
    with pytest.raises(DataError, match="no folder"):
        sft.check(dataclasses.replace(config, sft=dataclasses.replace(config.sft, mixture=("hf:someone/else",))))


def test_rows_without_targets_at_a_batch_of_one_short_row_do_no_harm(tmp_path, tokenizer):
    """Context 64, one row a step, half of the rows without anything to learn: every loss is finite, weights too."""
    talk = [({"role": "user", "content": "what is your name " * 12}, {"role": "assistant", "content": "jaxchat"})] * 3
    talk += [({"role": "user", "content": "who"}, {"role": "assistant", "content": "jaxchat"})] * 3
    shape = ["model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16", "model.vocab_size=400",
             "model.seq_len=64", "train.batch_tokens=64", "train.steps=6", "train.eval_every=0"]  # fmt: skip
    config = resolve(load_config("nano", shape))
    pieces = [[tuple(np.array(a) for a in render(tokenizer, list(pair)))] for pair in talk]
    made = sft.write_split(config, RunDir(tmp_path), tokenizer, "train", pieces, {})
    assert made["rows"] == 6 and made["cut"] == 3
    rows = Rows(tmp_path / "data" / "sft" / "train", tokenizer.digest)
    facts = Trainer(config, tmp_path / "sft", tokenizer.byte_lengths(), rows).run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and losses.count(0.0) == 3 and all(np.isfinite(loss) for loss in losses)
    assert facts["bad_steps"] == 0


def test_conversations_of_files_are_held_out_where_pretraining_holds_them_out(tmp_path):
    roles = ("user", "assistant")
    talks = [[{"role": role, "content": f"{role} says {i}"} for role in roles] for i in range(200)]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    source = f"files:{path}"
    config = Config(data=DataConfig(source=source, val_fraction=0.1), sft=SftConfig(mixture=(source,)))
    found = list(sft.mixture(config))
    held = {spoken(talk) for _, held_out, talk in found if held_out}
    assert len(found) == 200 and held == set(iterate_documents(config.data, "val")) and 5 < len(held) < 50
