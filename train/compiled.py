"""The real train step and the real decode step, compiled for devices that may not be here.

Nothing is allocated and nothing runs: state and batch are shapes with shardings.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from jaxchat import model as gpt
from jaxchat.config import Config
from jaxchat.engine.device import decode_chunk, new_slots
from jaxchat.kv_cache import serving_params
from jaxchat.optimizer import make_optimizer
from jaxchat.sharding import batch_devices, batch_sharding, micro_batch
from jaxchat.train_state import abstract_state, compute_dtype, make_train_step

from .hlo import Program, analyse
from .targets import MEMORY_FRACTION

DECODE_STEPS = 8  # tokens per chunk, as the engine's
# Per cent. XLA recomputes what would pass its limit: 95 % of what the process may take (0.92 here), but only 95 % of
# 80 % of the memory where there is no device to ask. This makes the second the first.
SLOP = round(95 * MEMORY_FRACTION / 0.8)


@dataclass(frozen=True)
class Memory:
    """Bytes per device. `arguments` hold the state and the batch, `temp` everything that lives within a step only."""

    peak: int
    arguments: int = 0
    temp: int = 0
    code: int = 0
    parts: dict[str, int] = field(default_factory=dict)  # of the arguments


@dataclass(frozen=True)
class Step:
    """One compiled program; `program` only where it was asked for."""

    memory: Memory
    seconds: float  # of the compiler, tracing not counted
    optimal_seconds: float | None = None  # the TPU compiler's own estimate of one step
    program: Program | None = None


def compile_step(config: Config, mesh: Mesh, rows: int, accumulate: int, read: bool = False) -> Step:
    """Compile the update of `rows` rows a device and `accumulate` micro-batches.

    `read`: also analyse the program. A step that does not fit into memory is no error: the peak says so.
    """
    optimizer = make_optimizer(config, compute_dtype(config, mesh), mesh)
    state = abstract_state(config, optimizer, mesh)
    shape, place = (accumulate, rows * batch_devices(mesh), config.model.seq_len), batch_sharding(mesh)
    batch = {
        key: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for key, dtype in (("inputs", jnp.int32), ("targets", jnp.int32), ("weights", jnp.float32))
    }
    update: Any = make_train_step(config, optimizer, mesh)
    parts = {"parameters": state.params, "optimizer": state.opt_state, "batch": batch}
    return _compile(update.lower(state, batch), mesh, parts, (lambda text: analyse(text, mesh.size)) if read else None)


def compile_decode(config: Config, mesh: Mesh, slots: int, read: Callable[[str], Any] | None = None) -> Step:
    """Compile the engine's decoding for all slots with full caches, on the first device; `read` gets its text."""
    model, place = config.model, SingleDeviceSharding(mesh.devices.flat[0])
    dtype = jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16  # as the engine
    params, _ = gpt.abstract_params(model)
    weights = jax.eval_shape(lambda p: serving_params(model, p, dtype), params)
    state = jax.eval_shape(lambda: new_slots(model, slots, model.seq_len, dtype))
    weights, state = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), (weights, state))
    lowered = decode_chunk.lower(model, weights, state, slots, model.seq_len, DECODE_STEPS, model.seq_len)
    return _compile(lowered, mesh, {"weights": weights, "cache": state}, read)


def largest_rows(config: Config, mesh: Mesh, device_bytes: int, peak_of: Callable[[int], int] | None = None) -> int:
    """Return the most rows a device and micro-batch that fit, among those that divide the batch; 0 if none does.

    Compiles until one that fits and the next one that does not are known; a line through the last two peaks says
    which to try. `peak_of(rows)` may know peaks already.
    """
    per_device = max(1, config.train.batch_tokens // config.model.seq_len // batch_devices(mesh))
    choices = [n for n in range(1, per_device + 1) if per_device % n == 0]
    peak_of = peak_of or (lambda rows: compile_step(config, mesh, rows, per_device // rows).memory.peak)
    limit, seen = MEMORY_FRACTION * device_bytes, []
    low, high = -1, len(choices)
    guess = max((i for i, n in enumerate(choices) if n <= config.train.device_batch_rows), default=0)
    while high - low > 1:
        rows = choices[guess]
        seen.append((rows, peak_of(rows)))
        low, high = (guess, high) if seen[-1][1] <= limit else (low, guess)
        guess += 1 if guess == low else -1
        if len(seen) > 1 and seen[-1][1] != seen[-2][1]:
            (r1, p1), (r2, p2) = seen[-2:]
            fitting = r1 + (limit - p1) * (r2 - r1) / (p2 - p1)
            guess = max((i for i, n in enumerate(choices) if n <= fitting), default=0)
        guess = min(max(guess, low + 1), high - 1)
    return choices[low] if low >= 0 else 0


def activation_bytes_per_row(config: Config, mesh: Mesh, rows: int, accumulate: int, known: Memory) -> float | None:
    """Return what one more row a device costs, from the same step with half the rows (or twice, from one)."""
    other = rows // 2 or 2
    slope = (known.temp - compile_step(config, mesh, other, accumulate).memory.temp) / (rows - other)
    return slope if slope > 0 else None


def rows_and_accumulation(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Return (rows a device, micro-batches) that training takes; `UsageError` where the batch does not divide."""
    batch_rows, accumulate = micro_batch(config, batch_devices(mesh))
    return batch_rows // batch_devices(mesh), accumulate


def _compile(lowered: Any, mesh: Mesh, trees: dict[str, Any], read: Callable[[str], Any] | None) -> Step:
    """`trees`: the arguments, for the parts of the memory."""
    begin, device = time.perf_counter(), mesh.devices.flat[0]
    parts = {name: _bytes(tree) for name, tree in trees.items()}
    with tempfile.TemporaryDirectory() as folder:
        # libtpu's programs hold instructions that this JAX cannot print, so libtpu prints them itself
        dump = read is not None and device.platform == "tpu"
        options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if dump else {}
        if device.platform == "gpu" and device not in jax.devices():
            options["xla_gpu_memory_limit_slop_factor"] = SLOP
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:  # what is known is what the step needs beside its arguments
            temp, arguments = _overflow(error), sum(parts.values())
            return Step(Memory(temp + arguments, arguments, temp, parts=parts), time.perf_counter() - begin)
        seconds = time.perf_counter() - begin
        dumped = [path.read_text() for path in Path(folder).glob("*.after_optimizations.txt")]
        program = read(max(dumped, key=len) if dump else compiled.as_text()) if read else None
    size, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    arguments, temp, code = size.argument_size_in_bytes, size.temp_size_in_bytes, size.generated_code_size_in_bytes
    peak = arguments + size.output_size_in_bytes - size.alias_size_in_bytes + temp + code
    optimal = cost.get("optimal_seconds") or 0
    return Step(Memory(peak, arguments, temp, code, parts), seconds, optimal if optimal > 0 else None, program)


def _bytes(tree: Any) -> int:
    """Bytes of a tree of shapes on one device."""

    def one(s: jax.ShapeDtypeStruct) -> int:
        sharding: Any = s.sharding
        shape = sharding.shard_shape(s.shape) if isinstance(sharding, NamedSharding) else s.shape
        return math.prod(shape) * s.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def _overflow(error: Exception) -> int:
    """The bytes that a compiler which refuses (libtpu's does) says the program needs; anything else is raised."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    used = re.search(r"([\d.]+)([KMGT])B?\)? (?:of|exceeds)", str(error))
    return int(float(used[1]) * 2.0 ** (10 * ("KMGT".index(used[2]) + 1))) if used else 2**50
