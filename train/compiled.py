"""The real train step, compiled for devices that may not be here: memory and collectives.

Nothing is allocated and nothing runs: state and batch are shapes with shardings. Numbers are per device.
"""

from __future__ import annotations

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
import numpy as np
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

    Compiles until one that fits and the next one that does not are known; a line through the last two peaks says
    which to try. `peak_of(rows)` may know peaks already.
    """
    per_device = max(1, config.train.batch_tokens // config.model.seq_len // batch_devices(mesh))
    choices = [n for n in range(1, per_device + 1) if per_device % n == 0]
    peak_of = peak_of or (lambda rows: compile_step(config, mesh, rows, per_device // rows).peak)
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
    arguments, temp, code = (
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    peak = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + temp + code
    return Step(seconds, peak, arguments, temp, parts, text)


# Collectives. XLA's own counts leave out loops (a `while` counts once), so the program's text is walked from the entry
# with every loop's trip count multiplied in. A line is `name = shape opcode(operands), attributes`; a shape is
# `bf16[8,128]{1,0}`, or a tuple of such.

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8,
              "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z\d\-]*)\((.*)$")
SCALAR = ("s32[]", "constant")
CALLED = re.compile(r"(?:body|calls|to_apply|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)")


@dataclass(frozen=True)
class Collective:
    """One collective instruction. `bytes`: the whole array it makes or takes, per device and execution."""

    kind: str
    bytes: int
    count: int  # executions in a step
    group: tuple[int, ...]  # devices of one group, by their place in the mesh

    @property
    def sent_bytes(self) -> float:
        """Bytes that every device sends in one execution with the usual ring."""
        n = len(self.group)
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return factor * self.bytes


def collectives(text: str, devices: int) -> list[Collective]:
    """Return the collectives of an optimized program for so many devices; those within one device are none."""
    computations: dict[str, list[tuple[str, ...]]] = {}
    entry, current = "", list[tuple[str, ...]]()
    for line in text.splitlines():
        if line[:1] not in (" ", "}") and (header := HEADER.match(line)):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := INSTRUCTION.match(line):
            current.append(instruction.groups())
    found, waiting = [], [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        shapes = {name: shape for name, shape, _, _ in computations.get(name, [])}
        for _, _, opcode, rest in computations.get(name, []):
            operands, _, attributes = rest.partition("), ")
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                group = device_group(attributes, devices)
                size = sum(shape_bytes(shapes.get(operand, "")) for operand in re.findall(r"%([\w.\-]+)", operands))
                size *= len(group) if kind == "all-gather" else 1
                found += [Collective(kind, size, times, group)] if len(group) > 1 else []
            elif opcode in ("while", "fusion", "async-start", "call", "conditional"):
                inside = [name.strip(" %") for names in CALLED.findall(attributes) for name in names.split(",")]
                trips = re.findall(r'known_trip_count":\{"n":"(\d+)"', attributes)
                if opcode == "while" and not trips:  # the counter's bound (from 0, by 1: a scan)
                    condition = computations[re.findall(r"condition=%?([\w.\-]+)", attributes)[0]]
                    trips = [rest.split(")")[0] for _, shape, code, rest in condition if (shape, code) == SCALAR]
                waiting += [(name, times * (int(trips[0]) if len(trips) == 1 else 1)) for name in inside if name]
    return found


def shape_bytes(shape: str) -> int:
    """Return the bytes of every array in a shape's text; types that are no data (tokens) count nothing."""
    sizes = ((dtype, math.prod(int(d) for d in dims.split(",") if d)) for dtype, dims in ARRAY.findall(shape))
    return math.ceil(sum(ITEM_BYTES.get(t, 1 if t.startswith("f8") else 0) * count for t, count in sizes))


def device_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Return the first group of devices of a collective, in any of the notations of XLA."""

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return tuple(dict.fromkeys((int(pair[1]), int(pair[2]))))
    text = attributes.split("replica_groups=", 1)[-1]
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return tuple(numbers(listed[1]))
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(devices).reshape(numbers(iota[3]))
        ids = ids.transpose(numbers(iota[4])) if iota[4] else ids
        return tuple(ids.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if mesh := re.match(r"@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        named = re.findall(r"'(\w+)'", mesh[2])
        return tuple(ids[tuple(slice(None) if name in named else 0 for name in sizes)].reshape(-1).tolist())
    return tuple(range(devices))
