"""The machine that a benchmark runs on, how fast it multiplies and copies, and what its drivers share."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

ROUND_SECONDS = 0.05  # calls of one round together last at least this long, so that launching them costs nothing
MOST_CALLS = 50


def about() -> dict[str, Any]:
    """Return device, versions, load and the settings of the process that change speed."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.local_device_count(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),  # over the last minute, our own threads included
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "numpy")},
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def numbers(text: str) -> list[int]:
    """Parse `1,8,32`, for argparse."""
    return [int(number) for number in text.split(",")]


def call_seconds(function: Callable[..., Any], *arguments: Any, rounds: int = 5) -> list[float]:
    """Return the seconds of one call in each of `rounds` rounds of calls; compiling is not counted."""
    jax.block_until_ready(function(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(MOST_CALLS, round(ROUND_SECONDS / max(time.perf_counter() - begin, 1e-9))))
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - begin) / calls)
    return seconds


def median_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    return statistics.median(call_seconds(function, *arguments))


def product_rate(dtype: jnp.dtype, size: int) -> float:
    """Return the FLOP/s of one square product on the first device: what a step's products could reach at most."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    return 2 * size**3 / min(call_seconds(jax.jit(jnp.matmul), a, b, rounds=10))


def bandwidth() -> float:
    """Return the bytes a second that the memory reads and writes: the best of several large copies."""
    values = jnp.zeros((64 if jax.default_backend() == "cpu" else 1024) * 2**18, jnp.float32)
    return 2 * values.nbytes / min(call_seconds(jax.jit(lambda a: a + 1), values, rounds=10))


def peak_bytes() -> int | None:
    """Return the most memory of the first device that this process used so far; None where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def out_of_memory(error: BaseException) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
