"""Our training step and a peer's, in turns: blocks of steps of two long-lived processes, one asleep while one runs."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.peer import Program
from bench.train_step import WARM_UP, batch_shape, describe, random_trainer
from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.sharding import make_mesh
from jaxchat.sizes import mlp_width
from jaxchat.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("nanochat_step.py")
WALL_STEPS = 600
SEED = 0


def nanochat_config(config: Config) -> dict[str, Any]:
    """The `GPTConfig` arguments of the same model; `UsageError` where nanochat cannot be it."""
    c = config.model
    short = -(-c.seq_len // 4 // 128) * 128
    same = {
        "model.recipe": (c.recipe, "modern"),
        "model.head_width": (c.head_width, c.width // c.n_heads),
        "model.mlp_factor": (mlp_width(c), 4 * c.width),
        "model.window_short": (c.window_short if "S" in c.window_pattern else short, short),
        "train.matmul": (config.train.matmul, "plain"),
    }
    for key, (ours, theirs) in same.items():
        if ours != theirs:
            raise UsageError(f"{key}: gives {ours}, and nanochat has {theirs} only; to compare: --set {key}={theirs}")
    return {
        "sequence_len": c.seq_len,
        "vocab_size": c.vocab_size,
        "n_layer": c.depth,
        "n_head": c.n_heads,
        "n_kv_head": c.n_kv_heads,
        "n_embd": c.width,
        "window_pattern": c.window_pattern,
    }


def check_checkout(directory: Path, file: str) -> None:
    """Raise `UsageError` where the folder is no checkout of nanochat with this file."""
    if not (directory / "nanochat" / file).exists():
        raise UsageError(f"{directory}: no nanochat/{file} there; give a checkout of karpathy/nanochat")


def write_model(config: Config, params: Any, tokenizer: Tokenizer, folder: Path, directory: Path) -> dict[str, Any]:
    """Write weights and tokenizer into a folder; return the settings by which nanochat's side reads them."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    weights = {".".join(k.key for k in path): np.asarray(leaf, np.float32) for path, leaf in leaves}
    np.savez(folder / "weights.npz", **weights)  # type: ignore[arg-type]
    tokenizer.save(folder)
    files = {"weights": str(folder / "weights.npz"), "tokenizer": str(folder / "tokenizer.json")}
    return {"directory": str(directory.resolve()), "config": nanochat_config(config)} | files


def start_peer(
    config: Config,
    directory: Path,
    python: str,
    environment: dict[str, str],
    errors: Any,
    run: dict[str, Any] | None = None,
) -> Program:
    """nanochat's step, ordered by the number of steps, on random tokens or on those of a `run` (bench/curve.py)."""
    check_checkout(directory, "gpt.py")
    settings = {
        "directory": str(directory.resolve()),
        "config": nanochat_config(config),
        "batch": batch_shape(config),
        "seed": SEED,
        "run": run,
    }
    return Program([python, "-u", str(WORKER), json.dumps(settings)], errors, cwd=directory, env=environment)


def compare(config: Config, directory: Path, python: str, steps: int, block: int, changes: list[str]) -> dict[str, Any]:
    """Both first steps, then `steps` steps of each in turns of `block`, the first three of each not in the medians.

    `changes` (K=V) go into the peer's environment, which else is ours; an empty value takes the variable away. Its
    compile caches are fresh folders, ours is none: both compile from nothing.
    """
    if (devices := make_mesh(config.mesh).size) > 1:
        raise UsageError(f"{devices} devices, and nanochat runs on one here: show one only (CUDA_VISIBLE_DEVICES=0)")
    with tempfile.TemporaryDirectory() as caches, tempfile.TemporaryFile("w+") as errors:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
        given = dict(change.split("=", 1) for change in changes)
        environment = {k: v for k, v in (dict(os.environ) | fresh | given).items() if v or k not in given}
        peer = start_peer(config, directory, python, environment, errors)
        try:
            return _take_turns(config, peer, steps, block)
        finally:
            peer.close()


def _take_turns(config: Config, peer: Program, steps: int, block: int) -> dict[str, Any]:
    theirs = peer.order(1)
    ours, tokens = random_trainer(config, SEED)
    first = {"jaxchat": ours.first_seconds, "nanochat": theirs["first"]}
    if tokens.checksum != theirs["checksum"]:
        raise UsageError("the two draw different tokens: numpy's generators differ between the interpreters")
    seconds: dict[str, list[float]] = {"jaxchat": [], "nanochat": []}
    processor: dict[str, list[float]] = {"jaxchat": [], "nanochat": []}  # per step of a turn, all threads
    while len(seconds["jaxchat"]) < steps + WARM_UP:
        count = min(block, steps + WARM_UP - len(seconds["jaxchat"]))
        begin = time.process_time()
        seconds["jaxchat"] += [ours.step() for _ in range(count)]
        processor["jaxchat"].append((time.process_time() - begin) / count)
        answer = peer.order(count)
        seconds["nanochat"] += answer["seconds"]
        processor["nanochat"].append(answer["processor"] / count)
    sides = {name: _summary(config, first[name], values) for name, values in seconds.items()}
    for name, values in processor.items():  # what a busy machine cannot distort as it does seconds
        sides[name]["processor_seconds"] = round(statistics.median(values), 4)
    sides["jaxchat"] |= {"parameters": ours.parameters, "compile_seconds": round(ours.compile_seconds, 2)}
    sides["jaxchat"] |= {"loss": round(ours.loss, 4)}
    sides["nanochat"] |= peer.about | {"parameters": theirs["parameters"], "loss": round(answer["loss"], 4)}
    sides["nanochat"] |= {"peak_bytes": answer["peak_bytes"]}
    pairs = [
        statistics.median(b) / statistics.median(a)
        for a, b in zip(
            _blocks(seconds["jaxchat"][WARM_UP:], block), _blocks(seconds["nanochat"][WARM_UP:], block), strict=True
        )
    ]
    ratio = {
        key: round(sides["jaxchat"][key] / sides["nanochat"][key], 3) for key in ("tokens_per_second",)
    } | {
        key: round(sides["nanochat"][key] / sides["jaxchat"][key], 3)
        for key in ("first_step_seconds", "wall_seconds", "processor_seconds")
    }  # fmt: skip
    return describe(config, ours) | {
        **sides,
        "times_faster": ratio | {"blocks": [round(pair, 3) for pair in sorted(pairs)]},
        "goal": {"tokens_per_second": 1.0, "wall_seconds": 1.15, "aim": 1.2},
        "steps": steps,
        "block": block,
    }


def _blocks(values: list[float], size: int) -> list[list[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _summary(config: Config, first: float, seconds: list[float]) -> dict[str, Any]:
    """Median and range after three steps of warm-up; wall clock to step 600: what was run, and the rest at the median.

    The first step's seconds hold building, compiling and one step, but not the imports before.
    """
    measured = seconds[WARM_UP:]
    median = statistics.median(measured)
    run = [first, *seconds][:WALL_STEPS]
    return {
        "first_step_seconds": round(first, 2),
        "step_seconds": round(median, 4),
        "step_seconds_range": [round(min(measured), 4), round(max(measured), 4)],
        "tokens_per_second": round(config.train.batch_tokens / median),
        "wall_seconds": round(sum(run) + (WALL_STEPS - len(run)) * median, 1),
        "wall_steps_measured": len(run),
    }
