"""The command `plan`: what a run needs on a target; `--budget` and `--hours`: the deepest model that they buy.

The train step and the decode step are compiled for the target, and memory, products and collectives read from the
programs. Without the target's compiler arithmetic on the configuration answers (`"method": "analytic"`). Every
assumption is part of the result.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.console import Console

from jaxchat.config import Config, load_config, tier_files
from jaxchat.errors import UsageError
from jaxchat.log import print_facts, say, waiting
from jaxchat.scaling import resolve
from jaxchat.sizes import activation_bytes, count_parameters, decode_bytes_per_step, flops_per_token, padded_vocab

from .preflight import disk_parts, size_text
from .targets import (
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
DEPTHS = range(2, 49)  # that --budget and --hours try

Plan = dict[str, Any]  # the object that `--json` prints


def plan(config: Config, target: str, as_json: bool) -> Plan:
    """Print the plan of a resolved configuration on a target, and return it."""
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


def disk(config: Config) -> Plan:
    """Return the disk of a run, in all and by part."""
    parts = {part.name: part.bytes for part in disk_parts(config)}
    return {"disk_bytes": sum(parts.values()), "disk": parts}


def estimate(config: Config, target: Target | str) -> Plan:
    """Return the plan from arithmetic alone, for pure data parallelism."""
    target = parse_target(target) if isinstance(target, str) else target
    count, item = count_parameters(config.model), 4 if target.chip.platform == "cpu" else 2
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
    seconds = sum(c["bytes"] for c in collectives.values()) / _rate(target, tuple(range(target.devices)))
    return (
        _sizes(config, target, rows, per_device // rows)
        | _time_and_cost(config, target, seconds)
        | {
            "fits": arguments + temporary < MEMORY_FRACTION * target.chip.device_bytes,
            "peak_bytes_per_device": arguments + temporary,
            "argument_bytes": arguments,
            "temp_bytes": temporary,
            "collectives": collectives,
            "compile_seconds": None,
            "method": "analytic",
        }
    )


def compile_plan(config: Config, target: Target, search: bool = True) -> Plan:
    """Return the plan from the compiled steps; `search`: also the largest rows and the decode step.

    Raises `NoCompiler` without the target's compiler, `UsageError` for a mesh or batch that cannot be.
    """
    from jaxchat.sharding import make_mesh

    from . import compiled

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
    result = (
        _sizes(config, target, rows, accumulate)
        | _time_and_cost(config, target, 0.0)
        | {
            "fits": memory.peak <= MEMORY_FRACTION * target.chip.device_bytes,
            "peak_bytes_per_device": memory.peak,
            "argument_bytes": memory.arguments,
            "temp_bytes": memory.temp,
            "collectives": {},
            "compile_seconds": step.seconds,
            "method": "compiled",
            "mesh": dict(mesh.shape),
            "memory": memory.parts | {"temporaries": memory.temp, "code": memory.code},
        }
    )
    if search:
        largest = compiled.largest_rows(config, mesh, target.chip.device_bytes, lambda n: compiled_with(n).memory.peak)
        by_rows = {n: _tried(steps[n]) for n in sorted(steps)}
        result |= {"largest_device_batch_rows": largest, "by_rows": by_rows}
        if step.program is None and largest:  # refused for its memory: what it would do is read where it fits
            program_rows = largest
        elif step.program:
            per_row = compiled.activation_bytes_per_row(config, mesh, rows, accumulate, memory)
            result["activation_bytes_per_row"] = per_row
        with waiting(f"compiling the decode step of {config.serve.slots} slots"):
            result["decode"] = _decode(config, target, compiled.compile_decode(config, mesh, config.serve.slots))
    if steps[program_rows].program:
        result |= _program(config, target, steps[program_rows], program_rows, mesh.shape["tensor"])
    return result | {"plan_seconds": time.perf_counter() - begin}


def _tried(step: Any) -> dict[str, Any]:
    again = step.program.recomputed_share if step.program else None
    return {"peak_bytes": step.memory.peak, "recomputed_flops_share": again, "compile_seconds": step.seconds}


def _sizes(config: Config, target: Target, rows: int, accumulate: int) -> Plan:
    """Return the part of a plan that needs no compiler."""
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


def _program(config: Config, target: Target, step: Any, rows: int, tensor: int) -> Plan:
    """Return what the compiled program does, and the time that follows."""
    program = step.program
    again, parts = program.recomputed_share, step_seconds(target, program)
    seconds = sum(c.count * c.sent_bytes / _rate(target, c.group) for c in program.collectives)
    result = _time_and_cost(config, target, seconds, again, sum(parts.values())) | {
        "program_rows": rows,
        "collectives": program.by_kind(),
        "collective_sent_bytes_per_device": sum(c.count * c.sent_bytes for c in program.collectives),
        "flops_per_step_per_device": program.flops,
        "product_flops": dict(program.product_types) | {"attention kernels": program.attention_flops},
        "update_flops_share": program.update_flops / max(program.flops, 1),
        "recomputed_flops_share": again,
        "kernels": dict(program.kernels),
        "largest_buffers": [f"{dtype}{list(shape)}" for dtype, shape in program.buffers[:4]],
        "float32_logits": _full_logits(config, program.buffers, rows * config.model.seq_len, tensor),
        "optimal_seconds": step.optimal_seconds,
        "loops_of_unknown_length": program.unknown_loops,
    }
    if parts:
        kinds = ("products", "attention", "collectives", "other")
        result |= {
            "bytes_per_step_per_device": program.bytes_moved(),
            "bytes_by_kind": {kind: program.bytes_moved(kind) for kind in kinds},
            "memory_seconds": program.bytes_moved() / target.chip.memory_rate,
            "seconds_by_kind": parts,
        }
    return result


def step_seconds(target: Target, program: Any) -> dict[str, float]:
    """Return the seconds of a compiled step without its collectives, by what takes them; {} except for CUDA.

    Products and attention at the rates of `targets.py`, the bytes of everything else at the bandwidth, one after the
    other. A TPU keeps arrays on the chip that the text does not tell apart, a CPU in its caches.
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


def _full_logits(config: Config, buffers: Any, tokens: int, tensor: int) -> list[str]:
    """Float32 arrays (..., V) as large as a micro-batch's logits; partial sums of a gradient (..., D, V) are none."""
    vocab, found = padded_vocab(config.model) // tensor, []
    for dtype, shape in buffers:
        weight = shape[-2:-1] == (config.model.width,) != (config.model.seq_len,)
        if dtype == "f32" and shape[-1:] == (vocab,) and math.prod(shape) >= tokens * vocab and not weight:
            found.append(str(list(shape)))
    return found


def _decode(config: Config, target: Target, step: Any) -> Plan:
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


def _time_and_cost(
    config: Config, target: Target, collective_seconds: float, again: float = 0.0, compute: float = 0.0
) -> Plan:
    """Time and cost of the run.

    `compute`: seconds of a compiled step. Without it, products (and the share `again` recomputed) take the MFU that is
    assumed for such devices.
    """
    chip = target.chip
    flops = flops_per_token(config.model) * config.train.batch_tokens / target.devices
    derived = compute > 0
    compute = compute or flops * (1 + again) / (chip.peak * chip.mfu)
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
    """Bytes/s that a device of a collective's group sends at.

    Its links, or, where the group spans hosts, the network cards of all its members in one host together.
    """
    chip, hosts = target.chip, {device // GPUS_PER_HOST for device in group}
    if not chip.gpu or len(hosts) == 1:
        return chip.link_rate
    return min(chip.link_rate, chip.network_rate * len(group) / len(hosts))


# What money and time buy


def plan_budget(given: Config, target: str, budget: str | None, hours: float | None, as_json: bool) -> Plan:
    """Print and return the plan of the deepest model that both limits allow.

    Args:
      given: not resolved: every depth derives its own width, batch and steps.
      budget: `100usd`, or just the number.
    """
    where, usd = parse_target(target), None
    if budget is not None:
        amount = re.fullmatch(r"\$?(\d+(?:\.\d+)?)\s*(?:usd|\$)?", budget.strip().lower())
        if not amount or not float(amount[1]):
            raise UsageError(f"--budget {budget}: give an amount such as 100usd")
        usd = float(amount[1])
        if not where.chip.price:
            raise UsageError(f"--budget {budget}: {where.chip.name} has no price; give --hours, or another --target")
    limits = " and ".join(([f"{usd:g} USD"] if usd else []) + ([f"{hours:g} hours"] if hours else []))

    def within(result: Plan) -> bool:
        return result["hours_estimate"] <= (hours or math.inf) and result["usd_estimate"] <= (usd or math.inf)

    def affordable(config: Config) -> bool:
        result = estimate(_fitting(config, where), where)
        batch = config.train.batch_tokens // config.model.seq_len
        return within(result) and result["fits"] and batch % where.devices == 0

    depths = [config for depth in DEPTHS if (config := _at_depth(given, depth)) and affordable(config)]
    if not depths:
        least = estimate(_fitting(_at_depth(given, DEPTHS[0]) or resolve(given), where), where)
        raise UsageError(
            f"{limits} on {target}: not even {DEPTHS[0]} layers; they take {least['hours_estimate']:.3g} hours and "
            f"{least['usd_estimate']:.3g} USD"
        )
    config, result = _deepest(depths, where, within)
    tiers = [load_config(path.stem) for path in tier_files()]
    tiers = [resolve(tier) for tier in tiers if not tier.data.size_model]  # that one's depth follows from its text
    deepest = max(filter(affordable, tiers), key=lambda tier: tier.model.depth, default=None)
    result |= {"deepest_tier": deepest and deepest.tier, "command": _command(given, config)} | disk(config)
    if as_json:
        print(json.dumps(result))
        return result
    show(result)
    tier = f"; of the tiers, {deepest.tier}" if deepest else "; no tier is that small"
    print(f"{limits} on {target}: {config.model.depth} layers at most{tier}. To run it:\n    {result['command']}")
    return result


def _at_depth(given: Config, depth: int) -> Config | None:
    try:
        return resolve(replace(given, model=replace(given.model, depth=depth)))
    except UsageError:  # shapes set by hand that this depth cannot have
        return None


def _fitting(config: Config, target: Target) -> Config:
    """With as few rows a device as memory asks for."""
    rows = config.train.device_batch_rows
    while rows > 1 and not estimate(_with_rows(config, rows), target)["fits"]:
        rows //= 2
    return _with_rows(config, rows)


def _with_rows(config: Config, rows: int) -> Config:
    return replace(config, train=replace(config.train, device_batch_rows=rows))


def _deepest(configs: list[Config], target: Target, within: Callable[[Plan], bool]) -> tuple[Config, Plan]:
    """The deepest that fits, compiled with the rows that the compiler finds; analytic where there is no compiler."""
    for config in reversed(configs):
        try:
            result = compile_plan(config, target)
        except NoCompiler as missing:
            say(f"{missing}; this is the analytic estimate")
            config = _fitting(config, target)
            return config, estimate(config, target)
        rows = result["largest_device_batch_rows"]
        if not result["fits"] and rows:
            config = _with_rows(config, rows)
            kept = {key: result[key] for key in ("largest_device_batch_rows", "by_rows", "decode")}
            result = compile_plan(config, target, search=False) | kept
        if result["fits"] and within(result):
            return config, result
        say(f"{config.model.depth} layers do not fit {target.text}, or exceed the limits once compiled")
    raise UsageError(f"--target {target.text}: no depth that the limits allow fits the memory; take more devices")


def _command(given: Config, config: Config) -> str:
    """Return the command that trains that configuration; keys set on this command line have to be repeated by hand."""
    parts = [f"python launch.py --tier {given.tier}"]
    if config.model.depth != given.model.depth:
        parts.append(f"--set model.depth={config.model.depth} --run-dir runs/d{config.model.depth}")
    if config.train.device_batch_rows != given.train.device_batch_rows:
        parts.append(f"--set train.device_batch_rows={config.train.device_batch_rows}")
    return " ".join(parts)


# On the terminal


def show(r: Plan) -> None:
    """Print a plan for a person, to standard output."""
    how = f"compiled in {r['plan_seconds']:.0f} s" if r["method"] == "compiled" else "analytic estimate"
    a = r["assumptions"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in r.get("mesh", {}).items())
    facts = {
        "devices": f"{r['devices']}" + (f"  (mesh: {mesh})" if mesh else ""),
        "parameters": f"{r['params']:,} in {r['depth']} layers",
        "tokens": f"{r['tokens']:,} in {r['steps']:,} steps",
        "rows a device": f"{r['device_batch_rows']} x {r['grad_accum']} micro-batches",
        "training FLOPs": f"{r['flops_total']:.3g}  ({r['flops_per_token']:.3g} a token)",
        **_memory_facts(r),
        **_program_facts(r),
    }
    seconds = r.get("seconds_by_kind", {"products": r["compute_seconds_estimate"]})
    seconds = seconds | {"collectives": r["collective_seconds_estimate"]}
    parts = ", ".join(f"{kind} {spent:.3g} s" for kind, spent in seconds.items())
    facts["step"] = f"{r['step_seconds_estimate']:.3g} s  ({parts})"
    peak = f"MFU {r['mfu_assumed']:.0%} of"
    if "seconds_by_kind" in r:
        facts["MFU that follows"], peak = f"{r['mfu_assumed']:.1%}, before collectives", "peak"
    facts |= {"time": f"{r['hours_estimate']:.2f} h", "cost": f"{r['usd_estimate']:,.0f} USD"}
    if "disk" in r:
        parts = ", ".join(
            f"{name} {size_text(size)}" for name, size in r["disk"].items() if size > r["disk_bytes"] / 50
        )
        facts["disk"] = f"{size_text(r['disk_bytes'])}  ({parts})"
    assumed = [
        f"{peak} {a['peak_flops'] / 1e12:.4g} TFLOP/s",
        f"links {a['link_bytes_per_second'] / 1e9:g} and network {a['network_bytes_per_second'] / 1e9:g} GB/s a device",
        f"{a['usd_per_device_hour']:g} USD ({a['prices']})",
        f"{a['memory_fraction']:.0%} of the memory usable",
        a["time"],
        a["sources"],
    ]
    print_facts(facts, f"{r['tier']} on {r['target']}: {how}")
    Console(highlight=False, markup=False).print("Assumed: " + "; ".join(assumed), style="dim")


def _memory_facts(r: Plan) -> dict[str, str]:
    fits = {True: "fits", False: "does NOT fit"}
    facts = {"memory a device": f"{_gib(r['peak_bytes_per_device'])} of {_gib(r['device_bytes'])}: {fits[r['fits']]}"}
    names = {"parameters": "masters", "optimizer": "optimizer state", "batch": "batch", "temporaries": "temporaries"}
    facts |= {f"  {name}": _gib(r["memory"][key]) for key, name in names.items() if key in r.get("memory", {})}
    if per_row := r.get("activation_bytes_per_row"):
        activations = _gib(per_row * r["device_batch_rows"])
        facts["  temporaries"] += f"  of it activations {activations} ({_gib(per_row)} a row)"
    if "largest_device_batch_rows" in r:
        tried = []
        for n, step in r["by_rows"].items():
            share = step["recomputed_flops_share"] or 0.0
            again = f" and compute {share:.0%} again" if share >= 0.005 else ""
            tried.append(f"{n} take {_gib(step['peak_bytes'])}{again}")
        largest = r["largest_device_batch_rows"]
        most = f"{largest} a device" if largest else "none: more fsdp, or train.remat"
        facts["largest rows"] = f"{most}  ({'; '.join(tried)})"
    if d := r.get("decode"):
        facts["serving, one device"] = (
            f"{_gib(d['peak_bytes'])}: {fits[d['fits']]}  ({d['slots']} slots of {d['context']:,} tokens; weights "
            f"{_gib(d['weight_bytes'])}, cache {_gib(d['cache_bytes'])}; at most {d['tokens_per_second_limit']:,.0f} "
            "tokens/s by bandwidth)"
        )
    return facts


def _program_facts(r: Plan) -> dict[str, str]:
    facts = {}
    if r["collectives"]:
        found = sorted(r["collectives"].items())
        facts["collectives a step"] = "; ".join(f"{kind} x {c['count']}: {_gib(c['bytes'])}" for kind, c in found)
    if r.get("flops_per_step_per_device"):
        counted = r["flops_per_step_per_device"] * r["devices"] * r["steps"] / r["flops_total"]
        types = ", ".join(f"{types} {flops:.3g}" for types, flops in r["product_flops"].items() if flops)
        facts["FLOPs a step, device"] = f"{types}  ({counted:.3f} of the formula)"
        facts["optimizer's share"] = f"{r['update_flops_share']:.2%} of the FLOPs"
        facts["computed again"] = f"{r['recomputed_flops_share']:.1%}, to save memory"
    if "bytes_per_step_per_device" in r:
        kinds = ", ".join(f"{kind} {size_text(size)}" for kind, size in r["bytes_by_kind"].items() if size)
        facts["bytes moved a step"] = (
            f"{size_text(r['bytes_per_step_per_device'])} a device: {r['memory_seconds']:.3g} s at "
            f"{r['assumptions']['memory_bytes_per_second'] / 1e12:.4g} TB/s  ({kinds})"
        )
    if r.get("kernels"):
        kernels = sorted(r["kernels"].items(), key=lambda item: -item[1])[:6]
        facts["kernels"] = ", ".join(f"{name} x {times}" for name, times in kernels)
    if "float32_logits" in r:
        facts["full float32 logits"] = ", ".join(r["float32_logits"]) or "none"
    return facts


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:.1f} MiB"
