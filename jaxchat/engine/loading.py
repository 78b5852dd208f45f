"""Load a finished run for the engine."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxchat.attention import trusted_backend
from jaxchat.checkpoint import trained_params
from jaxchat.config import MeshConfig, ModelConfig, ServeConfig, load_config
from jaxchat.errors import DataError
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve_model
from jaxchat.sharding import make_mesh
from jaxchat.sizes import exam_rows
from jaxchat.tokenizer import Tokenizer

CPU_ROWS = 32  # of exams at once; more leave a CPU's caches
STAGES = ("rl", "sft", "base")  # furthest trained first


def trained_stages(run: RunDir) -> list[str]:
    """Return the stages with a checkpoint, the furthest first; `DataError` where there is none."""
    if not run.config.is_file():
        raise DataError(f"{run.root}: not a run directory (no config.toml); train one with launch.py first")
    stages = [s for s in STAGES if any(p.name.isdigit() for p in run.stage(s).glob("*"))]
    if not stages:
        raise DataError(f"{run.root}: no trained stage yet; finish the run first: launch.py --run-dir {run.root}")
    return stages


def load_run(run: RunDir, stage: str | None) -> tuple[ModelConfig, dict[str, Any], Tokenizer, ServeConfig]:
    """Return (resolved config, parameters, tokenizer, `serve.*`) of the stage, by default the furthest trained one."""
    stages = trained_stages(run)
    if stage is not None and stage not in stages:
        raise DataError(f"{run.root}: no stage {stage!r} with a checkpoint; found: {', '.join(stages)}")
    config = load_config(run.config)
    params = trained_params(run, stage or stages[0])
    return resolve_model(config.model), params, Tokenizer.load(run.tokenizer), config.serve


def mesh_for(slots: int) -> Mesh | None:
    """Return all devices of this process where there are several and each gets a slot, else None."""
    devices = jax.local_devices()
    return make_mesh(MeshConfig(), devices) if 1 < len(devices) <= slots else None


def batch_rows(config: ModelConfig, rows: int, mesh: Mesh | None = None) -> int:
    """Return `eval.batch_rows`; for -1, 32 on a CPU or where the memory is unknown, else `sizes.exam_rows`."""
    if rows >= 0:
        return rows
    stats = jax.local_devices()[0].memory_stats() or {}
    if jax.default_backend() == "cpu" or "bytes_limit" not in stats:
        return CPU_ROWS
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    scores = trusted_backend(config, jnp.bfloat16)[0] == "xla"
    return exam_rows(config, free, mesh.size if mesh else 1, 2, scores)
