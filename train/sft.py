"""Supervised fine-tuning: a mixture of conversations, packed whole, -> a model that answers.

Mid-training, a stage of its own in older chat recipes, is part of this mixture.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable
from typing import Any

from jaxchat import hosts
from jaxchat.checkpoint import Checkpoints
from jaxchat.config import Config
from jaxchat.data.corpus import document_hash
from jaxchat.data.dialogues import chatterbot_pairs, chitchat_dialogues
from jaxchat.data.packing import PackStats, pack_conversations
from jaxchat.data.rows import Rows, finish_rows, write_rows
from jaxchat.errors import DataError, UsageError
from jaxchat.log import say
from jaxchat.optim.groups import carry_moments
from jaxchat.paths import RunDir
from jaxchat.state import TrainState
from jaxchat.tasks.registry import get_task, parse_mixture_entry
from jaxchat.text.chat import Message, render
from jaxchat.text.tokenizer import ASSISTANT_END, Tokenizer
from train.loop import Job, fit

Conversation = list[Message]


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Train from `base/` into `sft/`; facts: mixture, rows, fill, scores, seconds, `params_sha256`."""
    tokenizer = Tokenizer.load(run.tokenizer)
    facts = hosts.on_first(lambda: _write_rows(config, run, tokenizer))
    rows, val_rows = (Rows(run.data / "sft" / split, tokenizer.digest, verify=False) for split in ("train", "val"))
    settings = sft_config(config, len(rows))

    def start(state: TrainState) -> TrainState:
        base = Checkpoints(run.stage("base"))
        try:
            trained, _ = base.restore(state)
        finally:
            base.close()
        return TrainState(trained.params, carry_moments(trained.opt_state, state.opt_state), state.step)

    job = Job(
        config=settings,
        directory=run.stage("sft"),
        rows=rows,
        val_rows=val_rows if len(val_rows) else None,
        byte_lengths=tokenizer.byte_lengths(),
        start=start,
        title="sft",
    )
    tokens = settings.train.steps * settings.train.batch_tokens
    say(
        f"  {sum(facts['conversations'].values()):,} conversations, {tokens:,} tokens in {settings.train.steps:,} steps"
    )
    trained = fit(job)
    return facts | trained | {"digest": trained["params_sha256"], "tokens": tokens, "steps": settings.train.steps}


def check(config: Config) -> None:
    """Refuse an unknown, malformed or doubled entry of the mixture, and a batch without whole rows, before any work."""
    names = [parse_mixture_entry(entry)[0] for entry in config.sft.mixture]
    for name in names:
        if name not in ("chitchat", "chatterbot"):
            get_task(name)
        if names.count(name) > 1:
            raise UsageError(f"sft.mixture: {name} stands there twice; give it one count")


def sft_config(config: Config, rows: int) -> Config:
    """The configuration the loop trains with: steps from the rows, and the rates of `sft`."""
    sft = config.sft
    batch_rows = max(1, sft.batch_tokens // config.model.seq_len)
    steps = max(1, round(rows * sft.epochs / batch_rows))
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps, batch_tokens=sft.batch_tokens, eval_every=sft.eval_every),
        optim=dataclasses.replace(
            config.optim,
            lr_scale=config.optim.lr_scale * sft.lr_ratio,
            warmup_steps=0,
            warmdown_ratio=sft.warmdown_ratio,
            final_lr=0.0,
            weight_decay=0.0,
            momentum_warmup_steps=0,
        ),
    )


def mixture(config: Config) -> tuple[dict[str, list[Conversation]], dict[str, list[Conversation]]]:
    """(train, val) conversations by name of the mixture's entry.

    A conversation is held out by a hash of its text, as documents are; chitchat's are those of its held-out documents.
    Raises `UsageError` for an unknown name and `DataError` if nothing is left to train on.
    """
    train: dict[str, list[Conversation]] = {}
    val: dict[str, list[Conversation]] = {}
    fraction = config.data.val_fraction
    for entry in config.sft.mixture:
        name, count = parse_mixture_entry(entry)
        if name == "chitchat":
            kept = itertools.islice(chitchat_dialogues("train", fraction), count)
            train[entry], val[entry] = list(kept), list(itertools.islice(chitchat_dialogues("val", fraction), 200))
            continue
        if name == "chatterbot":
            found: Iterable[Conversation] = itertools.islice(chatterbot_pairs(), count)
        else:
            found = get_task(name).train_conversations(count, config.seed)
        train[entry], val[entry] = [], []
        for conversation in found:
            held_out = document_hash(json.dumps(conversation)) < fraction
            (val if held_out else train)[entry].append(conversation)
    if not any(train.values()):
        raise DataError("sft.mixture: no conversations; name at least one, for example identity:500")
    return train, val


def _write_rows(config: Config, run: RunDir, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write `data/sft`; facts: conversations by entry, rows and fill of each split."""
    train, val = mixture(config)
    facts: dict[str, Any] = {"conversations": {name: len(found) for name, found in train.items()}}
    return facts | {
        split: _write(config, run, tokenizer, split, found) for split, found in (("train", train), ("val", val))
    }


def _write(
    config: Config, run: RunDir, tokenizer: Tokenizer, split: str, found: dict[str, list[Conversation]]
) -> dict[str, Any]:
    row_len, stats = config.model.seq_len + 1, PackStats()
    rendered = [render(tokenizer, conversation) for group in found.values() for conversation in group]
    packed = pack_conversations(rendered, row_len, tokenizer.special[ASSISTANT_END], stats)
    directory = run.data / "sft" / split
    directory.parent.mkdir(parents=True, exist_ok=True)
    count = write_rows(directory, packed, row_len, tokenizer.bos, tokenizer.vocab_size)
    meta = {"tokenizer": tokenizer.digest, "conversations": stats.documents, "cut": stats.cuts, "fill": stats.fill}
    finish_rows(directory, meta, row_len, count, tokenizer.vocab_size)
    return {"rows": count, "conversations": stats.documents, "cut": stats.cuts, "fill": stats.fill}
