"""A decoding step compiled for a GPU that is not here: python -m bench.decode_compiled --tier d20 [--target h100:1]

Kernels and bytes of one step of all rows, read from the program that the engine would run, by batch size: what a step
costs is the larger of its bytes over the memory's bandwidth and its kernels times some microseconds. Needs the extra
plan-cuda. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from bench import machine
from bench.decode import step_bytes
from jaxchat import model as gpt
from jaxchat.config import Config, MeshConfig, load_config
from jaxchat.engine.device import decode_chunk, new_slots
from jaxchat.errors import JaxchatError
from jaxchat.kv_cache import serving_params
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from train.compiled import Step, compile_program
from train.hlo import Program
from train.targets import parse_target, target_devices

DECODE_STEPS = 8  # tokens per chunk, as the engine's
KERNELS = ("fusion", "custom-call", "copy", "sort", "dot", "scatter", "reduce")


def compile_decode(config: Config, mesh: Mesh, slots: int) -> Step:
    """Compile the engine's decoding for all slots with full caches, on the first device."""
    model, device = config.model, mesh.devices.flat[0]
    dtype, place = jnp.float32 if device.platform == "cpu" else jnp.bfloat16, SingleDeviceSharding(device)
    params = gpt.abstract_params(model)
    weights = jax.eval_shape(lambda p: serving_params(model, p, dtype), params)
    state = jax.eval_shape(lambda: new_slots(model, slots, model.seq_len, dtype))
    weights, state = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), (weights, state))
    most = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=place)
    lowered = decode_chunk.lower(model, weights, state, most, slots, model.seq_len, DECODE_STEPS, model.seq_len)
    return compile_program(lowered, mesh, {"weights": weights, "cache": state})


def loop_cost(text: str) -> tuple[int, int]:
    """(kernels, bytes read and written) of one turn of the entry's first loop, in an optimized module's text."""
    program = Program(text)
    loop = next(i for i in program.computations[program.entry] if i.opcode == "while")
    body = program.computations[loop.called("body")]
    kernels, beside = [i for i in body if i.opcode in KERNELS], {i.name: i for i in body}
    return len(kernels), round(sum(program.bytes_moved(i, beside) for i in kernels))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """An entry for each batch size; `needed_bytes`: weights, and keys and values of full caches, read once."""
    config = resolve(load_config(args.tier, [f"model.seq_len={args.context}", *args.set]))
    target = parse_target(args.target)
    mesh = make_mesh(MeshConfig(), target_devices(target)[:1])
    entries = []
    for rows in args.batch_sizes:
        step = compile_decode(config, mesh, rows)
        kernels, moved = loop_cost(step.text)
        entries.append(
            {
                "rows": rows,
                "kernels": kernels,
                "kernels_per_layer": round(kernels / config.model.depth, 1),
                "bytes": moved,
                "needed_bytes": step_bytes(config, rows, args.context, "bfloat16", 2),
                "milliseconds_at_bandwidth": round(1e3 * moved / target.chip.memory_rate, 3),
                "memory_bytes": step.peak,
                "compile_seconds": round(step.seconds, 1),
            }
        )
    return entries


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="d20")
    parser.add_argument("--target", default="h100:1")
    parser.add_argument("--set", action="append", default=[], metavar="K=V")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a slot")
    parser.add_argument("--batch-sizes", type=machine.numbers, default=[1, 2, 8, 32, 128])
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # it only compiles, and takes no GPU that may be here
    try:
        entries = measure(args)
    except JaxchatError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    about = {"tier": args.tier, "target": args.target, "context": args.context, "jax": version("jax")}
    print(json.dumps(about | {"steps": entries}))


if __name__ == "__main__":
    main()
