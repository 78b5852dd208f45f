"""Seconds from `pip install` to the first answer of a model of one's own, in a new environment and an empty folder.

    python -m bench.first_answer [--clone] [--cache DIR] [--tier nano] [--set K=V ...]

Installs this checkout (`--clone`: only requirements.txt, and runs launch.py as before there was a command), trains the
tier, and asks "hello" in a chat. Compiled programs go to an empty folder unless `--cache` names one: the first run on a
machine. pip's own cache of downloads is used; PIP_NO_CACHE_DIR=1 leaves it out. The last line is one JSON object, with
wall-clock and CPU seconds (user and system, of all processes) of each part.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--clone", action="store_true")
    parser.add_argument("--cache")
    parser.add_argument("--tier", default="nano")
    args, more = parser.parse_known_args()
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    parts: dict[str, dict[str, float]] = {}

    with tempfile.TemporaryDirectory() as place:
        python = Path(place, "venv", "bin", "python")

        def timed(name: str, *command: object, text: str | None = None) -> str:
            begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            words = list(map(str, command))
            done = subprocess.run(words, cwd=place, env=env, input=text, stdout=subprocess.PIPE, text=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            parts[name] = {"wall": round(time.perf_counter() - begin, 1), "cpu": round(cpu, 1)}
            return done.stdout

        timed("venv", sys.executable, "-m", "venv", Path(place, "venv"))
        what = ("-r", ROOT / "requirements.txt") if args.clone else (ROOT,)
        timed("install", python, "-m", "pip", "install", "-q", *what)
        program = (python, ROOT / "launch.py") if args.clone else (python.with_name("jaxchat"),)
        run, cache = Path(place, "runs", args.tier), ("--cache-dir", args.cache or Path(place, "cache"))
        timed("train", *program, "--tier", args.tier, "--run-dir", run, *cache, *more)
        answer = timed("answer", *program, "chat", run, *cache, text="hello\n")
    total = {key: round(sum(part[key] for part in parts.values()), 1) for key in ("wall", "cpu")}
    print(json.dumps({"clone": args.clone, "answer": answer.strip(), **parts, "total": total}))


if __name__ == "__main__":
    main()
