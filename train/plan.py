"""`--plan`: what a run would need, before anyone pays for it.

The train step and the decode step are compiled for the target (`compiled.py`), and their memory, products and
collectives read from the program (`hlo.py`). Where the target's compiler is missing, arithmetic on the configuration
answers (`"method": "analytic"`). Every assumption travels with the result.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

from jaxchat.config import Config
from jaxchat.log import say, waiting
from jaxchat.model.layout import padded_vocab
from jaxchat.model.sizes import activation_bytes, count_parameters, decode_bytes_per_step, flops_per_token
from train.disk import disk_parts
from train.plan_table import show
from train.targets import (
    ATTENTION_SHARE,
    BANDWIDTH_SHARE,
    GPUS_PER_HOST,
    MEMORY_FRACTION,
    PRICES_OF,
    PRODUCT_SHARE,
    NoCompiler,
    Target,
    parse_target,
    target_devices,
)

# Share of the activations that each `train.remat` keeps in bfloat16, from the tiers compiled for H100s; in float32
# "none" keeps all of them
KEPT = {"none": 0.43, "names": 0.43, "dots": 0.4, "full": 0.05}


def plan(config: Config, target: str, as_json: bool) -> dict[str, Any]:
    """Print the plan of a resolved configuration on a target, and return it; nothing is trained."""
    where = parse_target(target)
    try:
        result = compile_plan(config, where)
    except NoCompiler as missing:
        say(f"{missing}; this is the analytic estimate")
        result = estimate(config, where)
    result |= disk(config)
    if as_json:
        print(json.dumps(result))
    else:
        show(result)
    return result


def disk(config: Config) -> dict[str, Any]:
    """Return the disk of a run, in all and by part."""
    parts = {part.name: part.bytes for part in disk_parts(config)}
    return {"disk_bytes": sum(parts.values()), "disk": parts}


def estimate(config: Config, target: Target | str) -> dict[str, Any]:
    """The contract's object from arithmetic alone, for pure data parallelism."""
    target = parse_target(target) if isinstance(target, str) else target
    count, chip = count_parameters(config.model), target.chip
    item = 4 if chip.platform == "cpu" else 2
    per_device = max(1, config.train.batch_tokens // config.model.seq_len // target.devices)
    rows = max(n for n in range(1, per_device + 1) if per_device % n == 0 and n <= config.train.device_batch_rows)
    # masters and gradients in float32, Muon's one moment and Adam's two, all shared by the devices; the cast copy whole
    adam = count.total - (count.trunk if config.optim.kind == "muon" else 0)
    arguments = (4 * (2 * count.total - adam) + 4 * 2 * adam) // target.devices
    kept = 1.0 if item == 4 and config.train.remat == "none" else KEPT[config.train.remat]
    activations = round(kept * activation_bytes(config.model, rows, item))
    temporary = 4 * count.total // target.devices + item * count.total + activations
    collectives = {}
    if target.devices > 1:
        collectives = {
            "all-gather": {"count": 1, "bytes": item * count.total},
            "reduce-scatter": {"count": per_device // rows, "bytes": item * count.total * (per_device // rows)},
        }
    sent = sum(c["bytes"] for c in collectives.values())
    return (
        _result(config, target, rows, per_device // rows)
        | _money(config, target, sent / _slowest_rate(target))
        | {
            "fits": arguments + temporary < MEMORY_FRACTION * chip.device_bytes,
            "peak_bytes_per_device": arguments + temporary,
            "argument_bytes": arguments,
            "temp_bytes": temporary,
            "collectives": collectives,
            "compile_seconds": None,
            "method": "analytic",
        }
    )


def compile_plan(config: Config, target: Target, search: bool = True) -> dict[str, Any]:
    """The contract's object from the compiled steps. Raises `NoCompiler`, and `UsageError` for what cannot be."""
    from jaxchat.mesh import make_mesh
    from train import compiled

    begin = time.perf_counter()
    mesh = make_mesh(config.mesh, target_devices(target))
    rows, accumulate = compiled.rows_and_accumulation(config, mesh)
    steps: dict[int, compiled.Step] = {}

    def compiled_with(n: int) -> compiled.Step:
        if n not in steps:
            times = rows * accumulate // n
            of = f"{n} rows a device x {times} micro-batches"
            with waiting(f"compiling the step of {config.tier} for {target.text}: {of}"):
                steps[n] = compiled.compile_step(config, mesh, n, times, read=True)
        return steps[n]

    step = compiled_with(rows)
    memory, program_rows = step.memory, rows
    extra: dict[str, Any] = {"mesh": dict(mesh.shape)}
    if search:
        largest = compiled.largest_rows(config, mesh, target.chip.device_bytes, lambda n: compiled_with(n).memory.peak)
        extra |= {"largest_device_batch_rows": largest, "by_rows": {n: _brief(steps[n]) for n in sorted(steps)}}
        if step.program is None and largest:  # refused for its memory: what it would do is read where it fits
            program_rows = largest
        elif step.program:
            extra["activation_bytes_per_row"] = compiled.activation_bytes_per_row(
                config, mesh, rows, accumulate, memory
            )
        with waiting(f"compiling the decode step of {config.serve.slots} slots"):
            extra["decode"] = _decode(config, target, compiled.compile_decode(config, mesh, config.serve.slots))
    result = (
        _result(config, target, rows, accumulate)
        | _money(config, target, 0.0)
        | {
            "fits": memory.peak <= MEMORY_FRACTION * target.chip.device_bytes,
            "peak_bytes_per_device": memory.peak,
            "argument_bytes": memory.arguments,
            "temp_bytes": memory.temp,
            "collectives": {},
            "compile_seconds": step.seconds,
            "method": "compiled",
            "memory": memory.parts | {"temporaries": memory.temp, "code": memory.code},
        }
    )
    if steps[program_rows].program:
        result |= _program(config, target, steps[program_rows], program_rows, mesh.shape["tensor"])
    return result | extra | {"plan_seconds": time.perf_counter() - begin}


def _brief(step: Any) -> dict[str, Any]:
    again = step.program.recomputed_share if step.program else None
    return {"peak_bytes": step.memory.peak, "recomputed_flops_share": again, "compile_seconds": step.seconds}


def _program(config: Config, target: Target, step: Any, rows: int, tensor: int) -> dict[str, Any]:
    """What the compiled program does, and the time that follows."""
    program = step.program
    again = program.recomputed_share
    seconds = sum(c.count * c.sent_bytes / _rate(target, c.group) for c in program.collectives)
    sent = sum(c.count * c.sent_bytes for c in program.collectives)
    logits = _full_logits(config, program.buffers, rows * config.model.seq_len, tensor)
    parts = step_seconds(target, program)
    return (
        _money(config, target, seconds, again, sum(parts.values()))
        | _moved(target, program, parts)
        | {
            "program_rows": rows,
            "collectives": program.by_kind(),
            "collective_sent_bytes_per_device": sent,
            "flops_per_step_per_device": program.flops,
            "product_flops": dict(program.product_types) | {"attention kernels": program.attention_flops},
            "update_flops_share": program.update_flops / max(program.flops, 1),
            "recomputed_flops_share": again,
            "kernels": dict(program.kernels),
            "largest_buffers": [f"{dtype}{list(shape)}" for dtype, shape in program.buffers[:4]],
            "float32_logits": logits,
            "optimal_seconds": step.optimal_seconds,
            "loops_of_unknown_length": program.unknown_loops,
        }
    )


def step_seconds(target: Target, program: Any) -> dict[str, float]:
    """Seconds of a compiled step without its collectives, by what takes them; {} where the model does not hold.

    Products and attention at the rates of `targets.py`, the bytes of everything else at the bandwidth, one after the
    other. Only for CUDA: a TPU keeps arrays on the chip that the text does not tell apart, a CPU in its caches.
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


def _moved(target: Target, program: Any, seconds: dict[str, float]) -> dict[str, Any]:
    """Bytes moved a step, and the time that they take at the device's bandwidth."""
    if not seconds:
        return {}
    total = program.bytes_moved()
    return {
        "bytes_per_step_per_device": total,
        "bytes_by_kind": {
            kind: program.bytes_moved(kind) for kind in ("products", "attention", "collectives", "other")
        },
        "memory_seconds": total / target.chip.memory_rate,
        "seconds_by_kind": seconds,
    }


def _full_logits(config: Config, buffers: Any, tokens: int, tensor: int) -> list[str]:
    """Float32 arrays (..., V) as large as a micro-batch's logits; partial sums of a gradient (..., D, V) are none."""
    vocab, found = padded_vocab(config.model) // tensor, []
    for dtype, shape in buffers:
        weight = shape[-2:-1] == (config.model.width,) != (config.model.seq_len,)
        if dtype == "f32" and shape[-1:] == (vocab,) and math.prod(shape) >= tokens * vocab and not weight:
            found.append(str(list(shape)))
    return found


def _decode(config: Config, target: Target, step: Any) -> dict[str, Any]:
    """Memory of serving on one device, and the bandwidth's limit on speed."""
    slots, memory, item = config.serve.slots, step.memory, 4 if target.chip.platform == "cpu" else 2
    least = decode_bytes_per_step(config.model, slots, config.model.seq_len, item)
    return {
        "slots": slots,
        "context": config.model.seq_len,
        "peak_bytes": memory.peak,
        "weight_bytes": memory.parts.get("weights", 0),
        "cache_bytes": memory.parts.get("cache", 0),
        "temp_bytes": memory.temp,
        "fits": memory.peak <= MEMORY_FRACTION * target.chip.device_bytes,
        "tokens_per_second_limit": slots * target.chip.memory_rate / least,
        "compile_seconds": step.seconds,
    }


def _result(config: Config, target: Target, rows: int, accumulate: int) -> dict[str, Any]:
    """What is known without any compiler."""
    tokens = config.train.steps * config.train.batch_tokens
    return {
        "tier": config.tier,
        "target": target.text,
        "devices": target.devices,
        "depth": config.model.depth,
        "params": count_parameters(config.model).total,
        "tokens": tokens,
        "steps": config.train.steps,
        "flops_total": flops_per_token(config.model) * tokens,
        "flops_per_token": flops_per_token(config.model),
        "device_bytes": target.chip.device_bytes,
        "device_batch_rows": rows,
        "grad_accum": accumulate,
    }


def _money(
    config: Config, target: Target, collective_seconds: float, again: float = 0.0, compute: float = 0.0
) -> dict[str, Any]:
    """Time and cost of the run. `compute`: seconds of a compiled step; without, products (and the share `again`
    recomputed) at the MFU that is assumed for such devices."""
    chip = target.chip
    flops = flops_per_token(config.model) * config.train.batch_tokens / target.devices
    derived = compute > 0
    compute = compute if derived else flops * (1 + again) / (chip.peak * chip.mfu)
    hours = (compute + collective_seconds) * config.train.steps / 3600
    how = (
        f"products at {PRODUCT_SHARE:.0%} and attention at {ATTENTION_SHARE:.0%} of the peak, the bytes of the rest at "
        f"{BANDWIDTH_SHARE:.0%} of the bandwidth, then collectives"
        if derived
        else "products, recomputed ones too, at the assumed MFU, then collectives"
    )
    return {
        "step_seconds_estimate": compute + collective_seconds,
        "compute_seconds_estimate": compute,
        "collective_seconds_estimate": collective_seconds,
        "hours_estimate": hours,
        "usd_estimate": hours * target.devices * chip.price,
        "mfu_assumed": flops / (chip.peak * compute) if derived else chip.mfu,
        "assumptions": {
            "peak_flops": chip.peak,
            "link_bytes_per_second": chip.link_rate,
            "network_bytes_per_second": chip.network_rate,
            "memory_bytes_per_second": chip.memory_rate,
            "memory_fraction": MEMORY_FRACTION,
            "usd_per_device_hour": chip.price,
            "prices": PRICES_OF,
            "sources": chip.sources,
            "time": f"{how}, nothing overlapped; without evaluation, checkpoints and fine-tuning",
        },
    }


def _rate(target: Target, group: tuple[int, ...]) -> float:
    """Bytes/s that a device of a collective's group sends at: its links, or, where the group spans hosts, the network
    cards of all its members in one host together."""
    if not target.chip.gpu:
        return target.chip.link_rate
    hosts = {device // GPUS_PER_HOST for device in group}
    if len(hosts) == 1:
        return target.chip.link_rate
    return min(target.chip.link_rate, target.chip.network_rate * len(group) / len(hosts))


def _slowest_rate(target: Target) -> float:
    return _rate(target, tuple(range(target.devices)))
