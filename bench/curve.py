"""The first steps of a tier on real text, and nanochat's first steps on the same tokens with its own rates.

Text: the files that a pattern names, by default the Python files of this interpreter's installation, which any machine
has. Documents follow each other behind a `<|bos|>` each and are cut into rows. Both sides read the same file.
"""

from __future__ import annotations

import glob
import json
import math
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import start_peer
from bench.train_step import Trainer, batch_shape
from jaxchat.config import Config
from jaxchat.errors import DataError
from jaxchat.sharding import batch_devices, make_mesh
from jaxchat.tokenizer import Tokenizer, train_tokenizer

TOKENIZER_CHARS, DOCUMENT_CHARS = 60_000_000, 20_000  # that the tokenizer learns from
BATCH_DOCUMENTS = 256
BLOCK = 20  # steps whose losses are averaged
ROWS, OURS = "rows.npy", "jaxchat.json"


def text_files(pattern: str) -> list[Path]:
    """Return the text files in a reproducible mixed order; `DataError` where there are none."""
    places = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    patterns = [pattern] if pattern else [f"{place}/**/*.py" for place in sorted(places)]
    files = sorted({file for each in patterns for file in glob.glob(each, recursive=True)})
    if not files:
        raise DataError(f"{patterns[0]}: no file there")
    return [Path(files[i]) for i in np.random.default_rng(0).permutation(len(files))]


def documents(files: list[Path]) -> Iterator[str]:
    for file in files:
        if text := file.read_text(encoding="utf-8", errors="replace"):
            yield text


def write_rows(config: Config, steps: int, pattern: str, folder: Path) -> dict[str, Any]:
    """Write (steps, A, B, T + 1) token ids; returns where they came from. Text that is too short is repeated."""
    files, model = text_files(pattern), config.model
    shape = (steps, *batch_shape(config, batch_devices(make_mesh(config.mesh))))
    shape = (*shape[:3], shape[3] + 1)
    tokenizer = train_tokenizer(documents(files), model.vocab_size, TOKENIZER_CHARS, DOCUMENT_CHARS)
    tokens, need = _encode(files, tokenizer, math.prod(shape)), math.prod(shape)
    rows = np.lib.format.open_memmap(folder / ROWS, "w+", np.int32, shape)
    rows.reshape(-1)[:] = np.resize(tokens, need)
    rows.flush()
    return {"files": len(files), "text_tokens": len(tokens), "trained_tokens": need, "epochs": need / len(tokens)}


def _encode(files: list[Path], tokenizer: Tokenizer, need: int) -> np.ndarray:
    parts: list[np.ndarray] = []
    made, batch, waiting = 0, [], list(reversed(files))
    while waiting and made < need:
        batch = [waiting.pop() for _ in range(min(BATCH_DOCUMENTS, len(waiting)))]
        for ids in tokenizer.encode_batch(list(documents(batch))):
            parts += [np.array([tokenizer.bos, *ids], np.int32)]
            made += len(ids) + 1
    return np.concatenate(parts)[:need]


class FileBatches:
    """Batches of the rows that `write_rows` wrote, the first one first."""

    def __init__(self, folder: Path):
        self._rows, self._next = np.load(folder / ROWS, mmap_mode="r"), 0

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(self._rows[self._next])
        self._next += 1
        return rows[..., :-1], rows[..., 1:]

    @property
    def steps(self) -> int:
        return len(self._rows)


def ours(config: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """Train on the rows; yield the loss and speed of every block of steps."""
    batches = FileBatches(folder)
    trainer = Trainer(config, batches)
    losses, seconds = [trainer.loss], [trainer.first_seconds]
    while len(losses) < batches.steps:
        seconds.append(trainer.step())
        losses.append(trainer.loss)
        if len(losses) % BLOCK == 0 or len(losses) == batches.steps:
            (folder / OURS).write_text(json.dumps(losses))  # also of a part that is stopped later
            yield _block(config, losses, seconds)
    yield {"parameters": trainer.parameters, "compile_seconds": round(trainer.compile_seconds, 2)}


def nanochat(config: Config, folder: Path, directory: Path, python: str, environment: dict[str, str]) -> Iterator[Any]:
    """The same of nanochat's step, with the rates of its `base_train.py`; at last the difference of the losses."""
    steps, losses, seconds = FileBatches(folder).steps, [], []
    run = {"rows": str(folder / ROWS), "steps": config.train.steps, "weight_decay": config.optim.weight_decay}
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        peer = start_peer(config, directory, python, environment, errors, run)
        try:
            first = peer.order(1)
            losses, seconds = [first["loss"]], [time.perf_counter() - begin]
            while len(losses) < steps:
                answer = peer.order(min(BLOCK - len(losses) % BLOCK, steps - len(losses)))
                losses += answer["losses"]
                seconds += answer["seconds"]
                yield _block(config, losses, seconds)
            yield peer.about | {"parameters": first["parameters"], "peak_bytes": answer["peak_bytes"]}
        finally:
            peer.close()
    if (folder / OURS).exists():
        own = json.loads((folder / OURS).read_text())
        blocks = [slice(i, i + BLOCK) for i in range(0, len(own), BLOCK)]
        difference = [statistics.fmean(own[b]) - statistics.fmean(losses[b]) for b in blocks]
        yield {"jaxchat_minus_nanochat": [round(d, 4) for d in difference], "block": BLOCK}


def _block(config: Config, losses: list[float], seconds: list[float]) -> dict[str, Any]:
    """The last block. The first step compiles, so no rate counts it."""
    steady = seconds[1:][-BLOCK:]
    return {
        "step": len(losses),
        "loss": round(statistics.fmean(losses[-BLOCK:]), 4),
        "tokens_per_second": round(config.train.batch_tokens / statistics.median(steady)) if steady else None,
        "first_step_seconds": round(seconds[0], 2),
    }
