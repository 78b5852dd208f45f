"""Stage prepare: documents -> token shards -> packed rows, for training and for validation."""

from __future__ import annotations

import base64
import binascii
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
from tokenizers import Tokenizer as Backend

from jaxchat.config import Config
from jaxchat.data.packing import PackStats, finish_rows, finished_rows, pack_documents, write_rows
from jaxchat.data.shards import (
    SPLITS,
    Distinct,
    Job,
    batches_of,
    cores,
    read_documents,
    spread,
    tokenize_unit,
    workers_for,
)
from jaxchat.data.sources import Part, interleaved, iterate_documents, open_corpus, open_val, training_limit
from jaxchat.errors import DataError, UsageError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir
from jaxchat.tokenizer import Tokenizer, from_ranks, train_tokenizer

# Stage tokenizer: train a byte-level BPE on the training text, or take an existing one.


READS = (
    "tokenizer.", "data.source", "data.val_fraction", "data.val_source", "data.text_bytes", "data.encoding",
    "model.vocab_size",
)  # fmt: skip
SAMPLE_DOCUMENTS, SAMPLE_CHARS = 2000, 8_000_000  # of the held-out text at most, to measure the compression


def first_documents(documents: Iterable[str], count: int) -> list[str]:
    """The first ones, no more than `SAMPLE_CHARS` characters of them; at least one, if there is any."""
    found, size = [], 0
    for document in itertools.islice(documents, count):
        found.append(document)
        size += len(document)
        if size >= SAMPLE_CHARS:
            break
    return found


def run_tokenizer(config: Config, run: RunDir) -> dict[str, Any]:
    """Write `tokenizer/`; facts: vocabulary, bytes per token on held-out text, digest."""
    data, options = config.data, config.tokenizer
    if options.path:
        if options.normalize != "none":
            raise UsageError(
                "tokenizer.normalize: is for a tokenizer that is trained; set it to none with tokenizer.path"
            )
        tokenizer = Tokenizer.load(Path(options.path).expanduser())
        if tokenizer.vocab_size > config.model.vocab_size:
            raise UsageError(
                f"tokenizer.path: {options.path} has {tokenizer.vocab_size} tokens, special tokens included; "
                f"set model.vocab_size={tokenizer.vocab_size}"
            )
    else:
        parts = open_corpus(data)
        documents = interleaved(parts, "train", training_limit(parts, data))
        with progress("tokenizer", None) as bar:
            tokenizer = train_tokenizer(bar.track(documents), config.model.vocab_size, normalize=options.normalize)
    tokenizer.save(run.tokenizer)
    sample = first_documents(iterate_documents(data, "val"), SAMPLE_DOCUMENTS)
    tokens = sum(len(ids) for batch in batches_of(sample) for ids in tokenizer.encode_batch(batch))
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in sample)
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "trained": not options.path,
        "bytes_per_token": size / max(tokens, 1),
        "chars_per_token": sum(map(len, sample)) / max(tokens, 1),
        "digest": tokenizer.digest,
    }
    say(f"  {facts['vocab_size']:,} tokens, {facts['bytes_per_token']:.2f} bytes per token on held-out text")
    return facts


# The tokenizer beside GPT-2's and GPT-4's on the same held-out text, where their files are at hand.


DOCUMENTS = 2000  # of the held-out text, as in stage tokenizer
HUB_CACHE = Path("~/.cache/huggingface/hub")
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# name -> files inside tasks.data_dir, and repositories whose tokenizer.json may lie in the hub's cache
OTHERS = {
    "GPT-2": (("tokenizers/gpt2.json", "gpt2/tokenizer.json"), ("openai-community/gpt2", "gpt2")),
    "GPT-4": (
        ("tokenizers/gpt4.json", "gpt-4/tokenizer.json", "tokenizers/cl100k_base.tiktoken", "cl100k_base.tiktoken"),
        ("Xenova/gpt-4",),
    ),
}


def other_tokenizers(config: Config, run: RunDir, cache: Path = HUB_CACHE) -> list[dict[str, Any]]:
    """Vocabulary and bytes per token of each, and how many of our tokens one of its takes on average."""
    found = {name: _find(config.tasks.data_dir, *places, cache.expanduser()) for name, places in OTHERS.items()}
    if not any(found.values()):
        return []
    try:
        documents = iterate_documents(config.data, "val")
        texts, tokenizer = first_documents(documents, DOCUMENTS), Tokenizer.load(run.tokenizer)
        ours = sum(len(ids) for batch in batches_of(texts) for ids in tokenizer.encode_batch(batch))
    except DataError as error:
        say(f"  other tokenizers: {error}", style="yellow")
        return []
    size, results = sum(len(text.encode("utf-8", "replace")) for text in texts), []
    for name, path in found.items():
        if path is None:
            continue
        try:
            backend = load(path)
        except Exception as error:  # the library raises plain Exception
            say(f"  {path}: not a tokenizer ({error}); left out", style="yellow")
            continue
        count = max(1, _count(backend, texts))
        results.append(
            {
                "name": name,
                "vocab_size": backend.get_vocab_size(),
                "bytes_per_token": size / count,
                "ours_per_token": ours / count,
            }
        )
    return results


def _find(data_dir: str, files: Sequence[str], repos: Sequence[str], cache: Path) -> Path | None:
    places = [Path(data_dir).expanduser() / file for file in files] if data_dir else []
    for repo in repos:
        places += sorted((cache / f"models--{repo.replace('/', '--')}").glob("snapshots/*/tokenizer.json"))
    return next((path for path in places if path.is_file()), None)


def _count(backend: Backend, texts: Sequence[str]) -> int:
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    return sum(len(encoding.ids) for encoding in backend.encode_batch_fast(clean, add_special_tokens=False))


def load(path: Path) -> Backend:
    """From a `tokenizer.json`, or from tiktoken's file of GPT-4's ranks (a line: a token in base64 and its rank).

    Raises `ValueError` for a damaged file of ranks, and what the library raises for a damaged `tokenizer.json`.
    """
    if path.suffix != ".tiktoken":
        return Backend.from_file(str(path))
    ranks = {}
    for line in path.read_bytes().splitlines():
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {len(ranks) + 1} is no token with its rank") from None
    return from_ranks(ranks, GPT4_SPLIT)


# How large a model, vocabulary and horizon a text of one's own asks for: the tier `book`.


EPOCHS = 4  # of a text that is small: then the held-out score of Shakespeare's plays was best (docs/small.md)
SMALL_RUN = 4_000_000  # tokens, about ten minutes on two cores; a longer text is read once at least
SIZING_CHARS = 1_500_000  # of the text at most, to learn how many tokens it comes to
BYTES_PER_TOKEN = 3.0  # taken where the text is too small to tell
VOCABULARIES = (384, 8192)  # at least and at most; one token for every kilobyte of text between
# (tokens of the text from which on, layers, width, heads)
SHAPES = ((0, 3, 128, 2), (100_000, 4, 192, 3), (3_000_000, 6, 256, 4), (20_000_000, 8, 384, 6))
BATCH_TOKENS = 2_048
SEQ_LEN = 256


def sized(config: Config) -> Config:
    """The configuration with what is -1 of layers, width, heads, context, vocabulary, batch and steps fitted to the
    text; as it was without `data.size_model`.

    Raises `DataError` where the text, or the tokenizer of `tokenizer.path`, cannot be read.
    """
    model, train = config.model, config.train
    keys = ("depth", "vocab_size", "seq_len")
    if not config.data.size_model or not (any(getattr(model, key) == -1 for key in keys) or train.steps == -1):
        return config
    if "hf:" in config.data.source and config.data.text_bytes < 1:
        raise UsageError(
            "data.size_model: how much of the hub's text? Set data.text_bytes, as --set data.text_bytes=20000000"
        )
    size, sample = _measured(config)
    path, (low, high) = config.tokenizer.path, VOCABULARIES
    own = Tokenizer.load(Path(path).expanduser()) if path else None
    fitted = own.vocab_size if own else min(high, max(low, 1 << (max(1, size // 1000).bit_length() - 1)))
    vocabulary = _given(model.vocab_size, fitted)
    tokenizer = own or _trained(config, vocabulary, sample)
    tokens = size / _bytes_per_token(tokenizer, sample) * (1 - config.data.val_fraction)
    _, depth, width, heads = next(shape for shape in reversed(SHAPES) if tokens >= shape[0])
    if model.depth != -1:  # the depth decides the rest, as everywhere
        width = heads = -1
    seen = max(tokens, min(EPOCHS * tokens, SMALL_RUN))
    model = dataclasses.replace(
        model,
        depth=_given(model.depth, depth),
        width=_given(model.width, width),
        n_heads=_given(model.n_heads, heads),
        vocab_size=vocabulary,
        seq_len=_given(model.seq_len, SEQ_LEN),
    )
    batch = _given(train.batch_tokens, max(BATCH_TOKENS, model.seq_len))
    train = dataclasses.replace(train, batch_tokens=batch, steps=_given(train.steps, max(1, round(seen / batch))))
    say(
        f"{size:,} bytes of text in UTF-8: {model.depth} layers, a vocabulary of {model.vocab_size:,} tokens, "
        f"{train.steps:,} step{'s' * (train.steps > 1)} (the text about {train.steps * batch / tokens:.1f} times)"
    )
    return dataclasses.replace(config, model=model, train=train)


def _measured(config: Config) -> tuple[int, list[str]]:
    """(bytes of the whole text, its first documents)."""
    size, chars, sample = 0, 0, list[str]()
    for text in iterate_documents(config.data):
        size += len(text.encode("utf-8", "replace"))
        if chars < SIZING_CHARS:
            sample.append(text)
            chars += len(text)
    return size, sample


def _trained(config: Config, vocabulary: int, sample: list[str]) -> Tokenizer | None:
    """One like that which stage tokenizer will train; None where the text is too small for it, which the stage says."""
    try:
        return train_tokenizer(sample, vocabulary, normalize=config.tokenizer.normalize)
    except DataError:
        return None


def _bytes_per_token(tokenizer: Tokenizer | None, sample: list[str]) -> float:
    """Measured, for languages differ too much for one figure."""
    if tokenizer is None:
        return BYTES_PER_TOKEN
    tokens = sum(len(ids) for batch in batches_of(sample) for ids in tokenizer.encode_batch(batch))
    return sum(len(text.encode("utf-8", "replace")) for text in sample) / max(tokens, 1)


def _given(value: int, fitted: int) -> int:
    return fitted if value == -1 else value


SHARD_TOKENS = 100_000_000  # tokens in one token shard, at most
WINDOW = 20_000  # documents in one best-fit window
FACTS = (
    "documents", "duplicates", "tokens", "lost", "bytes", "chars", "cuts", "fill", "documents_per_row",
    "tokenizer", "rows", "sha256", "sources",
)  # fmt: skip
OUTPUTS = ("data/rows/train/meta.json", "data/rows/val/meta.json")
LEFT_OUT = {
    "empty": "documents without text left out",
    "binary": "documents with NUL characters left out",
    "giants": "giant documents cut into several",
}


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write `data/tokens` and `data/rows`; facts: documents, tokens, rows, fill of each split and source, digest.

    What an interrupted run has finished, of the same source and with the same settings, is kept.
    """
    tokenizer = Tokenizer.load(run.tokenizer)
    parts, held_out = open_corpus(config.data), open_val(config.data)
    limit = training_limit(parts, config.data)
    jobs = _jobs(config, run, parts, limit, tokenizer)
    own = _jobs(config, run, [held_out], 1.0, tokenizer, len(jobs)) if held_out else []
    begin = time.perf_counter()
    manifests = _tokens(config, run, [*jobs, *own])
    tokenized = time.perf_counter()
    read = {"train": (parts, jobs, manifests[: len(jobs)]), "val": (parts, jobs, manifests)}
    if held_out:
        read["val"] = [held_out], own, manifests[len(jobs) :]
    facts: dict[str, Any] = {split: _rows(config, run, *read[split], tokenizer, split) for split in SPLITS}
    if held_out and not facts["val"]["rows"]:
        raise DataError(f"data.val_source: {config.data.val_source} gives no rows of held-out text; name other files")
    if held_out and facts["val"]["rows"] < config.eval.rows:
        few = f"{facts['val']['rows']:,} rows, fewer than eval.rows {config.eval.rows:,}: all of them will be read"
        say(f"  data.val_source: {few}", style="yellow")
    checksums = json.dumps([facts[split]["sha256"] for split in facts], sort_keys=True)
    seconds = {"tokenize_seconds": tokenized - begin, "pack_seconds": time.perf_counter() - tokenized}
    return facts | seconds | {"digest": hashlib.sha256(checksums.encode()).hexdigest()}


def remainders(config: Config, parts: Sequence[Part], run: RunDir, split: str) -> list[str]:
    """How each part's documents are packed; see `pack_documents`.

    "auto" drops rests of web-scale text and keeps those of everything else. Held-out rows hold documents whole, or
    their beginnings, so that each begins at a true document start. A run that was begun before there was
    `data.remainder` keeps everything in both splits, as it did.
    """
    if "data.remainder" not in run.records().get("prepare", {}).get("inputs", {"data.remainder": ""}):
        return ["keep"] * len(parts)
    if split == "val":
        return ["whole"] * len(parts)
    chosen = config.data.remainder
    return [chosen if chosen != "auto" else "drop" if part.web_scale else "keep" for part in parts]


def _jobs(
    config: Config, run: RunDir, parts: Sequence[Part], limit: float, tokenizer: Tokenizer, first: int = 0
) -> list[Job]:
    """One for every unit of every part, in order; `first`: the number of the first one's folder."""
    jobs: list[Job] = []
    for unit in (unit for part in parts for unit in part.units):
        origin = _digest([unit.content(), limit, SHARD_TOKENS, tokenizer.digest])
        folder = (run.data / "tokens" / f"{first + len(jobs):05d}").resolve()
        jobs.append(Job(unit, limit, str(run.tokenizer.resolve()), str(folder), SHARD_TOKENS, origin))
    return jobs


def _tokens(config: Config, run: RunDir, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The manifests of all units, tokenized now or by an interrupted run."""
    folder, names = run.data / "tokens", {job.directory.rpartition("/")[2] for job in jobs}
    for stale in folder.iterdir() if folder.is_dir() else ():
        if stale.name not in names:
            shutil.rmtree(stale, ignore_errors=True)
    workers = workers_for(config.data.workers, len(jobs))
    manifests = []
    with progress("tokenize", len(jobs) if workers > 1 else None) as bar:
        if workers == 1 and config.data.engine == "local":
            done = 0
            for job in jobs:
                manifests.append(tokenize_unit(job, True, lambda count: bar.update(f"{done + count:,} tokens")))  # noqa: B023
                done += manifests[-1]["splits"]["train"]["tokens"]
        else:
            alone = config.data.engine == "local" and 2 * workers <= cores()  # few files: each is encoded by several
            work = functools.partial(tokenize_unit, alone=alone)
            for manifest in spread(work, jobs, config.data.engine, workers):
                manifests.append(manifest)
                bar.advance()
    left_out = sum((Counter(manifest["left_out"]) for manifest in manifests), Counter[str]())
    for kind, count in left_out.items():
        say(f"  {count:,} {LEFT_OUT[kind]}", style="yellow")
    return manifests


def _rows(
    config: Config,
    run: RunDir,
    parts: Sequence[Part],
    jobs: Sequence[Job],
    manifests: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    split: str,
) -> dict[str, Any]:
    """Pack the rows of one split, source after source; facts."""
    data, row_len = config.data, config.model.seq_len + 1
    tokens = sum(manifest["splits"][split]["tokens"] for manifest in manifests)
    if split == "train" and tokens < row_len:
        raise DataError(
            f"{data.source}: {tokens} tokens to train on are too few for one row of {row_len}; "
            "add text, or lower model.seq_len"
        )
    target = run.data / "rows" / split
    modes = remainders(config, parts, run, split)
    how = [] if set(modes) == {"keep"} else [modes]  # rows that were packed before there was a choice are kept
    origin = _digest([[job.origin for job in jobs], split, data.dedup, row_len, WINDOW, *how])
    meta = finished_rows(target, origin)
    done = meta is not None
    if meta is None:
        packer = _Packer(config, parts, jobs, tokenizer, split, modes)
        with progress(f"pack {split}", None) as bar:
            count = write_rows(target, bar.track(packer.rows()), row_len, tokenizer.bos, tokenizer.vocab_size)
        read = {key: sum(manifest["splits"][split][key] for manifest in manifests) for key in ("bytes", "chars")}
        facts = read | packer.facts() | {"tokenizer": tokenizer.digest, "origin": origin}
        meta = finish_rows(target, facts, row_len, count, tokenizer.vocab_size)
    if meta["duplicates"]:
        what = "left out" if data.dedup else "kept (data.dedup=true leaves them out)"
        say(f"  {split}: {meta['duplicates']:,} documents had come before, letter for letter; {what}")
    say(
        f"  {split}: {meta['documents']:,} documents, {meta['tokens']:,} tokens, {meta['rows']:,} rows of {row_len}, "
        f"{meta['fill']:.2%} filled, {meta['cuts']:,} cuts, {meta['documents_per_row']:.3g} documents a row"
        + (f", {meta['lost'] / max(1, meta['tokens']):.1%} of the tokens left out" if meta.get("lost") else "")
        + (" (done before)" if done else "")
    )
    for source in meta["sources"] if len(parts) > 1 else ():
        say(f"    {source['weight']:.1%} of the tokens from {source['source']}: {source['rows']:,} rows")
    return {key: meta.get(key, 0) for key in FACTS}  # rows of before had no `lost`: they lost nothing


class _Packer:
    """Rows of one split, and what they are counted to hold."""

    def __init__(
        self,
        config: Config,
        parts: Sequence[Part],
        jobs: Sequence[Job],
        tokenizer: Tokenizer,
        split: str,
        modes: Sequence[str],
    ):
        self._config, self._parts, self._tokenizer, self._split = config, parts, tokenizer, split
        self._modes = modes
        self._jobs = iter(jobs)
        self._stats, self._distinct = PackStats(), Distinct(config.data.dedup)
        self._sources: list[dict[str, Any]] = []

    def rows(self) -> Iterator[np.ndarray]:
        stats, row_len = self._stats, self._config.model.seq_len + 1
        for part, mode in zip(self._parts, self._modes, strict=True):
            rows, tokens, lost = stats.rows, stats.tokens, stats.lost
            documents = self._documents([next(self._jobs) for _ in part.units])
            yield from pack_documents(documents, row_len, self._tokenizer.bos, WINDOW, stats, mode)
            counts = {"rows": stats.rows - rows, "tokens": stats.tokens - tokens, "lost": stats.lost - lost}
            self._sources.append({"source": part.source, "weight": part.weight, "remainder": mode} | counts)

    def _documents(self, jobs: Sequence[Job]) -> Iterator[np.ndarray]:
        for job in jobs:
            found = read_documents(Path(job.directory), self._split, self._tokenizer.digest)
            yield from self._distinct.documents(found)

    def facts(self) -> dict[str, Any]:
        """Once all rows are taken."""
        stats, distinct = self._stats, self._distinct
        return {
            "documents": distinct.kept,
            "tokens": distinct.kept_tokens,
            "lost": stats.lost,
            "duplicates": distinct.found,
            "fill": stats.fill,
            "cuts": stats.cuts,
            "documents_per_row": (stats.documents + stats.cuts - stats.cropped) / max(1, stats.rows),
            "sources": self._sources,
        }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogatepass")).hexdigest()
