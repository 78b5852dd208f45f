"""The key-value cache, and the one function that appends tokens to it: prefill, chunked prefill and decoding.

Axes: R rows, S cache positions, T time, K kv heads, N head width, D width.
A windowed layer keeps only its window, as a ring: position p lies at place p % S. Keys are rotated by their absolute
position before they are cached and softmax is a sum without order, so a ring is never rearranged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxchat.attention import attention, choose_backend, masked_attention, offset_keys
from jaxchat.config import ModelConfig
from jaxchat.low_precision import KERNELS, quantize_int8
from jaxchat.model import Params, embed, forward, layer_params, unembedding
from jaxchat.sizes import score_bound, windows


@jax.tree_util.register_dataclass
@dataclass
class Cache:
    """State of R sequences."""

    k: tuple[jax.Array, ...]  # of each layer (R, K, S, N)
    v: tuple[jax.Array, ...]
    length: jax.Array  # (R,) int32 tokens so far
    previous: jax.Array  # (R,) int32 the last token, which is part of the next one's input; -1: none


def layer_capacity(config: ModelConfig, capacity: int) -> list[int]:
    """Return the cache positions S of every layer: a windowed one needs its window and the token itself.

    Where keys are offset, it also needs the token before the window.
    """
    return [min(capacity, window + 1 + bool(config.key_offset)) for window in windows(config)]


def new_cache(config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype | type = jnp.float32) -> Cache:
    """Return an empty cache for `rows` sequences of at most `capacity` tokens."""
    shapes = [(rows, config.n_kv_heads, S, config.head_width) for S in layer_capacity(config, capacity)]
    k, v = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
    return Cache(k, v, jnp.zeros(rows, jnp.int32), jnp.full(rows, -1, jnp.int32))


def serving_params(config: ModelConfig, params: Params, dtype: jnp.dtype | type, weights: str = "auto") -> Params:
    """Return weights for serving: cast once, and with a list "layers", so that no step slices a stack.

    `weights` "int8": the layers' kernels and the unembedding as 8-bit integers, everything else in `dtype`.
    """
    cast = jax.tree.map(lambda p: p if p.ndim < 2 else p.astype(dtype), params)  # as `model.cast_params`
    served = {k: v for k, v in cast.items() if k not in ("blocks", "value_embedding")}
    if "unembedding" in served:
        served["unembedding"] = served["unembedding"][: config.vocab_size]
    served["layers"] = [layer_params(config, cast, i) for i in range(config.depth)]
    if weights == "int8":
        for i, layer in enumerate(served["layers"]):
            exact = layer_params(config, params, i)
            layer.update({name: quantize_int8(exact[name]) for name in KERNELS})
        served["output"] = quantize_int8(unembedding(params)[: config.vocab_size].T)
        served.pop("unembedding", None)
    return served


def append(
    config: ModelConfig, params: Params, tokens: jax.Array, count: jax.Array, cache: Cache, empty: bool = False
) -> tuple[jax.Array, Cache]:
    """Append tokens to the sequence of each row, and run them.

    Args:
      params: from `serving_params`.
      tokens: (R, T) int, right-padded; count: (R,) int32, tokens of each row, 0 leaves the row as it is.
      empty: the rows hold nothing yet, so the tokens attend to themselves alone, by the backend of training.

    Returns: final activations (R, T, D), and the cache with the tokens appended.
    """
    (R, T), start, end = tokens.shape, cache.length, cache.length + count
    rows, positions = jnp.arange(R), start[:, None] + jnp.arange(T)
    backend, _ = choose_backend(config, params["embedding"].dtype, jax.devices()[0], T)
    keys, values = list(cache.k), list(cache.v)

    def behind(scores: jax.Array, at: jax.Array, S: int) -> jax.Array:
        """Move scores (R, K, G, T, S cached and T new keys) to the token behind each key's; 0 at a text's start."""
        cached, new = jnp.split(scores, [S], axis=-1)
        moved = jnp.where((at[:, :S] == 0)[:, None, None, None], 0, jnp.roll(cached, 1, axis=-1))
        if not new.size:
            return moved
        start_ = start[:, None, None, None, None]
        first = jnp.where(start_ > 0, jnp.take_along_axis(cached, (start_ - 1) % S, axis=-1), 0)
        return jnp.concatenate([moved, first, new[..., :-1]], axis=-1)

    def offset(at: jax.Array, S: int) -> Callable[[jax.Array], jax.Array] | None:
        return functools.partial(behind, at=at, S=S) if config.key_offset else None

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        S, window = keys[i].shape[2], windows(config)[i]
        if T == 1:  # written in place; what it replaces has just left the window
            place = jnp.where(count > 0, start % S, S)  # S is outside: the write is dropped
            for cached, one in ((keys, k), (values, v)):
                cached[i] = cached[i].at[rows, :, place].set(one[:, 0].astype(cached[i].dtype), mode="drop")
            at = _newest(start, S)
            seen = (at >= 0) & (start[:, None] - at <= window)
            return masked_attention(q, keys[i], values[i], seen[:, None], offset(at, S))
        old = keys[i], values[i]
        new = [a.swapaxes(1, 2).astype(keys[i].dtype) for a in (k, v)]
        source = _newest(end - 1, S) - start[:, None]  # which new token belongs to each place; negative: none
        stays, source = (source < 0)[:, None, :, None], jnp.clip(source, 0, T - 1)[:, None, :, None]
        keys[i], values[i] = (
            jnp.where(stays, a, jnp.take_along_axis(b, source, axis=2)) for a, b in zip(old, new, strict=True)
        )
        if empty:
            return attention(q, offset_keys(config, k), v, window, backend, score_bound(config))
        at = jnp.concatenate([_newest(start - 1, S), positions], axis=1)  # of the cached keys and the new ones
        distance = positions[:, :, None] - at[:, None, :]
        mask = (distance >= 0) & (distance <= window) & (at >= 0)[:, None, :]
        all_k, all_v = (jnp.concatenate(pair, axis=2) for pair in zip(old, new, strict=True))
        return masked_attention(q, all_k, all_v, mask, offset(at, S))

    x = forward(config, params, embed(config, params, tokens, cache.previous), tokens, positions, attend)
    last = jnp.where(count > 0, tokens[rows, jnp.maximum(count - 1, 0)], cache.previous)
    return x, Cache(tuple(keys), tuple(values), end, last)


def _newest(last: jax.Array, S: int) -> jax.Array:
    """Return the position (R, S) at each place of a ring after position last (R,); negative where none is."""
    return last[:, None] - (last[:, None] - jnp.arange(S)) % S
