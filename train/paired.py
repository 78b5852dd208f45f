"""Statistics of paired measurements: the same documents or questions put to two models."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from train.shares import Z95

RESAMPLES = 10_000
BLOCK = 1_000_000  # drawn numbers held at once
SEED = 20_260_301


def ratio_interval(differences: ArrayLike, sizes: ArrayLike) -> tuple[float, float] | None:
    """95 % interval of sum(differences) / sum(sizes) by a bootstrap over the pairs (2.5 and 97.5 percentiles).

    Both (n,). None for fewer than two pairs: nothing is known of how they vary.
    """
    d, s = np.asarray(differences, np.float64), np.asarray(sizes, np.float64)
    n = len(d)
    if n < 2:
        return None
    rng, ratios = np.random.default_rng(SEED), []
    rows = max(1, BLOCK // n)
    for start in range(0, RESAMPLES, rows):
        picked = rng.integers(n, size=(min(rows, RESAMPLES - start), n))
        ratios.append(d[picked].sum(axis=1) / s[picked].sum(axis=1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


def share_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares, second minus first (Agresti and Min, 2005).

    Wald's interval after half a case is added to every cell of the 2 x 2 table, so it has a width also where the two
    agree on everything.
    """
    b, c, size = only_first + 0.5, only_second + 0.5, n + 2
    middle = (c - b) / size
    half = Z95 * math.sqrt(max(0.0, b + c - (c - b) ** 2 / size)) / size
    return max(-1.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: were both equally good, so lopsided a split would be that likely."""
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    log_tail = max(_log_choose(n, i) for i in range(k + 1))
    tail = sum(math.exp(_log_choose(n, i) - log_tail) for i in range(k + 1))
    return min(1.0, math.exp(math.log(2 * tail) + log_tail - n * math.log(2)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
