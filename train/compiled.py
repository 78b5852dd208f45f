"""The real train step and the real decode step, compiled for devices that may not be here, and what the compiler says.

Nothing is allocated and nothing runs: state and batch are shapes with shardings.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from jaxchat import model as gpt
from jaxchat.config import Config
from jaxchat.engine.device import decode_chunk, new_slots
from jaxchat.kv_cache import serving_params
from jaxchat.optimizer import make_optimizer
from jaxchat.sharding import batch_devices, batch_sharding, micro_batch
from jaxchat.train_state import abstract_state, compute_dtype, make_train_step

from .targets import MEMORY_FRACTION

# What an optimized XLA program will do, read from its text: products, collectives, kernels, bytes moved in a step.
#
# XLA's own counts leave out loops (a `while` counts once) and are empty for a GPU that is not here, so the text is
# walked
# from the entry with every loop's trip count multiplied in. Numbers are per device: the text is one device's program.


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8,
              "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip

# Instructions that move nothing: names for what is there, and those whose bodies are counted instead
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
         "async-start", "optimization-barrier", "partition-id", "replica-id", "add-dependency"}  # fmt: skip
_CUTS = ("slice", "dynamic-slice", "gather")  # they read of their first operand what they return
_PUTS = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand they write, into the first one

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


@dataclass
class Instruction:
    """`shape` is HLO text: `bf16[8,128]{1,0}`, or a tuple of such."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str


@dataclass
class Collective:
    """One collective instruction. `bytes`: the whole array it makes or takes, per device and execution."""

    kind: str
    bytes: int
    count: int  # executions in a step
    group: tuple[int, ...]  # devices of one group, by their place in the mesh
    where: str  # the JAX operation that it came from

    @property
    def sent_bytes(self) -> float:
        """That every device sends in one execution with the usual ring."""
        n = len(self.group)
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return factor * self.bytes


@dataclass
class Transfer:
    """What one instruction reads and writes, in bytes per device and execution."""

    kind: str  # "products", "attention", "collectives" or "other"
    bytes: float
    count: int  # executions in a step
    name: str
    where: str  # the JAX operation that it came from

    @property
    def total(self) -> float:
        return self.bytes * self.count


@dataclass
class Program:
    """Totals of one execution of the entry computation on one device."""

    product_flops: float = 0.0  # matrix products; 2 per multiply-add
    attention_flops: float = 0.0  # of fused attention kernels; windows count with their length, the causal half whole
    product_types: Counter[str] = field(default_factory=Counter)  # operand types -> FLOPs
    collectives: list[Collective] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)  # custom calls by target -> executions
    buffers: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # (type, shape) in memory, largest first
    update_flops: float = 0.0  # of `product_flops`, those outside the differentiated part: the optimizer's
    recomputed_flops: float = 0.0  # of `product_flops`, done again to save memory: by `jax.checkpoint` or by XLA itself
    transfers: list[Transfer] = field(default_factory=list)
    unknown_loops: int = 0  # loops whose trip count the text does not tell; counted once

    @property
    def flops(self) -> float:
        return self.product_flops + self.attention_flops

    def bytes_moved(self, kind: str = "") -> float:
        """Between memory and processor in a step: every array that a kernel reads or writes, as if no cache held it.

        `kind`: of such transfers alone.
        """
        return sum(t.total for t in self.transfers if kind in ("", t.kind))

    @property
    def recomputed_share(self) -> float:
        """Of the FLOPs that the step needs."""
        return self.recomputed_flops / max(self.flops - self.recomputed_flops, 1.0)

    def by_kind(self) -> dict[str, dict[str, int]]:
        """kind -> {"count", "bytes"} a step, trip counts included."""
        totals: dict[str, dict[str, int]] = {}
        for c in self.collectives:
            entry = totals.setdefault(c.kind, {"count": 0, "bytes": 0})
            entry["count"] += c.count
            entry["bytes"] += c.count * c.bytes
        return totals


def analyse(text: str, devices: int = 1) -> Program:
    """The `Program` of an optimized HLO module's text, for a mesh of so many devices."""
    computations, entry = parse(text)
    program = Program()
    shapes: set[tuple[str, str]] = set()
    for computation, times, fused, again in _walk(computations, entry, program):
        by_name, repeats = {i.name: i for i in computation}, _repeats(computation)
        for instruction in computation:
            _count(instruction, by_name, times, devices, program, again or instruction.name in repeats)
            if not fused:  # inside a fusion nothing is written to memory
                shapes.update(_ARRAY.findall(instruction.shape))
                if moved := bytes_moved(instruction, by_name, computations):
                    kind, where = _kind(instruction, computations), _where(instruction)
                    program.transfers.append(Transfer(kind, moved, times, instruction.name, where))
    program.buffers = sorted({(dtype, tuple(_split(dims))) for dtype, dims in shapes}, key=_buffer_bytes, reverse=True)
    return program


def shape_bytes(shape: str) -> int:
    """Bytes of every array in a shape's text; types that are no data (tokens) count nothing."""
    return math.ceil(sum(_item_bytes(dtype) * math.prod(_split(dims)) for dtype, dims in _ARRAY.findall(shape)))


def _item_bytes(dtype: str) -> float:
    return ITEM_BYTES.get(dtype, 1 if dtype.startswith("f8") else 0)


def _buffer_bytes(buffer: tuple[str, tuple[int, ...]]) -> float:
    return _item_bytes(buffer[0]) * math.prod(buffer[1])


def _split(dims: str) -> list[int]:
    return [int(d) for d in dims.split(",") if d]


def _dims(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return _split(found[2]) if found else []


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(instructions of every computation, name of the entry)."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line[:1] not in (" ", "}") and (header := _HEADER.match(line)):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(found[2], found[3]))
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    operands = re.findall(r"%([\w.\-]+)", rest[start : stop + 1])
    # constants keep their value where others have operands
    return Instruction(name, shape, rest[:start], operands or [rest[start + 1 : stop]], rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _walk(
    computations: dict[str, list[Instruction]], entry: str, program: Program
) -> Iterator[tuple[list[Instruction], int, bool, bool]]:
    """Every computation that runs: how often, whether it is the inside of a fusion, whether it repeats another."""
    waiting = [(entry, 1, False, False)]
    while waiting:
        name, times, fused, again = waiting.pop()
        yield computations[name], times, fused, again
        repeats = _repeats(computations[name])
        for i in computations[name]:
            if i.opcode == "while":
                count = _trip_count(i, computations, program)
                waiting.append((attribute(i, "body"), times * count, fused, again))
            elif i.opcode in ("fusion", "async-start", "call", "conditional"):
                called = re.findall(r"(?:calls|to_apply|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)", i.attributes)
                names = [c.strip(" %") for group in called for c in group.split(",") if c.strip()]
                waiting += [(c, times, fused or i.opcode == "fusion", again or i.name in repeats) for c in names]


def _repeats(computation: list[Instruction]) -> set[str]:
    """Instructions that XLA copied to compute again instead of keeping a result: `x.remat`, beside `x`."""
    seen: set[str] = set()
    found = set()
    for i in computation:
        origin = i.name.split(".remat")[0]
        if origin in seen and ".remat" in i.name:
            found.add(i.name)
        seen.add(origin)
    return found


def attribute(i: Instruction, name: str) -> str:
    """A computation that an instruction names; "" where it names none."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", i.attributes)
    return found[1] if found else ""


def _trip_count(i: Instruction, computations: dict[str, list[Instruction]], program: Program) -> int:
    """What XLA noted, else the bound that the counter (from 0, by 1: a `lax.scan`) is compared with."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes):
        return int(found[1])
    condition = computations.get(attribute(i, "condition"), [])
    bounds = [c for c in condition if c.opcode == "constant" and c.shape.startswith(("s32[]", "u32[]", "s64[]"))]
    less = [c for c in condition if c.opcode == "compare" and "direction=LT" in c.attributes]
    inside = any(c.opcode == "fusion" for c in condition)
    if len(bounds) == 1 and (less or inside):
        return int(bounds[0].operands[0])
    program.unknown_loops += 1
    return 1


def bytes_moved(i: Instruction, by_name: dict[str, Instruction], computations: dict[str, list[Instruction]]) -> float:
    """Bytes that one execution reads and writes; `by_name` are the instructions beside it, which make its operands.

    An operand of which a kernel reads a part (a slice, rows of a table) counts with that part. What is written in place
    (a slice of a loop's buffer, rows of a gradient) counts without the array around it.
    """
    if i.opcode in _FREE or i.opcode.endswith("-done"):
        return 0.0
    called = attribute(i, "calls") if i.opcode == "fusion" else ""
    operands = [by_name.get(name) for name in i.operands]
    if called not in computations:  # one instruction alone: a fusion of itself
        parameters = [
            Instruction(f"{i.name}.{k}", o.shape, "parameter", [str(k)], "") for k, o in enumerate(operands) if o
        ]
        alone = Instruction(i.name, i.shape, i.opcode, [p.name for p in parameters], i.attributes)
        inside = [*parameters, alone]
    else:
        inside = computations[called]
    written, reads = _fusion_bytes(inside)
    by_operand: dict[str, float] = defaultdict(float)  # one that is named twice is read once
    for k, size in reads.items():
        by_operand[i.operands[k]] += size
    read = sum(
        min(size, shape_bytes(o.shape)) if (o := by_name.get(name)) else size for name, size in by_operand.items()
    )
    return written + read


def _fusion_bytes(inside: list[Instruction]) -> tuple[float, dict[int, float]]:
    """(bytes written, bytes read of every parameter) of a fusion, from the instructions inside, the root the last.

    Goes backwards: how many elements of each value do its users need?
    """
    named, root = {i.name: i for i in inside}, inside[-1]
    needed: dict[str, float] = defaultdict(float)
    written, outputs = 0.0, [named[o] for o in root.operands] if root.opcode == "tuple" else [root]
    in_place = set()
    for output in outputs:
        source = _through_bitcasts(output, named)
        if source.opcode in _PUTS and _through_bitcasts(named[source.operands[0]], named).opcode == "parameter":
            in_place.add(source.name)
            written += shape_bytes(named[source.operands[_PUTS[source.opcode]]].shape)
        elif source.opcode != "parameter" or source is root:
            written += _result_bytes(output)
        needed[output.name] = _elements(output.shape)
    reads: dict[int, float] = {}
    for i in reversed(inside):
        size = _elements(i.shape)
        share = min(needed[i.name] / size, 1.0) if size else 1.0
        if i.opcode == "parameter":
            reads[int(i.operands[0])] = share * shape_bytes(i.shape)
        for k, operand in enumerate(named[o] for o in i.operands if o in named):
            if i.opcode in _CUTS and k == 0:
                needed[operand.name] += share * size
            elif i.name in in_place and k == 0:  # sums read what they add to
                update = _elements(named[i.operands[2]].shape) if i.opcode == "scatter" else 0
                needed[operand.name] += update
            elif i.opcode != "tuple":
                needed[operand.name] += share * _elements(operand.shape)
    return written, reads


def _through_bitcasts(i: Instruction, named: dict[str, Instruction]) -> Instruction:
    while i.opcode == "bitcast" and i.operands[0] in named:
        i = named[i.operands[0]]
    return i


def _elements(shape: str) -> int:
    return sum(math.prod(_split(dims)) for _, dims in _ARRAY.findall(shape))


def _result_bytes(i: Instruction) -> int:
    """Of what an instruction writes; the workspace of a library's kernel (bytes beside its results) is none of it."""
    arrays = [f"{dtype}[{dims}]" for dtype, dims in _ARRAY.findall(i.shape)]
    if i.opcode == "custom-call" and len(arrays) > 1:
        arrays = [a for a in arrays if not a.startswith(("s8[", "u8["))]
    if i.opcode.endswith("-start"):  # a tuple of operands and results, perhaps with a context
        arrays = arrays[1:2] if len(arrays) > 1 else arrays
    return sum(map(shape_bytes, arrays))


def _kind(i: Instruction, computations: dict[str, list[Instruction]]) -> str:
    """Of a transfer."""
    inside = computations.get(attribute(i, "calls"), []) if i.opcode == "fusion" else [i]
    if i.opcode.removesuffix("-start") in COLLECTIVES:
        return "collectives"
    if any("fmha" in j.attributes for j in inside if j.opcode == "custom-call"):
        return "attention"
    nested = [k for j in inside if j.opcode == "fusion" for k in computations.get(attribute(j, "calls"), [])]
    product = any(j.opcode in ("dot", "convolution") or _is_library_product(j) for j in [*inside, *nested])
    return "products" if product else "other"


def _is_library_product(i: Instruction) -> bool:
    return i.opcode == "custom-call" and bool(
        re.search(r'custom_call_target="__(cublas\$|onednn\$matmul)', i.attributes)
    )


def _where(i: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', i.attributes)
    return found[1] if found else ""


def _count(
    i: Instruction, by_name: dict[str, Instruction], times: int, devices: int, program: Program, again: bool
) -> None:
    operands = [by_name[name].shape for name in i.operands if name in by_name]
    kind = i.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        group = _group(i.attributes, devices)
        size = sum(shape_bytes(shape) for shape in operands) * (len(group) if kind == "all-gather" else 1)
        if len(group) > 1:
            program.collectives.append(Collective(kind, size, times, group, _where(i)))
    elif i.opcode in ("dot", "convolution"):
        flops = _dot_flops(i, operands) if i.opcode == "dot" else _convolution_flops(i, operands)
        _add_product(program, i, operands, flops * times, again)
    elif i.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
        name = target[1] if target else "?"
        program.kernels[name] += times
        if name.startswith(("__cublas$", "__onednn$matmul")):
            _add_product(program, i, operands, _dot_flops(i, operands) * times, again)
        elif "fmha" in name:
            program.attention_flops += times * _attention_flops(i, backward="Backward" in name)
        elif cost := re.search(r'cost_estimate"?:\s?\{[^}]*?"?flops"?:\s?"?(\d+)', i.attributes):
            program.attention_flops += times * int(cost[1])


def _add_product(program: Program, i: Instruction, operands: list[str], flops: float, again: bool) -> None:
    types = [found[1] for shape in operands[:2] if (found := _ARRAY.search(shape))]
    program.product_flops += flops
    program.update_flops += 0 if "jvp(" in i.attributes else flops
    program.recomputed_flops += flops if again or "rematted_computation" in i.attributes else 0
    program.product_types[" x ".join(types)] += int(flops)


def _dot_flops(i: Instruction, operands: list[str]) -> float:
    found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d," ]*)', i.attributes)
    contracted = [int(d) for d in re.findall(r"\d+", found[1])] if found else []
    lhs = _dims(operands[0])
    return 2.0 * math.prod(_dims(i.shape)) * math.prod(lhs[d] for d in contracted)


def _convolution_flops(i: Instruction, operands: list[str]) -> float:
    """The TPU compiler writes products as convolutions, batch axes as padded or dilated windows: only positions where
    the window meets data count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels:
        return 0.0
    lhs, rhs, out = (dict(zip(text, dims, strict=True)) for text, dims in
                     zip(labels.groups(), (*map(_dims, operands[:2]), _dims(i.shape)), strict=True))  # fmt: skip
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", i.attributes) or [""] * 2)[1]))
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    pairs = 1
    for axis in (a for a in lhs if a.isdigit()):
        get = lambda name, default, k=int(axis): fields[name].split("x")[k] if name in fields else default  # noqa: E731
        pad = int(get("pad", "0_0").split("_")[0])
        stride, dilate, spread = (int(get(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        place = np.arange(out[axis])[:, None] * stride + np.arange(rhs[axis]) * spread - pad
        pairs *= int(((place >= 0) & (place % dilate == 0) & (place // dilate < lhs[axis])).sum())
    return 2.0 * pairs * lhs["b"] * rhs["o"] * rhs["i"] / (int(groups[1]) if groups else 1)


def _attention_flops(i: Instruction, backward: bool) -> float:
    """Two products forward, four more backward (recomputed scores do not count, as in model FLOPs)."""
    config = json.loads(i.attributes.split("backend_config=", 1)[1])["cudnn_fmha_backend_config"]
    batch, heads, queries, keys = (int(d) for d in config["intermediate_tensor_shape"]["dimensions"])
    window = config.get("sliding_window_length") or keys
    width = math.prod(_dims(i.shape)) // (batch * heads * queries)
    return (4 if backward else 2) * 2.0 * batch * heads * queries * min(window, keys) * width


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of devices of a collective, in any of the notations of XLA."""
    if "source_target_pairs" in attributes:
        found = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
        return (int(found[1]), int(found[2])) if found and found[1] != found[2] else (0,)
    text = attributes.split("replica_groups=", 1)[-1]
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return tuple(int(d) for d in listed[1].split(","))
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(devices).reshape([int(d) for d in iota[3].split(",")])
        ids = ids.transpose([int(d) for d in iota[4].split(",")]) if iota[4] else ids
        return tuple(ids.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if mesh := re.match(r"@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        named = re.findall(r"'(\w+)'", mesh[2])
        return tuple(ids[tuple(slice(None) if name in named else 0 for name in sizes)].reshape(-1).tolist())
    return tuple(range(devices))


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
    """The update of `rows` rows a device and `accumulate` micro-batches.

    `read`: also analyse the program. Memory that does not suffice is no error: the peak says so.
    """
    optimizer = make_optimizer(config, compute_dtype(config, mesh), mesh)
    state = abstract_state(config, optimizer, mesh)
    shape, place = (accumulate, rows * batch_devices(mesh), config.model.seq_len), batch_sharding(mesh)
    batch = {
        key: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for key, dtype in (("inputs", jnp.int32), ("targets", jnp.int32), ("weights", jnp.float32))
    }
    update: Any = make_train_step(config, optimizer, mesh)
    reader = (lambda text: analyse(text, mesh.size)) if read else None
    step = _compile(update.lower(state, batch), mesh, reader)
    parts = {"parameters": _bytes(state.params), "optimizer": _bytes(state.opt_state), "batch": _bytes(batch)}
    return _with_parts(step, parts)


def compile_decode(config: Config, mesh: Mesh, slots: int, read: Callable[[str], Any] | None = None) -> Step:
    """The engine's chunk of decoding for all slots with full caches, on the first device; `read` gets its text."""
    model, place = config.model, SingleDeviceSharding(mesh.devices.flat[0])
    dtype = jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16  # as the engine
    params, _ = gpt.abstract_params(model)
    weights = jax.eval_shape(lambda p: serving_params(model, p, dtype), params)
    state = jax.eval_shape(lambda: new_slots(model, slots, model.seq_len, dtype))
    weights, state = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), (weights, state))
    lowered = decode_chunk.lower(model, weights, state, slots, model.seq_len, DECODE_STEPS, model.seq_len)
    step = _compile(lowered, mesh, read)
    return _with_parts(step, {"weights": _bytes(weights), "cache": _bytes(state)})


def largest_rows(config: Config, mesh: Mesh, device_bytes: int, peak_of: Callable[[int], int] | None = None) -> int:
    """The most rows a device and micro-batch that fit, among those that divide the batch; 0 where none does.

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
            wanted = r1 + (limit - p1) * (r2 - r1) / (p2 - p1)
            guess = max((i for i, n in enumerate(choices) if n <= wanted), default=0)
        guess = min(max(guess, low + 1), high - 1)
    return choices[low] if low >= 0 else 0


def activation_bytes_per_row(config: Config, mesh: Mesh, rows: int, accumulate: int, known: Memory) -> float | None:
    """What one more row a device costs: the same step with half the rows (or twice, from one), compiled."""
    other = rows // 2 or 2
    slope = (known.temp - compile_step(config, mesh, other, accumulate).memory.temp) / (rows - other)
    return slope if slope > 0 else None


def rows_and_accumulation(config: Config, mesh: Mesh) -> tuple[int, int]:
    """(rows a device, micro-batches) that training would take; `UsageError` where the batch does not divide."""
    batch_rows, accumulate = micro_batch(config, batch_devices(mesh))
    return batch_rows // batch_devices(mesh), accumulate


def _with_parts(step: Step, parts: dict[str, int]) -> Step:
    memory = replace(step.memory, parts=parts)
    if not memory.arguments:  # refused: what is known is what the step needs beside them
        arguments = sum(parts.values())
        memory = replace(memory, peak=memory.peak + arguments, arguments=arguments, temp=memory.peak)
    return replace(step, memory=memory)


def _bytes(tree: Any) -> int:
    """Of the shapes of a tree, on one device."""

    def one(s: jax.ShapeDtypeStruct) -> int:
        sharding: Any = s.sharding
        shape = sharding.shard_shape(s.shape) if isinstance(sharding, NamedSharding) else s.shape
        return math.prod(shape) * s.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def _compile(lowered: Any, mesh: Mesh, read: Callable[[str], Any] | None) -> Step:
    begin, platform = time.perf_counter(), mesh.devices.flat[0].platform
    here = mesh.devices.flat[0] in jax.devices()
    with tempfile.TemporaryDirectory() as folder:
        # libtpu's programs hold instructions that this JAX cannot print, so libtpu prints them itself
        dump = read is not None and platform == "tpu"
        options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if dump else {}
        options |= {"xla_gpu_memory_limit_slop_factor": SLOP} if platform == "gpu" and not here else {}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            return Step(Memory(_overflow(error)), time.perf_counter() - begin)
        seconds = time.perf_counter() - begin
        program = None
        if read:
            program = read(_dumped(Path(folder)) if dump else compiled.as_text())
    found, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    code = found.generated_code_size_in_bytes
    arguments, temp = found.argument_size_in_bytes, found.temp_size_in_bytes
    peak = arguments + found.output_size_in_bytes - found.alias_size_in_bytes + temp + code
    optimal = cost.get("optimal_seconds")
    return Step(Memory(peak, arguments, temp, code), seconds, optimal if optimal and optimal > 0 else None, program)


def _dumped(folder: Path) -> str:
    """The optimized text of the largest module dumped."""
    texts = [path.read_text() for path in folder.glob("*.after_optimizations.txt")]
    return max(texts, key=len)


def _overflow(error: Exception) -> int:
    """The bytes that a compiler which refuses (libtpu's does) says the program needs; anything else is raised."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    used = re.search(r"([\d.]+)([KMGT])B?\)? (?:of|exceeds)", str(error))
    return int(float(used[1]) * 2.0 ** (10 * ("KMGT".index(used[2]) + 1))) if used else 2**50
