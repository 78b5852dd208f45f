"""Stage prepare: documents -> token shards -> packed rows, for training and for validation."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from jaxchat.config import Config
from jaxchat.data.corpus import iterate_documents
from jaxchat.data.packing import PackStats, pack_documents
from jaxchat.data.rows import finish_rows, write_rows
from jaxchat.data.tokenize import read_documents, write_shards
from jaxchat.errors import DataError
from jaxchat.log import progress, say
from jaxchat.paths import RunDir
from jaxchat.text.tokenizer import Tokenizer


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write `data/tokens` and `data/rows`; facts: documents, tokens, rows, fill of each split, digest."""
    tokenizer = Tokenizer.load(run.tokenizer)
    facts: dict[str, Any] = {split: _split(config, run, tokenizer, split) for split in ("train", "val")}
    checksums = json.dumps([facts[split]["sha256"] for split in facts], sort_keys=True)
    return facts | {"digest": hashlib.sha256(checksums.encode()).hexdigest()}


def _split(config: Config, run: RunDir, tokenizer: Tokenizer, split: str) -> dict[str, Any]:
    data, row_len = config.data, config.model.seq_len + 1
    documents = iterate_documents(data.source, split, data.val_fraction)
    shards = run.data / "tokens" / split
    with progress(f"tokenize {split}", None) as bar:
        manifest = write_shards(
            documents, tokenizer, shards, data.shard_tokens, lambda count: bar.update(f"{count:,} tokens")
        )
    if split == "train" and manifest["tokens"] < row_len:
        raise DataError(
            f"{data.source}: {manifest['tokens']} tokens are too few for one row of {row_len}; "
            "add text, or lower model.seq_len"
        )
    stats, target = PackStats(), run.data / "rows" / split
    with progress(f"pack {split}", None) as bar:
        arrays = read_documents(shards, tokenizer.digest)
        rows = pack_documents(arrays, row_len, tokenizer.bos, data.pack_docs, stats)
        count = write_rows(target, (bar.advance() or row for row in rows), row_len, tokenizer.bos, tokenizer.vocab_size)
    facts = {
        "documents": manifest["documents"],
        "tokens": manifest["tokens"],
        "bytes": manifest["bytes"],
        "chars": manifest["chars"],
        "cuts": stats.cuts,
        "fill": stats.fill,
        "tokenizer": tokenizer.digest,
    }
    meta = finish_rows(target, facts, row_len, count, tokenizer.vocab_size)
    say(
        f"  {split}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{count:,} rows of {row_len}, {stats.fill:.2%} filled"
    )
    return facts | {"rows": count, "sha256": meta["sha256"]}
