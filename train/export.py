"""Stage export: the furthest trained model in `export/`, in the formats that other people load."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.interop.huggingface import write_hf
from jaxchat.interop.orbax_export import write_orbax
from jaxchat.interop.trained import Trained, check_dtype, load_trained
from jaxchat.log import say
from jaxchat.paths import RunDir, sync_directory

FORMATS: dict[str, Callable[[Trained, Path], dict[str, Any]]] = {"orbax": write_orbax, "hf": write_hf}


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write `export/<format>/` anew; facts: what each holds, digest."""
    model, facts = load_trained(run, dtype=config.export.dtype), {}
    left = [run.export / name for name in FORMATS if name not in config.export.formats]
    for path in [*run.export.glob(".*"), *left]:  # what was killed half way, and what another setting had made
        shutil.rmtree(path, ignore_errors=True)
    for name in config.export.formats:
        folder, new, old = (run.export / part for part in (name, f".{name}.new", f".{name}.old"))
        facts[name] = FORMATS[name](model, new)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        sync_directory(run.export)
        shutil.rmtree(old, ignore_errors=True)
        say(f"  {folder}: {facts[name]['bytes'] / 1e6:,.0f} MB of {facts[name]['dtype']}")
    return facts | {"stage": model.stage, "digest": hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()}


def check(config: Config) -> None:
    """`UsageError` for a format or dtype that does not exist, before any work."""
    for name in config.export.formats:
        if name not in FORMATS:
            raise UsageError(f"export.formats: {name!r} is unknown; choose from {', '.join(FORMATS)}")
    check_dtype(config.export.dtype)
