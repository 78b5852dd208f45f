"""Count the figures of size: lines, files, tokens, and the files that a training step and a chat request pass.

    python -m bench.size            lines, files and tokens
    python -m bench.size --paths    also trains a tiny model and asks it a question, about two minutes

Tokens are bytes / 4. Files of a training step: those on the stack from train/loop.py to the function that calls
jaxchat/loss.py, and those whose functions run below that one (the forward pass and the loss), while a tiny model
trains. Files of a chat request: those with a function that runs between the request and the end of its answer. Calls
are seen by `sys.setprofile`; imports do not count. The last line is one JSON object.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from jaxchat.pack import ROOT, core_files

LOOP, LOSS = "train/loop.py", "jaxchat/loss.py"
CODE = (".py", ".js", ".css", ".html", ".jinja", ".j2")
TINY = ["model.depth=2", "model.width=48", "model.n_heads=3", "model.head_width=16", "model.vocab_size=320",
        "model.seq_len=64", "train.batch_tokens=256", "train.steps=2", "train.device_batch_rows=4",
        'sft.mixture=["identity:60"]', "serve.max_tokens=8", "data.source=synthetic:lottery:300"]  # fmt: skip
# Runs launch.py. While the file `on` exists it collects the stacks of our functions, "file:function file:function ...".
TRACER = """
import os, runpy, sys, threading
root, folder = sys.argv.pop(1), sys.argv.pop(1)
del sys.argv[0]
stacks, on = set(), [False]

def profile(frame, event, argument):
    if event != "call" or not on[0] or not frame.f_code.co_filename.startswith(root):
        return
    stack = []
    while frame:
        if frame.f_code.co_filename.startswith(root) and frame.f_code.co_name != "<module>":
            stack.append(frame.f_code.co_filename[len(root):] + ":" + frame.f_code.co_name)
        frame = frame.f_back
    stacks.add(" ".join(reversed(stack)))

def watch():
    while True:
        on[0] = os.path.exists(folder + "/on")
        with open(folder + "/stacks.part", "w") as file:
            file.writelines(stack + chr(10) for stack in list(stacks))
        os.replace(folder + "/stacks.part", folder + "/stacks")
        threading.Event().wait(0.1)

threading.Thread(target=watch, daemon=True).start()
threading.setprofile(profile)
sys.setprofile(profile)
sys.path.insert(0, root)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def files_below(*names: str) -> list[Path]:
    """Return the files of code below these folders of the repository."""
    return [p for name in names for p in sorted((ROOT / name).rglob("*")) if p.suffix in CODE and p.is_file()]


def traced(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start launch.py under the tracer, which keeps what it sees in the folder."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [sys.executable, "-c", TRACER, f"{ROOT}/", str(folder), str(ROOT / "launch.py"), *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def stacks(folder: Path) -> list[list[str]]:
    """Return the stacks that the tracer has seen, functions of ours as "file:function"."""
    time.sleep(0.5)  # the tracer writes every 0.1 s
    return [line.split() for line in (folder / "stacks").read_text().splitlines() if line]


def file_of(function: str) -> str:
    return function.partition(":")[0]


def training_files(folder: Path, run: Path) -> list[str]:
    """Train a tiny model; return the files on the way from the loop to the loss."""
    (folder / "on").touch()
    sets = [word for setting in TINY for word in ("--set", setting)]
    process = traced(folder, "train", "--run-dir", str(run), "--stages", "sft", *sets)
    if process.wait():
        raise SystemExit("the tiny training failed")
    below = []  # the part of a stack that begins in the loop
    for stack in stacks(folder):
        files = [file_of(function) for function in stack]
        if LOOP in files:
            below.append(stack[files.index(LOOP) :])
    callers = {tuple(stack[:-1]) for stack in below if file_of(stack[-1]) == LOSS and file_of(stack[-2]) != LOSS}
    on_the_way = [stack for stack in below if any(tuple(stack[: len(caller)]) == caller for caller in callers)]
    return sorted({file_of(function) for stack in on_the_way for function in stack})


def request_files(folder: Path, run: Path) -> list[str]:
    """Serve the tiny model and ask it twice; return the files with functions that the second request runs."""
    (folder / "on").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = traced(folder, "serve", str(run), "--port", str(port))
    url, body = f"http://127.0.0.1:{port}", {"messages": [{"role": "user", "content": "Who are you?"}]}

    def ask() -> None:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", data, headers)).read()

    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health").read()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        ask()
        time.sleep(1)
        (folder / "on").touch()
        time.sleep(0.3)
        ask()
        seen = stacks(folder)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    return sorted({file_of(stack[-1]) for stack in seen})


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
            figures["training_step"] = training_files(Path(folder), Path(folder) / "run")
            figures["chat_request"] = request_files(Path(folder), Path(folder) / "run")
            figures |= {f"{name}_files": len(figures[name]) for name in ("training_step", "chat_request")}
    for name, value in figures.items():
        if isinstance(value, int):
            print(f"{name:<22} {value:>10,}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
