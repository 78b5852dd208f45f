"""The key-value cache, prefill and one-token decoding.

Axes: R rows (slots), S cache positions, T time, L layer, K kv heads, N head width, D width, V vocabulary.
Windowed layers keep only their window, as a ring: position p lies at p % S. Rotary angles are absolute and applied
before caching, and softmax does not care about order, so a ring needs no rearranging.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxchat.attention import attention, cached_attention, choose_backend, piece_attention
from jaxchat.config import ModelConfig
from jaxchat.low_precision import KERNELS, dot, logits, quantize_int8
from jaxchat.model import Params, block, embed, finish, layer_params, rotary, unembedding
from jaxchat.sizes import score_bound, windows


@jax.tree_util.register_dataclass
@dataclass
class Cache:
    """State of R sequences. k, v: per layer (R, K, S_layer, N); length (R,) int32: tokens so far; previous (R, D):
    the last token's normed embedding, which smear needs."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    length: jax.Array
    previous: jax.Array

    @property
    def rows(self) -> int:
        return self.length.shape[0]


@jax.tree_util.register_dataclass
@dataclass
class Prefix:
    """What a prefill leaves behind. k, v: per layer (B, K, T, N); length (B,) int32; previous (B, D)."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    length: jax.Array
    previous: jax.Array


def layer_capacity(config: ModelConfig, capacity: int) -> list[int]:
    """Cache positions per layer: a windowed layer needs its window and the token itself."""
    return [min(capacity, window + 1) for window in windows(config)]


def new_cache(config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype | type = jnp.float32) -> Cache:
    """An empty cache for `rows` sequences of at most `capacity` tokens."""
    shapes = [(rows, config.n_kv_heads, S, config.head_width) for S in layer_capacity(config, capacity)]
    return Cache(
        k=tuple(jnp.zeros(shape, dtype) for shape in shapes),
        v=tuple(jnp.zeros(shape, dtype) for shape in shapes),
        length=jnp.zeros(rows, jnp.int32),
        previous=jnp.zeros((rows, config.width), dtype),
    )


def serving_params(config: ModelConfig, params: Params, dtype: jnp.dtype | type, weights: str = "auto") -> Params:
    """Weights for decoding: cast once, and cut into layers once so that no step slices a stack.

    `weights` "int8": the layers' kernels and the unembedding as 8-bit integers, everything else in `dtype`.
    """
    cast = jax.tree.map(lambda p: p if p.ndim < 2 else p.astype(dtype), params)  # as `gpt.cast_params` does
    served = {k: v for k, v in cast.items() if k not in ("blocks", "value_embedding")}
    if "unembedding" in served:
        served["unembedding"] = served["unembedding"][: config.vocab_size]
    served["layers"] = [layer_params(config, cast, i) for i in range(config.depth)]
    if weights == "int8":
        exact = [layer_params(config, params, i) for i in range(config.depth)]
        served["layers"] = [
            layer | {name: quantize_int8(own[name]) for name in KERNELS}
            for layer, own in zip(served["layers"], exact, strict=True)
        ]
        served["output"] = quantize_int8(unembedding(params)[: config.vocab_size].T)
        served.pop("unembedding", None)
    return served


def prefill(config: ModelConfig, params: Params, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, Prefix]:
    """Run prompts at once.

    Args:
      params: from `serving_params`.
      tokens: (B, T) int, right-padded; length: (B,) int32, tokens of each prompt, at least 1.

    Returns: logits (B, V) float32 after each prompt's last token, and its `Prefix`.
    """
    x, middle, e, keys, values = _run(config, params, tokens)
    rows = jnp.arange(tokens.shape[0])
    last = finish(config, params, x[rows, length - 1], middle[rows, length - 1])
    prefix = Prefix(tuple(keys), tuple(values), length.astype(jnp.int32), e[rows, length - 1])
    return logits(config, params, last), prefix


def activations(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """(B, T, D) after the last norm, of tokens (B, T); `params` from `serving_params`."""
    x, middle, *_ = _run(config, params, tokens)
    return finish(config, params, x, middle)


def _run(
    config: ModelConfig, params: Params, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array], list[jax.Array]]:
    """Last and middle activations, normed embeddings, and of every layer keys and values (B, K, T, N)."""
    dtype = params["embedding"].dtype
    backend, _ = choose_backend(config, dtype, jax.devices()[0], tokens.shape[1])
    bound = score_bound(config)
    cos_sin = rotary(config, jnp.arange(tokens.shape[1])[None, :], dtype)
    x, e = embed(config, params, tokens)
    x0 = middle = x
    keys: list[jax.Array] = []
    values: list[jax.Array] = []
    for i, (layer, window) in enumerate(zip(params["layers"], windows(config), strict=True)):

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, window: int = window) -> jax.Array:
            keys.append(k.transpose(0, 2, 1, 3))
            values.append(v.transpose(0, 2, 1, 3))
            return attention(q, k, v, window, backend, bound)

        x = block(config, layer, x, x0, tokens, cos_sin, attend, dot)
        middle = x if i == config.depth // 2 else middle
    return x, middle, e, keys, values


def insert(cache: Cache, prefix: Prefix, source: jax.Array, slot: jax.Array) -> Cache:
    """Put prompt `source` (a row of `prefix`) into row `slot` of the cache; both scalar ints, traced."""

    def put(into: jax.Array, new: jax.Array) -> jax.Array:
        S, T = into.shape[2], new.shape[2]
        last = prefix.length[source] - 1
        # the newest position that falls on each ring place; places without one hold garbage that is never visible
        position = last - (last - jnp.arange(S)) % S
        row = jnp.take(new[source], jnp.clip(position, 0, T - 1), axis=1)
        return into.at[slot].set(row.astype(into.dtype))

    return Cache(
        k=tuple(put(a, b) for a, b in zip(cache.k, prefix.k, strict=True)),
        v=tuple(put(a, b) for a, b in zip(cache.v, prefix.v, strict=True)),
        length=cache.length.at[slot].set(prefix.length[source]),
        previous=cache.previous.at[slot].set(prefix.previous[source].astype(cache.previous.dtype)),
    )


def extend(config: ModelConfig, params: Params, tokens: jax.Array, count: jax.Array, cache: Cache) -> Cache:
    """Run a piece of text behind what each row already holds.

    Args:
      params: from `serving_params`.
      tokens: (R, T) int, right-padded; count: (R,) int32, tokens of each piece, 0 leaves the row as it is.

    Returns: the cache with the pieces appended.
    """
    (R, T), start = tokens.shape, cache.length
    rows, position = jnp.arange(R), start[:, None] + jnp.arange(T)
    cos_sin = rotary(config, position, params["embedding"].dtype)
    x, e = embed(config, params, tokens, cache.previous)
    x0 = middle = x
    keys, values = list(cache.k), list(cache.v)
    for i, (layer, window) in enumerate(zip(params["layers"], windows(config), strict=True)):

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, i: int = i, window: int = window) -> jax.Array:
            S = keys[i].shape[2]
            new = [a.transpose(0, 2, 1, 3).astype(keys[i].dtype) for a in (k, v)]
            at = jnp.concatenate([_newest(start - 1, S), position], axis=1)  # of the cached keys and the piece's
            distance = position[:, :, None] - at[:, None, :]
            visible = (distance >= 0) & (distance <= window) & (at >= 0)[:, None, :]
            both = [jnp.concatenate(pair, axis=2) for pair in zip((keys[i], values[i]), new, strict=True)]
            index = _newest(start + count - 1, S) - start[:, None]  # in the piece; negative: the place stays
            stays, index = (index < 0)[:, None, :, None], jnp.clip(index, 0, T - 1)[:, None, :, None]
            keys[i], values[i] = (
                jnp.where(stays, old, jnp.take_along_axis(piece, index, axis=2))
                for old, piece in zip((keys[i], values[i]), new, strict=True)
            )
            return piece_attention(q, both[0], both[1], visible)

        x = block(config, layer, x, x0, tokens, cos_sin, attend, dot)
        middle = x if i == config.depth // 2 else middle
    last = e[rows, jnp.maximum(count - 1, 0)].astype(cache.previous.dtype)
    return Cache(tuple(keys), tuple(values), start + count, jnp.where(count[:, None] > 0, last, cache.previous))


def _newest(last: jax.Array, S: int) -> jax.Array:
    """(R, S): the position at each place of a ring whose newest position is last (R,); negative where none is."""
    return last[:, None] - (last[:, None] - jnp.arange(S)) % S


def decode(
    config: ModelConfig, params: Params, tokens: jax.Array, cache: Cache, active: jax.Array, bucket: int
) -> tuple[jax.Array, Cache]:
    """One token for every row.

    Args:
      params: from `serving_params`.
      tokens: (R,) int, each row's next token; active: (R,) bool, rows that advance (the others write nothing).
      bucket: cache positions to read in full layers; static, at least every active row's length + 1.

    Returns: logits (R, V) float32 after the token, and the cache with it appended.
    """
    rows, position = jnp.arange(cache.rows), cache.length
    cos_sin = rotary(config, position[:, None], params["embedding"].dtype)
    x, e = embed(config, params, tokens[:, None], cache.previous)
    x0 = middle = x
    keys, values = list(cache.k), list(cache.v)
    for i, layer in enumerate(params["layers"]):

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, i: int = i) -> jax.Array:
            S = keys[i].shape[2]
            place = jnp.where(active, position % S, S)  # S is outside: the write is dropped
            keys[i] = keys[i].at[rows, :, place].set(k[:, 0].astype(keys[i].dtype), mode="drop")
            values[i] = values[i].at[rows, :, place].set(v[:, 0].astype(values[i].dtype), mode="drop")
            read = min(S, bucket)
            visible = _newest(position, S)[:, :read] >= 0
            return cached_attention(q[:, 0], keys[i][:, :, :read], values[i][:, :, :read], visible)[:, None]

        x = block(config, layer, x, x0, tokens[:, None], cos_sin, attend, dot)
        middle = x if i == config.depth // 2 else middle
    out = logits(config, params, finish(config, params, x, middle)[:, 0])
    return out, Cache(
        k=tuple(keys),
        v=tuple(values),
        length=jnp.where(active, position + 1, position),
        previous=jnp.where(active[:, None], e[:, 0].astype(cache.previous.dtype), cache.previous),
    )
