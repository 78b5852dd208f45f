"""Supervised fine-tuning: a mixture of conversations, packed whole, -> a model that answers.

Mid-training, a stage of its own in older chat recipes, is part of this mixture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat import __version__, distributed
from jaxchat.chat import Message
from jaxchat.config import Config, nearest, replaced
from jaxchat.data.packing import PackStats, Rows, pack_conversations, render_all, write_rows
from jaxchat.data.shards import parallel_map, workers_for
from jaxchat.data.sources import document_hash, limit_of_hashes, source_files, spoken
from jaxchat.errors import DataError, UsageError
from jaxchat.log import progress, say, say_once
from jaxchat.run_dir import RunDir, read_json, saved_steps, write_json
from jaxchat.scaling import fine_tuning_optim
from jaxchat.sharding import batch_devices, make_mesh
from jaxchat.tasks import TASKS, get_task, parse_mixture_entry
from jaxchat.tasks.base import Task, TaskFiles, identity_digest
from jaxchat.tasks.conversations import Found, chatterbot_pairs, chitchat_dialogues, file_conversations
from jaxchat.tokenizer import ASSISTANT_END, Tokenizer

from . import evaluate, plausible
from .loop import Trainer, continued

Conversation = list[Message]
Rendering = tuple[np.ndarray, np.ndarray]  # ids and mask of one conversation
SPLITS = ("train", "val")
FACTS = ("rows", "conversations", "cut", "fill")
# Of the conversations: so many without an answer in the context may stay, as rows without targets
FEW_WITHOUT_TARGET = 0.01
CHATTERBOT = {"chatterbot": "english", "chatterbot_korean": "korean"}
OWN = ("files:", "hf:")  # sources of conversations of one's own
NO_TASKS = ("chitchat", *CHATTERBOT)  # conversations of packages; everything else is a task, or files
MOMENTUM, MOMENTUM_STEPS = (0.85, 0.95, 0.95), 300  # Muon's, as in nanochat's SFT
CHITCHAT_VAL = 200  # dialogues held out of chitchat, at most
CHUNK = 256  # conversations rendered at once
FEW = 10_000  # conversations rendered in this process: about two seconds, which starting others takes too


def run(config: Config, run: RunDir, limit: int = 0) -> dict[str, Any]:
    """Train from `base/` into `sft/`; facts: mixture, rows, fill, scores, seconds, `params_sha256`.

    `limit`: see `Trainer`.
    """
    tokenizer = Tokenizer.load(run.tokenizer)
    facts = distributed.on_first(lambda: prepare_rows(config, run, tokenizer))
    rows, val_rows = (Rows(run.data / "sft" / split, tokenizer.digest, verify=False) for split in SPLITS)
    settings = sft_config(config, len(rows), batch_devices(make_mesh(config.mesh)))
    steps, batch = settings.train.steps, settings.train.batch_tokens
    tokens = steps * batch
    say(f"  {sum(facts['conversations'].values()):,} conversations, {steps:,} steps of {batch:,} tokens")
    trainer = Trainer(
        settings,
        run.stage("sft"),
        tokenizer.byte_lengths(),
        rows,
        val_rows if len(val_rows) else None,
        start=lambda state: continued(run, "base", state),
        evaluators=evaluate.spot_checks(config, run, tokenizer, "sft", config.sft.exam_cases),
        sampler=evaluate.sampler(config, run, tokenizer, "sft"),
        title="sft",
        limit=limit,
    )
    result = trainer.run() | {"tokens": tokens, "steps": steps, "batch_tokens": batch}
    result["warnings"] = facts.pop("warnings") + result["warnings"]
    return facts | {"rows_seconds": rows.meta.get("seconds", 0.0)} | result


def check(config: Config) -> None:
    """Refuse, before any work, an unknown, malformed or doubled entry of the mixture and exams that cannot be asked.

    Downloads what the mixture needs.
    """
    if config.sft.exam_cases:
        evaluate.check(config)
    taught = [task for task in TASKS if TASKS[task].train_conversations is not Task.train_conversations]
    names = [parse_mixture_entry(entry)[0] for entry in config.sft.mixture]
    for name in names:
        if not name.startswith(OWN) and name not in (*NO_TASKS, *taught):
            known = ["files:GLOB", "hf:OWNER/NAME", *NO_TASKS, *taught]
            advice = f"{nearest(name, known)}; take one of {', '.join(known)}"
            raise UsageError(f"sft.mixture: {name!r} is no data set to train on{advice}")
        if names.count(name) > 1:
            raise UsageError(f"sft.mixture: {name} stands there twice; give it one count")
    for name in names:
        files_of(config, name)


def files_of(config: Config, name: str) -> Sequence[Path]:
    """Return the files of an entry of the mixture, downloaded where they must be; none of what a package brings."""
    if name.startswith(OWN):
        return source_files(name, config.data)
    return () if name in NO_TASKS else get_task(name, TaskFiles.of(config, download=True)).fetch()


def ready(config: Config, run: RunDir) -> None:
    """Read all conversations before anything is trained: into rows where the tokenizer is there, else only checked.

    `DataError` names the first that cannot be used.
    """
    if (run.tokenizer / "tokenizer.json").exists():
        facts = prepare_rows(config, run, Tokenizer.load(run.tokenizer))
        rows, held_out = (facts[split]["rows"] for split in SPLITS)
        settings = sft_config(config, rows, batch_devices(make_mesh(config.mesh)))
        plausible.warn("sft", plausible.of_steps("sft", settings, rows, held_out or None))
        return
    with progress("sft: reading the conversations", None) as bar:
        say(f"  sft: {sum(1 for _ in bar.track(mixture(config))):,} conversations read")


def sft_config(config: Config, rows: int, devices: int = 1) -> Config:
    """Return the configuration the loop trains with: batch and steps from the rows, and the rates of `sft`.

    Pretraining's batch is halved, down to a row a device, until it is no larger than the data and makes `FEW_STEPS`.
    """
    sft, T = config.sft, config.model.seq_len
    batch = max(1, sft.batch_tokens // T)
    if sft.batch_tokens == config.train.batch_tokens:  # not chosen for SFT
        while batch % (2 * devices) == 0 and (batch > rows or batch * plausible.FEW_STEPS > rows * sft.epochs):
            batch //= 2
    steps = max(1, round(rows * sft.epochs / batch))
    config = dataclasses.replace(config, optim=fine_tuning_optim(config, sft.lr_ratio))
    config = replaced(config, "optim", warmdown_ratio=0.5, momentum=MOMENTUM, momentum_warmup_steps=MOMENTUM_STEPS)
    return replaced(config, "train", steps=steps, batch_tokens=batch * T, eval_every=sft.eval_every)


def mixture(config: Config, left_out: dict[str, str] | None = None) -> Iterator[tuple[str, bool, Conversation]]:
    """Yield (entry of the mixture, held out, conversation): a data set need not fit into memory as text.

    A conversation is held out by a hash of its text, as documents are; chitchat's are those of its held-out documents,
    and those of files are held out where pretraining on the same files holds them out. `left_out` says what could not
    be used, by entry.
    Raises `UsageError` for an unknown name and `DataError` for data that is missing or damaged.
    """
    fraction = config.data.val_fraction
    for entry in config.sft.mixture:
        name, count, _ = parse_mixture_entry(entry)
        conversations: Iterable[Conversation]
        if name == "chitchat":
            for split, most in (("train", count), ("val", CHITCHAT_VAL)):
                for conversation in itertools.islice(chitchat_dialogues(split, fraction), most):
                    yield entry, split == "val", conversation
            continue
        text: Callable[[Any], str] = json.dumps
        limit, found = fraction, Found()
        if name.startswith(OWN):
            options: dict[str, Any] = {"count": count, "max_left_out": config.sft.max_left_out}
            text, read = spoken, functools.partial(file_conversations, name, config.data, **options)
            conversations = read(found=found)
            hashes = map(document_hash, map(spoken, read()))
            with contextlib.suppress(ValueError):  # fewer than two different ones
                limit = limit_of_hashes(hashes, fraction)  # reads no further than needed
        elif name in CHATTERBOT:
            conversations = itertools.islice(chatterbot_pairs(CHATTERBOT[name]), count)
        else:
            task = get_task(name, TaskFiles.of(config, download=True))
            conversations = task.train_conversations(count, config.seed)
        for conversation in conversations:
            yield entry, document_hash(text(conversation)) < limit, conversation
        if found.forms:
            say_once(f"  {name}: {found}")  # the check before training reads them, too
        if found.left_out and left_out is not None:
            left_out[entry] = f"{found.left_out:,}, first: {found.first}"


def prepare_rows(config: Config, run: RunDir, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write `data/sft`, unless it is there for the same mixture and files.

    A training that has begun goes on with the rows that it began with, if they are undamaged.
    Facts: conversations used and left out by entry, rows and fill of each split, warnings. `DataError` where the rows
    that it began with cannot be had again, or no answer is inside the context.
    """
    path, metas = run.stage("sft") / "rows.json", list[dict[str, Any]]()
    begun, begin = bool(saved_steps(path.parent)), time.perf_counter()
    with contextlib.suppress(DataError):
        metas = [Rows(run.data / "sft" / split, tokenizer.digest).meta for split in SPLITS]
    origin = "" if begun and metas else _origin(config)
    if not metas or (not begun and any(meta.get("origin") != origin for meta in metas)):
        left_out = dict[str, str]()
        rendered = _render(config, run, tokenizer, left_out)
        no_target = _drop_without_target(rendered, config.model.seq_len + 1)
        repeats = {entry: parse_mixture_entry(entry)[2] for entry in config.sft.mixture}
        epochs = [  # each epoch is packed for itself, so that no row holds a conversation twice
            [one for entry, times in repeats.items() if times > epoch for one in rendered[entry, False]]
            for epoch in range(max(repeats.values()))
        ]
        held_out = [[one for entry in repeats for one in rendered[entry, True]]]
        counts = [{entry: len(rendered[entry, held]) for entry in repeats} for held in (False, True)]
        about = {"left_out": left_out, "origin": origin, "no_target": no_target, "seconds": time.perf_counter() - begin}
        metas = [
            write_split(config, run, tokenizer, split, pieces, {"entries": entries} | about)
            for split, pieces, entries in zip(SPLITS, (epochs, held_out), counts, strict=True)
        ]
    train = metas[0]
    if not begun:
        write_json(path, train["sha256"])
    elif path.exists() and read_json(path) != train["sha256"]:
        raise DataError(
            f"{run.root}: the conversations are not those that this SFT began with (did their files change?); "
            f"bring them back, or remove {path.parent} to begin again"
        )
    counted = f"{train['conversations']:,} conversations in {train['rows']:,} rows"
    say_once(f"  {counted}, {train['fill']:.2%} filled, {train['cut']:,} cut")
    facts = {split: {key: meta[key] for key in FACTS} for split, meta in zip(SPLITS, metas, strict=True)}
    no_target, entries = train.get("no_target", 0), train["entries"]
    line = f"{no_target:,} conversations have no answer inside the context of {config.model.seq_len:,} tokens"
    lines = plausible.warn(
        "sft", [f"{line} and teach nothing; raise model.seq_len, or shorten them"] if no_target else []
    )
    warnings = {"warnings": lines if no_target > FEW_WITHOUT_TARGET * sum(entries.values()) else []}
    return {"conversations": entries, "left_out": train.get("left_out", {}), "no_target": no_target} | warnings | facts


def _origin(config: Config) -> str:
    """Return a digest of what the rows are made of, besides the tokenizer: settings, and the files of the mixture."""
    content: list[Any] = [__version__, config.seed, config.model.seq_len, identity_digest(config)]
    content += [config.data.val_fraction, config.data.encoding, config.sft.max_left_out]
    for entry in config.sft.mixture:
        files = [(str(path), path.stat()) for path in files_of(config, parse_mixture_entry(entry)[0])]
        content += [entry, [[path, stat.st_size, stat.st_mtime_ns] for path, stat in files]]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


def _drop_without_target(rendered: dict[tuple[str, bool], list[Rendering]], row_len: int) -> int:
    """Take conversations out whose answers all lie beyond the context; returns how many there are.

    A few may stay. `DataError` where no other is left to train on.
    """
    kept = {key: [one for one in pieces if one[1][:row_len].any()] for key, pieces in rendered.items()}
    before, left = (sum(map(len, of.values())) for of in (rendered, kept))
    if not any(pieces for (_, held_out), pieces in kept.items() if not held_out):
        raise DataError(
            f"sft.mixture: none of the {before:,} conversations has an answer inside the context of {row_len - 1:,} "
            "tokens; raise model.seq_len, or shorten what comes before the first answer"
        )
    if before - left > FEW_WITHOUT_TARGET * before:
        rendered |= kept
    return before - left


def _render(
    config: Config, run: RunDir, tokenizer: Tokenizer, left_out: dict[str, str]
) -> dict[tuple[str, bool], list[Rendering]]:
    """Return the conversations of the mixture as tokens, by (entry, held out): few here, many in other processes."""
    conversations = mixture(config, left_out)
    few = list(itertools.islice(conversations, FEW))
    source = itertools.chain(few, conversations)
    chunks = iter(lambda: list(itertools.islice(source, CHUNK)), [])
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


def write_split(
    config: Config,
    run: RunDir,
    tokenizer: Tokenizer,
    split: str,
    epochs: Sequence[Sequence[Rendering]],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Pack and write the rows of one split, epoch after epoch; returns their meta, with `about` in it."""
    row_len, stats = config.model.seq_len + 1, PackStats()
    turn_end = tokenizer.special[ASSISTANT_END]
    packed = (row for epoch in epochs for row in pack_conversations(epoch, row_len, turn_end, stats))
    directory = run.data / "sft" / split
    directory.parent.mkdir(parents=True, exist_ok=True)

    def meta() -> dict[str, Any]:
        counts = {"conversations": stats.documents, "cut": stats.cuts, "fill": stats.fill}
        return {"tokenizer": tokenizer.digest} | counts | about

    return write_rows(directory, packed, row_len, tokenizer.bos, tokenizer.vocab_size, meta)
