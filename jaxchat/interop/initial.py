"""Weights that a training starts from (`train.init`): a stage of another run, or an exported folder. Only read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from jaxchat.checkpoint import params_sha256, this_process
from jaxchat.config import Config, ModelConfig, RlConfig, build, is_derived, load_config
from jaxchat.errors import DataError, UsageError, command_line, first_line
from jaxchat.interop.huggingface import config_from_hf, read_hf
from jaxchat.interop.trained import Trained, load_trained, read_tokenizer
from jaxchat.model import abstract_params
from jaxchat.run_dir import TRAINED, RunDir, damage, read_json, saved_steps
from jaxchat.scaling import resolve, resolve_model
from jaxchat.tokenizer import Tokenizer

# Keys of the model that may differ from the one that the weights come from: no parameter has a shape after them
POSITIONS = ("seq_len", "rotary_base", "window_pattern", "window_short", "attention")


def find(init: str) -> tuple[Path, str | None]:
    """Return the folder of RUN, RUN:STAGE, RUN/STAGE or an export, and the stage where one is named."""
    path, stage = Path(init).expanduser(), None
    head, _, tail = init.rpartition(":")
    if not path.exists() and tail in TRAINED:
        path, stage = Path(head).expanduser(), tail
    if path.name in TRAINED and (path.parent / "config.toml").is_file():
        path, stage = path.parent, path.name
    if not path.is_dir():
        raise DataError(f"train.init: {init}: there is no such folder")
    return path, stage


@functools.cache
def init_config(init: str) -> Config:
    """Return the resolved configuration that the weights bring along: a run its own, an export its model alone."""
    folder, stage = find(init)
    if RunDir(folder).config.is_file():
        return resolve(load_config(RunDir(folder).config))
    file = folder / "config.json"
    if stage or not file.is_file():
        advice = "name a run directory, RUN:STAGE, or a folder of the format hf or orbax"
        if any(folder.glob("*.pt")):
            advice = f"import it first ({command_line('import --format nanochat')})"
        raise DataError(f"train.init: {folder} is neither a run nor an exported folder; {advice}")
    content = read_json(file)
    model = _orbax_model(content, file) if (folder / "params").is_dir() else config_from_hf(content, file)
    return resolve(Config(tier="imported", model=model, rl=RlConfig(environment="")))


def with_init_model(config: Config, model: ModelConfig, named: Collection[str]) -> Config:
    """Return a configuration with the model and the tokenizer of its `train.init`.

    `UsageError` for a key in `named` that contradicts it; only those of `POSITIONS` may differ.
    """
    changes = {}
    for key in (key.removeprefix("model.") for key in named if key.startswith("model.")):
        value, theirs = getattr(config.model, key), getattr(model, key)
        if key in POSITIONS:
            changes[key] = value
        elif value != theirs and not is_derived(value):
            init = config.train.init
            raise UsageError(f"model.{key}: the weights of {init} have {theirs}, not {value}; leave it out")
    if "tokenizer.path" in named:
        raise UsageError("tokenizer.path: the tokenizer comes with the weights of train.init; leave one of them out")
    tokenizer = dataclasses.replace(config.tokenizer, path="", normalize="none")
    return dataclasses.replace(config, model=dataclasses.replace(model, **changes), tokenizer=tokenizer)


def init_tokenizer(init: str) -> Tokenizer:
    """Return the tokenizer that the weights were trained with."""
    run = RunDir(find(init)[0])
    return Tokenizer.load(run.tokenizer) if run.config.is_file() else read_tokenizer(run.root / "tokenizer.json")


def read_init(config: Config) -> Trained:
    """Load the weights of `train.init` as host arrays in float32; `imported` says where they are from.

    Of a run without a named stage: the base model to pretrain, else (`train.steps` = 0) the furthest stage that is
    done. `DataError` where there are no whole weights of the configuration's model.
    """
    folder, stage = find(config.train.init)
    run = RunDir(folder)
    if run.config.is_file():
        done = {name: run.records().get(key, {}).get("status", "done") == "done" for name, key in TRAINED.items()}
        stages = [name for name in reversed(TRAINED) if done[name] and saved_steps(run.stage(name))]
        if not stages or (stage and stage not in stages):
            raise DataError(
                f"train.init: {folder} has no finished stage{f' {stage}' if stage else ''}; finished: "
                f"{', '.join(stages) or 'none'}. Finish it with {command_line('--run-dir', folder)}"
            )
        stage = stage or ("base" if config.train.steps and "base" in stages else stages[0])
        origin = {"format": "jaxchat", "from": folder.resolve().name}
        model = dataclasses.replace(load_trained(run, stage), imported=origin)
    elif (folder / "params").is_dir():
        model = _read_orbax(folder)
    else:
        model = read_hf(folder)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_params(config.model), sep=".").items()}
    given = {path: leaf.shape for path, leaf in flatten_dict(model.params, sep=".").items()}
    if wrong := sorted(path for path in shapes.keys() | given.keys() if shapes.get(path) != given.get(path)):
        raise DataError(f"train.init: {folder}: {wrong[0]} is {given.get(wrong[0])}, not {shapes.get(wrong[0])}")
    if model.tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"train.init: {folder}: its tokenizer has {model.tokenizer.vocab_size} tokens, the special ones of a chat "
            f"included, and its embedding {config.model.vocab_size} rows"
        )
    params = jax.tree.map(lambda leaf: leaf.astype("float32", copy=False), model.params)  # as training keeps them
    about = {"stage": model.stage, "params_sha256": params_sha256(params)}
    return dataclasses.replace(model, params=params, imported=(model.imported or {}) | about)


def _orbax_model(content: object, file: Path) -> ModelConfig:
    try:
        return resolve_model(build({"model": content["model"]}).model)  # type: ignore[index]
    except (UsageError, TypeError, KeyError) as error:
        raise DataError(f"{file}: has invalid values ({error})") from None


def _read_orbax(folder: Path) -> Trained:
    """Read a folder that `write_orbax` wrote."""
    content = read_json(folder / "config.json")
    if fault := damage(folder, ("params/", "config.json", "tokenizer.json")):
        raise DataError(f"train.init: {folder}: {fault}; get it once more")
    try:
        params = ocp.StandardCheckpointer(multiprocessing_options=this_process()).restore(folder.resolve() / "params")
    except Exception as error:  # Orbax and TensorStore raise all kinds
        raise DataError(f"train.init: {folder / 'params'}: could not be read ({first_line(error)})") from error
    model, tokenizer = _orbax_model(content, folder / "config.json"), read_tokenizer(folder / "tokenizer.json")
    stage = content.get("stage") if content.get("stage") in TRAINED else "base"
    name = folder.resolve().name
    return Trained(model, params, tokenizer, stage, name, imported={"format": "orbax", "from": name})
