"""The real train step, compiled for devices that may not be here: its memory and its text.

Nothing is allocated and nothing runs: state and batch are shapes with shardings. Numbers are per device.
"""

from __future__ import annotations

import bisect
import math
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxchat.config import Config
from jaxchat.optimizer import make_optimizer
from jaxchat.sharding import batch_devices, batch_sharding, micro_batch
from jaxchat.train_state import abstract_state, compute_dtype, make_train_step

from .targets import MEMORY_FRACTION

# Per cent. XLA recomputes what would pass its limit: 95 % of what the process may take (0.92 here), but only 95 % of
# 80 % of the memory where there is no device to ask. This makes the second the first.
SLOP = round(95 * MEMORY_FRACTION / 0.8)


@dataclass(frozen=True)
class Step:
    """One compiled program. Bytes per device; `temp` is everything that lives within a step only."""

    seconds: float  # of the compiler, tracing not counted
    peak: int
    arguments: int  # state and batch
    temp: int
    parts: dict[str, int]  # of the arguments
    text: str = ""  # of the optimized program; "" where the compiler refused it for its memory


def compile_step(config: Config, mesh: Mesh, rows: int, accumulate: int) -> Step:
    """Compile the update of `rows` rows a device and `accumulate` micro-batches.

    A step that does not fit into memory is no error: the peak says so.
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
    return compile_program(update.lower(state, batch), mesh, parts)


def largest_rows(config: Config, mesh: Mesh, device_bytes: int, peak_of: Callable[[int], int] | None = None) -> int:
    """Return the most rows a device and micro-batch that fit, among those that divide the batch; 0 if none does.

    Bisects, beginning with the configured rows. `peak_of(rows)` may know peaks already.
    """
    per_device = max(1, config.train.batch_tokens // config.model.seq_len // batch_devices(mesh))
    choices = [n for n in range(1, per_device + 1) if per_device % n == 0]
    peak_of = peak_of or (lambda rows: compile_step(config, mesh, rows, per_device // rows).peak)
    low, high, guess = 0, len(choices), max(0, bisect.bisect(choices, config.train.device_batch_rows) - 1)
    while low < high:
        if peak_of(choices[guess]) <= MEMORY_FRACTION * device_bytes:
            low = guess + 1
        else:
            high = guess
        guess = (low + high) // 2
    return choices[low - 1] if low else 0


def rows_and_accumulation(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Return (rows a device, micro-batches) that training takes; `UsageError` where the batch does not divide."""
    batch_rows, accumulate = micro_batch(config, batch_devices(mesh))
    return batch_rows // batch_devices(mesh), accumulate


def compile_program(lowered: Any, mesh: Mesh, trees: dict[str, Any]) -> Step:
    """Compile a program for the devices of `mesh`; `trees`: its arguments, for the parts of the memory."""

    def size(shape: jax.ShapeDtypeStruct) -> int:  # on one device
        sharding: Any = shape.sharding
        dims = sharding.shard_shape(shape.shape) if isinstance(sharding, NamedSharding) else shape.shape
        return math.prod(dims) * shape.dtype.itemsize

    parts = {name: sum(map(size, jax.tree.leaves(tree))) for name, tree in trees.items()}
    begin, device = time.perf_counter(), mesh.devices.flat[0]
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {}
        if device.platform == "tpu":  # its programs hold instructions that this JAX cannot print; libtpu can
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        elif device.platform == "gpu" and device not in jax.devices():
            options = {"xla_gpu_memory_limit_slop_factor": SLOP}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:  # libtpu refuses, and says what is needed beside the arguments
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"([\d.]+)([KMGT])B?\)? (?:of|exceeds)", str(error))
            temp = int(float(used[1]) * 2.0 ** (10 * ("KMGT".index(used[2]) + 1))) if used else 2**50
            arguments = sum(parts.values())
            return Step(time.perf_counter() - begin, temp + arguments, arguments, temp, parts)
        seconds = time.perf_counter() - begin
        dumped = [path.read_text() for path in Path(folder).glob("*.after_optimizations.txt")]
        text = max(dumped, key=len) if dumped else compiled.as_text()
    memory = compiled.memory_analysis()
    arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    peak = arguments + temp + new
    return Step(seconds, peak, arguments, temp, parts, text)
