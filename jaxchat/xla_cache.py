"""JAX's persistent compilation cache: on by default, of bounded size; a fault in it never stops a run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
import warnings
from pathlib import Path

from jaxchat.log import say
from jaxchat.run_dir import locked

LARGEST = 2 << 30  # bytes; JAX deletes the least recently used programs
MOST = 4_000  # programs that a start leaves there: JAX reads the time of every one when it adds one
LEAST_FREE = 64 << 20  # bytes on the disk, below which nothing is kept
LEAST_SECONDS = 0.02  # of compilation. Reading a small program takes 2 ms


def use_cache(cache_dir: str) -> None:
    """Keep compiled programs below `cache_dir` and read those that are there; a warning where that cannot be.

    Call it before anything compiles. A cache that JAX was told of otherwise stays as it is.
    """
    import jax

    try:
        folder = open_cache(cache_dir)
    except OSError as error:
        reason = error.strerror or str(error)
        say(f"compiled programs cannot be kept in {cache_dir} ({reason}); every start compiles anew", style="yellow")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    # a disk that becomes full costs the next start some seconds, and is no news for every single program
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def open_cache(cache_dir: str) -> Path:
    """Make the cache's folder for this user and kind of CPU and return it; `OSError` where it cannot be used.

    What lies there is executed, so it must be the user's alone. What a killed process left unfinished (it has no time
    of use) is deleted, and all but the newest `MOST` programs.
    """
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    folder = Path(cache_dir).expanduser() / "xla" / f"{user}-{_cpu()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid"):
        stat = folder.stat()
        if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
            raise OSError(f"{folder} can be written by others")
    if shutil.disk_usage(folder).free < LEAST_FREE:
        raise OSError("the disk is full")
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"x")
    with locked(folder / ".lockfile"):  # JAX's own lock
        programs = {path.name.removesuffix("-cache"): path for path in folder.glob("*-cache")}
        times = {path.name.removesuffix("-atime"): path for path in folder.glob("*-atime")}
        used = {name: times[name].stat().st_mtime_ns for name in programs.keys() & times.keys()}
        kept = set(sorted(used, key=lambda name: -used[name])[:MOST])
        for name, path in (*programs.items(), *times.items()):
            if name not in kept:
                path.unlink(missing_ok=True)
    return folder


def _cpu() -> str:
    """Return a short name for what this CPU can do: a program compiled for another may not run here."""
    text = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        kinds = ("model name", "flags", "Features", "CPU part")
        text += "".join(sorted({line for line in lines if line.partition("\t")[0].strip() in kinds}))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
