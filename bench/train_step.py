"""Time the real training step: python -m bench.train_step --tier d12 [--steps 20] [--device-batch-rows 32] [--set K=V]

Random tokens, the whole jitted step (loss, gradients, optimizer). The last line is one JSON object.

--variants K=A,B,C (may be repeated) runs every combination, a JSON line each; the last line holds them all.
--compare nanochat DIR runs a checkout of karpathy/nanochat in turns with ours: same shapes, same tokens, torch.compile,
--python is an interpreter with torch and filelock. --full-attention gives both full attention in every layer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import machine
from bench.peer import add_peer_arguments, check_peer
from jaxchat.config import Config, flatten, load_config
from jaxchat.errors import JaxchatError
from jaxchat.optimizer import make_optimizer
from jaxchat.scaling import resolve
from jaxchat.sharding import batch_devices, batch_sharding, make_mesh
from jaxchat.sizes import count_parameters, flops_per_token, peak_flops
from jaxchat.train_state import compute_dtype, init_state, layer_options, make_train_step

MFU_GOALS = {"d12": 0.50, "d20": 0.58, "d26": 0.60}  # of one H100 or H200, bfloat16
WARM_UP = 3  # steps that no median counts


def batch_shape(config: Config, shards: int = 1) -> tuple[int, int, int]:
    """(A, B, T): micro-batches, rows of one over all devices, positions."""
    rows = config.train.batch_tokens // config.model.seq_len
    micro = min(rows, config.train.device_batch_rows * shards)
    return rows // micro, micro, config.model.seq_len


class RandomTokens:
    """Batches of random tokens; a peer with the same seed draws the same ones. `checksum` is the first batch's."""

    def __init__(self, shape: tuple[int, int, int], vocab_size: int, seed: int = 0):
        self._shape, self._vocab_size = shape, vocab_size
        self._draw, self.checksum = np.random.default_rng(seed), 0

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._draw.integers(0, self._vocab_size, self._shape, np.int32)
        self.checksum = self.checksum or int(tokens.sum(dtype=np.int64))
        return tokens, np.roll(tokens, -1, -1)


class Trainer:
    """Our state and compiled step. Making it runs the first step; `step()` returns the seconds of one more.

    `batches()` returns inputs and targets, each (A, B, T) int32.
    """

    def __init__(self, config: Config, batches: Callable[[], tuple[np.ndarray, np.ndarray]]):
        begin = time.perf_counter()
        self.config, self.mesh, self._batches = config, make_mesh(config.mesh), batches
        optimizer = make_optimizer(config, compute_dtype(config, self.mesh), self.mesh)
        self._state = init_state(config, optimizer, self.mesh)
        batch = self._batch()
        compiling = time.perf_counter()
        self.compiled = make_train_step(config, optimizer, self.mesh).lower(self._state, batch).compile()
        self.compile_seconds = time.perf_counter() - compiling
        self._run(batch)
        self.first_seconds = time.perf_counter() - begin
        self.parameters = count_parameters(config.model).total

    def _batch(self) -> Any:
        inputs, targets = self._batches()
        arrays = {"inputs": inputs, "targets": targets, "weights": np.ones(inputs.shape, np.float32)}
        return jax.block_until_ready(jax.device_put(arrays, batch_sharding(self.mesh)))

    def _run(self, batch: Any) -> None:
        self._state, metrics = self.compiled(self._state, batch)
        jax.block_until_ready((self._state, metrics))
        self.loss = float(metrics["loss"])

    def step(self) -> float:
        batch = self._batch()
        begin = time.perf_counter()
        self._run(batch)
        return time.perf_counter() - begin


def random_trainer(config: Config, seed: int = 0) -> tuple[Trainer, RandomTokens]:
    """Return a trainer over random tokens, and those."""
    shape = batch_shape(config, batch_devices(make_mesh(config.mesh)))
    batches = RandomTokens(shape, config.model.vocab_size, seed)
    return Trainer(config, batches), batches


def describe(config: Config, trainer: Trainer) -> dict[str, Any]:
    """The machine, and every setting that shapes the step."""
    sections = ("model.", "train.", "optim.", "mesh.")
    return machine.about() | {
        "devices": trainer.mesh.size,
        "dtype": compute_dtype(config, trainer.mesh).name,
        "attention": layer_options(config, trainer.mesh).backend,
        "settings": {k: v for k, v in flatten(config).items() if k.startswith(sections)},
    }


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Seconds to the first step's result, and the median over the steps after three warm-up ones."""
    trainer, _ = random_trainer(config)
    seconds = [trainer.step() for _ in range(steps + WARM_UP)][WARM_UP:]
    median = statistics.median(seconds)
    device = trainer.mesh.devices.flat[0]
    peak = peak_flops(device.device_kind)
    rate = config.train.batch_tokens / median
    flops = rate * flops_per_token(config.model) / trainer.mesh.size
    peak_bytes = machine.peak_bytes()
    product = machine.product_rate(compute_dtype(config, trainer.mesh), 2048 if device.platform == "cpu" else 8192)
    memory = trainer.compiled.memory_analysis()
    return describe(config, trainer) | {
        "parameters": trainer.parameters,
        "batch": batch_shape(config, batch_devices(trainer.mesh)),
        "steps": steps,
        "loss": round(trainer.loss, 4),
        "first_step_seconds": round(trainer.first_seconds, 2),
        "compile_seconds": round(trainer.compile_seconds, 2),
        "step_seconds": round(median, 4),
        "step_seconds_range": [round(min(seconds), 4), round(max(seconds), 4)],
        "tokens_per_second": round(rate),
        "gflops_per_second": round(flops * trainer.mesh.size / 1e9, 1),
        "mfu": round(flops / peak, 4) if peak else None,
        "mfu_goal": MFU_GOALS.get(config.tier) if peak else None,
        "product_gflops_per_second": round(product / 1e9, 1),
        "share_of_product_rate": round(flops / product, 3),
        "compiled_temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "compiled_argument_bytes": memory.argument_size_in_bytes if memory else None,
        "peak_bytes_in_use": peak_bytes,  # of this process, earlier variants included
    }


def run_variants(tier: str, given: list[str], axes: list[str], steps: int) -> None:
    """Every combination of `K=A,B,C`, a JSON line each as it ends; one that fails says why and the others go on."""
    choices = [[f"{key}={value}" for value in values.split(",")] for key, _, values in (a.partition("=") for a in axes)]
    results = []
    for chosen in itertools.product(*choices):
        try:
            result = measure(resolve(load_config(tier, given + list(chosen))), steps)
        except (JaxchatError, jax.errors.JaxRuntimeError) as error:
            result = {"error": str(error).splitlines()[0]}
        results.append({"variant": list(chosen)} | result)
        print(json.dumps(results[-1]), flush=True)
        jax.clear_caches()
    print(json.dumps({"tier": tier, "set": given, "variants": results}))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="nano")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device-batch-rows", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="K=V")
    parser.add_argument("--full-attention", action="store_true", help="no windows: model.window_pattern=L")
    parser.add_argument("--variants", action="append", default=[], metavar="K=A,B,C")
    add_peer_arguments(parser)
    parser.add_argument("--block", type=int, default=5, help="of --compare: steps a turn")
    parser.add_argument("--peer-env", action="append", default=[], metavar="K=V", help="of --compare; K= unsets")
    args = parser.parse_args(argv)
    check_peer(parser, args)
    given = list(args.set)
    given += [f"train.device_batch_rows={args.device_batch_rows}"] if args.device_batch_rows else []
    given += ["model.window_pattern=L"] if args.full_attention else []
    try:
        if args.variants:
            return run_variants(args.tier, given, args.variants, args.steps)
        config = resolve(load_config(args.tier, given))
        result = {"tier": args.tier, "set": given}
        if args.compare:
            from bench.compare import compare

            peer = compare(config, Path(args.compare[1]), args.python, args.steps, args.block, args.peer_env)
            result |= {"peer_env": args.peer_env} | peer
        else:
            result |= measure(config, args.steps)
    except JaxchatError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    from launch import prefer_huge_pages

    if "--compare" in sys.argv:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU two processes share the memory
    prefer_huge_pages()
    main()
