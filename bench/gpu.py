"""Measure everything that only a GPU can tell: python -m bench.gpu [--out FILE] [--parts a,b] [--toy]

Parts run in the order of their worth, each in a process of its own with a time limit of its own: one that crashes, runs
out of memory or hangs is recorded with its error, and the next one goes on. FILE is written anew after every finding,
so it is safe to stop at any time; parts that are not run again keep what they have there. One GPU is used: the
first, or what CUDA_VISIBLE_DEVICES names. The last line of the output is one JSON object.

--toy: tiny shapes, for any machine. --nanochat DIR: a checkout of karpathy/nanochat, whose first steps are then trained
on the same tokens; --python is an interpreter with torch. docs/performance.md says what each part decides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import DataError, InterruptedRun, JaxchatError, UsageError
from jaxchat.run_dir import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {  # seconds; the functions are in bench/gpu_parts.py
    "device": 120,
    "attention": 240,
    "products": 180,
    "step-d12-scanned": 240,
    "step-d12-unrolled": 240,
    "step-d12-none": 240,
    "step-d20-scanned": 420,
    "step-d20-unrolled": 420,
    "step-d20-none": 420,
    "profile": 420,
    "decode": 420,
    "curve": 600,
    "curve-nanochat": 900,
    "compile": 600,
}
GRACE = 5.0  # seconds between asking a process to end and ending it


def run_part(
    command: Sequence[str], limit: float, take: Callable[[dict[str, Any]], None], environment: Mapping[str, str]
) -> str | None:
    """Run a program that prints a JSON object a line and call `take` with each; returns why it failed, or None.

    After `limit` seconds, or when an exception passes through, its whole process group is ended.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment, process_group=0
        )
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        end = time.monotonic() + limit
        try:
            while (line := lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
                with contextlib.suppress(json.JSONDecodeError):  # a library may print something else
                    if isinstance(finding := json.loads(line), dict):
                        take(finding)
            code = process.wait(max(0.1, end - time.monotonic()))
        except (queue.Empty, subprocess.TimeoutExpired):
            return f"over its limit of {limit:g} s"
        finally:
            _end(process)
            reader.join(GRACE)
            assert process.stdout is not None
            process.stdout.close()
        if code == 0:
            return None
        errors.seek(0)
        words = [line for line in errors.read().splitlines() if line.strip()]
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return f"ended with {how}: {words[-1][:500] if words else 'no output'}"


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # closed: it was ended
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """End what is left of a process group: the program, and whatever it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def choose(names: str | None, nanochat: str | None) -> list[str]:
    """Return the parts to run: all, or those that begin with one of the names; the device's always comes first."""
    wanted = names.split(",") if names else list(LIMITS)
    for name in wanted:
        if not any(_begins(part, name) for part in LIMITS):
            raise UsageError(f"--parts {name}: unknown; choose from {', '.join(LIMITS)}")
    found = [part for part in LIMITS if part == "device" or any(_begins(part, name) for name in wanted)]
    return [part for part in found if part != "curve-nanochat" or nanochat]


def _begins(part: str, name: str) -> bool:
    return part == name or part.startswith(f"{name}-")


class Results:
    """The file. `parts` maps a part to its status, seconds, limit, error and findings."""

    def __init__(self, path: Path, toy: bool):
        self._path = path
        self.content: dict[str, Any] = {"bench": "gpu", "toy": toy, "stopped": None, "parts": {}}
        if path.exists():
            before = read_json(path)
            if not isinstance(before, dict) or before.get("bench") != "gpu" or before.get("toy") != toy:
                raise DataError(f"{path}: holds something else than results of this command; give another --out")
            self.content["parts"] = before.get("parts", {})

    def begin(self, part: str, limit: float) -> dict[str, Any]:
        entry = {"status": "running", "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "limit": limit, "findings": []}
        self.content["parts"][part] = entry
        self.write()
        return entry

    def write(self) -> None:
        write_json(self._path, self.content)


def run_parts(args: argparse.Namespace, results: Results, environment: Mapping[str, str]) -> dict[str, str]:
    """Run the chosen parts and return the errors of those that failed.

    Raises `UsageError` where there is no accelerator and full size was asked for.
    """
    failed = {}
    with tempfile.TemporaryDirectory() as work:
        settings = {key: getattr(args, key) for key in ("toy", "nanochat", "python", "text", "steps")} | {"work": work}
        for part in choose(args.parts, args.nanochat):
            limit = args.seconds_per_part or LIMITS[part]
            entry, begin = results.begin(part, limit), time.monotonic()

            def take(finding: dict[str, Any], entry: dict[str, Any] = entry, part: str = part) -> None:
                entry["findings"].append(finding)
                results.write()
                scalars = (f"{k}={v}" for k, v in finding.items() if isinstance(v, str | int | float))
                print(f"{part}: {' '.join(scalars)[:240]}", file=sys.stderr)

            command = [sys.executable, "-m", "bench.gpu_parts", part, json.dumps(settings)]
            try:
                entry["error"] = run_part(command, limit, take, environment)
                entry["status"] = "failed" if entry["error"] else "done"
                if entry["error"]:
                    failed[part] = entry["error"]
            except (KeyboardInterrupt, InterruptedRun) as stop:
                entry["status"] = results.content["stopped"] = f"stopped ({str(stop) or 'SIGINT'})"
                raise
            finally:
                entry["seconds"] = round(time.monotonic() - begin, 1)
                results.write()
            print(f"{part}: {entry['error'] or 'done'}, {entry['seconds']} s", file=sys.stderr)
            if (
                part == "device"
                and not args.toy
                and entry["findings"][:1]
                and entry["findings"][0]["platform"] == "cpu"
            ):
                raise UsageError("JAX sees no accelerator here; --toy runs everything at toy size")
    return failed


def main(argv: list[str] | None, environment: Mapping[str, str]) -> int:
    """Run the command; returns 0, 1 where a part failed, or the exit code of an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), metavar="FILE")
    parser.add_argument("--parts", metavar="A,B", help=f"of {', '.join(LIMITS)}; step is all that begin with it")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seconds-per-part", type=float, metavar="N", help="instead of each part's own limit")
    parser.add_argument("--steps", type=int, default=200, help="of the curve")
    parser.add_argument("--text", default="", metavar="GLOB", help="text of the curve; default: Python's own files")
    parser.add_argument("--nanochat", metavar="DIR")
    parser.add_argument("--python", default=sys.executable, help="of --nanochat: an interpreter with torch")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        results = Results(args.out, args.toy)
        failed = run_parts(args, results, {"CUDA_VISIBLE_DEVICES": "0"} | dict(environment))
    except JaxchatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, InterruptedRun):
        print(f"stopped; {args.out} has what was found", file=sys.stderr)
        return InterruptedRun.exit_code
    print(json.dumps({"out": str(args.out), "parts": len(results.content["parts"]), "failed": failed}))
    return 1 if failed else 0


def _terminated(number: int, frame: Any) -> None:
    raise InterruptedRun(signal.Signals(number).name)


if __name__ == "__main__":
    from launch import prefer_huge_pages  # and what launch.py sets in the environment, for all parts

    prefer_huge_pages()
    sys.exit(main(None, os.environ))
