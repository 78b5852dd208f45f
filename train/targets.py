"""The machines that a plan may name: figures of a device with their sources, devices to compile for, and prices."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from jaxchat.errors import JaxchatError, UsageError
from jaxchat.sizes import NO_PEAK, PEAK_FLOPS

if TYPE_CHECKING:
    import jax

GPUS_PER_HOST = 8  # HGX and DGX boards; more of other cards in a host are rare
MEMORY_FRACTION = 0.92  # of a device that a process may take (launch.py sets it)
# Of the peak that matrix products and attention kernels reach on an H100 or H200 (650 and 425 of 989 TFLOP/s), and of
# the data sheet's bandwidth that elementwise kernels do; measured on one H200: 770 to 800 TFLOP/s for one large product
# alone, 4.3 of 4.8 TB/s for a copy. They turn what a compiled program does into seconds.
PRODUCT_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.66, 0.43, 0.8
PRICES_OF = "typical on-demand list prices of 2026 in USD per device and hour, to be read as a guess"
SOURCES = {
    "gpu": "NVIDIA data sheets of H100 SXM, H200 SXM and A100 SXM 80 GB (peaks dense, without sparsity; NVLink per "
    "direction); InfiniBand NDR 400 Gbit/s (A100: HDR 200) per GPU; usable memory as OpenXLA's device descriptions",
    "tpu": "Google Cloud TPU documentation, v5e, v5p, v6e; links per direction as in 'How to Scale Your Model', one "
    "axis in both directions; usable memory as libtpu reports it",
    "card": "NVIDIA data sheets of L4, L40S, T4 and RTX A6000, white papers of GeForce RTX 30, 40 and 50 (peaks dense "
    "with float32 accumulation, which runs at half rate on GeForce; T4 in float16, it has no bfloat16); links PCIe x16 "
    "per direction (an NVLink bridge would join two RTX 3090 or A6000 at 56 GB/s); network 100 Gbit/s a host of 8; "
    "usable memory as CUDA reports it",
    "rocm": "AMD data sheet of MI300X (peak dense; seven Infinity Fabric links of 64 GB/s per direction); network 400 "
    "Gbit/s per GPU",
    "cpu": "measured with float32 products on AVX2 cores",
}


@dataclass(frozen=True)
class Chip:
    """Figures of one device."""

    name: str
    platform: str  # "cuda" | "rocm" | "tpu" | "cpu"
    device_bytes: int
    peak: float  # FLOP/s of dense 16-bit products
    memory_rate: float  # bytes/s, as the next two
    link_rate: float  # inside a host or slice, one direction
    network_rate: float  # between hosts, one direction, per device
    mfu: float  # assumed without a compiler: of GPUs what the compiled d20 gives on eight, of TPUs a guess
    price: float  # USD per hour

    @property
    def gpu(self) -> bool:
        return self.platform in ("cuda", "rocm")

    @property
    def sources(self) -> str:
        """Where the figures come from."""
        kind = "gpu" if self.platform == "cuda" else self.platform
        return SOURCES["card" if self.name in CARDS else kind]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("h100", "cuda", 84_942_979_072, PEAK_FLOPS["H100"], 3.35e12, 450e9, 50e9, 0.46, 3.0),
        Chip("h200", "cuda", 151_397_597_184, PEAK_FLOPS["H200"], 4.8e12, 450e9, 50e9, 0.50, 3.5),
        Chip("a100-80g", "cuda", 85_100_068_864, PEAK_FLOPS["A100"], 2.04e12, 300e9, 25e9, 0.52, 1.8),
        Chip("rtx3090", "cuda", int(23.69 * 2**30), PEAK_FLOPS["RTX 3090"], 0.936e12, 32e9, 1.6e9, 0.40, 0.25),
        Chip("rtx4090", "cuda", int(23.64 * 2**30), PEAK_FLOPS["RTX 4090"], 1.008e12, 32e9, 1.6e9, 0.40, 0.4),
        Chip("rtx5090", "cuda", int(31.36 * 2**30), PEAK_FLOPS["RTX 5090"], 1.792e12, 64e9, 1.6e9, 0.40, 0.7),
        Chip("a6000", "cuda", 51_041_271_808, PEAK_FLOPS["RTX A6000"], 0.768e12, 32e9, 1.6e9, 0.40, 0.5),
        Chip("l4", "cuda", int(22.03 * 2**30), PEAK_FLOPS["L4"], 0.3e12, 32e9, 1.6e9, 0.30, 0.7),
        Chip("l40s", "cuda", int(44.39 * 2**30), PEAK_FLOPS["L40S"], 0.864e12, 32e9, 1.6e9, 0.40, 1.0),
        Chip("t4", "cuda", int(14.74 * 2**30), PEAK_FLOPS["T4"], 0.32e12, 16e9, 1.6e9, 0.30, 0.35),
        Chip("mi300x", "rocm", 205_822_885_888, PEAK_FLOPS["MI300X"], 5.3e12, 448e9, 50e9, 0.40, 2.5),
        Chip("v5e", "tpu", int(15.75 * 2**30), PEAK_FLOPS["TPU v5e"], 0.82e12, 90e9, 3.1e9, 0.40, 1.2),
        Chip("v5p", "tpu", int(95.74 * 2**30), PEAK_FLOPS["TPU v5p"], 2.77e12, 180e9, 6.2e9, 0.40, 4.2),
        Chip("v6e", "tpu", int(31.25 * 2**30), PEAK_FLOPS["TPU v6e"], 1.64e12, 180e9, 12.5e9, 0.40, 2.7),
    )
}
CARDS = ("rtx3090", "rtx4090", "rtx5090", "a6000", "l4", "l40s", "t4")  # on PCIe
ALIASES = {"a100": "a100-80g", "rtxa6000": "a6000"}
CPU = Chip("cpu", "cpu", 4 * 2**30, 6e10, 2e10, 2e10, 1e9, 0.6, 0.0)  # per core: AVX2 float32 products

# The compiler's view of a GPU: SMs, FP32 units per SM, L2 bytes, GHz, shared memory per SM and per block, compute
# capability, name. Sources: the data sheets and white papers; CUDA C++ Programming Guide, specifications per compute
# capability; OpenXLA's descriptions of A6000 and RTX PRO 6000 (compute capability 12.0).
_GPU = {
    "h100": (132, 128, 52_428_800, 1.98, 233_472, 232_448, (9, 0), "NVIDIA H100 80GB HBM3"),
    "h200": (132, 128, 52_428_800, 1.98, 233_472, 232_448, (9, 0), "NVIDIA H200"),
    "a100-80g": (108, 64, 41_943_040, 1.41, 167_936, 166_912, (8, 0), "NVIDIA A100-SXM4-80GB"),
    "rtx3090": (82, 128, 6_291_456, 1.70, 102_400, 101_376, (8, 6), "NVIDIA GeForce RTX 3090"),
    "rtx4090": (128, 128, 75_497_472, 2.52, 102_400, 101_376, (8, 9), "NVIDIA GeForce RTX 4090"),
    "rtx5090": (170, 128, 100_663_296, 2.41, 131_072, 101_376, (12, 0), "NVIDIA GeForce RTX 5090"),
    "a6000": (84, 128, 6_291_456, 1.80, 102_400, 101_376, (8, 6), "NVIDIA RTX A6000"),
    "l4": (58, 128, 50_331_648, 2.04, 102_400, 101_376, (8, 9), "NVIDIA L4"),
    "l40s": (142, 128, 100_663_296, 2.52, 102_400, 101_376, (8, 9), "NVIDIA L40S"),
    "t4": (40, 64, 4_194_304, 1.59, 65_536, 65_536, (7, 5), "Tesla T4"),
}
THREADS_PER_SM = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536}  # 2,048 elsewhere
# Slices that can be rented (Google Cloud's tables); TPU v5p also comes in larger multiples of 4x4x4.
_SIDES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SLICES: dict[str, tuple[tuple[int, ...], ...]] = {
    "v5e": _SIDES_2D,
    "v6e": _SIDES_2D,
    "v5p": ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 12),
            (8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24)),
}  # fmt: skip
EXTRAS = {"cuda": ("plan-cuda", ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")), "tpu": ("plan-tpu", ("libtpu",))}


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

    @property
    def hosts(self) -> int:
        return max(1, self.devices // GPUS_PER_HOST) if self.chip.gpu else 1


def parse_target(target: str) -> Target:
    """Return the `Target` of `auto`, `cpu:N`, `h100:8`, `v6e:2x4`, ...; `UsageError` with the nearest that exists."""
    if target == "auto":
        return _this_machine()
    name, _, size = target.partition(":")
    name = ALIASES.get(name, name)
    if (name != "cpu" and name not in CHIPS) or not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,3})*", size or "1"):
        sides = {n: "x".join("ABC"[: len(SLICES[n][0])]) if n in SLICES else "N" for n in CHIPS}
        known = ", ".join(["auto", "cpu:N", *(f"{n}:{example}" for n, example in sides.items())])
        raise UsageError(f"--target {target}: unknown; take one of {known}")
    shape = tuple(int(side) for side in (size or "1").split("x"))
    if name in SLICES:
        return Target(target, CHIPS[name], _slice(target, name, shape))
    count = shape[0]
    if len(shape) > 1:
        raise UsageError(f"--target {target}: {name} counts devices; take {name}:{math.prod(shape)}")
    if name != "cpu" and count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        low = count // GPUS_PER_HOST * GPUS_PER_HOST
        raise UsageError(
            f"--target {target}: hosts have {GPUS_PER_HOST} GPUs, {count} are no whole number of hosts; "
            f"take {name}:{low} or {name}:{low + GPUS_PER_HOST}"
        )
    return Target(target, _cpu(count) if name == "cpu" else CHIPS[name], shape)


def _slice(target: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    found = next((s for s in SLICES[name] if s in (tuple(sorted(shape)), shape)), None)
    if found:
        return found
    words = {s: f"{name}:{'x'.join(map(str, s))}" for s in SLICES[name]}
    if ":" not in target:
        raise UsageError(f"--target {target}: name the slice, for example {words[SLICES[name][2]]}")
    near = sorted(words, key=lambda s: abs(math.log(math.prod(s) / math.prod(shape))))[:2]
    offers = " or ".join(words[s] for s in near)
    raise UsageError(f"--target {target}: there is no such slice of {math.prod(shape)} chips; take {offers}")


def _cpu(devices: int) -> Chip:
    """N simulated devices share this machine's cores and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else CPU.device_bytes
    return replace(CPU, device_bytes=memory // devices, peak=CPU.peak * cores / devices)


def chip_of(device_kind: str) -> Chip | None:
    """Return the figures of a device by the name that JAX has for it; None where there are none."""
    kind = device_kind.lower().replace(" lite", "e").replace("tpu ", "")
    kind = re.sub(r"rtx (?=\d)", "rtx", kind)
    kind = "v5p" if kind == "v5" else kind
    names = [n for n in CHIPS if re.search(rf"(?<![a-fh-z]){n.split('-')[0]}(?!\w)", kind)]
    return CHIPS[names[0]] if names and not NO_PEAK.search(device_kind) else None


def _this_machine() -> Target:
    import jax

    device, shape = jax.devices()[0], (jax.device_count(),)
    if device.platform == "cpu":
        return Target("auto", _cpu(shape[0]), shape, real=True)
    chip = chip_of(device.device_kind)
    if chip is None:
        kind = device.device_kind
        raise UsageError(f"--target auto: no figures for {kind}; name a target, for example --target h100:8")
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
            raise UsageError(
                f"--target cpu:{count}: JAX has started with {len(found)} CPU devices; start a new process"
            )
        return found[:count]
    if chip.platform == "rocm":
        raise NoCompiler(f"there is no compiler here for AMD's {chip.name}")
    extra, modules = EXTRAS[chip.platform]
    if not any(map(is_installed, modules)):
        raise NoCompiler(f"compiling for {chip.name} needs the extra {extra}: {install_command(extra)}")
    options: dict[str, Any] = {}
    name = f"{chip.name}:{'x'.join(map(str, target.shape))}"
    if chip.platform == "cuda":
        for line in other_versions([f"jax-cuda{number}-{part}" for number in (13, 12) for part in ("plugin", "pjrt")]):
            raise UsageError(line)
        name = f"1x{target.hosts}x{count // target.hosts}"  # slices x hosts x GPUs of a host
        options = {"topology": name, "target_config": _target_config(chip)}
    try:
        return list(topologies.get_topology_desc(name, chip.platform, **options).devices)
    except Exception as error:  # the plugin's own errors have no common type
        line = str(error).splitlines()[0][:200]
        raise NoCompiler(f"the compiler for {chip.name} did not start: {line}") from error


def install_command(extra: str) -> str:
    """Return how to install an extra of pyproject.toml, from a checkout or from elsewhere."""
    return f"pip install -e '.[{extra}]'" if os.path.exists("pyproject.toml") else f"pip install 'jaxchat[{extra}]'"


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


def _target_config(chip: Chip) -> str:
    """The device description that XLA's GPU compiler reads, in protobuf's text format."""
    cores, units, l2, clock, shared, optin, (major, minor), name = _GPU[chip.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {THREADS_PER_SM.get((major, minor), 2048)}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock} l2_cache_size: {l2}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.memory_rate)} device_memory_size: {chip.device_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
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
    names = {r["hardware"]["device"]: None for r in records.values() if r["hardware"]["platform"] != "cpu"}
    prices = {name: chip.price for name in names if (chip := chip_of(name))}
    unknown = [name for name in names if name not in prices]
    known = sum(dollars for dollars in stages.values() if dollars is not None)
    if unknown:
        words = f"not known: no price of {', '.join(unknown)} at hand"
        words += f"; the stages on other devices {known:,.2f} USD" if known else ""
    elif prices:
        words = f"{known:,.2f} USD ({PRICES_OF})"
    else:
        words = "nothing: it ran on CPUs; electricity is not counted"
    total = None if unknown else known
    return {"usd": total, "stages": stages, "prices": prices, "assumption": PRICES_OF, "words": words}
