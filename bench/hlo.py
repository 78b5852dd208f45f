"""What a compiled training step does: python -m bench.hlo --tier d20 --target h100:8 [--set K=V]

Products by operand type, recomputation, kernels, bytes moved and the time that follows, read from the text of the
optimized program. XLA's own counts leave out loops (a `while` counts once) and are empty for a GPU that is not here, so
the text is walked from the entry with every loop's trip count multiplied in. Numbers are per device. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxchat.config import Config, load_config
from jaxchat.errors import JaxchatError
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from jaxchat.sizes import flops_per_token, padded_vocab
from launch import prepare_plan
from train.compiled import (
    ARRAY,
    COLLECTIVES,
    HEADER,
    INSTRUCTION,
    ITEM_BYTES,
    Collective,
    collectives,
    compile_step,
    rows_and_accumulation,
    shape_bytes,
)
from train.targets import Target, parse_target, target_devices

# Of the peak that matrix products and attention kernels reach on an H100 or H200 (650 and 425 of 989 TFLOP/s), and of
# the data sheet's bandwidth that elementwise kernels do; measured on one H200: 770 to 800 TFLOP/s for one large product
# alone, 4.3 of 4.8 TB/s for a copy. They turn what a compiled program does into seconds.
PRODUCT_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.66, 0.43, 0.8
# Instructions that move nothing: names for existing arrays, and those whose bodies are counted instead
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
        "async-start", "optimization-barrier", "partition-id", "replica-id", "add-dependency"}  # fmt: skip
CUTS = ("slice", "dynamic-slice", "gather")  # they read of their first operand what they return
PUTS = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand they write, into the first one


CALLS = re.compile(r"(?:calls|to_apply|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)")


@dataclass(frozen=True)
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


Computations = dict[str, list[Instruction]]


def parse_hlo(text: str) -> tuple[Computations, str]:
    """Return (instructions of every computation, name of the entry) of an optimized HLO module's text."""
    computations: Computations = {}
    entry, current = "", list[Instruction]()
    for line in text.splitlines():
        if line[:1] not in (" ", "}") and (header := HEADER.match(line)):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := INSTRUCTION.match(line):
            given, _, attributes = found[4].partition("), ")
            operands = re.findall(r"%([\w.\-]+)", given) or [given.rstrip(")")]
            current.append(Instruction(found[1], found[2], found[3], operands, attributes))
    return computations, entry


def calls(i: Instruction) -> list[str]:
    """Return the computations that an instruction other than a loop runs."""
    return [name.strip(" %") for group in CALLS.findall(i.attributes) for name in group.split(",") if name.strip()]


def trip_count(i: Instruction, computations: Computations) -> int | None:
    """Return how often a `while` runs: what XLA noted, or the counter's bound (from 0, by 1: a scan); None: unknown."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes):
        return int(found[1])
    condition = computations.get(i.called("condition"), [])
    bounds = [c for c in condition if c.opcode == "constant" and c.shape.startswith(("s32[]", "u32[]", "s64[]"))]
    compared = any(c.opcode == "fusion" or "direction=LT" in c.attributes for c in condition)
    return int(bounds[0].operands[0]) if len(bounds) == 1 and compared else None


@dataclass
class Transfer:
    """What one instruction reads and writes, in bytes per device and execution."""

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


def analyse(text: str, devices: int = 1) -> Program:
    """Return the `Program` of an optimized HLO module's text, for a mesh of so many devices."""
    computations, entry = parse_hlo(text)
    program, shapes = Program(collectives=collectives(text, devices)), set[tuple[str, str]]()
    for computation, times, fused, again in _walk(computations, entry, program):
        by_name, repeats = {i.name: i for i in computation}, _repeats(computation)
        for i in computation:
            operands = [by_name[name].shape for name in i.operands if name in by_name]
            _count(i, operands, times, program, again or i.name in repeats)
            if not fused:  # inside a fusion nothing is written to memory
                shapes.update(ARRAY.findall(i.shape))
                if moved := bytes_moved(i, by_name, computations):
                    program.transfers.append(Transfer(_transfer_kind(i, computations), moved, times, i.name))
    buffers = {(dtype, _split(dims)) for dtype, dims in shapes}
    item = ITEM_BYTES | {dtype: 1 for dtype, _ in buffers if dtype.startswith("f8")}
    program.buffers = sorted(buffers, key=lambda b: (-item.get(b[0], 0) * math.prod(b[1]), b))
    return program


def is_product(i: Instruction) -> bool:
    """Return whether it is a matrix product, ours or a library's."""
    return i.opcode in ("dot", "convolution") or call_target(i).startswith(("__cublas$", "__onednn$matmul"))


def call_target(i: Instruction) -> str:
    """Return the target of a custom call; "" of anything else."""
    found = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    return found[1] if found else ""


def _split(dims: str) -> tuple[int, ...]:
    return tuple(int(d) for d in dims.split(",") if d)


def _dims(shape: str) -> tuple[int, ...]:
    found = ARRAY.search(shape)
    return _split(found[2]) if found else ()


def _elements(shape: str) -> int:
    return sum(math.prod(_split(dims)) for _, dims in ARRAY.findall(shape))


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
                trips = trip_count(i, computations)
                program.unknown_loops += trips is None
                waiting.append((i.called("body"), times * (trips or 1), fused, again))
            elif i.opcode in ("fusion", "async-start", "call", "conditional"):
                waiting += [(c, times, fused or i.opcode == "fusion", again or i.name in repeats) for c in calls(i)]


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
    arrays = [f"{dtype}[{dims}]" for dtype, dims in ARRAY.findall(i.shape)]
    if i.opcode == "custom-call" and len(arrays) > 1:
        arrays = [a for a in arrays if not a.startswith(("s8[", "u8["))]
    if i.opcode.endswith("-start") and len(arrays) > 1:  # a tuple of operands and results, perhaps with a context
        arrays = arrays[1:2]
    return sum(map(shape_bytes, arrays))


def _transfer_kind(i: Instruction, computations: Computations) -> str:
    if i.opcode.removesuffix("-start") in COLLECTIVES:
        return "collectives"
    inside = computations.get(i.called("calls"), []) if i.opcode == "fusion" else [i]
    if any("fmha" in j.attributes for j in inside if j.opcode == "custom-call"):
        return "attention"
    nested = [k for j in inside if j.opcode == "fusion" for k in computations.get(j.called("calls"), [])]
    return "products" if any(is_product(j) for j in [*inside, *nested]) else "other"


# Products


def _count(i: Instruction, operands: list[str], times: int, program: Program, again: bool) -> None:
    """Add one instruction, executed so many times, to the totals; `operands`: shapes; `again`: it repeats another."""
    if i.opcode == "custom-call":
        program.kernels[call_target(i) or "?"] += times
    if is_product(i):
        flops = times * (_convolution_flops(i, operands) if i.opcode == "convolution" else _dot_flops(i, operands))
        types = [found[1] for shape in operands[:2] if (found := ARRAY.search(shape))]
        program.product_flops += flops
        program.update_flops += 0 if "jvp(" in i.attributes else flops
        program.recomputed_flops += flops if again or "rematted_computation" in i.attributes else 0
        program.product_types[" x ".join(types)] += int(flops)
    elif "fmha" in call_target(i):
        program.attention_flops += times * _attention_flops(i)
    elif call_target(i) and (cost := re.search(r'cost_estimate"?:\s?\{[^}]*?"?flops"?:\s?"?(\d+)', i.attributes)):
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
    return (4 if "Backward" in call_target(i) else 2) * 2.0 * batch * heads * queries * min(window, keys) * width


# The command


def step_seconds(target: Target, program: Program) -> dict[str, float]:
    """Return the seconds of a compiled step without its collectives, by what takes them; {} except for CUDA.

    Products and attention at the rates above, the bytes of everything else at the bandwidth, one after the other. A TPU
    keeps arrays on the chip that the text does not tell apart, a CPU in its caches.
    """
    chip = target.chip
    if chip.platform != "cuda":
        return {}
    fp8 = sum(flops for types, flops in program.product_types.items() if "f8" in types)
    return {
        "products": (program.product_flops - fp8 / 2) / (PRODUCT_SHARE * chip.peak),  # 8-bit ones run twice as fast
        "attention": program.attention_flops / (ATTENTION_SHARE * chip.peak),
        "other": program.bytes_moved("other") / (BANDWIDTH_SHARE * chip.memory_rate),
    }


def full_logits(config: Config, buffers: Any, tokens: int, tensor: int) -> list[str]:
    """Return float32 arrays (..., V) as large as a micro-batch's logits; gradients (..., D, V) are none."""
    vocab, found = padded_vocab(config.model) // tensor, []
    for dtype, shape in buffers:
        weight = shape[-2:-1] == (config.model.width,) != (config.model.seq_len,)
        if dtype == "f32" and shape[-1:] == (vocab,) and math.prod(shape) >= tokens * vocab and not weight:
            found.append(str(list(shape)))
    return found


def measure(config: Config, target: Target) -> dict[str, Any]:
    """Return what the compiled step of a resolved configuration does on a target."""
    mesh = make_mesh(config.mesh, target_devices(target))
    rows, accumulate = rows_and_accumulation(config, mesh)
    step = compile_step(config, mesh, rows, accumulate)
    program = analyse(step.text, mesh.size)
    formula, parts = (
        flops_per_token(config.model) * config.train.batch_tokens / mesh.size,
        step_seconds(target, program),
    )
    return {
        "tier": config.tier,
        "target": target.text,
        "rows": rows,
        "grad_accum": accumulate,
        "peak_bytes": step.peak,
        "compile_seconds": round(step.seconds, 1),
        "flops": program.flops,
        "flops_of_formula": round(program.flops / formula, 4),
        "product_flops": dict(program.product_types) | {"attention kernels": program.attention_flops},
        "update_flops_share": round(program.update_flops / max(program.flops, 1), 5),
        "recomputed_flops_share": round(program.recomputed_share, 5),
        "kernels": dict(program.kernels),
        "largest_buffers": [f"{dtype}{list(shape)}" for dtype, shape in program.buffers[:4]],
        "float32_logits": full_logits(config, program.buffers, rows * config.model.seq_len, mesh.shape["tensor"]),
        "bytes": {k: program.bytes_moved(k) for k in ("products", "attention", "collectives", "other")},
        "sent_bytes": sum(c.count * c.sent_bytes for c in program.collectives),
        "seconds": parts,
        "mfu": round(formula / (target.chip.peak * sum(parts.values())), 4) if parts else None,
        "loops_of_unknown_length": program.unknown_loops,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="d20")
    parser.add_argument("--target", default="h100:8")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="any config key; may be repeated")
    args = parser.parse_args(argv)
    prepare_plan(args.target)
    if args.target != "auto":
        jax.config.update("jax_platforms", "cpu")  # it only compiles, and takes no GPU that may be here
    try:
        found = measure(resolve(load_config(args.tier, args.set)), parse_target(args.target))
    except JaxchatError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
