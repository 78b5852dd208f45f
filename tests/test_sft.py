"""SFT: a mixture without leaks, steps from the data, masks on what the assistant says."""

import dataclasses
import json

import numpy as np
import pytest

from jaxchat.config import load_config
from jaxchat.data.packing import PackStats, pack_conversations
from jaxchat.errors import DataError, UsageError
from jaxchat.optim.horizon import resolve
from jaxchat.optim.schedules import trapezoid
from jaxchat.text.chat import render
from jaxchat.text.tokenizer import ASSISTANT_END, train_tokenizer
from train.sft import mixture, sft_config


def config_of(*entries, **more):
    config = resolve(load_config("nano"))
    return dataclasses.replace(config, sft=dataclasses.replace(config.sft, mixture=tuple(entries), **more))


def test_held_out_conversations_are_not_trained():
    train, val = mixture(config_of("identity:400", "word_problems:400", "chatterbot", "chitchat:300"))
    for entry in ("identity:400", "word_problems:400", "chatterbot"):
        seen = {json.dumps(c) for c in train[entry]}
        assert seen and val[entry] and not seen & {json.dumps(c) for c in val[entry]}
    assert len(train["chitchat:300"]) == 300 and val["chitchat:300"]
    assert not {json.dumps(c) for c in train["chitchat:300"]} & {json.dumps(c) for c in val["chitchat:300"]}


def test_same_seed_same_mixture():
    assert mixture(config_of("identity:50")) == mixture(config_of("identity:50"))


def test_unknown_or_empty_mixtures_are_refused():
    with pytest.raises(UsageError, match="identty"):
        mixture(config_of("identty:5"))
    with pytest.raises(DataError, match=r"sft.mixture: no conversations"):
        mixture(config_of())


@pytest.mark.parametrize(("rows", "epochs", "steps"), [(1, 1.0, 1), (16, 1.0, 2), (800, 1.0, 100), (800, 0.5, 50)])
def test_steps_follow_the_rows(rows, epochs, steps):
    config = sft_config(config_of("identity:5", epochs=epochs), rows)
    assert config.train.steps == steps
    multiplier = trapezoid(steps, 0, config.optim.warmdown_ratio, config.optim.final_lr)
    values = [float(multiplier(s)) for s in range(steps + 5)]
    assert values[0] == 1.0 and min(values) >= 0.0
    assert config.optim.lr_scale == pytest.approx(0.8 * resolve(load_config("nano")).optim.lr_scale)


def test_packed_rows_learn_only_what_the_assistant_says():
    train, _ = mixture(config_of("word_problems:50"))
    conversations = train["word_problems:50"]
    texts = [
        part["text"]
        for c in conversations
        for m in c
        for part in ([{"text": m["content"]}] if m["role"] == "user" else m["content"])
    ]
    tokenizer = train_tokenizer(texts, 300, 10**6, 10**4)
    rendered = [render(tokenizer, c) for c in conversations]
    packed = pack_conversations(rendered, 400, tokenizer.special[ASSISTANT_END], PackStats())
    assert sum(map(len, (ids for ids, _ in packed))) == sum(len(ids) for ids, _ in rendered)
    ids = np.concatenate([ids for ids, _ in packed])
    mask = np.concatenate([mask for _, mask in packed]).astype(bool)
    special = {i: name for name, i in tokenizer.special.items()}
    learned = {special[i] for i in ids[mask] if i in special}
    assert learned == {"<|python_start|>", "<|python_end|>", "<|assistant_end|>"}
    assert mask.sum() == sum(sum(m) for _, m in rendered)
