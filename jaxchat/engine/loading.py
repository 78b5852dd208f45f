"""A finished run as the engine needs it."""

from __future__ import annotations

from typing import Any

from jaxchat.checkpoint import restore_params
from jaxchat.config import ModelConfig, ServeConfig, load_config
from jaxchat.errors import DataError
from jaxchat.paths import RunDir
from jaxchat.recipes import resolve_model
from jaxchat.text.tokenizer import Tokenizer

STAGES = ("rl", "sft", "base")  # furthest trained first


def load_run(run: RunDir, stage: str | None) -> tuple[ModelConfig, dict[str, Any], Tokenizer, ServeConfig]:
    """(resolved config, parameters, tokenizer, `serve.*`) of the furthest trained stage, or of the one named.

    `DataError` says what is missing.
    """
    if not run.config.is_file():
        raise DataError(f"{run.root}: not a run directory (no config.toml); train one with launch.py first")
    config = load_config(run.config)
    found = [s for s in STAGES if any(p.name.isdigit() for p in run.stage(s).glob("*"))]
    if not found or (stage is not None and stage not in found):
        wanted = f"no stage {stage!r} with a checkpoint" if stage else "no trained stage"
        raise DataError(f"{run.root}: {wanted}; found: {', '.join(found) or 'none'}")
    params, _ = restore_params(run.stage(stage or found[0]))
    return resolve_model(config.model), params, Tokenizer.load(run.tokenizer), config.serve
