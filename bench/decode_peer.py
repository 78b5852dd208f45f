"""nanochat's engine in its own interpreter, with our weights, for `bench.decode --compare nanochat`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.compare import nanochat_config
from bench.peer import Program
from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("nanochat_decode.py")


class Peer(Program):
    """Ordered by prompt, rows and settings."""

    def __init__(self, config: Config, params: Any, tokenizer: Tokenizer, directory: Path, python: str):
        if not (directory / "nanochat" / "engine.py").exists():
            raise UsageError(f"{directory}: no nanochat/engine.py there; give a checkout of karpathy/nanochat")
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        weights = {".".join(k.key for k in path): np.asarray(leaf, np.float32) for path, leaf in leaves}
        np.savez(folder / "weights.npz", **weights)  # type: ignore[arg-type]
        tokenizer.save(folder)
        settings = {
            "directory": str(directory.resolve()),
            "config": nanochat_config(config),
            "weights": str(folder / "weights.npz"),
            "tokenizer": str(folder / "tokenizer.json"),
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        command = [python, "-u", str(WORKER), str(folder / "settings.json")]
        super().__init__(command, tempfile.TemporaryFile("w+"), cwd=directory)

    def run(self, prompt: list[int], rows: int, args: argparse.Namespace) -> dict[str, float]:
        asked = {"prompt": prompt, "rows": rows, "tokens": args.tokens, "temperature": args.temperature}
        return self.order(asked | {"top_k": args.top_k or None})

    def close(self) -> None:
        super().close()
        self._errors.close()
        self._folder.cleanup()
