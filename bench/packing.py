"""Ways to pack the same text: python -m bench.packing [--data SOURCE ...] [--steps 300] [--seeds 3]

The same tokens are packed in several ways: the three of `data.remainder`; `crop`, with nanochat's buffer of 1,000
documents; and `concatenate`, all documents one behind the other, cut into rows. For each: how full the rows are, what
is lost, how many rows begin inside a document, and (with --steps) the held-out bits per byte of a small model after
equally many tokens, on the same held-out rows, each of which begins at a true document start. A source may also be
`whole:GLOB`: text files (also .gz) with one document each. The last line is one JSON object.

    python -m bench.packing --score RUN_DIR [RUN_DIR ...] [--stage base]

packs the held-out text of finished runs anew, so that every row begins at a true document start, and scores the runs on
it, each with its own tokenizer: runs from before such rows and from after are compared on the same rows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import glob
import gzip
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jax
import numpy as np

from jaxchat.checkpoint import trained_params
from jaxchat.config import Config, MeshConfig, load_config
from jaxchat.data.packing import PackStats, Rows, pack_documents, write_rows
from jaxchat.data.shards import read_documents
from jaxchat.engine.scoring import rows_at_once
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.sharding import batch_devices, make_mesh, replicated
from jaxchat.tokenizer import Tokenizer
from jaxchat.train_state import make_eval_step
from train import prepare
from train import prepare as tokenizer_stage
from train.doctor import hardware, versions
from train.loop import Trainer, bits_per_byte

WINDOW = 1000  # documents that `crop` chooses from, nanochat's buffer

Packer = Callable[[Iterable[np.ndarray], int, int], Iterator[np.ndarray]]


def ours(documents: Iterable[np.ndarray], row_len: int, bos: int, remainder: str) -> Iterator[np.ndarray]:
    return pack_documents(documents, row_len, bos, 20_000, PackStats(), remainder)


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


PACKERS: dict[str, Packer] = {name: functools.partial(ours, remainder=name) for name in ("keep", "drop")}
PACKERS |= {"crop": crop, "concatenate": concatenate}
TRAINED = ("keep", "drop")


def prepared(config: Config, folder: Path) -> RunDir:
    """Tokenizer, shards and held-out rows, the same for all."""
    run = RunDir(folder)
    tokenizer_stage.run_tokenizer(config, run)
    prepare.run(config, run)
    return run


def one_document_a_file(pattern: str, target: Path) -> str:
    """Write the text files of a glob, also compressed ones, as JSON lines with one document each; their source."""
    with open(target, "w", encoding="utf-8") as out:
        for name in sorted(glob.glob(pattern, recursive=True)):
            if Path(name).is_file():
                data = Path(name).read_bytes()
                text = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8", "replace")
                out.write(json.dumps({"text": text}) + "\n")
    return f"files:{target}"


def run_documents(run: RunDir, split: str, digest: str) -> Iterator[np.ndarray]:
    """The tokens of every document of a run's shards."""
    for folder in sorted((run.data / "tokens").iterdir()):
        yield from (tokens for tokens, _ in read_documents(folder, split, digest))


def pack(config: Config, run: RunDir, name: str) -> dict[str, Any]:
    """Rows of the training split packed by `name`, in `data/<name>`; what that makes of the tokens."""
    tokenizer = Tokenizer.load(run.tokenizer)
    row_len, counts = config.model.seq_len + 1, {"tokens": 0, "documents": 0}

    def documents() -> Iterator[np.ndarray]:
        for tokens in run_documents(run, "train", tokenizer.digest):
            counts["tokens"] += len(tokens) - 1  # without <|bos|>
            counts["documents"] += 1
            yield tokens

    targets, inside = 0, 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal targets, inside
        for row in PACKERS[name](documents(), row_len, tokenizer.bos):
            targets += int((row[1:] != tokenizer.bos).sum())
            inside += int(row[0] != tokenizer.bos)
            yield row

    target = run.data / name
    about = {"tokenizer": tokenizer.digest}
    rows = write_rows(target, counted(), row_len, tokenizer.bos, tokenizer.vocab_size, lambda: about)["rows"]
    lengths = np.fromfile(target / "lengths.bin", "<u4")
    return {
        "documents": counts["documents"],
        "tokens": counts["tokens"],
        "rows": rows,
        "fill": float(lengths.sum()) / max(1, rows * row_len),
        "tokens_lost": 1 - targets / max(1, counts["tokens"]),  # that are never a target
        "rows_inside_a_document": inside / max(1, rows),
        "epochs": config.train.steps * config.train.batch_tokens / max(1, rows * config.model.seq_len),
    }


def train(config: Config, run: RunDir, name: str, seed: int) -> float:
    """Held-out bits per byte after `config.train.steps` steps on the rows of `name`."""
    tokenizer = Tokenizer.load(run.tokenizer)
    rows = Rows(run.data / name, tokenizer.digest)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            config=dataclasses.replace(config, seed=seed),
            directory=Path(folder),
            rows=rows,
            val_rows=Rows(run.data / "rows" / "val", tokenizer.digest),
            byte_lengths=tokenizer.byte_lengths(),
            title=f"{name}, seed {seed}",
        )
        return trainer.run()["val_bpb"]


def measure(source: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All ways to pack one source."""
    if source.startswith("whole:"):
        source = one_document_a_file(source.removeprefix("whole:"), folder / "whole.jsonl")
    sets = {"data.source": json.dumps(source), "model.seq_len": args.seq_len, "model.vocab_size": args.vocab_size,
            "data.val_fraction": args.val_fraction, "model.depth": args.depth, "model.width": args.width,
            "model.n_heads": -1, "model.head_width": min(64, args.width), "train.eval_rows": 10**9,
            "train.eval_every": 0, "train.checkpoint_every": 10**6, "train.steps": max(1, args.steps),
            "train.batch_tokens": max(args.batch_tokens, args.seq_len)}  # fmt: skip
    config = resolve(load_config("nano", [f"{key}={value}" for key, value in sets.items()]))
    run = prepared(config, folder)
    result: dict[str, Any] = {name: pack(config, run, name) for name in PACKERS}
    for seed in range(args.first_seed, args.first_seed + args.seeds if args.steps else 0):  # interleaved
        for name in TRAINED:
            score = train(config, run, name, seed)
            result[name].setdefault("val_bpb_each", []).append(score)
            print(f"seed {seed} {name:<12} {score:.4f}", flush=True)
    for name, found in result.items():
        if each := found.get("val_bpb_each"):
            found |= {"val_bpb": mean(each), "sd": stdev(each) if len(each) > 1 else 0.0}
        shown = "  ".join(f"{k} {v:.4g}" for k, v in found.items() if not isinstance(v, list))
        print(f"{name:<12} {shown}", flush=True)
    return result | {"val_rows": len(Rows(run.data / "rows" / "val"))}


def score(directory: str, stage: str, folder: Path) -> dict[str, Any]:
    """Bits per byte of a finished run on its held-out text, packed as `pack_documents` does for "whole"."""
    run = RunDir(Path(directory))
    config, tokenizer = resolve(load_config(run.config)), Tokenizer.load(run.tokenizer)
    row_len, stats = config.model.seq_len + 1, PackStats()
    documents = run_documents(run, "val", tokenizer.digest)
    packed = pack_documents(documents, row_len, tokenizer.bos, prepare.WINDOW, stats, "whole")
    about = {"tokenizer": tokenizer.digest}
    write_rows(folder / "val", packed, row_len, tokenizer.bos, tokenizer.vocab_size, lambda: about)
    rows, mesh = Rows(folder / "val", tokenizer.digest), make_mesh(MeshConfig(), jax.local_devices())
    at_once = -(-rows_at_once(config.model, config.eval.batch_rows, mesh) // batch_devices(mesh)) * batch_devices(mesh)
    params = jax.device_put(trained_params(run, stage), replicated(mesh))
    lengths = tokenizer.byte_lengths()
    found = bits_per_byte(make_eval_step(config, mesh), params, rows, lengths, at_once, len(rows), mesh)
    sha256 = rows.meta["sha256"]["rows.bin"]
    return {"run": directory, "stage": stage, "rows": len(rows), "rows_sha256": sha256} | found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["chitchat"])
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--val-fraction", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: packing alone")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--keep", metavar="DIR", help="where shards and rows stay for another run")
    parser.add_argument("--score", nargs="+", metavar="RUN_DIR", help="score finished runs instead")
    parser.add_argument("--stage", default="base")
    args = parser.parse_args(argv)
    temporary = tempfile.TemporaryDirectory() if not args.keep else contextlib.nullcontext(args.keep)
    results: dict[str, Any] = {}
    with temporary as folder:
        for place, name in enumerate(args.score or args.data):
            own = Path(folder) / str(place)
            own.mkdir(parents=True, exist_ok=True)
            if args.score:
                results[name] = found = score(name, args.stage, own)
                form = "{run}: {bits_per_byte:.4f} ± {se:.4f} bits per byte, {rows:,} rows, {bytes:,} bytes"
                print(form.format(**found), flush=True)
            else:
                print(name, flush=True)
                results[name] = measure(name, args, own)
    print(
        json.dumps(
            {"bench": "packing"} | vars(args) | {"results": results, "versions": versions(), "hardware": hardware()}
        )
    )


if __name__ == "__main__":
    main()
