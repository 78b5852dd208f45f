"""`--plan`: what a run would need, before anyone pays for it. Analytic: arithmetic on the configuration.

Every assumption stands in a table below and is printed with the result.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.model.sizes import activation_bytes, count_parameters, flops_per_token, peak_flops

# target: (bytes per device, FLOP/s peak per device, assumed MFU, USD per device and hour)
# Memory and peaks: data sheets, as in sizes.py. Prices: typical on-demand list prices of 2026, to be read as a guess.
TARGETS: dict[str, tuple[int, float, float, float]] = {
    "h100": (80 * 10**9, 989e12, 0.45, 3.0),
    "h200": (141 * 10**9, 989e12, 0.45, 3.5),
    "a100-80g": (80 * 10**9, 312e12, 0.45, 1.8),
    "v5e": (16 * 2**30, 197e12, 0.40, 1.2),
    "v5p": (95 * 2**30, 459e12, 0.40, 4.2),
    "v6e": (32 * 2**30, 918e12, 0.40, 2.7),
}
CPU_FLOPS = 6e10  # per core: float32 products, AVX2
CPU_MFU = 0.6
MEMORY_FRACTION = 0.92  # of a device that a process may take


def plan(config: Config, target: str, as_json: bool) -> dict[str, Any]:
    """Print the plan of a resolved configuration on a target, and return it; nothing is trained."""
    result = estimate(config, target)
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(_table(result))
    return result


def estimate(config: Config, target: str) -> dict[str, Any]:
    """The contract's object. `UsageError` names an unknown target."""
    name, devices, (device_bytes, peak, mfu, price) = parse_target(target)
    count, train = count_parameters(config.model), config.train
    item = 4 if name == "cpu" else 2
    per_device = max(1, train.batch_tokens // config.model.seq_len // devices)
    rows = max(n for n in range(1, per_device + 1) if per_device % n == 0 and n <= train.device_batch_rows)
    # masters and gradients in float32, Muon's one moment and Adam's two, and the cast copy
    adam = count.total - (count.trunk if config.optim.kind == "muon" else 0)
    arguments = 4 * (2 * count.total - adam) + 4 * 2 * adam
    temporary = 4 * count.total + item * count.total + activation_bytes(config.model, rows, item)
    tokens = train.steps * train.batch_tokens
    flops = flops_per_token(config.model) * tokens
    seconds = flops / (peak * devices * mfu)
    return {
        "tier": config.tier,
        "target": target,
        "fits": arguments + temporary < MEMORY_FRACTION * device_bytes,
        "devices": devices,
        "params": count.total,
        "tokens": tokens,
        "steps": train.steps,
        "flops_total": flops,
        "flops_per_token": flops_per_token(config.model),
        "peak_bytes_per_device": arguments + temporary,
        "device_bytes": device_bytes,
        "argument_bytes": arguments,
        "temp_bytes": temporary,
        "collectives": {"all-reduce": {"count": 1, "bytes": 4 * count.total}} if devices > 1 else {},
        "device_batch_rows": rows,
        "grad_accum": per_device // rows,
        "step_seconds_estimate": seconds / train.steps,
        "hours_estimate": seconds / 3600,
        "usd_estimate": seconds / 3600 * devices * price,
        "mfu_assumed": mfu,
        "compile_seconds": None,
        "method": "analytic",
    }


def parse_target(target: str) -> tuple[str, int, tuple[int, float, float, float]]:
    """(name, devices, (bytes, peak, MFU, USD per hour)) of `auto`, `cpu:N`, `h100:8`, `v6e:2x4`, ..."""
    if target == "auto":
        return _this_machine()
    name, _, size = target.partition(":")
    if (name != "cpu" and name not in TARGETS) or not re.fullmatch(r"\d+(x\d+)*", size or "1"):
        known = ", ".join(["auto", "cpu:N", *(f"{n}:N" for n in TARGETS)])
        raise UsageError(f"--target {target}: unknown; take one of {known} (TPU slices as v6e:2x4)")
    devices = 1
    for part in (size or "1").split("x"):
        devices *= int(part)
    if devices < 1:
        raise UsageError(f"--target {target}: needs at least one device")
    return name, devices, TARGETS.get(name) or _cpu()


def _cpu() -> tuple[int, float, float, float]:
    return 4 * 2**30, CPU_FLOPS, CPU_MFU, 0.0


def _this_machine() -> tuple[str, int, tuple[int, float, float, float]]:
    from train.stages import hardware

    found = hardware()
    if found["platform"] == "cpu":
        cores = found["cpu_cores"] or 1
        return "cpu", 1, (found["memory_bytes"] or 4 * 2**30, CPU_FLOPS * cores, CPU_MFU, 0.0)
    kind = str(found["device"])
    for name, numbers in TARGETS.items():
        if name.split("-")[0].lower() in kind.lower().replace(" lite", "e").replace("tpu ", ""):
            return name, found["devices"], numbers
    if peak := peak_flops(kind):
        return kind, found["devices"], (16 * 2**30, peak, 0.4, 0.0)
    raise UsageError(f"--target auto: no figures for {kind}; name a target, for example --target h100:8")


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['tier']} on {result['target']} ({result['method']} estimate)", show_header=False)
    gib = 2**30
    rows = {
        "fits": "yes" if result["fits"] else "no",
        "parameters": f"{result['params']:,}",
        "tokens": f"{result['tokens']:,} in {result['steps']:,} steps",
        "rows per device": f"{result['device_batch_rows']} x {result['grad_accum']} micro-batches",
        "memory per device": f"{result['peak_bytes_per_device'] / gib:.1f} of {result['device_bytes'] / gib:.1f} GiB",
        "of it state": f"{result['argument_bytes'] / gib:.1f} GiB",
        "training FLOPs": f"{result['flops_total']:.3g}",
        "time": f"{result['hours_estimate']:.2f} h at an assumed MFU of {result['mfu_assumed']:.0%}",
        "cost": f"{result['usd_estimate']:.0f} USD at the prices in train/plan.py",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
