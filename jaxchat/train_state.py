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

from jaxchat import model as gpt
from jaxchat.attention import choose_backend, cuda_capability, has_fp8, trusted_backend, with_attention
from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.log import say
from jaxchat.loss import LossSpec, chunked_loss, default_chunk
from jaxchat.low_precision import SMALLEST, LossScaleState, find_scale, fp8_dot
from jaxchat.sharding import (
    batch_sharding,
    gathered_sharding,
    master_sharding,
    parameter_sharding,
    platform,
    replicated,
)
from jaxchat.sizes import check_mesh, scan_groups

LARGE_DEPTH = 12  # layers from which on a training takes hours of an accelerator
Batch = dict[str, jax.Array]  # inputs, targets (A, B, T) int32; weights (A, B, T) float32; A micro-batches


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a step changes."""

    params: Any  # nested dict of float32
    opt_state: Any  # optax's
    step: jax.Array  # () int32, optimizer steps done, skipped ones too


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


def check_attention(config: Config, mesh: Mesh) -> None:
    """Call `refuse_slow` for the attention of this process, before the hours in which data is prepared."""
    refuse_slow(config, mesh, trusted_backend(config.model, compute_dtype(config, mesh))[1])


def refuse_slow(config: Config, mesh: Mesh, why: str) -> None:
    """Raise `UsageError` where a large model would train on an accelerator without its fast attention.

    That costs about a third of the speed. `why`: the reason, or "". `train.allow_slow` lets it pass, and so does a
    chosen `model.attention`.
    """
    if why and config.model.depth >= LARGE_DEPTH and platform(mesh) != "cpu" and not config.train.allow_slow:
        raise UsageError(
            f"model.attention={config.model.attention}: training would use XLA's slow attention, because {why}. "
            "Repair that, or accept it with --set train.allow_slow=true"
        )


def check_kernels(config: Config, mesh: Mesh) -> Config:
    """Return `decided(config)`, with a warning where the attention is a slow one or fp8 gains nothing.

    Where one process of several has to fall back, all do: they must compile the same program.
    """
    dtype = compute_dtype(config, mesh)
    backend, why = trusted_backend(config.model, dtype)
    if jax.process_count() > 1:
        fallen = multihost_utils.process_allgather(np.int32(backend == "xla"))
        if backend != "xla" and fallen.any():
            _, why = trusted_backend(config.model, dtype, distrust="another process cannot run the fast one")
    refuse_slow(config, mesh, why)
    if why:
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


def layer_options(config: Config, mesh: Mesh) -> gpt.LayerOptions:
    """Return how the layers run on the devices of `mesh`."""
    shapes, axes = gpt.abstract_params(config.model)
    leaves = zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(axes, is_leaf=_is_axes), strict=True)
    named = {".".join(k.key for k in path): (shape.shape, logical) for (path, shape), logical in leaves}
    dtype = compute_dtype(config, mesh)

    def place(name: str, weight: jax.Array) -> jax.Array:
        """Gather a weight where it is used; its gradient goes straight to where its master lies."""
        if mesh.size == 1 or name not in named:
            return weight
        shape, logical = (part[-weight.ndim :] if weight.ndim else () for part in named[name])
        kept = master_sharding(mesh, shape, logical)
        return checkpoint_name(_gather(gathered_sharding(mesh, shape, logical), kept, weight), "gathered")

    return gpt.LayerOptions(
        unroll=scan_unroll(config, platform(mesh)),
        backend=choose_backend(config.model, dtype, mesh.devices.flat[0])[0],
        remat=config.train.remat,
        dot=fp8_dot if config.train.matmul == "fp8" else jnp.matmul,
        merge=dtype == jnp.bfloat16 and config.train.matmul != "fp8" and mesh.shape["tensor"] == 1,
        mesh=mesh,
        place=place,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(used: NamedSharding, kept: NamedSharding, weight: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight, used)


_gather.defvjp(
    lambda used, kept, weight: (_gather(used, kept, weight), None),
    lambda used, kept, _, gradient: (jax.lax.with_sharding_constraint(gradient, kept),),
)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def caster(config: Config, mesh: Mesh) -> Callable[[Any], Any]:
    """Return a function from masters to weights in the compute dtype, gathered over `data` in that dtype."""
    dtype = compute_dtype(config, mesh)
    shapes, axes = gpt.abstract_params(config.model)
    shardings = jax.tree.map(lambda s, a: parameter_sharding(mesh, s.shape, a), shapes, axes)

    def cast(params: Any) -> Any:
        weights = gpt.cast_params(params, dtype)
        kept = {"unembedding": weights["unembedding"]}  # the loss casts and gathers it
        return jax.lax.with_sharding_constraint({k: weights[k] for k in shardings}, shardings) | kept

    return cast


def _losses(config: Config, mesh: Mesh) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Return a function from cast weights and a micro-batch to (weighted sum, nll (B, T)) in nats."""
    spec = LossSpec(config.model.vocab_size, config.model.softcap, default_chunk(platform(mesh)), mesh)
    options = layer_options(config, mesh)

    def losses(weights: Any, micro: Batch) -> tuple[jax.Array, jax.Array]:
        x = gpt.hidden(config.model, weights, micro["inputs"], options)
        return chunked_loss(x, weights["unembedding"], micro["targets"], micro["weights"], spec)

    return losses


# The state on the mesh


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return fresh parameters and optimizer state, each made where it belongs; only `config.seed` decides them."""

    def init() -> TrainState:
        params = gpt.init_params(config.model, config.seed)
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return jax.jit(init, out_shardings=state_sharding(config, optimizer, mesh))()


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return shapes, dtypes and shardings of the state, for a restore; allocates nothing."""
    shapes = jax.eval_shape(lambda: init_state(config, optimizer, mesh))
    shardings = state_sharding(config, optimizer, mesh)
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)


def state_sharding(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return a `TrainState` of shardings; `UsageError` if the mesh does not divide the model.

    Moments lie where their parameter's master lies; everything small is replicated.
    """
    check_mesh(config.model, mesh.shape["fsdp"], mesh.shape["tensor"])
    shapes, axes = gpt.abstract_params(config.model)
    of_params = jax.tree.map(lambda s, a: master_sharding(mesh, s.shape, a), shapes, axes)
    by_path: dict[Any, NamedSharding] = dict(jax.tree_util.tree_leaves_with_path(of_params))
    shape_of: dict[Any, tuple[int, ...]] = {path: s.shape for path, s in jax.tree_util.tree_leaves_with_path(shapes)}

    def place(path: Any, leaf: Any) -> NamedSharding:
        suffix = next((path[i:] for i in range(len(path)) if path[i:] in by_path), None)
        same = suffix is not None and shape_of[suffix] == leaf.shape
        return by_path[suffix] if same else replicated(mesh)

    opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, shapes))
    return TrainState(of_params, opt_state, replicated(mesh))  # type: ignore[arg-type]


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
    losses, shardings = _losses(config, mesh), state_sharding(config, optimizer, mesh)
    cast, float16 = caster(config, mesh), compute_dtype(config, mesh) == jnp.float16

    def like_masters(grads: Any) -> Any:
        return jax.lax.with_sharding_constraint(grads, shardings.params)

    def gradient(params: Any, weights: Any, micro: Batch, factor: jax.Array) -> tuple[jax.Array, Any]:
        total, grads = jax.value_and_grad(lambda w: factor * losses(w, micro)[0])(weights)
        if "unembedding" not in params:  # `cast_params` splits a tied table in two; their gradients belong to one
            tied = grads["embedding"] + grads["unembedding"]
            grads = {k: v for k, v in grads.items() if k != "unembedding"} | {"embedding": tied}
        return total, like_masters(jax.tree.map(lambda g: g.astype(jnp.float32), grads))

    def accumulate(params: Any, batch: Batch, factor: jax.Array) -> tuple[jax.Array, Any]:
        weights = cast(params)
        if batch["inputs"].shape[0] == 1:
            return gradient(params, weights, jax.tree.map(lambda a: a[0], batch), factor)

        def add(total: Any, micro: Batch) -> tuple[Any, None]:
            def added() -> Any:
                return jax.tree.map(jnp.add, total, gradient(params, weights, micro, factor))

            if "counts" not in micro:
                return added(), None
            return jax.lax.cond(micro["counts"].any(), added, lambda: total), None  # padding costs nothing

        zeros = jnp.zeros(()), like_masters(jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zeros, batch)[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        counts = batch.get("counts", batch["weights"])
        targets = jnp.maximum(counts.sum(), 1.0)  # a batch without a target has loss 0, not NaN
        scaling = find_scale(state.opt_state) if float16 else None
        factor = jnp.float32(1.0) if scaling is None else scaling.scale / targets
        total, grads = accumulate(state.params, batch, factor)
        loss, grads = total / (factor * targets), jax.tree.map(lambda g: g / (factor * targets), grads)
        grad_norm = optax.global_norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        overflowed = jnp.zeros(()) if scaling is None else ~ok & (scaling.scale > SMALLEST)

        def choose(new: Any, old: Any) -> Any:
            if isinstance(new, LossScaleState):  # moves at every step, but in float16 alone
                return new if float16 else old
            return jnp.where(ok, new, old)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new, old = (optax.apply_updates(state.params, updates), opt_state), (state.params, state.opt_state)
        params, opt_state = jax.tree.map(choose, new, old, is_leaf=lambda node: isinstance(node, LossScaleState))
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
    cast, losses = caster(config, mesh), _losses(config, mesh)

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


def make_nll_step(config: Config, mesh: Mesh) -> Callable[[Any, Batch], jax.Array]:
    """Return jitted (params, batch) -> negative log-likelihood of every target, (A, B, T) float32 in nats."""
    cast, losses = caster(config, mesh), _losses(config, mesh)

    def step(params: Any, batch: Batch) -> jax.Array:
        weights = cast(params)
        return jax.lax.map(lambda micro: losses(weights, micro)[1], batch)

    return jax.jit(step, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))
