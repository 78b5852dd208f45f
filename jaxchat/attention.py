"""Which attention runs on a device, and whether it can be trusted there."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.config import ModelConfig
from jaxchat.sharding import BATCH_AXES

# Splash attention, JAX's own flash kernel for TPUs, over the rows and heads of a mesh.


TILE = 128  # lanes of a TPU: positions and head widths come in multiples
SPLASH_BLOCK = 512  # positions per kernel block, at most


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int, mesh: Mesh | None = None, interpret: bool = False
) -> jax.Array:
    """Causal attention over `window` positions back; q (B, T, H, N), k and v (B, T, K, N) -> (B, T, H, N).

    T and N are multiples of `TILE`. On a mesh every device runs its own rows and heads. `interpret` runs the kernel's
    program without a TPU, slowly. Under rematerialization its residuals are named "splash".
    """
    run = functools.partial(_local, window=window, interpret=interpret)
    if mesh is not None and mesh.size > 1:
        spec = P(BATCH_AXES, None, "tensor")
        run = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return run(q, k, v)


def _local(q: jax.Array, k: jax.Array, v: jax.Array, window: int, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import; no CPU or GPU needs it

    T, H, N = q.shape[1:]
    mask = splash.LocalMask((T, T), (window, 0), 0) if window < T - 1 else splash.CausalMask((T, T))
    block = next(size for size in (SPLASH_BLOCK, SPLASH_BLOCK // 2, TILE) if T % size == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="splash",
        interpret=interpret,
    )  # fmt: skip
    heads_first = ((q * N**-0.5).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))  # splash does not scale
    return jax.vmap(kernel)(*heads_first).swapaxes(1, 2).astype(q.dtype)


# Causal attention with optional sliding windows: one function, several backends.
#
# Axes: B batch, T time, H query heads, K kv heads (H a multiple of K), N head width.


BLOCK = 128  # queries per block of the blocked backend
SAFE_SCORE = 40.0  # exp(-2 * 40) is still a normal float32


@jax.named_scope("attention")  # so that a profile can tell its products from others
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    backend: str = "xla",
    score_bound: float = math.inf,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Softmax attention of every position over itself and the `window` positions before it.

    Args:
      q: (B, T, H, N); k, v: (B, T, K, N). `window >= T - 1` is full causal attention.
      backend: "xla", "blocked", "cudnn" (16-bit inputs on an NVIDIA GPU) or "splash" (TPU).
      score_bound: no |q.k| / sqrt(N) is larger; where it is small the blocked backend needs no row maximum.
      mesh: where rows and heads are split, for the backend that XLA cannot split by itself (splash).

    Returns: (B, T, H, N) in the dtype of q.
    """
    if backend == "blocked":
        return _blocked(q, k, v, window, score_bound)
    if backend == "splash":
        return splash_attention(q, k, v, window, mesh)
    # is_causal must stay: a window alone would look into the future (jax issue 39576)
    local = (window, 0) if window < q.shape[1] - 1 else None
    implementation = "cudnn" if backend == "cudnn" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation=implementation)  # type: ignore[call-overload]


def _blocked(q: jax.Array, k: jax.Array, v: jax.Array, window: int, score_bound: float) -> jax.Array:
    """Blocks of queries over the keys they can see only: half the work of a masked square."""
    B, T, H, N = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, H // K, N).transpose(0, 2, 3, 1, 4) * N**-0.5  # (B, K, G, T, N)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # (B, K, T, N)
    blocks = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        first = max(0, start - window)
        scores = jnp.einsum("bkgqn,bksn->bkgqs", q[:, :, :, start:stop], k[:, :, first:stop])
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)
        visible = (distance >= 0) & (distance <= window)
        weights, total = _exp_weights(scores.astype(jnp.float32), visible, score_bound)
        out = jnp.einsum("bkgqs,bksn->bkgqn", weights.astype(v.dtype), v[:, :, first:stop])
        blocks.append((out / total).astype(q.dtype))
    y = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)


def _exp_weights(scores: jax.Array, visible: jax.Array, score_bound: float) -> tuple[jax.Array, jax.Array]:
    """Unnormalized softmax weights and their sum over the last axis.

    QK-norm bounds the scores, so a constant does the row maximum's work: the softmax does not change, one pass less.
    """
    if score_bound <= SAFE_SCORE:
        top = jnp.float32(score_bound)
    else:
        top = jax.lax.stop_gradient(jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1, keepdims=True))
    weights = jnp.exp(jnp.where(visible, scores - top, -jnp.inf))
    return weights, weights.sum(axis=-1, keepdims=True)


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """One query per row over a cache.

    Args:
      q: (R, H, N); k, v: (R, K, S, N); visible: (R, S) bool, at least one True per row.

    Returns: (R, H, N) in the dtype of q.
    """
    R, H, N = q.shape
    K = k.shape[1]
    q = q.reshape(R, K, H // K, N) * N**-0.5
    scores = jnp.einsum("rkgn,rksn->rkgs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkgs,rksn->rkgn", weights, v).reshape(R, H, N)


def piece_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Several queries per row over a cache.

    Args:
      q: (R, T, H, N); k, v: (R, K, S, N); visible: (R, T, S) bool, at least one True per query.

    Returns: (R, T, H, N) in the dtype of q.
    """
    R, T, H, N = q.shape
    K = k.shape[1]
    q = q.reshape(R, T, K, H // K, N) * N**-0.5
    scores = jnp.einsum("rtkgn,rksn->rkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkgts,rksn->rtkgn", weights, v).reshape(R, T, H, N)


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
