"""The GPT: a Flax NNX module that declares the parameters, and pure functions over them.

Axes: B batch, T time, L layer, H query heads, K kv heads, N head width, D width, F feed-forward width, V vocabulary.
Kernels are (in, out), stacked over the layers. Two recipes, both after nanochat. Papers: rotary 2104.09864, relu
squared 2109.08668, QK-norm 2010.04245, value residual 2410.17897.

`forward` is the only pass through the layers. Training, prefill, decoding and scoring differ in the positions, the
attention and the layout of the parameters that they give to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxchat.attention import attention
from jaxchat.config import ModelConfig
from jaxchat.low_precision import dot
from jaxchat.sharding import BATCH_AXES
from jaxchat.sizes import (
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
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]  # layer, q (B, T, H, N), k, v (B, T, K, N) -> y

# Parameters


class Blocks(nnx.Module):
    """Parameters of the L blocks, stacked."""

    def __init__(self, config: ModelConfig, declare: Callable[..., nnx.Param]):
        c, L, D, F = config, config.depth, config.width, mlp_width(config)
        HN, KN = c.n_heads * c.head_width, c.n_kv_heads * c.head_width
        qkv, fc = (_uniform(D**-0.5), _uniform(0.4 * D**-0.5)) if c.recipe == "modern" else (_fan, _fan)
        self.q = declare((L, D, HN), ("layer", "embed", "heads"), qkv)
        self.k = declare((L, D, KN), ("layer", "embed", "kv_heads"), qkv)
        self.v = declare((L, D, KN), ("layer", "embed", "kv_heads"), qkv)
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
    """All parameters of a resolved `config`, float32, each with its logical axes (see `sharding`)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        def declare(shape: tuple[int, ...], axes: tuple[str, ...], init: Callable[..., jax.Array]) -> nnx.Param:
            return nnx.Param(init(rngs.params(), shape, jnp.float32), logical_axes=axes)

        c, D, V = config, config.width, padded_vocab(config)
        classic = c.recipe == "classic"
        self.config = config
        # a tied table also makes the logits, which a wide one would saturate; the norm behind it forgives any scale
        std = 0.02 if c.tie_embeddings else 1.0 if classic else 0.8
        self.embedding = declare((V, D), ("vocab", "embed"), nnx.initializers.normal(std))
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


def _uniform(std: float) -> Callable[..., jax.Array]:
    """Uniform with the given standard deviation: no outliers."""
    bound = 3**0.5 * std
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _fan(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal with standard deviation min(1, sqrt(out / in)) / sqrt(in)."""
    n_in, n_out = shape[-2:]
    return min(1.0, (n_out / n_in) ** 0.5) * n_in**-0.5 * jax.random.normal(key, shape, dtype)


def _gate_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, 0.0, 0.02)  # slightly above neutral


def _ramp(first: float, last: float) -> Callable[..., jax.Array]:
    return lambda key, shape, dtype: jnp.linspace(first, last, shape[0], dtype=dtype)


def init_params(config: ModelConfig, seed: int) -> Params:
    """Return the parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(seed))))


def abstract_params(config: ModelConfig) -> tuple[Params, Params]:
    """Return (shapes and dtypes, logical axes) of all parameters as nested dicts; allocates nothing."""
    state = nnx.state(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0))))
    axes = jax.tree.map(lambda p: p.get_metadata()["logical_axes"], state, is_leaf=lambda p: isinstance(p, nnx.Param))
    return nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def cast_params(params: Params, dtype: jnp.dtype | type) -> Params:
    """Return the weights in the compute dtype.

    The unembedding stays: the loss casts it and owns its gradient. So do the scalars that mix whole activations: their
    gradients are sums over every token and channel, of which 16 bits would keep the first few terms only.
    """
    cast = jax.tree.map(lambda p: p if p.ndim < 2 else p.astype(dtype), params)
    return cast | {"unembedding": unembedding(params)}


def unembedding(params: Params) -> jax.Array:
    """Return the table (V, D) of the logits: the embedding itself where the two are tied."""
    return params["unembedding"] if "unembedding" in params else params["embedding"]


def layer_params(config: ModelConfig, params: Params, i: int) -> Params:
    """Return layer i's own parameters, its value-embedding table included, from stacks or from a list of layers."""
    if "layers" in params:
        return params["layers"][i]
    layer = {k: v[i] for k, v in params["blocks"].items() if k != "ve_gate"}
    if i in value_layers(config):
        j = value_layers(config).index(i)
        layer |= {"ve_gate": params["blocks"]["ve_gate"][j], "value_embedding": params["value_embedding"][j]}
    return layer


def grouped_layers(config: ModelConfig, params: Params) -> Params:
    """Return what the scan runs over: stacks (groups, layers of a group, ...) of the layers in whole groups.

    One group looks like the parameters of a model of its depth, so `layer_params` slices it.
    """
    groups, period = scan_groups(config)

    def split(layers: int) -> Callable[[jax.Array], jax.Array]:
        return lambda a: a[: groups * layers].reshape(groups, layers, *a.shape[1:])

    blocks = jax.tree.map(split(period), {k: v for k, v in params["blocks"].items() if k != "ve_gate"})
    per_group = sum(i < period for i in value_layers(config))
    if not per_group:
        return {"blocks": blocks}
    gate, tables = map(split(per_group), (params["blocks"]["ve_gate"], params["value_embedding"]))
    return {"blocks": blocks | {"ve_gate": gate}, "value_embedding": tables}


# The forward pass

# What the backward pass may keep of a layer beside its input, `train.remat`; each saves less and recomputes more.
REMAT = ("none", "names", "dots", "full")
SAVED_NAMES = ("attention_in", "q", "k", "v", "middle", "mlp_in", "mlp", "scale", "splash")  # and attention


class LayerOptions(NamedTuple):
    """Options of the layers in training; beyond rounding none changes the result."""

    unroll: int = 1  # groups of layers per iteration of the scan; all of them: a plain loop
    backend: str = "xla"  # of the attention
    remat: str = "none"
    dot: Callable[[jax.Array, Any], jax.Array] = dot  # of the layers' kernels
    merge: bool = False  # gradients of the products for q, k and v together; never where heads are split
    mesh: Mesh | None = None
    place: Callable[[str, jax.Array], jax.Array] = lambda name, weight: weight  # gathers a weight where it is used


DEFAULT = LayerOptions()
STACKED = ("blocks", "value_embedding", "layers")  # parameters that are placed layer by layer


def hidden(config: ModelConfig, params: Params, tokens: jax.Array, options: LayerOptions = DEFAULT) -> jax.Array:
    """Return the final normed activations (B, T, D) of whole texts, tokens (B, T) int; dtype of the embedding."""

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, windows(config)[i], options.backend, score_bound(config), options.mesh)

    params = {k: v if k in STACKED else options.place(k, v) for k, v in params.items()}
    x, _ = embed(config, params, tokens)
    return forward(config, params, x, tokens, jnp.arange(tokens.shape[1])[None, :], attend, options)


def forward(
    config: ModelConfig,
    params: Params,
    x: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    options: LayerOptions = DEFAULT,
) -> jax.Array:
    """Run embedded tokens through all layers and the last norm; (B, T, D).

    Stacked parameters are scanned in groups of layers (training); with a list `params["layers"]`, or with
    `options.unroll` of all groups, the layers run in a plain loop.

    Args:
      x: (B, T, D) from `embed`; tokens, positions: (B, T) int, or (1, T) for equal positions.
      attend: computes layer i's attention. In a scan i counts within the group, whose windows are the same.
    """
    groups, period = scan_groups(config)
    cos_sin = rotary(config, positions, x.dtype)

    def run(stacked: Params, i: int, x: jax.Array, x0: jax.Array, scanned: bool = False) -> jax.Array:
        def body(stacked: Params, x: jax.Array, x0: jax.Array) -> jax.Array:
            # cut here, inside what is rematerialized: a slice made outside would be saved, a copy of every weight
            layer = layer_params(config, stacked, i)
            layer = {k: options.place(k if k == "value_embedding" else f"blocks.{k}", w) for k, w in layer.items()}
            x = block(config, layer, x, x0, tokens, cos_sin, functools.partial(attend, i), options)
            if options.mesh is None or options.mesh.size == 1:
                return x
            # activations and their gradient stay split by rows alone
            return jax.lax.with_sharding_constraint(x, NamedSharding(options.mesh, PartitionSpec(BATCH_AXES)))

        return rematerialized(body, options, scanned)(stacked, x, x0)

    x0 = middle = x
    start = 0
    if "layers" not in params and groups > max(options.unroll, 1):

        def group(carry: tuple[jax.Array, jax.Array], scanned: tuple[jax.Array, Params]) -> tuple[Any, None]:
            x, middle = carry
            index, stacked = scanned
            for j in range(period):
                x = run(stacked, j, x, x0, scanned=True)
                if config.backout and j == config.depth // 2 % period:
                    middle = jnp.where(index == config.depth // 2 // period, x, middle)
            return (x, middle), None

        scanned = jnp.arange(groups), grouped_layers(config, params)
        (x, middle), _ = jax.lax.scan(group, (x, middle), scanned, unroll=options.unroll)
        start = groups * period
    for i in range(start, config.depth):
        x = run(params, i, x, x0)
        middle = x if i == config.depth // 2 else middle
    if config.backout:  # subtract what the middle layer knew already
        mixed = x.astype(jnp.float32) - params["backout_scale"] * middle.astype(jnp.float32)
        return norm(mixed, config.norm_eps).astype(x.dtype)
    return norm(x, config.norm_eps)


def block(
    config: ModelConfig,
    p: Params,
    x: jax.Array,
    x0: jax.Array,
    tokens: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    options: LayerOptions = DEFAULT,
) -> jax.Array:
    """Run one layer with its own parameters `p` on x (B, T, D); x0 is the input of the first layer."""
    B, T, _ = x.shape
    c, N, dtype, dot = config, config.head_width, x.dtype, options.dot
    if c.residual_scalars:
        x = (p["residual_scale"] * x.astype(jnp.float32) + p["x0_scale"] * x0.astype(jnp.float32)).astype(dtype)
    h = norm(x, c.norm_eps, "attention_in")
    kernels = tuple(p[name] for name in "qkv")
    products = _merged(h, kernels) if options.merge else [dot(h, kernel) for kernel in kernels]
    q, k, v = (y.reshape(B, T, -1, N) for y in products)
    if "value_embedding" in p:
        gate = 3 * jax.nn.sigmoid(h[..., :VE_GATE_CHANNELS] @ p["ve_gate"])  # (B, T, K), near 1.5 at the start
        v = v + gate[..., None] * lookup(p["value_embedding"], tokens).reshape(v.shape)
    v = checkpoint_name(v, "v")
    q = qk_norm(q, cos_sin, c.norm_eps, c.qk_scale, "q")
    k = qk_norm(k, cos_sin, c.norm_eps, c.qk_scale, "k")
    y = checkpoint_name(attend(q, k, v), "attention").reshape(B, T, c.n_heads * N)
    x = x + dot(y, p["o"])
    if dtype != jnp.bfloat16:  # there the norm's result is kept instead
        x = checkpoint_name(x, "middle")
    h = dot(norm(x, c.norm_eps, "mlp_in"), p["fc"])
    return x + dot(relu_squared(h, "mlp"), p["proj"])


def rematerialized(
    function: Callable[..., jax.Array], options: LayerOptions, scanned: bool = False
) -> Callable[..., jax.Array]:
    """Return `function` with a backward pass that recomputes what the policy of `REMAT` does not save.

    Weights gathered over fsdp are never saved, or the backward pass would hold all layers' at once.
    """
    policies = jax.checkpoint_policies
    if options.remat == "none" and (options.mesh is None or options.mesh.shape["fsdp"] == 1):
        return function
    if options.remat == "none":
        save = policies.save_anything_except_these_names("gathered")
    elif options.remat == "names":
        own = options.backend in ("cudnn", "splash")  # what their backward kernels need is saved by itself
        save = policies.save_only_these_names(*SAVED_NAMES, *(() if own else ("attention",)))
        # cuDNN's kernel leaves, beside its result, softmax statistics without a name; to lose them is to run it again
        save = policies.save_from_both_policies(save, lambda primitive, *_, **__: "attention_fwd" in primitive.name)
    elif options.remat == "dots":
        save = policies.dots_with_no_batch_dims_saveable
    else:
        save = policies.nothing_saveable
    return jax.checkpoint(function, policy=save, prevent_cse=not scanned)  # a scan's body is not merged anyway


def embed(
    config: ModelConfig, params: Params, tokens: jax.Array, previous: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return (x, e), both (B, T, D): the normed embedding with the token before smeared in, and without.

    `previous` (B, D) is the normed embedding before the first position (decoding); zeros or None at a start.
    """
    e = norm(lookup(params["embedding"], tokens), config.norm_eps)
    if not config.smear:
        return e, e
    first = jnp.zeros_like(e[:, :1]) if previous is None else previous[:, None].astype(e.dtype)
    before = jnp.concatenate([first, e[:, :-1]], axis=1)
    gate = params["smear_scale"] * jax.nn.sigmoid(e[..., :SMEAR_CHANNELS] @ params["smear_gate"]).astype(jnp.float32)
    x = (e + gate * before).astype(e.dtype)
    # without the barrier XLA drops the rounding, and every layer reads float32
    return jax.lax.optimization_barrier(x) if x.dtype == jnp.bfloat16 else x, e


def logits(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """Return softcapped float32 logits (..., V) of activations x (..., D), cropped to the vocabulary."""
    if "output" in params:  # (D, V) int8
        z = jnp.matmul(x, params["output"].values.astype(x.dtype), preferred_element_type=jnp.float32)
        z = z * params["output"].scale
    else:
        w = unembedding(params)[: config.vocab_size].astype(x.dtype)
        z = jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)
    return config.softcap * jnp.tanh(z / config.softcap)


# Parts of a layer. Several have a backward pass of their own. In bfloat16 those of norm, activation and QK-norm need
# their results alone, so that less is kept in memory; the names say what rematerialization may keep.


def _differentiable(forward: Callable[..., Any], backward: Callable[..., Any], statics: int = 0) -> Callable[..., Any]:
    """Return the function `forward(...)[0]` whose gradient is `backward(*statics, forward(...)[1], g)`."""
    function = jax.custom_vjp(lambda *args: forward(*args)[0], nondiff_argnums=tuple(range(statics)))
    function.defvjp(forward, backward)
    return function


def _merged_backward(residuals: Any, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    h, kernels = residuals
    g, kernel = (jnp.concatenate(parts, axis=-1) for parts in (gradients, kernels))
    g = jax.lax.optimization_barrier(g)  # or XLA also writes the parts, for the second product
    of_kernel = jnp.einsum("btd,btf->df", h, g)
    splits = np.cumsum([part.shape[-1] for part in kernels])[:-1]
    return jnp.einsum("btf,df->btd", g, kernel), tuple(jnp.split(of_kernel, splits, axis=-1))


# h (B, T, D) times several kernels (D, ...). Their gradients side by side make one product to h, not a sum of several,
# and one to the kernels: h and its gradient are read and written once.
_merged = _differentiable(lambda h, kernels: (tuple(h @ kernel for kernel in kernels), (h, kernels)), _merged_backward)


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return rows (..., D) of table (V, D) at tokens (...); the gradient adds up in float32.

    A frequent token has thousands of rows to add, which bfloat16's 8 bits would swallow.
    """
    return _lookup(table.shape, table.dtype, table, tokens)


def _lookup_backward(shape: tuple[int, int], dtype: jnp.dtype, tokens: jax.Array, g: jax.Array) -> tuple[Any, None]:
    return jnp.zeros(shape, jnp.float32).at[tokens].add(g.astype(jnp.float32)).astype(dtype), None


_lookup = _differentiable(lambda shape, dtype, table, tokens: (table[tokens], tokens), _lookup_backward, statics=2)


def norm(x: jax.Array, eps: float, name: str = "normed") -> jax.Array:
    """Return RMSNorm over the last axis without weights, computed in float32."""
    return _lean_norm(eps, name, x) if x.dtype == jnp.bfloat16 else _norm(x, eps)[0]


def _norm(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Return (x / rms(x), 1 / rms(x) in float32)."""
    y = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype), scale


def _norm_forward(eps: float, name: str, x: jax.Array) -> tuple[jax.Array, Any]:
    h, scale = _norm(x, eps)
    h, scale = checkpoint_name(h, name), checkpoint_name(scale, "scale")
    return h, (h, scale)


def _norm_backward(eps: float, name: str, residuals: Any, g: jax.Array) -> tuple[jax.Array]:
    h, scale = (a.astype(jnp.float32) for a in residuals)
    wide = g.astype(jnp.float32)
    return ((scale * (wide - h * jnp.mean(h * wide, axis=-1, keepdims=True))).astype(g.dtype),)


_lean_norm = _differentiable(_norm_forward, _norm_backward, statics=2)


def relu_squared(x: jax.Array, name: str) -> jax.Array:
    """Return max(x, 0)^2."""
    if x.dtype == jnp.bfloat16:
        return _lean_relu_squared(name, x)
    return jnp.square(jax.nn.relu(checkpoint_name(x, name)))


def _relu_squared_forward(name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = checkpoint_name(jnp.square(jax.nn.relu(x)), name)
    return y, y


def _relu_squared_backward(name: str, y: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return ((2 * jnp.sqrt(y.astype(jnp.float32)) * g.astype(jnp.float32)).astype(g.dtype),)


_lean_relu_squared = _differentiable(_relu_squared_forward, _relu_squared_backward, statics=1)


def qk_norm(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], eps: float, scale: float, name: str) -> jax.Array:
    """Return x (B, T, heads, N) rotated, normed and multiplied by `scale`."""
    if x.dtype == jnp.bfloat16:
        return _lean_qk_norm(eps, scale, name, x, *cos_sin)
    return norm(rotate(checkpoint_name(x, name), cos_sin), eps) * scale


def _qk_norm_forward(
    eps: float, scale: float, name: str, x: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, Any]:
    # a rotation keeps the length, so the norm needs only x: one pass reads it, the next rotates and scales it
    wide = x.astype(jnp.float32)
    length = scale * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    y = checkpoint_name((rotate(wide, (cos, sin)) * length).astype(x.dtype), name)
    length = checkpoint_name(length, "scale")
    return y, (y, length, cos, sin)


def _qk_norm_backward(
    eps: float, scale: float, name: str, residuals: Any, g: jax.Array
) -> tuple[jax.Array, None, None]:
    y, length, cos, sin = (a.astype(jnp.float32) for a in residuals)
    wide = g.astype(jnp.float32)
    inner = jnp.mean(y * wide, axis=-1, keepdims=True) / scale**2
    return (rotate(length * (wide - y * inner), (cos, -sin)).astype(g.dtype), None, None)


_lean_qk_norm = _differentiable(_qk_norm_forward, _qk_norm_backward, statics=3)


def rotary(config: ModelConfig, positions: jax.Array, dtype: jnp.dtype | type) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin (B, T, 1, N/2) of positions (B, T); float32 for bfloat16, whose rounding changes lengths."""
    dtype = jnp.float32 if dtype == jnp.bfloat16 else dtype
    frequency = config.rotary_base ** (-jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate (B, T, heads, N) by minus theta, halves split: as karpathy's and Hugging Face's weights expect."""
    cos, sin = cos_sin
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)
