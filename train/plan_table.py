"""A plan on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

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
    for section in (_run(result), _memory(result), _program(result), _cost(result), _disk(result)):
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


def _program(r: dict[str, Any]) -> dict[str, str]:
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
