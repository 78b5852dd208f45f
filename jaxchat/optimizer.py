"""The optimizer: a table from parameter to group, the schedules, and the optax transformation built from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxchat.config import Config
from jaxchat.low_precision import dynamic_loss_scale
from jaxchat.muon import DecayState, NesterovState, muon

Schedule = Callable[[jax.Array | int], jax.Array]  # of the optimizer step, to a float

# First column: a pattern that must match the whole dotted path. Every parameter matches exactly one, or start fails.
GROUPS: tuple[tuple[str, str], ...] = (
    (r"blocks\.(q|k|v|o|fc|proj|ve_gate)", "matrix"),
    (r"unembedding", "unembedding"),
    (r"embedding", "embedding"),
    (r"value_embedding", "value_embedding"),
    (r"blocks\.residual_scale", "residual"),
    (r"blocks\.x0_scale", "x0"),
    (r"smear_gate|smear_scale|backout_scale", "mixing"),
)
ADAM_EPS = 1e-10
# At the start the residual, x0 and backout scalars have no gradient but rounding noise of about 1e-10 (the projections
# are zero and the last norm removes any scale). Adam would blow it up to whole steps, different on every mesh; later
# gradients are about 1e-2. With 1e-6 losses on two meshes still drifted apart by 1.3e-5 in 30 steps, with this by 4e-6.
# The smear gate keeps ADAM_EPS: its gradients are 3e-5 to 9e-5 at 2^20 tokens a step, and exactly 0 in the first one.
SCALAR_EPS = 1e-4


def label_parameters(params: Any) -> Any:
    """Return the tree of group names; `ValueError` names a parameter that no group, or more than one, covers."""

    def label(path: Any, _: Any) -> str:
        name = ".".join(str(key.key) for key in path)
        groups = [group for pattern, group in GROUPS if re.fullmatch(pattern, name)]
        if len(groups) != 1:
            raise ValueError(f"parameter {name}: in {len(groups)} optimizer groups {groups}, must be in exactly one")
        return groups[0]

    return jax.tree_util.tree_map_with_path(label, params)


def make_schedule(config: Config) -> Schedule:
    """Return the learning-rate multiplier over the steps."""
    c, steps = config.optim, config.train.steps
    if c.kind == "adamw":
        return cosine(steps, c.warmup_steps, c.final_lr)
    return trapezoid(steps, c.warmup_steps, c.warmdown_ratio, c.final_lr)


def trapezoid(steps: int, warmup: int, warmdown_ratio: float, final: float) -> Schedule:
    """Rise linearly from 1/warmup to 1, stay, and fall linearly over the last `warmdown_ratio` of the steps to `final`.

    The multiplier never leaves [min(final, 0), 1], also for steps past the end.
    """
    warmdown = max(1, round(warmdown_ratio * steps))

    def multiplier(step):
        rise = (step + 1) / max(warmup, 1)
        left = jnp.clip((steps - step) / warmdown, 0.0, 1.0)
        return jnp.minimum(jnp.minimum(rise, 1.0), left + (1 - left) * final)

    return multiplier


def cosine(steps: int, warmup: int, final: float) -> Schedule:
    """Rise linearly, then fall by half a cosine from 1 to `final`: the usual schedule of AdamW."""

    def multiplier(step):
        rise = (step + 1) / max(warmup, 1)
        done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return jnp.minimum(rise, final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done)))

    return multiplier


def muon_momentum(
    steps: int, warmup: int, warmdown_ratio: float, values: tuple[float, ...] = (0.85, 0.97, 0.90)
) -> Schedule:
    """Go from the first of three values to the second over `warmup` steps, and to the third while the rate falls."""
    warmdown = max(1, round(warmdown_ratio * steps))
    first, peak, last = values

    def momentum(step):
        rising = first + (peak - first) * jnp.clip(step / max(warmup, 1), 0.0, 1.0)
        falling = peak - (peak - last) * jnp.clip((step - (steps - warmdown)) / warmdown, 0.0, 1.0)
        return jnp.minimum(rising, falling)

    return momentum


def cosine_to_zero(steps: int, start: float) -> Schedule:
    """Fall by half a cosine from `start` to 0 over the steps: Muon's weight decay."""
    return lambda step: start * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / max(steps, 1), 0.0, 1.0)))


def make_optimizer(
    config: Config, compute_dtype: jnp.dtype | type, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Return the optimizer of a resolved configuration; rates after nanochat, scaled as `scaling` says.

    The devices of `mesh` share Muon's orthogonalization. The state of a loss scale, which float16 needs, comes first.
    """
    c, steps = config.optim, config.train.steps
    schedule = make_schedule(config)

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
    modern = config.model.recipe == "modern"
    by_width = c.lr_scale * (config.model.width / 768) ** -0.5  # these three were tuned at d12's width
    # a tied table also makes the logits, which the rate of an embedding, 50 times as high, drives into their cap
    table_lr = c.unembedding_lr if config.model.tie_embeddings else c.embedding_lr
    momentum = muon_momentum(steps, c.momentum_warmup_steps, c.warmdown_ratio, c.momentum)
    decay = cosine_to_zero(steps, c.weight_decay)
    matrix = muon(momentum if modern else 0.95, decay, dtype=compute_dtype, mesh=mesh)
    groups = {
        "matrix": optax.chain(matrix, scaled(c.lr_scale * c.matrix_lr)),
        "unembedding": adamw(by_width * c.unembedding_lr, (0.8, 0.96), 0.01 if modern else 0.0),
        "embedding": adamw(by_width * table_lr, (0.8, 0.995), 0.001 if modern else 0.0),
        "value_embedding": adamw(by_width * c.embedding_lr / 2, (0.8, 0.995), 0.01),
        "residual": adamw(c.lr_scale * c.scalar_lr * 0.01, (0.8, 0.95), 0.05, SCALAR_EPS),
        "x0": adamw(c.lr_scale * c.scalar_lr, (0.96, 0.95), 0.0, SCALAR_EPS),
        "mixing": optax.chain(scale_by_mixing_adam(0.8, 0.95), optax.add_decayed_weights(0.0), scaled(c.mixing_lr)),
    }
    return optax.chain(dynamic_loss_scale(), optax.chain(clip, optax.partition(groups, label_parameters)))


def scale_by_mixing_adam(b1: float, b2: float) -> optax.GradientTransformation:
    """Adam for smear and backout: `SCALAR_EPS` for the scalars, `ADAM_EPS` for the smear gate; one state for all."""
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
        if isinstance(after, NesterovState):
            return after._replace(momentum=before.momentum)
        return after if isinstance(after, COUNTING) else before

    return jax.tree.map(pick, old, new, is_leaf=lambda node: isinstance(node, COUNTING))


def advance_schedules(state: Any) -> Any:
    """Return the state after a step without an update: moments stay, the steps of its schedules go on."""

    def advance(node: Any) -> Any:
        return node._replace(count=node.count + 1) if isinstance(node, COUNTING) else node

    return jax.tree.map(advance, state, is_leaf=lambda node: isinstance(node, COUNTING))
