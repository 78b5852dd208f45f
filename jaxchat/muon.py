"""Muon as `optax.GradientTransformation`s that compose.

`muon()` chains: Nesterov momentum -> row equilibration (MuonEq, 2603.28254) -> Polar Express orthogonalization
(2505.16932) with the Frobenius norm set (Muon+, 2602.21545) -> variance per neuron (NorMuon, 2510.05491) -> cautious
weight decay. Muon itself: Keller Jordan. Each works on stacks `(..., in, out)` of kernels, each matrix for itself.
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

Schedule = Callable[[jax.Array], jax.Array | float] | float


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
    beta2: float = 0.9,
    steps: int = 5,
    dtype: jnp.dtype | type | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """The whole direction of a step, for kernels (..., in, out), still to be scaled by minus the learning rate.

    Args:
      momentum, weight_decay: a number, or a function of the step count.
      beta2: decay of the second moment per neuron; steps: Polar Express iterations.
      dtype: of the orthogonalization's products (bfloat16 on accelerators); None keeps the update's.
      mesh: devices that share the orthogonalization, each whole matrices.
    """
    return optax.chain(
        nesterov_momentum(momentum),
        equilibrate_rows(),
        orthogonalize(polar_express_coefficients(steps), dtype, mesh=mesh),
        normalize_neurons(beta2),
        add_cautious_decay(weight_decay),
        scale_by_shape(),
    )


def nesterov_momentum(momentum: Schedule) -> optax.GradientTransformation:
    """m <- mu m + (1 - mu) g; the update is mu m + (1 - mu) g with the new m."""

    def init(params):
        return NesterovState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        mu = _value(momentum, state.count)
        new = jax.tree.map(lambda g, m: mu * m + (1 - mu) * g, updates, state.momentum)
        updates = jax.tree.map(lambda g, m: mu * m + (1 - mu) * g, updates, new)
        return updates, NesterovState(state.count + 1, new)

    return optax.GradientTransformation(init, update)


def equilibrate_rows() -> optax.GradientTransformation:
    """Give every output's weights (a column of an (in, out) kernel) the same norm, keeping the matrix's."""

    def one(u):
        rows = jnp.linalg.norm(u, axis=-2, keepdims=True)
        target = jnp.linalg.norm(u, axis=(-2, -1), keepdims=True) / u.shape[-1] ** 0.5
        return u * (target / jnp.maximum(rows, 1e-6))

    return optax.stateless_with_tree_map(lambda u, _: one(u))


def orthogonalize(
    coefficients: Sequence[tuple[float, float, float]],
    dtype: jnp.dtype | type | None = None,
    safety: float = 1.01,
    renormalize: bool = True,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Replace each matrix by (about) its nearest semi-orthogonal one, U V^T of its singular value decomposition.

    Matrices of one shape are iterated in one stack. On a mesh every device gets whole matrices of the stack (padded
    with zeros to divide), so that no collective can appear inside the iteration.

    Args:
      coefficients: (a, b, c) of each iteration x <- a x + (b x x^T + c (x x^T)^2) x.
      safety: the Frobenius norm is divided by this much more, so that rounding keeps singular values below 1.
      renormalize: set the Frobenius norm to sqrt(min(in, out)), an exactly semi-orthogonal matrix's.
    """

    def start(u):
        x = u / (jnp.linalg.norm(u, axis=(-2, -1), keepdims=True) * safety + 1e-6)
        return x.astype(dtype or u.dtype)

    def finish(y, u):
        y = y.astype(u.dtype)
        if renormalize:
            norm = jnp.linalg.norm(y, axis=(-2, -1), keepdims=True)
            y = y * (min(u.shape[-2:]) ** 0.5 / jnp.maximum(norm, 1e-6))
        return y

    def update(updates, _):
        leaves, tree = jax.tree.flatten(updates)
        done = _by_shape([start(u) for u in leaves], lambda x: _spread(x, coefficients, mesh))
        return jax.tree.unflatten(tree, [finish(y, u) for y, u in zip(done, leaves, strict=True)])

    return optax.stateless(update)


def _by_shape(arrays: list[jax.Array], function: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
    """Apply `function` to one stack (K, m, n) for each matrix shape among arrays (..., m, n)."""
    result = list(arrays)
    for shape in sorted({a.shape[-2:] for a in arrays}):
        members = [i for i, a in enumerate(arrays) if a.shape[-2:] == shape]
        stacks = [arrays[i].reshape(-1, *shape) for i in members]
        done = function(jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0])
        start = 0
        for i, stack in zip(members, stacks, strict=True):
            result[i] = done[start : start + len(stack)].reshape(arrays[i].shape)
            start += len(stack)
    return result


def _spread(x: jax.Array, coefficients: Sequence[tuple[float, float, float]], mesh: Mesh | None) -> jax.Array:
    """The iteration on a stack (K, m, n), whole matrices to every device of the mesh."""
    if mesh is None or mesh.size == 1:
        return _iterate(x, coefficients)
    # between steps a matrix is split over its rows: named here, so that moving to whole matrices is one all-to-all
    by_rows = NamedSharding(mesh, P(None, mesh.axis_names if x.shape[1] % mesh.size == 0 else None))
    count = len(x)
    x = jax.lax.with_sharding_constraint(x, by_rows)
    x = jnp.pad(x, ((0, -count % mesh.size), (0, 0), (0, 0)))
    whole = P(mesh.axis_names)
    y = jax.shard_map(lambda a: _iterate(a, coefficients), mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)(
        x
    )
    return jax.lax.with_sharding_constraint(y, by_rows)[:count]


def _iterate(x: jax.Array, coefficients: Sequence[tuple[float, float, float]]) -> jax.Array:
    """Polar Express on x (..., m, n), over the shorter side; a loop, so that it compiles once and not once a step."""
    tall = x.shape[-2] > x.shape[-1]

    def step(x, abc):
        a, b, c = abc
        if tall:
            gram = jnp.einsum("...ki,...kj->...ij", x, x)
            return a * x + x @ (b * gram + c * (gram @ gram)), None
        gram = jnp.einsum("...ik,...jk->...ij", x, x)
        return a * x + (b * gram + c * (gram @ gram)) @ x, None

    return jax.lax.scan(step, x, jnp.asarray(coefficients, x.dtype))[0]


def normalize_neurons(beta2: float) -> optax.GradientTransformation:
    """NorMuon: divide by a running root mean square per output (per input where in > out), keeping the norm."""

    def axis_of(u):
        return -2 if u.shape[-1] >= u.shape[-2] else -1

    def init(params):
        return NorMuonState(jax.tree.map(lambda p: jnp.zeros_like(p.sum(axis_of(p), keepdims=True)), params))

    def second_moment(u, v):
        return beta2 * v + (1 - beta2) * jnp.mean(jnp.square(u), axis=axis_of(u), keepdims=True)

    def scaled(u, v):
        norm = jnp.linalg.norm(u, axis=(-2, -1), keepdims=True)
        y = u * jax.lax.rsqrt(jnp.maximum(v, 1e-10))
        return y * (norm / jnp.maximum(jnp.linalg.norm(y, axis=(-2, -1), keepdims=True), 1e-10))

    def update(updates, state, params=None):
        new = jax.tree.map(second_moment, updates, state.second_moment)
        return jax.tree.map(scaled, updates, new), NorMuonState(new)

    return optax.GradientTransformation(init, update)


def add_cautious_decay(weight_decay: Schedule) -> optax.GradientTransformation:
    """Add `weight_decay * w` only where update and weight agree in sign (the step shrinks the weight anyway)."""

    def init(params):
        return DecayState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("cautious decay needs the parameters: call update(updates, state, params)")
        decay = _value(weight_decay, state.count)
        updates = jax.tree.map(lambda u, p: u + decay * p * (u * p >= 0), updates, params)
        return updates, DecayState(state.count + 1)

    return optax.GradientTransformation(init, update)


def scale_by_shape() -> optax.GradientTransformation:
    """x sqrt(max(1, out / in)): a wide layer's outputs then move as much as a square one's."""
    return optax.stateless_with_tree_map(lambda u, _: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5)


def polar_express_coefficients(
    steps: int = 5, lower: float = 1e-3, safety: float = 2e-2, cushion: float = 2e-2
) -> tuple[tuple[float, float, float], ...]:
    """Optimal odd quintics (a, b, c) of each Polar Express iteration, to float64 precision (2505.16932, algorithm 1).

    Each step is the best minimax approximation of 1 by `a x + b x^3 + c x^5` on [l, u], the range the singular values
    have reached; `cushion` keeps l / u from being so small that the polynomial overshoots, `safety` divides the
    argument for rounding in bfloat16 (in every step but the last). The defaults are those behind nanochat's table.
    """
    low, high, result = lower, 1.0, []
    for step in range(steps):
        a, b, c = _optimal_quintic(max(low, cushion * high), high)
        if low < cushion * high:  # recentre: the true range is wider than the cushioned one
            at_low, at_high = (a * x + b * x**3 + c * x**5 for x in (low, high))
            rescale = 2.0 / (at_low + at_high)
            a, b, c = a * rescale, b * rescale, c * rescale
        scale = 1.0 + safety if step < steps - 1 else 1.0
        a, b, c = a / scale, b / scale**3, c / scale**5
        result.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2.0 - low
    return tuple(result)


def _optimal_quintic(low: float, high: float) -> tuple[float, float, float]:
    """Remez iteration for the odd quintic nearest to 1 on [low, high]."""
    if 1 - 5e-6 <= low / high:
        return (15 / 8) / high, (-10 / 8) / high**3, (3 / 8) / high**5
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    error, previous = np.inf, None
    while previous is None or abs(previous - error) > 1e-15:
        previous = error
        x = np.array([low, q, r, high])
        system = np.stack([x, x**3, x**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        q, r = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return float(a), float(b), float(c)


def _value(schedule: Schedule, count: jax.Array) -> jax.Array | float:
    return schedule(count) if callable(schedule) else schedule
