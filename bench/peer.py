"""A peer's program in its own interpreter, which works on one order at a time and sleeps in between."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from jaxchat.errors import UsageError


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compare", nargs=2, metavar=("nanochat", "DIR"))
    parser.add_argument("--python", default=sys.executable, help="of --compare: the peer's interpreter")


def check_peer(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.compare and args.compare[0] != "nanochat":
        parser.error(f"--compare {args.compare[0]}: the one peer known is nanochat")


class Program:
    """Orders and answers are JSON, a line each. Raises `UsageError` with the program's last words if it ends."""

    def __init__(self, command: Sequence[str], errors: Any, **options: Any):
        self._errors = errors
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, **options
        )
        self.about = self._answer()

    def order(self, what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its last words follow
            print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
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
        self._process.stdin.close()  # its loop over orders ends
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # we were stopped while it was at work
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
