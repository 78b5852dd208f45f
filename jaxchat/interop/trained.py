"""A trained model on its way between formats: read from a run directory, or written into a new one."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxchat import __version__
from jaxchat.checkpoint import RECORDS, params_sha256, recorded, save_params
from jaxchat.config import Config, ModelConfig, RlConfig, ServeConfig, to_toml
from jaxchat.engine.loading import STAGES as FURTHEST_FIRST
from jaxchat.engine.loading import load_run, trained_stages
from jaxchat.errors import DataError, UsageError
from jaxchat.model import Params
from jaxchat.run_dir import RECORD_FORMAT, RunDir, atomic_write, read_json, sync_directory, write_json
from jaxchat.scaling import resolve
from jaxchat.sizes import count_parameters
from jaxchat.tokenizer import Tokenizer

STAGES = tuple(reversed(FURTHEST_FIRST))
CARD = "card.md"  # the model card that an imported model came with
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
        flat = flatten_dict(params)
        del params
        for path in flat:  # leaf by leaf, so that a big model is never held twice
            flat[path] = flat[path].astype(dtype, copy=False)
        params = unflatten_dict(flat)
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
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"format": RECORD_FORMAT, "status": "done", "start": now, "end": now, "seconds": 0.0, "inputs": {}}
    record |= {"version": __version__, "imported": model.imported}  # no stage here made it
    with atomic_directory(out) as folder:
        run = RunDir(folder)
        atomic_write(run.config, to_toml(config))
        model.tokenizer.save(run.tokenizer)
        if model.card is not None:
            atomic_write(folder / CARD, model.card)
        save_params(run.stage("base"), model.step, model.params, {"imported": model.imported, "tokens": 0})
        digest = params_sha256(model.params)
        records = {"tokenizer": record | {"facts": {"digest": model.tokenizer.digest}}}
        for stage in STAGES[: STAGES.index(model.stage) + 1]:
            facts = {"digest": digest, "params_sha256": digest}
            records[RECORDS.get(stage, stage)] = record | {"facts": facts, "params_sha256": digest}
            if stage != "base":
                shutil.copytree(run.stage("base"), run.stage(stage), copy_function=_link)
        shape = {f"model.{k}": v for k, v in dataclasses.asdict(model.config).items() if k != "attention"}
        records[RECORDS["base"]]["inputs"] = shape
        write_json(run.stages, records)


def _link(source: str, target: str) -> None:
    """Hard-link where that works: Orbax never changes a file in place, so two folders may share it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def model_card(model: Trained, how: str, library: str) -> str:
    """Return the README.md of an export: what the model is, how it is loaded (`how`), what it scored.

    A model that came with a card keeps it.
    """
    if model.card is not None:
        return model.card
    config, report, origin = model.config, model.report or {}, f"trained with jaxchat {__version__}"
    if model.imported:
        origin = f"imported into jaxchat {__version__} from {model.imported['from']} ({model.imported['format']})"
        origin += " and trained on" if model.trained_on else ""
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- jaxchat\n---",
        f"# {model.name}",
        f"{count_parameters(config).total:,} parameters, {KINDS[model.stage]}, {origin}: {config.depth} layers of "
        f"width {config.width}, {config.n_heads} heads of {config.head_width}, context {config.seq_len:,} tokens, "
        f"vocabulary {config.vocab_size:,}. Recipe `{config.recipe}`.",
        f"## Load it\n\n{how}",
    ]
    data, pretrain = report.get("data", {}), report.get("pretrain", {})
    rows = [f"| text | `{data['source']}` |"] if data.get("source") and pretrain else []
    rows += [f"| tokens of pretraining | {pretrain['tokens']:,} |"] if pretrain.get("tokens") else []
    rows += [f"| passes over the text | {pretrain['epochs']:.2f} |"] if pretrain.get("epochs") else []
    if rows:
        parts.append("\n".join(["## Training\n\n| | |\n| --- | --- |", *rows]))
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
