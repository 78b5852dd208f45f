"""The bytes that the kernels of a compiled program read and write, from its text (train/hlo.py)."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict

from train.hlo import ARRAY, COLLECTIVES, Computation, Instruction, Program, dims, shape_bytes

# Instructions that move nothing: names for existing arrays, and those whose bodies are counted instead
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
        "async-start", "optimization-barrier", "partition-id", "replica-id", "add-dependency"}  # fmt: skip
CUTS = ("slice", "dynamic-slice", "gather")  # they read of their first operand what they return
PUTS = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand they write, into the first one


def target_of(i: Instruction) -> str:
    """Return the target of a custom call; "" of anything else."""
    match = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    return match[1] if match else ""


def is_product(i: Instruction) -> bool:
    """Return whether it is a matrix product, ours or a library's."""
    return i.opcode in ("dot", "convolution") or target_of(i).startswith(("__cublas$", "__onednn$matmul"))


def bytes_by_kind(program: Program) -> Counter[str]:
    """Return the bytes that kernels read and write in a step, as if no cache held any.

    Kinds: "products", "attention", "collectives" and "other".
    """
    total: Counter[str] = Counter()
    for computation, times, fused, _ in program.walk():
        beside = {i.name: i for i in computation}
        for i in [] if fused else computation:  # inside a fusion nothing is written to memory
            total[_kind(program, i)] += round(times * bytes_moved(program, i, beside))
    return total


def bytes_moved(program: Program, i: Instruction, beside: dict[str, Instruction]) -> float:
    """Return the bytes that one execution reads and writes; `beside`: the instructions of its computation.

    An operand of which a kernel reads a part (a slice, rows of a table) counts with that part. What is written in
    place (a slice of a loop's buffer, rows of a gradient) counts without the array around it.
    """
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0.0
    inside = program.computations.get(i.called("calls"), []) if i.opcode == "fusion" else []
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


def _kind(program: Program, i: Instruction) -> str:
    if i.opcode.removesuffix("-start") in COLLECTIVES:
        return "collectives"
    inside = program.computations.get(i.called("calls"), []) if i.opcode == "fusion" else [i]
    if any("fmha" in j.attributes for j in inside if j.opcode == "custom-call"):
        return "attention"
    nested = [k for j in inside if j.opcode == "fusion" for k in program.computations.get(j.called("calls"), [])]
    return "products" if any(is_product(j) for j in [*inside, *nested]) else "other"


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


def elements(shape: str) -> int:
    """Return the elements of every array in a shape's text."""
    return sum(math.prod(dims(text)) for _, text in ARRAY.findall(shape))
