"""What a compiled training step does: python -m bench.hlo --tier d20 --target h100:8 [--set K=V]

Products by operand type, recomputation, kernels, bytes moved and the time that follows, read from the text of the
optimized program (train/hlo.py). Numbers are per device. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
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
from train.compiled import compile_step, rows_and_accumulation
from train.hlo import ARRAY, ITEM_BYTES, Collective, Computation, Instruction, Program, dims
from train.plan import ATTENTION_SHARE, BANDWIDTH_SHARE, PRODUCT_SHARE
from train.targets import Target, parse_target, target_devices


@dataclass
class Totals:
    """Totals of one execution of the entry computation on one device."""

    product_flops: float = 0.0  # matrix products; 2 per multiply-add
    attention_flops: float = 0.0  # of fused attention kernels; windows count with their length, the causal half whole
    product_types: Counter[str] = field(default_factory=Counter)  # operand types -> FLOPs
    collectives: list[Collective] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)  # custom calls by target -> executions
    buffers: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # (type, shape) in memory, largest first
    update_flops: float = 0.0  # of `product_flops`, those outside the differentiated part: the optimizer's
    recomputed_flops: float = 0.0  # of `product_flops`, repeated to save memory: by `jax.checkpoint` or by XLA itself
    bytes: Counter[str] = field(default_factory=Counter)  # moved, by kind
    unknown_loops: int = 0  # loops whose trip count the text does not tell; counted once

    @property
    def flops(self) -> float:
        return self.product_flops + self.attention_flops

    @property
    def recomputed_share(self) -> float:
        """Share of the FLOPs that the step needs."""
        return self.recomputed_flops / max(self.flops - self.recomputed_flops, 1.0)


def analyse(text: str, devices: int = 1) -> Totals:
    """Return the `Totals` of an optimized HLO module's text, for a mesh of so many devices."""
    program, shapes = Program(text), set[tuple[str, str]]()
    totals = Totals(collectives=program.collectives(devices), bytes=program.bytes_by_kind)
    repeats = {name for computation in program.computations.values() for name in _repeats(computation)}
    for computation, times, fused, path in program.walk():
        by_name = {i.name: i for i in computation}
        for i in computation:
            totals.unknown_loops += i.opcode == "while" and program.trip_count(i) is None
            operands = [by_name[name].shape for name in i.operands if name in by_name]
            _count(i, operands, times, totals, not repeats.isdisjoint((*path, i.name)))
            shapes.update([] if fused else ARRAY.findall(i.shape))
    buffers = {(dtype, dims(size)) for dtype, size in shapes}
    item = ITEM_BYTES | {dtype: 1 for dtype, _ in buffers if dtype.startswith("f8")}
    totals.buffers = sorted(buffers, key=lambda b: (-item.get(b[0], 0) * math.prod(b[1]), b))
    return totals


def _repeats(computation: Computation) -> set[str]:
    """Instructions that XLA copied to compute again instead of keeping a result: `x.remat`, beside `x`."""
    seen: set[str] = set()
    repeats = set()
    for i in computation:
        origin = i.name.split(".remat")[0]
        if origin in seen and ".remat" in i.name:
            repeats.add(i.name)
        seen.add(origin)
    return repeats


def array_dims(shape: str) -> tuple[int, ...]:
    """Return the axes of the first array in a shape's text."""
    match = ARRAY.search(shape)
    return dims(match[2]) if match else ()


# Products


def _count(i: Instruction, operands: list[str], times: int, totals: Totals, again: bool) -> None:
    """Add one instruction, executed so many times, to the totals; `operands`: shapes; `again`: it repeats another."""
    if i.opcode == "custom-call":
        totals.kernels[i.target or "?"] += times
    if i.is_product:
        flops = times * (_convolution_flops(i, operands) if i.opcode == "convolution" else _dot_flops(i, operands))
        types = [found[1] for shape in operands[:2] if (found := ARRAY.search(shape))]
        totals.product_flops += flops
        totals.update_flops += 0 if "jvp(" in i.attributes else flops
        totals.recomputed_flops += flops if again or "rematted_computation" in i.attributes else 0
        totals.product_types[" x ".join(types)] += int(flops)
    elif "fmha" in i.target:
        totals.attention_flops += times * _attention_flops(i)
    elif i.target and (cost := re.search(r'cost_estimate"?:\s?\{[^}]*?"?flops"?:\s?"?(\d+)', i.attributes)):
        totals.attention_flops += times * int(cost[1])


def _dot_flops(i: Instruction, operands: list[str]) -> float:
    found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d," ]*)', i.attributes)
    contracted = [int(d) for d in re.findall(r"\d+", found[1])] if found else []
    lhs = array_dims(operands[0])
    return 2.0 * math.prod(array_dims(i.shape)) * math.prod(lhs[d] for d in contracted)


def _convolution_flops(i: Instruction, operands: list[str]) -> float:
    """FLOPs of a product that the TPU compiler writes as a convolution.

    Batch axes are padded or dilated windows there: only positions where the window meets data count.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels:
        return 0.0
    shapes = (*map(array_dims, operands[:2]), array_dims(i.shape))
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
    width = math.prod(array_dims(i.shape)) // (batch * heads * queries)
    return (4 if "Backward" in i.target else 2) * 2.0 * batch * heads * queries * min(window, keys) * width


# The command


def step_seconds(target: Target, totals: Totals) -> dict[str, float]:
    """Return the seconds of a compiled step without its collectives, by what takes them; {} except for CUDA.

    Products and attention at the rates above, the bytes of everything else at the bandwidth, one after the other. A TPU
    keeps arrays on the chip that the text does not tell apart, a CPU in its caches.
    """
    chip = target.chip
    if chip.platform != "cuda":
        return {}
    fp8 = sum(flops for types, flops in totals.product_types.items() if "f8" in types)
    return {
        "products": (totals.product_flops - fp8 / 2) / (PRODUCT_SHARE * chip.peak),  # 8-bit ones run twice as fast
        "attention": totals.attention_flops / (ATTENTION_SHARE * chip.peak),
        "other": totals.bytes["other"] / (BANDWIDTH_SHARE * chip.memory_rate),
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
    totals = analyse(step.text, mesh.size)
    formula = flops_per_token(config.model) * config.train.batch_tokens / mesh.size
    parts = step_seconds(target, totals)
    return {
        "tier": config.tier,
        "target": target.text,
        "rows": rows,
        "grad_accum": accumulate,
        "peak_bytes": step.peak,
        "compile_seconds": round(step.seconds, 1),
        "flops": totals.flops,
        "flops_of_formula": round(totals.flops / formula, 4),
        "product_flops": dict(totals.product_types) | {"attention kernels": totals.attention_flops},
        "update_flops_share": round(totals.update_flops / max(totals.flops, 1), 5),
        "recomputed_flops_share": round(totals.recomputed_share, 5),
        "kernels": dict(totals.kernels),
        "largest_buffers": [f"{dtype}{list(shape)}" for dtype, shape in totals.buffers[:4]],
        "float32_logits": full_logits(config, totals.buffers, rows * config.model.seq_len, mesh.shape["tensor"]),
        "bytes": dict(totals.bytes),
        "sent_bytes": sum(c.count * c.sent_bytes for c in totals.collectives),
        "seconds": parts,
        "mfu": round(formula / (target.chip.peak * sum(parts.values())), 4) if parts else None,
        "loops_of_unknown_length": totals.unknown_loops,
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
