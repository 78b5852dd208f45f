"""Statistics of paired measurements: the same documents or questions put to two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# Shares of right answers and how sure they are.


Z95 = 1.959963984540054  # standard deviations on each side of a 95 % interval


def accuracy(right: Sequence[bool], chance: float = 0.0) -> dict[str, Any]:
    """Share of right answers with its 95 % interval, and the share that guessing gets."""
    share = sum(right) / len(right) if right else 0.0
    return {
        "metric": share,
        "accuracy": share,
        "n": len(right),
        "right": sum(right),
        "interval": wilson(sum(right), len(right)),
        "chance": chance,
    }


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval, 1927); (0, 1) where nothing was asked."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at(right: np.ndarray, k: int) -> np.ndarray:
    """Of right (P, S) bool, for each of P questions: the chance that one of k answers is right, estimated without bias
    from all S (2107.03374); (P,) float64."""
    S = right.shape[1]
    return np.array([1 - math.comb(S - int(c), k) / math.comb(S, k) for c in right.sum(axis=1)], np.float64)


def pass_at_k(right: np.ndarray) -> dict[str, float]:
    """`pass@1` to `pass@S` of right (P, S) bool."""
    return {f"pass@{k}": float(pass_at(right, k).mean()) for k in range(1, right.shape[1] + 1)}


def passes(right: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Scores `pass@1` to `pass@S` of P questions with S answers each; 95 % intervals over the questions by the normal
    approximation, (0, 1) for a single one."""
    table = np.array(right, bool)
    found: dict[str, Any] = {}
    for k in range(1, table.shape[1] + 1):
        each = pass_at(table, k)
        n, share = len(each), float(each.mean())
        half = Z95 * float(each.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
        interval = max(0.0, share - half), min(1.0, share + half)
        found[f"pass@{k}"] = {"metric": share, "accuracy": share, "n": n, "interval": interval}
    return found


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
