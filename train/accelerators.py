"""Accelerators of this machine, found without JAX, and the line that brings the JAX for one that it does not use."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jax

from train.targets import install_command

NEW_DRIVER = 580  # from which on CUDA 13 runs; older ones need CUDA 12
NEW_CAPABILITY = 7.5  # the least that CUDA 13 compiles for
GOOGLE, TPUS = "0x1ae0", ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # PCI; v2 to TPU7x


@dataclass(frozen=True)
class Accelerator:
    """A device of this machine, whether or not JAX can use it. `install`: what brings its JAX."""

    name: str
    install: str
    plugins: tuple[str, ...]  # modules, any of which means that its JAX is installed


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
    # ours says what to install; it must be there before JAX looks for devices
    logging.getLogger("jax._src.xla_bridge").addFilter(_is_other)
    if getattr(jax.config, "jax_platforms", None) == "cpu" or jax.default_backend() != "cpu":
        return None
    if not (found := look(root)):
        return None
    device = found[0]
    if any(map(_is_installed, device.plugins)):
        return f"{device.name}: its JAX is installed but does not start; python launch.py --doctor says why"
    return f"{device.name}: this JAX computes on the CPU; {device.install}"


def _is_other(record: logging.LogRecord) -> bool:
    """Whether a line of JAX's log is not its own hint that a device may be present."""
    return "may be present" not in record.getMessage()


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
