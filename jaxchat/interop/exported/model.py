"""A trained jaxchat model in one file: JAX and Flax, nothing else.

    params = orbax.checkpoint.StandardCheckpointer().restore(FOLDER / "params")
    model = GPT(params)

Axes: B batch, T time, L layer, H query heads, K kv heads, N head width, D width, V vocabulary. Kernels are (in, out),
stacked over the layers. `config.json` beside this file says which parts the model has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

FOLDER = Path(__file__).resolve().parent
VE_GATE_CHANNELS = 12  # of a layer's normed input that gate its value embedding
SMEAR_CHANNELS = 24  # of an embedding that gate its smear


class GPT(nnx.Module):
    """`params`: the nested dict that Orbax restores. Computes in `dtype`, whatever the weights are stored in."""

    def __init__(self, params: dict[str, Any], config: dict[str, Any] | None = None, dtype: Any = jnp.float32):
        self.config = nnx.static(config or json.loads((FOLDER / "config.json").read_text(encoding="utf-8")))
        self.dtype = dtype
        self.params = nnx.data(jax.tree.map(lambda leaf: nnx.Param(jnp.asarray(leaf)), params))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (B, T, V) float32 of tokens (B, T) int: what may follow each of them."""
        c = self.config["model"]
        p = jax.tree.map(
            lambda leaf: leaf[...].astype(self.dtype), self.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
        )
        x = norm(p["embedding"][tokens], c["norm_eps"])
        if c["smear"]:  # a bit of the token before, as much as this one asks for
            before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            x = x + p["smear_scale"] * jax.nn.sigmoid(x[..., :SMEAR_CHANNELS] @ p["smear_gate"]) * before
        x0 = middle = x
        for i in range(c["depth"]):
            layer = {name: stack[i] for name, stack in p["blocks"].items() if name != "ve_gate"}
            if i in self.config["value_layers"]:
                j = self.config["value_layers"].index(i)
                layer["value"] = p["value_embedding"][j][tokens]
                layer["ve_gate"] = p["blocks"]["ve_gate"][j]
            if c["residual_scalars"]:
                x = layer["residual_scale"] * x + layer["x0_scale"] * x0
            x = x + self.attention(layer, norm(x, c["norm_eps"]), self.config["windows"][i])
            h = norm(x, c["norm_eps"]) @ layer["fc"]
            x = x + jnp.square(jax.nn.relu(h)) @ layer["proj"]
            middle = x if i == c["depth"] // 2 else middle
        if c["backout"]:  # what the middle knew already
            x = x - p["backout_scale"] * middle
        x = norm(x, c["norm_eps"])
        table = p.get("unembedding", p["embedding"])[: c["vocab_size"]]
        logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
        return c["softcap"] * jnp.tanh(logits / c["softcap"])

    def attention(self, layer: dict[str, jax.Array], h: jax.Array, window: int) -> jax.Array:
        """(B, T, D) of the normed input h (B, T, D); a token sees itself and `window` tokens before it."""
        c, (B, T, _) = self.config["model"], h.shape
        q, k, v = ((h @ layer[name]).reshape(B, T, -1, c["head_width"]) for name in "qkv")
        if "value" in layer:
            gate = 3 * jax.nn.sigmoid(h[..., :VE_GATE_CHANNELS] @ layer["ve_gate"])
            v = v + gate[..., None] * layer["value"].reshape(v.shape)
        q, k = (norm(rotate(x, c["rotary_base"]), c["norm_eps"]) * c["qk_scale"] for x in (q, k))
        k, v = (jnp.repeat(x, c["n_heads"] // c["n_kv_heads"], axis=2) for x in (k, v))
        ago = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
        scores = jnp.einsum("bthn,bshn->bhts", q, k, preferred_element_type=jnp.float32) * c["head_width"] ** -0.5
        weights = jax.nn.softmax(jnp.where((ago >= 0) & (ago <= window), scores, -jnp.inf)).astype(v.dtype)
        return jnp.einsum("bhts,bshn->bthn", weights, v).reshape(B, T, -1) @ layer["o"]

    def generate(self, tokens: list[int], count: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
        """Up to `count` tokens more, until one that ends an answer; the simple way, the whole text anew for each."""
        key, ends, start = jax.random.key(seed), self.config["end_tokens"], len(tokens)
        text = np.zeros((1, start + count), np.int32)  # one shape, so that it is compiled once
        text[0, :start] = tokens
        for t in range(start, start + count):
            logits = run(self, jnp.asarray(text))[0, t - 1]
            drawn = jax.random.categorical(jax.random.fold_in(key, t), logits / max(temperature, 1e-6))
            text[0, t] = jnp.argmax(logits) if temperature == 0 else drawn
            if text[0, t] in ends:
                return text[0, start:t].tolist()
        return text[0, start:].tolist()

    def check(self) -> float:
        """Largest difference from the logits in `golden.npz`; above 1e-3 something is wrong with the load."""
        with jax.default_matmul_precision("highest"), np.load(FOLDER / "golden.npz") as golden:
            wanted = golden["logits"]  # of the last positions
            found = np.asarray(run(self, jnp.asarray(golden["ids"])))[:, -wanted.shape[1] :]
            return float(np.abs(found - wanted).max())


@nnx.jit
def run(model: GPT, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def norm(x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis without weights, in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rotate(x: jax.Array, base: float) -> jax.Array:
    """Rotary embedding of x (B, T, heads, N): turn by minus theta, halves split."""
    frequency = base ** (-jnp.arange(0, x.shape[-1], 2, dtype=jnp.float32) / x.shape[-1])
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[None, :, None, None] * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)
