"""A trained jaxchat model in one file: JAX and Flax, nothing else.

    params = orbax.checkpoint.StandardCheckpointer().restore(FOLDER / "params")
    model = GPT(params)

Axes: B batch, T time, H query heads, K kv heads, S keys, N head width, D width, V vocabulary. Kernels are (in, out),
stacked over the layers. `config.json` beside this file says which parts the model has. Training replaces
`dot` and `run`, and uses `checkpoint_name`; none of them has an effect here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxchat.attention import offset_keys
from jaxchat.model import embed, forward, logits

FOLDER = Path(__file__).resolve().parent
ModelConfig = SimpleNamespace  # with the keys of "model" in config.json


class GPT(nnx.Module):
    """`params`: the nested dict that Orbax restores. Computes in `dtype`, whatever the weights are stored in."""

    def __init__(self, params: dict[str, Any], config: dict[str, Any] | None = None, dtype: Any = jnp.float32):
        self.config = nnx.static(config or json.loads((FOLDER / "config.json").read_text(encoding="utf-8")))
        self.dtype = dtype
        self.params = nnx.data(jax.tree.map(lambda leaf: nnx.Param(jnp.asarray(leaf)), params))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits (B, T, V) float32 of tokens (B, T) int: what may follow each of them."""
        config: Any = ModelConfig(**self.config["model"])
        params = jax.tree.map(
            lambda p: p[...].astype(self.dtype), self.params, is_leaf=lambda p: isinstance(p, nnx.Param)
        )

        def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            """A token sees itself and as many tokens before it as the layer's window says."""
            k = offset_keys(config, k)
            window = (self.config["windows"][i], 0)
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, implementation="xla")

        x = embed(config, params, tokens)
        positions = jnp.arange(tokens.shape[1])[None]
        return logits(config, params, forward(config, params, x, tokens, positions, attend))

    def generate(self, tokens: list[int], count: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
        """Return up to `count` tokens more, until one that ends an answer. Every step runs the whole text."""
        key, ends, start = jax.random.key(seed), self.config["end_tokens"], len(tokens)
        text = np.zeros((1, start + count), np.int32)  # one shape, so that it is compiled once
        text[0, :start] = tokens
        for t in range(start, start + count):
            z = run(self, jnp.asarray(text))[0, t - 1]
            drawn = jax.random.categorical(jax.random.fold_in(key, t), z / max(temperature, 1e-6))
            text[0, t] = jnp.argmax(z) if temperature == 0 else drawn
            if text[0, t] in ends:
                return text[0, start:t].tolist()
        return text[0, start:].tolist()

    def check(self) -> float:
        """Return the largest difference from the logits in `golden.npz`; above 1e-3 something is wrong."""
        with jax.default_matmul_precision("highest"), np.load(FOLDER / "golden.npz") as golden:
            expected = golden["logits"]  # of the last positions
            z = np.asarray(run(self, jnp.asarray(golden["ids"])))[:, -expected.shape[1] :]
            return float(np.abs(z - expected).max())


@nnx.jit
def run(model: GPT, tokens: jax.Array) -> jax.Array:
    return model(tokens)
