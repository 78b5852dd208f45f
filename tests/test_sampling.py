"""Sampling: greedy, exact cuts against a sort, frequencies against the distribution, independence of neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.engine.device import _largest_by_digits, _largest_by_guessing, _threshold, sample

V = 50


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    return (
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, min_p, jnp.float32),
    )


def draws(logits, count, **kwargs):
    """`count` draws from one distribution: one row each, positions 0, 1, ..."""
    seed, position = jnp.full(count, 7, jnp.uint32), jnp.arange(count, dtype=jnp.int32)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(jax.jit(sample)(rows, seed, position, *settings(count, **kwargs)))


def random_logits(seed, rows=None):
    return np.random.default_rng(seed).normal(0, 2, (rows, V) if rows else V).astype(np.float32)


@pytest.mark.parametrize("kwargs", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-9}])
def test_greedy(kwargs):
    logits = random_logits(0)
    assert set(draws(logits, 200, **kwargs)) == {logits.argmax()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = random_logits(1)
    counts = np.bincount(draws(logits, 20_000, temperature=temperature), minlength=V)
    p = np.exp(logits / temperature - (logits / temperature).max())
    expected = p / p.sum() * counts.sum()
    large = expected > 5
    chi2 = ((counts - expected) ** 2 / expected)[large].sum()
    assert chi2 < large.sum() + 5 * np.sqrt(2 * large.sum())
    assert counts[~large].sum() <= expected[~large].sum() + 5 * np.sqrt(expected[~large].sum()) + 1


@pytest.mark.parametrize("top_k", [1, 2, 7, 49, 50, 1000])
def test_top_k_keeps_exactly_the_k_largest(top_k):
    logits = random_logits(2)
    allowed = set(np.argsort(-logits)[:top_k])
    drawn = set(draws(logits, 5000, temperature=5.0, top_k=top_k))
    assert drawn <= allowed and len(drawn) > 0.8 * len(allowed)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p):
    logits = random_logits(3)
    p = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    assert set(draws(logits, 20_000, top_p=top_p)) <= set(order[:size])
    threshold = _threshold(jnp.asarray(p / p.max())[None], jnp.zeros(1, jnp.int32), jnp.full(1, top_p))
    assert int((p / p.max() >= np.asarray(threshold)).sum()) == size


def test_top_p_counts_the_mass_that_top_k_leaves():
    logits = np.log(np.array([0.4, 0.2, 0.2001, 0.1, 0.0999], np.float32))
    assert set(draws(logits, 3000, top_k=3, top_p=0.7)) == {0, 2}  # 0.6001 of 0.8001
    assert set(draws(logits, 3000, top_k=3, top_p=0.8)) == {0, 1, 2}


@pytest.mark.parametrize("min_p", [0.02, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_has_that_share_of_the_likeliest(min_p):
    logits = random_logits(6)
    for temperature in (0.7, 2.0):
        p = np.exp((logits - logits.max()) / temperature)
        allowed = set(np.flatnonzero(p >= min_p))
        drawn = set(draws(logits, 20_000, temperature=temperature, min_p=min_p))
        assert drawn <= allowed and len(drawn) > 0.8 * len(allowed)


def test_a_draw_depends_on_its_seed_and_position_alone():
    logits = jnp.asarray(random_logits(4, rows=8))
    seed, position = jnp.arange(8, dtype=jnp.uint32) + jnp.uint32(2**31), jnp.arange(8, dtype=jnp.int32) * 3
    rows = (logits, seed, position, *settings(8, top_k=20, top_p=0.95))
    together = np.asarray(sample(*rows))
    order = np.random.default_rng(0).permutation(8)
    assert (np.asarray(sample(*(a[order] for a in rows))) == together[order]).all()
    alone = [int(sample(*(a[i : i + 1] for a in rows))[0]) for i in range(8)]
    assert alone == together.tolist()


def test_seeds_and_positions_change_the_draw():
    flat = np.zeros(V, np.float32)
    assert len(set(draws(flat, 500))) > 45
    seeds = jnp.arange(500, dtype=jnp.uint32)
    logits = jnp.zeros((500, V))
    assert len(set(np.asarray(sample(logits, seeds, jnp.zeros(500, jnp.int32), *settings(500))))) > 45


def test_rows_with_different_settings_do_not_mix():
    logits = jnp.asarray(random_logits(5, rows=4))
    seed, position = jnp.full(4, 3, jnp.uint32), jnp.arange(4, dtype=jnp.int32)
    mixed = sample(
        logits,
        seed,
        position,
        jnp.array([0.0, 1.0, 0.0, 2.0]),
        jnp.array([0, 5, 3, 0]),
        jnp.array([1.0, 0.9, 0.5, 1.0]),
        jnp.zeros(4),
    )
    assert mixed[0] == logits[0].argmax() and mixed[2] == logits[2].argmax()
    one = sample(logits[1:2], seed[1:2], position[1:2], jnp.ones(1), jnp.array([5]), jnp.array([0.9]), jnp.zeros(1))
    assert mixed[1] == one[0]


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_both_ways_to_a_threshold_leave_the_same_tokens(scale):
    """Digits are for accelerators, guesses for CPUs; here both run."""
    p = np.exp(scale * (random_logits(7, rows=6) - 9)).astype(np.float32)
    p /= p.max(-1, keepdims=True)
    p[5, 3:20] = p[5, 2]  # equal values stay or go together
    for wanted, weight in ((np.array([1, 2, 7, 20, 50, 5], np.float32), np.ones((), np.float32)), (p.sum(-1) * 0.7, p)):
        found = [jax.jit(f)(p, weight, wanted) for f in (_largest_by_digits, _largest_by_guessing)]
        kept = [p >= np.asarray(t)[:, None] for t in found]
        assert (kept[0] == kept[1]).all()
        for row, mask, goal in zip(p, kept[0], wanted, strict=True):
            value = row if weight.ndim else np.ones(V)
            assert value[mask].sum() >= goal * (1 - 1e-6) and value[mask & (row > row[mask].min())].sum() < goal
