"""Before a run trains: accelerators that JAX does not use, days on a CPU, room on the disks.

`before_training` is for real runs; a rehearsal trains a few steps only and does not call it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import shutil
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.log import say
from jaxchat.model.sizes import flops_per_token
from jaxchat.paths import RunDir
from train.disk import check_room, rl_steps, sft_tokens
from train.stage import Stage
from train.stages import remaining
from train.targets import CPU, install_command

LONGEST_HOURS = 48.0  # on a CPU, without train.allow_slow
SLOWEST_RATE = 1e9  # FLOP/s of any CPU: what is short even there is not measured
PRODUCT = 1536  # side of the measured matrices
TRAINED = ("pretrain", "sft", "rl")
NEW_DRIVER = 580  # from which on CUDA 13 runs; older ones need CUDA 12
NEW_CAPABILITY = 7.5  # the least that CUDA 13 compiles for
GOOGLE, TPUS = "0x1ae0", ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # PCI; v2 to TPU7x


@dataclass(frozen=True)
class Accelerator:
    """A device of this machine, whether or not JAX can use it. `install`: what brings its JAX."""

    name: str
    install: str
    plugins: tuple[str, ...]  # modules, any of which means that its JAX is installed


def before_training(config: Config, run: RunDir, stages: Sequence[Stage]) -> None:
    """Say what JAX does not use; stop where training would take days or a disk is too small.

    Only stages that would really run count. Raises `UsageError` for the time and `DataError` for the disk.
    """
    left = {stage.name for stage in remaining(config, run, stages)}
    if not left:
        return
    line = unused_accelerator()
    if line:
        say(f"  {line}", style="yellow")
    check_time(config, run, left, line)
    check_room(config, run, left)


def look(root: Path = Path("/")) -> list[Accelerator]:
    """Return the NVIDIA, AMD and TPU devices of the machine whose file system is `root`, found without JAX."""
    found = []
    card = _nvidia_smi(root)
    if card or any((root / "dev").glob("nvidia[0-9]*")):
        name, driver, capability = card or ("NVIDIA GPU", _driver(root), None)
        old = (driver or NEW_DRIVER) < NEW_DRIVER or (capability or NEW_CAPABILITY) < NEW_CAPABILITY
        plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
        found.append(Accelerator(name, install_command("cuda12" if old else "cuda"), plugins))
    if (root / "dev/kfd").exists() and _has_amd_gpu(root):
        line = f"pip install 'jax[rocm7-local]=={jax.__version__}' (needs ROCm 7; not tried with jaxchat)"
        found.append(Accelerator("AMD GPU", line, ("jax_plugins.xla_rocm7", "jax_plugins.xla_rocm10")))
    if any((root / "dev").glob("accel[0-9]*")) or _has_tpu(root):
        found.append(Accelerator("TPU", install_command("tpu"), ("libtpu",)))
    return found


def unused_accelerator(root: Path = Path("/")) -> str | None:
    """Return one line that names a device JAX does not use and what to do; None where there is none.

    None too where the user asked for the CPU (JAX_PLATFORMS).
    """
    if getattr(jax.config, "jax_platforms", None) == "cpu" or not (found := look(root)):
        return None
    logging.getLogger("jax._src.xla_bridge").addFilter(lambda record: "may be present" not in record.getMessage())
    if jax.default_backend() != "cpu":
        return None
    device = found[0]
    if any(map(_is_installed, device.plugins)):
        return f"{device.name}: its JAX is installed but does not start; python launch.py --doctor says why"
    return f"{device.name}: this JAX computes on the CPU; {device.install}"


def check_time(config: Config, run: RunDir, left: Collection[str], line: str | None = None) -> None:
    """`UsageError` where the stages `left` would train for more than two days on this CPU."""
    if config.train.allow_slow or jax.default_backend() != "cpu":
        return
    flops = training_flops(config, run, left)
    if flops / SLOWEST_RATE <= LONGEST_HOURS * 3600:
        return
    rate = product_rate() * jax.process_count()
    hours = flops / (rate * CPU.mfu) / 3600
    if hours <= LONGEST_HOURS:
        return
    days, rate = f"{hours / 24:,.0f} days on this CPU", f"{rate / 1e9:,.0f} GFLOP/s in float32 products"
    advice = f"{line}. Or take" if line else "Take"
    raise UsageError(
        f"{config.tier}: training would take about {days} ({rate}, {flops:.2g} FLOPs left). {advice} a machine "
        "with a GPU or TPU (what it needs there: --plan --target h100:8), or a smaller tier (--tiers); "
        "--set train.allow_slow=true trains here all the same"
    )


def training_flops(config: Config, run: RunDir, left: Collection[str]) -> float:
    """Return the FLOPs that the stages `left` have still to train, checkpoints counted as done."""
    per_token, total = flops_per_token(config.model), 0.0
    if "pretrain" in left:
        steps = [int(p.name) for p in run.stage("base").glob("*") if p.name.isdigit()]
        done = min(max(steps, default=0), config.train.steps)
        total += (config.train.steps - done) * config.train.batch_tokens * per_token
    if "sft" in left:
        total += sft_tokens(config) * config.sft.epochs * per_token
    if "rl" in left:  # an answer is made (a third of the FLOPs of training on it) and learned from
        answers = rl_steps(config) * config.rl.prompts * config.rl.samples
        total += answers * config.rl.max_tokens * per_token * 4 / 3
    return total


def product_rate(repeats: int = 3) -> float:
    """Return the FLOP/s of float32 products on this CPU, the best of a few."""
    multiply, matrix = jax.jit(jnp.matmul), jnp.ones((PRODUCT, PRODUCT), jnp.float32)
    seconds = []
    for _ in range(repeats + 1):  # the first compiles
        begin = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * PRODUCT**3 / min(seconds)


def _nvidia_smi(root: Path) -> tuple[str, int, float] | None:
    """(name, driver's major version, compute capability) of the first card that nvidia-smi lists."""
    places = [root / "usr/bin/nvidia-smi", root / "usr/lib/wsl/lib/nvidia-smi"]
    if root == Path("/") and (elsewhere := shutil.which("nvidia-smi")):
        places.append(Path(elsewhere))
    for program in (path for path in places if path.is_file()):
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            query = [str(program), "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
            name, driver, capability = done.stdout.splitlines()[0].split(", ")
            return name, int(driver.split(".")[0]), float(capability)
    return None


def _driver(root: Path) -> int | None:
    with contextlib.suppress(OSError):
        text = (root / "proc/driver/nvidia/version").read_text()
        if match := re.search(r"Kernel Module.*?\s(\d+)\.\d+", text):
            return int(match[1])
    return None


def _has_amd_gpu(root: Path) -> bool:
    """Whether the kernel's list of AMD compute nodes has one with SIMD units; True where there is no list."""
    nodes = list((root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties"))
    return not nodes or any(re.search(r"simd_count [1-9]", _read(node)) for node in nodes)


def _has_tpu(root: Path) -> bool:
    """Whether a TPU is on the PCI bus: newer TPU machines have it under /dev/vfio, as any other device."""
    vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
    return any(_read(v) == GOOGLE and _read(v.with_name("device")) in TPUS for v in vendors)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _is_installed(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # of the package it would be in
        return importlib.util.find_spec(module) is not None
    return False
