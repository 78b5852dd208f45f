"""What every layer would say at a place of a text (logit lens), and where its heads look.

    echo '[1, 50, 7]' | python -m jaxchat.lens RUN base 400

The logit lens puts the activations after each layer through the last norm and the unembedding (nostalgebraist, 2020).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.attention import attention, offset_keys
from jaxchat.checkpoint import restore_params
from jaxchat.config import ModelConfig, load_config
from jaxchat.errors import DataError, JaxchatError
from jaxchat.model import Layer, Params, embed, forward, logits, loop_layers, norm
from jaxchat.run_dir import RunDir
from jaxchat.sizes import windows
from jaxchat.tokenizer import Tokenizer

TOP = 5  # tokens of each layer


def lens(config: ModelConfig, params: Params, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return, at the last of the ids, every layer's probabilities (L, V) and attention weights (L, H, T); float32."""
    tokens, T = jnp.asarray([ids]), len(ids)
    after: list[jax.Array] = []  # activations (D,) after each layer
    weights: list[jax.Array] = []

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k = offset_keys(config, k)
        heads = jnp.repeat(k[0], config.n_heads // config.n_kv_heads, axis=1)  # (T, H, N)
        scores = jnp.einsum("hn,thn->ht", q[0, -1], heads) * config.head_width**-0.5
        seen = jnp.arange(T) >= T - 1 - windows(config)[i]
        weights.append(jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1))
        return attention(q, k, v, windows(config)[i])

    def run_layers(config: ModelConfig, params: Params, x: jax.Array, layer: Layer) -> tuple[jax.Array, jax.Array]:
        def noted(*inputs: Any) -> jax.Array:
            x = layer(*inputs)
            after.append(x[0, -1])
            return x

        return loop_layers(config, params, x, noted)

    x = embed(config, params, tokens)
    last = forward(config, params, x, tokens, jnp.arange(T)[None], attend, run_layers)[0, -1]
    states = jnp.stack([*(norm(x, config.norm_eps) for x in after[:-1]), last])
    return np.asarray(jax.nn.softmax(logits(config, params, states), axis=-1)), np.asarray(jnp.stack(weights))


def look(run: RunDir, stage: str, step: int, ids: Sequence[int]) -> dict[str, Any]:
    """Return {"texts": (T), "layers": (L) lists of [text, probability], "attention": (L, H, T)} of a checkpoint."""
    config, tokenizer = load_config(run.config).model, Tokenizer.load(run.tokenizer)
    if len(ids) > config.seq_len or not all(0 <= i < config.vocab_size for i in ids):
        raise DataError(f"no text of this model: at most {config.seq_len} tokens, each below {config.vocab_size}")
    params, _ = restore_params(run.stage(stage), step=step)
    probabilities, weights = lens(config, params, ids)
    best = np.argsort(-probabilities, axis=-1)[:, :TOP]
    layers = [
        [[tokenizer.decode([int(i)]), round(float(p[i]), 4)] for i in row]
        for row, p in zip(best, probabilities, strict=True)
    ]
    names = {i: name for name, i in tokenizer.special.items()}
    texts = [names.get(i, text) for i, text in zip(ids, tokenizer.pieces(ids), strict=True)]
    return {"texts": texts, "layers": layers, "attention": weights.astype(float).round(3).tolist()}


def main(arguments: Sequence[str]) -> int:
    """Answer one question from standard input, as JSON; {"error": ...} where it cannot be answered."""
    root, stage, step = arguments
    try:
        answer = look(RunDir(Path(root)), stage, int(step), json.loads(sys.stdin.read()))
    except JaxchatError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    os.nice(19)  # a training that goes on comes first, and keeps its accelerator
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(sys.argv[1:]))
