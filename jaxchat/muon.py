"""Muon as `optax.GradientTransformation`s that compose.

`muon()` chains: Nesterov momentum -> row equilibration (MuonEq, 2603.28254) -> Polar Express orthogonalization
(2505.16932) with the Frobenius norm set (Muon+, 2602.21545) -> variance per neuron (NorMuon, 2510.05491) -> cautious
weight decay. Muon itself: Keller Jordan. Each works on stacks (..., in, out) of kernels, matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

Schedule = Callable[[jax.Array], jax.Array | float] | float
Coefficients = Sequence[tuple[float, float, float]]

# The iterations x <- a x + (b x x^T + c (x x^T)^2) x of Polar Express: the best odd quintics for singular values from
# 1e-3 on, with safety 2e-2 for rounding in bfloat16 and cushion 2e-2 (2505.16932, algorithm 1; a test computes them).
POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557794, 15.87876991520745),
    (4.0429299351667325, -2.808917465908709, 0.5000178451051307),
    (3.8916678022926643, -2.7724841532176865, 0.5060648178503395),
    (3.285753657755656, -2.3681294933425403, 0.46449024233003156),
    (2.3465413258596373, -1.7097828382687053, 0.4232355116930521),
)


class NesterovState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # () int32, for the schedule
    momentum: optax.Updates


class NorMuonState(NamedTuple):
    second_moment: optax.Updates


class DecayState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]


def muon(
    momentum: Schedule = 0.95,
    weight_decay: Schedule = 0.0,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    operands: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Return the whole direction of a step, still to be scaled by minus the learning rate.

    Args:
      momentum, weight_decay: a number, or a function of the step count.
      dtype: of the orthogonalization's products (bfloat16 on accelerators); None keeps the update's.
      mesh: devices that share the orthogonalization, each whole matrices.
      operands: dtype of the operands of its products, where they are not `dtype`'s (`low_precision.cpu_operands`).
    """
    return optax.chain(
        nesterov_momentum(momentum),
        equilibrate_rows(),
        orthogonalize(POLAR_EXPRESS, dtype, mesh=mesh, operands=operands),
        normalize_neurons(beta2=0.9),
        add_cautious_decay(weight_decay),
        scale_by_shape(),
    )


def nesterov_momentum(momentum: Schedule) -> optax.GradientTransformation:
    """Accumulate m <- mu m + (1 - mu) g; the update is mu m + (1 - mu) g with the new m."""

    def update(updates, state, params=None):
        mu = momentum(state.count) if callable(momentum) else momentum
        new = jax.tree.map(lambda g, m: mu * m + (1 - mu) * g, updates, state.momentum)
        updates = jax.tree.map(lambda g, m: mu * m + (1 - mu) * g, updates, new)
        return updates, NesterovState(state.count + 1, new)

    return optax.GradientTransformation(
        lambda params: NesterovState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)), update
    )


def equilibrate_rows() -> optax.GradientTransformation:
    """Give every output's weights (a column of an (in, out) kernel) the same norm, keeping the matrix's."""

    def equilibrate(u, _):
        rows = jnp.linalg.norm(u, axis=-2, keepdims=True)
        target = _norm(u) / u.shape[-1] ** 0.5
        return u * (target / jnp.maximum(rows, 1e-6))

    return optax.stateless_with_tree_map(equilibrate)


def orthogonalize(
    coefficients: Coefficients,
    dtype: DTypeLike | None = None,
    safety: float = 1.01,
    renormalize: bool = True,
    mesh: Mesh | None = None,
    operands: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Replace each matrix by (about) its nearest semi-orthogonal one, U V^T of its singular value decomposition.

    Matrices of one shape are iterated in one stack. On a mesh every device gets whole matrices of the stack (padded
    with zeros to divide), so that no collective can appear inside the iteration.

    Args:
      coefficients: (a, b, c) of each iteration, see `POLAR_EXPRESS`.
      safety: the Frobenius norm is divided by this much more, so that rounding keeps singular values below 1.
      dtype, operands: of the products, see `muon`.
      renormalize: set the Frobenius norm to sqrt(min(in, out)), an exactly semi-orthogonal matrix's.
    """

    def iterate(x: jax.Array) -> jax.Array:
        """Iterate over the shorter side of x (K, m, n); a loop, so that one step compiles and not five."""
        narrow = operands or x.dtype

        def dot(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.einsum(form, a.astype(narrow), b.astype(narrow), preferred_element_type=x.dtype)

        def step(x, abc):
            a, b, c = abc
            gram = dot("kim,kjm->kij", x, x)
            polynomial = b * gram + c * dot("kim,kmj->kij", gram, gram)
            return a * x + dot("kim,kmj->kij", polynomial, x), None

        tall = x.shape[-2] > x.shape[-1]
        x = x.swapaxes(1, 2) if tall else x
        x = jax.lax.scan(step, x, jnp.asarray(coefficients, x.dtype))[0]
        return x.swapaxes(1, 2) if tall else x

    def iterate_on_mesh(x: jax.Array) -> jax.Array:
        if mesh is None or mesh.size == 1:
            return iterate(x)
        # between steps a matrix is split over its rows: named here, so that moving to whole matrices is one all-to-all
        by_rows = NamedSharding(mesh, P(None, mesh.axis_names if x.shape[1] % mesh.size == 0 else None))
        K, whole = len(x), P(mesh.axis_names)
        x = jax.lax.with_sharding_constraint(x, by_rows)
        x = jnp.pad(x, ((0, -K % mesh.size), (0, 0), (0, 0)))
        x = jax.shard_map(iterate, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)(x)
        return jax.lax.with_sharding_constraint(x, by_rows)[:K]

    def update(updates, _):
        leaves, tree = jax.tree.flatten(updates)
        results = list(leaves)
        for shape in sorted({u.shape[-2:] for u in leaves}):
            members = [i for i, u in enumerate(leaves) if u.shape[-2:] == shape]
            scaled = (leaves[i] / (_norm(leaves[i]) * safety + 1e-6) for i in members)
            stacks = [u.astype(dtype or u.dtype).reshape(-1, *shape) for u in scaled]
            stack = iterate_on_mesh(jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0])
            parts = jnp.split(stack, np.cumsum([len(x) for x in stacks])[:-1])
            for i, part in zip(members, parts, strict=True):
                y = part.reshape(leaves[i].shape).astype(leaves[i].dtype)
                results[i] = y * (min(shape) ** 0.5 / jnp.maximum(_norm(y), 1e-6)) if renormalize else y
        return jax.tree.unflatten(tree, results)

    return optax.stateless(update)


def normalize_neurons(beta2: float) -> optax.GradientTransformation:
    """Divide by a running root mean square per output (per input where in > out), keeping the norm.

    `beta2`: decay of the second moment.
    """

    def axis_of(u):
        return -2 if u.shape[-1] >= u.shape[-2] else -1

    def init(params):
        return NorMuonState(jax.tree.map(lambda p: jnp.zeros_like(p.sum(axis_of(p), keepdims=True)), params))

    def second_moment(u, v):
        return beta2 * v + (1 - beta2) * jnp.mean(jnp.square(u), axis=axis_of(u), keepdims=True)

    def scaled(u, v):
        y = u * jax.lax.rsqrt(jnp.maximum(v, 1e-10))
        return y * (_norm(u) / jnp.maximum(_norm(y), 1e-10))

    def update(updates, state, params=None):
        new = jax.tree.map(second_moment, updates, state.second_moment)
        return jax.tree.map(scaled, updates, new), NorMuonState(new)

    return optax.GradientTransformation(init, update)


def add_cautious_decay(weight_decay: Schedule) -> optax.GradientTransformation:
    """Add `weight_decay * w` only where update and weight agree in sign (the step shrinks the weight anyway)."""

    def update(updates, state, params=None):
        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay
        updates = jax.tree.map(lambda u, p: u + decay * p * (u * p >= 0), updates, params)
        return updates, DecayState(state.count + 1)

    return optax.GradientTransformation(lambda params: DecayState(jnp.zeros((), jnp.int32)), update)


def scale_by_shape() -> optax.GradientTransformation:
    """Multiply by sqrt(max(1, out / in)): a wide layer's outputs then move as much as a square one's."""
    return optax.stateless_with_tree_map(lambda u, _: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5)


def _norm(u: jax.Array) -> jax.Array:
    return jnp.linalg.norm(u, axis=(-2, -1), keepdims=True)
