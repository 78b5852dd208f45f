"""The training state and the pure, jitted steps over it: one update, and evaluations that train nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import keystr, tree_map_with_path
from jax.typing import DTypeLike

from jaxchat import model as gpt
from jaxchat.attention import choose_backend, cuda_capability, has_fp8, trusted_backend, with_attention
from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.log import say
from jaxchat.loss import LossSpec, chunked_loss
from jaxchat.low_precision import SMALLEST, bfloat16_dot, cpu_operands, fp8_dot
from jaxchat.sharding import (
    batch_sharding,
    check_mesh,
    gathered_sharding,
    master_sharding,
    parameter_sharding,
    platform,
    replicated,
)
from jaxchat.sizes import parameters, scan_groups

LARGE_DEPTH = 12  # layers from which on a training takes hours of an accelerator
Batch = dict[str, jax.Array]  # inputs, targets (A, B, T) int32; weights (A, B, T) float32; A micro-batches


# The state


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a step changes."""

    params: Any  # nested dict of float32
    opt_state: Any  # optax's
    step: jax.Array  # () int32, optimizer steps done, skipped ones too


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, blank: bool = False) -> TrainState:
    """Return fresh parameters and optimizer state, each made where it belongs; only `config.seed` decides them.

    `blank`: parameters are zeros, for a stage that replaces them: no generator of random numbers has to compile.
    """

    def init() -> TrainState:
        if blank:
            params = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), gpt.abstract_params(config.model))
        else:
            params = gpt.init_params(config.model, config.seed)
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return jax.jit(init, out_shardings=state_sharding(config, optimizer, mesh))()


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return shapes, dtypes and shardings of the state; allocates nothing.

    Moments lie where their parameter's master lies; everything small is replicated. `UsageError` if the mesh does not
    divide the model.
    """
    check_mesh(config.model, mesh.shape["fsdp"], mesh.shape["tensor"])
    table, params = parameters(config.model), gpt.abstract_params(config.model)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(params, jax.eval_shape(optimizer.init, params), step)

    def placed(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # ends with the path of a parameter: params.blocks.q, opt_state.1.0.mu.blocks.q
        name = keystr(path, simple=True, separator=".")
        declared = next((p for known, p in table.items() if name.endswith(f".{known}") and p.shape == leaf.shape), None)
        place = master_sharding(mesh, declared) if declared else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return tree_map_with_path(placed, state)


def state_sharding(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return a `TrainState` of shardings."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))


# How the model runs on the devices of a mesh


def compute_dtype(config: Config, mesh: Mesh) -> jnp.dtype:
    """Return the dtype of activations and products.

    bfloat16 on accelerators, float32 on CPUs (bf16 products are slower there). NVIDIA cards before compute capability
    8.0 (T4, V100) have no bfloat16: float16, whose loss is scaled.
    """
    name = config.train.compute_dtype
    if name == "auto":
        old = (cuda_capability(mesh.devices.flat[0]) or 8.0) < 8.0
        name = "float32" if platform(mesh) == "cpu" else "float16" if old else "bfloat16"
    return jnp.dtype(name)


def check_attention(config: Config, mesh: Mesh) -> str:
    """Return why this process has to take XLA's slow attention, "" where it does not.

    `UsageError` where a large model would train on an accelerator that way, a third slower, unless
    `train.allow_slow` or a chosen `model.attention` lets it pass.
    """
    _, why = trusted_backend(config.model, compute_dtype(config, mesh))
    if why and config.model.depth >= LARGE_DEPTH and platform(mesh) != "cpu" and not config.train.allow_slow:
        raise UsageError(
            f"model.attention={config.model.attention}: training would use XLA's slow attention, because {why}. "
            "Repair that, or accept it with --set train.allow_slow=true"
        )
    return why


def check_kernels(config: Config, mesh: Mesh) -> Config:
    """Return `decided(config)`, with a warning where the attention is a slow one or fp8 gains nothing.

    Where one process of several has to fall back, all do: they must compile the same program.
    """
    if jax.process_count() > 1:
        dtype = compute_dtype(config, mesh)
        fallen = multihost_utils.process_allgather(np.int32(trusted_backend(config.model, dtype)[0] == "xla"))
        if fallen.any() and not fallen.all():
            trusted_backend(config.model, dtype, distrust="another process cannot run the fast one")
    if why := check_attention(config, mesh):
        say(f"  attention falls back to XLA's: {why}", style="yellow")
    if config.train.matmul == "fp8" and not has_fp8(jax.local_devices()[0]):
        say("  no 8-bit float units here: train.matmul=fp8 is emulated, slower than plain", style="yellow")
    return decided(config, mesh)


def decided(config: Config, mesh: Mesh) -> Config:
    """Return the configuration with the attention that `trusted_backend` decided on in this process."""
    return dataclasses.replace(config, model=with_attention(config.model, compute_dtype(config, mesh)))


def scan_unroll(config: Config, platform: str = "cpu") -> int:
    """Return how many groups of layers are unrolled per iteration of the scan.

    On GPUs all of them, a plain loop: a scan stacks what the backward pass needs, a fifth of the bytes that a step
    moves (docs/performance.md). Elsewhere small models alone, which compile fast enough.
    """
    if config.train.scan_unroll > 0:
        return config.train.scan_unroll
    groups, period = scan_groups(config.model)
    return groups if platform == "gpu" or groups * period <= 8 else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(used: NamedSharding, kept: NamedSharding, weight: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight, used)


_gather.defvjp(
    lambda used, kept, weight: (_gather(used, kept, weight), None),
    lambda used, kept, _, gradient: (jax.lax.with_sharding_constraint(gradient, kept),),
)


def layer_options(config: Config, mesh: Mesh, operands: DTypeLike | None = None) -> gpt.LayerOptions:
    """Return how the layers run on the devices of `mesh`; `operands` as `cpu_operands` says."""
    table = {path.removeprefix("blocks."): p for path, p in parameters(config.model).items()}
    dtype, plain = compute_dtype(config, mesh), config.train.matmul != "fp8"

    def place(name: str, weight: jax.Array) -> jax.Array:
        """Gather a weight where it is used; its gradient goes straight to where its master lies."""
        if mesh.size == 1 or name not in table:
            return weight
        p = table[name]
        if len(p.shape) > weight.ndim:  # one layer of a stack
            p = p._replace(shape=p.shape[1:], axes=p.axes[1:])
        return checkpoint_name(_gather(gathered_sharding(mesh, p), master_sharding(mesh, p), weight), "gathered")

    return gpt.LayerOptions(
        unroll=scan_unroll(config, platform(mesh)),
        backend=choose_backend(config.model, dtype, mesh.devices.flat[0])[0],
        remat=config.train.remat,
        dot=fp8_dot if not plain else bfloat16_dot if operands else jnp.matmul,
        merge=dtype == jnp.bfloat16 and plain and mesh.shape["tensor"] == 1,
        operands=operands,
        mesh=mesh,
        place=place,
    )


def _cast_and_losses(
    config: Config, mesh: Mesh, operands: DTypeLike | None = None
) -> tuple[Callable[[Any], Any], Callable[[Any, Batch], Any]]:
    """Return the two halves of every step; `operands` as `cpu_operands` says, for training.

    cast: masters -> weights in the compute dtype, gathered over `data` in that dtype.
    losses: cast weights and a micro-batch -> (weighted sum, nll (B, T)) in nats.
    """
    model, dtype, options = config.model, compute_dtype(config, mesh), layer_options(config, mesh, operands)
    shardings = gpt.map_parameters(model, lambda p: parameter_sharding(mesh, p))
    chunk = 512 if platform(mesh) == "cpu" else 8192  # tokens; on a CPU a chunk's logits fit the caches
    spec = LossSpec(model.vocab_size, model.softcap, chunk, operands, mesh)

    def cast(params: Any) -> Any:
        weights = gpt.cast_params(params, dtype)
        kept = {"unembedding": weights["unembedding"]}  # the loss casts and gathers it
        return jax.lax.with_sharding_constraint({k: weights[k] for k in shardings}, shardings) | kept

    def losses(weights: Any, micro: Batch) -> tuple[jax.Array, jax.Array]:
        x = gpt.hidden(model, weights, micro["inputs"], options)
        return chunked_loss(x, weights["unembedding"], micro["targets"], micro["weights"], spec)

    return cast, losses


# Steps


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the jitted, donated update: (state, batch) -> (state, metrics).

    Metrics are float32 scalars: `loss`, mean nats per target; `grad_norm`; `ok`, 0 where loss or gradient was not
    finite: then nothing but the step counter changes; `overflowed`, 1 where float16 was the reason and a smaller loss
    scale follows (then `ok` stays 1). Gradients of the A micro-batches add up in float32, split like the masters.
    The sums are divided by the batch's weights, or by its `counts`, shaped like them, where weights may be negative.
    """
    cast, losses = _cast_and_losses(config, mesh, cpu_operands(config, mesh))
    shardings, float16 = state_sharding(config, optimizer, mesh), compute_dtype(config, mesh) == jnp.float16

    def like_masters(grads: Any) -> Any:
        return jax.lax.with_sharding_constraint(grads, shardings.params)

    def gradient(weights: Any, micro: Batch, factor: jax.Array) -> tuple[jax.Array, Any]:
        total, grads = jax.value_and_grad(lambda w: factor * losses(w, micro)[0])(weights)
        if config.model.tie_embeddings:  # `cast_params` splits the table in two; their gradients belong to one
            grads["embedding"] += grads.pop("unembedding")
        return total, like_masters(jax.tree.map(lambda g: g.astype(jnp.float32), grads))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        counts = batch.get("counts", batch["weights"])
        targets = jnp.maximum(counts.sum(), 1.0)  # a batch without a target has loss 0, not NaN
        scaling = state.opt_state[0]  # of `dynamic_loss_scale`
        factor = scaling.scale / targets if float16 else jnp.float32(1.0)
        weights = cast(state.params)

        def add(total: Any, micro: Batch) -> tuple[Any, None]:
            def added() -> Any:
                return jax.tree.map(jnp.add, total, gradient(weights, micro, factor))

            if "counts" not in micro:
                return added(), None
            return jax.lax.cond(micro["counts"].any(), added, lambda: total), None  # padding costs nothing

        if batch["inputs"].shape[0] == 1:
            total, grads = gradient(weights, jax.tree.map(lambda a: a[0], batch), factor)
        else:
            zeros = jnp.zeros(()), like_masters(jax.tree.map(jnp.zeros_like, state.params))
            (total, grads), _ = jax.lax.scan(add, zeros, batch)
        loss, grads = total / (factor * targets), jax.tree.map(lambda g: g / (factor * targets), grads)
        grad_norm = optax.global_norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        overflowed = ~ok & (scaling.scale > SMALLEST) if float16 else jnp.zeros(())

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new, old = (optax.apply_updates(state.params, updates), opt_state[1:]), (state.params, state.opt_state[1:])
        params, moments = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
        opt_state = (opt_state[0] if float16 else scaling, *moments)  # the loss scale moves when a step is skipped too
        metrics = {"loss": loss, "grad_norm": grad_norm, "ok": ok | (overflowed > 0), "overflowed": overflowed}
        return TrainState(params, opt_state, state.step + 1), {k: v.astype(jnp.float32) for k, v in metrics.items()}

    inputs, outputs = (shardings, batch_sharding(mesh)), (shardings, replicated(mesh))
    fixed = {"xla_gpu_deterministic_ops": True} if config.train.deterministic else None  # means nothing elsewhere
    return jax.jit(step, donate_argnums=0, in_shardings=inputs, out_shardings=outputs, compiler_options=fixed)


@functools.cache
def make_eval_step(config: Config, mesh: Mesh) -> Callable[[Any, Batch, jax.Array], dict[str, jax.Array]]:
    """Return jitted sums over a batch: (params, batch, byte_lengths (V,) int32) -> float32 scalars, or one a row.

    `nats` and `bytes` of every row, over the targets that stand for text (special tokens count neither way), for bits
    per byte; `all_nats` and `targets` of the batch over every weighted target, for the loss and the perplexity.
    """
    cast, losses = _cast_and_losses(config, mesh)

    def step(params: Any, batch: Batch, byte_lengths: jax.Array) -> dict[str, jax.Array]:
        micro = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), batch)
        total, nll = losses(cast(params), micro)
        size = byte_lengths[micro["targets"]] * micro["weights"]
        return {
            "nats": jnp.sum(nll * micro["weights"] * (size > 0), axis=-1),
            "bytes": size.sum(axis=-1),
            "all_nats": total,
            "targets": micro["weights"].sum(),
        }

    return jax.jit(step, in_shardings=(None, batch_sharding(mesh), None), out_shardings=replicated(mesh))


@functools.cache
def make_nll_step(config: Config, mesh: Mesh) -> Callable[[Any, Batch], jax.Array]:
    """Return jitted (params, batch) -> negative log-likelihood of every target, (A, B, T) float32 in nats."""
    cast, losses = _cast_and_losses(config, mesh)

    def step(params: Any, batch: Batch) -> jax.Array:
        weights = cast(params)
        return jax.lax.map(lambda micro: losses(weights, micro)[1], batch)

    return jax.jit(step, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))
