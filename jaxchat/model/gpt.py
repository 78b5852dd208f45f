"""The GPT: a Flax NNX module that declares the parameters, and pure functions over them.

Axes: B batch, T time, L layer, H query heads, K kv heads, N head width, D width, F feed-forward width, V vocabulary.
Kernels are (in, out), stacked over the layers. Recipes after nanochat; papers: rotary 2104.09864, relu squared
2109.08668, QK-norm 2010.04245, value residual 2410.17897.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxchat.config import ModelConfig
from jaxchat.model.attention import attention, choose_backend
from jaxchat.model.layout import (
    SMEAR_CHANNELS,
    VE_GATE_CHANNELS,
    mlp_width,
    padded_vocab,
    scan_groups,
    score_bound,
    value_layers,
    windows,
)

Params = dict[str, Any]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Blocks(nnx.Module):
    """Parameters of the L blocks, stacked."""

    def __init__(self, config: ModelConfig, declare: Callable[..., nnx.Param]):
        c, L, D, F = config, config.depth, config.width, mlp_width(config)
        HN, KN = c.n_heads * c.head_width, c.n_kv_heads * c.head_width
        into, fc = _kernel_inits(config)
        self.q = declare((L, D, HN), ("layer", "embed", "heads"), into)
        self.k = declare((L, D, KN), ("layer", "embed", "kv_heads"), into)
        self.v = declare((L, D, KN), ("layer", "embed", "kv_heads"), into)
        self.o = declare((L, HN, D), ("layer", "heads", "embed"), nnx.initializers.zeros)
        self.fc = declare((L, D, F), ("layer", "embed", "mlp"), fc)
        self.proj = declare((L, F, D), ("layer", "mlp", "embed"), nnx.initializers.zeros)
        if c.residual_scalars:
            self.residual_scale = declare((L,), ("layer",), _ramp(1.15, 1.05))
            self.x0_scale = declare((L,), ("layer",), _ramp(0.20, 0.05))
        if c.value_embeddings:
            shape = (len(value_layers(c)), VE_GATE_CHANNELS, c.n_kv_heads)
            self.ve_gate = declare(shape, ("layer", "gate", "kv_heads"), _gate_init)


class GPT(nnx.Module):
    """`config` must be resolved (`recipes.resolve_model`). All parameters are float32."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        def declare(shape: tuple[int, ...], axes: tuple[str, ...], init: Callable[..., jax.Array]) -> nnx.Param:
            return nnx.Param(init(rngs.params(), shape, jnp.float32), logical_axes=axes)

        c, D, V = config, config.width, padded_vocab(config)
        classic = c.recipe == "classic"
        self.config = config
        self.embedding = declare((V, D), ("vocab", "embed"), nnx.initializers.normal(1.0 if classic else 0.8))
        if not c.tie_embeddings:
            init = nnx.initializers.zeros if classic else nnx.initializers.normal(0.001)
            self.unembedding = declare((V, D), ("vocab", "embed"), init)
        if c.value_embeddings:
            shape = (len(value_layers(c)), V, c.n_kv_heads * c.head_width)
            self.value_embedding = declare(shape, ("layer", "table", "kv_heads"), _uniform(D**-0.5))
        if c.smear:
            self.smear_gate = declare((SMEAR_CHANNELS, 1), ("gate", "gate"), _gate_init)
            self.smear_scale = declare((), (), nnx.initializers.zeros)
        if c.backout:
            self.backout_scale = declare((), (), nnx.initializers.constant(0.2))
        self.blocks = Blocks(config, declare)

    def __call__(self, tokens: jax.Array, unroll: int = 1) -> jax.Array:
        """Logits (B, T, V) float32, softcapped and cropped to the vocabulary, of tokens (B, T) int."""
        params = nnx.to_pure_dict(nnx.state(self))
        return logits(self.config, params, hidden(self.config, params, tokens, unroll))


def init_params(config: ModelConfig, seed: int) -> Params:
    """The parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(seed))))


def abstract_params(config: ModelConfig) -> tuple[Params, Params]:
    """(shapes and dtypes, logical axes) of all parameters, as nested dicts; allocates nothing."""
    state = nnx.state(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))
    axes = jax.tree.map(lambda p: p.get_metadata()["logical_axes"], state, is_leaf=lambda p: isinstance(p, nnx.Param))
    return nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def cast_params(params: Params, dtype: jnp.dtype | type) -> Params:
    """Weights in the compute dtype, once a step. The unembedding stays: the loss casts it and owns its gradient."""
    cast = jax.tree.map(lambda p: p.astype(dtype), params)
    return cast | {"unembedding": unembedding(params)}


def unembedding(params: Params) -> jax.Array:
    """(V, D); the embedding itself where the two are tied."""
    return params["unembedding"] if "unembedding" in params else params["embedding"]


def hidden(config: ModelConfig, params: Params, tokens: jax.Array, unroll: int = 1) -> jax.Array:
    """Final normed activations (B, T, D) in the dtype of the embedding, of tokens (B, T) int.

    The trunk is a scan over groups of layers, `unroll` groups per iteration; with all groups unrolled, a plain loop.
    """
    dtype = params["embedding"].dtype
    backend, bound = choose_backend(config.attention, dtype), score_bound(config)
    cos_sin = rotary(config, jnp.arange(tokens.shape[1])[None, :], dtype)
    x, _ = embed(config, params, tokens)
    sizes, (groups, period) = windows(config), scan_groups(config)

    def run(layer: dict[str, jax.Array], window: int, x: jax.Array, x0: jax.Array) -> jax.Array:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, window, backend, bound)

        return block(config, layer, x, x0, tokens, cos_sin, attend)

    x0 = middle = x
    start = 0
    if groups > max(unroll, 1):

        def group(carry: tuple[jax.Array, jax.Array], scanned: tuple[jax.Array, list[Params]]) -> tuple[Any, None]:
            x, middle = carry
            index, layers = scanned
            for j, layer in enumerate(layers):
                x = run(layer, sizes[j], x, x0)
                if config.backout and j == config.depth // 2 % period:
                    middle = jnp.where(index == config.depth // 2 // period, x, middle)
            return (x, middle), None

        scanned = jnp.arange(groups), grouped_layers(config, params, groups, period)
        (x, middle), _ = jax.lax.scan(group, (x, middle), scanned, unroll=unroll)
        start = groups * period
    for i in range(start, config.depth):
        x = run(layer_params(config, params, i), sizes[i], x, x0)
        middle = x if i == config.depth // 2 else middle
    return finish(config, params, x, middle)


def block(
    config: ModelConfig,
    p: dict[str, jax.Array],
    x: jax.Array,
    x0: jax.Array,
    tokens: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Attend,
) -> jax.Array:
    """One layer on x (B, T, D); `p` holds its own slices, `attend` maps q (B, T, H, N), k, v (B, T, K, N) to y."""
    B, T, _ = x.shape
    c, N, dtype = config, config.head_width, x.dtype
    if c.residual_scalars:
        x = p["residual_scale"].astype(dtype) * x + p["x0_scale"].astype(dtype) * x0
    h = norm(x, c.norm_eps)
    q = (h @ p["q"]).reshape(B, T, c.n_heads, N)
    k = (h @ p["k"]).reshape(B, T, c.n_kv_heads, N)
    v = (h @ p["v"]).reshape(B, T, c.n_kv_heads, N)
    if "value_embedding" in p:
        gate = 3 * jax.nn.sigmoid(h[..., :VE_GATE_CHANNELS] @ p["ve_gate"])  # (B, T, K), near 1.5 at the start
        v = v + gate[..., None] * p["value_embedding"][tokens].reshape(v.shape)
    q = norm(rotate(q, cos_sin), c.norm_eps) * c.qk_scale
    k = norm(rotate(k, cos_sin), c.norm_eps) * c.qk_scale
    x = x + attend(q, k, v).reshape(B, T, c.n_heads * N) @ p["o"]
    return x + jnp.square(jax.nn.relu(norm(x, c.norm_eps) @ p["fc"])) @ p["proj"]


def embed(
    config: ModelConfig, params: Params, tokens: jax.Array, previous: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(x, e) both (B, T, D): the normed embedding with the token before smeared in, and without.

    `previous` (B, D) is the normed embedding before the first position (decoding); zeros or None at a start.
    """
    e = norm(params["embedding"][tokens], config.norm_eps)
    if not config.smear:
        return e, e
    first = jnp.zeros_like(e[:, :1]) if previous is None else previous[:, None].astype(e.dtype)
    before = jnp.concatenate([first, e[:, :-1]], axis=1)
    gate = params["smear_scale"].astype(e.dtype) * jax.nn.sigmoid(e[..., :SMEAR_CHANNELS] @ params["smear_gate"])
    return e + gate * before, e


def finish(config: ModelConfig, params: Params, x: jax.Array, middle: jax.Array) -> jax.Array:
    """Last steps of the trunk: subtract the middle layer's output, norm."""
    if config.backout:
        x = x - params["backout_scale"].astype(x.dtype) * middle
    return norm(x, config.norm_eps)


def logits(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """Softcapped float32 logits (..., V) of activations (..., D), cropped to the vocabulary."""
    w = unembedding(params)[: config.vocab_size].astype(x.dtype)
    z = jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)
    return config.softcap * jnp.tanh(z / config.softcap)


def norm(x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis without weights, computed in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rotary(config: ModelConfig, positions: jax.Array, dtype: jnp.dtype | type) -> tuple[jax.Array, jax.Array]:
    """cos and sin (B, T, 1, N/2) of positions (B, T)."""
    frequency = config.rotary_base ** (-jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn (B, T, heads, N) by minus theta, halves split: the convention of karpathy's and Hugging Face's weights."""
    cos, sin = cos_sin
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)


def layer_params(config: ModelConfig, params: Params, i: int) -> Params:
    """Layer i's own slices of the stacked parameters, its value-embedding table included."""
    stack = {k: v for k, v in params["blocks"].items() if k != "ve_gate"}
    layer = {k: v[i] for k, v in stack.items()}
    if i in value_layers(config):
        j = value_layers(config).index(i)
        layer |= {"ve_gate": params["blocks"]["ve_gate"][j], "value_embedding": params["value_embedding"][j]}
    return layer


def grouped_layers(config: ModelConfig, params: Params, groups: int, period: int) -> list[Params]:
    """For each layer of a group, its slices over all groups (groups, ...): what the scan runs over."""
    layers: list[Params] = []
    with_value = value_layers(config)
    per_group = sum(i < period for i in with_value)
    for j in range(period):
        layer = {k: v[j : groups * period : period] for k, v in params["blocks"].items() if k != "ve_gate"}
        if j in with_value:
            offset = with_value.index(j)
            pick = slice(offset, groups * per_group, per_group)
            layer |= {
                "ve_gate": params["blocks"]["ve_gate"][pick],
                "value_embedding": params["value_embedding"][pick],
            }
        layers.append(layer)
    return layers


def _uniform(std: float) -> Callable[..., jax.Array]:
    """Uniform with the given standard deviation: no outliers."""
    bound = 3**0.5 * std
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _gate_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, 0.0, 0.02)  # slightly above neutral


def _ramp(first: float, last: float) -> Callable[..., jax.Array]:
    return lambda key, shape, dtype: jnp.linspace(first, last, shape[0], dtype=dtype)


def _kernel_inits(config: ModelConfig) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """(q k v, fc). classic: normal, std min(1, sqrt(out/in)) / sqrt(in); modern: uniform, std D^-0.5, fc 0.4 of it."""
    if config.recipe == "modern":
        return _uniform(config.width**-0.5), _uniform(0.4 * config.width**-0.5)

    def classic(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        n_in, n_out = shape[-2:]
        return min(1.0, (n_out / n_in) ** 0.5) * n_in**-0.5 * jax.random.normal(key, shape, dtype)

    return classic, classic
