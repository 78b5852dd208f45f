"""Hugging Face's format, out and in: safetensors, config, tokenizer, chat template, model card.

What the stock NanoChat architecture can hold goes out as that one and needs nothing of ours to run; everything else
goes out with one file of code, `modeling_jaxchat.py`. Nothing is dropped on the way: the other one is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxchat import __version__
from jaxchat.config import ModelConfig
from jaxchat.errors import DataError, UsageError
from jaxchat.interop.card import model_card
from jaxchat.interop.tokenizer_files import read_tokenizer, tokenizer_files
from jaxchat.interop.trained import STAGES, Trained, appearing, load_trained, write_run
from jaxchat.model import Params, abstract_params
from jaxchat.run_dir import RunDir, atomic_write, read_json, sha256_file, write_json
from jaxchat.scaling import resolve_model
from jaxchat.sizes import mlp_width, padded_vocab, value_layers, windows
from jaxchat.tokenizer import ASSISTANT_END, BOS, Tokenizer

# What other formats call our parameters, and how they lie there.
#
# Torch keeps a matrix as (out, in) and every layer apart; here kernels are (in, out) and stacked over the layers.
# Tables end with the vocabulary there (`nanochat` may pad them), here with whole tiles.


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


# `config.json` of Hugging Face's NanoChat, and of our own architecture for what that one cannot hold.


ARCHITECTURES = {"nanochat": "NanoChatForCausalLM", "jaxchat": "JaxchatForCausalLM"}
FORMAT = 1  # of our own architecture's config.json
MODULE = "modeling_jaxchat"
# ours -> theirs, where the meaning is the same
SHARED = {
    "depth": "num_hidden_layers", "seq_len": "max_position_embeddings", "vocab_size": "vocab_size",
    "width": "hidden_size", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "head_width": "head_dim", "tie_embeddings": "tie_word_embeddings", "softcap": "final_logit_softcapping",
    "norm_eps": "rms_norm_eps",
}  # fmt: skip
# of our own architecture only, under our names
OWN = (
    "recipe", "mlp_factor", "window_pattern", "window_short", "qk_scale", "value_embeddings", "residual_scalars",
    "smear", "backout",
)  # fmt: skip
# what the stock architecture always is
STOCK = {"hidden_act": "relu2", "attention_bias": False, "attention_dropout": 0.0}


def extras(config: ModelConfig) -> list[str]:
    """What a model has that Hugging Face's NanoChat cannot hold."""
    found = [n for n in ("value_embeddings", "residual_scalars", "smear", "backout") if getattr(config, n)]
    if config.qk_scale != 1:
        found.append(f"qk_scale {config.qk_scale:g}")
    if any(size < config.seq_len for size in windows(config)):
        found.append(f"short windows ({config.window_pattern})")
    return found


def architecture_of(config: ModelConfig, wanted: str = "auto") -> str:
    """The stock "nanochat" where it can hold the model, else "jaxchat"; `UsageError` if it is wanted and cannot."""
    more = extras(config)
    if wanted == "nanochat" and more:
        raise UsageError(
            f"Hugging Face's NanoChat has no {', '.join(more)}, and the model would be another without; "
            "export it with --architecture jaxchat, which brings its own code"
        )
    return ("jaxchat" if more else "nanochat") if wanted == "auto" else wanted


def token_ids(tokenizer: Tokenizer, chats: bool) -> dict[str, Any]:
    """What begins a text, ends an answer (of a base model: a document), and fills a batch."""
    end = tokenizer.special[ASSISTANT_END] if chats else tokenizer.bos
    return {"bos_token_id": tokenizer.bos, "eos_token_id": end, "pad_token_id": end}


def to_hf(config: ModelConfig, architecture: str, dtype: str, ids: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of a resolved model."""
    shared = {theirs: getattr(config, ours) for ours, theirs in SHARED.items()}
    found = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "dtype": dtype,
        **shared,
        "intermediate_size": mlp_width(config),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "use_cache": True,
        "jaxchat_version": __version__,
        **ids,
    }
    if architecture == "nanochat":
        return found | STOCK | {"initializer_range": 0.02}
    own = {name: getattr(config, name) for name in OWN}
    layers = {"layer_windows": windows(config), "value_embedding_layers": value_layers(config)}
    classes = {"AutoConfig": f"{MODULE}.JaxchatConfig", "AutoModelForCausalLM": f"{MODULE}.JaxchatForCausalLM"}
    return found | {"jaxchat_format": FORMAT, "auto_map": classes} | own | layers


def from_hf(found: Any, source: object) -> ModelConfig:
    """The resolved model of a `config.json`; `DataError` names `source` and what it says that cannot be run here."""
    try:
        return _from_hf(found, source)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{source}: holds values that cannot be ({error})") from None


def _from_hf(found: Any, source: object) -> ModelConfig:
    if not isinstance(found, dict) or str(found.get("model_type")) not in ARCHITECTURES:
        kind = found.get("model_type", found.get("architectures")) if isinstance(found, dict) else None
        raise DataError(f"{source}: is of the architecture {kind!r}; only nanochat and jaxchat can be read")
    stock = found["model_type"] == "nanochat"
    if not stock and found.get("jaxchat_format") != FORMAT:
        raise DataError(f"{source}: jaxchat_format {found.get('jaxchat_format')!r}; this version reads {FORMAT}")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    for key, value in (STOCK if stock else {}).items():
        if found.get(key, value) != value:
            raise DataError(f"{source}: {key} is {found[key]!r}; only {value!r} can be run here")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise DataError(f"{source}: rope_type {rope.get('rope_type')!r}; only 'default' can be run here")
    values: dict[str, Any] = {ours: found[theirs] for ours, theirs in SHARED.items() if found.get(theirs) is not None}
    values["rotary_base"] = rope.get("rope_theta", found.get("rope_theta", 10_000.0))
    if found.get("final_logit_softcapping", 15.0) is None:
        raise DataError(f"{source}: final_logit_softcapping is null; logits are always capped here")
    if stock:
        values |= {"recipe": "classic", "norm_eps": found.get("rms_norm_eps", 1e-6)}
    else:
        values |= {name: found[name] for name in OWN if name in found}
    _check_types(values, source)
    if stock and isinstance(inner := found.get("intermediate_size", 4 * values["width"]), int):
        values["mlp_factor"] = inner / values["width"]
    try:
        config = resolve_model(ModelConfig(**values))
    except UsageError as error:
        raise DataError(f"{source}: {error}") from None
    for key, own in (("layer_windows", windows(config)), ("value_embedding_layers", value_layers(config))):
        if not stock and found.get(key) != own:
            raise DataError(f"{source}: {key} is {found.get(key)!r}, where its other settings make it {own}")
    if mlp_width(config) != found.get("intermediate_size", mlp_width(config)) or mlp_width(config) < 1:
        raise DataError(f"{source}: intermediate_size is {found.get('intermediate_size')!r}, not {mlp_width(config)}")
    return config


def _check_types(values: dict[str, Any], source: object) -> None:
    kinds = typing.get_type_hints(ModelConfig)
    for field in dataclasses.fields(ModelConfig):
        if field.name not in values:
            continue
        kind, value = kinds[field.name], values[field.name]
        wrong = not isinstance(value, (int, float) if kind is float else kind)
        if wrong or (kind in (int, float) and (isinstance(value, bool) or value <= 0)):
            raise DataError(f"{source}: {SHARED.get(field.name, field.name)} is {value!r}, which cannot be")
        if kind is float:
            values[field.name] = float(value)
    needed = {"depth", "vocab_size", "width", "n_heads"} - values.keys()
    if needed:
        raise DataError(f"{source}: lacks {', '.join(sorted(SHARED[n] for n in needed))}")


SHARD_BYTES = 1_000_000_000  # of one safetensors file; what is written at once is also held once more in memory
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CODE = Path(__file__).parent / "exported" / f"{MODULE}.py"
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


def export_hf(
    run: RunDir, out: str | Path, stage: str | None = None, dtype: str = "auto", architecture: str = "auto"
) -> dict[str, Any]:
    """Write a run's model to the new folder `out`; facts: architecture, dtype, bytes.

    dtype: "auto" (as stored) | "float32" | "bfloat16". `UsageError` where `architecture` "nanochat" cannot hold it.
    """
    return write_hf(load_trained(run, stage, dtype), Path(out), architecture)


def write_hf(model: Trained, out: Path, architecture: str = "auto") -> dict[str, Any]:
    """As `export_hf`, of a model at hand."""
    architecture, dtype = architecture_of(model.config, architecture), model.dtype
    ids = token_ids(model.tokenizer, model.chats)
    trust = ", trust_remote_code=True" if architecture == "jaxchat" else ""
    how = HOW.replace("{trust}", trust).replace("{ask}", CHAT if model.chats else CONTINUE)
    with appearing(out) as folder:
        write_json(folder / "config.json", to_hf(model.config, architecture, dtype, ids))
        write_json(folder / "generation_config.json", ids)
        for name, text in tokenizer_files(model.tokenizer, model.chats, model.config.seq_len).items():
            atomic_write(folder / name, text)
        if architecture == "jaxchat":
            atomic_write(folder / CODE.name, CODE.read_text(encoding="utf-8"))
        atomic_write(folder / "README.md", model_card(model, how, "transformers"))
        size = _write_tensors(model, folder, dtype)
    return {"architecture": architecture, "dtype": dtype, "bytes": size}


def _write_tensors(model: Trained, folder: Path, dtype: str) -> int:
    """safetensors of at most `SHARD_BYTES` each, with an index where there are several; returns their bytes."""
    item = np.dtype(dtype).itemsize
    shards: list[dict[str, Place]] = [{}]
    full = total = 0
    for name, place in places(model.config, "hf").items():
        size = int(np.prod(place.shape)) * item
        if shards[-1] and full + size > SHARD_BYTES:
            shards.append({})
            full = 0
        shards[-1][name] = place
        full, total = full + size, total + size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        arrays = {
            name: tensor(model.config, model.params, place).astype(dtype, copy=False) for name, place in shard.items()
        }
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise DataError(f"{folder / file}: could not be written ({error}); make room and try again") from None
        (folder / file).chmod(0o644)  # the library leaves it to its owner alone
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return total


def import_hf(source: str | Path, out: str | Path, stage: str | None = None) -> Trained:
    """A folder of stock NanoChat, or of our own export, into the new run directory `out`.

    `stage` "base" or "sft": what the weights are; from the tokenizer's end token where it is not given. `DataError`
    names what cannot be read; then nothing is written.
    """
    model = read_hf(Path(source), stage)
    files = {path.name: sha256_file(path) for path in sorted(Path(source).glob("*.safetensors"))}
    write_run(model, Path(out), {"format": "hf", "from": model.name, "sha256": files})
    return model


def read_hf(source: Path, stage: str | None = None) -> Trained:
    """As `import_hf`, without writing it down."""
    if stage is not None and stage not in STAGES:
        raise UsageError(f"stage {stage!r} is unknown; choose from {', '.join(STAGES)}")
    if not source.is_dir():
        raise DataError(f"{source}: not a folder; give the one that holds config.json and the safetensors")
    config = from_hf(read_json(source / "config.json"), source / "config.json")
    tokenizer = read_tokenizer(source / "tokenizer.json")
    settings_file, card = source / "tokenizer_config.json", source / "README.md"
    settings = read_json(settings_file) if settings_file.exists() else {}
    end = settings.get("eos_token") if isinstance(settings, dict) else None
    end = end.get("content") if isinstance(end, dict) else end
    with _open_tensors(source) as (shapes, read):
        params = assemble(config, "hf", shapes, read, source)
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else None
    stage = stage or ("base" if end == BOS else "sft")
    return Trained(config, params, tokenizer, stage, source.resolve().name, text)


@contextlib.contextmanager
def _open_tensors(source: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Any]]:
    """(shapes by name, a function that reads one) of all safetensors of a folder; rotary tables are left out."""
    files = _tensor_files(source)
    where: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    with contextlib.ExitStack() as stack:
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="numpy"))
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    if name in where:
                        raise DataError(f"{file}: {name} stands in another file too")
                    if not name.endswith("rotary_emb.inv_freq"):
                        where[name], shapes[name] = opened, tuple(opened.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise DataError(f"{file}: damaged or no safetensors ({error}); get it once more") from None

        def read(name: str) -> np.ndarray:
            try:
                return np.asarray(where[name].get_tensor(name))
            except (SafetensorError, TypeError, AttributeError, OSError) as error:
                raise DataError(f"{source}: {name} cannot be read ({error})") from None

        yield shapes, read


def _tensor_files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    if index.exists():
        found = read_json(index)
        named = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(named, dict) or not all(isinstance(f, str) and Path(f).name == f for f in named.values()):
            raise DataError(f"{index}: has no weight_map of file names")
        files = [source / name for name in sorted(set(named.values()))]
    else:
        files = sorted(source.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file, though the index names it; get it once more")
    if not files:
        pickles = sorted(p.name for pattern in PICKLES for p in source.glob(pattern))
        only = f", only {', '.join(pickles[:3])}, which as pickles can run code and are not opened" if pickles else ""
        raise DataError(f"{source}: no safetensors there{only}")
    return files
