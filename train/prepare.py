"""Stage prepare: documents -> token shards -> packed rows, for training and for validation."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from jaxchat.config import Config
from jaxchat.data.corpus import fingerprint, iterate_documents
from jaxchat.data.packing import PackStats, pack_documents
from jaxchat.data.rows import Rows, finish_rows, write_rows
from jaxchat.data.tokenize import read_documents, read_manifest, write_shards
from jaxchat.errors import DataError, UsageError
from jaxchat.log import progress, say
from jaxchat.paths import RunDir
from jaxchat.text.tokenizer import Tokenizer

FACTS = ("documents", "duplicates", "tokens", "bytes", "chars", "cuts", "fill", "tokenizer", "rows", "sha256")


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write `data/tokens` and `data/rows`; facts: documents, tokens, rows, fill of each split, digest.

    What an interrupted run has finished, of the same source and with the same settings, is kept.
    """
    for key, value in (("pack_docs", config.data.pack_docs), ("shard_tokens", config.data.shard_tokens)):
        if value < 1:
            raise UsageError(f"data.{key}: must be at least 1, not {value}")
    tokenizer = Tokenizer.load(run.tokenizer)
    facts: dict[str, Any] = {split: _split(config, run, tokenizer, split) for split in ("train", "val")}
    checksums = json.dumps([facts[split]["sha256"] for split in facts], sort_keys=True)
    return facts | {"digest": hashlib.sha256(checksums.encode()).hexdigest()}


def _split(config: Config, run: RunDir, tokenizer: Tokenizer, split: str) -> dict[str, Any]:
    data, row_len = config.data, config.model.seq_len + 1
    origin = [fingerprint(data.source), split, data.val_fraction, data.dedup, data.shard_tokens, tokenizer.digest]
    manifest = _tokens(config, tokenizer, run.data / "tokens" / split, split, _digest(origin))
    if split == "train" and manifest["tokens"] < row_len:
        raise DataError(
            f"{data.source}: {manifest['tokens']} tokens to train on are too few for one row of {row_len}; "
            "add text, or lower model.seq_len"
        )
    target, origin = run.data / "rows" / split, [*origin, row_len, data.pack_docs]
    meta = _finished_rows(target, _digest(origin))
    done = meta is not None
    if meta is None:
        stats = PackStats()
        with progress(f"pack {split}", None) as bar:
            documents = read_documents(run.data / "tokens" / split, tokenizer.digest)
            rows = pack_documents(documents, row_len, tokenizer.bos, data.pack_docs, stats)
            rows = bar.track(rows)
            count = write_rows(target, rows, row_len, tokenizer.bos, tokenizer.vocab_size)
        facts = {name: manifest[name] for name in ("documents", "duplicates", "tokens", "bytes", "chars", "tokenizer")}
        facts |= {"cuts": stats.cuts, "fill": stats.fill, "origin": _digest(origin)}
        meta = finish_rows(target, facts, row_len, count, tokenizer.vocab_size)
    say(
        f"  {split}: {meta['documents']:,} documents, {meta['tokens']:,} tokens, "
        f"{meta['rows']:,} rows of {row_len}, {meta['fill']:.2%} filled" + (" (done before)" if done else "")
    )
    return {key: meta[key] for key in FACTS}


def _tokens(config: Config, tokenizer: Tokenizer, directory: Path, split: str, origin: str) -> dict[str, Any]:
    """The manifest of the split's token shards, written now or by an interrupted run."""
    data = config.data
    with contextlib.suppress(DataError):  # no manifest, or one that is out of date
        manifest = read_manifest(directory)
        if manifest["origin"] == origin:
            say(f"  {split}: tokenized before, {manifest['tokens']:,} tokens")
            return manifest
    documents = iterate_documents(data.source, split, data.val_fraction)
    with progress(f"tokenize {split}", None) as bar:
        manifest = write_shards(
            documents,
            tokenizer,
            directory,
            data.shard_tokens,
            lambda count: bar.update(f"{count:,} tokens"),
            origin,
            data.dedup,
        )
    if count := manifest["duplicates"]:
        what = "left out" if data.dedup else "kept (data.dedup=true leaves them out)"
        say(f"  {split}: {count:,} documents had come before, letter for letter; {what}")
    return manifest


def _finished_rows(directory: Path, origin: str) -> dict[str, Any] | None:
    """The meta of whole, undamaged rows of that origin."""
    with contextlib.suppress(DataError):
        meta = Rows(directory).meta
        if meta.get("origin") == origin:
            return meta
    return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
