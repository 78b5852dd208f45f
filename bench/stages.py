"""Where the seconds of a run go, stage by stage: training, compiling, evaluation, samples, and the rest.

    python -m bench.stages --tier nano --run-dir runs/timed [--set K=V ...] [--profile FILE]

Takes the arguments of launch.py and runs them in this process. CPU seconds (of all threads, without child processes)
say more than wall clock on a machine that does other work, too. `trace`, `lower`, `compile` and `read` (from the cache
of compiled programs) are wall seconds that JAX reports, of background threads, too. `train` is the sum of
`step_seconds`, with compilation in the first step; `rollouts` (of RL) is a part of it. Prints a table, and one JSON
object as the last line. `--profile` also writes what cProfile sees of the main thread.
"""

import argparse
import cProfile
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path

BEGUN = time.time() - time.process_time()  # about when the process began: nothing has waited yet
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
    "/jax/compilation_cache/cache_retrieval_time_sec": "read",
}
FOLDERS = {"pretrain": "base", "sft": "sft", "rl": "rl"}


def main(words: list[str], profile: str | None) -> None:
    import launch

    marks = [("before", time.time(), time.process_time())]  # stage, when it began, CPU seconds until then
    compiled: Counter[tuple[str, str]] = Counter()
    args = launch.parse(words)

    def watched(stage, *rest):
        marks.append((stage.name, time.time(), time.process_time()))
        original(stage, *rest)
        marks.append(("after", time.time(), time.process_time()))

    import jax

    def listen(event, seconds, **_):
        if event in EVENTS:
            compiled[marks[-1][0], EVENTS[event]] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    from train import stages

    original, stages._run_stage = stages._run_stage, watched
    profiler = cProfile.Profile()
    code = profiler.runcall(launch.main, words) if profile else launch.main(words)
    if profile:
        profiler.dump_stats(profile)
    marks.append(("end", time.time(), time.process_time()))
    root = Path(args.run_dir or f"runs/{args.tier or 'nano'}")
    rows = {"before": {"wall": marks[1][1] - BEGUN, "cpu": marks[1][2]}}
    for (name, wall, cpu), (_, wall_end, cpu_end) in itertools.pairwise(marks[1:]):
        row = rows.setdefault(name, {"wall": 0.0, "cpu": 0.0})
        row["wall"] += wall_end - wall
        row["cpu"] += cpu_end - cpu
    for (name, kind), seconds in compiled.items():
        rows[name][kind] = seconds
    for name, folder in FOLDERS.items():
        file = root / folder / "metrics.jsonl"
        if name in rows and file.exists():
            steps = [json.loads(line) for line in file.read_text().splitlines()]
            rows[name]["train"] = sum(step["step_seconds"] for step in steps)
            rows[name]["rollouts"] = sum(step.get("rollout_seconds", 0.0) for step in steps)
            facts = json.loads((root / "stages.json").read_text())[name]["facts"]
            rows[name]["evaluate"] = facts.get("eval_seconds", 0.0)
    rows["total"] = {key: sum(row.get(key, 0.0) for row in rows.values()) for key in ("wall", "cpu", *EVENTS.values())}
    columns = ("wall", "cpu", "train", "rollouts", "evaluate", *EVENTS.values())
    print(f"{'stage':<10}" + "".join(f"{column:>10}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<10}" + "".join(f"{row[column]:>10.1f}" if row.get(column) else " " * 10 for column in columns))
    print(json.dumps({name: {key: round(value, 2) for key, value in row.items()} for name, row in rows.items()}))
    sys.exit(code)


if __name__ == "__main__":
    from launch import prefer_huge_pages

    prefer_huge_pages()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--profile")
    known, rest = parser.parse_known_args()
    main(rest, known.profile)
