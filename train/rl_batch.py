"""From graded answers to a training batch: rewards, advantages, rows of few shapes.

REINFORCE with the group's mean as the baseline, the loss normalized over tokens (DAPO, 2503.14476):
loss = -sum over live sampled tokens of advantage * log p / number of those tokens. On policy no ratio is needed.

Axes: P questions, S samples of each, R rows, T positions, A micro-batches of B rows.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxchat.data.batches import own_columns, place
from train.rl_rollouts import Answers

SHORTEST = 64  # positions of a row


def rewards(answers: Answers, format_bonus: float) -> np.ndarray:
    """(P, S) float64: 1 for a right answer, and the bonus for one in the task's form."""
    return answers.right.astype(np.float64) + format_bonus * answers.formatted


def advantages(reward: np.ndarray) -> np.ndarray:
    """(P, S) float32 of rewards (P, S): reward minus the group's mean, exactly 0 in a group of equal rewards."""
    live = reward.max(axis=1, keepdims=True) > reward.min(axis=1, keepdims=True)
    return np.where(live, reward - reward.mean(axis=1, keepdims=True), 0.0).astype(np.float32)


def row_lengths(capacity: int) -> list[int]:
    """Positions of a row: the capacity, and the largest power of two below it."""
    shorter = 1 << ((capacity - 1).bit_length() - 1) if capacity > 1 else 1
    return [shorter, capacity] if SHORTEST <= shorter < capacity else [capacity]


def micro_batches(rows: int, devices: int, device_rows: int) -> tuple[int, int]:
    """(A, B) that hold `rows` rows with at most `device_rows` on a device at once."""
    per_device = -(-rows // devices)
    grad_accum = -(-per_device // device_rows)
    return grad_accum, -(-per_device // grad_accum) * devices


def build(answers: Answers, advantage: np.ndarray, shape: tuple[int, int], length: int) -> dict[str, np.ndarray]:
    """Rows of the live groups, those whose advantages are not all 0, padded to `shape` rows of `length` positions: one
    program for any number of live groups, and micro-batches of padding alone are skipped.

    inputs, targets (A, B, T) int32; weights float32, the advantage where a target was sampled, else 0; counts float32,
    1 where a target of a live group was sampled: their sum is what the loss is divided by.
    """
    live = advantage.any(axis=1)
    tokens, sampled = (a[live].reshape(-1, a.shape[-1])[:, : length + 1] for a in (answers.tokens, answers.sampled))
    width = max(length + 1 - tokens.shape[1], 0)
    padding = (0, shape[0] * shape[1] - len(tokens)), (0, width)
    tokens, sampled = np.pad(tokens, padding), np.pad(sampled, padding)
    by_row = np.pad(advantage[live].ravel(), padding[0])
    counts = sampled[:, 1:].astype(np.float32)
    arrays = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": counts * by_row[:, None],
        "counts": counts,
    }
    return {name: array.reshape(*shape, length) for name, array in arrays.items()}


def longest(answers: Answers, advantage: np.ndarray) -> int:
    """Input positions of the longest answer of a live group."""
    live = np.asarray(advantage).any(axis=1)
    return int(answers.length[live].max()) - 1


def on_mesh(batch: dict[str, np.ndarray], sharding: Sharding) -> dict[str, jax.Array]:
    """The batch with its rows spread over the devices; every process has all of it and gives its own part."""
    shape: Any = batch["inputs"].shape
    columns = own_columns(sharding, shape)
    return place({name: array[:, columns] for name, array in batch.items()}, sharding, shape, columns)
