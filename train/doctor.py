"""The command `doctor`: what this machine can do, tried here and now; what stage records say of machine and code."""

from __future__ import annotations

import contextlib
import json
import logging.handlers
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxchat.attention import TOLERANCE, disagreement, trusted_backend
from jaxchat.config import Config, MeshConfig
from jaxchat.data.shards import cores
from jaxchat.errors import UsageError, command_line, first_line, install_command
from jaxchat.log import print_facts, waiting
from jaxchat.sharding import make_mesh, require_devices
from jaxchat.sizes import peak_flops
from jaxchat.tools.sandbox import LEVELS, probe
from jaxchat.tools.sandbox_child import abi
from jaxchat.train_state import compute_dtype

from .targets import host_memory, is_installed, other_versions

NEW_DRIVER = 580  # from which on CUDA 13 runs; older ones need CUDA 12
NEW_CAPABILITY = 7.5  # the least that CUDA 13 compiles for
GOOGLE, TPUS = "0x1ae0", ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # PCI; v2 to TPU7x
PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")  # must be of JAX's version
# extra of pyproject.toml -> (a module that comes with it, what it is for)
EXTRAS = {
    "cuda": ("jax_plugins.xla_cuda13", "training on NVIDIA GPUs, driver 580 or newer"),
    "cuda12": ("jax_plugins.xla_cuda12", "training on NVIDIA GPUs with an older driver"),
    "tpu": ("libtpu", "training on TPUs"),
    "plan-cuda": ("jax_plugins.xla_cuda13", "plans for NVIDIA GPUs that are not here"),
    "plan-tpu": ("libtpu", "plans for TPUs that are not here"),
    "tensorboard": ("tensorboardX", "curves on TensorBoard"),
    "docs": ("mkdocs", "the documents as a site"),
    "wandb": ("wandb", "curves on Weights & Biases"),
    "trackio": ("trackio", "curves on trackio"),
    "hf-check": ("transformers", "comparison with Hugging Face's implementation"),
    "onnx": ("onnx", "export as ONNX"),
    "lm-eval": ("lm_eval", "the exams of lm-evaluation-harness"),
    "ray": ("ray", "runs under Ray"),
    "dev": ("ruff", "work on jaxchat itself"),
}


# Machine and code


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a run computes."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def hardware() -> dict[str, Any]:
    """Return the devices and processes of the whole run, and cores and memory of this host."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind if device.platform != "cpu" else (platform.processor() or platform.machine()),
        "devices": jax.device_count(),
        "hosts": jax.process_count(),
        "cpu_cores": cores(),
        "memory_bytes": host_memory(),
    }


def peak_rss() -> int | None:
    """Return the peak bytes of this process; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


def memory_peak() -> int | None:
    """Return the peak bytes in use on this process's first device, or of the process where the device does not tell."""
    stats: dict[str, int] = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or peak_rss()


def available_memory() -> int | None:
    """Return the bytes that this process can still take, within the limits of host, container and process.

    None on anything but Linux.
    """
    found = []
    with contextlib.suppress(OSError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(limit - used)
    with contextlib.suppress(OSError, ImportError):
        import resource

        limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], int(Path("/proc/self/statm").read_text().split()[0])
        if limit != resource.RLIM_INFINITY:
            found.append(limit - used * resource.getpagesize())
    return max(0, min(found)) if found else None


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def commit() -> str | None:
    """Return the code's git commit, with + where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # installed inside somebody else's checkout
        return git("describe", "--always", "--exclude=*", "--dirty=+")
    except (OSError, subprocess.SubprocessError):
        return None


# Accelerators, found without JAX


def accelerators(root: Path = Path("/")) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return the NVIDIA, AMD and TPU devices of the machine whose file system is `root`, found without JAX.

    Of each: name, the command that installs its JAX, and modules of which one is there once that is done.
    """
    found: list[tuple[str, str, tuple[str, ...]]] = []
    card = _nvidia_smi(root)
    if card or any((root / "dev").glob("nvidia[0-9]*")):
        name, driver, capability = card or ("NVIDIA GPU", NEW_DRIVER, NEW_CAPABILITY)
        extra = "cuda" if driver >= NEW_DRIVER and capability >= NEW_CAPABILITY else "cuda12"
        found.append((name, install_command(extra), ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")))
    if (root / "dev/kfd").exists():
        line = f"pip install 'jax[rocm7-local]=={jax.__version__}' (needs ROCm 7; not tried with jaxchat)"
        found.append(("AMD GPU", line, ("jax_plugins.xla_rocm7", "jax_plugins.xla_rocm10")))
    vendors = (root / "sys/bus/pci/devices").glob("*/vendor")  # newer TPUs are under /dev/vfio, as any other device
    pci = [(path.read_text().strip(), path.with_name("device").read_text().strip()) for path in vendors]
    if any((root / "dev").glob("accel[0-9]*")) or any(vendor == GOOGLE and device in TPUS for vendor, device in pci):
        found.append(("TPU", install_command("tpu"), ("libtpu",)))
    return found


def _nvidia_smi(root: Path) -> tuple[str, int, float] | None:
    """Return (name, driver's major version, compute capability) of the first card that nvidia-smi lists."""
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


def unused_accelerator(root: Path = Path("/")) -> str | None:
    """Return one line that names a device JAX does not use and what to do; None where there is none.

    None too where the user asked for the CPU (JAX_PLATFORMS).
    """
    if getattr(jax.config, "jax_platforms", None) == "cpu":
        return None
    if jax.default_backend() != "cpu" or not (found := accelerators(root)):
        return None
    name, install, plugins = found[0]
    if any(map(is_installed, plugins)):
        return f"{name}: its JAX is installed but does not start; {command_line('doctor')} says why"
    return f"{name}: this JAX computes on the CPU; {install}"


# The command: every check returns (values, what to do or to install)

Finding = tuple[dict[str, Any], list[str]]


def doctor(config: Config, place: Path, as_json: bool) -> None:
    """Print what the machine can do for a run of `config` kept in `place`."""
    with waiting("looking at this machine"):
        result = examine(config, place)
    if as_json:
        print(json.dumps(result))
    else:
        missing = {name: install_command(name) for name, there in result["extras"].items() if there is False}
        extras = {name: f"{why}: {missing.get(name, 'installed')}" for name, (_, why) in EXTRAS.items()}
        print_facts(result | {"extras": extras, "advice": result["advice"] or "nothing to do"})
    require_devices(doctor=True)


def examine(config: Config, place: Path) -> dict[str, Any]:
    """Return the values of every check and the `advice`; one that fails has an `error` and does not stop the others."""
    checks: dict[str, Callable[[], Finding]] = {
        "devices": lambda: check_devices(config),
        "attention": lambda: check_attention(config),
        "disk": lambda: check_disk(place),
        "sandbox": check_sandbox,
        "network": check_network,
        "versions": lambda: (versions(), other_versions(PLUGINS)),
        "extras": lambda: ({name: is_installed(module) for name, (module, _) in EXTRAS.items()}, []),
    }
    found, advice = dict[str, Any](), list[str]()
    with jax_warnings() as records:
        for name, check in checks.items():
            try:
                found[name], lines = check()
            except Exception as error:  # a broken driver raises anything; this command is there to show it
                known = isinstance(error, UsageError)  # said at the end
                found[name] = {"error": str(error) if known else named(error)}
                lines = [] if known else [f"{name}: {named(error)}"]
            advice += lines
    advice += [record.getMessage().splitlines()[0].rstrip(".") for record in records]
    return found | {"advice": advice}


@contextlib.contextmanager
def jax_warnings() -> Iterator[list[logging.LogRecord]]:
    """Collect JAX's warnings, such as plugins that fail, instead of showing them."""
    collector = logging.handlers.BufferingHandler(capacity=1000)
    collector.setLevel(logging.WARNING)
    logger = logging.getLogger("jax")
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [collector], False
    try:
        yield collector.buffer
    finally:
        logger.handlers, logger.propagate = handlers, propagate


def named(error: Exception) -> str:
    """Return an error's class and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error)}"


def check_devices(config: Config) -> Finding:
    """Find accelerators and this host.

    `memory_bytes`: what the process may take of one device; None where it is shared. `unused`: a line on an accelerator
    that JAX does not use, with what to install.
    """
    require_devices(doctor=True)
    unused = unused_accelerator()
    first, host = jax.local_devices()[0], hardware()
    values = {
        "platform": host["platform"],
        "kind": host["device"],
        "count": host["devices"],
        "unused": unused,
        "memory_bytes": (first.memory_stats() or {}).get("bytes_limit"),
        "peak_flops": peak_flops(first.device_kind),
        "compute_dtype": compute_dtype(config, make_mesh(MeshConfig())).name,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_cores": host["cpu_cores"],
        "host_memory_bytes": host["memory_bytes"],
        "host_memory_available_bytes": available_memory(),
    }
    return values, [unused] if unused else []


def check_attention(config: Config) -> Finding:
    """Compare the backend that training takes with the float32 reference."""
    require_devices(doctor=True)
    dtype = compute_dtype(config, make_mesh(MeshConfig()))
    chosen, why = trusted_backend(config.model, dtype)
    begin, allowed = time.perf_counter(), TOLERANCE[dtype.itemsize]
    difference = disagreement(chosen, config.model, dtype)
    check = {"tolerance": allowed, "difference": difference, "seconds": time.perf_counter() - begin}
    advice = [] if difference <= allowed else [f"{chosen} attention fails its check: --set model.attention=xla"]
    return {"chosen": chosen, "why": why, "dtype": dtype.name} | check, advice + ([why] if why else [])


def check_disk(place: Path) -> Finding:
    """Look up the free room at the run directory, or where it would be."""
    there = existing(place)
    writable = os.access(there, os.W_OK)
    values = {"path": str(there), "free_bytes": shutil.disk_usage(there).free, "writable": writable}
    return values, [] if writable else [f"{there} cannot be written: give another --run-dir"]


def check_sandbox() -> Finding:
    """Try each level of the sandbox for a model's code with a program that does what it forbids.

    `bubblewrap`: None where it is not installed. `missing`: why the higher levels are not available.
    """
    found, installed = probe(), shutil.which("bwrap") is not None
    values = {
        "level": found.level,
        "meaning": LEVELS[found.level],
        "landlock_abi": abi(),
        "seccomp": found.level >= 2,
        "bubblewrap": found.level == 3 if installed else None,
        "missing": list(found.missing),
    }
    advice = [] if installed else ["bubblewrap is not installed (apt install bubblewrap): it adds sandbox level 3"]
    return values, advice


def check_network() -> Finding:
    """Connect to a loopback socket, as the chat page does; no other host is contacted."""
    loopback = False
    with (
        contextlib.suppress(OSError),
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5),
    ):
        loopback = True
    advice = [] if loopback else ["no loopback socket: serve cannot work here; chat does"]
    return {"loopback": loopback, "outside": "not tested"}, advice
