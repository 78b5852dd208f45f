"""Splash attention, JAX's own flash kernel for TPUs, over the rows and heads of a mesh."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.mesh import BATCH_AXES

TILE = 128  # lanes of a TPU: positions and head widths come in multiples
BLOCK = 512  # positions per kernel block, at most


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
    block = next(size for size in (BLOCK, BLOCK // 2, TILE) if T % size == 0)
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
