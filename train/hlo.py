"""Read the text of a compiled program: its computations, how often they run, and its collectives.

XLA's own counts leave out loops (a `while` counts once) and are empty for a device that is not here, so the text is
walked from the entry with every loop's trip count multiplied in. A line is `name = shape opcode(operands), attributes`;
a shape is `bf16[8,128]{1,0}`, or a tuple of such. Numbers are per device.
"""

from __future__ import annotations

import math
import re
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


def dims(text: str) -> tuple[int, ...]:
    """Return the numbers of a list: "8,128"."""
    return tuple(int(d) for d in text.split(",") if d)


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
