"""What other formats call our parameters, and how they lie there.

Torch keeps a matrix as (out, in) and every layer apart; here kernels are (in, out) and stacked over the layers. Tables
end with the vocabulary there (`nanochat` may pad them), here with whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.errors import DataError
from jaxchat.model.gpt import abstract_params
from jaxchat.model.layers import Params
from jaxchat.model.layout import padded_vocab, value_layers

# ours -> (Hugging Face's, nanochat's); {i} is the layer
NAMES: dict[str, tuple[str, str]] = {
    "embedding": ("model.embed_tokens.weight", "transformer.wte.weight"),
    "unembedding": ("lm_head.weight", "lm_head.weight"),
    "value_embedding": ("model.value_embeddings.{i}.weight", "value_embeds.{i}.weight"),
    "smear_gate": ("model.smear_gate.weight", "smear_gate.weight"),
    "smear_scale": ("model.smear_scale", "smear_lambda"),
    "backout_scale": ("model.backout_scale", "backout_lambda"),
    "blocks.q": ("model.layers.{i}.self_attn.q_proj.weight", "transformer.h.{i}.attn.c_q.weight"),
    "blocks.k": ("model.layers.{i}.self_attn.k_proj.weight", "transformer.h.{i}.attn.c_k.weight"),
    "blocks.v": ("model.layers.{i}.self_attn.v_proj.weight", "transformer.h.{i}.attn.c_v.weight"),
    "blocks.o": ("model.layers.{i}.self_attn.o_proj.weight", "transformer.h.{i}.attn.c_proj.weight"),
    "blocks.ve_gate": ("model.layers.{i}.self_attn.ve_gate.weight", "transformer.h.{i}.attn.ve_gate.weight"),
    "blocks.fc": ("model.layers.{i}.mlp.fc1.weight", "transformer.h.{i}.mlp.c_fc.weight"),
    "blocks.proj": ("model.layers.{i}.mlp.fc2.weight", "transformer.h.{i}.mlp.c_proj.weight"),
    "blocks.residual_scale": ("model.residual_scale", "resid_lambdas"),
    "blocks.x0_scale": ("model.x0_scale", "x0_lambdas"),
}
FORMATS = ("hf", "nanochat")
TABLES = ("embedding", "unembedding", "value_embedding")
BY_VALUE_LAYER = ("value_embedding", "blocks.ve_gate")
FLOATS = ("float32", "bfloat16", "float16")
SHOWN = 4  # names in one message


class Place(NamedTuple):
    """Where one tensor of theirs lies here: `params[path]`, the slice `layer` of it where it is one layer's."""

    path: str
    layer: int | None
    shape: tuple[int, ...]  # theirs


def places(config: ModelConfig, format: str) -> dict[str, Place]:
    """Every tensor of a model in a format ("hf" or "nanochat"), by its name there, in our order of parameters."""
    found: dict[str, Place] = {}
    for path, leaf in leaves(abstract_params(config)[0]):
        pattern, shape = NAMES[path][FORMATS.index(format)], tuple(leaf.shape)
        if "{i}" not in pattern:
            found[pattern] = Place(path, None, _their_shape(config, path, shape))
            continue
        layers = value_layers(config) if path in BY_VALUE_LAYER else range(config.depth)
        for index, i in enumerate(layers):
            found[pattern.format(i=i)] = Place(path, index, _their_shape(config, path, shape[1:]))
    return found


def leaves(params: Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of a nested dict, in its order."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from leaves(dict(value), f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _their_shape(config: ModelConfig, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path in TABLES:
        return (config.vocab_size, *shape[1:])
    return shape[::-1] if len(shape) == 2 else shape or (1,)


def tensor(config: ModelConfig, params: Params, place: Place) -> np.ndarray:
    """One tensor as torch has it, contiguous; the vocabulary's padding cut."""
    leaf: Any = params
    for name in place.path.split("."):
        leaf = leaf[name]
    array = np.asarray(leaf if place.layer is None else leaf[place.layer])
    if place.path in TABLES:
        return np.ascontiguousarray(array[: config.vocab_size])
    return np.ascontiguousarray(array.T).reshape(place.shape)


def assemble(
    config: ModelConfig,
    format: str,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    source: object,
) -> Params:
    """Our parameters from another format's tensors: `shapes` of all there are, `read` gets one.

    dtypes stay. `DataError` names `source` and what is missing, too many, of the wrong shape, no floating-point
    number or not finite.
    """
    if config.depth > len(shapes):
        raise DataError(f"{source}: its config says {config.depth} layers, and it holds {len(shapes)} tensors")
    wanted = places(config, format)
    _check_names(wanted, shapes, source)
    for name, place in wanted.items():
        found, padded = tuple(shapes[name]), (padded_vocab(config), *place.shape[1:])
        if found != place.shape and not (place.path in TABLES and format == "nanochat" and found == padded):
            raise DataError(f"{source}: {name} has the shape {found}, where its config makes it {place.shape}")
    stacks: dict[str, list[np.ndarray]] = {}
    for name, place in wanted.items():
        array = read(name)
        if array.dtype.name not in FLOATS:
            raise DataError(f"{source}: {name} is {array.dtype.name}; weights are {', '.join(FLOATS)}")
        if not np.isfinite(array).all():
            raise DataError(f"{source}: {name} holds NaN or Inf: damaged, or of a training that failed")
        stacks.setdefault(place.path, []).append(_ours(config, place, array))
    params: Params = {}
    by_layer = {place.path for place in wanted.values() if place.layer is not None}
    for path, arrays in stacks.items():
        *outer, name = path.split(".")
        inner = params.setdefault(outer[0], {}) if outer else params
        inner[name] = np.stack(arrays) if path in by_layer else arrays[0]
        arrays.clear()
    return params


def _check_names(wanted: Mapping[str, Place], found: Mapping[str, Any], source: object) -> None:
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    for what, names in (("lacks", missing), ("has, beside what such a model has,", extra)):
        if names:
            shown = sorted(names)
            more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
            raise DataError(f"{source}: {what} {', '.join(shown[:SHOWN])}{more}")


def _ours(config: ModelConfig, place: Place, array: np.ndarray) -> np.ndarray:
    if place.path in TABLES:
        rows = np.zeros((padded_vocab(config), *array.shape[1:]), array.dtype)
        rows[: len(array)] = array
        return rows
    if array.ndim == 2:
        return np.ascontiguousarray(array.T)
    return array if place.path.startswith("blocks.") else array.reshape(())
