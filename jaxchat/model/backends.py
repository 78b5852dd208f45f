"""Which attention runs on a device, and whether it can be trusted there."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxchat.config import ModelConfig
from jaxchat.model.attention import attention
from jaxchat.model.splash import TILE

KERNELS = ("cudnn", "splash")  # code of libraries; "blocked" and "xla" are JAX operations that XLA compiles
CHECK_LENGTH, CHECK_WINDOW = 2 * TILE, 100  # positions of the self-check's small case, and its short window
TOLERANCE = {2: 0.03, 4: 1e-3}  # of the largest value, by bytes of the dtype


def choose_backend(
    config: ModelConfig, dtype: jnp.dtype | type, device: jax.Device, seq_len: int | None = None
) -> tuple[str, str]:
    """(backend, why not the fast one) for rows of `seq_len` on `device`, which may be one of a dry run's.

    "cudnn" on NVIDIA GPUs, "splash" on TPUs, "blocked" on CPUs; "xla" where those cannot run: then the second part
    says why. `config.attention` decides if it is not "auto". Only splash depends on the rows' length.
    """
    T, N = seq_len or config.seq_len, config.head_width
    if config.attention == "splash" or (config.attention == "auto" and device.platform == "tpu"):
        if N % TILE or T % TILE:
            return "xla", f"splash attention needs heads and contexts of a multiple of {TILE}, not {N} and {T}"
        return "splash", ""
    if config.attention != "auto":
        return config.attention, ""
    if device.platform == "cpu":
        return "blocked", ""
    capability = cuda_capability(device)
    if capability is None or capability < 8:
        return "xla", "cuDNN's flash attention needs an NVIDIA GPU of compute capability 8.0 or newer"
    if jnp.dtype(dtype).itemsize != 2:
        return "xla", f"cuDNN's flash attention needs a 16-bit train.compute_dtype, not {jnp.dtype(dtype).name}"
    widest = 256 if capability >= 9 else 128
    if N % 8 or N > widest:
        return "xla", f"cuDNN's flash attention needs heads of a multiple of 8 up to {widest}, not {N}"
    return "cudnn", ""


def cuda_capability(device: jax.Device) -> float | None:
    """Compute capability of an NVIDIA GPU, such as 9.0; None for anything else (AMD's say "gfx90a")."""
    try:
        return float(getattr(device, "compute_capability", ""))
    except ValueError:
        return None


def has_fp8(device: jax.Device) -> bool:
    """Whether products of 8-bit floats run in hardware there: NVIDIA from 8.9 on, TPU v7x."""
    return (cuda_capability(device) or 0.0) >= 8.9 or "TPU7x" in device.device_kind


def disagreement(backend: str, config: ModelConfig, dtype: jnp.dtype | type) -> float:
    """Largest relative difference, output and gradients, between `backend` and float32 XLA on this machine.

    A small case with the heads' width and grouping of `config`, once with a short window and once with full context;
    a backend that cannot run raises what it raises.
    """
    group, N = config.n_heads // config.n_kv_heads, config.head_width
    shapes = [(2, CHECK_LENGTH, heads, N) for heads in (2 * group, 2, 2, 2 * group)]
    q, k, v, g = (
        jax.random.normal(key, s) for key, s in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
    )

    @functools.partial(jax.jit, static_argnums=(0,))
    def run(backend: str, *inputs: jax.Array) -> list[jax.Array]:
        results = []
        for window in (CHECK_WINDOW, CHECK_LENGTH):
            y, pull = jax.vjp(functools.partial(attention, window=window, backend=backend), *inputs[:3])
            results += [y, *pull(inputs[3])]
        return results

    rounded = [a.astype(dtype) for a in (q, k, v, g)]
    exact = run("xla", *(a.astype(jnp.float32) for a in rounded))
    pairs = zip(run(backend, *rounded), exact, strict=True)
    return max(float(jnp.abs(a.astype(jnp.float32) - e).max() / jnp.abs(e).max()) for a, e in pairs)


def trusted_backend(config: ModelConfig, dtype: jnp.dtype | type) -> tuple[str, str]:
    """`choose_backend` for this machine's devices; "xla" and the reason where the kernel fails its self-check.

    The one decision of a process, made once: training, exams, RL and serving all take it. Not for a dry run's devices.
    """
    backend, why = choose_backend(config, dtype, jax.local_devices()[0])
    if backend not in KERNELS:
        return backend, why
    key = _key(backend, config, dtype)
    if key not in _faults:
        _faults[key] = _fault(backend, config, dtype)
    return ("xla", _faults[key]) if _faults[key] else (backend, "")


def distrust(config: ModelConfig, dtype: jnp.dtype | type, why: str) -> None:
    """Take XLA's attention from now on in this process, whatever the self-check said."""
    backend, _ = choose_backend(config, dtype, jax.local_devices()[0])
    _faults[_key(backend, config, dtype)] = why


def with_attention(config: ModelConfig, dtype: jnp.dtype | type) -> ModelConfig:
    """`config` with the attention that `trusted_backend` decided on."""
    return dataclasses.replace(config, attention=trusted_backend(config, dtype)[0])


_faults: dict[tuple[str, int, int, str], str] = {}  # of the kernels tried in this process; "" where there was none


def _key(backend: str, config: ModelConfig, dtype: jnp.dtype | type) -> tuple[str, int, int, str]:
    """What the self-check depends on."""
    return backend, config.n_heads // config.n_kv_heads, config.head_width, jnp.dtype(dtype).name


def _fault(backend: str, config: ModelConfig, dtype: jnp.dtype | type) -> str:
    try:
        found = disagreement(backend, config, dtype)
    except Exception as error:  # a kernel may fail in any way, here or in the driver
        return f"{backend} attention cannot run here ({(str(error).splitlines() or [type(error).__name__])[0][:200]})"
    if found <= TOLERANCE[jnp.dtype(dtype).itemsize]:  # not so for NaN
        return ""
    return f"{backend} attention differs from the reference by {found:.2g} of its largest value"
