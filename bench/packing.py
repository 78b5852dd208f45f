"""Three ways to pack the same tokens: python -m bench.packing [--data SOURCE] [--seq-len 256] [--steps 600] [--seeds 2]

`best fit` is ours; `crop` fills a row's end with the beginning of a document and throws the rest of that away, as
nanochat does; `concatenate` puts all documents one behind the other and cuts the stream into rows. For each: how full
the rows are, what is lost, how many rows begin inside a document, and (with --steps) the held-out bits per byte of the
nano model after equally many tokens, on the same held-out rows. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from jaxchat.config import Config, load_config
from jaxchat.data.packing import PackStats, pack_documents
from jaxchat.data.rows import Rows, finish_rows, write_rows
from jaxchat.data.tokenize import read_documents
from jaxchat.optim.horizon import resolve
from jaxchat.paths import RunDir
from jaxchat.text.tokenizer import Tokenizer
from train import prepare
from train import tokenizer as tokenizer_stage
from train.loop import Job, fit
from train.machine import hardware, versions

WINDOW = 1000  # documents that `crop` chooses from, nanochat's buffer

Packer = Callable[[Iterable[np.ndarray], int, int], Iterator[np.ndarray]]


def best_fit(documents: Iterable[np.ndarray], row_len: int, bos: int) -> Iterator[np.ndarray]:
    return pack_documents(documents, row_len, bos, 20_000, PackStats())


def crop(documents: Iterable[np.ndarray], row_len: int, bos: int) -> Iterator[np.ndarray]:
    """The largest document that fits; where none does, as much of the shortest as there is room for."""
    source, pool = iter(documents), []
    while True:
        row: list[np.ndarray] = []
        free = row_len
        while free:
            while len(pool) < WINDOW and (document := next(source, None)) is not None:
                pool.append(document)
            if not pool:
                return  # an unfinished row is not trained on
            fitting = [i for i, document in enumerate(pool) if len(document) <= free]
            chosen = max(fitting, key=lambda i: len(pool[i])) if fitting else min(
                range(len(pool)), key=lambda i: len(pool[i])
            )  # fmt: skip
            piece = pool.pop(chosen)[:free]
            row.append(piece)
            free -= len(piece)
        yield np.concatenate(row)


def concatenate(documents: Iterable[np.ndarray], row_len: int, bos: int) -> Iterator[np.ndarray]:
    """One stream, cut wherever a row ends."""
    rest = np.zeros(0, np.uint16)
    for document in documents:
        rest = np.concatenate([rest, document])
        while len(rest) >= row_len:
            yield rest[:row_len]
            rest = rest[row_len:]


PACKERS: dict[str, Packer] = {"best fit": best_fit, "crop": crop, "concatenate": concatenate}


def prepared(config: Config, folder: Path) -> RunDir:
    """Tokenizer, shards and held-out rows, the same for all."""
    run = RunDir(folder)
    tokenizer_stage.run(config, run)
    prepare.run(config, run)
    return run


def pack(config: Config, run: RunDir, name: str) -> dict[str, Any]:
    """Rows of the training split packed by `name`, in `data/<name>`; what that makes of the tokens."""
    tokenizer = Tokenizer.load(run.tokenizer)
    row_len, counts = config.model.seq_len + 1, {"tokens": 0, "documents": 0}

    def documents() -> Iterator[np.ndarray]:
        for folder in sorted((run.data / "tokens").iterdir()):
            for tokens, _ in read_documents(folder, "train", tokenizer.digest):
                counts["tokens"] += len(tokens) - 1  # without <|bos|>
                counts["documents"] += 1
                yield tokens

    real, inside = 0, 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal real, inside
        for row in PACKERS[name](documents(), row_len, tokenizer.bos):
            real += int((row != tokenizer.bos).sum())
            inside += int(row[0] != tokenizer.bos)
            yield row

    target = run.data / name.replace(" ", "-")
    rows = write_rows(target, counted(), row_len, tokenizer.bos, tokenizer.vocab_size)
    finish_rows(target, {"tokenizer": tokenizer.digest}, row_len, rows, tokenizer.vocab_size)
    lengths = np.fromfile(target / "lengths.bin", "<u4")
    return {
        "rows": rows,
        "fill": float(lengths.sum()) / max(1, rows * row_len),
        "tokens_lost": 1 - real / counts["tokens"],
        "rows_inside_a_document": inside / max(1, rows),
        "documents_per_row": counts["documents"] / max(1, rows),
    }


def train(config: Config, run: RunDir, name: str, seed: int) -> float:
    """Held-out bits per byte after `config.train.steps` steps on the rows of `name`."""
    tokenizer = Tokenizer.load(run.tokenizer)
    rows = Rows(run.data / name.replace(" ", "-"), tokenizer.digest)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            config=dataclasses.replace(config, seed=seed),
            directory=Path(folder),
            rows=rows,
            val_rows=Rows(run.data / "rows" / "val", tokenizer.digest),
            byte_lengths=tokenizer.byte_lengths(),
            title=name,
        )
        return fit(job)["val_bpb"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="chitchat")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: packing alone")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", metavar="DIR", help="where shards and rows stay for another run")
    args = parser.parse_args(argv)
    sets = {"data.source": json.dumps(args.data), "model.seq_len": args.seq_len, "model.vocab_size": args.vocab_size,
            "train.eval_every": 0, "train.checkpoint_every": 10**6, "train.steps": max(1, args.steps),
            "train.batch_tokens": max(2048, args.seq_len)}  # fmt: skip
    config = resolve(load_config("nano", [f"{key}={value}" for key, value in sets.items()]))
    temporary = tempfile.TemporaryDirectory() if not args.keep else contextlib.nullcontext(args.keep)
    with temporary as folder:
        run = prepared(config, Path(folder))
        result: dict[str, Any] = {name: pack(config, run, name) for name in PACKERS}
        scores: dict[str, list[float]] = {name: [] for name in PACKERS}
        for seed in range(args.seeds if args.steps else 0):  # interleaved
            for name in PACKERS:
                scores[name].append(train(config, run, name, seed))
    for name, found in result.items():
        found |= {"val_bpb": median(scores[name]), "val_bpb_each": scores[name]} if args.steps else {}
        print(f"{name:<12} " + "  ".join(f"{k} {v:.4g}" for k, v in found.items() if not isinstance(v, list)))
    print(
        json.dumps(
            {"bench": "packing"} | vars(args) | {"results": result, "versions": versions(), "hardware": hardware()}
        )
    )


if __name__ == "__main__":
    main()
