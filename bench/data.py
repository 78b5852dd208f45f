"""Speed of the input pipeline: python -m bench.data [--tokens 50_000_000] [--seq-len 2048] [--rows 256] [--repeats 5]

Synthetic rows are written to a temporary folder and read back through `Batches`: memory map, Grain's shuffle and
threads, host arrays; and the same placed on the device. Tokens per second, medians over repeats, against the goal of
104 million on two cores (20 times what d12 eats on eight H100s). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import machine
from jaxchat.config import MeshConfig
from jaxchat.data import loader as batches
from jaxchat.data.packing import Rows, write_rows
from jaxchat.sharding import batch_sharding, make_mesh

GOAL = 104e6  # tokens a second
VOCABULARY = 32_768
PADDED = 0.01  # share of the rows that end before their last position


def write_synthetic(directory: Path, count: int, seq_len: int) -> None:
    """`count` rows of random tokens, a few of them shorter, as packing makes them."""
    draw = np.random.default_rng(0)

    def rows() -> Iterator[np.ndarray]:
        for _ in range(count):
            length = int(draw.integers(1, seq_len + 1)) if draw.random() < PADDED else seq_len + 1
            yield draw.integers(0, VOCABULARY, length, np.uint16)

    write_rows(directory, rows(), seq_len + 1, 0, VOCABULARY, lambda: {"tokenizer": "synthetic"})


def tokens_per_second(source: batches.Batches, tokens: int, steps: int, on_device: bool) -> tuple[float, float]:
    """(per second, per second of one core at work) over `steps` batches after the first; `tokens` in a batch.

    Reading ahead is as in training. A busy machine spoils the first figure and hardly the second.
    """
    sharding = batch_sharding(make_mesh(MeshConfig())) if on_device else None
    iterator = source.iterate(0, sharding)
    next(iterator)
    begin, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        batch = next(iterator)
        if on_device:
            jax.block_until_ready(batch)
    return steps * tokens / (time.perf_counter() - begin), steps * tokens / (time.process_time() - processor)


def measure(tokens: int, seq_len: int, rows: int, repeats: int) -> dict[str, Any]:
    """Host arrays and device arrays in turns, so that a noisy machine slows both."""
    count = max(rows, tokens // seq_len)
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(Path(folder) / "rows", count, seq_len)
        source = batches.Batches(Rows(Path(folder) / "rows"), rows, 1, seed=0)
        rates: dict[str, list[float]] = {"host": [], "device": []}
        per_core: dict[str, list[float]] = {"host": [], "device": []}
        steps = max(1, count // rows)
        for _ in range(repeats):
            for name in rates:
                rate, of_a_core = tokens_per_second(source, rows * seq_len, steps, name == "device")
                rates[name].append(rate)
                per_core[name].append(of_a_core)
    host = statistics.median(rates["host"])
    return machine.about() | {
        "grain": version("grain"),
        "tokens": count * seq_len,
        "seq_len": seq_len,
        "batch_rows": rows,
        "threads": batches.THREADS,
        "prefetch": batches.PREFETCH,
        "repeats": repeats,
        "host_tokens_per_second": round(host),
        "host_range": [round(min(rates["host"])), round(max(rates["host"]))],
        "device_tokens_per_second": round(statistics.median(rates["device"])),
        "device_range": [round(min(rates["device"])), round(max(rates["device"]))],
        "host_tokens_per_core_second": round(statistics.median(per_core["host"])),
        "device_tokens_per_core_second": round(statistics.median(per_core["device"])),
        "goal": round(GOAL),
        "share_of_goal": round(host / GOAL, 3),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=256, help="rows a batch: 2^19 tokens with the default length")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    if min(vars(args).values()) < 1:
        parser.error("--tokens, --seq-len, --rows and --repeats are at least 1")
    print(json.dumps(measure(args.tokens, args.seq_len, args.rows, args.repeats)))


if __name__ == "__main__":
    from launch import prefer_huge_pages

    prefer_huge_pages()
    main()
