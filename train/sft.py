"""Supervised fine-tuning: a mixture of conversations, packed whole, -> a model that answers.

Mid-training, a stage of its own in older chat recipes, is part of this mixture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import jaxchat
from jaxchat import distributed as hosts
from jaxchat.chat import Message
from jaxchat.config import Config
from jaxchat.data.files import find_files
from jaxchat.data.packing import PackStats, Rows, finish_rows, finished_rows, pack_conversations, write_rows
from jaxchat.data.shards import spread, workers_for
from jaxchat.data.sources import Unit, document_hash, limit_of_hashes
from jaxchat.errors import DataError, UsageError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir, read_json, write_json
from jaxchat.scaling import fine_tuning_optim
from jaxchat.tasks.base import Task
from jaxchat.tasks.conversations import (
    Rendered,
    RenderJob,
    chatterbot_pairs,
    chitchat_dialogues,
    file_conversations,
    render_all,
    render_job,
    spoken,
)
from jaxchat.tasks.files import TaskFiles, identity_digest
from jaxchat.tasks.registry import get_task, parse_mixture_entry
from jaxchat.tokenizer import ASSISTANT_END, Tokenizer

from . import evaluate
from .evaluate import spot_checks
from .loop import Job, continued, fit

Conversation = list[Message]
T = TypeVar("T")
FACTS = ("rows", "conversations", "cut", "fill")
Piece = tuple[np.ndarray, np.ndarray]  # ids and mask of one conversation
CHATTERBOT = {"chatterbot": "english", "chatterbot_korean": "korean"}
NO_TASKS = ("chitchat", *CHATTERBOT)  # conversations of packages; everything else is a task, or files
MOMENTUM, MOMENTUM_STEPS = (0.85, 0.95, 0.95), 300  # Muon's, as in nanochat's SFT
CHITCHAT_VAL = 200  # dialogues held out of chitchat, at most
CHUNK = 256  # conversations rendered at once
WARMDOWN_RATIO = 0.5  # share of the steps in which the rate falls to 0
FEW = 10_000  # conversations that are rendered in this process: about two seconds, which starting others takes too
PACKAGE = Path(jaxchat.__file__).parent


def run(config: Config, run: RunDir, limit: int = 0) -> dict[str, Any]:
    """Train from `base/` into `sft/`; facts: mixture, rows, fill, scores, seconds, `params_sha256`.

    `limit`: as of a `Job`.
    """
    begin, tokenizer = time.perf_counter(), Tokenizer.load(run.tokenizer)
    facts = hosts.on_first(lambda: _rows_of(config, run, tokenizer))
    facts["rows_seconds"] = time.perf_counter() - begin
    rows, val_rows = (Rows(run.data / "sft" / split, tokenizer.digest, verify=False) for split in ("train", "val"))
    settings = sft_config(config, len(rows))

    job = Job(
        config=settings,
        directory=run.stage("sft"),
        rows=rows,
        val_rows=val_rows if len(val_rows) else None,
        byte_lengths=tokenizer.byte_lengths(),
        start=lambda state: continued(run, "base", state),
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
            fine_tuning_optim(config, sft.lr_ratio),
            warmdown_ratio=WARMDOWN_RATIO,
            momentum=MOMENTUM,
            momentum_warmup_steps=MOMENTUM_STEPS,
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
            below = _limit(file_conversations(name, config.data.encoding), count, fraction)
            for conversation in itertools.islice(file_conversations(name, config.data.encoding), count):
                yield entry, document_hash(spoken(conversation)) < below, conversation
            continue
        if name in CHATTERBOT:
            found = itertools.islice(chatterbot_pairs(CHATTERBOT[name]), count)
        else:
            found = get_task(name, files).train_conversations(count, config.seed)
        for conversation in found:
            yield entry, document_hash(json.dumps(conversation)) < fraction, conversation


def _limit(conversations: Iterator[Conversation], count: int | None, fraction: float) -> float:
    """The hash below which a conversation of a file is held out. Reads no further than needed."""
    try:
        return limit_of_hashes((document_hash(spoken(c)) for c in itertools.islice(conversations, count)), fraction)
    except ValueError:  # fewer than two different ones
        return fraction


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
    """Write `data/sft`, unless it holds the rows of these very inputs; facts: conversations by entry, rows and fill of
    each split."""
    origin = _origin(config, tokenizer)
    train, val = (finished_rows(run.data / "sft" / split, origin) for split in ("train", "val"))
    done = train is not None and val is not None
    if train is None or val is None:
        pieces = _pieces(config, run, tokenizer)
        train, val = (_pack(config, run, tokenizer, pieces, split, origin) for split in ("train", "val"))
    say(
        f"  {train['conversations']:,} conversations in {train['rows']:,} rows, {train['fill']:.2%} filled, "
        f"{train['cut']:,} cut" + (" (done before)" if done else "")
    )
    facts = {split: {key: meta[key] for key in FACTS} for split, meta in (("train", train), ("val", val))}
    return {"conversations": train["entries"]} | facts


def _origin(config: Config, tokenizer: Tokenizer) -> str:
    """SHA-256 of all that decides the rows: settings, data, and the code of generators and rendering."""
    code = [path for part in ("data", "tasks", "text") for path in sorted((PACKAGE / part).glob("*.py"))]
    content = [
        [config.seed, config.model.seq_len, config.data.val_fraction, config.data.encoding],
        [tokenizer.digest, identity_digest(config)],
        [[entry, _content(parse_mixture_entry(entry)[0], config)] for entry in config.sft.mixture],
        [hashlib.sha256(path.read_bytes()).hexdigest() for path in code],
    ]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


def _content(name: str, config: Config) -> list[Any]:
    """What tells the data of a mixture's entry from changed data."""
    if name == "chitchat":
        return Unit(name).content()
    if name in CHATTERBOT:
        return [p.version for p in importlib.metadata.distributions(name="chatterbot-corpus")]
    paths = find_files(name) if name.startswith("files:") else get_task(name, _files(config)).fetch()
    return [Unit(name, str(path)).content() for path in paths]


def _pieces(config: Config, run: RunDir, tokenizer: Tokenizer) -> dict[tuple[str, bool], list[Piece]]:
    """The rendered conversations of the mixture in their order, by (entry, held out).

    Few are rendered here; many by other processes, as documents are tokenized.
    """
    pieces: dict[tuple[str, bool], list[Piece]] = {(e, held): [] for e in config.sft.mixture for held in (False, True)}
    with progress("sft: rendering", None) as bar:
        for rendered in _rendered(config, run, tokenizer):
            for label, ids, mask in rendered:
                pieces[label].append((ids, mask))
                bar.advance()
    if not any(found for (_, held_out), found in pieces.items() if not held_out):
        raise DataError("sft.mixture: no conversations; name at least one, for example identity:500")
    return pieces


def _rendered(config: Config, run: RunDir, tokenizer: Tokenizer) -> Iterator[Rendered]:
    conversations = mixture(config)
    few = list(itertools.islice(conversations, FEW))
    workers = workers_for(config.data.workers, FEW)
    if len(few) < FEW or (workers == 1 and config.data.engine == "local"):
        return (render_all(tokenizer, chunk) for chunk in _chunks(itertools.chain(few, conversations)))
    path = str(run.tokenizer.resolve())
    jobs = (RenderJob(path, tokenizer.digest, chunk) for chunk in _chunks(itertools.chain(few, conversations)))
    return spread(render_job, jobs, config.data.engine, workers)


def _chunks(conversations: Iterable[T]) -> Iterator[list[T]]:
    source = iter(conversations)
    while chunk := list(itertools.islice(source, CHUNK)):
        yield chunk


def _pack(
    config: Config,
    run: RunDir,
    tokenizer: Tokenizer,
    pieces: dict[tuple[str, bool], list[Piece]],
    split: str,
    origin: str,
) -> dict[str, Any]:
    """Write the rows of one split; its meta."""
    if split == "val":
        epochs = [[piece for entry in config.sft.mixture for piece in pieces[entry, True]]]
    else:  # each epoch is packed for itself, so that no row holds a conversation twice
        wanted = {entry: parse_mixture_entry(entry)[2] for entry in config.sft.mixture}
        epochs = [
            [piece for entry, times in wanted.items() if times > epoch for piece in pieces[entry, False]]
            for epoch in range(max(wanted.values()))
        ]
    entries = {entry: len(pieces[entry, split == "val"]) for entry in config.sft.mixture}
    return _write(config, run, tokenizer, split, epochs, {"origin": origin, "entries": entries})


def _write(
    config: Config,
    run: RunDir,
    tokenizer: Tokenizer,
    split: str,
    epochs: list[list[Piece]],
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Pack and write rows; their meta, with `more` in it."""
    row_len, stats = config.model.seq_len + 1, PackStats()
    turn_end = tokenizer.special[ASSISTANT_END]
    packed = (row for pieces in epochs for row in pack_conversations(pieces, row_len, turn_end, stats))
    directory = run.data / "sft" / split
    directory.parent.mkdir(parents=True, exist_ok=True)
    count = write_rows(directory, packed, row_len, tokenizer.bos, tokenizer.vocab_size)
    meta = {"tokenizer": tokenizer.digest, "conversations": stats.documents, "cut": stats.cuts, "fill": stats.fill}
    return finish_rows(directory, meta | (more or {}), row_len, count, tokenizer.vocab_size)
