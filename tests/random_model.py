"""Models with random weights, every extra of them in use, for what goes out and comes in."""

import dataclasses

import jax
import numpy as np

from jaxchat import model as gpt
from jaxchat.config import ModelConfig
from jaxchat.interop.trained import Trained, write_run
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve_model
from jaxchat.tokenizer import train_tokenizer

TEXTS = ["hello world <|user_end|> 한국어 " * 30, "the quick brown fox 12 34 5" * 9]
KINDS = {
    "classic": {"recipe": "classic"},
    "tied": {"recipe": "classic", "tie_embeddings": True, "mlp_factor": 3.5},
    "modern": {"recipe": "modern", "window_short": 8},
    "smear": {"recipe": "classic", "smear": True},
    "jaxchat": {"recipe": "jaxchat", "window_short": 8, "bigram_rows": 401},
    "bigrams": {"recipe": "classic", "bigram_rows": 97},
}


def tokenizer(normalize="none"):
    return train_tokenizer(TEXTS, 293, 10**6, 10**5, normalize)  # no multiple of 64


def config(kind, **more):
    """Five layers, six heads over two kv heads, a width that is not theirs together where `head_width` says so."""
    shapes = {"depth": 5, "seq_len": 128, "vocab_size": 293, "width": 96, "n_heads": 6, "n_kv_heads": 2}
    return resolve_model(ModelConfig(**shapes | {"head_width": 16} | KINDS[kind] | more))


def random_params(config, seed=0, dtype=np.float32):
    """No parameter zero, activations of ordinary size."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if leaf.ndim < 2:
            return random.uniform(0.3, 0.9, leaf.shape).astype(dtype)
        scale = {"embedding": 1.0, "bigram_embedding": 0.5, "value_embedding": 0.5, "unembedding": 0.3}.get(
            name, leaf.shape[-2] ** -0.5
        )
        return (scale * random.normal(size=leaf.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, gpt.abstract_params(config))


def lively(config, seed=0, scale=0.1):
    """Parameters with every zero (output projections, smear, ...) moved away from it."""
    leaves, tree = jax.tree.flatten(gpt.init_params(config, seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([p + scale * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


def random_model(kind, stage="sft", dtype=np.float32, **more):
    shape = config(kind, **more)
    return Trained(shape, random_params(shape, dtype=dtype), tokenizer(), stage, "tiny")


def random_run(root, kind, stage="sft", dtype=np.float32, **more):
    """A run directory that holds `random_model`."""
    origin = {"format": "test", "from": "random numbers"}
    write_run(dataclasses.replace(random_model(kind, stage, dtype, **more), imported=origin), root)
    return RunDir(root)


def logits_of(config, params, ids):
    """(B, T, V) float32 of ids (B, T)."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    return np.asarray(gpt.logits(config, params, gpt.hidden(config, params, ids)))
