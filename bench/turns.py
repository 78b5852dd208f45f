"""Run two commands on the same cores in turns, one stopped while the other runs, and print the seconds each one had.

    python -m bench.turns [--seconds 12] [--log DIR] 'cd old && python launch.py' 'cd new && python launch.py'

A shared machine gets slower and faster within minutes; in turns both commands see the same of it. The clocks inside the
commands count the other one's turns too: only what is printed here compares.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs=2)
    parser.add_argument("--seconds", type=float, default=12.0, help="of a turn")
    parser.add_argument("--log", type=Path, default=Path("."), help="folder of turns-0.log and turns-1.log")
    args = parser.parse_args()
    args.log.mkdir(parents=True, exist_ok=True)
    running, had = [], [0.0, 0.0]
    for number, command in enumerate(args.commands):
        with open(args.log / f"turns-{number}.log", "wb") as log:
            running.append(
                subprocess.Popen(command, shell=True, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            )
        os.killpg(running[-1].pid, signal.SIGSTOP)
    try:
        while any(process.poll() is None for process in running):
            for number, process in enumerate(running):
                if process.poll() is not None:
                    continue
                begin = time.perf_counter()
                os.killpg(process.pid, signal.SIGCONT)
                try:
                    process.wait(args.seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGSTOP)
                had[number] += time.perf_counter() - begin
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for seconds, process, command in zip(had, running, args.commands, strict=True):
        print(f"{seconds:8.1f} s, exit code {process.returncode}: {command}")
    print(f"ratio of the second to the first: {had[1] / had[0]:.3f}")
    return max(abs(process.returncode) for process in running)


if __name__ == "__main__":
    sys.exit(main())
