"""Weak scaling on paper: python -m bench.scaling --tier d20 [--rows 16] [--runs h100:8=-1,1,1 ...]

The train step is compiled for every target and mesh (data, fsdp, tensor) with the same rows a device; a step's time on
the links over its time in products gives the efficiency, without any overlap (the floor) and with all of it (the
ceiling). Nothing runs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from jaxchat.config import Config, MeshConfig, load_config
from jaxchat.scaling import resolve
from launch import prepare_plan

RUNS = ("h100:8=-1,1,1", "h100:64=-1,1,1", "h100:64=8,8,1", "h100:512=-1,1,1", "h100:512=64,8,1", "v6e:2x4=-1,1,1",
        "v6e:16x16=-1,1,1")  # fmt: skip


def measure(config: Config, run: str, rows: int, accumulate: int) -> dict[str, Any]:
    """What one target and mesh (`h100:64=8,8,1`) would do: bytes and seconds of a step per device."""
    from jaxchat.sharding import batch_devices, make_mesh
    from train.compiled import compile_step
    from train.hlo import Program
    from train.plan import compute_seconds, run_figures
    from train.targets import MEMORY_FRACTION, parse_target, target_devices

    target, _, sizes = run.partition("=")
    axes = MeshConfig(*(int(size) for size in sizes.split(",")))
    where = parse_target(target)
    mesh = make_mesh(axes, target_devices(where))
    batch = rows * accumulate * batch_devices(mesh) * config.model.seq_len
    train = dataclasses.replace(config.train, batch_tokens=batch, device_batch_rows=rows)
    config = dataclasses.replace(config, mesh=axes, train=train)
    step = compile_step(config, mesh, rows, accumulate)
    program = Program(step.text)
    links, seconds = program.collectives(mesh.size), compute_seconds(config, where, program)
    found = run_figures(config, where, rows, accumulate, links, seconds)
    products, links = found["compute_seconds_estimate"], found["collective_seconds_estimate"]
    return {
        "target": target,
        "mesh": dict(mesh.shape),
        "rows": rows,
        "grad_accum": accumulate,
        "peak_bytes_per_device": step.peak,
        "fits": step.peak <= MEMORY_FRACTION * where.chip.device_bytes,
        "collectives": found["collectives"],
        "sent_bytes_per_device": found["sent_bytes_per_device"],
        "link_bytes_per_second": where.chip.link_rate,
        "network_bytes_per_second": where.chip.network_rate,
        "compute_seconds": products,
        "collective_seconds": links,
        "efficiency_floor": products / (products + links),
        "efficiency_ceiling": products / max(products, links),
        "compile_seconds": step.seconds,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="d20")
    parser.add_argument("--rows", type=int, default=16, help="rows a device and micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="TARGET=DATA,FSDP,TENSOR")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="any config key; may be repeated")
    args = parser.parse_args(argv)
    prepare_plan(args.runs[0].partition("=")[0])
    config, found = resolve(load_config(args.tier, args.set)), []
    print(f"{'target':<10} {'mesh':<10} {'GB':>6} {'sent GB':>8} {'products s':>11} {'links s':>9} {'efficiency':>15}")
    for run in args.runs:
        r = measure(config, run, args.rows, args.accumulate)
        found.append(r)
        mesh = ",".join(str(size) for size in r["mesh"].values())
        print(
            f"{r['target']:<10} {mesh:<10} {r['peak_bytes_per_device'] / 1e9:>6.1f} "
            f"{r['sent_bytes_per_device'] / 1e9:>8.2f} {r['compute_seconds']:>11.3f} "
            f"{r['collective_seconds']:>9.4f} {r['efficiency_floor']:>7.1%}-{r['efficiency_ceiling']:.1%}",
            flush=True,
        )
    print(json.dumps({"tier": config.tier, "runs": found}))


if __name__ == "__main__":
    main()
