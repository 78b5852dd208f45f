"""Hugging Face's format, out and in: safetensors, config, tokenizer, chat template, model card.

A model that the stock NanoChat architecture can hold is exported as that and needs none of our code. Every other model
is exported as our own architecture, with its code, `modeling_jaxchat.py`. Nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxchat import __version__
from jaxchat.config import ModelConfig, build
from jaxchat.errors import DataError, UsageError
from jaxchat.interop.trained import Trained, atomic_directory, model_card, read_tokenizer, tokenizer_files
from jaxchat.model import Params, abstract_params
from jaxchat.run_dir import atomic_write, read_json, sha256_file, write_json
from jaxchat.scaling import resolve_model
from jaxchat.sizes import mlp_width, parameters, value_layers, windows
from jaxchat.tokenizer import ASSISTANT_END, BOS

# ---- parameters: their names in other formats, and how they are stored there
#
# Torch stores a matrix as (out, in) and each layer by itself; our kernels are (in, out), stacked over the layers. Their
# tables end with the vocabulary (nanochat may pad them); ours are padded to whole tiles.

# our path -> (Hugging Face's name, nanochat's name); {i} is the layer
NAMES: dict[str, tuple[str, str]] = {
    "embedding": ("model.embed_tokens.weight", "transformer.wte.weight"),
    "unembedding": ("lm_head.weight", "lm_head.weight"),
    "value_embedding": ("model.value_embeddings.{i}.weight", "value_embeds.{i}.weight"),
    "bigram_embedding": ("model.bigram_embeddings.weight", "bigram_embeds.weight"),  # not in nanochat itself
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
TABLES = ("embedding", "unembedding", "value_embedding", "bigram_embedding")
BY_VALUE_LAYER = ("value_embedding", "blocks.ve_gate")
FLOATS = ("float32", "bfloat16", "float16")


class Place(NamedTuple):
    """Where a tensor of another format is stored here: `params[path]`, or its slice `layer`."""

    path: str
    layer: int | None
    shape: tuple[int, ...]  # in the other format


def places(config: ModelConfig, format: str) -> dict[str, Place]:
    """Return the place of every tensor of a model in the format "hf" or "nanochat", by its name there."""
    result: dict[str, Place] = {}
    for path, leaf in flatten_dict(abstract_params(config), sep=".").items():
        name = NAMES[path][FORMATS.index(format)]
        by_layer = "{i}" in name
        shape = leaf.shape[1:] if by_layer else leaf.shape
        if path in TABLES:
            shape = (shape[0] if path == "bigram_embedding" else config.vocab_size, shape[1])
        elif len(shape) != 1:
            shape = shape[::-1] or (1,)
        if by_layer:
            layers = value_layers(config) if path in BY_VALUE_LAYER else range(config.depth)
            result |= {name.format(i=i): Place(path, index, shape) for index, i in enumerate(layers)}
        else:
            result[name] = Place(path, None, shape)
    return result


def tensor(flat: Mapping[str, Any], place: Place) -> np.ndarray:
    """Return one tensor as torch stores it, without the vocabulary's padding. `flat`: parameters by path."""
    array = np.asarray(flat[place.path] if place.layer is None else flat[place.path][place.layer])
    if place.path in TABLES:
        return np.ascontiguousarray(array[: place.shape[0]])
    return np.ascontiguousarray(array.T).reshape(place.shape)


def assemble(
    config: ModelConfig, format: str, names: Collection[str], read: Callable[[str], np.ndarray], source: object
) -> Params:
    """Build our parameters from the tensors of another format: their `names`, and `read`, which gets one. dtypes stay.

    `DataError` names `source` and what is missing, too many, of the wrong shape, not floating-point or not finite.
    """
    expected = places(config, format)
    if missing := sorted(expected.keys() - set(names)):
        raise DataError(f"{source}: lacks {', '.join(missing[:4])}")
    if extra := sorted(set(names) - expected.keys()):
        raise DataError(f"{source}: has tensors that such a model does not have: {', '.join(extra[:4])}")
    flat: dict[str, Any] = {}
    for name, place in expected.items():
        array = read(name)
        if place.path in TABLES and format == "nanochat":
            array = array[: place.shape[0]]  # it may be padded there
        if array.shape != place.shape:
            raise DataError(f"{source}: {name} has the shape {array.shape}, where its config makes it {place.shape}")
        if array.dtype.name not in FLOATS or not np.isfinite(array).all():
            raise DataError(f"{source}: {name} ({array.dtype.name}) does not hold finite floating-point numbers")
        if place.path in TABLES:
            rows = parameters(config)[place.path].shape[-2]  # whole tiles
            array = np.pad(array, [(0, rows - len(array)), (0, 0)])
        elif array.ndim == 2:
            array = np.ascontiguousarray(array.T)
        elif not place.path.startswith("blocks."):
            array = array.reshape(())
        if place.layer is None:
            flat[place.path] = array
        else:
            flat.setdefault(place.path, []).append(array)
    for path, value in flat.items():
        flat[path] = np.stack(value) if isinstance(value, list) else value
    return unflatten_dict(flat, sep=".")


# ---- config.json

FORMAT = 1  # of our own architecture's config.json
CODE = ("configuration_jaxchat.py", "modeling_jaxchat.py")  # of our own architecture, in the folder `exported`
# our key -> theirs, where the meaning is the same
SHARED = {
    "depth": "num_hidden_layers", "seq_len": "max_position_embeddings", "vocab_size": "vocab_size",
    "width": "hidden_size", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "head_width": "head_dim", "tie_embeddings": "tie_word_embeddings", "softcap": "final_logit_softcapping",
    "norm_eps": "rms_norm_eps",
}  # fmt: skip
# under our names, in our own architecture only
OWN = (
    "recipe", "mlp_factor", "window_pattern", "window_short", "qk_scale", "value_embeddings", "residual_scalars",
    "smear", "backout", "bigram_rows", "key_offset",
)  # fmt: skip
FREE = ("architectures", "auto_map", "initializer_range", "rope_parameters")  # need not be as we write them
STOCK = {"hidden_act": "relu2", "attention_bias": False, "attention_dropout": 0.0}  # what NanoChat always is


def architecture_of(config: ModelConfig, wanted: str = "auto") -> str:
    """Return "nanochat" where the stock architecture can hold the model, else "jaxchat".

    `UsageError` where "nanochat" is wanted and cannot hold it.
    """
    names = ("value_embeddings", "residual_scalars", "smear", "backout", "bigram_rows", "key_offset")
    extras = [name for name in names if getattr(config, name)]
    extras += ["qk_scale"] if config.qk_scale != 1 else []
    extras += ["short windows"] if min(windows(config)) < config.seq_len else []
    if wanted == "nanochat" and extras:
        raise UsageError(f"Hugging Face's NanoChat has no {', '.join(extras)}; export with --architecture jaxchat")
    return ("jaxchat" if extras else "nanochat") if wanted == "auto" else wanted


def config_to_hf(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """Return what `config.json` says of a resolved model."""
    content = {theirs: getattr(config, ours) for ours, theirs in SHARED.items()}
    content |= {
        "model_type": architecture,
        "intermediate_size": mlp_width(config),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
    }
    if architecture == "nanochat":
        return content | STOCK | {"architectures": ["NanoChatForCausalLM"], "initializer_range": 0.02}
    content |= {name: getattr(config, name) for name in OWN}
    content |= {"layer_windows": windows(config), "value_embedding_layers": value_layers(config)}
    classes = {
        "AutoConfig": "configuration_jaxchat.JaxchatConfig",
        "AutoModelForCausalLM": "modeling_jaxchat.JaxchatForCausalLM",
    }
    return content | {"architectures": ["JaxchatForCausalLM"], "jaxchat_format": FORMAT, "auto_map": classes}


def config_from_hf(content: Any, source: object) -> ModelConfig:
    """Return the resolved model of a `config.json`; `DataError` names `source` and what cannot be run here."""
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in ("nanochat", "jaxchat"):
        raise DataError(f"{source}: has the architecture {kind!r}; only nanochat and jaxchat can be read")
    if lacking := [SHARED[n] for n in ("depth", "vocab_size", "width", "n_heads") if content.get(SHARED[n]) is None]:
        raise DataError(f"{source}: lacks {', '.join(lacking)}")
    values = {ours: content[theirs] for ours, theirs in SHARED.items() if content.get(theirs) is not None}
    try:
        rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        values["rotary_base"] = rope.get("rope_theta", content.get("rope_theta", 10_000.0))
        if kind == "jaxchat":
            values |= {name: content[name] for name in OWN if name in content}
        else:
            inner = content.get("intermediate_size", 4 * values["width"])
            values |= {"recipe": "classic", "mlp_factor": inner / values["width"]}
            values["norm_eps"] = content.get("rms_norm_eps", 1e-6)
        config = resolve_model(build({"model": values}).model)
        expected = config_to_hf(config, kind) | {"rope_type": "default"}
    except (UsageError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{source}: has invalid values ({error})") from None
    # whatever has no place in our config must be as in all our models
    for key, value in expected.items():
        given = {"rope_type": rope_type, **content}.get(key)
        if key not in FREE and given != value and (given is not None or key == SHARED["softcap"]):
            raise DataError(f"{source}: {key} is {given!r}; only {value!r} can be run here")
    return config


# ---- export

SHARD_BYTES = 1_000_000_000  # of one safetensors file, which is also held in memory once more while it is written
HOW = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
{ask}
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```"""
CHAT = """messages = [{"role": "user", "content": "Hello!"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
CONTINUE = 'ids = tokenizer("<|bos|>Once upon a time", return_tensors="pt")'


def write_hf(model: Trained, out: Path, architecture: str = "auto") -> dict[str, Any]:
    """Write a model into the new folder `out`; facts: architecture, dtype, bytes.

    `UsageError` where `architecture` "nanochat" cannot hold it.
    """
    architecture, dtype, tokenizer = architecture_of(model.config, architecture), model.dtype, model.tokenizer
    end = tokenizer.special[ASSISTANT_END] if model.chats else tokenizer.bos
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": end, "pad_token_id": end}
    trust = ", trust_remote_code=True" if architecture == "jaxchat" else ""
    how = HOW.replace("{trust}", trust).replace("{ask}", CHAT if model.chats else CONTINUE)
    flat, where = flatten_dict(model.params, sep="."), places(model.config, "hf")
    sizes = {name: int(np.prod(place.shape)) * np.dtype(dtype).itemsize for name, place in where.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    with atomic_directory(out) as folder:
        more = {"dtype": dtype, "use_cache": True, "jaxchat_version": __version__, **ids}
        write_json(folder / "config.json", config_to_hf(model.config, architecture) | more)
        write_json(folder / "generation_config.json", ids)
        for name, text in tokenizer_files(model).items():
            atomic_write(folder / name, text)
        for name in CODE if architecture == "jaxchat" else ():
            atomic_write(folder / name, (Path(__file__).parent / "exported" / name).read_text(encoding="utf-8"))
        atomic_write(folder / "README.md", model_card(model, how, "transformers"))
        for file, names in split.filename_to_tensors.items():
            arrays = {name: tensor(flat, where[name]).astype(dtype, copy=False) for name in names}
            try:
                save_file(arrays, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise DataError(f"{folder / file}: could not be written ({error}); make room and try again") from None
            (folder / file).chmod(0o644)  # the library leaves it to its owner alone
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)
    return {"architecture": architecture, "dtype": dtype, "bytes": sum(sizes.values())}


def holds(export: Path, model: Trained) -> bool:
    """Tell whether an export has the weights of a model; `DataError` where it cannot be read."""
    other, where = read_hf(export), places(model.config, "hf")
    ours, theirs = (flatten_dict(params, sep=".") for params in (model.params, other.params))
    same = model.dtype == other.dtype and where == places(other.config, "hf")
    return same and all(np.array_equal(tensor(ours, p).astype(other.dtype), tensor(theirs, p)) for p in where.values())


# ---- import


def read_hf(source: Path, stage: str | None = None) -> Trained:
    """Read a folder of the stock NanoChat, or of our own export.

    `stage`: what the weights are; by default the tokenizer's end token tells "base" or "sft". `DataError` names what
    cannot be read.
    """
    if not (source / "config.json").is_file():
        raise DataError(f"{source}/config.json: no such file; give the folder with it, tokenizer.json, *.safetensors")
    config = config_from_hf(read_json(source / "config.json"), source / "config.json")
    tokenizer = read_tokenizer(source / "tokenizer.json")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise DataError(f"{source}: no safetensors there (pickles such as pytorch_model.bin can run code: not opened)")
    opened: dict[str, Any] = {}
    for file in files:
        try:
            tensors = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file}: damaged or no safetensors ({error}); get it once more") from None
        opened |= dict.fromkeys(tensors.keys(), tensors)

    def read(name: str) -> np.ndarray:
        try:
            return np.asarray(opened[name].get_tensor(name))
        except (SafetensorError, TypeError, AttributeError) as error:  # a dtype that numpy lacks
            raise DataError(f"{source}: {name} cannot be read ({error})") from None

    params = assemble(config, "hf", opened.keys(), read, source)
    if stage is None:
        file = source / "tokenizer_config.json"
        settings = read_json(file) if file.exists() else {}
        end = settings.get("eos_token") if isinstance(settings, dict) else None
        stage = "base" if (end.get("content") if isinstance(end, dict) else end) == BOS else "sft"
    name, card = source.resolve().name, source / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else None
    origin = {"format": "hf", "from": name, "sha256": {path.name: sha256_file(path) for path in files}}
    return Trained(config, params, tokenizer, stage, name, text, imported=origin)
