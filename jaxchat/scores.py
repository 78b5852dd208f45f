"""Steps that train nothing: how likely a batch of text is to a model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxchat.config import Config
from jaxchat.losses import chunked_loss
from jaxchat.mesh import batch_sharding, replicated
from jaxchat.model import gpt
from jaxchat.state import Batch, caster, loss_spec, trunk


@functools.cache
def make_eval_step(config: Config, mesh: Mesh) -> Callable[[Any, Batch, jax.Array], dict[str, jax.Array]]:
    """Jitted sums over one batch: (params, batch, byte_lengths (V,) int32) -> float32 scalars, or one for each row.

    `nats` and `bytes` of every row, over the targets that stand for text (special tokens count neither way), for bits
    per byte; `all_nats` and `targets` of the batch over every weighted target, for the loss and the perplexity.
    """
    cast, run, spec = caster(config, mesh), trunk(config, mesh), loss_spec(config, mesh)

    def step(params: Any, batch: Batch, byte_lengths: jax.Array) -> dict[str, jax.Array]:
        weights = cast(params)
        micro = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), batch)
        x = gpt.hidden(config.model, weights, micro["inputs"], run)
        total, nll = chunked_loss(x, weights["unembedding"], micro["targets"], micro["weights"], spec)
        size = byte_lengths[micro["targets"]] * micro["weights"]
        return {
            "nats": jnp.sum(nll * micro["weights"] * (size > 0), axis=-1),
            "bytes": size.sum(axis=-1),
            "all_nats": total,
            "targets": micro["weights"].sum(),
        }

    return jax.jit(step, in_shardings=(None, batch_sharding(mesh), None), out_shardings=replicated(mesh))


def make_nll_step(config: Config, mesh: Mesh) -> Callable[[Any, Batch], jax.Array]:
    """Jitted (params, batch) -> negative log-likelihood of every target, (A, B, T) float32 in nats."""
    cast, run, spec = caster(config, mesh), trunk(config, mesh), loss_spec(config, mesh)

    def step(params: Any, batch: Batch) -> jax.Array:
        weights = cast(params)

        def nll(micro: Batch) -> jax.Array:
            x = gpt.hidden(config.model, weights, micro["inputs"], run)
            return chunked_loss(x, weights["unembedding"], micro["targets"], micro["weights"], spec)[1]

        return jax.lax.map(nll, batch)

    return jax.jit(step, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))
