"""Supervised fine-tuning: a mixture of conversations, packed whole, -> a model that answers.

Mid-training, a stage of its own in older chat recipes, is part of this mixture.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxchat import hosts
from jaxchat.checkpoint import Checkpoints
from jaxchat.config import Config
from jaxchat.data.corpus import document_hash, limit_of_hashes
from jaxchat.data.dialogues import chatterbot_pairs, chitchat_dialogues, file_conversations, spoken
from jaxchat.data.files import find_files
from jaxchat.data.packing import PackStats, pack_conversations
from jaxchat.data.rows import Rows, finish_rows, write_rows
from jaxchat.errors import DataError, UsageError
from jaxchat.log import progress, say
from jaxchat.optim.groups import carry_moments
from jaxchat.paths import RunDir, read_json, write_json
from jaxchat.state import TrainState
from jaxchat.tasks.base import Task
from jaxchat.tasks.files import TaskFiles
from jaxchat.tasks.registry import get_task, parse_mixture_entry
from jaxchat.text.chat import Message, render
from jaxchat.text.tokenizer import ASSISTANT_END, Tokenizer
from train import evaluate
from train.loop import Job, fit
from train.spot_check import spot_checks

Conversation = list[Message]
Piece = tuple[np.ndarray, np.ndarray]  # ids and mask of one conversation
CHATTERBOT = {"chatterbot": "english", "chatterbot_korean": "korean"}
NO_TASKS = ("chitchat", *CHATTERBOT)  # conversations of packages; everything else is a task, or files
CHITCHAT_VAL = 200  # dialogues held out of chitchat, at most


def run(config: Config, run: RunDir, limit: int = 0) -> dict[str, Any]:
    """Train from `base/` into `sft/`; facts: mixture, rows, fill, scores, seconds, `params_sha256`.

    `limit`: as of a `Job`.
    """
    begin, tokenizer = time.perf_counter(), Tokenizer.load(run.tokenizer)
    facts = hosts.on_first(lambda: _rows_of(config, run, tokenizer))
    facts["rows_seconds"] = time.perf_counter() - begin
    rows, val_rows = (Rows(run.data / "sft" / split, tokenizer.digest, verify=False) for split in ("train", "val"))
    settings = sft_config(config, len(rows))

    def start(state: TrainState) -> TrainState:
        base = Checkpoints(run.stage("base"))
        try:
            trained, _ = base.restore(state, go_back=False)
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
        evaluators=spot_checks(config, run, tokenizer, "sft", config.sft.exam_cases),
        title="sft",
        limit=limit,
    )
    tokens = settings.train.steps * settings.train.batch_tokens
    say(
        f"  {sum(facts['conversations'].values()):,} conversations, {tokens:,} tokens in {settings.train.steps:,} steps"
    )
    trained = fit(job)
    return facts | trained | {"digest": trained["params_sha256"], "tokens": tokens, "steps": settings.train.steps}


def check(config: Config) -> None:
    """Refuse an unknown, malformed or doubled entry of the mixture, and exams that cannot be asked on the way, before
    any work; download what the mixture lacks."""
    if config.sft.exam_cases:
        evaluate.check(config)
    names = [parse_mixture_entry(entry)[0] for entry in config.sft.mixture]
    for name in names:
        if name.startswith("files:"):
            find_files(name)
        elif name not in NO_TASKS:
            task = get_task(name)
            if type(task).train_conversations is Task.train_conversations:
                raise UsageError(f"sft.mixture: {name} is an exam alone, it has nothing to train on")
        if names.count(name) > 1:
            raise UsageError(f"sft.mixture: {name} stands there twice; give it one count")
    for name in names:
        if name not in NO_TASKS and not name.startswith("files:"):
            get_task(name, _files(config)).fetch()


def _files(config: Config) -> TaskFiles:
    return TaskFiles.of(config, download=True)


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


def mixture(config: Config) -> Iterator[tuple[str, bool, Conversation]]:
    """(entry of the mixture, held out, conversation), one at a time: a data set need not fit into memory as text.

    A conversation is held out by a hash of its text, as documents are; chitchat's are those of its held-out documents,
    and those of files are held out where pretraining on the same files holds them out.
    Raises `UsageError` for an unknown name and `DataError` for data that is missing or damaged.
    """
    fraction, files = config.data.val_fraction, _files(config)
    for entry in config.sft.mixture:
        name, count, _ = parse_mixture_entry(entry)
        if name == "chitchat":
            for split, limit in (("train", count), ("val", CHITCHAT_VAL)):
                for conversation in itertools.islice(chitchat_dialogues(split, fraction), limit):
                    yield entry, split == "val", conversation
            continue
        found: Iterable[Conversation]
        if name.startswith("files:"):
            conversations = list(itertools.islice(file_conversations(name, config.data.encoding), count))
            hashes = [document_hash(spoken(conversation)) for conversation in conversations]
            below = limit_of_hashes(hashes, fraction) if len(set(hashes)) > 1 else fraction
            yield from ((entry, h < below, c) for h, c in zip(hashes, conversations, strict=True))
            continue
        if name in CHATTERBOT:
            found = itertools.islice(chatterbot_pairs(CHATTERBOT[name]), count)
        else:
            found = get_task(name, files).train_conversations(count, config.seed)
        for conversation in found:
            yield entry, document_hash(json.dumps(conversation)) < fraction, conversation


def _rows_of(config: Config, run: RunDir, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the rows; `DataError` where they are not those that a run under way began with."""
    facts, path = _write_rows(config, run, tokenizer), run.stage("sft") / "rows.json"
    digests = Rows(run.data / "sft" / "train", verify=False).meta["sha256"]
    if not any(p.name.isdigit() for p in path.parent.glob("*")):
        write_json(path, digests)
    elif path.exists() and read_json(path) != digests:
        raise DataError(
            f"{run.root}: the conversations are not those that this SFT began with (did tasks.data_dir change?); "
            f"bring them back, or remove {path.parent} to begin again"
        )
    return facts


def _write_rows(config: Config, run: RunDir, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write `data/sft`; facts: conversations by entry, rows and fill of each split."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    pieces: dict[tuple[str, bool], list[Piece]] = {(e, held): [] for e in config.sft.mixture for held in (False, True)}
    with progress("sft: rendering", None) as bar:
        for entry, held_out, conversation in mixture(config):
            try:
                ids, mask = render(tokenizer, conversation)
            except UsageError as error:
                raise DataError(f"sft.mixture: {entry}: a conversation is out of form: {error}") from error
            pieces[entry, held_out].append((np.array(ids, dtype), np.array(mask, np.uint8)))
            bar.advance()
    if not any(found for (_, held_out), found in pieces.items() if not held_out):
        raise DataError("sft.mixture: no conversations; name at least one, for example identity:500")
    epochs = {entry: parse_mixture_entry(entry)[2] for entry in config.sft.mixture}
    # each epoch is packed for itself, so that no row holds a conversation twice
    train = [
        [piece for entry, wanted in epochs.items() if wanted > epoch for piece in pieces[entry, False]]
        for epoch in range(max(epochs.values()))
    ]
    val = [[piece for entry in epochs for piece in pieces[entry, True]]]
    return {
        "conversations": {entry: len(pieces[entry, False]) for entry in epochs},
        "train": _write(config, run, tokenizer, "train", train),
        "val": _write(config, run, tokenizer, "val", val),
    }


def _write(config: Config, run: RunDir, tokenizer: Tokenizer, split: str, epochs: list[list[Piece]]) -> dict[str, Any]:
    row_len, stats = config.model.seq_len + 1, PackStats()
    turn_end = tokenizer.special[ASSISTANT_END]
    packed = (row for pieces in epochs for row in pack_conversations(pieces, row_len, turn_end, stats))
    directory = run.data / "sft" / split
    directory.parent.mkdir(parents=True, exist_ok=True)
    count = write_rows(directory, packed, row_len, tokenizer.bos, tokenizer.vocab_size)
    meta = {"tokenizer": tokenizer.digest, "conversations": stats.documents, "cut": stats.cuts, "fill": stats.fill}
    finish_rows(directory, meta, row_len, count, tokenizer.vocab_size)
    return {"rows": count, "conversations": stats.documents, "cut": stats.cuts, "fill": stats.fill}
