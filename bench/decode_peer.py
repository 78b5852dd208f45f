"""nanochat's engine in its own interpreter, with our weights, for `bench.decode --compare nanochat`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from bench.compare import check_checkout, write_model
from bench.peer import Program
from jaxchat.config import Config
from jaxchat.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("nanochat_decode.py")


class Peer(Program):
    """Ordered by prompt, rows and settings."""

    def __init__(self, config: Config, params: Any, tokenizer: Tokenizer, directory: Path, python: str):
        check_checkout(directory, "engine.py")
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        settings = write_model(config, params, tokenizer, folder, directory)
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
