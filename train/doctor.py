"""The command `doctor`: what this machine can do, tried here and now; what stage records say of machine and code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxchat.attention import TOLERANCE, choose_backend, disagreement
from jaxchat.config import Config, MeshConfig
from jaxchat.log import print_facts, waiting
from jaxchat.sharding import make_mesh
from jaxchat.sizes import peak_flops
from jaxchat.tools.sandbox import LEVELS, probe
from jaxchat.tools.sandbox_child import abi
from jaxchat.train_state import compute_dtype

from .targets import install_command, is_installed, other_versions

GIB = 2**30
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
    "hf-check": ("transformers", "comparison with Hugging Face's implementation"),
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
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
    }


def peak_rss() -> int | None:
    """Return the peak bytes of this process; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


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


def commit() -> str | None:
    """Return the code's git commit, with + where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None  # installed inside somebody else's checkout
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# Accelerators, found without JAX


@dataclass(frozen=True)
class Accelerator:
    """A device of this machine, whether or not JAX can use it. `install`: the command that installs its JAX."""

    name: str
    install: str
    plugins: tuple[str, ...]  # modules; with any of them its JAX is installed


def accelerators(root: Path = Path("/")) -> list[Accelerator]:
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
    if getattr(jax.config, "jax_platforms", None) == "cpu":
        return None
    with _jax_log() as records:  # JAX looks for devices now, if it has not yet
        backend = jax.default_backend()
    for record in records:
        if "may be present" not in record.getMessage():  # our line says it, and what to install
            logging.getLogger("jax").handle(record)
    if backend != "cpu":
        return None
    if not (found := accelerators(root)):
        return None
    device = found[0]
    if any(map(is_installed, device.plugins)):
        return f"{device.name}: its JAX is installed but does not start; python launch.py doctor says why"
    return f"{device.name}: this JAX computes on the CPU; {device.install}"


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


# The command


def doctor(config: Config, place: Path, as_json: bool) -> dict[str, Any]:
    """Print what the machine can do for a run of `config` kept in `place`, and return it."""
    with waiting("looking at this machine"):
        result = examine(config, place)
    if as_json:
        print(json.dumps(result))
    else:
        show(result)
    return result


def examine(config: Config, place: Path) -> dict[str, Any]:
    """Return the findings; a part that fails has an `error` and does not stop the others."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": versions,
        "devices": lambda: devices(config),
        "attention": lambda: attention(config),
        "disk": lambda: disk(place),
        "network": network,
        "sandbox": sandbox,
        "extras": lambda: {name: is_installed(module) for name, (module, _) in EXTRAS.items()},
    }
    found: dict[str, Any] = {}
    with _jax_log() as records:
        for name, part in parts.items():
            try:
                found[name] = part()
            except Exception as error:  # a broken driver raises anything; this command is there to show it
                found[name] = {"error": _first_line(error)}
    warnings = [record.getMessage().splitlines()[0].rstrip(".") for record in records]
    return found | {"advice": advice(found, warnings)}


def devices(config: Config) -> dict[str, Any]:
    """Return accelerators and this host.

    `memory_bytes`: what the process may take of one device; None where it is shared. `unused`: a line on an accelerator
    that JAX does not use, with what to install.
    """
    unused = unused_accelerator()
    first, host = jax.local_devices()[0], hardware()
    return {
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


def attention(config: Config) -> dict[str, Any]:
    """Return the backend that training takes, and how far it and XLA's own are from the float32 reference."""
    dtype = compute_dtype(config, make_mesh(MeshConfig()))
    chosen, why = choose_backend(config.model, dtype, jax.local_devices()[0])
    checks = {}
    for backend in dict.fromkeys((chosen, "xla")):
        begin = time.perf_counter()
        try:
            found: dict[str, Any] = {"difference": disagreement(backend, config.model, dtype)}
            found["ok"] = found["difference"] <= TOLERANCE[dtype.itemsize]
        except Exception as error:  # a kernel may fail in any way, here or in the driver
            found = {"ok": False, "error": _first_line(error)}
        checks[backend] = found | {"seconds": time.perf_counter() - begin}
    taken = chosen if checks[chosen]["ok"] else "xla"
    return {"chosen": taken, "why": why, "dtype": dtype.name, "tolerance": TOLERANCE[dtype.itemsize], "checks": checks}


def disk(place: Path) -> dict[str, Any]:
    """Return the free room at the run directory, or where it would be."""
    there = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    return {"path": str(there), "free_bytes": shutil.disk_usage(there).free, "writable": os.access(there, os.W_OK)}


def network() -> dict[str, Any]:
    """Send a byte through a loopback socket, as the chat page needs; no other host is contacted."""
    loopback = False
    with (
        contextlib.suppress(OSError),
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
        server.accept()[0] as accepted,
    ):
        client.sendall(b"x")
        loopback = accepted.recv(1) == b"x"
    return {"loopback": loopback, "outside": "not tested"}


def sandbox() -> dict[str, Any]:
    """Return the sandbox level for a model's code, each level tried with a program that does what it forbids.

    `bubblewrap`: None where it is not installed. `missing`: why the higher levels are not available.
    """
    found = probe()
    return {
        "level": found.level,
        "landlock_abi": abi(),
        "seccomp": found.level >= 2,
        "bubblewrap": found.level == 3 if shutil.which("bwrap") else None,
        "missing": list(found.missing),
    }


def advice(found: dict[str, Any], warnings: list[str]) -> list[str]:
    """Return what to do or to install, from the findings and from what JAX warned of at its start."""
    lines = [f"{name}: {part['error']}" for name, part in found.items() if part.get("error")]
    if found["devices"].get("error") and (asked := getattr(jax.config, "jax_platforms", None)):
        lines.append(f"JAX_PLATFORMS={asked}: unset it to take what is here")
    if unused := found["devices"].get("unused"):
        lines.append(unused)
    lines += warnings + other_versions(PLUGINS)
    for name, check in found["attention"].get("checks", {}).items():
        if not check["ok"]:
            lines.append(f"{name} attention fails its check; training falls back: {check.get('error', check)}")
    if not found["disk"].get("writable", True):
        lines.append(f"{found['disk']['path']} cannot be written: give another --run-dir")
    if not found["network"].get("loopback", True):
        lines.append("no loopback socket: serve cannot work here; chat does")
    if "bubblewrap" in found["sandbox"] and found["sandbox"]["bubblewrap"] is None:
        lines.append("bubblewrap is not installed (apt install bubblewrap): it adds sandbox level 3")
    return lines


@contextlib.contextmanager
def _jax_log() -> Iterator[list[logging.LogRecord]]:
    """Collect JAX's warnings, such as plugins that fail, instead of showing them."""
    records: list[logging.LogRecord] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger = logging.getLogger("jax")
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Collector(logging.WARNING)], False
    try:
        yield records
    finally:
        logger.handlers, logger.propagate = handlers, propagate


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def show(r: dict[str, Any]) -> None:
    """Print the findings for a person, on standard output."""
    facts: dict[str, str] = {}
    for name, describe in (("devices", _devices), ("attention", _attention), ("disk", _disk), ("sandbox", _sandbox)):
        facts |= {name: r[name]["error"]} if "error" in r[name] else describe(r[name])
    facts["network"] = f"loopback {'works' if r['network'].get('loopback') else 'FAILS'}; other hosts not tested"
    facts["versions"] = ", ".join(f"{name} {text}" for name, text in r["versions"].items())
    states = {name: "installed" if r["extras"][name] else install_command(name) for name in EXTRAS}
    facts["extras"] = "\n".join(f"{name}: {purpose}: {states[name]}" for name, (_, purpose) in EXTRAS.items())
    print_facts(facts | {"to do": "\n".join(r["advice"] or ["nothing"])})


def _devices(d: dict[str, Any]) -> dict[str, str]:
    memory = f" of {d['memory_bytes'] / GIB:.1f} GiB" if d["memory_bytes"] else ""
    peak = f"{d['peak_flops'] / 1e12:,.0f} TFLOP/s each in bfloat16" if d["peak_flops"] else "peak not known: no MFU"
    host = f"{d['system']}, {d['cpu_cores']} cores"
    for key, form in (("host_memory_bytes", ", {:.1f} GiB"), ("host_memory_available_bytes", ", {:.1f} GiB free")):
        host += form.format(d[key] / GIB) if d[key] else ""
    text = f"{d['count']} x {d['kind']}{memory} ({d['platform']}); {peak}; trains in {d['compute_dtype']}"
    return {"devices": text, "host": host}


def _attention(a: dict[str, Any]) -> dict[str, str]:
    facts = {"attention": a["chosen"] + (f" ({a['why']})" if a["why"] else "")}
    for name, check in a["checks"].items():
        found = check.get("error") or f"differs from the reference by {check['difference']:.1e}"
        limit = f"{a['dtype']}, {a['tolerance']:g} allowed, {check['seconds']:.1f} s"
        facts[f"  {name}"] = f"{'right' if check['ok'] else 'WRONG'}: {found} ({limit})"
    return facts


def _disk(d: dict[str, Any]) -> dict[str, str]:
    return {"disk": f"{d['free_bytes'] / GIB:.1f} GiB free at {d['path']}" + ("" if d["writable"] else ", READ-ONLY")}


def _sandbox(s: dict[str, Any]) -> dict[str, str]:
    bubblewrap = {None: "not installed", True: "works", False: "blocked here"}[s["bubblewrap"]]
    tools = f"Landlock {s['landlock_abi'] or 'no'}, seccomp {'yes' if s['seccomp'] else 'no'}, bubblewrap {bubblewrap}"
    facts = {"sandbox": f"{LEVELS[s['level']]} ({tools})"}
    return facts | ({"  why not more": "\n".join(s["missing"])} if s["missing"] else {})
