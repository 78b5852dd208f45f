"""How far RL has come from the model that it started with."""

from __future__ import annotations

import numpy as np


def kl_per_token(now: np.ndarray, start: np.ndarray, counts: np.ndarray) -> float:
    """KL divergence of the policy from its start in nats per sampled token, from one sample of each.

    Args: negative log-likelihoods under the present weights and under the first ones, and 1 where a token was sampled,
    all of one shape. The estimator exp(d) - 1 - d, d = log p_start - log p_now, is never negative and unbiased (up to
    what top-k cuts off): http://joschu.net/blog/kl-approx.html.
    """
    d = (now - start).astype(np.float64)
    return float(((np.expm1(d) - d) * counts).sum() / max(counts.sum(), 1.0))
