"""What goes out of a run directory, and what comes in."""

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

from jaxchat import __version__
from jaxchat.checkpoint import RECORDS, params_sha256, recorded, save_params
from jaxchat.config import Config, ModelConfig, RlConfig, ServeConfig, to_toml
from jaxchat.engine.loading import STAGES as FURTHEST_FIRST
from jaxchat.engine.loading import load_run, trained_stages
from jaxchat.errors import DataError, UsageError
from jaxchat.model import Params
from jaxchat.run_dir import RECORD_FORMAT, RunDir, atomic_write, read_json, sync_directory, write_json
from jaxchat.scaling import resolve
from jaxchat.tokenizer import Tokenizer

STAGES = tuple(reversed(FURTHEST_FIRST))
CARD = "card.md"  # the model card that an imported model came with
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Trained:
    """A model on its way between formats; `params` are host arrays, kernels (in, out)."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    stage: str  # "base", "sft" or "rl"
    name: str
    card: str | None = None  # the README.md that it came with
    report: dict[str, Any] | None = None  # `report.json` of the run that made it
    step: int = 0
    imported: dict[str, Any] | None = None  # where its base came from, if it was not trained here
    trained_on: bool = False  # whether its own stage was, then

    @property
    def chats(self) -> bool:
        return self.stage != "base"

    @property
    def dtype(self) -> str:
        """Of all parameters; float32, which holds the others, where they differ."""
        found = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(self.params)}
        return found.pop() if len(found) == 1 else "float32"


def load_trained(run: RunDir, stage: str | None = None, dtype: str = "auto") -> Trained:
    """The furthest trained stage of a run, or the one named, in a dtype ("auto": as stored).

    `DataError` says what is missing or damaged.
    """
    check_dtype(dtype)
    stage = stage or trained_stages(run)[0]
    config, params, tokenizer, serve = load_run(run, stage)
    _cast(params, dtype)
    imported, origin = (recorded(run, s).get("imported") for s in (stage, "base"))
    card = (run.root / CARD).read_text(encoding="utf-8") if imported and (run.root / CARD).exists() else None
    report = read_json(run.root / "report.json") if (run.root / "report.json").exists() and not card else None
    name = serve.model_name or run.root.resolve().name
    return Trained(config, params, tokenizer, stage, name, card, report, 0, origin, origin is not None and not imported)


def check_dtype(name: str) -> None:
    """`UsageError` for a dtype that no export is written in."""
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is unknown; choose from {', '.join(DTYPES)}")


def _cast(params: Params, dtype: str) -> None:
    """In place and leaf by leaf, so that a big model is never held twice."""
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            _cast(leaf, dtype)
        elif dtype != "auto":
            params[name] = leaf.astype(dtype, copy=False)


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to write into that gets the name `out` when all is done, or vanishes after a failure.

    `UsageError` where `out` is there already, and not empty.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"{out}: exists already; choose another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield aside
        for path in aside.rglob("*"):
            with open(path, "rb") if path.is_file() else contextlib.nullcontext() as file:
                if file:
                    os.fsync(file.fileno())
        aside.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
        sync_directory(out.parent)
    except BaseException:
        for _ in range(20):  # Orbax's threads may still be writing
            shutil.rmtree(aside, ignore_errors=True)
            if not aside.exists():
                break
            time.sleep(0.1)
        raise


def write_run(model: Trained, out: Path, origin: dict[str, Any]) -> None:
    """A run directory that chats, is examined and trains on, from a model of elsewhere.

    The weights stand in `base/` too when it chats, where exams that want a base model and further training find them.
    `origin` goes into the records.
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
    with appearing(out) as aside:
        run = RunDir(aside)
        atomic_write(run.config, to_toml(config))
        model.tokenizer.save(run.tokenizer)
        if model.card is not None:
            atomic_write(aside / CARD, model.card)
        stages = STAGES[: STAGES.index(model.stage) + 1]
        meta = {"imported": origin, "tokens": 0}
        save_params(run.stage("base"), model.step, model.params, meta)
        for stage in stages[1:]:
            shutil.copytree(run.stage("base"), run.stage(stage), copy_function=_link)
        digest = params_sha256(model.params)
        shapes = dataclasses.asdict(model.config).items()
        shape = {f"model.{key}": value for key, value in shapes if key != "attention"}
        facts = {"digest": digest, "params_sha256": digest}
        records = {"tokenizer": _record({}, {"digest": model.tokenizer.digest}, origin)}
        for stage in stages:
            records[RECORDS.get(stage, stage)] = _record(shape if stage == "base" else {}, facts, origin)
        write_json(run.stages, records)


def _record(inputs: dict[str, Any], facts: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """As `train/stages.py` keeps them; `imported` says that no stage here made it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    shared = {
        "format": RECORD_FORMAT,
        "status": "done",
        "start": now,
        "end": now,
        "seconds": 0.0,
        "version": __version__,
        "inputs": inputs,
        "facts": facts,
    }
    return shared | {key: facts[key] for key in ("params_sha256",) if key in facts} | {"imported": origin}


def _link(source: str, target: str) -> None:
    """Orbax never changes a file in place, so two folders may share it; elsewhere it is copied."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
