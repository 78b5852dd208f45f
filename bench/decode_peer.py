"""nanochat's engine in its own interpreter, with our weights, for `bench.decode --compare nanochat`."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.compare import nanochat_config
from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.text.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("nanochat_decode.py")


class Peer:
    """Asleep while it is not asked; raises `UsageError` with its last words if it ends."""

    def __init__(self, config: Config, params: Any, tokenizer: Tokenizer, directory: Path, python: str):
        if not (directory / "nanochat" / "engine.py").exists():
            raise UsageError(f"{directory}: no nanochat/engine.py there; give a checkout of karpathy/nanochat")
        self._folder, self._errors = tempfile.TemporaryDirectory(), tempfile.TemporaryFile("w+")
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
        self._process = subprocess.Popen(
            [python, "-u", str(WORKER), str(folder / "settings.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=directory,
        )  # fmt: skip
        self.about = self._answer()

    def run(self, prompt: list[int], rows: int, args: argparse.Namespace) -> dict[str, float]:
        assert self._process.stdin is not None
        asked = {"prompt": prompt, "rows": rows, "tokens": args.tokens, "temperature": args.temperature}
        print(json.dumps(asked | {"top_k": args.top_k or None}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no output"])[-1]
            raise UsageError(f"nanochat ended with code {code}: {last}; --python names an interpreter with torch")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()
