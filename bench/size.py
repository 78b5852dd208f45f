"""Count the figures of size: lines, files, tokens, and the files that a training step and a chat request pass.

    python -m bench.size            lines, files and tokens
    python -m bench.size --paths    also trains a tiny model and asks it a question, about two minutes

Tokens are bytes / 4. Files of a training step: those on the stack from train/loop.py to the function that calls
jaxchat/loss.py, and those whose functions run below that one (the forward pass and the loss), while a tiny model
trains. Files of a chat request: those with a function that runs between the request and the end of its answer. Calls
are seen by `sys.setprofile`; imports do not count. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxchat.pack import ROOT, core_files

LOOP, LOSS = "train/loop.py", "jaxchat/loss.py"
CODE = (".py", ".js", ".css", ".html", ".jinja", ".j2")
OURS = tuple(f"{ROOT}/{name}" for name in ("launch.py", "jaxchat/", "train/", "serve/"))
TINY = ["model.depth=2", "model.width=48", "model.n_heads=3", "model.head_width=16", "model.vocab_size=320",
        "model.seq_len=64", "train.batch_tokens=256", "train.steps=2", "train.device_batch_rows=4",
        'sft.mixture=["identity:60"]', "serve.max_tokens=8", "data.source=synthetic:lottery:300"]  # fmt: skip
Stack = tuple[str, ...]  # functions of ours as "file:function", the innermost last


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def files_below(*names: str) -> list[Path]:
    """Return the files of code below these folders of the repository."""
    return [p for name in names for p in sorted((ROOT / name).rglob("*")) if p.suffix in CODE and p.is_file()]


class Recorder:
    """Keeps the stacks of all calls of our functions, in all threads that begin after it."""

    def __init__(self) -> None:
        self._stacks: set[Stack] | None = None
        threading.setprofile(self._see)
        sys.setprofile(self._see)

    def _see(self, frame: Any, event: str, _: Any) -> None:
        if self._stacks is None or event != "call" or not frame.f_code.co_filename.startswith(OURS):
            return
        stack = []
        while frame:
            if frame.f_code.co_filename.startswith(OURS) and frame.f_code.co_name != "<module>":
                stack.append(f"{frame.f_code.co_filename.removeprefix(f'{ROOT}/')}:{frame.f_code.co_name}")
            frame = frame.f_back
        self._stacks.add(tuple(reversed(stack)))

    @contextlib.contextmanager
    def recording(self) -> Iterator[set[Stack]]:
        self._stacks = stacks = set()
        yield stacks
        self._stacks = None


def file_of(function: str) -> str:
    return function.partition(":")[0]


def training_files(recorder: Recorder, run: Path) -> list[str]:
    """Train a tiny model; return the files on the way from the loop to the loss."""
    import launch

    sets = [word for setting in TINY for word in ("--set", setting)]
    with recorder.recording() as stacks:
        if launch.main(["train", "--run-dir", str(run), "--stages", "sft", *sets]):
            raise SystemExit("the tiny training failed")
    below = []  # the part of a stack that begins in the loop
    for stack in stacks:
        files = [file_of(function) for function in stack]
        if LOOP in files:
            below.append(stack[files.index(LOOP) :])
    callers = {stack[:-1] for stack in below if file_of(stack[-1]) == LOSS and file_of(stack[-2]) != LOSS}
    on_the_way = [stack for stack in below if any(stack[: len(caller)] == caller for caller in callers)]
    return sorted({file_of(function) for stack in on_the_way for function in stack})


def request_files(recorder: Recorder, run: Path) -> list[str]:
    """Serve the tiny model and ask it twice; return the files with functions that the second request runs."""
    from starlette.testclient import TestClient

    from jaxchat.config import load_config
    from jaxchat.run_dir import RunDir
    from jaxchat.scaling import resolve
    from serve.app import make_service

    app, service = make_service(RunDir(run), resolve(load_config(run / "config.toml")))
    service.worker.loaded.result()
    client, body = TestClient(app), {"messages": [{"role": "user", "content": "Who are you?"}]}
    client.post("/v1/chat/completions", json=body).raise_for_status()
    service.worker.engine.programs.stop_compiling()
    with recorder.recording() as stacks:
        client.post("/v1/chat/completions", json=body).raise_for_status()
    service.worker.close()
    return sorted({file_of(stack[-1]) for stack in stacks if stack})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", action="store_true", help="count the files of a training step and of a chat request")
    args = parser.parse_args()
    product, core = [ROOT / "launch.py", *files_below("jaxchat", "train", "serve")], core_files()
    figures = {
        "product_lines": lines(product),
        "product_lines_py": lines([p for p in product if p.suffix == ".py"]),
        "product_files": len(product),
        "core_lines": lines(core),
        "core_files": len(core),
        "core_tokens": sum(path.stat().st_size for path in core) // 4,
        "test_lines": lines(files_below("tests")),
        "bench_lines": lines(files_below("bench")),
        "document_lines": lines([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")]),
    }
    if args.paths:
        with tempfile.TemporaryDirectory() as folder:
            recorder, run = Recorder(), Path(folder) / "run"
            figures["training_step"] = training_files(recorder, run)
            figures["chat_request"] = request_files(recorder, run)
            figures |= {f"{name}_files": len(figures[name]) for name in ("training_step", "chat_request")}
    for name, value in figures.items():
        if isinstance(value, int):
            print(f"{name:<22} {value:>10,}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
