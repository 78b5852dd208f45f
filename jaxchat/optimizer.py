"""The optimizer: schedules, and an optax transformation for every group of parameters (`sizes.parameters`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxchat.config import Config
from jaxchat.low_precision import cpu_operands, dynamic_loss_scale
from jaxchat.model import map_parameters
from jaxchat.muon import DecayState, NesterovState, muon

Schedule = Callable[[jax.Array | int], jax.Array]  # of the optimizer step, to a float
ADAM_EPS = 1e-10
# At the start the residual, x0 and backout scalars have no gradient but rounding noise of about 1e-10 (the projections
# are zero and the last norm removes any scale). Adam would blow it up to whole steps, different on every mesh; later
# gradients are about 1e-2. With 1e-6 losses on two meshes still drifted apart by 1.3e-5 in 30 steps, with this by 4e-6.
# The smear gate keeps ADAM_EPS: its gradients are 3e-5 to 9e-5 at 2^20 tokens a step, and exactly 0 in the first one.
SCALAR_EPS = 1e-4


def make_schedule(config: Config) -> Schedule:
    """Return the learning-rate multiplier over the steps: a linear rise to 1, then a fall to `optim.final_lr`.

    Muon's is flat up to its linear fall over the last `optim.warmdown_ratio` of the steps and stays in [0, 1] past the
    end; AdamW's falls by half a cosine.
    """
    c, steps = config.optim, config.train.steps
    warmdown = max(1, round(c.warmdown_ratio * steps))

    def multiplier(step: jax.Array | int) -> jax.Array:
        rise = (step + 1) / max(c.warmup_steps, 1)
        if c.kind == "adamw":
            done = jnp.clip((step - c.warmup_steps) / max(steps - c.warmup_steps, 1), 0.0, 1.0)
            return jnp.minimum(rise, c.final_lr + (1 - c.final_lr) * 0.5 * (1 + jnp.cos(jnp.pi * done)))
        left = jnp.clip((steps - step) / warmdown, 0.0, 1.0)
        return jnp.minimum(jnp.minimum(rise, 1.0), left + (1 - left) * c.final_lr)

    return multiplier


def muon_momentum(config: Config) -> Schedule:
    """Return Muon's momentum: up to the second value of `optim.momentum`, to the third while the rate falls."""
    c, steps = config.optim, config.train.steps
    warmdown = max(1, round(c.warmdown_ratio * steps))
    first, peak, last = c.momentum

    def momentum(step: jax.Array | int) -> jax.Array:
        rising = first + (peak - first) * jnp.clip(step / max(c.momentum_warmup_steps, 1), 0.0, 1.0)
        falling = peak - (peak - last) * jnp.clip((step - (steps - warmdown)) / warmdown, 0.0, 1.0)
        return jnp.minimum(rising, falling)

    return momentum


def muon_decay(config: Config) -> Schedule:
    """Return Muon's weight decay: half a cosine from `optim.weight_decay` to 0."""
    start, steps = config.optim.weight_decay, max(config.train.steps, 1)
    return lambda step: start * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / steps, 0.0, 1.0)))


def make_optimizer(config: Config, compute_dtype: DTypeLike, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Return the optimizer of a resolved configuration; rates after nanochat, scaled as `scaling` says.

    The devices of `mesh` share Muon's orthogonalization. The state of a loss scale, which float16 needs, comes first.
    """
    c, schedule = config.optim, make_schedule(config)

    def scaled(rate: float) -> optax.GradientTransformation:
        return optax.scale_by_schedule(lambda step: -rate * schedule(step))

    def adamw(
        rate: float, betas: tuple[float, float], decay: float, eps: float = ADAM_EPS
    ) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(*betas, eps=eps), optax.add_decayed_weights(decay), scaled(rate))

    clip = optax.clip_by_global_norm(c.grad_clip) if c.grad_clip > 0 else optax.identity()
    if c.kind == "adamw":
        kind = adamw(c.lr_scale * c.adamw_lr, (0.9, 0.95), c.weight_decay)
        return optax.chain(dynamic_loss_scale(), optax.chain(clip, kind))
    modern = config.model.recipe != "classic"
    by_width = c.lr_scale * (config.model.width / 768) ** -0.5  # these three were tuned at d12's width
    # a tied table also makes the logits, which the rate of an embedding, 50 times as high, drives into their cap
    table_lr = c.unembedding_lr if config.model.tie_embeddings else c.embedding_lr
    momentum = muon_momentum(config) if modern else 0.95
    matrix = muon(momentum, muon_decay(config), compute_dtype, mesh, cpu_operands(config, mesh))
    groups = {
        "matrix": optax.chain(matrix, scaled(c.lr_scale * c.matrix_lr)),
        "unembedding": adamw(by_width * c.unembedding_lr, (0.8, 0.96), 0.01 if modern else 0.0),
        "embedding": adamw(by_width * table_lr, (0.8, 0.995), 0.001 if modern else 0.0),
        "value_embedding": adamw(by_width * c.embedding_lr / 2, (0.8, 0.995), 0.01),
        "residual": adamw(c.lr_scale * c.scalar_lr * 0.01, (0.8, 0.95), 0.05, SCALAR_EPS),
        "x0": adamw(c.lr_scale * c.scalar_lr, (0.96, 0.95), 0.0, SCALAR_EPS),
        "mixing": optax.chain(scale_by_mixing_adam(0.8, 0.95), optax.add_decayed_weights(0.0), scaled(c.mixing_lr)),
    }
    if config.model.bigram_rows > 0:  # states of models without it stay as they were
        groups["bigram_embedding"] = adamw(by_width * c.embedding_lr / 10, (0.8, 0.995), 0.001)
    labels = map_parameters(config.model, lambda p: p.group)
    return optax.chain(dynamic_loss_scale(), optax.chain(clip, optax.partition(groups, labels)))


def scale_by_mixing_adam(b1: float, b2: float) -> optax.GradientTransformation:
    """Return Adam for smear and backout: `SCALAR_EPS` for the scalars, `ADAM_EPS` for the gate; one state for all."""
    scalars, gate = (optax.scale_by_adam(b1, b2, eps=eps) for eps in (SCALAR_EPS, ADAM_EPS))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        for_scalars, new_state = scalars.update(updates, state)
        for_gate, _ = gate.update(updates, state)
        is_gate = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "smear_gate", for_gate)
        return jax.tree.map(lambda own, g, s: g if own else s, is_gate, for_gate, for_scalars), new_state

    return optax.GradientTransformation(scalars.init, update)


# States that count the steps of a schedule
COUNTING = (optax.ScaleByScheduleState, DecayState, NesterovState)


def carry_moments(old: Any, new: Any) -> Any:
    """Return one optimizer's moments in another's state of the same shape, with the new one's schedules at step 0."""

    def pick(before: Any, after: Any) -> Any:
        return before._replace(count=after.count) if isinstance(after, COUNTING) else before

    return jax.tree.map(pick, old, new, is_leaf=lambda node: isinstance(node, COUNTING))


def advance_schedules(state: Any) -> Any:
    """Return the state after a step without an update: moments stay, the steps of its schedules go on."""

    def advance(node: Any) -> Any:
        return node._replace(count=node.count + 1) if isinstance(node, COUNTING) else node

    return jax.tree.map(advance, state, is_leaf=lambda node: isinstance(node, COUNTING))
