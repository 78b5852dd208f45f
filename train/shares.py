"""Shares of right answers and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

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
