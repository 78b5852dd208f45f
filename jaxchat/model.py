"""The GPT as pure functions over a nested dict of parameters, and as a Flax NNX module.

Axes: B batch, T time, L layer, H query heads, K kv heads, N head width, D width, F feed-forward width, V vocabulary.
Kernels are (in, out), stacked over the layers; `sizes.parameters` declares them. Three recipes: two after nanochat, and
our own, which adds a table of bigrams and offset keys.
Papers: rotary 2104.09864, relu squared 2109.08668, QK-norm 2010.04245, value residual 2410.17897.

`forward` is the only pass through the layers. Training, prefill, decoding and scoring differ in the positions, the
attention and the layout of the parameters that they give to it. `interop.bundle` writes an export's `model.py` out of
the functions here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxchat.attention import attention, offset_keys
from jaxchat.config import ModelConfig
from jaxchat.sharding import BATCH_AXES
from jaxchat.sizes import (
    SMEAR_CHANNELS,
    VE_GATE_CHANNELS,
    Parameter,
    parameters,
    scan_groups,
    score_bound,
    value_layers,
    windows,
)

Params = dict[str, Any]
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]  # layer, q (B, T, H, N), k, v (B, T, K, N) -> y
Layer = Callable[..., jax.Array]  # i, params, x (B, T, D), x0 (B, T, D) -> x; see `forward`
F = TypeVar("F", bound=Callable[..., jax.Array])

# Parameters


def initial_value(key: jax.Array, p: Parameter) -> jax.Array:
    """Return the first value of a parameter, as its declaration says; float32."""
    kind, *numbers = p.init
    if kind == "normal":
        return numbers[0] * jax.random.normal(key, p.shape, jnp.float32)
    if kind == "uniform":
        return jax.random.uniform(key, p.shape, jnp.float32, *numbers)
    if kind == "constant":
        return jnp.full(p.shape, numbers[0], jnp.float32)
    return jnp.linspace(numbers[0], numbers[1], p.shape[0], dtype=jnp.float32)


class GPT(nnx.Module):
    """All parameters of a resolved `config`, and its logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.blocks: nnx.Dict[nnx.Param] = nnx.Dict()
        for path, p in parameters(config).items():
            leaf = path.removeprefix("blocks.")
            setattr(self if leaf == path else self.blocks, leaf, nnx.Param(initial_value(rngs.params(), p)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits (B, T, V) float32, softcapped and cropped to the vocabulary, of tokens (B, T) int."""
        params = nnx.to_pure_dict(nnx.state(self))
        return logits(self.config, params, hidden(self.config, params, tokens))


def init_params(config: ModelConfig, seed: int) -> Params:
    """Return the parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(GPT(config, nnx.Rngs(seed))))


def map_parameters(config: ModelConfig, function: Callable[[Parameter], Any]) -> Params:
    """Return a tree like the parameters' of what `function` says of each declaration, sorted as JAX sorts a tree."""
    return unflatten_dict({path: function(p) for path, p in sorted(parameters(config).items())}, sep=".")


def abstract_params(config: ModelConfig) -> Params:
    """Return the shapes and dtypes of all parameters; allocates nothing."""
    return map_parameters(config, lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32))


def cast_params(params: Params, dtype: DTypeLike) -> Params:
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
    layer = {name: stack[i] for name, stack in params["blocks"].items() if name != "ve_gate"}
    if i in (layers := value_layers(config)):
        j = layers.index(i)
        layer |= {"ve_gate": params["blocks"]["ve_gate"][j], "value_embedding": params["value_embedding"][j]}
    return layer


# The forward pass


def block(
    config: ModelConfig,
    p: Params,
    x: jax.Array,
    x0: jax.Array,
    tokens: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    dot: Callable[[jax.Array, Any], jax.Array] = operator.matmul,
    dot_qkv: Callable[..., tuple[jax.Array, ...]] | None = None,
) -> jax.Array:
    """Run one layer with its own parameters `p` on x (B, T, D); x0 is the input of the first layer.

    Training may bring its own product `dot`, and another one for q, k and v at once.
    """
    B, T, _ = x.shape
    c, N, dtype = config, config.head_width, x.dtype
    if c.residual_scalars:
        x = (p["residual_scale"] * x.astype(jnp.float32) + p["x0_scale"] * x0.astype(jnp.float32)).astype(dtype)
    h = norm(x, c.norm_eps, "attention_in")
    kernels = tuple(p[name] for name in "qkv")
    products = dot_qkv(h, kernels) if dot_qkv else [dot(h, kernel) for kernel in kernels]
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


def loop_layers(config: ModelConfig, params: Params, x: jax.Array, layer: Layer) -> tuple[jax.Array, jax.Array]:
    """Return what the last layer and the middle one make of embedded tokens x (B, T, D), one layer after another."""
    x0 = middle = x
    for i in range(config.depth):
        x = layer(i, params, x, x0)
        middle = x if i == config.depth // 2 else middle
    return x, middle


def forward(
    config: ModelConfig,
    params: Params,
    x: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    run_layers: Callable[..., tuple[jax.Array, jax.Array]] = loop_layers,
) -> jax.Array:
    """Run embedded tokens through all layers and the last norm; (B, T, D).

    Args:
      x: (B, T, D) from `embed`; tokens, positions: (B, T) int, or (1, T) for equal positions.
      attend: computes layer i's attention. In a scan i counts within the group, whose windows are the same.
      run_layers: `loop_layers`, or a scan over them (training).
    """
    cos_sin = rotary(config, positions, x.dtype)

    def layer(i: int, stacks: Params, x: jax.Array, x0: jax.Array, run: Callable[..., jax.Array] = block) -> jax.Array:
        # cut here, inside what is rematerialized: a slice made outside would be saved, a copy of every weight
        p = layer_params(config, stacks, i)
        return run(config, p, x, x0, tokens, cos_sin, functools.partial(attend, i))

    x, middle = run_layers(config, params, x, layer)
    if config.backout:  # subtract what the middle layer knew already
        mixed = x.astype(jnp.float32) - params["backout_scale"] * middle.astype(jnp.float32)
        return norm(mixed, config.norm_eps).astype(x.dtype)
    return norm(x, config.norm_eps)


def embed(config: ModelConfig, params: Params, tokens: jax.Array, previous: jax.Array | None = None) -> jax.Array:
    """Return the input (B, T, D) of the layers: embeddings with what the token before each adds to them.

    `previous` (B,) int is the token before the first position (decoding); negative or None at a start.
    """
    x = e = norm(lookup(params["embedding"], tokens), config.norm_eps)
    if config.smear:
        first = jnp.zeros_like(e[:, :1])
        if previous is not None:
            known = norm(params["embedding"][jnp.maximum(previous, 0)], config.norm_eps)
            first = jnp.where(previous[:, None] < 0, 0, known)[:, None]
        before = jnp.concatenate([first, e[:, :-1]], axis=1)
        gate = jax.nn.sigmoid(e[..., :SMEAR_CHANNELS] @ params["smear_gate"]).astype(jnp.float32)
        x = e + params["smear_scale"] * gate * before
    if config.bigram_rows > 0:
        start = jnp.full(tokens.shape[:1], -1) if previous is None else previous
        pairs = bigram_row(config, jnp.concatenate([start[:, None], tokens[:, :-1]], axis=1), tokens)
        x = x + lookup(params["bigram_embedding"], pairs)
    if x is e:
        return e
    x = x.astype(e.dtype)
    # without the barrier XLA drops the rounding, and every layer reads float32
    return jax.lax.optimization_barrier(x) if x.dtype == jnp.bfloat16 else x


def bigram_row(config: ModelConfig, first: jax.Array, second: jax.Array) -> jax.Array:
    """Return the row of the table of bigrams that a pair of tokens (...) int shares with others."""
    a, b = (tokens.astype(jnp.uint32) for tokens in (first, second))
    mixed = a * jnp.uint32(0xC2B2AE35) + b * jnp.uint32(0x9E3779B1)  # odd numbers of no pattern; wraps around
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
    return ((mixed ^ (mixed >> 13)) % jnp.uint32(config.bigram_rows)).astype(jnp.int32)


def logits(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """Return softcapped float32 logits (..., V) of activations x (..., D), cropped to the vocabulary."""
    if "output" in params:  # (D, V) int8
        z = params["output"].product(x)
    else:
        w = unembedding(params)[: config.vocab_size].astype(x.dtype)
        z = jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)
    return config.softcap * jnp.tanh(z / config.softcap)


# Parts of a layer. Several have a twin with a backward pass of its own; an export goes without the twins. In bfloat16
# those of norm, activation and QK-norm need their results alone, so that less is kept in memory; the names say what
# rematerialization may keep.


def _differentiable(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function `forward(...)[0]` whose gradient is `backward(forward(...)[1], g)`."""
    function = jax.custom_vjp(lambda *args: forward(*args)[0])
    function.defvjp(forward, backward)
    return function


def own_gradient(twin: F, dtype: DTypeLike | None = jnp.bfloat16) -> Callable[[F], F]:
    """Decorate a function of x with its twin of equal values, which takes its place for x in `dtype`, None: in any."""

    def decorate(plain: F) -> F:
        def function(x: jax.Array, *args: Any) -> jax.Array:
            return (twin if dtype is None or x.dtype == dtype else plain)(x, *args)

        return cast(F, functools.wraps(plain)(function))

    return decorate


def _lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Look up with a gradient that adds up in float32.

    A frequent token has thousands of rows to add, which bfloat16's 8 bits would swallow.
    """

    def backward(tokens: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
        zeros = jnp.zeros(table.shape, jnp.float32)
        return zeros.at[tokens].add(g.astype(jnp.float32)).astype(table.dtype), None

    return _differentiable(lambda table, tokens: (table[tokens], tokens), backward)(table, tokens)


@own_gradient(_lookup, dtype=None)
def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return rows (..., D) of table (V, D) at tokens (...)."""
    return table[tokens]


def _norm(x: jax.Array, eps: float, name: str = "normed") -> jax.Array:
    def forward(x: jax.Array) -> tuple[jax.Array, Any]:
        y = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
        h, scale = checkpoint_name((y * scale).astype(x.dtype), name), checkpoint_name(scale, "scale")
        return h, (h, scale)

    def backward(residuals: Any, g: jax.Array) -> tuple[jax.Array]:
        h, scale, wide = (a.astype(jnp.float32) for a in (*residuals, g))
        return ((scale * (wide - h * jnp.mean(h * wide, axis=-1, keepdims=True))).astype(g.dtype),)

    return _differentiable(forward, backward)(x)


@own_gradient(_norm)
def norm(x: jax.Array, eps: float, name: str = "normed") -> jax.Array:
    """Return RMSNorm over the last axis without weights, computed in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def _relu_squared(x: jax.Array, name: str) -> jax.Array:
    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = checkpoint_name(jnp.square(jax.nn.relu(x)), name)
        return y, y

    def backward(y: jax.Array, g: jax.Array) -> tuple[jax.Array]:
        return ((2 * jnp.sqrt(y.astype(jnp.float32)) * g.astype(jnp.float32)).astype(g.dtype),)

    return _differentiable(forward, backward)(x)


@own_gradient(_relu_squared)
def relu_squared(x: jax.Array, name: str) -> jax.Array:
    """Return max(x, 0)^2."""
    return jnp.square(jax.nn.relu(checkpoint_name(x, name)))


def _qk_norm(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], eps: float, scale: float, name: str) -> jax.Array:
    def forward(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, Any]:
        # a rotation keeps the length, so the norm needs only x: one pass reads it, the next rotates and scales it
        wide = x.astype(jnp.float32)
        length = scale * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
        y = checkpoint_name((rotate(wide, (cos, sin)) * length).astype(x.dtype), name)
        return y, (y, checkpoint_name(length, "scale"), cos, sin)

    def backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
        y, length, cos, sin, wide = (a.astype(jnp.float32) for a in (*residuals, g))
        inner = jnp.mean(y * wide, axis=-1, keepdims=True) / scale**2
        return rotate(length * (wide - y * inner), (cos, -sin)).astype(g.dtype), None, None

    return _differentiable(forward, backward)(x, *cos_sin)


@own_gradient(_qk_norm)
def qk_norm(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], eps: float, scale: float, name: str) -> jax.Array:
    """Return x (B, T, heads, N) rotated, normed and multiplied by `scale`."""
    return (norm(rotate(checkpoint_name(x, name), cos_sin), eps) * scale).astype(x.dtype)


def rotary(config: ModelConfig, positions: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
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


# The layers in training: a scan, rematerialization, split arrays

# What the backward pass may keep of a layer beside its input, `train.remat`; each saves less and recomputes more.
REMAT = ("none", "names", "dots", "full")
SAVED_NAMES = ("attention_in", "q", "k", "v", "middle", "mlp_in", "mlp", "scale", "splash")  # and attention


class LayerOptions(NamedTuple):
    """Options of the layers in training; beyond rounding none changes the result."""

    unroll: int = 1  # groups of layers per iteration of the scan; all of them: a plain loop
    backend: str = "xla"  # of the attention
    remat: str = "none"
    dot: Callable[[jax.Array, Any], jax.Array] = operator.matmul  # of the layers' kernels
    merge: bool = False  # gradients of the products for q, k and v together; never where heads are split
    operands: DTypeLike | None = None  # of the products in attention, None: as its input
    mesh: Mesh | None = None
    place: Callable[[str, jax.Array], jax.Array] = lambda name, weight: weight  # gathers a weight where it is used


DEFAULT = LayerOptions()


def hidden(config: ModelConfig, params: Params, tokens: jax.Array, options: LayerOptions = DEFAULT) -> jax.Array:
    """Return the final normed activations (B, T, D) of whole texts, tokens (B, T) int; dtype of the embedding."""

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k = offset_keys(config, k)
        bound, o = score_bound(config), options
        return attention(q, k, v, windows(config)[i], o.backend, bound, o.mesh, o.operands)

    by_layer = ("blocks", "value_embedding", "layers")  # placed layer by layer
    params = {name: p if name in by_layer else options.place(name, p) for name, p in params.items()}
    x = embed(config, params, tokens)
    positions = jnp.arange(tokens.shape[1])[None, :]
    return forward(config, params, x, tokens, positions, attend, functools.partial(scan_layers, options))


def scan_layers(
    options: LayerOptions, config: ModelConfig, params: Params, x: jax.Array, layer: Layer
) -> tuple[jax.Array, jax.Array]:
    """Do what `loop_layers` does with the options of training, stacked layers in a scan over groups of them.

    With a list `params["layers"]`, or with `options.unroll` of all groups, they run in a plain loop too.
    """
    groups, period = scan_groups(config)
    run_block: Any = functools.partial(block, dot=options.dot, dot_qkv=merged_dot if options.merge else None)

    def placed(config: ModelConfig, p: Params, *inputs: Any) -> jax.Array:
        x = run_block(config, {name: options.place(name, w) for name, w in p.items()}, *inputs)
        if options.mesh is None or options.mesh.size == 1:
            return x
        # activations and their gradient stay split by rows alone
        return jax.lax.with_sharding_constraint(x, NamedSharding(options.mesh, PartitionSpec(BATCH_AXES)))

    def run(stacked: Params, i: int, x: jax.Array, x0: jax.Array, scanned: bool = False) -> jax.Array:
        return rematerialized(functools.partial(layer, i, run=placed), options, scanned)(stacked, x, x0)

    x0 = middle = x
    start = 0
    if "layers" not in params and groups > max(options.unroll, 1):

        def group(carry: tuple[jax.Array, jax.Array], scanned: tuple[jax.Array, Params]) -> tuple[Any, None]:
            (x, middle), (index, stacked) = carry, scanned
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
    return x, middle


def grouped_layers(config: ModelConfig, params: Params) -> Params:
    """Return what the scan runs over: stacks (groups, layers of a group, ...) of the layers in whole groups.

    One group looks like the parameters of a model of its depth, so `layer_params` slices it.
    """
    groups, period = scan_groups(config)

    def split(stack: jax.Array) -> jax.Array:
        n = period if len(stack) == config.depth else period // 2  # every second layer has a value embedding
        return stack[: groups * n].reshape(groups, n, *stack.shape[1:])

    return jax.tree.map(split, {name: params[name] for name in ("blocks", "value_embedding") if name in params})


def rematerialized(
    function: Callable[..., jax.Array], options: LayerOptions, scanned: bool
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
    else:
        save = policies.dots_with_no_batch_dims_saveable if options.remat == "dots" else policies.nothing_saveable
    return jax.checkpoint(function, policy=save, prevent_cse=not scanned)  # a scan's body is not merged anyway


def merged_dot(h: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Return h (B, T, D) times each of several kernels (D, ...).

    Their gradients side by side make one product to h, not a sum of several, and one to the kernels: h and its gradient
    are read and written once.
    """

    def backward(residuals: Any, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        h, kernels = residuals
        g, kernel = (jnp.concatenate(parts, axis=-1) for parts in (gradients, kernels))
        g = jax.lax.optimization_barrier(g)  # or XLA also writes the parts, for the second product
        of_kernel = jnp.einsum("btd,btf->df", h, g)
        splits = np.cumsum([part.shape[-1] for part in kernels])[:-1]
        return jnp.einsum("btf,df->btd", g, kernel), tuple(jnp.split(of_kernel, splits, axis=-1))

    return _differentiable(lambda h, kernels: (tuple(h @ w for w in kernels), (h, kernels)), backward)(h, kernels)
