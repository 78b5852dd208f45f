"""`--budget` and `--hours`: the deepest model that a sum of money or a time buys on a target."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxchat.config import Config, load_config, tier_files
from jaxchat.errors import UsageError
from jaxchat.log import say, waiting
from jaxchat.scaling import resolve
from jaxchat.sizes import activation_bytes, count_parameters, decode_bytes_per_step, flops_per_token, padded_vocab

from .preflight import disk_parts
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

# A plan on the terminal.


GIB = 2**30
console = Console(highlight=False)


def show(result: dict[str, Any]) -> None:
    """Print the contract's object for a person, to standard output."""
    title = f"{result['tier']} on {result['target']}: " + (
        f"compiled in {result['plan_seconds']:.0f} s" if result["method"] == "compiled" else "analytic estimate"
    )
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for section in (_run(result), _memory(result), _program_lines(result), _cost(result), _disk(result)):
        for name, value in section.items():
            table.add_row(name, value)
        if section:
            table.add_section()
            table.add_row("", "")
    console.print(table)
    console.print("Assumed: " + "; ".join(_assumptions(result)), style="dim", soft_wrap=False)


def _run(r: dict[str, Any]) -> dict[str, str]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in r.get("mesh", {}).items())
    return {
        "devices": f"{r['devices']}" + (f"  (mesh: {mesh})" if mesh else ""),
        "parameters": f"{r['params']:,} in {r['depth']} layers",
        "tokens": f"{r['tokens']:,} in {r['steps']:,} steps",
        "rows a device": f"{r['device_batch_rows']} x {r['grad_accum']} micro-batches",
        "training FLOPs": f"{r['flops_total']:.3g}  ({r['flops_per_token']:.3g} a token)",
    }


def _memory(r: dict[str, Any]) -> dict[str, str]:
    fits = "fits" if r["fits"] else "does NOT fit"
    rows = {"memory a device": f"{_gib(r['peak_bytes_per_device'])} of {_gib(r['device_bytes'])}: {fits}"}
    names = {"parameters": "masters", "optimizer": "optimizer state", "batch": "batch", "temporaries": "temporaries"}
    for key, name in names.items():
        if key in r.get("memory", {}):
            rows[f"  {name}"] = _gib(r["memory"][key])
    if per_row := r.get("activation_bytes_per_row"):
        activations = per_row * r["device_batch_rows"]
        rows["  temporaries"] += f"  of it activations {_gib(activations)} ({_gib(per_row)} a row)"
    if "largest_device_batch_rows" in r:
        largest = r["largest_device_batch_rows"]
        tried = "; ".join(f"{n} take {_gib(c['peak_bytes'])}{_again(c)}" for n, c in r["by_rows"].items())
        rows["largest rows"] = (
            f"{largest} a device" if largest else "none: more fsdp, or train.remat"
        ) + f"  ({tried})"
    if decode := r.get("decode"):
        fits = "fits" if decode["fits"] else "does NOT fit"
        rows["serving, one device"] = (
            f"{_gib(decode['peak_bytes'])}: {fits}  ({decode['slots']} slots of {decode['context']:,} tokens; weights "
            f"{_gib(decode['weight_bytes'])}, cache {_gib(decode['cache_bytes'])}; at most "
            f"{decode['tokens_per_second_limit']:,.0f} tokens/s by bandwidth)"
        )
    return rows


def _disk(r: dict[str, Any]) -> dict[str, str]:
    if "disk_bytes" not in r:
        return {}
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in r["disk"].items() if size > r["disk_bytes"] / 50)
    return {"disk": f"{_gb(r['disk_bytes'])}  ({parts})"}


def _program_lines(r: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for i, (kind, c) in enumerate(sorted(r["collectives"].items())):
        rows["collectives a step" if i == 0 else " " * i] = f"{kind} x {c['count']}: {_gib(c['bytes'])}"
    if r.get("flops_per_step_per_device"):
        counted = r["flops_per_step_per_device"] * r["devices"] * r["steps"] / r["flops_total"]
        types = ", ".join(f"{k} {v:.3g}" for k, v in r["product_flops"].items() if v)
        rows["FLOPs a step, device"] = f"{types}  ({counted:.3f} of the formula)"
        rows["optimizer's share"] = f"{r['update_flops_share']:.2%} of the FLOPs"
        rows["computed again"] = f"{r['recomputed_flops_share']:.1%}, to save memory"
    if "bytes_per_step_per_device" in r:
        kinds = ", ".join(f"{kind} {_tb(size)}" for kind, size in r["bytes_by_kind"].items() if size)
        rows["bytes moved a step"] = (
            f"{_tb(r['bytes_per_step_per_device'])} a device: {r['memory_seconds']:.3g} s at "
            f"{r['assumptions']['memory_bytes_per_second'] / 1e12:.4g} TB/s  ({kinds})"
        )
    if r.get("kernels"):
        shown = sorted(r["kernels"].items(), key=lambda kv: -kv[1])[:6]
        rows["kernels"] = ", ".join(f"{k} x {v}" for k, v in shown)
    if "float32_logits" in r:
        rows["full float32 logits"] = ", ".join(r["float32_logits"]) or "none"
    return rows


def _cost(r: dict[str, Any]) -> dict[str, str]:
    parts = r.get("seconds_by_kind", {"products": r["compute_seconds_estimate"]})
    shown = [f"{kind} {seconds:.3g} s" for kind, seconds in parts.items()]
    shown.append(f"collectives {r['collective_seconds_estimate']:.3g} s")
    rows = {"step": f"{r['step_seconds_estimate']:.3g} s  ({', '.join(shown)})"}
    if "seconds_by_kind" in r:
        rows["MFU that follows"] = f"{r['mfu_assumed']:.1%}, before collectives"
    return rows | {"time": f"{r['hours_estimate']:.2f} h", "cost": f"{r['usd_estimate']:,.0f} USD"}


def _assumptions(r: dict[str, Any]) -> list[str]:
    a = r["assumptions"]
    return [
        ("peak" if "seconds_by_kind" in r else f"MFU {r['mfu_assumed']:.0%} of")
        + f" {a['peak_flops'] / 1e12:.4g} TFLOP/s",
        f"links {a['link_bytes_per_second'] / 1e9:g} and network {a['network_bytes_per_second'] / 1e9:g} GB/s a device",
        f"{a['usd_per_device_hour']:g} USD ({a['prices']})",
        f"{a['memory_fraction']:.0%} of the memory usable",
        a["time"],
        a["sources"],
    ]


def _again(tried: dict[str, Any]) -> str:
    share = tried["recomputed_flops_share"]
    return f" and compute {share:.0%} again" if share and share >= 0.005 else ""


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _tb(count: float) -> str:
    return f"{count / 1e12:.3g} TB" if count >= 1e11 else f"{count / 1e9:.3g} GB"


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"


# `--plan`: what a run would need, before anyone pays for it.
#
# The train step and the decode step are compiled for the target (`compiled.py`), and their memory, products and
# collectives read from the program (`hlo.py`). Where the target's compiler is missing, arithmetic on the configuration
# answers (`"method": "analytic"`). Every assumption travels with the result.


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


DEPTHS = range(2, 49)


def plan_budget(given: Config, target: str, budget: str | None, hours: float | None, as_json: bool) -> dict[str, Any]:
    """Print and return the plan of the deepest model that both limits allow; nothing is trained.

    Args:
      given: not resolved: every depth derives its own width, batch and steps.
      budget: `100usd`, or just the number.
    """
    usd = _parse_usd(budget)
    where = parse_target(target)
    if usd is not None and not where.chip.price:
        raise UsageError(f"--budget {budget}: {where.chip.name} has no price; give --hours, or another --target")
    affordable = [c for c in (_at_depth(given, d) for d in DEPTHS) if c and _allows(c, where, usd, hours)]
    if not affordable:
        least = estimate(_fitting(_at_depth(given, DEPTHS[0]) or resolve(given), where), where)
        raise UsageError(
            f"{_limits(usd, hours)} on {target}: not even {DEPTHS[0]} layers; they take {least['hours_estimate']:.3g} "
            f"hours and {least['usd_estimate']:.3g} USD"
        )
    config, result = _deepest_that_fits(affordable, where, usd, hours)
    result["deepest_tier"] = _deepest_tier(where, usd, hours)
    result["command"] = _command(given, config)
    result |= disk(config)
    if as_json:
        print(json.dumps(result))
        return result
    show(result)
    tier = f"; of the tiers, {result['deepest_tier']}" if result["deepest_tier"] else "; no tier is that small"
    console.print(f"{_limits(usd, hours)} on {target}: {config.model.depth} layers at most{tier}. To run it:")
    console.print(f"    {result['command']}", soft_wrap=True, markup=False)
    return result


def _parse_usd(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"\$?(\d+(?:\.\d+)?)\s*(?:usd|\$)?", text.strip().lower())
    if not found or not float(found[1]):
        raise UsageError(f"--budget {text}: give an amount such as 100usd")
    return float(found[1])


def _limits(usd: float | None, hours: float | None) -> str:
    return " and ".join(([f"{usd:g} USD"] if usd else []) + ([f"{hours:g} hours"] if hours else []))


def _at_depth(given: Config, depth: int) -> Config | None:
    try:
        return resolve(dataclasses.replace(given, model=dataclasses.replace(given.model, depth=depth)))
    except UsageError:  # shapes set by hand that this depth cannot have
        return None


def _fitting(config: Config, target: Target) -> Config:
    """With as few rows a device as memory asks for."""
    rows = config.train.device_batch_rows
    while rows > 1 and not estimate(_with_rows(config, rows), target)["fits"]:
        rows //= 2
    return _with_rows(config, rows)


def _with_rows(config: Config, rows: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, device_batch_rows=rows))


def _allows(config: Config, target: Target, usd: float | None, hours: float | None) -> bool:
    batch = config.train.batch_tokens // config.model.seq_len
    result = estimate(_fitting(config, target), target)
    return _within(result, usd, hours) and result["fits"] and batch % target.devices == 0


def _within(result: dict[str, Any], usd: float | None, hours: float | None) -> bool:
    return result["hours_estimate"] <= (hours or 1e30) and result["usd_estimate"] <= (usd or 1e30)


def _deepest_that_fits(
    affordable: list[Config], target: Target, usd: float | None, hours: float | None
) -> tuple[Config, dict[str, Any]]:
    """Compiled from the deepest down, with the rows that the compiler finds; analytic where there is no compiler."""
    for config in reversed(affordable):
        try:
            result = compile_plan(config, target)
        except NoCompiler as missing:
            say(f"{missing}; this is the analytic estimate")
            fitting = _fitting(config, target)
            return fitting, estimate(fitting, target)
        rows = result["largest_device_batch_rows"]
        if not result["fits"] and rows:
            config = _with_rows(config, rows)
            kept = {key: result[key] for key in ("largest_device_batch_rows", "by_rows", "decode")}
            result = compile_plan(config, target, search=False) | kept
        if result["fits"] and _within(result, usd, hours):
            return config, result
        say(f"{config.model.depth} layers do not fit {target.text}, or not into the limits once compiled")
    raise UsageError(f"--target {target.text}: no depth that the limits allow fits the memory; take more devices")


def _deepest_tier(target: Target, usd: float | None, hours: float | None) -> str | None:
    given = [load_config(path.stem) for path in tier_files()]
    tiers = [resolve(config) for config in given if not config.data.size_model]  # that one's depth is its text's
    fitting = [c for c in tiers if _allows(c, target, usd, hours)]
    return max(fitting, key=lambda c: c.model.depth).tier if fitting else None


def _command(given: Config, config: Config) -> str:
    """What trains that configuration; keys set on this command line have to be repeated by hand."""
    parts = [f"python launch.py --tier {given.tier}"]
    if config.model.depth != given.model.depth:
        parts.append(f"--set model.depth={config.model.depth} --run-dir runs/d{config.model.depth}")
    if config.train.device_batch_rows != given.train.device_batch_rows:
        parts.append(f"--set train.device_batch_rows={config.train.device_batch_rows}")
    return " ".join(parts)
