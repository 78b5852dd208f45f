"""Read the text of a compiled program: its collectives, and the bytes that it moves.

XLA's own counts leave out loops (a `while` counts once) and are empty for a device that is not here, so the text is
walked from the entry with every loop's trip count multiplied in. A line is `name = shape opcode(operands), attributes`;
a shape is `bf16[8,128]{1,0}`, or a tuple of such. Numbers are per device.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8,
              "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z\d\-]*)\((.*)$")
CALLS = re.compile(r"(?:calls|to_apply|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)")
# Instructions that move nothing: names for existing arrays, and those whose bodies are counted instead
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
        "async-start", "optimization-barrier", "partition-id", "replica-id", "add-dependency"}  # fmt: skip
CUTS = ("slice", "dynamic-slice", "gather")  # they read of their first operand what they return
PUTS = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand they write, into the first one


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. A constant has its value as its operand."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str

    def called(self, name: str) -> str:
        """Return the computation that an attribute names; "" without it."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""

    @property
    def target(self) -> str:
        """The target of a custom call; "" of anything else."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product, ours or a library's."""
        return self.opcode in ("dot", "convolution") or self.target.startswith(("__cublas$", "__onednn$matmul"))


Computation = list[Instruction]


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


class Program:
    """The text of an optimized HLO module, parsed; `computations` by name."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = []
        for line in text.splitlines():
            if line[:1] not in (" ", "}") and (header := HEADER.match(line)):
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif match := INSTRUCTION.match(line):
                listed, _, attributes = match[4].partition("), ")
                operands = re.findall(r"%([\w.\-]+)", listed) or [listed.rstrip(")")]
                current.append(Instruction(match[1], match[2], match[3], operands, attributes))

    def walk(self) -> Iterator[tuple[Computation, int, bool, tuple[str, ...]]]:
        """Yield every computation that runs: (instructions, how often, inside a fusion, the callers' names)."""
        waiting: list[tuple[str, int, bool, tuple[str, ...]]] = [(self.entry, 1, False, ())] if self.entry else []
        while waiting:
            name, times, fused, path = waiting.pop()
            computation = self.computations[name]
            yield computation, times, fused, path
            for i in computation:
                if i.opcode == "while":
                    waiting.append((i.called("body"), times * (self.trip_count(i) or 1), fused, (*path, i.name)))
                elif i.opcode in ("fusion", "async-start", "call", "conditional"):
                    inside = [c.strip(" %") for group in CALLS.findall(i.attributes) for c in group.split(",")]
                    waiting += [(c, times, fused or i.opcode == "fusion", (*path, i.name)) for c in inside if c]

    def trip_count(self, i: Instruction) -> int | None:
        """Return how often a `while` runs: what XLA noted, or its counter's bound (from 0, by 1: a scan), or None."""
        if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes):
            return int(noted[1])
        condition = self.computations.get(i.called("condition"), [])
        bounds = [c for c in condition if c.opcode == "constant" and c.shape.startswith(("s32[]", "u32[]", "s64[]"))]
        compared = any(c.opcode == "fusion" or "direction=LT" in c.attributes for c in condition)
        return int(bounds[0].operands[0]) if len(bounds) == 1 and compared else None

    def collectives(self, devices: int) -> list[Collective]:
        """Return the collectives of a program for so many devices; those within one device are none."""
        result = []
        for computation, times, _, _ in self.walk():
            shapes = {i.name: i.shape for i in computation}
            for i in computation:
                kind = i.opcode.removesuffix("-start")
                if kind in COLLECTIVES and len(group := device_group(i.attributes, devices)) > 1:
                    size = sum(shape_bytes(shapes.get(operand, "")) for operand in i.operands)
                    size *= len(group) if kind == "all-gather" else 1
                    result.append(Collective(kind, size, times, group))
        return result

    @functools.cached_property
    def bytes_by_kind(self) -> Counter[str]:
        """The bytes that kernels read and write in a step, as if no cache held any.

        Kinds: "products", "attention", "collectives" and "other".
        """
        total: Counter[str] = Counter()
        for computation, times, fused, _ in self.walk():
            beside = {i.name: i for i in computation}
            for i in [] if fused else computation:  # inside a fusion nothing is written to memory
                total[self._kind(i)] += round(times * self.bytes_moved(i, beside))
        return total

    def bytes_moved(self, i: Instruction, beside: dict[str, Instruction]) -> float:
        """Return the bytes that one execution reads and writes; `beside`: the instructions of its computation.

        An operand of which a kernel reads a part (a slice, rows of a table) counts with that part. What is written in
        place (a slice of a loop's buffer, rows of a gradient) counts without the array around it.
        """
        if i.opcode in FREE or i.opcode.endswith("-done"):
            return 0.0
        inside = self.computations.get(i.called("calls"), []) if i.opcode == "fusion" else []
        if not inside:  # one instruction alone: a fusion of itself
            operands = enumerate(beside.get(name) for name in i.operands)
            inside = [Instruction(f"{i.name}.{k}", o.shape, "parameter", [str(k)], "") for k, o in operands if o]
            inside.append(Instruction(i.name, i.shape, i.opcode, [p.name for p in inside], i.attributes))
        written, reads = _fusion_bytes(inside)
        by_operand: dict[str, float] = defaultdict(float)  # one that is named twice is read once
        for k, size in reads.items():
            by_operand[i.operands[k]] += size
        for name, size in by_operand.items():
            written += min(size, shape_bytes(beside[name].shape)) if name in beside else size
        return written

    def _kind(self, i: Instruction) -> str:
        if i.opcode.removesuffix("-start") in COLLECTIVES:
            return "collectives"
        inside = self.computations.get(i.called("calls"), []) if i.opcode == "fusion" else [i]
        if any("fmha" in j.attributes for j in inside if j.opcode == "custom-call"):
            return "attention"
        nested = [k for j in inside if j.opcode == "fusion" for k in self.computations.get(j.called("calls"), [])]
        return "products" if any(j.is_product for j in [*inside, *nested]) else "other"


def _fusion_bytes(inside: Computation) -> tuple[float, dict[int, float]]:
    """Return (bytes written, bytes read of every parameter) of a fusion, from its instructions, the root the last.

    Goes backwards: how many elements of each value do its users need?
    """
    named, root = {i.name: i for i in inside}, inside[-1]

    def source(i: Instruction) -> Instruction:
        while i.opcode == "bitcast" and i.operands[0] in named:
            i = named[i.operands[0]]
        return i

    needed: dict[str, float] = defaultdict(float)
    written, in_place = 0.0, set()
    for output in [named[o] for o in root.operands] if root.opcode == "tuple" else [root]:
        origin = source(output)
        if origin.opcode in PUTS and source(named[origin.operands[0]]).opcode == "parameter":
            in_place.add(origin.name)
            written += shape_bytes(named[origin.operands[PUTS[origin.opcode]]].shape)
        elif origin.opcode != "parameter" or origin is root:
            written += _result_bytes(output)
        needed[output.name] = elements(output.shape)
    reads: dict[int, float] = {}
    for i in reversed(inside):
        size = elements(i.shape)
        share = min(needed[i.name] / size, 1.0) if size else 1.0
        if i.opcode == "parameter":
            reads[int(i.operands[0])] = share * shape_bytes(i.shape)
        for k, operand in enumerate(named[o] for o in i.operands if o in named):
            if i.opcode in CUTS and k == 0:
                needed[operand.name] += share * size
            elif i.name in in_place and k == 0:  # sums read what they add to
                needed[operand.name] += elements(named[i.operands[2]].shape) if i.opcode == "scatter" else 0
            elif i.opcode != "tuple":
                needed[operand.name] += share * elements(operand.shape)
    return written, reads


def _result_bytes(i: Instruction) -> int:
    """Return the bytes of an instruction's results, without a library kernel's workspace (bytes beside its results)."""
    arrays = [f"{dtype}[{dims}]" for dtype, dims in ARRAY.findall(i.shape)]
    if i.opcode == "custom-call" and len(arrays) > 1:
        arrays = [a for a in arrays if not a.startswith(("s8[", "u8["))]
    if i.opcode.endswith("-start") and len(arrays) > 1:  # a tuple of operands and results, perhaps with a context
        arrays = arrays[1:2]
    return sum(map(shape_bytes, arrays))


def dims(text: str) -> tuple[int, ...]:
    """Return the numbers of a list: "8,128"."""
    return tuple(int(d) for d in text.split(",") if d)


def elements(shape: str) -> int:
    """Return the elements of every array in a shape's text."""
    return sum(math.prod(dims(text)) for _, text in ARRAY.findall(shape))


def shape_bytes(shape: str) -> int:
    """Return the bytes of every array in a shape's text; types that are no data (tokens) count nothing."""
    sizes = ((dtype, math.prod(dims(text))) for dtype, text in ARRAY.findall(shape))
    return math.ceil(sum(ITEM_BYTES.get(t, 1 if t.startswith("f8") else 0) * count for t, count in sizes))


def device_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Return the first group of devices of a collective, in any of the notations of XLA."""
    if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return tuple(dict.fromkeys((int(pair[1]), int(pair[2]))))
    text = attributes.split("replica_groups=", 1)[-1]
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return dims(listed[1])
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(devices).reshape(dims(iota[3]))
        ids = ids.transpose(dims(iota[4])) if iota[4] else ids
        return tuple(ids.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if mesh := re.match(r"@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        named = re.findall(r"'(\w+)'", mesh[2])
        return tuple(ids[tuple(slice(None) if name in named else 0 for name in sizes)].reshape(-1).tolist())
    return tuple(range(devices))
