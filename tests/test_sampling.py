"""Sampling: greedy, exact cuts against a sort, frequencies against the distribution, independence of neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.engine.device import _threshold, blank_rows, sample

V = 50


def settings(count, seed=7, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    given = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    rows = {name: blank_rows(count, V)[name] for name in given}
    for name, value in given.items():
        rows[name][:] = value
    return rows


def draws(logits, count, **given):
    """`count` draws from one distribution: one row each, positions 0, 1, ..."""
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(jax.jit(sample)(logits, settings(count, **given), jnp.arange(count)))


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
    share = jnp.asarray(p / p.max())[None]
    threshold = _threshold(share, share, top_p * share.sum(axis=1))
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
    logits, position = random_logits(4, rows=8), np.arange(8, dtype=np.int32) * 3
    rows = settings(8, seed=np.arange(8, dtype=np.uint32) + np.uint32(2**31), top_k=20, top_p=0.95)
    together = np.asarray(sample(logits, rows, position))

    def drawn(part):
        return np.asarray(sample(logits[part], {name: a[part] for name, a in rows.items()}, position[part])).tolist()

    order = np.random.default_rng(0).permutation(8)
    assert drawn(order) == together[order].tolist()
    assert [drawn(slice(i, i + 1))[0] for i in range(8)] == together.tolist()


def test_seeds_and_positions_change_the_draw():
    flat = np.zeros(V, np.float32)
    assert len(set(draws(flat, 500))) > 45
    rows = settings(500, seed=np.arange(500))
    assert len(set(np.asarray(sample(jnp.zeros((500, V)), rows, jnp.zeros(500, jnp.int32))))) > 45


def test_rows_with_different_settings_do_not_mix():
    logits, position = random_logits(5, rows=4), np.arange(4, dtype=np.int32)
    rows = settings(4, seed=3, temperature=[0.0, 1.0, 0.0, 2.0], top_k=[0, 5, 3, 0], top_p=[1.0, 0.9, 0.5, 1.0])
    mixed = sample(logits, rows, position)
    assert mixed[0] == logits[0].argmax() and mixed[2] == logits[2].argmax()
    assert mixed[1] == sample(logits[1:2], settings(1, seed=3, top_k=5, top_p=0.9), position[1:2])[0]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_both_ways_to_a_threshold_keep_as_many_tokens_as_they_must(scale, platform, monkeypatch):
    """A CPU ends early, an accelerator settles several bits at a time."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda cpu, default: (cpu if platform == "cpu" else default)())
    p = np.exp(scale * (random_logits(7, rows=6) - 9)).astype(np.float32)
    p /= p.max(-1, keepdims=True)
    p[5, 3:20] = p[5, 2]  # equal values stay or go together
    for wanted, weight in ((np.array([1, 2, 7, 20, 50, 5], np.float32), np.ones((), np.float32)), (p.sum(-1) * 0.7, p)):
        kept = p >= np.asarray(jax.jit(_threshold)(p, weight, wanted))[:, None]
        for row, mask, goal in zip(p, kept, wanted, strict=True):
            value = row if weight.ndim else np.ones(V)
            assert value[mask].sum() >= goal * (1 - 1e-6) and value[mask & (row > row[mask].min())].sum() < goal
