"""Stage prepare: documents -> token shards -> packed rows, for training and for validation."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.config import Config
from jaxchat.data.corpus import Part, open_corpus, open_val, training_limit
from jaxchat.data.duplicates import Distinct
from jaxchat.data.packing import PackStats, pack_documents
from jaxchat.data.rows import finish_rows, finished_rows, write_rows
from jaxchat.data.spread import cores, spread, workers_for
from jaxchat.data.tokenize import SPLITS, Job, read_documents, tokenize_unit
from jaxchat.errors import DataError, UsageError
from jaxchat.log import progress, say
from jaxchat.paths import RunDir
from jaxchat.text.tokenizer import Tokenizer

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
    for key in ("pack_docs", "shard_tokens"):
        if getattr(config.data, key) < 1:
            raise UsageError(f"data.{key}: must be at least 1, not {getattr(config.data, key)}")
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
        origin = _digest([unit.content(), limit, config.data.shard_tokens, tokenizer.digest])
        folder = (run.data / "tokens" / f"{first + len(jobs):05d}").resolve()
        jobs.append(Job(unit, limit, str(run.tokenizer.resolve()), str(folder), config.data.shard_tokens, origin))
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
    origin = _digest([[job.origin for job in jobs], split, data.dedup, row_len, data.pack_docs, *how])
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
        data, stats, row_len = self._config.data, self._stats, self._config.model.seq_len + 1
        for part, mode in zip(self._parts, self._modes, strict=True):
            rows, tokens, lost = stats.rows, stats.tokens, stats.lost
            documents = self._documents([next(self._jobs) for _ in part.units])
            yield from pack_documents(documents, row_len, self._tokenizer.bos, data.pack_docs, stats, mode)
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
