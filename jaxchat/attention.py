"""Softmax attention: whole texts by one of several backends, a cache by a mask, and which backend a device can run.

Axes: B batch, T time, S cache time, H query heads, K kv heads (H a multiple of K), N head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxchat.config import ModelConfig
from jaxchat.errors import first_line
from jaxchat.low_precision import product
from jaxchat.sharding import BATCH_AXES

BLOCK = 128  # queries per block of the blocked backend
SAFE_SCORE = 40.0  # exp(-2 * 40) is still a normal float32
TILE = 128  # lanes of a TPU: splash needs positions and head widths in multiples
SPLASH_BLOCK = 512  # positions per block of splash, at most


@jax.named_scope("attention")  # so that a profile can tell its products from others
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    backend: str = "xla",
    score_bound: float = math.inf,
    mesh: Mesh | None = None,
    operands: DTypeLike | None = None,
) -> jax.Array:
    """Attend from every position of a text to itself and the `window` positions before it.

    Args:
      q: (B, T, H, N); k, v: (B, T, K, N). `window >= T - 1` is full causal attention.
      backend: "xla", "blocked", "cudnn" (16-bit inputs on an NVIDIA GPU) or "splash" (TPU).
      score_bound: no |q.k| / sqrt(N) is larger; where it is small the blocked backend needs no row maximum.
      mesh: where rows and heads are split, for splash, which XLA cannot split by itself.
      operands: dtype of the products' operands in the blocked backend; None keeps that of q.

    Returns: (B, T, H, N) in the dtype of q.
    """
    if backend == "blocked":
        return _blocked(q, k, v, window, score_bound, operands or q.dtype)
    if backend == "splash":
        return splash_attention(q, k, v, window, mesh)
    # is_causal must stay: a window alone would look into the future (jax issue 39576)
    local = (window, 0) if window < q.shape[1] - 1 else None
    implementation = "cudnn" if backend == "cudnn" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation=implementation)  # type: ignore[call-overload]


def slow_half(head_width: int) -> np.ndarray:
    """Return which (N,) dimensions of a head belong to the half of the pairs that rotate slowly."""
    pair = np.arange(head_width) % (head_width // 2)
    return pair >= head_width // 4


def offset_keys(config: ModelConfig, k: jax.Array) -> jax.Array:
    """Return keys (B, T, K, N) of texts with the slow half of the token before, zeros at the first; `k` without.

    So one layer can find what followed a token earlier, which takes two otherwise (modded-nanogpt's key offset).
    """
    if not config.key_offset:
        return k
    return join_halves(k, jnp.pad(k, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1])


def join_halves(fast: jax.Array, slow: jax.Array) -> jax.Array:
    """Return keys (..., N) with the fast half of one and the slow half of another."""
    return jnp.where(slow_half(fast.shape[-1]), slow, fast)


def masked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    offset: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Attend to the cached positions that a mask shows.

    Args:
      q: (B, T, H, N); k, v: (B, K, S, N), the layout of the cache.
      mask: (B, T, S) bool, at least one True for every query whose result is used.
      offset: of a model with `offset_keys`, moves scores (..., T, S) from each key's place to the token's behind it.

    Returns: (B, T, H, N) in the dtype of q.
    """
    B, T, H, N = q.shape
    K = k.shape[1]
    q = q.reshape(B, T, K, H // K, N) * N**-0.5
    if offset:  # both halves in one product, which reads the keys once
        q = jnp.concatenate([join_halves(q, jnp.zeros_like(q)), join_halves(jnp.zeros_like(q), q)], axis=3)
    scores = jnp.einsum("btkgn,bksn->bkgts", q, k, preferred_element_type=jnp.float32)
    if offset:
        of_fast, of_slow = jnp.split(scores, 2, axis=2)
        scores = of_fast + offset(of_slow)
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksn->btkgn", weights, v).reshape(B, T, H, N)


def _blocked(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int, score_bound: float, operands: DTypeLike
) -> jax.Array:
    """Attend block by block to the keys that a block of queries sees: half the work of a masked square."""
    B, T, H, N = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, H // K, N).transpose(0, 2, 3, 1, 4) * N**-0.5  # (B, K, G, T, N)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # (B, K, T, N)
    outs = []
    for start in range(0, T, BLOCK):
        stop, first = min(start + BLOCK, T), max(0, start - window)
        queries = q[:, :, :, start:stop].reshape(B, K, -1, N)  # of all G heads that share keys
        spec = BlockSpec(start - first, window, score_bound, operands)
        out = _block_attention(queries, k[:, :, first:stop], v[:, :, first:stop], spec)
        outs.append(out.reshape(B, K, H // K, -1, N))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)


class BlockSpec(NamedTuple):
    """Static settings of a block of queries."""

    start: int  # position of the first query among the block's keys; those of the last query end there
    window: int
    score_bound: float
    operands: DTypeLike  # of the products

    def mask(self, queries: int, keys: int) -> np.ndarray:
        """Return which keys each of the G * Q queries sees, (G * Q, S) bool."""
        distance = np.arange(self.start, keys)[:, None] - np.arange(keys)
        return np.tile((distance >= 0) & (distance <= self.window), (queries // len(distance), 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _block_attention(q: jax.Array, k: jax.Array, v: jax.Array, spec: BlockSpec) -> jax.Array:
    """Attend from q (B, K, G * Q, N), already scaled, to k and v (B, K, S, N).

    The backward pass has scores of keys by queries, (S, G * Q): so no product contracts the first axis of its left
    side, a form for which XLA has no fast kernel on a CPU.
    """
    return _block_forward(q, k, v, spec)[0]


def _block_forward(q, k, v, spec):
    scores = product("bkqn,bksn->bkqs", q, k, spec.operands)
    scores = jnp.where(spec.mask(q.shape[2], k.shape[2]), scores, -jnp.inf)
    # QK-norm bounds the scores, so a constant can replace the row maximum: the same softmax, one pass less
    bounded = spec.score_bound <= SAFE_SCORE
    top = jnp.float32(spec.score_bound) if bounded else jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = (product("bkqs,bksn->bkqn", weights, v, spec.operands) / total).astype(q.dtype)
    return out, (q, k, v, out, (top + jnp.log(total)).squeeze(-1))


def _block_backward(spec, residuals, g):
    q, k, v, out, log_total = residuals
    operands, mask = spec.operands, spec.mask(q.shape[2], k.shape[2]).T
    scores = product("bksn,bkqn->bksq", k, q, operands)
    weights = jnp.exp(jnp.where(mask, scores - log_total[:, :, None], -jnp.inf))
    inner = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    of_scores = weights * (product("bksn,bkqn->bksq", v, g, operands) - inner[:, :, None])
    dq = product("bkns,bksq->bknq", k.swapaxes(2, 3), of_scores, operands)
    dq = jax.lax.optimization_barrier(dq).swapaxes(2, 3)  # or XLA turns the product itself, into a slow form
    dk = product("bksq,bkqn->bksn", of_scores, q, operands)
    dv = product("bksq,bkqn->bksn", weights, g, operands)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_block_attention.defvjp(_block_forward, _block_backward)


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int, mesh: Mesh | None = None, interpret: bool = False
) -> jax.Array:
    """Attend as `attention` does, by splash, JAX's flash kernel for TPUs.

    T and N are multiples of `TILE`. On a mesh every device runs its own rows and heads. `interpret` runs the kernel's
    program without a TPU, slowly. Under rematerialization its residuals are named "splash".
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import; no CPU or GPU needs it

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        T, H, N = q.shape[1:]
        mask = splash.LocalMask((T, T), (window, 0), 0) if window < T - 1 else splash.CausalMask((T, T))
        block = next(size for size in (SPLASH_BLOCK, SPLASH_BLOCK // 2, TILE) if T % size == 0)
        names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
        sizes: dict[str, Any] = dict.fromkeys(names, block)
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * H),
            block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=True),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="splash",
            interpret=interpret,
        )
        heads_first = ((q * N**-0.5).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))  # splash does not scale
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2).astype(q.dtype)

    if mesh is None or mesh.size == 1:
        return local(q, k, v)
    spec = P(BATCH_AXES, None, "tensor")
    return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


# Which backend a device can run, and whether it is right there

KERNELS = ("cudnn", "splash")  # code of libraries; "blocked" and "xla" are JAX operations that XLA compiles
CHECK_LENGTH, CHECK_WINDOW = 2 * TILE, 100  # positions of the self-check's small case, and its short window
TOLERANCE = {2: 0.03, 4: 1e-3}  # of the largest value, by bytes of the dtype


def choose_backend(
    config: ModelConfig, dtype: DTypeLike, device: jax.Device, seq_len: int | None = None
) -> tuple[str, str]:
    """Return (backend, why not the fast one) for rows of `seq_len` on `device`, which may be one of a dry run's.

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
    """Return the compute capability of an NVIDIA GPU, such as 9.0; None for anything else (AMD's say "gfx90a")."""
    try:
        return float(getattr(device, "compute_capability", ""))
    except ValueError:
        return None


def has_fp8(device: jax.Device) -> bool:
    """Return whether products of 8-bit floats run in hardware there: NVIDIA from 8.9 on, TPU v7x."""
    return (cuda_capability(device) or 0.0) >= 8.9 or "TPU7x" in device.device_kind


def disagreement(backend: str, config: ModelConfig, dtype: DTypeLike) -> float:
    """Return the largest relative difference, output and gradients, between `backend` and float32 XLA here.

    Runs a small case with the heads' width and grouping of `config`, with a short window and with full context; a
    backend that cannot run raises what it raises.
    """
    group, N = config.n_heads // config.n_kv_heads, config.head_width
    shapes = [(2, CHECK_LENGTH, heads, N) for heads in (2 * group, 2, 2, 2 * group)]
    keys = jax.random.split(jax.random.key(0), 4)
    rounded = [jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, shapes, strict=True)]

    @functools.partial(jax.jit, static_argnums=0)
    def run(backend: str, *inputs: jax.Array) -> list[jax.Array]:
        results = []
        for window in (CHECK_WINDOW, CHECK_LENGTH):
            y, pull = jax.vjp(functools.partial(attention, window=window, backend=backend), *inputs[:3])
            results += [y, *pull(inputs[3])]
        return results

    exact = run("xla", *(a.astype(jnp.float32) for a in rounded))
    pairs = zip(run(backend, *rounded), exact, strict=True)
    return max(float(jnp.abs(a.astype(jnp.float32) - e).max() / jnp.abs(e).max()) for a, e in pairs)


_faults: dict[tuple[str, int, int, str], str] = {}  # of the kernels tried in this process; "" where there was none


def trusted_backend(config: ModelConfig, dtype: DTypeLike, distrust: str = "") -> tuple[str, str]:
    """Return `choose_backend` for this machine; "xla" and the reason where the kernel fails its self-check.

    A process tests a kernel once: training, exams, RL and serving follow the result. `distrust`: a reason to take XLA's
    from now on, whatever the self-check says. Not for a dry run's devices.
    """
    backend, why = choose_backend(config, dtype, jax.local_devices()[0])
    if backend not in KERNELS:
        return backend, why
    key = backend, config.n_heads // config.n_kv_heads, config.head_width, jnp.dtype(dtype).name
    if key not in _faults and not distrust:
        try:
            difference = disagreement(backend, config, dtype)
            right = difference <= TOLERANCE[jnp.dtype(dtype).itemsize]  # NaN is not
            _faults[key] = "" if right else f"{backend} attention differs from XLA's by {difference:.2g} of its maximum"
        except Exception as error:  # a kernel may fail in any way, here or in the driver
            _faults[key] = f"{backend} attention cannot run here ({first_line(error)})"
    _faults[key] = distrust or _faults[key]
    return ("xla", _faults[key]) if _faults[key] else (backend, "")


def with_attention(config: ModelConfig, dtype: DTypeLike) -> ModelConfig:
    """Return `config` with the attention that `trusted_backend` decided on."""
    return dataclasses.replace(config, attention=trusted_backend(config, dtype)[0])
