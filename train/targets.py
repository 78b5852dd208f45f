"""The machines that a plan may name: figures of a device, devices to compile for, and prices. See devices.toml."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxchat.data.shards import cores
from jaxchat.errors import JaxchatError, UsageError, install_command
from jaxchat.sizes import NO_PEAK, peak_flops

if TYPE_CHECKING:
    import jax

GPUS_PER_HOST = 8  # HGX and DGX boards; more of other cards in a host are rare
MEMORY_FRACTION = 0.92  # of a device that a process may take (launch.py sets it)
PRICES_OF = "typical on-demand list prices of 2026 in USD per device and hour, to be read as a guess"
EXTRAS = {"cuda": ("plan-cuda", ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")), "tpu": ("plan-tpu", ("libtpu",))}


@dataclass(frozen=True)
class Chip:
    """Figures of one device; devices.toml says what each means."""

    name: str
    platform: str  # "cuda" | "rocm" | "tpu" | "cpu"
    device_bytes: int
    peak: float  # FLOP/s of dense 16-bit products
    memory_rate: float
    link_rate: float
    network_rate: float
    mfu: float
    price: float
    kind: str = ""
    match: str = ""
    slices: Sequence[str] = ()
    xla: dict[str, Any] | None = None

    @property
    def gpu(self) -> bool:
        return self.platform in ("cuda", "rocm")


TABLES = tomllib.loads(Path(__file__).with_name("devices.toml").read_text(encoding="utf-8"))
CHIPS = {name: Chip(name=name, peak=peak_flops(table["kind"]) or 0.0, **table) for name, table in TABLES.items()}
ALIASES = {"a100": "a100-80g", "rtxa6000": "a6000"}
CPU = Chip("cpu", "cpu", 4 * 2**30, 6e10, 2e10, 2e10, 1e9, 0.6, 0.0)  # per core: float32 products on AVX2, measured


class NoCompiler(JaxchatError):
    """The target's compiler is not installed; the message names the extra."""


@dataclass(frozen=True)
class Target:
    """`shape`: the slice of a TPU, (N,) of anything else; `real`: the devices of this machine."""

    text: str
    chip: Chip
    shape: tuple[int, ...]
    real: bool = False

    @property
    def devices(self) -> int:
        return math.prod(self.shape)


def parse_target(target: str) -> Target:
    """Return the `Target` of `auto`, `cpu:N`, `h100:8`, `v6e:2x4`, ...; `UsageError` says what there is."""
    if target == "auto":
        return this_machine()
    name, _, size = target.partition(":")
    name = ALIASES.get(name, name)
    if (name != "cpu" and name not in CHIPS) or not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,3})*", size or "1"):
        raise UsageError(f"--target {target}: unknown; take auto, cpu:N, or a number of {', '.join(CHIPS)}: h100:8")
    chip = cpu_chip(int(size or 1)) if name == "cpu" and "x" not in size else CHIPS.get(name, CPU)
    if chip.slices:
        slices = {tuple(sorted(map(int, text.split("x")))): text for text in chip.slices}
        text = slices.get(tuple(sorted(map(int, (size or "0").split("x")))))
        if text is None:
            raise UsageError(f"--target {target}: there is no such slice; {name} has {', '.join(chip.slices)}")
        return Target(target, chip, tuple(map(int, text.split("x"))))
    if "x" in size:
        raise UsageError(f"--target {target}: {name} counts devices, as in {name}:8")
    count = int(size or 1)
    if chip.gpu and count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise UsageError(f"--target {target}: {count} GPUs are no whole number of hosts; take a multiple of 8")
    return Target(target, chip, (count,))


def cpu_chip(devices: int) -> Chip:
    """Return the figures of one of N simulated devices, which share this machine's cores and memory."""
    memory = host_memory() or CPU.device_bytes
    return replace(CPU, device_bytes=memory // devices, peak=CPU.peak * cores() / devices)


def host_memory() -> int | None:
    """Return the bytes of this machine's memory; None on Windows."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def chip_of(device_kind: str) -> Chip | None:
    """Return the figures of a device by the name that JAX has for it; None where there are none."""
    if NO_PEAK.search(device_kind):
        return None
    return next((c for c in CHIPS.values() if re.search(rf"(?<!\w)({c.match})(?!\w)", device_kind)), None)


def this_machine() -> Target:
    """Return the target `auto`: the devices that JAX has here."""
    import jax

    device, shape = jax.devices()[0], (jax.device_count(),)
    if device.platform == "cpu":
        return Target("auto", cpu_chip(shape[0]), shape, real=True)
    chip = chip_of(device.device_kind)
    if chip is None:
        raise UsageError(f"--target auto: no figures for {device.device_kind}; name a target, as --target h100:8")
    if limit := (device.memory_stats() or {}).get("bytes_limit"):  # already the share that the process may take
        chip = replace(chip, device_bytes=int(limit / MEMORY_FRACTION))
    return Target("auto", chip, shape, real=True)


def target_devices(target: Target) -> list[jax.Device]:
    """Return devices to compile for: this machine's, simulated ones, or a topology's, which cannot run.

    Raises `NoCompiler` where the extra is not installed, `UsageError` for a plugin of another JAX version.
    """
    import jax
    from jax.experimental import topologies

    count, chip = target.devices, target.chip
    if target.real:
        return list(jax.devices())
    if chip.platform == "cpu":
        with contextlib.suppress(RuntimeError):  # JAX has started already, in a program that imports us
            jax.config.update("jax_num_cpu_devices", count)
        found = jax.devices("cpu")
        if len(found) < count:
            raise UsageError(f"--target {target.text}: JAX has started with {len(found)} devices; start a new process")
        return found[:count]
    if chip.platform not in EXTRAS:
        raise NoCompiler(f"there is no compiler here for AMD's {chip.name}")
    extra, modules = EXTRAS[chip.platform]
    if not any(map(is_installed, modules)):
        raise NoCompiler(f"compiling for {chip.name} needs the extra {extra}: {install_command(extra)}")
    options: dict[str, Any] = {}
    name = f"{chip.name}:{'x'.join(map(str, target.shape))}"
    if chip.platform == "cuda":
        plugins = [f"jax-cuda{number}-{part}" for number in (13, 12) for part in ("plugin", "pjrt")]
        if lines := other_versions(plugins):
            raise UsageError(lines[0])
        hosts = max(1, count // GPUS_PER_HOST)
        name = f"1x{hosts}x{count // hosts}"  # slices x hosts x GPUs of a host
        options = {"topology": name, "target_config": xla_description(chip)}
    try:
        return list(topologies.get_topology_desc(name, chip.platform, **options).devices)
    except Exception as error:  # the plugin's own errors have no common type
        line = str(error).splitlines()[0][:200]
        raise NoCompiler(f"the compiler for {chip.name} did not start: {line}") from error


def other_versions(packages: Sequence[str]) -> list[str]:
    """Return a line for each of JAX's plugins that is installed in another version than JAX."""
    jax, lines = version("jax"), []
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            if (own := version(package)) != jax:
                lines.append(f"{package} is {own} and jax is {jax}: they must be equal; pip install {package}=={jax}")
    return lines


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    with contextlib.suppress(ModuleNotFoundError):  # of the package it would be in
        return importlib.util.find_spec(module) is not None
    return False


def xla_description(chip: Chip) -> str:
    """Return the device description that XLA's GPU compiler reads, in protobuf's text format."""
    figures = dict(chip.xla or {})
    major, minor = figures.pop("capability")
    lines = "\n".join(f"  {name}: {value}" for name, value in figures.items())
    return f"""
gpu_device_info {{
{lines}
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.memory_rate)} device_memory_size: {chip.device_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.kind}"
"""


def wall_clock(record: dict[str, Any]) -> float:
    """Return the seconds of a stage: those of its record, or of its checkpoints where a kill cut the record short."""
    facts = record.get("facts", {})
    return max(record["seconds"], facts.get("seconds", 0.0) + facts.get("eval_seconds", 0.0))


def usd(machine: dict[str, Any], seconds: float) -> float | None:
    """Return devices x hours x the price of one; 0 on CPUs, None where the device has no price here."""
    if machine["platform"] == "cpu":
        return 0.0
    chip = chip_of(machine["device"])
    return None if chip is None else machine["devices"] * seconds / 3600 * chip.price


def run_cost(records: dict[str, Any]) -> dict[str, Any]:
    """Return the USD of the stages in `stages.json`.

    `usd` is 0 where everything ran on CPUs and null where a device has no price here; `stages` has every stage's share,
    `prices` the price of a device and hour, `words` says all of it.
    """
    stages = {name: usd(record["hardware"], wall_clock(record)) for name, record in records.items()}
    machines = [record["hardware"] for record in records.values()]
    devices = {m["device"]: chip_of(m["device"]) for m in machines if m["platform"] != "cpu"}
    prices = {name: chip.price for name, chip in devices.items() if chip}
    known = sum(dollars for dollars in stages.values() if dollars is not None)
    words = f"{known:,.2f} USD ({PRICES_OF})" if prices else "nothing: it ran on CPUs; electricity is not counted"
    if unknown := [name for name, chip in devices.items() if not chip]:
        words = f"not known: no price of {', '.join(unknown)} at hand"
    result = {"usd": None if unknown else known, "stages": stages, "prices": prices}
    return result | {"assumption": PRICES_OF, "words": words}
