"""The GPT: a Flax NNX module that declares the parameters, and pure functions over them.

Axes: B batch, T time, L layer, H query heads, K kv heads, N head width, D width, F feed-forward width, V vocabulary.
Kernels are (in, out), stacked over the layers. Recipes after nanochat; what one layer does is in `layers.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxchat.config import ModelConfig
from jaxchat.mesh import BATCH_AXES
from jaxchat.model.attention import attention
from jaxchat.model.layers import Dot, Params, block, embed, finish, logits, rotary, unembedding
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

# What the backward pass may keep of a layer beside its input, `train.remat`; each saves less and recomputes more.
REMAT = ("none", "names", "dots", "full")
SAVED_NAMES = (
    "attention_in",
    "q",
    "k",
    "v",
    "middle",
    "mlp_in",
    "mlp",
    "scale",
    "splash",
)  # "names": these and the attention's result


class Trunk(NamedTuple):
    """How the layers run on a device; beyond rounding none of it changes the result."""

    unroll: int = 1  # groups of layers per iteration of the scan
    backend: str = "xla"  # of the attention
    remat: str = "none"
    dot: Dot = jnp.matmul  # of the layers' kernels
    merge: bool = False  # gradients of the products for q, k and v together; never where heads are split
    mesh: Mesh | None = None
    place: Callable[[str, jax.Array], jax.Array] = lambda name, weight: weight  # gathers a weight where it is used

    def spread(self, x: jax.Array) -> jax.Array:
        """Activations (B, T, D) and their gradient stay split by rows alone."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(BATCH_AXES)))


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
        # a tied table also makes the logits, which a wide one would saturate; the norm behind it forgives any scale
        spread = 0.02 if c.tie_embeddings else 1.0 if classic else 0.8
        self.embedding = declare((V, D), ("vocab", "embed"), nnx.initializers.normal(spread))
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

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (B, T, V) float32, softcapped and cropped to the vocabulary, of tokens (B, T) int."""
        params = nnx.to_pure_dict(nnx.state(self))
        return logits(self.config, params, hidden(self.config, params, tokens))


def init_params(config: ModelConfig, seed: int) -> Params:
    """The parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(seed))))


def abstract_params(config: ModelConfig) -> tuple[Params, Params]:
    """(shapes and dtypes, logical axes) of all parameters, as nested dicts; allocates nothing."""
    state = nnx.state(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))
    axes = jax.tree.map(lambda p: p.get_metadata()["logical_axes"], state, is_leaf=lambda p: isinstance(p, nnx.Param))
    return nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def cast_params(params: Params, dtype: jnp.dtype | type) -> Params:
    """Weights in the compute dtype, once a step.

    The unembedding stays: the loss casts it and owns its gradient. So do the scalars that mix whole activations: their
    gradients are sums over every token and channel, of which 16 bits would keep the first few terms only.
    """
    cast = jax.tree.map(lambda p: p if p.ndim < 2 else p.astype(dtype), params)
    return cast | {"unembedding": unembedding(params)}


DEFAULT_TRUNK = Trunk()


def hidden(config: ModelConfig, params: Params, tokens: jax.Array, trunk: Trunk = DEFAULT_TRUNK) -> jax.Array:
    """Final normed activations (B, T, D) in the dtype of the embedding, of tokens (B, T) int.

    The trunk is a scan over groups of layers, `trunk.unroll` groups per iteration; with all groups unrolled, a plain
    loop.
    """
    cos_sin = rotary(config, jnp.arange(tokens.shape[1])[None, :], params["embedding"].dtype)
    params = {k: v if k in ("blocks", "value_embedding") else trunk.place(k, v) for k, v in params.items()}
    x, _ = embed(config, params, tokens)

    def attend(window: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, window, trunk.backend, score_bound(config), trunk.mesh)

    return through_layers(config, params, x, tokens, cos_sin, attend, trunk)


def through_layers(
    config: ModelConfig,
    params: Params,
    x: jax.Array,
    tokens: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
    attend_within: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
    trunk: Trunk = DEFAULT_TRUNK,
) -> jax.Array:
    """What `hidden` does after the embedding: x (B, T, D) through all layers and the last norm.

    `attend_within` maps a layer's window, q (B, T, H, N), k and v (B, T, K, N) to y; `cos_sin` holds the angles.
    """
    sizes, (groups, period) = windows(config), scan_groups(config)

    def run(stacked: Params, i: int, x: jax.Array, x0: jax.Array, scanned: bool = False) -> jax.Array:
        attend = functools.partial(attend_within, sizes[i])

        def body(stacked: Params, x: jax.Array, x0: jax.Array) -> jax.Array:
            # cut here, inside what is rematerialized: a slice made outside would be saved, a copy of every weight
            layer = layer_params(config, stacked, i)
            layer = {k: trunk.place(k if k == "value_embedding" else f"blocks.{k}", w) for k, w in layer.items()}
            return trunk.spread(block(config, layer, x, x0, tokens, cos_sin, attend, trunk.dot, trunk.merge))

        return rematerialized(body, trunk, scanned)(stacked, x, x0)

    x0 = middle = x
    start = 0
    if groups > max(trunk.unroll, 1):

        def group(carry: tuple[jax.Array, jax.Array], scanned: tuple[jax.Array, Params]) -> tuple[Any, None]:
            x, middle = carry
            index, stacked = scanned
            for j in range(period):
                x = run(stacked, j, x, x0, scanned=True)
                if config.backout and j == config.depth // 2 % period:
                    middle = jnp.where(index == config.depth // 2 // period, x, middle)
            return (x, middle), None

        scanned = jnp.arange(groups), grouped_layers(config, params)
        (x, middle), _ = jax.lax.scan(group, (x, middle), scanned, unroll=trunk.unroll)
        start = groups * period
    for i in range(start, config.depth):
        x = run(params, i, x, x0)
        middle = x if i == config.depth // 2 else middle
    return finish(config, params, x, middle)


def rematerialized(function: Callable[..., jax.Array], trunk: Trunk, scanned: bool = False) -> Callable[..., jax.Array]:
    """`function` with its backward pass recomputing what the policy does not save; see `REMAT`.

    Weights gathered over fsdp are never saved, or the backward pass would hold all layers' at once.
    """
    policies = jax.checkpoint_policies
    if trunk.remat == "none" and (trunk.mesh is None or trunk.mesh.shape["fsdp"] == 1):
        return function
    if trunk.remat == "none":
        save = policies.save_anything_except_these_names("gathered")
    elif trunk.remat == "names":
        own = trunk.backend in ("cudnn", "splash")  # what their backward kernels need is saved by itself
        save = policies.save_only_these_names(*SAVED_NAMES, *(() if own else ("attention",)))
        # cuDNN's kernel leaves, beside its result, softmax statistics without a name; to lose them is to run it again
        save = policies.save_from_both_policies(save, lambda primitive, *_, **__: "attention_fwd" in primitive.name)
    elif trunk.remat == "dots":
        save = policies.dots_with_no_batch_dims_saveable
    else:
        save = policies.nothing_saveable
    return jax.checkpoint(function, policy=save, prevent_cse=not scanned)  # a scan's body is not merged anyway


def layer_params(config: ModelConfig, params: Params, i: int) -> Params:
    """Layer i's own slices of the stacked parameters, its value-embedding table included."""
    stack = {k: v for k, v in params["blocks"].items() if k != "ve_gate"}
    layer = {k: v[i] for k, v in stack.items()}
    if i in value_layers(config):
        j = value_layers(config).index(i)
        layer |= {"ve_gate": params["blocks"]["ve_gate"][j], "value_embedding": params["value_embedding"][j]}
    return layer


def grouped_layers(config: ModelConfig, params: Params) -> Params:
    """What the scan runs over: stacks (groups, layers of a group, ...) of the layers in whole groups.

    One group's part looks like the parameters of a model of its depth, so `layer_params` slices it.
    """
    groups, period = scan_groups(config)

    def split(layers: int) -> Callable[[jax.Array], jax.Array]:
        return lambda a: a[: groups * layers].reshape(groups, layers, *a.shape[1:])

    with_value: Params = {"blocks": {}}
    per_group = sum(i < period for i in value_layers(config))
    if per_group:
        gate = {"ve_gate": params["blocks"]["ve_gate"]}
        with_value = jax.tree.map(split(per_group), {"value_embedding": params["value_embedding"], "blocks": gate})
    others = jax.tree.map(split(period), {k: v for k, v in params["blocks"].items() if k != "ve_gate"})
    return with_value | {"blocks": others | with_value["blocks"]}


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
