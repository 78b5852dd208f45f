"""Time the real training step: python -m bench.train_step --tier d12 [--steps 20] [--device-batch-rows 32] [--set K=V]

Random tokens, the whole jitted step (loss, gradients, optimizer). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.config import Config, load_config
from jaxchat.mesh import batch_devices, batch_sharding, make_mesh
from jaxchat.model.sizes import count_parameters, flops_per_token, peak_flops
from jaxchat.optim.groups import make_optimizer
from jaxchat.optim.horizon import resolve
from jaxchat.state import compute_dtype, init_state, make_train_step


def measure(config: Config, steps: int) -> dict:
    """Seconds to the first step's result, and the median over the steps after three warm-up ones."""
    start = time.perf_counter()
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config, compute_dtype(config, mesh), mesh)
    state = init_state(config, optimizer, mesh)
    step = make_train_step(config, optimizer, mesh)
    rows = config.train.batch_tokens // config.model.seq_len
    micro = min(rows, config.train.device_batch_rows * batch_devices(mesh))
    shape = (rows // micro, micro, config.model.seq_len)
    draw = np.random.default_rng(0)

    def batch():
        tokens = draw.integers(0, config.model.vocab_size, shape, np.int32)
        arrays = {"inputs": tokens, "targets": np.roll(tokens, -1, -1), "weights": np.ones(shape, np.float32)}
        return jax.device_put(arrays, batch_sharding(mesh))

    state, metrics = step(state, batch())
    jax.block_until_ready(metrics)
    first = time.perf_counter() - start
    seconds = []
    for _ in range(steps + 3):
        data = jax.block_until_ready(batch())
        begin = time.perf_counter()
        state, metrics = step(state, data)
        jax.block_until_ready((state.step, metrics))
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[3:])
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    rate = config.train.batch_tokens / median
    return {
        "device": device.device_kind,
        "devices": len(mesh.devices.flat),
        "jax": version("jax"),
        "dtype": jnp.dtype(compute_dtype(config, mesh)).name,
        "parameters": count_parameters(config.model).total,
        "batch": shape,
        "first_step_seconds": round(first, 2),
        "step_seconds": round(median, 4),
        "step_seconds_range": [round(min(seconds[3:]), 4), round(max(seconds[3:]), 4)],
        "tokens_per_second": round(rate),
        "gflops_per_second": round(rate * flops_per_token(config.model) / 1e9, 1),
        "mfu": round(rate * flops_per_token(config.model) / peak / len(mesh.devices.flat), 4) if peak else None,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="nano")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device-batch-rows", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="K=V")
    args = parser.parse_args(argv)
    rows = [f"train.device_batch_rows={args.device_batch_rows}"] if args.device_batch_rows else []
    config = resolve(load_config(args.tier, args.set + rows))
    print(json.dumps({"tier": args.tier, "set": args.set} | measure(config, args.steps)))


if __name__ == "__main__":
    from launch import prefer_huge_pages

    prefer_huge_pages()
    main()
