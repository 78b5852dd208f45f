"""Read from the text of an optimized XLA program what a step does: products, collectives, kernels, bytes moved.

XLA's own counts leave out loops (a `while` counts once) and are empty for a GPU that is not here, so the text is walked
from the entry with every loop's trip count multiplied in. Numbers are per device: the text is one device's program.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8,
              "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip
# Instructions that move nothing: names for existing arrays, and those whose bodies are counted instead
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
        "async-start", "optimization-barrier", "partition-id", "replica-id", "add-dependency"}  # fmt: skip
CUTS = ("slice", "dynamic-slice", "gather")  # they read of their first operand what they return
PUTS = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand they write, into the first one

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


@dataclass
class Instruction:
    """`shape` is HLO text: `bf16[8,128]{1,0}`, or a tuple of such. A constant has its value as its operand."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str

    def called(self, name: str) -> str:
        """Return the computation that an attribute names; "" without it."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Target of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def product(self) -> bool:
        """Whether it is a matrix product, ours or a library's."""
        return self.opcode in ("dot", "convolution") or self.target.startswith(("__cublas$", "__onednn$matmul"))

    @property
    def kind(self) -> str:
        """The opcode, for the asynchronous form of a collective that of the collective."""
        return self.opcode.removesuffix("-start")


Computations = dict[str, list[Instruction]]


@dataclass
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


@dataclass
class Transfer:
    """Return what one instruction reads and writes, in bytes per device and execution."""

    kind: str  # "products", "attention", "collectives" or "other"
    bytes: float
    count: int  # executions in a step
    name: str


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
    recomputed_flops: float = 0.0  # of `product_flops`, repeated to save memory: by `jax.checkpoint` or by XLA itself
    transfers: list[Transfer] = field(default_factory=list)
    unknown_loops: int = 0  # loops whose trip count the text does not tell; counted once

    @property
    def flops(self) -> float:
        return self.product_flops + self.attention_flops

    def bytes_moved(self, kind: str = "") -> float:
        """Return the bytes that kernels (of one `kind`) read and write in a step, as if no cache held any."""
        return sum(t.bytes * t.count for t in self.transfers if kind in ("", t.kind))

    @property
    def recomputed_share(self) -> float:
        """Share of the FLOPs that the step needs."""
        return self.recomputed_flops / max(self.flops - self.recomputed_flops, 1.0)

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Return kind of collective -> {"count", "bytes"} a step."""
        totals: dict[str, dict[str, int]] = {}
        for c in self.collectives:
            entry = totals.setdefault(c.kind, {"count": 0, "bytes": 0})
            entry["count"] += c.count
            entry["bytes"] += c.count * c.bytes
        return totals


def analyse(text: str, devices: int = 1) -> Program:
    """Return the `Program` of an optimized HLO module's text, for a mesh of so many devices."""
    computations, entry = parse(text)
    program, shapes = Program(), set[tuple[str, str]]()
    for computation, times, fused, again in _walk(computations, entry, program):
        by_name, repeats = {i.name: i for i in computation}, _repeats(computation)
        for i in computation:
            operands = [by_name[name].shape for name in i.operands if name in by_name]
            _count(i, operands, times, devices, program, again or i.name in repeats)
            if not fused:  # inside a fusion nothing is written to memory
                shapes.update(_ARRAY.findall(i.shape))
                if moved := bytes_moved(i, by_name, computations):
                    program.transfers.append(Transfer(_transfer_kind(i, computations), moved, times, i.name))
    buffers = {(dtype, _split(dims)) for dtype, dims in shapes}
    program.buffers = sorted(buffers, key=lambda b: (-_item_bytes(b[0]) * math.prod(b[1]), b))
    return program


# The text


def parse(text: str) -> tuple[Computations, str]:
    """Return (instructions of every computation, name of the entry)."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if line[:1] not in (" ", "}") and (header := _HEADER.match(line)):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            rest = found[3]
            end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
            shape, rest = rest[:end], rest[end:].lstrip()
            start = rest.index("(")
            stop = _closing(rest, start)
            operands = re.findall(r"%([\w.\-]+)", rest[start : stop + 1]) or [rest[start + 1 : stop]]
            current.append(Instruction(found[2], shape, rest[:start], operands, rest[stop + 1 :]))
    return computations, entry


def shape_bytes(shape: str) -> int:
    """Return the bytes of every array in a shape's text; types that are no data (tokens) count nothing."""
    return math.ceil(sum(_item_bytes(dtype) * math.prod(_split(dims)) for dtype, dims in _ARRAY.findall(shape)))


def _item_bytes(dtype: str) -> float:
    return ITEM_BYTES.get(dtype, 1 if dtype.startswith("f8") else 0)


def _split(dims: str) -> tuple[int, ...]:
    return tuple(int(d) for d in dims.split(",") if d)


def _dims(shape: str) -> tuple[int, ...]:
    found = _ARRAY.search(shape)
    return _split(found[2]) if found else ()


def _elements(shape: str) -> int:
    return sum(math.prod(_split(dims)) for _, dims in _ARRAY.findall(shape))


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


# Which computations run, and how often


def _walk(
    computations: Computations, entry: str, program: Program
) -> Iterator[tuple[list[Instruction], int, bool, bool]]:
    """Every computation that runs: how often, whether it is the inside of a fusion, whether it repeats another."""
    waiting = [(entry, 1, False, False)]
    while waiting:
        name, times, fused, again = waiting.pop()
        yield computations[name], times, fused, again
        repeats = _repeats(computations[name])
        for i in computations[name]:
            if i.opcode == "while":
                waiting.append((i.called("body"), times * _trip_count(i, computations, program), fused, again))
            elif i.opcode in ("fusion", "async-start", "call", "conditional"):
                called = re.findall(r"(?:calls|to_apply|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)", i.attributes)
                names = [c.strip(" %") for group in called for c in group.split(",") if c.strip()]
                waiting += [(c, times, fused or i.opcode == "fusion", again or i.name in repeats) for c in names]


def _repeats(computation: list[Instruction]) -> set[str]:
    """Instructions that XLA copied to compute again instead of keeping a result: `x.remat`, beside `x`."""
    seen: set[str] = set()
    repeats = set()
    for i in computation:
        origin = i.name.split(".remat")[0]
        if origin in seen and ".remat" in i.name:
            repeats.add(i.name)
        seen.add(origin)
    return repeats


def _trip_count(i: Instruction, computations: Computations, program: Program) -> int:
    """Return the trip count that XLA noted, else the bound of the counter (from 0, by 1: a `lax.scan`)."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes):
        return int(found[1])
    condition = computations.get(i.called("condition"), [])
    bounds = [c for c in condition if c.opcode == "constant" and c.shape.startswith(("s32[]", "u32[]", "s64[]"))]
    compared = any(
        c.opcode == "fusion" or (c.opcode == "compare" and "direction=LT" in c.attributes) for c in condition
    )
    if len(bounds) == 1 and compared:
        return int(bounds[0].operands[0])
    program.unknown_loops += 1
    return 1


# Bytes


def bytes_moved(i: Instruction, by_name: dict[str, Instruction], computations: Computations) -> float:
    """Return the bytes that one execution reads and writes; `by_name`: the instructions beside it.

    An operand of which a kernel reads a part (a slice, rows of a table) counts with that part. What is written in place
    (a slice of a loop's buffer, rows of a gradient) counts without the array around it.
    """
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0.0
    inside = computations.get(i.called("calls"), []) if i.opcode == "fusion" else []
    if not inside:  # one instruction alone: a fusion of itself
        operands = enumerate(by_name.get(name) for name in i.operands)
        inside = [Instruction(f"{i.name}.{k}", o.shape, "parameter", [str(k)], "") for k, o in operands if o]
        inside.append(Instruction(i.name, i.shape, i.opcode, [p.name for p in inside], i.attributes))
    written, reads = _fusion_bytes(inside)
    by_operand: dict[str, float] = defaultdict(float)  # one that is named twice is read once
    for k, size in reads.items():
        by_operand[i.operands[k]] += size
    for name, size in by_operand.items():
        written += min(size, shape_bytes(by_name[name].shape)) if name in by_name else size
    return written


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
        if source.opcode in PUTS and _through_bitcasts(named[source.operands[0]], named).opcode == "parameter":
            in_place.add(source.name)
            written += shape_bytes(named[source.operands[PUTS[source.opcode]]].shape)
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
            if i.opcode in CUTS and k == 0:
                needed[operand.name] += share * size
            elif i.name in in_place and k == 0:  # sums read what they add to
                needed[operand.name] += _elements(named[i.operands[2]].shape) if i.opcode == "scatter" else 0
            elif i.opcode != "tuple":
                needed[operand.name] += share * _elements(operand.shape)
    return written, reads


def _through_bitcasts(i: Instruction, named: dict[str, Instruction]) -> Instruction:
    while i.opcode == "bitcast" and i.operands[0] in named:
        i = named[i.operands[0]]
    return i


def _result_bytes(i: Instruction) -> int:
    """Bytes of an instruction's results, without the workspace of a library's kernel (bytes beside its results)."""
    arrays = [f"{dtype}[{dims}]" for dtype, dims in _ARRAY.findall(i.shape)]
    if i.opcode == "custom-call" and len(arrays) > 1:
        arrays = [a for a in arrays if not a.startswith(("s8[", "u8["))]
    if i.opcode.endswith("-start") and len(arrays) > 1:  # a tuple of operands and results, perhaps with a context
        arrays = arrays[1:2]
    return sum(map(shape_bytes, arrays))


def _transfer_kind(i: Instruction, computations: Computations) -> str:
    if i.kind in COLLECTIVES:
        return "collectives"
    inside = computations.get(i.called("calls"), []) if i.opcode == "fusion" else [i]
    if any("fmha" in j.attributes for j in inside if j.opcode == "custom-call"):
        return "attention"
    nested = [k for j in inside if j.opcode == "fusion" for k in computations.get(j.called("calls"), [])]
    return "products" if any(j.product for j in [*inside, *nested]) else "other"


# Products and collectives


def _count(i: Instruction, operands: list[str], times: int, devices: int, program: Program, again: bool) -> None:
    """Add one instruction, executed so many times, to the totals; `operands`: shapes; `again`: it repeats another."""
    if i.kind in COLLECTIVES:
        group = _group(i.attributes, devices)
        size = sum(map(shape_bytes, operands)) * (len(group) if i.kind == "all-gather" else 1)
        if len(group) > 1:
            program.collectives.append(Collective(i.kind, size, times, group))
    if i.opcode == "custom-call":
        program.kernels[i.target or "?"] += times
    if i.product:
        flops = times * (_convolution_flops(i, operands) if i.opcode == "convolution" else _dot_flops(i, operands))
        types = [found[1] for shape in operands[:2] if (found := _ARRAY.search(shape))]
        program.product_flops += flops
        program.update_flops += 0 if "jvp(" in i.attributes else flops
        program.recomputed_flops += flops if again or "rematted_computation" in i.attributes else 0
        program.product_types[" x ".join(types)] += int(flops)
    elif "fmha" in i.target:
        program.attention_flops += times * _attention_flops(i)
    elif i.target and (cost := re.search(r'cost_estimate"?:\s?\{[^}]*?"?flops"?:\s?"?(\d+)', i.attributes)):
        program.attention_flops += times * int(cost[1])


def _dot_flops(i: Instruction, operands: list[str]) -> float:
    found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d," ]*)', i.attributes)
    contracted = [int(d) for d in re.findall(r"\d+", found[1])] if found else []
    lhs = _dims(operands[0])
    return 2.0 * math.prod(_dims(i.shape)) * math.prod(lhs[d] for d in contracted)


def _convolution_flops(i: Instruction, operands: list[str]) -> float:
    """FLOPs of a product that the TPU compiler writes as a convolution.

    Batch axes are padded or dilated windows there: only positions where the window meets data count.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels:
        return 0.0
    shapes = (*map(_dims, operands[:2]), _dims(i.shape))
    lhs, rhs, out = (dict(zip(axes, dims, strict=True)) for axes, dims in zip(labels.groups(), shapes, strict=True))
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1] if window else ""))
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    pairs = 1
    for axis in (a for a in lhs if a.isdigit()):
        own = {name: text.split("x")[int(axis)] for name, text in fields.items()}
        pad = int(own.get("pad", "0_0").split("_")[0])
        stride, dilation, spacing = (int(own.get(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        place = np.arange(out[axis])[:, None] * stride + np.arange(rhs[axis]) * spacing - pad
        pairs *= int(((place >= 0) & (place % dilation == 0) & (place // dilation < lhs[axis])).sum())
    return 2.0 * pairs * lhs["b"] * rhs["o"] * rhs["i"] / (int(groups[1]) if groups else 1)


def _attention_flops(i: Instruction) -> float:
    """Two products forward, four more backward (recomputed scores do not count, as in model FLOPs)."""
    config = json.loads(i.attributes.split("backend_config=", 1)[1])["cudnn_fmha_backend_config"]
    batch, heads, queries, keys = (int(d) for d in config["intermediate_tensor_shape"]["dimensions"])
    window = config.get("sliding_window_length") or keys
    width = math.prod(_dims(i.shape)) // (batch * heads * queries)
    return (4 if "Backward" in i.target else 2) * 2.0 * batch * heads * queries * min(window, keys) * width


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of devices of a collective, in any of the notations of XLA."""
    if "source_target_pairs" in attributes:
        found = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
        return (int(found[1]), int(found[2])) if found and found[1] != found[2] else (0,)
    text = attributes.split("replica_groups=", 1)[-1]
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return _split(listed[1])
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(devices).reshape(_split(iota[3]))
        ids = ids.transpose(_split(iota[4])) if iota[4] else ids
        return tuple(ids.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if mesh := re.match(r"@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        named = re.findall(r"'(\w+)'", mesh[2])
        return tuple(ids[tuple(slice(None) if name in named else 0 for name in sizes)].reshape(-1).tolist())
    return tuple(range(devices))
