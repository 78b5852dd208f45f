"""The training state, and the pure steps over it: one update, one evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxchat.config import Config
from jaxchat.losses import LossSpec, chunked_loss, default_chunk
from jaxchat.mesh import batch_sharding, parameter_sharding, replicated
from jaxchat.model import gpt
from jaxchat.model.layout import scan_groups

Batch = dict[str, jax.Array]  # inputs, targets (A, B, T) int32; weights (A, B, T) float32; A micro-batches


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """params: nested dict of float32; opt_state: optax's; step: () int32, optimizer steps done (skipped ones too)."""

    params: Any
    opt_state: Any
    step: jax.Array


def compute_dtype(config: Config) -> jnp.dtype:
    """Of activations and products: bfloat16 on accelerators, float32 on CPUs (bf16 products are slower there)."""
    name = config.train.compute_dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def scan_unroll(config: Config) -> int:
    """Groups unrolled per scan iteration; small models run faster unrolled, and compile fast enough."""
    if config.train.scan_unroll > 0:
        return config.train.scan_unroll
    groups, period = scan_groups(config.model)
    return groups if groups * period <= 8 else 1


def loss_spec(config: Config) -> LossSpec:
    chunk = config.train.loss_chunk if config.train.loss_chunk > 0 else default_chunk()
    return LossSpec(config.model.vocab_size, config.model.softcap, chunk)


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Fresh parameters and optimizer state, each made where it belongs; a function of `config.seed` alone."""

    def init() -> TrainState:
        params = gpt.init_params(config.model, config.seed)
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return jax.jit(init, out_shardings=state_sharding(config, optimizer, mesh))()


def state_sharding(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A `TrainState` of shardings. Moments lie where their parameter lies; everything small is replicated."""
    shapes, axes = gpt.abstract_params(config.model)
    of_params = jax.tree.map(lambda s, a: parameter_sharding(mesh, s.shape, a), shapes, axes)
    by_path: dict[Any, NamedSharding] = dict(jax.tree_util.tree_leaves_with_path(of_params))
    shape_of: dict[Any, tuple[int, ...]] = {path: s.shape for path, s in jax.tree_util.tree_leaves_with_path(shapes)}

    def place(path: Any, leaf: Any) -> NamedSharding:
        suffix = next((path[i:] for i in range(len(path)) if path[i:] in by_path), None)
        same = suffix is not None and shape_of[suffix] == leaf.shape
        return by_path[suffix] if same else replicated(mesh)

    opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, shapes))
    return TrainState(of_params, opt_state, replicated(mesh))  # type: ignore[arg-type]


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted, donated update: (state, batch) -> (state, metrics).

    Metrics (float32 scalars): `loss`, mean nats per target; `grad_norm`; `ok`, 0 where loss or gradient was not
    finite: then nothing but the step counter changes. Gradients of the A micro-batches add up in float32.
    """
    dtype, unroll, spec = compute_dtype(config), scan_unroll(config), loss_spec(config)

    def summed_loss(weights: Any, micro: Batch) -> jax.Array:
        x = gpt.hidden(config.model, weights, micro["inputs"], unroll)
        return chunked_loss(x, weights["unembedding"], micro["targets"], micro["weights"], spec)[0]

    def accumulate(weights: Any, batch: Batch) -> tuple[jax.Array, Any]:
        gradient = jax.value_and_grad(summed_loss)
        if batch["inputs"].shape[0] == 1:
            return gradient(weights, jax.tree.map(lambda a: a[0], batch))

        def add(total: Any, micro: Batch) -> tuple[Any, None]:
            return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradient(weights, micro)), None

        zeros = jnp.zeros(()), jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        return jax.lax.scan(add, zeros, batch)[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        total, grads = accumulate(gpt.cast_params(state.params, dtype), batch)
        targets = jnp.maximum(batch["weights"].sum(), 1.0)  # a batch without a target has loss 0, not NaN
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / targets, _fold_tied(state.params, grads))
        loss, grad_norm = total / targets, optax.global_norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "ok": ok.astype(jnp.float32)}
        return TrainState(params, opt_state, state.step + 1), metrics

    shardings = state_sharding(config, optimizer, mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def _fold_tied(params: Any, grads: Any) -> Any:
    """`cast_params` splits a tied table in two; their gradients belong to one."""
    if "unembedding" in params:
        return grads
    return {k: v for k, v in grads.items() if k != "unembedding"} | {
        "embedding": grads["embedding"] + grads["unembedding"]
    }


def make_eval_step(config: Config, mesh: Mesh) -> Callable[[Any, Batch, jax.Array], dict[str, jax.Array]]:
    """Jitted sums over one batch: (params, batch, byte_lengths (V,) int32) -> float32 scalars.

    `nats` and `bytes` over the targets that stand for text (special tokens count neither way), for bits per byte;
    `all_nats` and `targets` over every weighted target, for the loss and the perplexity.
    """
    dtype, unroll, spec = compute_dtype(config), scan_unroll(config), loss_spec(config)

    def step(params: Any, batch: Batch, byte_lengths: jax.Array) -> dict[str, jax.Array]:
        weights = gpt.cast_params(params, dtype)
        micro = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), batch)
        x = gpt.hidden(config.model, weights, micro["inputs"], unroll)
        total, nll = chunked_loss(x, weights["unembedding"], micro["targets"], micro["weights"], spec)
        size = byte_lengths[micro["targets"]] * micro["weights"]
        return {
            "nats": jnp.sum(nll * micro["weights"] * (size > 0)),
            "bytes": size.sum(),
            "all_nats": total,
            "targets": micro["weights"].sum(),
        }

    return jax.jit(step, in_shardings=(None, batch_sharding(mesh), None), out_shardings=replicated(mesh))
