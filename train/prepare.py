"""Stages tokenizer and prepare: documents -> a tokenizer, token shards, and packed rows for training and validation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jaxchat.config import Config, replaced
from jaxchat.data.packing import PackStats, finished_rows, pack_apart, pack_documents, write_rows
from jaxchat.data.shards import (
    HASH,
    SPLITS,
    Distinct,
    Job,
    batches_of,
    cores,
    parallel_map,
    read_documents,
    tokenize_unit,
    workers_for,
)
from jaxchat.data.sources import Part, interleaved, iterate_documents, open_corpus, open_val, training_limit
from jaxchat.errors import DataError, UsageError
from jaxchat.interop.initial import init_tokenizer
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir
from jaxchat.tokenizer import Tokenizer, train_tokenizer

from . import plausible

READS = (
    "tokenizer.", "data.source", "data.val_fraction", "data.val_source", "data.text_bytes", "data.encoding",
    "data.column", "model.vocab_size", "train.init",
)  # fmt: skip
SHARD_TOKENS = 100_000_000  # tokens in one token shard, at most
WINDOW = 20_000  # documents in one best-fit window
OUTPUTS = ("data/rows/train/meta.json", "data/rows/val/meta.json")
FACTS = (
    "documents", "duplicates", "tokens", "lost", "bytes", "chars", "cuts", "fill", "documents_per_row",
    "tokenizer", "rows", "sha256", "sources",
)  # fmt: skip
LEFT_OUT = {
    "empty": "without text left out",
    "binary": "with NUL characters left out",
    "giants": "of more than a million characters cut into several",
}
SAMPLE_DOCUMENTS, SAMPLE_CHARS = 2000, 8_000_000  # of the held-out text at most, to measure the compression
HUB_CACHE = Path("~/.cache/huggingface/hub")
# name -> its file inside tasks.data_dir, and repositories whose tokenizer.json may be in the hub's cache
OTHERS = {
    "GPT-2": ("tokenizers/gpt2.json", ("openai-community/gpt2", "gpt2")),
    "GPT-4": ("tokenizers/gpt4.json", ("Xenova/gpt-4",)),
}


# The tokenizer


def run_tokenizer(config: Config, run: RunDir) -> dict[str, Any]:
    """Write `tokenizer/`; facts: vocabulary, bytes per token on held-out text, digest."""
    options, train = config.tokenizer, config.train
    if train.init:
        tokenizer = init_tokenizer(train.init)
        if train.steps == 0:  # no text is read
            tokenizer.save(run.tokenizer)
            return {"digest": tokenizer.digest, "imported": {"format": "jaxchat", "from": train.init}}
    elif options.path:
        if options.normalize != "none":
            raise UsageError("tokenizer.normalize: is for a tokenizer that is trained; set none with tokenizer.path")
        tokenizer = Tokenizer.load(Path(options.path).expanduser())
        if tokenizer.vocab_size > config.model.vocab_size:
            raise UsageError(
                f"tokenizer.path: {options.path} has {tokenizer.vocab_size} tokens, special tokens included; "
                f"set model.vocab_size={tokenizer.vocab_size}"
            )
    else:
        tokenizer = own_tokenizer(config, config.model.vocab_size, fewer=config.data.size_model)
    tokenizer.save(run.tokenizer)
    sample = sample_documents(config)
    tokens, size = count_tokens(tokenizer, sample), byte_count(sample)
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "trained": not (options.path or train.init),
        "bytes_per_token": size / max(tokens, 1),
        "chars_per_token": sum(map(len, sample)) / max(tokens, 1),
        "digest": tokenizer.digest,
    }
    say(f"  {facts['vocab_size']:,} tokens, {facts['bytes_per_token']:.2f} bytes per token on held-out text")
    return facts


def own_tokenizer(config: Config, vocab_size: int, fewer: bool) -> Tokenizer:
    """Train a tokenizer on the training text; see `train_tokenizer`."""
    parts = open_corpus(config.data)
    documents = interleaved(parts, "train", training_limit(parts, config.data))
    with progress("tokenizer", None) as bar:
        return train_tokenizer(bar.track(documents), vocab_size, normalize=config.tokenizer.normalize, fewer=fewer)


def sample_documents(config: Config) -> list[str]:
    """Return the first held-out documents; at least one, if there is any."""
    sample, size = [], 0
    for document in itertools.islice(iterate_documents(config.data, "val"), SAMPLE_DOCUMENTS):
        sample.append(document)
        size += len(document)
        if size >= SAMPLE_CHARS:
            break
    return sample


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    return sum(len(ids) for batch in batches_of(texts) for ids in tokenizer.encode_batch(batch))


def byte_count(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def other_tokenizers(config: Config, run: RunDir, cache: Path = HUB_CACHE) -> list[dict[str, Any]]:
    """Return how GPT-2's and GPT-4's tokenizers do on the same held-out text, where their files are at hand.

    Of each: vocabulary, bytes per token, and how many of our tokens one of its takes on average.
    """
    paths: list[tuple[str, Path]] = []
    for name, (file, repos) in OTHERS.items():
        places = [Path(config.tasks.data_dir).expanduser() / file] if config.tasks.data_dir else []
        for repo in repos:
            snapshots = cache.expanduser() / f"models--{repo.replace('/', '--')}"
            places += sorted(snapshots.glob("snapshots/*/tokenizer.json"))
        paths += [(name, path) for path in places if path.is_file()][:1]
    results: list[dict[str, Any]] = []
    try:
        texts = sample_documents(config) if paths else []
        ours, size = count_tokens(Tokenizer.load(run.tokenizer), texts), byte_count(texts)
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        for name, path in paths:
            other = tokenizers.Tokenizer.from_file(str(path))
            tokens = max(1, sum(len(e.ids) for e in other.encode_batch_fast(clean, add_special_tokens=False)))
            sizes = {"bytes_per_token": size / tokens, "ours_per_token": ours / tokens}
            results.append({"name": name, "vocab_size": other.get_vocab_size()} | sizes)
    except Exception as error:  # of the text, or of a damaged file: the library raises plain Exception
        say(f"  no comparison with other tokenizers: {error}", style="yellow")
    return results


# How large a model, vocabulary and horizon a text of one's own asks for: the tier `book`


EPOCHS = 4  # of a text that is small: then the held-out score of Shakespeare's plays was best (docs/small.md)
SMALL_RUN = 4_000_000  # tokens, about ten minutes on two cores; a longer text is read once at least
SIZING_CHARS = 1_500_000  # of the text at most, to learn how many tokens it comes to
VOCABULARIES = (384, 8192)  # at least and at most; one token for every kilobyte of text between
# (tokens of the text from which on, layers, width, heads)
SHAPES = ((0, 3, 128, 2), (100_000, 4, 192, 3), (3_000_000, 6, 256, 4), (20_000_000, 8, 384, 6))
BATCH_TOKENS = 2_048
SEQ_LEN = 256


def sized(config: Config) -> Config:
    """Fit layers, width, heads, context, vocabulary, batch and steps that are -1 to the text, with `data.size_model`.

    Raises `DataError` where the text, or the tokenizer of `tokenizer.path`, cannot be read.
    """
    model, train, options = config.model, config.train, config.tokenizer
    if not config.data.size_model or -1 not in (model.depth, model.vocab_size, model.seq_len, train.steps):
        return config
    if "hf:" in config.data.source and config.data.text_bytes < 1:
        raise UsageError(
            "data.size_model: how much of the hub's text? Set data.text_bytes, as --set data.text_bytes=20000000"
        )

    size, chars, sample = 0, 0, list[str]()
    for text in iterate_documents(config.data):
        size += byte_count([text])
        if chars < SIZING_CHARS:
            sample.append(text)
            chars += len(text)
    tokenizer = Tokenizer.load(Path(options.path).expanduser()) if options.path else None
    low, high = VOCABULARIES
    vocabulary = model.vocab_size
    if vocabulary == -1:
        by_size = min(high, max(low, 1 << (max(1, size // 1000).bit_length() - 1)))
        vocabulary = tokenizer.vocab_size if tokenizer else by_size
    tokenizer = tokenizer or train_tokenizer(sample, vocabulary, normalize=options.normalize, fewer=True)
    if tokenizer.vocab_size < vocabulary and model.vocab_size == -1:  # a small alphabet, or few different words
        vocabulary = own_tokenizer(config, vocabulary, fewer=True).vocab_size
    bytes_per_token = byte_count(sample) / max(count_tokens(tokenizer, sample), 1)
    tokens = size / bytes_per_token * (1 - config.data.val_fraction)
    _, depth, width, heads = next(shape for shape in reversed(SHAPES) if tokens >= shape[0])
    fits = {"depth": depth, "vocab_size": vocabulary, "seq_len": SEQ_LEN}
    if model.depth == -1:  # else the depth decides the rest, as everywhere
        fits |= {"width": width, "n_heads": heads}
    model = replaced(config, "model", **{k: v for k, v in fits.items() if getattr(model, k) == -1}).model
    batch = max(BATCH_TOKENS, model.seq_len) if train.batch_tokens == -1 else train.batch_tokens
    seen = max(tokens, min(EPOCHS * tokens, SMALL_RUN))
    steps = max(1, round(seen / batch)) if train.steps == -1 else train.steps
    say(
        f"{size:,} bytes of text in UTF-8: {model.depth} layers, a vocabulary of {model.vocab_size:,} tokens, "
        f"{steps:,} step{'s' * (steps > 1)} (the text about {steps * batch / tokens:.1f} times)"
    )
    return replaced(dataclasses.replace(config, model=model), "train", batch_tokens=batch, steps=steps)


# Shards and rows


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write `data/tokens` and `data/rows`; facts: documents, tokens, rows, fill of each split and source, digest.

    What an interrupted run has finished, of the same source and with the same settings, is kept.
    """
    data, tokenizer, begin = config.data, Tokenizer.load(run.tokenizer), time.perf_counter()
    parts, held_out = open_corpus(data), open_val(data)
    limit, jobs = training_limit(parts, data), list[Job]()
    units = [(unit, limit) for part in parts for unit in part.units]
    count = len(units)
    for unit, below in [*units, *((unit, 1.0) for unit in (held_out.units if held_out else ()))]:
        origin = _digest([unit.content(), below, SHARD_TOKENS, tokenizer.digest])
        folder = (run.data / "tokens" / f"{len(jobs):05d}").resolve()
        jobs.append(Job(unit, below, str(run.tokenizer.resolve()), str(folder), SHARD_TOKENS, origin))
    for folder in (run.data / "tokens").glob("*"):
        if folder.name not in {Path(job.directory).name for job in jobs}:
            shutil.rmtree(folder, ignore_errors=True)
    workers, local, manifests = workers_for(data.workers, len(jobs)), data.engine == "local", list[dict[str, Any]]()
    with progress("tokenize", len(jobs) if workers > 1 else None) as bar:
        if workers == 1 and local:
            done = 0
            for job in jobs:
                manifests.append(tokenize_unit(job, True, lambda count: bar.update(f"{done + count:,} tokens")))  # noqa: B023
                done += manifests[-1]["splits"]["train"]["tokens"]
        else:
            alone = local and 2 * workers <= cores()  # few files: each is encoded by several cores
            work = functools.partial(tokenize_unit, alone=alone)
            manifests = list(bar.track(parallel_map(work, jobs, data.engine, workers)))
    for kind, number in sum((Counter(manifest["left_out"]) for manifest in manifests), Counter[str]()).items():
        say(f"  {number:,} document{'s' * (number > 1)} {LEFT_OUT[kind]}", style="yellow")
    tokenized = time.perf_counter()
    train = parts, jobs[:count], manifests[:count]
    val = ([held_out], jobs[count:], manifests[count:]) if held_out else train
    facts = {split: _pack(config, run, tokenizer, split, *of) for split, of in (("train", train), ("val", val))}
    if held_out and not facts["val"]["rows"]:
        raise DataError(f"data.val_source: {data.val_source} gives no rows of held-out text; add to it")
    paths = [unit.path for unit, _ in units[:count] if unit.path]
    apart = _hashes(jobs[count:], "val")  # of `data.val_source`; else no document is in both splits
    copies = int(np.isin(apart, _hashes(jobs[:count], "train")).sum()) if len(apart) else 0
    lines = plausible.of_text(paths, facts["train"]["bytes"], copies, len(apart))
    seconds = {"tokenize_seconds": tokenized - begin, "pack_seconds": time.perf_counter() - tokenized}
    about = {"warnings": plausible.warn("prepare", lines), **seconds}
    return facts | about | {"digest": _digest([facts[split]["sha256"] for split in SPLITS])}


def _hashes(jobs: Sequence[Job], split: str) -> np.ndarray:
    """Return the hashes of all documents of these units in one split."""
    files = (path for job in jobs for path in sorted(Path(job.directory).glob(f"{split}-*.hash")))
    return np.concatenate([np.empty(0, HASH), *(np.fromfile(path, HASH) for path in files)])


def _pack(
    config: Config,
    run: RunDir,
    tokenizer: Tokenizer,
    split: str,
    parts: Sequence[Part],
    jobs: Sequence[Job],
    manifests: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Pack the rows of one split, source after source; facts.

    Remainders of documents: "auto" drops those of web-scale text; of other text they are packed apart where it is the
    only source, else kept. Held-out rows hold documents whole, or their beginnings, so that each begins at a true
    document start (see `pack_documents`).
    """
    data, row_len, target = config.data, config.model.seq_len + 1, run.data / "rows" / split
    tokens, size, chars = (sum(m["splits"][split][key] for m in manifests) for key in ("tokens", "bytes", "chars"))
    if split == "train" and tokens < row_len:
        raise DataError(
            f"{data.source}: {tokens} tokens to train on are too few for one row of {row_len}; "
            "add text, or lower model.seq_len"
        )
    auto = ["drop" if part.web_scale else "keep" if len(parts) > 1 else "apart" for part in parts]
    modes = auto if data.remainder == "auto" else [data.remainder] * len(parts)
    modes = ["whole"] * len(parts) if split == "val" else modes
    how = [] if set(modes) == {"keep"} else [modes]
    origin = _digest([[job.origin for job in jobs], split, data.dedup, row_len, WINDOW, *how])
    meta = finished_rows(target, origin)
    done = " (done before)" if meta else ""
    if meta is None:
        stats, distinct, sources = PackStats(), Distinct(data.dedup), list[dict[str, Any]]()

        def documents(jobs: Sequence[Job], distinct: Distinct) -> Iterator[np.ndarray]:
            for job in jobs:
                yield from distinct.documents(read_documents(Path(job.directory), split, tokenizer.digest))

        def rows() -> Iterator[np.ndarray]:
            left, how = iter(jobs), (row_len, tokenizer.bos, WINDOW, stats)
            for part, mode in zip(parts, modes, strict=True):
                before, own = dataclasses.replace(stats), list(itertools.islice(left, len(part.units)))
                if mode == "apart":
                    yield from pack_apart(documents(own, distinct), documents(own, Distinct(data.dedup)), *how)
                else:
                    yield from pack_documents(documents(own, distinct), *how, mode)
                counts = {key: getattr(stats, key) - getattr(before, key) for key in ("rows", "tokens", "lost")}
                sources.append({"source": part.source, "weight": part.weight, "remainder": mode} | counts)

        def facts() -> dict[str, Any]:
            return {
                "bytes": size,
                "chars": chars,
                "documents": distinct.kept,
                "tokens": distinct.kept_tokens,
                "lost": stats.lost,
                "duplicates": distinct.duplicates,
                "fill": stats.fill,
                "cuts": stats.cuts,
                "documents_per_row": (stats.documents + stats.cuts - stats.cropped) / max(1, stats.rows),
                "sources": sources,
                "beginnings": stats.beginnings,
                "tokenizer": tokenizer.digest,
                "origin": origin,
            }

        with progress(f"pack {split}", None) as bar:
            meta = write_rows(target, bar.track(rows()), row_len, tokenizer.bos, tokenizer.vocab_size, facts)
    if meta["duplicates"]:
        what = "left out" if data.dedup else "kept (data.dedup=true leaves them out)"
        say(f"  {split}: {meta['duplicates']:,} documents had come before, letter for letter; {what}")
    lost = f", {meta['lost'] / max(1, meta['tokens']):.1%} of the tokens left out" if meta.get("lost") else ""
    say(
        f"  {split}: {meta['documents']:,} documents, {meta['tokens']:,} tokens, {meta['rows']:,} rows of {row_len}, "
        f"{meta['fill']:.2%} filled{lost}{done}"
    )
    for source in meta["sources"] if len(parts) > 1 else ():
        say(f"    {source['weight']:.1%} of the tokens from {source['source']}: {source['rows']:,} rows")
    return {key: meta.get(key, 0) for key in FACTS}  # older rows have no `lost`: they lost nothing


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
