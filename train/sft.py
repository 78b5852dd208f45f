"""Supervised fine-tuning: a mixture of conversations, packed whole, -> a model that answers.

Mid-training, a stage of its own in older chat recipes, is part of this mixture.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import jaxchat
from jaxchat import distributed
from jaxchat.chat import Message
from jaxchat.config import Config
from jaxchat.data.packing import PackStats, Rows, finished_rows, pack_conversations, render_all, write_rows
from jaxchat.data.shards import parallel_map, workers_for
from jaxchat.data.sources import Unit, document_hash, find_files, limit_of_hashes
from jaxchat.errors import DataError, UsageError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir, read_json, write_json
from jaxchat.scaling import fine_tuning_optim
from jaxchat.tasks import get_task, parse_mixture_entry
from jaxchat.tasks.base import Task, TaskFiles, identity_digest
from jaxchat.tasks.conversations import chatterbot_pairs, chitchat_dialogues, file_conversations, spoken
from jaxchat.tokenizer import ASSISTANT_END, Tokenizer

from . import evaluate
from .loop import Trainer, continued

T = TypeVar("T")
Conversation = list[Message]
Rendering = tuple[np.ndarray, np.ndarray]  # ids and mask of one conversation
FACTS = ("rows", "conversations", "cut", "fill")
CHATTERBOT = {"chatterbot": "english", "chatterbot_korean": "korean"}
NO_TASKS = ("chitchat", *CHATTERBOT)  # conversations of packages; everything else is a task, or files
MOMENTUM, MOMENTUM_STEPS = (0.85, 0.95, 0.95), 300  # Muon's, as in nanochat's SFT
CHITCHAT_VAL = 200  # dialogues held out of chitchat, at most
WARMDOWN_RATIO = 0.5  # share of the steps in which the rate falls to 0
CHUNK = 256  # conversations rendered at once
FEW = 10_000  # conversations rendered in this process: about two seconds, which starting others takes too


def run(config: Config, run: RunDir, limit: int = 0) -> dict[str, Any]:
    """Train from `base/` into `sft/`; facts: mixture, rows, fill, scores, seconds, `params_sha256`.

    `limit`: see `Trainer`.
    """
    begin, tokenizer = time.perf_counter(), Tokenizer.load(run.tokenizer)
    facts = distributed.on_first(lambda: checked_rows(config, run, tokenizer))
    facts["rows_seconds"] = time.perf_counter() - begin
    rows, val_rows = (Rows(run.data / "sft" / split, tokenizer.digest, verify=False) for split in ("train", "val"))
    settings = sft_config(config, len(rows))
    steps, tokens = settings.train.steps, settings.train.steps * settings.train.batch_tokens
    say(f"  {sum(facts['conversations'].values()):,} conversations, {tokens:,} tokens in {steps:,} steps")
    trainer = Trainer(
        settings,
        run.stage("sft"),
        tokenizer.byte_lengths(),
        rows,
        val_rows if len(val_rows) else None,
        start=lambda state: continued(run, "base", state),
        evaluators=evaluate.spot_checks(config, run, tokenizer, "sft", config.sft.exam_cases),
        title="sft",
        limit=limit,
    )
    facts |= trainer.run()
    return facts | {"digest": facts["params_sha256"], "tokens": tokens, "steps": steps}


def check(config: Config) -> None:
    """Refuse, before any work, an unknown, malformed or doubled entry of the mixture and exams that cannot be asked.

    Downloads what the mixture needs.
    """
    if config.sft.exam_cases:
        evaluate.check(config)
    tasks, names = [], [parse_mixture_entry(entry)[0] for entry in config.sft.mixture]
    for name in names:
        if name.startswith("files:"):
            find_files(name)
        elif name not in NO_TASKS:
            tasks.append(task := get_task(name, TaskFiles.of(config, download=True)))
            if type(task).train_conversations is Task.train_conversations:
                raise UsageError(f"sft.mixture: {name} is an exam alone, it has nothing to train on")
        if names.count(name) > 1:
            raise UsageError(f"sft.mixture: {name} stands there twice; give it one count")
    for task in tasks:
        task.fetch()


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
    fraction = config.data.val_fraction
    for entry in config.sft.mixture:
        name, count, _ = parse_mixture_entry(entry)
        conversations: Iterable[Conversation]
        if name == "chitchat":
            for split, limit in (("train", count), ("val", CHITCHAT_VAL)):
                for conversation in itertools.islice(chitchat_dialogues(split, fraction), limit):
                    yield entry, split == "val", conversation
            continue
        if name.startswith("files:"):
            hashes = (
                document_hash(spoken(c))
                for c in itertools.islice(file_conversations(name, config.data.encoding), count)
            )
            try:
                limit_hash = limit_of_hashes(hashes, fraction)  # reads no further than needed
            except ValueError:  # fewer than two different ones
                limit_hash = fraction
            for conversation in itertools.islice(file_conversations(name, config.data.encoding), count):
                yield entry, document_hash(spoken(conversation)) < limit_hash, conversation
            continue
        if name in CHATTERBOT:
            conversations = itertools.islice(chatterbot_pairs(CHATTERBOT[name]), count)
        else:
            task = get_task(name, TaskFiles.of(config, download=True))
            conversations = task.train_conversations(count, config.seed)
        for conversation in conversations:
            yield entry, document_hash(json.dumps(conversation)) < fraction, conversation


def checked_rows(config: Config, run: RunDir, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the rows; `DataError` where they are not those that a training under way began with."""
    facts, path = prepare_rows(config, run, tokenizer), run.stage("sft") / "rows.json"
    digests = Rows(run.data / "sft" / "train", verify=False).meta["sha256"]
    if not any(p.name.isdigit() for p in path.parent.glob("*")):
        write_json(path, digests)
    elif path.exists() and read_json(path) != digests:
        raise DataError(
            f"{run.root}: the conversations are not those that this SFT began with (did tasks.data_dir change?); "
            f"bring them back, or remove {path.parent} to begin again"
        )
    return facts


def prepare_rows(config: Config, run: RunDir, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write `data/sft`, unless it holds the rows of the same inputs.

    Facts: conversations by entry, rows and fill of each split.
    """
    origin = _origin(config, tokenizer)
    train, val = (finished_rows(run.data / "sft" / split, origin) for split in ("train", "val"))
    done = train is not None and val is not None
    if train is None or val is None:
        rendered = _render(config, run, tokenizer)
        wanted = {entry: parse_mixture_entry(entry)[2] for entry in config.sft.mixture}
        epochs = [  # each epoch is packed for itself, so that no row holds a conversation twice
            [one for entry, times in wanted.items() if times > epoch for one in rendered[entry, False]]
            for epoch in range(max(wanted.values()))
        ]
        about = [{"origin": origin, "entries": {e: len(rendered[e, held]) for e in wanted}} for held in (False, True)]
        train = write_split(config, run, tokenizer, "train", epochs, about[0])
        val = write_split(config, run, tokenizer, "val", [[o for e in wanted for o in rendered[e, True]]], about[1])
    say(
        f"  {train['conversations']:,} conversations in {train['rows']:,} rows, {train['fill']:.2%} filled, "
        f"{train['cut']:,} cut" + (" (done before)" if done else "")
    )
    facts = {split: {key: meta[key] for key in FACTS} for split, meta in (("train", train), ("val", val))}
    return {"conversations": train["entries"]} | facts


def _origin(config: Config, tokenizer: Tokenizer) -> str:
    """SHA-256 of all that decides the rows: settings, data, and the code of generators and rendering."""
    package = Path(jaxchat.__file__).parent
    code = [package / "chat.py", package / "tasks" / "texts.toml"]
    code += [path for part in ("data", "tasks") for path in sorted((package / part).glob("*.py"))]
    content = [
        [config.seed, config.model.seq_len, config.data.val_fraction, config.data.encoding],
        [tokenizer.digest, identity_digest(config)],
        [[entry, _content(parse_mixture_entry(entry)[0], config)] for entry in config.sft.mixture],
        [hashlib.sha256(path.read_bytes()).hexdigest() for path in code],
    ]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


def _content(name: str, config: Config) -> list[Any]:
    """Describe the data behind a mixture entry; changed data is described differently."""
    if name == "chitchat":
        return Unit(name).content()
    if name in CHATTERBOT:
        return [p.version for p in importlib.metadata.distributions(name="chatterbot-corpus")]
    if name.startswith("files:"):
        paths: Iterable[Path | str] = find_files(name)
    else:
        paths = get_task(name, TaskFiles.of(config, download=True)).fetch()
    return [Unit(name, str(path)).content() for path in paths]


def _render(config: Config, run: RunDir, tokenizer: Tokenizer) -> dict[tuple[str, bool], list[Rendering]]:
    """The conversations of the mixture as tokens, by (entry, held out): few here, many in other processes."""
    conversations = mixture(config)
    few = list(itertools.islice(conversations, FEW))
    chunks = _chunks(itertools.chain(few, conversations))
    workers = workers_for(config.data.workers, FEW)
    work = functools.partial(render_all, (str(run.tokenizer.resolve()), tokenizer.digest))
    here = len(few) < FEW or (workers == 1 and config.data.engine == "local")
    parts = map(work, chunks) if here else parallel_map(work, chunks, config.data.engine, workers)
    rendered: dict[tuple[str, bool], list[Rendering]] = {(e, h): [] for e in config.sft.mixture for h in (False, True)}
    with progress("sft: rendering", None) as bar:
        for part in parts:
            for entry, held_out, ids, mask in part:
                rendered[entry, held_out].append((ids, mask))
                bar.advance()
    if not any(rendered[entry, False] for entry in config.sft.mixture):
        raise DataError("sft.mixture: no conversations; name at least one, for example identity:500")
    return rendered


def _chunks(conversations: Iterable[T]) -> Iterator[list[T]]:
    source = iter(conversations)
    while chunk := list(itertools.islice(source, CHUNK)):
        yield chunk


def write_split(
    config: Config,
    run: RunDir,
    tokenizer: Tokenizer,
    split: str,
    epochs: Sequence[Sequence[Rendering]],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Pack and write the rows of one split, epoch after epoch; their meta, with `about` in it."""
    row_len, stats = config.model.seq_len + 1, PackStats()
    turn_end = tokenizer.special[ASSISTANT_END]
    packed = (row for epoch in epochs for row in pack_conversations(epoch, row_len, turn_end, stats))
    directory = run.data / "sft" / split
    directory.parent.mkdir(parents=True, exist_ok=True)

    def facts() -> dict[str, Any]:
        meta = {"tokenizer": tokenizer.digest, "conversations": stats.documents, "cut": stats.cuts, "fill": stats.fill}
        return meta | about

    return write_rows(directory, packed, row_len, tokenizer.bos, tokenizer.vocab_size, facts)
