"""A trained model on its way: out of a run directory, into a new one, and out as an Orbax tree with its own code.

The tokenizer's files are those of Hugging Face's libraries, which find special tokens in any text. So the chat template
puts U+E000 behind every "<" of a content (and behind whatever else begins a special token), and a normalizer takes it
away again before the text is cut into tokens. What a person types never becomes a special token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tokenizers import Tokenizer as Backend

from jaxchat import __version__
from jaxchat.checkpoint import params_sha256, recorded, save_params, this_process
from jaxchat.config import Config, ModelConfig, RlConfig, ServeConfig, load_config, to_toml
from jaxchat.engine import load_run, trained_stages
from jaxchat.errors import DataError, UsageError, first_line
from jaxchat.interop.bundle import bundle
from jaxchat.model import Params, hidden, layer_params, logits
from jaxchat.run_dir import (
    RECORD_FORMAT,
    TRAINED,
    RunDir,
    atomic_write,
    link,
    read_json,
    sync_directory,
    write_checksums,
    write_json,
)
from jaxchat.scaling import resolve
from jaxchat.sizes import count_parameters, value_layers, windows
from jaxchat.tokenizer import ASSISTANT_END, BOS, Tokenizer

CARD = "card.md"  # the model card that an imported model came with
# by stage, in their order
KINDS = {"base": "a base model that continues text", "sft": "a chat model", "rl": "a chat model after RL"}


@dataclass(frozen=True)
class Trained:
    """A model with all that other formats want to know; `params` are host arrays, kernels (in, out)."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    stage: str  # "base", "sft" or "rl"
    name: str
    card: str | None = None  # the README.md that an imported model came with
    report: dict[str, Any] | None = None  # `report.json` of the run that trained it
    step: int = 0
    imported: dict[str, Any] | None = None  # where its base came from, if it was not trained here: format, from, sha256
    trained_on: bool = False  # whether this stage was trained here, on an imported base
    run_config: Config = field(default_factory=Config)

    @property
    def chats(self) -> bool:
        return self.stage != "base"

    @property
    def dtype(self) -> str:
        """Of all parameters; float32, which holds the others, where they differ."""
        names = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(self.params)}
        return names.pop() if len(names) == 1 else "float32"


def load_trained(run: RunDir, stage: str | None = None, dtype: str = "auto") -> Trained:
    """Load the stage of a run, or its furthest trained one, in a dtype ("auto": as stored).

    `DataError` says what is missing or damaged.
    """
    stage = stage or trained_stages(run)[0]
    config, params, tokenizer, serve = load_run(run, stage)
    if dtype != "auto":
        params = jax.tree.map(lambda leaf: leaf.astype(dtype, copy=False), params)
    own, base = (recorded(run, s).get("imported") for s in (stage, "base"))
    card, report = run.root / CARD, run.root / "report.json"
    return Trained(
        config,
        params,
        tokenizer,
        stage,
        name=serve.model_name or run.root.resolve().name,
        card=card.read_text(encoding="utf-8") if own and card.exists() else None,
        report=read_json(report) if report.exists() and not own else None,
        imported=base,
        trained_on=base is not None and not own,
        run_config=load_config(run.config),
    )


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a folder to write into. It gets the name `out` at the end, or vanishes after a failure.

    `UsageError` where `out` exists and is not empty.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"{out}: exists already; choose another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        aside.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
        sync_directory(out.parent)
    except BaseException:
        for _ in range(20):
            shutil.rmtree(aside, ignore_errors=True)
            time.sleep(0.1)  # Orbax's threads may still be writing
            if not aside.exists():
                break
        raise


def write_run(model: Trained, out: Path) -> None:
    """Write a new run directory that chats, takes exams and trains on, from an imported model.

    A chat model's weights are in `base/` too, for exams of base models and for further training.
    """
    if model.tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(
            f"{model.name}: its tokenizer has {model.tokenizer.vocab_size} tokens, the special ones of a chat "
            f"included, and its embedding {model.config.vocab_size} rows"
        )
    rl, serve = RlConfig(environment=""), ServeConfig(model_name=model.name)
    try:
        config = resolve(Config(tier="imported", model=model.config, rl=rl, serve=serve))
    except UsageError as error:
        raise DataError(f"{model.name}: {error}") from None
    now, digest = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), params_sha256(model.params)
    record = {"format": RECORD_FORMAT, "status": "done", "start": now, "end": now, "seconds": 0.0, "inputs": {}}
    record |= {"version": __version__, "imported": model.imported}  # no stage here made it
    records = {"tokenizer": record | {"facts": {"digest": model.tokenizer.digest}}}
    with atomic_directory(out) as folder:
        run = RunDir(folder)
        atomic_write(run.config, to_toml(config))
        model.tokenizer.save(run.tokenizer)
        if model.card is not None:
            atomic_write(folder / CARD, model.card)
        save_params(run.stage("base"), model.step, model.params, {"imported": model.imported, "tokens": 0})
        for stage, name in list(TRAINED.items())[: list(TRAINED).index(model.stage) + 1]:
            facts = {"digest": digest, "params_sha256": digest}
            records[name] = record | {"facts": facts, "params_sha256": digest}
            if stage != "base":
                shutil.copytree(run.stage("base"), run.stage(stage), copy_function=link)
        shape = {f"model.{k}": v for k, v in dataclasses.asdict(model.config).items() if k != "attention"}
        records["pretrain"]["inputs"] = shape
        write_json(run.stages, records)


# ---- files that every export has: tokenizer, chat template, model card

MARK = "\ue000"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def tokenizer_files(model: Trained) -> dict[str, str]:
    """Return the contents of `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` by name."""
    content = json.loads(model.tokenizer.to_json())
    for token in content["added_tokens"]:  # they must not eat what stands beside them, nor match behind the normalizer
        token |= {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    first = sorted({token["content"][0] for token in content["added_tokens"] if token["special"]} | {"<"})
    steps = [*map(_unmark, first), *([content["normalizer"]] if content["normalizer"] else [])]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    marks = " | ".join(f'replace({json.dumps(c)}, {json.dumps(c)[:-1]}{MARK}")' for c in first)
    end = ASSISTANT_END if model.chats else BOS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": model.config.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": Backend.from_str(json.dumps(content)).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "chat_template.jinja": TEMPLATE.read_text(encoding="utf-8").replace("MARKED", marks),
    }


def _unmark(character: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": character + MARK}, "content": character}


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a `tokenizer.json`, without what `tokenizer_files` added to it; `DataError` where it cannot be used."""
    content: Any = read_json(file)
    try:
        steps = (content.get("normalizer") or {}).get("normalizers", [])
        if _unmark("<") in steps:
            rest = [step for step in steps if step != _unmark(str(step.get("content")))]
            sequence = {"type": "Sequence", "normalizers": rest}
            content["normalizer"] = sequence if len(rest) > 1 else rest[0] if rest else None
    except (TypeError, AttributeError) as error:
        raise DataError(f"{file}: not a tokenizer.json of Hugging Face's format ({error})") from None
    return Tokenizer.parse(json.dumps(content), file)


def model_card(model: Trained, how: str, library: str) -> str:
    """Return the README.md of an export: what the model is, how it is loaded (`how`), what it scored.

    A model that came with a card keeps it.
    """
    if model.card is not None:
        return model.card
    c, report, origin = model.config, model.report or {}, f"trained with jaxchat {__version__}"
    if source := model.imported or report.get("pretrain", {}).get("init"):
        stage = f", stage {source['stage']}" if "stage" in source else ""
        words = f"{source['from']} ({source['format']}{stage})"
        origin += f", starting from the weights of {words}"
        if model.imported and not model.trained_on:
            origin = f"imported into jaxchat {__version__} from {words}"
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- jaxchat\n---",
        f"# {model.name}",
        f"{count_parameters(c).total:,} parameters, {KINDS[model.stage]}, {origin}: {c.depth} layers of width "
        f"{c.width}, {c.n_heads} heads of {c.head_width}, context {c.seq_len:,} tokens, vocabulary {c.vocab_size:,}. "
        f"Recipe `{c.recipe}`.",
        f"## Load it\n\n{how}",
    ]
    if pretrain := report.get("pretrain"):
        text = f"`{report.get('data', {}).get('source')}`"
        parts.append(f"## Training\n\n{pretrain['tokens']:,} tokens, {pretrain['epochs']:.2f} passes over {text}.")
    parts += [f"Warning: {line}" for line in report.get("warnings", [])]
    rows = [
        f"| {stage} | {name} | {score['metric']:.4f} | {score.get('n', '')} |"
        for stage, exams in report.get("exams", {}).items()
        for name, score in exams.items()
        if stage in ("base", model.stage)
    ]
    if rows:
        parts.append("\n".join(["## Exams\n\n| stage | exam | score | questions |\n| --- | --- | --- | --- |", *rows]))
    parts.append(
        "## Limits\n\nA model of this size makes facts up, and repeats what its training text held. Look at the exams "
        "before you rely on it."
    )
    return "\n\n".join(parts) + "\n"


# ---- the Orbax export

FORMAT = 1
GOLDEN_TOKENS = 64  # whose logits are kept
SMALL_BYTES = 2**28  # of parameters: one program computes the logits; operation by operation, each would compile alone
CHUNK_BYTES = 2**26  # of a parameter that is compressed at once, which takes as much memory again
CODE = Path(__file__).parent / "exported" / "model.py"
HOW = """In this folder, with `jax`, `flax` and `orbax-checkpoint` installed:

```python
import orbax.checkpoint as ocp
from model import FOLDER, GPT
params = ocp.StandardCheckpointer().restore(FOLDER / "params")
model = GPT(params)
print("largest difference from golden.npz:", model.check())
```

`model.generate(ids, 64)` goes on from token ids; `tokenizer.json` makes them with the package `tokenizers`. `sha256sum
--check SHA256SUMS` tells whether the files arrived whole."""


def write_orbax(model: Trained, out: Path) -> dict[str, Any]:
    """Write a model into the new folder `out`; facts: dtype, bytes."""
    config, special, dtype = model.config, model.tokenizer.special, model.dtype
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype, copy=False), model.params)
    facts = {
        "format": FORMAT,
        "jaxchat_version": __version__,
        "stage": model.stage,
        "dtype": dtype,
        "model": dataclasses.asdict(config),
        "windows": windows(config),
        "value_layers": value_layers(config),
        "special_tokens": special,
        "end_tokens": [model.tokenizer.bos, *([special[ASSISTANT_END]] if model.chats else [])],
    }
    # long enough for every short window to end somewhere
    length = min(min(windows(config)) + GOLDEN_TOKENS, config.seq_len)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, length), np.int32)
    tokenizer = tokenizer_files(model)
    with atomic_directory(out) as folder:
        _write_params(folder.resolve() / "params", params)
        write_json(folder / "config.json", facts)
        for name in ("tokenizer.json", "chat_template.jinja"):
            atomic_write(folder / name, tokenizer[name])
        atomic_write(folder / CODE.name, bundle(CODE))
        atomic_write(folder / "README.md", model_card(dataclasses.replace(model, card=None), HOW, "jax"))
        np.savez(folder / "golden.npz", ids=ids, logits=golden_logits(config, params, ids, GOLDEN_TOKENS))
        write_checksums(folder)
    return {"dtype": dtype, "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params))}


def _write_params(path: Path, params: Params) -> None:
    """Write what `StandardCheckpointer` would, in chunks and without its copies: half the time and memory or less."""
    alone, chunks = this_process(), jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    numpy = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, numpy))
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, save_concurrent_gb=1, use_ocdbt=False, multiprocessing_options=alone
    )
    with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as writer:
        try:
            writer.save(path, args=ocp.args.PyTreeSave(params, save_args=chunks))  # type: ignore[call-arg]
        except Exception as error:  # Orbax and TensorStore raise all kinds
            raise DataError(f"{path}: could not be written ({first_line(error)}); make room and try again") from error


def golden_logits(config: ModelConfig, params: Params, ids: np.ndarray, last: int) -> np.ndarray:
    """Return logits (B, `last`, V) of the last positions of ids (B, T), computed in float32."""

    def float32(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)

    def run(wide: Any) -> jax.Array:
        return logits(config, wide, hidden(config, wide, jnp.asarray(ids))[:, -last:])

    class Layers:
        """Converts one layer at a time, so that a big model fits in memory once and not twice."""

        def __getitem__(self, i: int) -> Params:
            return float32(layer_params(config, params, i))

    outer = {k: v for k, v in params.items() if k not in ("blocks", "value_embedding")}
    with jax.default_matmul_precision("highest"):
        if sum(leaf.nbytes for leaf in jax.tree.leaves(params)) < SMALL_BYTES:
            return np.asarray(jax.jit(run)(float32(params)))
        return np.asarray(run(float32(outer) | {"layers": Layers()}))
